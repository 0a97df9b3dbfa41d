"""How bytes are read: once from a pipe, never again if unchanged, in bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from picotron_core.data import training_text
from picotron_core.data.corpus import open_corpus
from picotron_core.data.pieces import encodable, for_training
from picotron_core.data.split import parted, plan_split
from picotron_core.data.tokenizer import train_tokenizer
from picotron_core.errors import DataError

TEXT = "".join(f"{number} words of prose\n" for number in range(30_000))
READ = """
import sys
from pathlib import Path
from picotron_core.data.corpus import open_corpus
corpus = open_corpus(sys.argv[2:], cache_dir=Path(sys.argv[1]))
for _ in range(2):
    texts = list(corpus.documents())
print(len(texts), sum(map(len, texts)), corpus.label, *Path(sys.argv[1]).rglob("*"))
"""


def shell(folder, line):
    """Run a line of bash in which $READ reads what is named after it."""
    (folder / "read.py").write_text(READ)
    command = f"{sys.executable} {folder / 'read.py'} {folder / 'cache'}"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "READ": command},
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ("$READ <(cat a.txt)", "/dev/fd/63, 1 file"),
        ("cat a.txt | $READ -", "standard input, 1 file"),
        ("$READ - < a.txt", "standard input, 1 file"),
        ("cat a.txt | $READ /dev/stdin", "/dev/stdin, 1 file"),
        ("cat a.txt.gz | $READ -", "standard input, 1 file"),
        ("mkfifo p; cat a.txt > p & $READ p", "p, 1 file"),
    ],
)
def test_pipes_are_read_twice_and_leave_nothing(tmp_path, line, label):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    said = shell(tmp_path, line)
    assert said.startswith(f"1 {len(TEXT)} {label}, ")
    assert ".pipe" not in said


def test_a_pipe_is_refused_where_several_ranks_would_read_it(tmp_path):
    os.mkfifo(tmp_path / "p")
    for name in (str(tmp_path / "p"), "/dev/fd/63"):
        with pytest.raises(DataError, match="is a pipe, which can be read only once, but 2 ranks"):
            open_corpus([name], ranks=2)
    assert "Cannot read standard input (-)" in shell(tmp_path, "$READ - <&-")
    assert "a device or socket, which has no end" in shell(tmp_path, "$READ - < /dev/zero")


OPENED: list[str] = []
WATCHING = threading.Event()


def _watch(event, arguments):
    if event == "open" and WATCHING.is_set():
        OPENED.append(os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else "")


@pytest.fixture
def opened():
    """The files that are opened while `with` it."""
    if not getattr(_watch, "added", False):
        sys.addaudithook(_watch)
        _watch.added = True
    OPENED.clear()
    WATCHING.set()
    yield OPENED
    WATCHING.clear()


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path, opened):
    library = Path(sysconfig.get_path("stdlib"), "json")  # installed more than two seconds ago
    first = open_corpus([str(library)], cache_dir=tmp_path)
    assert str(library / "decoder.py") in opened
    opened.clear()
    again = open_corpus([str(library)], cache_dir=tmp_path)
    assert not [path for path in opened if path.startswith(str(library))]
    assert (again.fingerprint(), again.label) == (first.fingerprint(), first.label)
    list(again.documents())
    assert str(library / "decoder.py") in opened
    # A kept file that is damaged, or that others may write, counts for nothing.
    (kept,) = tmp_path.glob("files-*/*.json")
    for spoil in (
        lambda: kept.write_text("{"),
        lambda: kept.write_bytes(kept.read_bytes().replace(b"utf-8", b"utf-9", 1)),
        lambda: kept.parent.chmod(0o777),
    ):
        opened.clear()
        spoil()
        assert open_corpus([str(library)], cache_dir=tmp_path).fingerprint() == first.fingerprint()
        assert str(library / "decoder.py") in opened


def test_a_file_that_may_have_changed_is_read_again(tmp_path, opened):
    path = tmp_path / "a.txt"
    path.write_text("before")
    first = open_corpus([str(path)], cache_dir=tmp_path / "cache")
    status = path.stat()
    path.write_text("AFTER!")  # as long
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # and as old, to all appearances
    again = open_corpus([str(path)], cache_dir=tmp_path / "cache")
    assert list(again.documents()) == ["AFTER!"]
    assert again.fingerprint() != first.fingerprint()


def test_a_file_that_changes_shrinks_or_goes_while_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    for change in (
        lambda: path.open("a").close() or path.write_text(TEXT * 9 + "more"),
        lambda: os.truncate(path, 2_000_000),
        lambda: path.unlink(),
        lambda: (path.unlink(), path.mkdir()),
    ):
        path.write_text(TEXT * 9)
        fragments = open_corpus([str(path)]).fragments()
        next(fragments)
        change()
        with pytest.raises(DataError, match=r"a\.txt changed while|Cannot read .*a\.txt: No such"):
            list(fragments)
        if path.exists() and path.is_dir():
            path.rmdir()


def whole(texts):
    """Documents of one fragment each."""
    return [(text, True) for text in texts]


def in_parts(texts, size):
    """The same documents in short fragments."""
    for text in texts:
        for start in range(0, len(text), size):
            yield text[start : start + size], False
        yield "", True


@pytest.mark.parametrize("val_fraction", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_fragments_do_not_change_the_split_or_the_pieces(monkeypatch, count, val_fraction, size):
    from picotron_core.data import pieces

    monkeypatch.setattr(pieces, "PIECE_CHARS", 50)
    r = random.Random(count)
    texts = ["".join(r.choices("ab\u00e9\u732b \n", k=r.randint(1, 300))) for _ in range(count)]

    def cut(fragments):
        split = plan_split(fragments(), val_fraction=val_fraction, seed=1)
        found = list(encodable(parted(fragments(), split)))
        assert "".join(text for part, text, _ in found) == "".join(texts)
        return split, [piece for piece in found if piece[1] or piece[2]]

    assert cut(lambda: in_parts(texts, size)) == cut(lambda: whole(texts))


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n\n\nclass A:\n\tpass\n" * 50,
        "one long line of words, and 12 more! It's so. " * 50,
        "\u732b\u3002\u72d7 " * 200,
        "no_space" * 300,
        " \n" * 700,
    ],
)
def test_pieces_to_train_on_have_the_words_of_the_whole_text(monkeypatch, text):
    from picotron_core.data import pieces

    monkeypatch.setattr(pieces, "SAMPLE_CHARS", 100)
    found = list(for_training([("train", text, True), ("validation", "never", True)]))
    assert "".join(found) == text
    assert max(map(len, found)) <= 100
    if " " in text.strip() and len(text) < 3000:
        one = train_tokenizer([text], vocab_size=300).fingerprint
        assert train_tokenizer(found, vocab_size=300).fingerprint == one


def test_words_beyond_the_budget_are_left_out_the_rarest_first():
    r = random.Random(0)
    common = ["".join(r.choices("abcdefgh", k=5)) for _ in range(200)]
    pieces = []
    for _ in range(300):  # the last text has other words than the first
        words = r.choices(common, k=50) + ["".join(r.choices("xyzuvw", k=9)) for _ in range(20)]
        pieces.append(" ".join(words))
    budget = 400 * (training_text.WORD_COST + 9 * training_text.BYTE_COST)
    words, dropped = training_text.frequent_words(pieces, budget=budget)
    assert {f" {word}" for word in common} <= words
    assert dropped > 5000
    left = list(training_text.only_words(pieces, words))
    assert set().union(*map(training_text._WORD.findall, left)) <= words
    assert training_text.frequent_words(pieces) == (None, 0)


def test_a_sample_is_spread_evenly_and_is_as_long_as_asked():
    pieces = [f"{number:05}" for number in range(10_000)]
    for seed in (0, 1, 2):
        kept = list(training_text.sampled(pieces, keep=0.13, seed=seed))
        assert len(kept) == pytest.approx(1300, abs=2)
        gaps = [int(b) - int(a) for a, b in pairwise(kept)]
        assert set(gaps) <= {7, 8}
    starts = {next(training_text.sampled(pieces, keep=0.001, seed=seed)) for seed in range(5)}
    assert len(starts) == 5


LONG_CALL = """
import random, sys
sys.path.insert(0, sys.argv[1])
from picotron_core.data.tokenizer import train_tokenizer
r = random.Random(0)
# Merging these takes minutes.
words = ["".join(r.choices("abcdefghijklmnopqrst", k=500)) for _ in range(20_000)]
def text():
    for start in range(0, len(words), 100):
        yield " ".join(words[start : start + 100])
    print("merging", flush=True)
try:
    train_tokenizer(text(), vocab_size=4096)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def test_ctrl_c_ends_a_long_native_call():
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", LONG_CALL, root], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "merging\n"
        time.sleep(1)  # the iterator is asked once more before the merging
        process.send_signal(signal.SIGINT)
        try:
            # The call itself would go on for minutes.
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
        assert process.stdout.read() == "interrupted\n"


MEMORY = """
import sys, threading
from pathlib import Path
import pyarrow.parquet, torch  # what is there before
from picotron_core.data.corpus import open_corpus
from picotron_core.data.token_cache import prepare

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

idle, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.02):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
cache, tokenizer, *paths = sys.argv[1:]
corpus = open_corpus(paths, cache_dir=Path(cache))
if tokenizer == "read":
    for _ in corpus.fragments():
        pass
else:
    prepare(corpus, tokenizer=tokenizer, vocab_size=4096, val_fraction=0.05, cache_dir=Path(cache))
done.set()
watcher.join()
print(peak - idle)
"""


def peak_of(folder, tokenizer, *paths):
    """Anonymous memory that preparing these took, above what the idle process had."""
    command = [sys.executable, "-c", MEMORY, str(folder / "cache"), tokenizer, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def write(path, kind, size):
    """A file of some kind of text that is hard on memory."""
    r = random.Random(0)
    words = ["".join(r.choices("abcdefghij", k=r.randint(2, 7))) for _ in range(300)]
    end = "" if kind == "one line" else "\n"
    text = (" ".join(r.choices(words, k=10_000)) + " " + end) * 20
    block = json.dumps({"text": text[:5000]}) + "\n" if kind == "jsonl" else text
    if kind == "array":
        block = json.dumps({"text": text[:5000]}) + ","
    opener = gzip.open if kind == "gzip" else open
    with opener(path, "wb") as file:
        file.write(b"[" if kind == "array" else b"")
        for _ in range(size // len(block)):
            file.write(block.encode())
        file.write(b'{"text": "end"}]' if kind == "array" else b"")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["one line", "jsonl", "array"])
def test_200_mb_are_read_in_bounded_memory(tmp_path, kind):
    write(tmp_path / "data", kind, 200_000_000)
    assert peak_of(tmp_path, "read", tmp_path / "data") < 60_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["lines", "one line"])
def test_a_text_is_tokenised_in_bounded_memory(tmp_path, kind):
    write(tmp_path / "data", kind, 6_000_000)
    assert peak_of(tmp_path, "", tmp_path / "data") < 300_000_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lines", "one line"])
def test_2_gb_are_tokenised_in_bounded_memory(tmp_path, kind):
    write(tmp_path / "data", kind, 2_000_000_000)
    assert peak_of(tmp_path, "", tmp_path / "data") < 300_000_000
