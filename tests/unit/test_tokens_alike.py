"""Tokens are the same in training, in generation and to transformers, whatever the tokenizer."""

from __future__ import annotations

import json
import random

import families
import pytest
from transformers import AutoTokenizer

from picotron_core.data import pieces
from picotron_core.data.corpus import open_corpus
from picotron_core.data.detokenizer import Detokenizer
from picotron_core.data.loader import validation_batches
from picotron_core.data.pretrained_tokenizer import load_tokenizer
from picotron_core.data.token_cache import prepare
from picotron_core.data.tokenizer_files import tokenizer_files

# What the post-processor of each adds.
BEFORE = {
    **{"gpt2": [], "llama3": ["<|begin|>"], "llama2": ["<s>"], "mistral": ["<s>"]},
    **{
        "literal": ["<|begin|>"],
        "gemma": ["<s>", "<unk>"],
        "bert": ["[CLS]"],
        "t5": [],
        "words": [],
    },
}
AFTER = {"mistral": 1, "bert": 1, "t5": 1}
PROMPTS = ("the quick", " lead", "two  spaces ", "The Fox don't , jump .", "caf\u00e9 \u732b", "")
PROMPTS += ("one<|end|>two</s> [SEP]three",)


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = families.save_tokenizer(request.param, folder)
    return request.param, folder, theirs, load_tokenizer(str(folder))


def test_a_prompt_is_encoded_as_by_transformers_but_for_what_ends_it(family):
    name, _, theirs, ours = family
    assert [theirs.convert_ids_to_tokens(token) for token in ours.prefix] == BEFORE[name]
    for prompt in PROMPTS:
        wanted = theirs(prompt).input_ids
        wanted = wanted[: len(wanted) - AFTER.get(name, 0)] or [theirs.eos_token_id]
        assert ours.encode_prompt(prompt) == wanted


def test_what_is_saved_encodes_a_prompt_alike_in_transformers(family, tmp_path):
    _, _, _, ours = family
    ours.save(tmp_path)
    saved, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert (saved.eos_token_id, again.fingerprint) == (ours.eos_id, ours.fingerprint)
    for prompt in PROMPTS:
        assert (saved(prompt).input_ids or [ours.eos_id]) == ours.encode_prompt(prompt)
        assert saved.decode(ours.encode_prompt(prompt)) == ours.decode(ours.encode_prompt(prompt))


@pytest.mark.parametrize(
    ("name", "class_"),
    [
        *(("bert", "BertTokenizer"), ("t5", "T5Tokenizer"), ("gpt2", "RobertaTokenizer")),
        *(("t5", "XLMRobertaTokenizer"), ("llama2", "LlamaTokenizer"), ("gpt2", "Qwen2Tokenizer")),
    ],
)
def test_a_class_of_transformers_adds_nothing_again(name, class_, tmp_path):
    folder, exported = tmp_path / "base", tmp_path / "exported"
    families.save_tokenizer(name, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": class_}))
    ours = load_tokenizer(str(folder))
    exported.mkdir()
    for file, content in tokenizer_files(ours, str(folder)).items():
        (exported / file).write_bytes(content)
    saved = AutoTokenizer.from_pretrained(exported)
    assert saved.eos_token_id == ours.eos_id
    assert saved.special_tokens_map == AutoTokenizer.from_pretrained(folder).special_tokens_map
    for prompt in PROMPTS:
        assert (saved(prompt).input_ids or [ours.eos_id]) == ours.encode_prompt(prompt)


def test_each_document_of_the_training_data_begins_and_ends_once(family, tmp_path):
    name, folder, theirs, _ = family
    documents = families.text_of(1, 60)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "text.jsonl").write_text(lines)
    tokens = prepare(
        open_corpus([str(tmp_path / "text.jsonl")]),
        tokenizer=str(folder),
        vocab_size=300,
        val_fraction=0.3,
        cache_dir=tmp_path / "cache",
    )
    end = theirs.eos_token_id
    wanted = []
    for text in documents:
        ids = theirs(text).input_ids
        wanted.append((*ids[: len(ids) - AFTER.get(name, 0)], end))
    found = []
    for side in (tokens.train.tolist(), tokens.validation.tolist()):
        while side:
            document, side = side[: side.index(end) + 1], side[side.index(end) + 1 :]
            found.append(tuple(document))
    assert sorted(found) == sorted(wanted)

    (batch, *_) = validation_batches(
        tokens.validation, seq_len=60, samples=1, micro_batch=1, eos_id=tokens.eos_id
    )
    first = batch.inputs[0].tolist()
    assert batch.doc_ids[0].tolist() == [first[:i].count(end) for i in range(len(first))]
    assert batch.doc_ids.max() > 0
    assert theirs.convert_ids_to_tokens(first)[: len(BEFORE[name])] == BEFORE[name]


@pytest.mark.parametrize("val_fraction", [0.1, 0.5])
@pytest.mark.parametrize("documents", [1, 9])
def test_a_document_of_many_pieces_begins_and_ends_once(
    tmp_path, monkeypatch, documents, val_fraction
):
    """A single one is cut in two: one on each side."""
    monkeypatch.setattr(pieces, "PIECE_CHARS", 50)
    theirs = families.save_tokenizer("llama2", tmp_path)
    texts = [" ".join(families.text_of(number, 20)) for number in range(documents)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(lines)
    tokens = prepare(
        open_corpus([str(tmp_path / "text.jsonl")]),
        tokenizer=str(tmp_path),
        vocab_size=300,
        val_fraction=val_fraction,
        cache_dir=tmp_path / "cache",
    )
    lengths = []
    for side in (tokens.train.tolist(), tokens.validation.tolist()):
        begins = [i for i, token in enumerate(side) if token == theirs.bos_token_id]
        ends = [i for i, token in enumerate(side) if token == theirs.eos_token_id]
        assert begins == [0, *(end + 1 for end in ends[:-1])]
        assert ends[-1] == len(side) - 1
        lengths += [end - begin for begin, end in zip(begins, ends, strict=True)]
    assert max(lengths) > 50  # of several pieces


def test_text_is_that_of_all_tokens_and_nothing_shown_is_taken_back(family):
    _, _, theirs, ours = family
    rng = random.Random(0)
    vocabulary = list(ours.backend.get_vocab().values())
    bytes_ = [ours.backend.token_to_id(token) for token in families.BYTES]
    bytes_ = [token for token in bytes_ if token is not None] or vocabulary
    cats = ours.encode("\u732b\u00e9\U0001f600") or vocabulary  # characters of several tokens
    for case in range(150):
        prompt = ours.encode_prompt(rng.choice(PROMPTS))
        drawn = [
            rng.choice(rng.choice((vocabulary, vocabulary, bytes_, cats, [ours.eos_id])))
            for _ in range(rng.randint(0, 12))
        ]
        if case % 3 == 0:  # whole characters, and one that is cut
            drawn = (drawn[:2] + cats * 2)[: rng.randint(1, 8)]
        text = Detokenizer(ours, prompt)
        shown = text.add()
        for token in drawn:
            shown += text.add(token)
        shown += text.end()
        assert shown == theirs.decode(prompt + drawn, skip_special_tokens=True)


def test_text_is_shown_while_it_is_written(family):
    _, _, _, ours = family
    ids = ours.encode_prompt("the quick brown fox jump over a lazy dog")
    text = Detokenizer(ours, ids[:2])
    parts = [text.add(), *(text.add(token) for token in ids[2:])]
    if ours.clean_up:
        assert not any(parts)  # a later token may remove a space that was shown
    else:
        assert len("".join(parts)) > 30
        assert sum(map(bool, parts)) > 4
