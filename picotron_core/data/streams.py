"""The bytes of a file as streams: read in blocks, decompressed and decoded on the way."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from picotron_core.errors import DataError, reason

BLOCK = 1 << 20  # bytes that are read at a time
MAX_LAYERS = 4  # of compression; more is an attack

Stamp = tuple[int, int, int, int]  # size, mtime, ctime, inode


class UnsuitableFileError(DataError):
    """A file that cannot be trained on. One that was found in a folder is left out for `reason`;
    one that the user named is this error.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.reason = kind


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that can be read any number of times.

    path: the file; of a pipe, the name that it was given by.
    descriptor: of the unnamed file that the bytes of a pipe were copied to.
    """

    path: Path
    descriptor: int | None = None

    @property
    def name(self) -> str:
        """The path as it can be printed."""
        return printable(self.path)

    def open(self) -> IO[bytes]:
        """Open the bytes for reading, from the first.

        Raises: OSError, also where it has become something other than a plain file.
        """
        if self.descriptor is not None:
            return io.BufferedReader(_AtOwnPosition(self.descriptor), BLOCK)
        # O_NONBLOCK: opening a pipe would wait for its writer.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(0, "not a plain file")
        return io.BufferedReader(io.FileIO(descriptor, "rb"), BLOCK)

    def stamp(self) -> Stamp:
        """What changes when the content does."""
        found = self.path.stat() if self.descriptor is None else os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class _AtOwnPosition(io.RawIOBase):
    """Reads a descriptor without moving the position that all of its readers share."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}
        self._position = base.get(whence, 0) + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count


def printable(path: Path | str) -> str:
    """A name on one line of valid Unicode: bytes that are not UTF-8, and characters that cannot be
    printed, are shown as escapes.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in os.fspath(path))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


# The first bytes of a compressed file; a wrong guess is found by the checksum inside.
_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
}
_BZ2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # a first block, or the end of an empty file


def compression_of(head: bytes) -> str | None:
    """The compression of a file that begins with these bytes."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic) and (name != "bz2" or head[4:10] in _BZ2_BLOCKS):
            return name
    skippable = len(head) > 8 and 0x50 <= head[0] <= 0x5F and head[1:4] == b"\x2a\x4d\x18"
    return "zstd" if skippable else None


@contextmanager
def opened(stored: Stored, layers: tuple[str, ...]) -> Iterator[IO[bytes]]:
    """Open a file, decompressed by each of `layers` in turn, the outermost first."""
    with ExitStack() as stack:
        stream: Any = stack.enter_context(stored.open())
        for layer in layers:
            stream = stack.enter_context(_DECOMPRESS[layer](stream))
        yield stream


def _pyarrow(stream: IO[bytes], codec: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"Reading {codec} needs pyarrow, which is not installed: pip install 'picotron[data]'. "
            "Or decompress the file first."
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), codec)


class _Streams(io.RawIOBase):
    """Compressed streams, one after the other, with zeros between them and at the end or none.

    Python's own readers take a stream that is damaged at its beginning for the end of the file: the
    text in it would be lost without a word.
    """

    def __init__(self, file: IO[bytes], begin: Callable[[], Any]) -> None:
        self._file, self._begin = file, begin
        self._stream = begin()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = b""
        while not data:
            if self._stream.eof:
                more = self._stream.unused_data.lstrip(b"\0")
                while not more:
                    if not (block := self._file.read(BLOCK)):
                        return 0
                    more = block.lstrip(b"\0")
                self._stream = self._begin()
            elif self._stream.needs_input:
                if not (more := self._file.read(BLOCK)):
                    raise EOFError("Compressed file ended before the end-of-stream marker")
            else:
                more = b""
            data = self._stream.decompress(more, len(buffer))
        buffer[: len(data)] = data
        return len(data)


_DECOMPRESS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
    "bz2": lambda stream: _Streams(stream, bz2.BZ2Decompressor),
    "xz": lambda stream: _Streams(stream, lzma.LZMADecompressor),
    "zstd": lambda stream: _pyarrow(stream, "zstd"),
    "lz4": lambda stream: _pyarrow(stream, "lz4"),
}


def read_head(stored: Stored, size: int = BLOCK) -> tuple[tuple[str, ...], bytes]:
    """The layers of compression of a file, and its first bytes inside them."""
    layers: tuple[str, ...] = ()
    while True:
        with opened(stored, layers) as stream:
            head = b""
            while len(head) < size and (block := stream.read(size - len(head))):
                head += block
        layer = compression_of(head)
        if layer is None:
            return layers, head
        layers = (*layers, layer)
        if len(layers) > MAX_LAYERS:
            raise UnsuitableFileError(
                "compressed too often",
                f"{stored.name} is compressed more than {MAX_LAYERS} times. Decompress it first.",
            )


def blocks_of(stored: Stored, layers: tuple[str, ...]) -> Iterator[bytes]:
    """The decompressed bytes."""
    with opened(stored, layers) as stream:
        while block := stream.read(BLOCK):
            yield block


def decoded(blocks: Iterator[bytes], encoding: str) -> Iterator[str]:
    """The text of these bytes, block by block, without a byte-order mark; line ends as they are."""
    decoder = codecs.getincrementaldecoder(encoding)()
    for block in blocks:
        if text := decoder.decode(block):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@contextmanager
def errors_of(stored: Stored) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one line that names it.

    Raises: UnsuitableFileError where its content is damaged, DataError where it cannot be read.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(stored, error) from None
    except OSError as error:
        if error.errno is None:  # of bz2 and pyarrow: the data, not the system
            raise _damaged(stored, error) from None
        raise DataError(
            f"Cannot read {stored.name}: {error.strerror or reason(error)}. Check the file and who "
            "may read it."
        ) from None
    except ValueError as error:
        if type(error).__module__.startswith("pyarrow"):
            raise _damaged(stored, error) from None
        raise


def _damaged(stored: Stored, error: Exception) -> UnsuitableFileError:
    return UnsuitableFileError(
        "damaged",
        f"Cannot read {stored.name}: its compressed data is damaged or cut short "
        f"({reason(error)}). Fetch or make the file anew.",
    )
