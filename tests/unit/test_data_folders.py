"""Which files of a folder are trained on, which are not, and that the log says so."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from picotron_core.data.corpus import open_corpus
from picotron_core.errors import DataError


def lay(folder, **files):
    """Files by name ("/" is "__"), each holding its own text."""
    for name in files["names"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), path)
        elif ".json" in name:
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_text(name)


def texts(corpus, part="train"):
    return [text for text, _ in corpus.fragments(part) if text] if part else []


@pytest.mark.parametrize(
    ("names", "train", "validation", "skipped"),
    [
        (
            ["train.jsonl", "validation.jsonl", "test.jsonl", "README.md", "LICENSE"],
            ["train.jsonl"],
            ["validation.jsonl"],
            r"3 skipped \(2 beside data: LICENSE, README.md; 1 test split: test.jsonl\)",
        ),
        (
            [
                "README.md",
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/validation-00000-of-00001.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/validation-00000-of-00001.parquet"],
            r"2 skipped \(1 beside data: README.md; 1 test split: data/test-",
        ),
        (
            ["wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"],
            ["wiki.train.tokens"],
            ["wiki.valid.tokens"],
            r"1 skipped \(1 test split: wiki.test.tokens\)",
        ),
        (
            ["train/a.txt", "train/b/c.txt", "dev/a.txt", "dev/train/x.txt", "test/a.txt"],
            ["train/a.txt", "train/b/c.txt"],
            ["dev/a.txt", "dev/train/x.txt"],
            r"1 skipped \(1 test split: test/a.txt\)",
        ),
        (
            ["Stories-train.txt", "Stories-valid.txt", "extra.txt"],
            ["Stories-train.txt", "extra.txt"],
            ["Stories-valid.txt"],
            None,
        ),
        (["training/a.txt", "val/a.txt"], ["training/a.txt"], ["val/a.txt"], None),
        (["a_train_1.json", "a_test_1.json"], ["a_train_1.json"], [], r"1 test split"),
        (
            ["train.jsonl", "dev_matched.jsonl", "test_matched.jsonl"],
            ["train.jsonl"],
            ["dev_matched.jsonl"],
            r"1 test split",
        ),
        (["train.txt", "eval.txt"], ["train.txt"], ["eval.txt"], None),
        # No splits: nothing of the kind lies beside them, or they are programs and pages.
        (["test/a.txt", "b.txt"], ["b.txt", "test/a.txt"], [], None),
        (["train.py", "test.py", "validation.py"], None, [], None),
        (["src/train.py", "src/test_train.py", "test/test_a.py"], None, [], None),
        (["train.txt", "test_utils.txt"], ["test_utils.txt", "train.txt"], [], None),
        (["retrain.txt", "contest.txt"], ["contest.txt", "retrain.txt"], [], None),
        (["validation.jsonl", "test.jsonl"], ["test.jsonl", "validation.jsonl"], [], None),
        # Beside prose a README is prose.
        (
            ["README.md", "LICENSE", "chapter.txt"],
            ["LICENSE", "README.md", "chapter.txt"],
            [],
            None,
        ),
    ],
)
def test_splits_of_a_folder(tmp_path, names, train, validation, skipped):
    lay(tmp_path, names=names)
    corpus = open_corpus([str(tmp_path)])
    assert texts(corpus) == (sorted(names) if train is None else train)
    assert (texts(corpus, "validation") if corpus.validation else []) == validation
    assert ("for validation" in corpus.label) == bool(validation)
    assert ("skipped" in corpus.label) == bool(skipped)
    if skipped:
        with pytest.raises(AssertionError, match=skipped):
            raise AssertionError(corpus.label)


def test_splits_among_files_that_are_named(tmp_path):
    names = ["train.txt", "valid.txt", "test.txt"]
    lay(tmp_path, names=names)
    corpus = open_corpus([str(tmp_path / name) for name in names])
    assert (texts(corpus), texts(corpus, "validation")) == (["train.txt"], ["valid.txt"])
    assert f"1 skipped (1 test split: {tmp_path / 'test.txt'})" in corpus.label
    assert texts(open_corpus([str(tmp_path / "test.txt")])) == ["test.txt"]  # alone it is meant


def test_json_that_is_no_document_is_left_out(tmp_path):
    lay(tmp_path, names=["a.txt", "b.toml", "c.html", "Makefile", "d.py"])
    (tmp_path / "package.json").write_text('{"name": "x", "version": "1"}')
    (tmp_path / "notes.ipynb").write_text('{\n "cells": [],\n "nbformat": 4\n}\n')
    (tmp_path / "ids.json").write_text('[{"id": 1}, {"id": 2}]')
    corpus = open_corpus([str(tmp_path)])
    assert texts(corpus) == ["Makefile", "a.txt", "b.toml", "c.html", "d.py"]
    left = "3 JSON without 'text': ids.json, notes.ipynb, package.json"
    assert f"5 files of 8, 3 skipped ({left})" in corpus.label
    (tmp_path / "only").mkdir()
    (tmp_path / "ids.json").rename(tmp_path / "only/ids.json")
    with pytest.raises(DataError, match=r"empty.*ids\.json has no field 'text'; found: id\."):
        list(open_corpus([str(tmp_path / "only")]).documents())


def test_links_are_followed_once_and_loops_end(tmp_path):
    lay(tmp_path, names=["data/a.txt", "data/sub/b.txt", "elsewhere/c.txt", "elsewhere/d/e.txt"])
    data = tmp_path / "data"
    (data / "away").symlink_to(tmp_path / "elsewhere")
    (data / "sub/up").symlink_to(data)
    (data / "sub/self").symlink_to("self")
    (tmp_path / "elsewhere/d/back").symlink_to(data / "sub")
    (data / "z.txt").symlink_to(data / "a.txt")
    os.link(data / "a.txt", data / "y.txt")
    corpus = open_corpus([str(data)])
    assert sorted(texts(corpus)) == [
        *("data/a.txt", "data/sub/b.txt", "elsewhere/c.txt", "elsewhere/d/e.txt")
    ]
    assert "linked twice" in corpus.label
    (tmp_path / "link").symlink_to(data)
    assert texts(open_corpus([str(tmp_path / "link")])) == texts(corpus)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: (f / "latin.txt").write_bytes(b"caf\xe9"), "1 not UTF-8: latin.txt"),
        (lambda f: (f / "prog").write_bytes(b"\x7fELF\2\1\1"), "1 program: prog"),
        (lambda f: (f / "nul.log").write_bytes(b"a\0b" * 9), "1 binary: nul.log"),
        (lambda f: (f / "gone").symlink_to("nowhere"), "1 dangling link: gone"),
        (lambda f: os.mkfifo(f / "pipe.txt"), "1 not a plain file: pipe.txt"),
        (lambda f: (f / ".more.jsonl").write_text("{}"), "1 hidden: .more.jsonl"),
        (lambda f: lay(f, names=[".old/a.txt", ".git/a.txt"]), "1 hidden: .old/"),
        (lambda f: (f / "x\ny.gz").write_bytes(b"\x1f\x8b\x08"), r"1 damaged: x\ny.gz"),
        (lambda f: (f / os.fsdecode(b"caf\xe9")).write_bytes(b"\xff"), r"1 not UTF-8: caf\xe9"),
    ],
)
def test_what_is_left_out_is_counted_and_named(tmp_path, make, said):
    lay(tmp_path, names=["a.txt"])
    make(tmp_path)
    corpus = open_corpus([str(tmp_path)])
    assert texts(corpus) == ["a.txt"]
    assert corpus.label == f"{tmp_path}/, 1 file of 2, 1 skipped ({said}), 5 B"


def test_a_readme_beside_records_whatever_they_are_called(tmp_path):
    lay(tmp_path, names=["README.md", "data/part-1.json"])
    (tmp_path / "data/part-1.json").rename(tmp_path / "data/part-1")
    corpus = open_corpus([str(tmp_path)])
    assert texts(corpus) == ["data/part-1.json"]
    assert "1 skipped (1 beside data: README.md)" in corpus.label


def test_folders_nested_more_deeply_than_calls_may_be(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    with open(os.open("a.txt", os.O_WRONLY | os.O_CREAT, dir_fd=here), "w") as file:
        file.write("deep")
    os.close(here)
    try:
        assert texts(open_corpus([str(tmp_path)])) == ["deep"]
    finally:  # shutil.rmtree, of pytest, calls itself for each
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_a_link_that_leads_nowhere_is_no_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").symlink_to("gone")
    with pytest.raises(DataError, match="corpus is a link that leads nowhere"):
        open_corpus(["corpus"])


def test_many_names_are_cut(tmp_path):
    lay(tmp_path, names=["a.txt"])
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    label = open_corpus([str(tmp_path)]).label
    assert "1 file of 8, 7 skipped (7 PNG image: 0.png, 1.png, 2.png, ...)" in label


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"caf\xe9.jsonl", b"\xff\xfe", b"d\xe9/x.txt.gz"])
def test_files_whose_names_are_not_utf8_are_read(tmp_path, name):
    import gzip

    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    content = b'{"text": "a"}' if name.endswith(b"jsonl") else b"a"
    path.write_bytes(gzip.compress(content) if name.endswith(b"gz") else content)
    corpus = open_corpus([str(tmp_path)], cache_dir=tmp_path.parent / "cache")
    assert texts(corpus) == ["a"]
    corpus.label.encode()
    path.write_bytes(b"\x1f\x8b\x08 damaged")
    with pytest.raises(DataError, match="The corpus is empty") as caught:
        list(open_corpus([str(tmp_path)]).documents())
    str(caught.value).encode()
    with pytest.raises(DataError, match="damaged or cut short") as caught:
        open_corpus([str(path)])
    str(caught.value).encode()


def test_a_folder_or_file_that_may_not_be_read_is_one_line(tmp_path):
    if os.getuid() != 0:
        pytest.skip("takes on another user's id, which only root can")
    lay(tmp_path, names=["data/a.txt", "data/b/c.txt"])
    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    (tmp_path / "data/b").chmod(0o700)
    (tmp_path / "data/a.txt").chmod(0o600)
    for name, message in (("data", "Cannot read the folder"), ("data/a.txt", "Cannot read")):
        child = os.fork()
        if not child:
            code = 2
            try:
                os.setuid(12345)
                open_corpus([str(tmp_path / name)])
            except DataError as error:
                code = 0 if message in str(error) and "Permission denied" in str(error) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
