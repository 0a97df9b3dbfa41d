"""Corpora from real files of every format, and every way in which they can be wrong."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from picotron_core.data.corpus import open_corpus
from picotron_core.errors import DataError

TEXTS = ["first\nline", "zw\u00f6lf \u732b \U0001f600", '{"text": "looks like json"}', "last"]


def read(*paths: Path | str, **options: str) -> list[str]:
    return list(open_corpus([str(path) for path in paths], **options).documents())


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def test_standard_library_is_a_corpus_that_is_always_there():
    corpus = open_corpus([])
    assert 8e6 < corpus.size_bytes < 25e6
    documents = list(corpus.documents())
    assert sum(len(text.encode()) for text in documents) == corpus.size_bytes
    library = Path(sysconfig.get_path("stdlib"))
    for module in ("argparse.py", "json/decoder.py", "asyncio/tasks.py"):
        assert (library / module).read_bytes().decode() in documents
    assert not any("class TestCase" in text and "test_support" in text for text in documents)
    version = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
    size = f"{corpus.size_bytes / 1e6:.1f} MB"
    # Some modules of the library are empty files, which are no documents.
    assert corpus.label == f"{version}, {len(corpus.sources)} files, {size}"
    assert 0 <= len(corpus.sources) - len(documents) < 20


def test_standard_library_is_the_same_in_every_process():
    program = "from picotron_core.data.corpus import open_corpus; c = open_corpus([]);"
    program += "print(c.fingerprint(), c.label)"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    corpus = open_corpus([])
    assert outputs == {f"{corpus.fingerprint()} {corpus.label}\n"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_records_come_back_in_order_and_again(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": TEXTS * 700, "n": list(range(len(TEXTS) * 700))})
        pyarrow.parquet.write_table(table, path, row_group_size=900)
    else:
        write_jsonl(path, TEXTS * 700)
    corpus = open_corpus([str(path)])
    assert list(corpus.documents()) == TEXTS * 700
    assert list(corpus.documents()) == TEXTS * 700
    assert corpus.size_bytes == path.stat().st_size
    assert corpus.label == f"{path}, 1 file, {path.stat().st_size / 1000:.1f} kB"


def test_text_field_names_another_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS, field="content")
    table = pyarrow.table({"content": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert read(path, tmp_path / "b.parquet", text_field="content") == TEXTS * 2


def test_text_file_is_one_document_with_its_own_line_ends(tmp_path):
    path = tmp_path / "notes.anything"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\xe7\x8c\xab")
    assert read(path) == ["one\r\ntwo\n\u732b"]


def test_folder_is_read_in_order_without_hidden_binary_and_blank_files(tmp_path):
    for name, content in {
        "b/two.md": b"two",
        "a.txt": b"one",
        "c.py": b"three",
        ".hidden.txt": b"no",
        ".git/config.txt": b"no",
        "image.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "nul.txt": b"a\0b",
        "latin.txt": b"caf\xe9",
        "blank.txt": b" \n\t",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    write_jsonl(tmp_path / "z.jsonl", ["four", "five"])
    assert read(tmp_path) == ["one", "three", "four", "five", "two"]
    label = open_corpus([str(tmp_path)]).label
    assert label == (
        f"{tmp_path}/, 5 files of 10, 5 skipped (1 hidden: .hidden.txt; 1 dangling link: gone.txt; "
        "1 PNG image: image.png; 1 not UTF-8: latin.txt; 1 binary: nul.txt), 66 B"
    )


def test_fingerprint_follows_content_and_reading_but_not_place(tmp_path):
    def fingerprint(*names: str, **options: str) -> str:
        return open_corpus([str(tmp_path / name) for name in names], **options).fingerprint()

    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("alpha")
        (tmp_path / folder / "b.txt").write_text("beta")
    same = fingerprint("here")
    assert fingerprint("there") == same == fingerprint("here/a.txt", "here/b.txt")
    different = {same, fingerprint("here/b.txt", "here/a.txt")}
    (tmp_path / "here/b.txt").write_text("bETA")
    different.add(fingerprint("here"))
    # Two fields of one file are two corpora.
    (tmp_path / "r.jsonl").write_text('{"text": "a", "title": "b"}\n')
    different |= {fingerprint("r.jsonl"), fingerprint("r.jsonl", text_field="title")}
    assert len(different) == 5


def test_file_that_changes_after_it_was_fingerprinted_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    corpus = open_corpus([str(path)])
    path.write_text("afterwards")
    with pytest.raises(DataError, match="changed while it was in use"):
        list(corpus.documents())


def test_byte_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    path = tmp_path / "a.txt"
    # The bad sequence begins two bytes before a block of the reader ends.
    path.write_bytes(b"x" * (2**20 - 2) + b"\xe7\x8cA" + b"y" * 100)
    with pytest.raises(DataError, match=rf"a\.txt is not UTF-8 text: byte {2**20 - 2} is 0xe7"):
        read(path)
    path.write_bytes(b"abc\xe7\x8c")
    with pytest.raises(DataError, match="byte 3 is 0xe7"):
        read(path)
    path.write_bytes(b"x" * (2**20 + 5) + b"\xff")
    with pytest.raises(DataError, match=f"byte {2**20 + 5} is 0xff"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops}", r"a\.jsonl:3 is not JSON: .*mend or remove"),
        ("[1, 2]", r"a\.jsonl:3 holds a JSON array, not an object"),
        ('{"txt": "b"}', r"a\.jsonl:3 has no field 'text'; found: txt\. .*--data\.on_bad skip"),
        ('{"text": null}', r"a\.jsonl:3: 'text' is null, not text.*--data\.on_bad skip"),
        (r'{"text": "a\ud800"}', r"a\.jsonl:3: character 1 .* surrogate"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet has no field 'text'; found: content"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match="row 1: 'text' is null"):
        read(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet is not whole Parquet"):
        read(path)


def test_damaged_gzip_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"Cannot read .*a\.jsonl\.gz"):
        read(path)
    path.write_bytes(b"plain text")  # it is called .gz, but the content decides
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1 is not JSON"):
        read(path)


def test_without_pyarrow_the_error_names_the_extra(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"  # as if it were not installed
        "from picotron_core.data.corpus import open_corpus\n"
        f"open_corpus([{str(tmp_path / 'a.parquet')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "not installed: pip install 'picotron[data]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["", "/no/such/folder", "notes.txt", "some/deep/path", "./here"])
def test_missing_path_is_an_error(name):
    with pytest.raises(DataError, match=r"^No file or folder .* Check --data\.paths") as caught:
        open_corpus([name])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_hub_name_without_datasets_says_what_to_install():
    program = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'datasets' else find(name)\n"
        "from picotron_core.data.corpus import open_corpus\n"
        "open_corpus(['owner/name'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    message = done.stderr.splitlines()[-1]
    assert "No file or folder 'owner/name'" in message
    assert "pip install 'picotron[data]'" in message


def test_empty_corpus_is_an_error(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "data.jsonl").write_text('{"text": ""}\n')
    for path in (tmp_path, tmp_path / "blank.txt", tmp_path / "data.jsonl"):
        with pytest.raises(DataError, match=r"The corpus is empty.*--data\.paths"):
            read(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_unreadable_file_is_an_error():
    # A file whose bytes nobody can read, not even root: the first page of a process.
    with pytest.raises(DataError, match=r"Cannot read /proc/self/mem: Input/output error"):
        read("/proc/self/mem")
