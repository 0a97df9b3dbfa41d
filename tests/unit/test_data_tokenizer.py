"""The tokenizer: lossless, deterministic, and the same to transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

from picotron_core.data.pretrained_tokenizer import load_tokenizer
from picotron_core.data.tokenizer import EOS, open_tokenizer, train_tokenizer
from picotron_core.errors import ConfigError

TEXT = [f"def f{i}(x):\n    return x + {i}  # caf\u00e9 \u732b\n" for i in range(200)]
TOKENIZER = train_tokenizer(TEXT, vocab_size=400)


def test_vocabulary_is_bytes_merges_and_eos():
    assert TOKENIZER.vocab_size == 400
    assert TOKENIZER.encode(EOS) == [TOKENIZER.eos_id] == [0]
    smallest = train_tokenizer(TEXT, vocab_size=257)
    assert smallest.vocab_size == 257
    assert len(smallest.encode("caf\u00e9 \u732b")) == len("caf\u00e9 \u732b".encode())
    assert len(TOKENIZER.encode(TEXT[0])) < len(TEXT[0].encode()) / 2
    with pytest.raises(ConfigError, match=r"needs 257 tokens .* not 256\. Raise --data.vocab_size"):
        train_tokenizer(TEXT, vocab_size=256)


@given(st.text())
def test_any_unicode_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_batch([text, "x", text]) == [ids, TOKENIZER.encode("x"), ids]
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@given(st.text(alphabet="a\u00e9\u732b\U0001f600", min_size=1))
def test_prefix_of_a_character_decodes_to_a_replacement(text):
    ids = TOKENIZER.encode(text)
    for end in range(len(ids)):
        assert text.startswith(TOKENIZER.decode(ids[:end]).rstrip("\ufffd"))


def test_training_is_deterministic_across_processes():
    program = (
        "from picotron_core.data.tokenizer import train_tokenizer\n"
        "print(train_tokenizer((f'{i} word{i % 7} {i * i}' for i in range(999)), vocab_size=500)"
        ".fingerprint)"
    )
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    here = train_tokenizer((f"{i} word{i % 7} {i * i}" for i in range(999)), vocab_size=500)
    assert {run.stdout.strip() for run in runs} == {here.fingerprint}
    assert here.fingerprint != train_tokenizer(TEXT, vocab_size=500).fingerprint


def test_progress_counts_bytes_and_errors_in_the_text_come_through():
    seen: list[int] = []
    train_tokenizer(["abc", "\u732b\u732b"], vocab_size=257, on_progress=seen.append)
    assert seen == [3, 9]

    def documents():
        yield "abc"
        raise KeyError("from the corpus")

    with pytest.raises(KeyError, match="from the corpus"):
        train_tokenizer(documents(), vocab_size=300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    return folder


def test_transformers_loads_it_with_the_same_ids(saved):
    theirs = AutoTokenizer.from_pretrained(str(saved))
    assert (theirs.eos_token, theirs.eos_token_id) == (EOS, TOKENIZER.eos_id)
    assert len(theirs) == TOKENIZER.vocab_size
    for text in (*TEXT[:5], " lead", "a  b\n\n\tc", "\u732b\U0001f600", f"one{EOS}two", "don't"):
        ids = TOKENIZER.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == TOKENIZER.decode(ids) == text


def test_a_saved_tokenizer_opens_and_loads_as_itself(saved):
    assert open_tokenizer(saved, eos_id=0).fingerprint == TOKENIZER.fingerprint
    for name in (str(saved), str(saved / "tokenizer.json")):
        loaded = load_tokenizer(name)
        assert loaded.eos_id == TOKENIZER.eos_id
        assert loaded.vocab_size == TOKENIZER.vocab_size
        assert loaded.encode_batch(TEXT) == TOKENIZER.encode_batch(TEXT)


def test_ids_with_gaps_need_the_highest_not_the_count(tmp_path):
    vocab = {"[UNK]": 0, "a": 1, EOS: 70_000}
    Backend(WordLevel(vocab, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).vocab_size == 70_001


def test_truncation_and_padding_of_the_file_are_not_taken_over(tmp_path):
    TOKENIZER.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode_batch(["a", TEXT[0]]) == TOKENIZER.encode_batch(["a", TEXT[0]])


def test_unusable_tokenizers_are_one_line_errors(tmp_path, saved):
    with pytest.raises(ConfigError, match=r"^No tokenizer '/no/such'") as caught:
        load_tokenizer("/no/such")
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(ConfigError, match="has no EOS token"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(ConfigError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(str(tmp_path))


RUNS_CODE = {
    "in the tokenizer's config": (
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
        {"model_type": "own"},
    ),
    "a slow one": (
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    ),
    "a fast one alone": (
        {"tokenizer_class": "OwnFast", "auto_map": {"AutoTokenizer": [None, "own.Own"]}},
        {},
    ),
    "in an old place": ({"tokenizer_class": "Own", "auto_map": ["own.Own", None]}, {}),
    "in the model's config": (
        {},
        {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Own", None]},
        },
    ),
    "in another repository": (
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["else/where--own.Own", None]}},
        {"model_type": "own"},
    ),
}


@pytest.mark.parametrize(("tokenizer_config", "config"), RUNS_CODE.values(), ids=RUNS_CODE)
def test_no_code_of_a_folder_is_run_and_nobody_is_asked(
    tmp_path, saved, monkeypatch, tokenizer_config, config
):
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    # No EOS token: what transformers could load without the code is refused all the same.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\nConfig = Own\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert (asked, ran.exists()) == ([], False)
    if "no EOS token" not in str(caught.value):
        assert "runs no code from model folders" in str(caught.value)
