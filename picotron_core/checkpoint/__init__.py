"""A run's state on disk: whole or not there, written while training goes on, read by any layout.

    checkpoints/step-00000500/          exists only once all below is durable and vouched for
        manifest.json                   layout, settings, progress; size and checksum of every file
        rank-00000.safetensors          what rank 0 wrote, and where in the whole tensors it belongs
        rank-00001.safetensors
    checkpoints/.writing-...            no checkpoint, whatever is in it

- Kept are the float32 masters and AdamW's moments, 12 bytes a parameter; weights in other dtypes
  are derived. Each number is written once, by one of the ranks that have it: ZeRO's shards and the
  slices of tp and pp by theirs, what replicas share by each an equal part. pieces.py
- A save copies this rank's part into one host buffer, before the next update, and a thread writes
  it; one save at a time. What is said between ranks is said by the main thread at the end of a
  step, so that collectives keep their order. snapshot.py, write.py, save.py
- Commit: files written and fsynced by all ranks; then one rank writes the manifest, fsyncs it and
  the folder, renames the folder, fsyncs its parent; only then old ones go. If any rank failed,
  none commits. There is no pointer to the latest, which could point at the wrong one: whoever looks
  takes the newest folder that its manifest vouches for. commit.py
- Loading reads byte ranges: a rank takes the numbers of its own part from whichever files hold
  them. load.py, header.py
- A checkpoint may come from anywhere: JSON and safetensors alone, every size bounded and every
  offset checked before memory is taken for it, no links followed, nothing that it names imported.
"""
