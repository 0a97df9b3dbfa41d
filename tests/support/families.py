"""Tokenizers of the families that models come with, made of a small text, in folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    *("the", "quick", "brown", "fox", "don't", "jump", "over", "a", "lazy", "dog"),
    *(",", "while", "wizards", "brew", "in", "quiet", "towns", "."),
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def text_of(seed: int, sentences: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(sentences)]


def _trained(model: models.Model, trainer: trainers.Trainer, **parts: object) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(text_of(0, 300), trainer)
    return tokenizer


def _template(tokenizer: Tokenizer, single: str) -> processors.PostProcessor:
    specials = [word for word in single.split() if word != "$A"]
    pairs = [(word, tokenizer.token_to_id(word)) for word in dict.fromkeys(specials)]
    return processors.TemplateProcessing(single=single, special_tokens=pairs)


def _byte_level(specials: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    return _trained(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


def gpt2() -> tuple[Tokenizer, dict[str, object]]:
    """BOS is defined, and is not added."""
    return _byte_level(["<|end|>"]), {"bos_token": "<|end|>", "eos_token": "<|end|>"}


def llama3() -> tuple[Tokenizer, dict[str, object]]:
    """BOS by the second of two post-processors."""
    tokenizer = _byte_level(["<|begin|>", "<|end|>", "<|eot|>"])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _template(tokenizer, "<|begin|> $A")]
    )
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return tokenizer, {**names, "clean_up_tokenization_spaces": True}  # which BPE ignores


def literal() -> tuple[Tokenizer, dict[str, object]]:
    """Special tokens that are spelled out in a text are plain text."""
    tokenizer, names = llama3()
    return tokenizer, {**names, "split_special_tokens": True}


def _sentencepiece() -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    model = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained = json.loads(_trained(model, trainer, pre_tokenizer=metaspace).to_str())
    # The trainer makes special tokens of the bytes, which would be left out of a text.
    trained["added_tokens"] = [t for t in trained["added_tokens"] if t["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(trained))


SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def llama2() -> tuple[Tokenizer, dict[str, object]]:
    """A mark for each space, also before the text; bytes as fallback; BOS."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = _template(tokenizer, "<s> $A")
    return tokenizer, dict(SENTENCEPIECE)


def mistral() -> tuple[Tokenizer, dict[str, object]]:
    """A mark before the first word alone; BOS, and EOS after the text."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = _template(tokenizer, "<s> $A </s>")
    return tokenizer, dict(SENTENCEPIECE)


def gemma() -> tuple[Tokenizer, dict[str, object]]:
    """No mark before the text; two tokens before it."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = _template(tokenizer, "<s> <unk> $A")
    return tokenizer, dict(SENTENCEPIECE)


def bert() -> tuple[Tokenizer, dict[str, object]]:
    """Parts of words, lower case, CLS and SEP, and a text without spaces before punctuation."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizer=normalizers.Lowercase(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
    )
    ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    names = {"cls_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    return tokenizer, {**names, "clean_up_tokenization_spaces": True}


def t5() -> tuple[Tokenizer, dict[str, object]]:
    """Unigram, which adds EOS and no BOS."""
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer = _trained(
        models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=None
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = _template(tokenizer, "$A </s>")
    return tokenizer, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def words() -> tuple[Tokenizer, dict[str, object]]:
    """Whole words, no decoder, and EOS that only the config names."""
    vocabulary = {word: number for number, word in enumerate(["?", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, {"eos_token": AddedToken("<end>", special=True), "unk_token": "?"}


FAMILIES: dict[str, Callable[[], tuple[Tokenizer, dict[str, object]]]] = {
    make.__name__: make for make in (gpt2, llama3, literal, llama2, mistral, gemma, bert, t5, words)
}


def save_tokenizer(family: str, folder: Path) -> PreTrainedTokenizerFast:
    """Write the family's tokenizer; returns transformers' of it."""
    backend, names = FAMILIES[family]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, vocab_size: int, **changes: object) -> LlamaForCausalLM:
    """Write a tiny model whose texts are not the same token again and again."""
    torch.manual_seed(0)
    fields = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
        **{"max_position_embeddings": 64, "vocab_size": vocab_size, "tie_word_embeddings": False},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()
    model.save_pretrained(folder)
    return model
