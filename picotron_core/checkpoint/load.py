"""Find a run's newest whole checkpoint, and read from it what this rank needs."""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from picotron_core.checkpoint.commit import is_checkpoint, listed, refuse_other_step
from picotron_core.checkpoint.content import file_of
from picotron_core.checkpoint.header import FLOAT32_BYTES, LIMIT, MASTER, Header, decode
from picotron_core.checkpoint.manifest import MANIFEST, Manifest, encode, read_manifest, verify
from picotron_core.checkpoint.pieces import held, numbers_of, tensors
from picotron_core.checkpoint.rng import set_rng_states
from picotron_core.engine.state import TrainState
from picotron_core.errors import ConfigError, DamagedFileError
from picotron_core.files import open_regular
from picotron_core.parallel.piece import Piece, common, covered_once, whole
from picotron_core.parallel.world import World

FILLED = 2  # slices are filled up to equal width: never to twice a tensor of a row for each
log = logging.getLogger("picotron")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One whose files are those of its manifest, and whose pieces make whole tensors."""

    folder: Path
    manifest: Manifest
    headers: Mapping[str, Header]

    def read(self, kind: str, name: str, piece: Piece) -> Tensor:
        """Those numbers of a tensor that a piece of it names, flat, on the host; its filling is 0.

        No byte is read that is not asked for, and each once.

        Raises: DamagedFileError where a file ends early, or cannot be read any more.
        """
        found = torch.zeros(piece.size, dtype=torch.float32)
        target = found.view(torch.uint8).numpy().data
        for file_name, header in self.headers.items():
            runs = list(common(piece, header.pieces[name])) if name in header.pieces else []
            if not runs:
                continue
            path, first = self.folder / file_name, header.offsets[kind, name]
            try:
                with open_regular(path) as file:
                    for mine, theirs, count in runs:
                        file.seek(first + FLOAT32_BYTES * theirs)
                        rest = target[FLOAT32_BYTES * mine : FLOAT32_BYTES * (mine + count)]
                        while rest:
                            got = file.readinto(rest)
                            if not got:
                                raise DamagedFileError(f"{path} is damaged: it ends early.")
                            rest = rest[got:]
            except OSError as error:
                raise DamagedFileError(f"{path} cannot be read ({error.strerror}).") from None
        return found


def open_checkpoint(folder: Path, *, part: int = 0, parts: int = 1) -> Checkpoint:
    """Check all there is to check, before anything large is allocated.

    Args:
        part, parts: of several ranks, each reads this part of the files for their checksums.

    Raises: DamagedFileError that names the file.
    """
    manifest = read_manifest(folder)
    refuse_other_step(folder, manifest)
    _refuse_other_sizes(folder, manifest)
    headers: dict[str, Header] = {}
    found: Counter[str] = Counter()
    for name, entry in manifest.files.items():
        try:
            with open_regular(folder / name) as file:
                if file.seek(0, 2) != entry.bytes:
                    raise ValueError(f"not the {entry.bytes} bytes that were written")
                file.seek(0)
                headers[name] = decode(file, entry.bytes, manifest.parameters)
        except (OSError, ValueError) as error:
            raise DamagedFileError(f"{folder / name} is damaged ({error}).") from None
        if headers[name].offsets.keys() - {
            (kind, parameter) for kind in manifest.kinds for parameter in headers[name].pieces
        } or len(headers[name].offsets) != len(manifest.kinds) * len(headers[name].pieces):
            raise DamagedFileError(f"{folder / name} is damaged (other tensors than the manifest).")
        for parameter, piece in headers[name].pieces.items():  # now: headers are kept, files many
            found[parameter] += piece.size
            if found[parameter] > FILLED * piece.numel:
                raise DamagedFileError(
                    f"{folder / name} is damaged (the files up to it hold more than all of "
                    f"{parameter})."
                )
    for name, shape in manifest.parameters.items():
        pieces = [header.pieces[name] for header in headers.values() if name in header.pieces]
        if not covered_once(pieces, prod(shape)):
            raise DamagedFileError(
                f"{folder / MANIFEST} is damaged: its files do not hold each number of {name} once."
            )
    verify(folder, manifest, part=part, parts=parts)  # last: it reads every byte
    return Checkpoint(folder=folder, manifest=manifest, headers=headers)


def _refuse_other_sizes(folder: Path, manifest: Manifest) -> None:
    """Before any file is opened: they must have room for every number once, and little more."""
    numbers = sum(prod(shape) for shape in manifest.parameters.values())
    least = FLOAT32_BYTES * len(manifest.kinds) * numbers
    if not least <= manifest.bytes <= FILLED * least + (8 + LIMIT) * len(manifest.files):
        raise DamagedFileError(
            f"{folder / MANIFEST} is damaged: its files have {manifest.bytes} bytes for tensors "
            f"of {least}."
        )


def find_checkpoint(
    run: Path, world: World | None = None, *, below: int | None = None
) -> Checkpoint:
    """The newest whole checkpoint of a run, or the one that is given itself.

    A damaged one is named in a warning and passed over for the one before. All ranks call it, each
    reads a part of the files, and what one finds damaged is damaged for all; so is a manifest that
    not all see alike.

    Args:
        below: only checkpoints of earlier steps than this.

    Raises: ConfigError where there is none; DamagedFileError where all are damaged.
    """
    world = world or World()
    given = is_checkpoint(run)
    folders = [run] if given else listed(run / "checkpoints")
    names = json.loads(world.share(f"found/{below}", lambda: json.dumps([f.name for f in folders])))
    damage = ""
    for name in names:
        folder = (run.parent if given else run / "checkpoints") / name
        found = None
        try:
            found = open_checkpoint(folder, part=world.rank, parts=world.size)
            mine = f"\n{zlib.crc32(encode(found.manifest))}"
        except DamagedFileError as error:
            mine = str(error)
        told = world.gather(f"damage/{below}/{name}", mine)
        damage = next((text for text in told if not text.startswith("\n")), "")
        if not damage and len(set(told)) > 1:
            damage = (
                f"{folder / MANIFEST} is not the same for all ranks: put --run.dir on a disk that "
                "all machines share, and look whether one shows an older state of it."
            )
        if found and not damage and (below is None or found.manifest.step < below):
            return found
        if damage and not given and world.is_first:
            log.warning("%s The one before it is used.", damage)
    if damage:
        raise DamagedFileError(f"No checkpoint of {run} is whole. {damage}")
    raise ConfigError(
        f"{run} holds no checkpoint{'' if below is None else f' of a step before {below}'}. Give "
        "the folder of a run that has saved one, e.g. runs/demo."
    )


def load(state: TrainState, checkpoint: Checkpoint) -> None:
    """Fill this rank's part of `state`, whatever layout has saved it.

    Raises: DamagedFileError where its tensors are not those of the model.
    """
    _refuse_other_states(state, checkpoint)
    _fill(state, checkpoint)
    state.weights.publish()


def load_newest(state: TrainState, run: Path, found: Checkpoint, world: World) -> Checkpoint:
    """Load what `find_checkpoint` found in `run`. Each rank reads again what others checked: where
    one cannot, all go back to the checkpoint before.

    Returns: the one that was loaded.
    Raises: DamagedFileError where none can be read, or `run` is a checkpoint itself.
    """
    while True:
        _refuse_other_states(state, found)
        mine, step = "", found.manifest.step
        try:
            _fill(state, found)
        except DamagedFileError as error:
            mine = str(error)
        damage = next(filter(None, world.gather(f"load/{step}", mine)), "")
        if not damage:
            state.weights.publish()
            return found
        if is_checkpoint(run):
            raise DamagedFileError(damage)
        if world.is_first:
            log.warning("%s The one before it is used.", damage)
        try:
            found = find_checkpoint(run, world, below=step)
        except ConfigError:
            raise DamagedFileError(f"No checkpoint of {run} is whole. {damage}") from None


def _refuse_other_states(state: TrainState, checkpoint: Checkpoint) -> None:
    _refuse_other_models(state.layout.shapes, [kind for kind, _ in tensors(state)], checkpoint)


def _fill(state: TrainState, checkpoint: Checkpoint) -> None:
    """All but the weights in the compute dtype: no word to other ranks until all are done."""
    manifest, mine = checkpoint.manifest, held(state)
    for kind, of in tensors(state):
        for name, piece in mine.items():
            numbers_of(of[name], piece, piece).copy_(checkpoint.read(kind, name, piece))
    state.step, state.tokens = manifest.step, manifest.tokens
    if state.loss_scale and manifest.loss_scale:
        state.loss_scale = replace(state.loss_scale, **manifest.loss_scale.model_dump())
    own = file_of(state.layout.mesh.world.index)
    if own in checkpoint.headers:
        try:
            set_rng_states(state, checkpoint.headers[own].notes)
        except ValueError as error:
            raise DamagedFileError(f"{checkpoint.folder / own} is damaged ({error}).") from None


def load_weights_only(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Fill a whole model's parameters, for generation."""
    _refuse_other_models({n: t.shape for n, t in parameters.items()}, [MASTER], checkpoint)
    for name, target in parameters.items():
        value = checkpoint.read(MASTER, name, whole(target.numel()))
        target.data.copy_(value.view(target.shape))


def _refuse_other_models(
    mine: Mapping[str, torch.Size], kinds: Sequence[str], checkpoint: Checkpoint
) -> None:
    folder, theirs = checkpoint.folder, checkpoint.manifest.parameters
    if missing := sorted(set(kinds) - set(checkpoint.manifest.kinds)):
        raise DamagedFileError(
            f"{folder} has no tensors of the kinds {', '.join(missing)}, which training goes on "
            "from: it was saved by something else."
        )
    if mine.keys() != theirs.keys():
        odd = sorted(mine.keys() ^ theirs.keys())[0]
        raise DamagedFileError(
            f"{folder} is of another model: {odd!r} is in only one of the two. "
            "Resume with the model settings of the run's own config.toml."
        )
    for name, shape in mine.items():
        if list(shape) != theirs[name]:
            raise DamagedFileError(
                f"{folder} is of another model: {name} is {tuple(theirs[name])} there, "
                f"{tuple(shape)} here."
            )
