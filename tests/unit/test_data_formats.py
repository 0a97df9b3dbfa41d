"""Files are what they hold, whatever they are called; what cannot be read is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import socket
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from picotron_core.data.corpus import open_corpus
from picotron_core.errors import DataError

TEXTS = [
    "first\nline",
    "zw\u00f6lf \u732b \U0001f600",
    '{"text": "looks like json"}',
    "x]y,[z",
    "a\u2028b",
]
RECORDS = [{"id": n, "text": text, "more": {"a": [1, None]}} for n, text in enumerate(TEXTS * 40)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS).encode()
PROSE = "A line of prose with a caf\u00e9 in it.\r\nAnd another.\n" * 30


def read(path, **options):
    return list(open_corpus([str(path)], **options).documents())


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [r["text"] for r in RECORDS]}), sink)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


AS_RECORDS = {
    "data": LINES,
    "array.json": ARRAY,
    "array.txt": ARRAY,
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "spaced.json": b" \n\t [\n\n"
    + b" ,\n ".join(json.dumps(r).encode() for r in RECORDS)
    + b"\n] ",
    "lines.ndjson": LINES,
    "lines.json": LINES,
    "lines.txt": LINES.replace(b"\n", b"\r\n"),
    "lines-without-last-end": LINES.rstrip(),
    "raw-unicode.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS).encode(),
    "blank-lines.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n \n"),
    "one-after-the-other": b"\n".join(json.dumps(r, indent=1).encode() for r in RECORDS),
    "in-one-line": b"".join(json.dumps(r).encode() for r in RECORDS),
    "pretty.jsonl": b"\n".join(json.dumps(r, indent=1).encode() for r in RECORDS),
    "commas.txt": b",\n".join(json.dumps(r).encode() for r in RECORDS) + b",\n",
    "mac.jsonl": LINES.replace(b"\n", b"\r"),
    "joined-arrays": json.dumps(RECORDS[:9]).encode() + b"\n" + json.dumps(RECORDS[9:]).encode(),
    "joined-marks.jsonl": b"".join(b"\xef\xbb\xbf" + x for x in LINES.splitlines(keepends=True)),
    "marked.json": b"\xef\xbb\xbf" + ARRAY,
    "utf16.json": ARRAY.decode().encode("utf-16"),
    "strings.json": json.dumps([r["text"] for r in RECORDS]).encode(),
    "lines.gz": gzip.compress(LINES),
    "called-plain.jsonl": gzip.compress(LINES),
    "members.jsonl.gz": b"".join(map(gzip.compress, LINES.splitlines(keepends=True))),
    "twice.gz": gzip.compress(gzip.compress(LINES)),
    "array.json.xz": lzma.compress(ARRAY),
    "streams.xz": lzma.compress(LINES[:999]) + bytes(8) + lzma.compress(LINES[999:]) + bytes(4),
    "streams.bz2": bz2.compress(LINES[:999]) + bz2.compress(LINES[999:]),
    "zst-in-xz": lzma.compress(zstd(LINES)),
    "array.bz2": bz2.compress(ARRAY),
    "lines.zst": zstd(LINES),
    "frames.jsonl.zst": zstd(LINES[: len(LINES) // 2]) + zstd(LINES[len(LINES) // 2 :]),
    "zst-in-gz": gzip.compress(zstd(ARRAY)),
    "table": parquet(),
    "table.parquet.gz": gzip.compress(parquet()),
}


@pytest.mark.parametrize("name", AS_RECORDS)
def test_records_are_read_as_records(tmp_path, name):
    (tmp_path / name).write_bytes(AS_RECORDS[name])
    wanted = [record["text"] for record in RECORDS]
    assert read(tmp_path / name) == wanted
    (tmp_path / "folder").mkdir()
    (tmp_path / name).rename(tmp_path / "folder" / name)
    assert read(tmp_path / "folder") == wanted


@pytest.mark.parametrize(
    "encoded",
    [
        *(gzip.compress(PROSE.encode()), bz2.compress(PROSE.encode()), zstd(PROSE.encode())),
        lzma.compress(PROSE.encode()),
        "\ufeff".encode() + PROSE.encode(),
        *("\ufeff".encode(e) + PROSE.encode(e) for e in ("utf-16-le", "utf-16-be")),
        *("\ufeff".encode(e) + PROSE.encode(e) for e in ("utf-32-le", "utf-32-be")),
        gzip.compress(PROSE.encode("utf-16")),
    ],
    ids=lambda encoded: encoded[:4].hex(),
)
def test_text_is_the_same_however_it_is_stored(tmp_path, encoded):
    (tmp_path / "a.txt").write_bytes(encoded)
    assert read(tmp_path / "a.txt") == read(tmp_path) == [PROSE]


@pytest.mark.parametrize(
    "text",
    [
        "[A link](http://example.org) begins this page.\n",
        "[1] Knuth, The Art of Computer Programming.\n[2] Another.\n",
        '["quoted"] is how it begins, and goes on.\n',
        "{\n    int x;\n    return x;\n}\n",
        '{"a": 1} is how an object is written in JSON.\nAnd this is prose.\nAnd this.\n',
        "\\documentclass{article}\n{\\bf bold}\n",
        "{% extends 'base.html' %}\n{}\ntext\n",
        "BZhang wrote this.\n",
        "PAR is not 1.\n",
        "PARENTS AND CHILDREN\n",
        "GGUF is a format of files.\n",
        "[{}] is a list with an empty object.\n",
        "[section]\nkey = 1\n",
    ],
)
def test_prose_that_looks_like_json_at_first_is_prose(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == read(tmp_path) == [text]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json"])
@pytest.mark.parametrize("cut", [1, 9, 40])
def test_records_that_are_cut_short_are_no_prose(tmp_path, name, cut):
    (tmp_path / name).write_bytes(ARRAY[:-cut])
    with pytest.raises(DataError, match=f"{name} is not JSON after 19|20"):
        read(tmp_path / name)


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_a_stream_that_is_damaged_at_its_beginning_is_not_the_end(tmp_path, compress):
    first, second = compress(LINES), bytearray(compress(LINES))
    second[1] ^= 1
    (tmp_path / "a").write_bytes(first + second)
    with pytest.raises(DataError, match="damaged or cut short"):
        read(tmp_path / "a")


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", PROSE)
    return sink.getvalue()


def tarred() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(PROSE.encode())
        archive.addfile(info, io.BytesIO(PROSE.encode()))
    return sink.getvalue()


def npy() -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.arange(100))
    return sink.getvalue()


LONG = "".join(f"{n} words of prose\n" for n in range(9000)).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
REFUSED = {
    "book.zip": (zipped(), "is a ZIP archive"),
    "book.tar": (tarred(), "is a tar archive"),
    "book.tar.gz": (gzip.compress(tarred()), "is a tar archive"),
    "book.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF document"),
    "ids.npy": (npy(), "is a NumPy array"),
    "rows.pkl": (pickle.dumps(RECORDS), "is a Python pickle"),
    "a.parquet": (LFS, "is a Git LFS pointer"),
    "no-mark.txt": (PROSE.encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    "cut.gz": (gzip.compress(LONG)[:-9], r"Cannot read .*cut\.gz: .*damaged or cut short"),
    "cut.xz": (lzma.compress(LONG)[:-40], r"Cannot read .*damaged or cut short"),
    "cut.bz2": (bz2.compress(LONG)[:-40], r"Cannot read .*damaged or cut short"),
    "cut.zst": (zstd(LONG)[:-40], r"Cannot read .*damaged or cut short"),
    "bad.gz": (gzip.compress(LONG)[:-8] + b"\0" * 8, r"Cannot read .*damaged or cut short"),
    "bad.zst": (b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 8, r"Cannot read .*damaged"),
    "onion.gz": (b"", "compressed more than 4 times"),
    "cut.json": (ARRAY[:-300], r"is not JSON after \d+ values"),
    "odd.txt": ("\ufeff".encode("utf-16-le") + b"a\0b", "is not UTF-16 text"),
}
onion = LONG
for _ in range(6):
    onion = gzip.compress(onion)
REFUSED["onion.gz"] = onion, REFUSED["onion.gz"][1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_and_left_out_of_a_folder(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    if name == "cut.json":
        return  # its beginning is whole: in a folder, too, it is an error
    (tmp_path / "good.txt").write_text(PROSE)
    corpus = open_corpus([str(tmp_path)])
    assert len(list(corpus.documents())) == 1
    assert "1 file of 2, 1 skipped (1 " in corpus.label
    assert f": {name})" in corpus.label


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 1, "data": [{"text": "a"}]}', r"no field 'text'; found: version, data"),
        ('{\n "name": "x",\n "license": "MIT"\n}', r"no field 'text'; found: name, license"),
        ("[1, 2, 3]", r"a\.json, record 1 holds a JSON number, not an object"),
        ("[[1], [2]]", "holds a JSON array, not an object"),
        ("null", "holds a JSON null, not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"text": ' + "9" * 5000 + "}]", "is not JSON after 0 values"),
        ("no JSON at all", "is not JSON after 0 values"),
        ('[{"text": "a"}, {"text": "b"', "is not JSON after 1 values"),
    ],
)
def test_json_that_is_not_records_says_what_it_is(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_device_a_socket_and_nothing_are_refused(tmp_path):
    for device in ("/dev/zero", "/dev/urandom"):
        with pytest.raises(DataError, match="a device or socket, which has no end"):
            open_corpus([device])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(DataError, match="a device or socket"):
            open_corpus([str(tmp_path / "s")])
    for content in (b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"[]", b"\n\n", gzip.compress(b"")):
        (tmp_path / "empty.json").write_bytes(content)
        with pytest.raises(DataError, match=r"The corpus is empty.*--data\.paths"):
            read(tmp_path / "empty.json")
