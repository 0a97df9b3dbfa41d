"""What was found in files, kept: a file that has not changed is not read again to find it anew.

One JSON file for each path that a user names, in a folder of the cache that belongs to the user.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from picotron_core import files
from picotron_core.data.sources import Scan
from picotron_core.data.streams import Stamp

VERSION = 2  # of the rules by which files are recognised
RACY_NS = 2_000_000_000  # a file that was changed so shortly before may change again unseen


@dataclass(slots=True)
class Scans:
    """The scans of the files below one path. path: where they are kept; None: nowhere."""

    path: Path | None
    kept: dict[str, Any] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)

    def get(self, file: Path, stamp: Stamp) -> Scan | None:
        """What was found in a file, if its size, times and inode are as they were."""
        entry = self.kept.get(str(file))
        if entry is None or entry["stamp"] != list(stamp):
            return None
        self.used[str(file)] = entry
        found = dict(entry["scan"])
        refused = found["refused"] and tuple(found["refused"])
        return Scan(**{**found, "layers": tuple(found["layers"]), "refused": refused})

    def put(self, file: Path, stamp: Stamp, scan: Scan, *, began_ns: int) -> None:
        """Keep a scan, unless the file may have changed since without a trace in its times."""
        _, mtime, ctime, _ = stamp
        if max(mtime, ctime) < began_ns - RACY_NS:
            self.used[str(file)] = {"stamp": list(stamp), "scan": asdict(scan)}

    def save(self) -> None:
        """Write what is new. Where that is not possible, files are read again the next time."""
        if self.path is None or self.used == self.kept:
            return
        try:
            files.make_folder(self.path.parent, mode=0o755)
            if _is_ours(self.path.parent):
                content = json.dumps([VERSION, self.used])
                files.replace_text(self.path, f"{zlib.crc32(content.encode())}\n{content}")
        except OSError:  # a cache that only others may write
            return


def open_scans(cache_dir: Path | None, named: Path, text_field: str) -> Scans:
    """The scans of what lies at a path that a user named.

    Args:
        cache_dir: None: there are none.
        text_field: decides, too, what is left out of a folder.
    """
    if cache_dir is None:
        return Scans(None)
    resolved = os.fsencode(named.resolve())
    key = hashlib.sha256(resolved + b"\n" + os.fsencode(text_field)).hexdigest()[:32]
    path = cache_dir / f"files-{files.user_id()}" / f"{key}.json"
    try:
        if not _is_ours(path.parent):
            return Scans(None)
        with files.open_regular(path, owners={files.user_id()}) as file:
            checksum, _, content = file.read().partition(b"\n")
        if int(checksum) == zlib.crc32(content):
            version, kept = json.loads(content)
            return Scans(path, kept if version == VERSION else {})
    except (OSError, ValueError):  # none yet, not ours, or damaged: files are read again
        pass
    return Scans(path)


def _is_ours(folder: Path) -> bool:
    """Whether only this user can have written there: what others kept might not be true."""
    found = folder.lstat()
    return found.st_uid == files.user_id() and not found.st_mode & 0o022
