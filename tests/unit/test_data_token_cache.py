"""The token cache: right, reused, whole or not there, whoever is killed while building it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from picotron_core.data import pieces, token_cache
from picotron_core.data.corpus import open_corpus
from picotron_core.data.tokenizer import train_tokenizer
from picotron_core.data.tokens import fit_tokens, open_tokens, token_dtype
from picotron_core.errors import ConfigError, DamagedFileError, DataError

LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real corpus of some 50 documents."""
    made = tmp_path_factory.mktemp("corpus")
    for name in ("asyncio", "json", "collections"):
        shutil.copytree(LIBRARY / name, made / name, ignore=shutil.ignore_patterns("__pycache__"))
    (made / "unicode.txt").write_text("caf\u00e9 \u732b \U0001f600\n" * 50, encoding="utf-8")
    return made


def prepare(path, cache_dir, **options):
    settings = {"tokenizer": "", "vocab_size": 512, "val_fraction": 0.2, **options}
    return token_cache.prepare(open_corpus([str(path)]), cache_dir=cache_dir, **settings)


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    return prepare(folder, tmp_path_factory.mktemp("cache"))


def documents_of(ids, tokens):
    """Back to texts: split at every EOS, decode."""
    ends = np.flatnonzero(ids == tokens.eos_id)
    assert ends[-1] == ids.size - 1
    return [tokens.tokenizer.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


def test_every_document_is_there_once_and_ended_by_eos(folder, built):
    wanted = list(open_corpus([str(folder)]).documents())
    train, validation = documents_of(built.train, built), documents_of(built.validation, built)
    assert sorted(train + validation) == sorted(wanted)
    # In the corpus's order on both sides.
    assert train == [text for text in wanted if text in set(train)]
    assert validation == [text for text in wanted if text in set(validation)]
    assert 0.05 * len(wanted) < len(validation) < 0.4 * len(wanted)


def test_what_is_known_of_the_tokens(folder, built):
    validation = documents_of(built.validation, built)
    text_bytes = sum(len(text.encode()) for text in validation)
    assert built.bytes_per_token == pytest.approx(text_bytes / len(built.validation), rel=1e-12)
    assert (built.vocab_size, built.train.dtype) == (512, np.uint16)
    assert built.key == built.folder.name
    assert f"{len(built.train):,} train and {len(built.validation):,} validation" in built.label
    assert isinstance(built.train, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        built.train[0] = 1
    theirs = AutoTokenizer.from_pretrained(str(built.folder))
    assert (
        theirs(validation[0])["input_ids"]
        == built.validation[: len(theirs(validation[0])["input_ids"])].tolist()
    )


def test_tokenizer_is_trained_on_the_training_documents_alone(folder, built):
    train = documents_of(built.train, built)
    assert built.tokenizer.fingerprint == train_tokenizer(train, vocab_size=512).fingerprint


def test_split_follows_the_seed_and_fraction(folder, tmp_path, built):
    other = prepare(folder, tmp_path, seed=1)
    first = set(documents_of(built.validation, built))
    assert set(documents_of(other.validation, other)) != first
    # A document that is held out stays so when more is held out.
    more = prepare(folder, tmp_path, val_fraction=0.5)
    assert first < set(documents_of(more.validation, more))


def test_second_time_it_is_opened_and_nothing_is_written(folder, built):
    def state():
        files = [built.folder, *sorted(built.folder.iterdir())]
        return [(f.name, f.stat().st_ino, f.stat().st_mtime_ns, f.stat().st_size) for f in files]

    before = state()
    stages = []
    again = prepare(folder, built.folder.parent, progress=lambda *report: stages.append(report))
    assert (again.folder, again.key) == (built.folder, built.key)
    assert np.array_equal(again.train, built.train)
    assert state() == before
    assert stages == []


def test_key_follows_everything_that_decides_the_tokens(folder, tmp_path, built):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert prepare(copy, built.folder.parent).key == built.key
    keys = {built.key}
    for options in (
        {"vocab_size": 513},
        {"val_fraction": 0.21},
        {"seed": 9},
        {"tokenizer": str(built.folder)},
    ):
        keys.add(prepare(folder, tmp_path, **options).key)
    with (copy / "unicode.txt").open("a") as file:
        file.write("!")
    keys.add(prepare(copy, tmp_path).key)
    assert len(keys) == 6


def test_progress_reaches_the_whole_text(folder, tmp_path):
    seen = {}
    prepare(
        folder, tmp_path, progress=lambda stage, done, total: seen.update({stage: (done, total)})
    )
    size = open_corpus([str(folder)]).size_bytes
    assert list(seen) == ["reading", "training the tokenizer", "tokenising"]
    assert seen["reading"] == (size, 0)
    assert seen["tokenising"] == (size, size)
    assert 0.6 * size < seen["training the tokenizer"][0] < 0.95 * size


@pytest.mark.parametrize("count", [1, 2])
def test_few_documents_are_cut_instead(tmp_path, count):
    text = "".join(f"line {i}: caf\u00e9 \u732b\n" for i in range(2000))
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    tokens = prepare(tmp_path, tmp_path / "cache", val_fraction=0.1)
    train, validation = documents_of(tokens.train, tokens), documents_of(tokens.validation, tokens)
    assert "".join(train + validation) == text * count
    share = len(validation[0].encode()) / (count * len(text.encode()))
    assert share == pytest.approx(0.1, abs=1e-3)
    assert len(tokens.validation) == pytest.approx(0.1 * (len(tokens.train) / 0.9), rel=0.05)
    held_out = len("".join(validation).encode())
    assert tokens.bytes_per_token == pytest.approx(held_out / len(tokens.validation))


def test_long_documents_pass_through_pieces_unchanged(tmp_path, monkeypatch):
    text = "".join(f"x = {i}\n    y = caf\u00e9\n" for i in range(3000)) + "z" * 5000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    short = [f"short {number}" for number in range(20)]
    for number, line in enumerate(short):
        (tmp_path / f"b{number}.txt").write_text(line)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 1000)
    monkeypatch.setattr(pieces, "BATCH_CHARS", 2500)
    tokens = prepare(tmp_path, tmp_path / "cache", val_fraction=0.5)
    documents = documents_of(tokens.train, tokens) + documents_of(tokens.validation, tokens)
    assert sorted(documents) == sorted([text, *short])


def test_tokenizer_of_a_long_corpus_is_trained_on_a_bounded_sample(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "TRAINING_BYTES", 100_000)
    monkeypatch.setattr(pieces, "SAMPLE_CHARS", 5000)
    seen = {}
    prepare(folder, tmp_path, progress=lambda stage, done, total: seen.update({stage: done}))
    assert 50_000 < seen["training the tokenizer"] < 150_000 < seen["tokenising"]


def test_hugging_face_tokenizer_gives_transformers_ids(folder, built, tmp_path):
    tokens = prepare(folder, tmp_path, tokenizer=str(built.folder), vocab_size=99999)
    theirs = AutoTokenizer.from_pretrained(str(built.folder))
    wanted = []
    for text in documents_of(tokens.validation, tokens):
        wanted += [*theirs(text)["input_ids"], theirs.eos_token_id]
    assert tokens.validation.tolist() == wanted
    assert tokens.vocab_size == 512


def test_token_dtype_is_the_narrowest_that_holds_the_vocabulary():
    assert token_dtype(257) == token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == token_dtype(2**32) == np.uint32
    with pytest.raises(ConfigError, match=f"{2**32 + 1} does not fit.*--data.vocab_size"):
        token_dtype(2**32 + 1)


def test_tokens_outside_the_vocabulary_never_wrap():
    assert fit_tokens([0, 65_535], 65_536).tolist() == [0, 65_535]
    wide = fit_tokens([65_536, 4_000_000_000], 2**32)
    assert (wide.dtype, wide.tolist()) == (np.uint32, [65_536, 4_000_000_000])
    for wrong, vocab_size in ((65_536, 65_536), (300, 300), (-1, 300), (2**33, 2**32)):
        with pytest.raises(ConfigError, match=f"Token id {wrong} lies outside .* {vocab_size}"):
            fit_tokens([1, wrong], vocab_size)


def test_vocabulary_above_uint16_is_written_as_uint32(tmp_path, folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    backend = Tokenizer(WordLevel({"[UNK]": 69_999, "<eos>": 70_000}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer/tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    tokens = prepare(folder, tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer"))
    assert tokens.train.dtype == np.uint32
    assert (tokens.vocab_size, tokens.eos_id) == (70_001, 70_000)
    assert set(tokens.train.tolist()) == {69_999, 70_000}


FILES = ("train.bin", "validation.bin", "meta.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built.folder, tmp_path / built.key))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip first", "flip middle", "flip last digit", "cut", "gone"])
def test_damage_is_found_and_named(folder, copied, name, damage):
    assert open_tokens(copied).key == copied.name
    path = copied / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2 * 2 - 2])
    else:
        at = {"flip first": 0, "flip middle": len(content) // 2}.get(damage)
        if at is None:  # a digit, so that JSON stays JSON
            at = max((content.rfind(b"%d" % d) for d in range(10)), default=0)
            at = at if at >= 0 else len(content) - 1
        content[at] ^= 1
        path.write_bytes(content)
    # By the front door as well: a cache that is damaged is never trained on, nor hidden.
    for open_it in (lambda: open_tokens(copied), lambda: prepare(folder, copied.parent)):
        with pytest.raises(DamagedFileError) as caught:
            open_it()
        message = str(caught.value)
        assert str(path) in message
        assert f"Delete the folder {copied}" in message
        assert "\n" not in message


def test_any_changed_bit_of_the_meta_is_found(copied):
    whole = (copied / "meta.json").read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1
        (copied / "meta.json").write_bytes(changed)
        with pytest.raises(DamagedFileError, match=r"meta\.json"):
            open_tokens(copied)
    (copied / "meta.json").write_bytes(whole)
    open_tokens(copied)


def test_deleting_a_damaged_folder_mends_it(folder, copied, built):
    (copied / "train.bin").unlink()
    with pytest.raises(DamagedFileError):
        prepare(folder, copied.parent)
    shutil.rmtree(copied)
    assert np.array_equal(prepare(folder, copied.parent).train, built.train)


def test_meta_that_vouches_for_ids_outside_the_vocabulary_is_refused(copied):
    from picotron_core.data.tokenizer import open_tokenizer
    from picotron_core.data.tokens import write_meta

    ids = np.fromfile(copied / "train.bin", dtype="<u2")
    ids[7] = 512
    ids.tofile(copied / "train.bin")
    tokenizer = open_tokenizer(copied, eos_id=0)
    write_meta(
        copied, tokenizer=tokenizer, text_bytes={"train": 1, "validation": 1}, skipped={}, key=""
    )
    with pytest.raises(DamagedFileError, match=r"train\.bin holds id 512, vocabulary 512"):
        open_tokens(copied)


CHILD = """
import sys
from pathlib import Path
from picotron_core.data.corpus import open_corpus
from picotron_core.data.token_cache import prepare

def progress(stage, done, total):
    if stage == stop:
        print(stage, flush=True)
        sys.stdin.readline()  # stay here until told

folder, cache_dir, stop = sys.argv[1:]
tokens = prepare(open_corpus([folder]), tokenizer="", vocab_size=512, val_fraction=0.2,
                 cache_dir=Path(cache_dir), progress=progress)
print(tokens.folder, int(tokens.train[:].astype("int64").sum()), flush=True)
"""


def child(folder, cache_dir, stop):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(cache_dir), stop],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stage", ["training the tokenizer", "tokenising"])
def test_killed_builder_leaves_nothing_that_is_taken_for_whole(folder, tmp_path, built, stage):
    with child(folder, tmp_path, stage) as builder:
        assert builder.stdout.readline() == f"{stage}\n"
        os.kill(builder.pid, signal.SIGKILL)
        assert builder.wait() == -signal.SIGKILL
    (left,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    assert left.name.startswith(f".picotron-{built.key}-")
    # Another build sweeps it, be it of the same corpus or of another.
    options = {"vocab_size": 300} if stage == "tokenising" else {}
    tokens = prepare(folder, tmp_path, **options)
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == [tokens.folder]
    assert np.array_equal(prepare(folder, tmp_path).train, built.train)


def test_a_cache_appears_whole_by_one_rename(folder, tmp_path, built):
    dying = """
import os, signal
def die_before_rename(event, arguments):
    if event == "os.rename" and len(os.path.basename(arguments[1])) == 32:  # a key
        os.kill(os.getpid(), signal.SIGKILL)
import sys; sys.addaudithook(die_before_rename)
"""
    done = subprocess.run(
        [sys.executable, "-c", dying + CHILD, str(folder), str(tmp_path), "never"],
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL
    # All was written under the name that nobody opens, and nothing under the one that they do.
    (made,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    assert made.name.startswith(f".picotron-{built.key}-")
    assert np.array_equal(open_tokens(made).train, built.train)


def test_a_living_builder_is_not_swept_and_others_wait_for_it(folder, tmp_path, built):
    waiting = "waiting for another process to tokenise"
    with child(folder, tmp_path, "tokenising") as builder:
        assert builder.stdout.readline() == "tokenising\n"
        with child(folder, tmp_path, waiting) as second:
            assert second.stdout.readline() == f"{waiting}\n"
            # A build of another key sweeps as well, and must spare the living.
            prepare(folder, tmp_path, vocab_size=300)
            assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 2
            builder.stdin.close()
            second.stdin.close()
            last = [process.stdout.read().splitlines()[-1] for process in (builder, second)]
            assert builder.wait() == second.wait() == 0
    assert last[0] == last[1] == f"{tmp_path / built.key} {int(built.train.astype('int64').sum())}"


def test_builders_at_once_agree(folder, tmp_path, built):
    builders = [child(folder, tmp_path, "never") for _ in range(3)]
    outputs = {builder.communicate()[0] for builder in builders}
    assert {builder.returncode for builder in builders} == {0}
    assert outputs == {f"{tmp_path / built.key} {int(built.train.astype('int64').sum())}\n"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [built.key]


def test_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path):
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + CHILD
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path), "never"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("picotron_core.errors.DataError: Cannot write the token cache in")
    assert "File too large" in last
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_cache_dir_that_cannot_be_made_is_an_error(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^Cannot write the token cache in .*--data\.cache_dir"):
        prepare(folder, tmp_path / "file" / "cache")


def test_bad_wishes_are_refused_before_any_work(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"does not fit the widest token dtype"):
        prepare(folder, tmp_path / "cache", vocab_size=2**32 + 1)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match="needs 257 tokens"):
        prepare(folder, tmp_path / "cache", vocab_size=100)
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(DataError, match=r"too short to hold out 20\.00%"):
        prepare(tmp_path / "one.txt", tmp_path / "cache")
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
