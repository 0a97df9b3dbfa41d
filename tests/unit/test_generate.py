"""Generation: the cache changes nothing, and a token is drawn from just the tokens it should be."""

import math
from collections import Counter
from importlib import import_module

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from picotron_core.engine.generate import generate, probabilities
from picotron_core.errors import ConfigError, RunError
from picotron_core.model.architecture import Architecture
from picotron_core.model.kv_cache import KVCache, empty_cache
from picotron_core.model.llama import Llama
from picotron_core.ops import Ops

ATTENTION = ("naive_math", "sdpa", "mem_efficient")
OTHERS = {"norm": "rms_norm", "rope": "rope", "swiglu": "swiglu", "loss": "loss"}
PROMPT = [5, 17, 3, 90, 41]


def pair(attention="naive_math"):
    """transformers' model and ours, with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = LlamaForCausalLM(config).eval()
    kernels = {
        op: getattr(import_module(f"picotron_backends.naive_math.{op}"), name)
        for op, name in OTHERS.items()
    }
    kernels["attention"] = import_module(f"picotron_backends.{attention}.attention").attention
    ours = Llama(Architecture.from_transformers(config), Ops(**kernels, optimizer=None, comm=None))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def greedy_by_full_forward(model, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("attention", ATTENTION)
def test_greedy_equals_the_full_forward_and_transformers(attention):
    theirs, ours = pair(attention)
    count = 40
    tokens = list(generate(ours, PROMPT, max_new_tokens=count, temperature=0))
    assert len(set(tokens)) > 10  # not a loop, which a broken cache could hit by chance
    assert tokens == greedy_by_full_forward(ours, PROMPT, count)
    whole = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False)
    assert tokens == whole[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_cache_gives_the_hidden_states_of_the_full_forward(attention):
    """In pieces of several lengths, for a batch: the prompt, one token, three tokens."""
    _, model = pair(attention)
    ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(1))
    cache = empty_cache(
        model.architecture, batch=3, max_len=24, device=ids.device, dtype=torch.float32
    )
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in ids.split([17, 1, 1, 3, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-5, atol=1e-5)


def test_each_token_is_read_once(monkeypatch):
    _, model = pair()
    read = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda ids, *rest: (read.append(ids.shape[1]), forward(ids, *rest))[1],
    )
    allocated = set()
    append = KVCache.append

    def watched(self, layer, k, v):
        out = append(self, layer, k, v)
        allocated.add(out[0].data_ptr())
        return out

    monkeypatch.setattr(KVCache, "append", watched)
    list(generate(model, PROMPT, max_new_tokens=6))
    assert read == [len(PROMPT), 1, 1, 1, 1, 1]
    assert len(allocated) == 3  # one place per layer, whatever the length


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.8, 20, 0.9), (1.0, 1, 1.0)],
)
def test_the_distribution_equals_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(7, 97, generator=torch.Generator().manual_seed(2))
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    for row, expected in zip(logits, scores.softmax(-1), strict=True):
        p = probabilities(row, temperature=temperature, top_k=top_k, top_p=top_p)
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)


def test_top_p_keeps_the_fewest_that_reach_it_and_top_k_exactly_k():
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125]).log()

    def kept(**changes):
        p = probabilities(logits, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes))
        assert math.isclose(p.sum(), 1)
        return p.nonzero().flatten().tolist()

    assert kept(top_p=1e-9) == [0]
    assert kept(top_p=0.49) == [0]
    assert kept(top_p=0.51) == [0, 2]
    assert kept(top_p=0.76) == [0, 1, 2]
    assert kept(top_k=3) == [0, 1, 2]  # of two equals the first
    assert kept(top_k=100) == [0, 1, 2, 3]
    # Within the two likeliest, token 0 alone has 2/3.
    assert kept(top_k=2, top_p=0.6) == [0]


def test_tokens_come_as_often_as_they_are_likely():
    _, model = pair()
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([PROMPT]))[0, -1])
    p = probabilities(logits, temperature=0.9, top_k=8, top_p=0.9)
    draws = 400
    counts = Counter(
        next(generate(model, PROMPT, max_new_tokens=1, temperature=0.9, top_k=8, top_p=0.9, seed=s))
        for s in range(draws)
    )
    assert set(counts) <= set(p.nonzero().flatten().tolist())
    assert len(counts) > 2
    for token, count in counts.items():
        sigma = math.sqrt(draws * p[token] * (1 - p[token]))
        assert abs(count - draws * p[token]) < 5 * sigma


def test_a_seed_gives_one_text_whatever_else_is_drawn():
    _, model = pair()
    options = {"max_new_tokens": 30, "temperature": 1.0}
    first = list(generate(model, PROMPT, **options, seed=7))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert list(generate(model, PROMPT, **options, seed=7)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert list(generate(model, PROMPT, **options, seed=8)) != first


def test_it_ends_at_eos_without_yielding_it():
    _, model = pair()
    tokens = list(generate(model, PROMPT, max_new_tokens=20, temperature=0))
    end = tokens[6]
    expected = tokens[: tokens.index(end)]
    options = {"max_new_tokens": 20, "temperature": 0}
    assert list(generate(model, PROMPT, **options, eos_id=end)) == expected
    ends = (end, tokens[3])
    expected = tokens[: min(map(tokens.index, ends))]  # whichever comes first
    assert list(generate(model, PROMPT, **options, eos_id=ends)) == expected
    assert len(list(generate(model, PROMPT, **options))) == 20


def test_between_tokens_the_caller_is_not_in_inference_mode():
    _, model = pair()
    for _ in generate(model, PROMPT, max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    model.loss(torch.tensor([PROMPT]), torch.tensor([PROMPT])).backward()


@pytest.mark.parametrize(
    ("flag", "prompt", "options"),
    [
        ("--temperature", PROMPT, {"temperature": -0.1}),
        ("--temperature", PROMPT, {"temperature": math.nan}),
        ("--top-k", PROMPT, {"top_k": -1}),
        ("--top-p", PROMPT, {"top_p": 0.0}),
        ("--top-p", PROMPT, {"top_p": 1.1}),
        ("--max-new-tokens", PROMPT, {"max_new_tokens": 0}),
        ("--prompt", [], {}),
        ("vocabulary of 97", [97], {}),
        ("--max-new-tokens 61 .* max_position_embeddings = 64", PROMPT, {"max_new_tokens": 61}),
    ],
)
def test_what_cannot_be_meant_is_refused_when_called(flag, prompt, options):
    _, model = pair()
    with pytest.raises(ConfigError, match=flag) as error:
        generate(model, prompt, **({"max_new_tokens": 4} | options))
    assert "\n" not in str(error.value)


def test_the_whole_context_can_be_used():
    _, model = pair()
    assert len(list(generate(model, PROMPT, max_new_tokens=60))) == 60  # the last is not read


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_diverged_model_is_an_error_not_a_text(temperature):
    _, model = pair()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(RunError, match="not finite"):
        next(generate(model, PROMPT, max_new_tokens=3, temperature=temperature))
