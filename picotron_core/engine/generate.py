"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from picotron_core.errors import ConfigError, RunError
from picotron_core.model.architecture import Architecture
from picotron_core.model.kv_cache import KVCache, empty_cache
from picotron_core.model.llama import Llama


def generate(
    model: Llama,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
) -> Iterator[int]:
    """The tokens that follow the prompt, each as soon as it is drawn.

    The prompt is read once and every token after it alone, with a KV cache. Draws come from a CPU
    generator, so a seed gives the same text on any device, up to its rounding of the logits.

    Args:
        max_new_tokens: how many at most; prompt and new tokens must fit max_position_embeddings.
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: draw from the k likeliest tokens; 0 means all.
        top_p: of these, draw from the fewest whose probabilities sum to at least p.
        eos_id: end (without yielding it) at this token, or at any of these.

    Raises: ConfigError, naming the flag, when called; RunError for logits that are not finite.
    """
    refuse_options(max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    refuse_prompt(model.architecture, prompt_ids, max_new_tokens)
    # The last token drawn is never read, so it needs no position.
    positions = len(prompt_ids) + max_new_tokens - 1
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    weight = model.lm_head.weight
    cache = empty_cache(
        model.architecture, batch=1, max_len=positions, device=weight.device, dtype=weight.dtype
    )
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def tokens() -> Iterator[int]:
        unread = list(prompt_ids)
        for _ in range(max_new_tokens):
            logits = _next_logits(model, unread, cache)
            token = _draw(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            if token in ends:
                return
            yield token
            unread = [token]

    return tokens()


def refuse_options(
    max_new_tokens: int | None, *, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Check what can be checked without a model.

    Raises: ConfigError, naming the flag.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {max_new_tokens}, but it must be >= 1.")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature is {temperature}, but it must be >= 0 (0 is greedy).")
    if top_k < 0:
        raise ConfigError(f"--top-k is {top_k}, but it must be >= 0 (0 means all tokens).")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p is {top_p}, but it must be above 0 and at most 1.")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed is {seed}, but it must be >= 0 and below 2**63.")


def refuse_prompt(
    architecture: Architecture, prompt_ids: Sequence[int], max_new_tokens: int
) -> None:
    """Check what can be checked without the model's weights.

    Raises: ConfigError, naming the flag.
    """
    V, limit, length = (
        architecture.vocab_size,
        architecture.max_position_embeddings,
        len(prompt_ids),
    )
    if not prompt_ids:
        raise ConfigError("--prompt has no tokens: give at least one to begin with.")
    if outside := [token for token in prompt_ids if not 0 <= token < V]:
        raise ConfigError(
            f"--prompt has the token {outside[0]}, outside the model's vocabulary of {V}: the "
            "tokenizer has more tokens than the model. Training with --model.resize_embeddings "
            "true adds them."
        )
    if length > limit:
        raise ConfigError(
            f"--prompt has {length} tokens, more than the model's max_position_embeddings = "
            f"{limit}: shorten it."
        )
    if length + max_new_tokens - 1 > limit:
        raise ConfigError(
            f"--prompt ({length} tokens) with --max-new-tokens {max_new_tokens} is longer than the "
            f"model's max_position_embeddings = {limit}: at most {limit - length + 1} new tokens "
            "fit this prompt."
        )


def probabilities(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution that a token is drawn from: (V,) logits -> (V,) float64.

    Tokens of equal logits rank by their id. At least one token is always kept.
    """
    V = len(logits)
    ranked, order = torch.sort(logits.double(), descending=True, stable=True)
    ranked[min(top_k, V) or V :] = -torch.inf
    # Less the largest, which changes nothing: a tiny temperature would make infinities of them.
    p = torch.softmax((ranked - ranked[0]) / temperature, dim=0)
    if top_p < 1:
        p[p.cumsum(0) - p >= top_p] = 0  # what precedes the token is already enough
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


def _draw(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    if not logits.isfinite().all():
        raise RunError("The model's logits are not finite: its weights are damaged or diverged.")
    if temperature == 0:
        return int(logits.argmax())
    p = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return int(torch.multinomial(p, 1, generator=generator))


# On a function of one step, not around a `yield`: the mode would leak into the caller's code.
@torch.inference_mode()
def _next_logits(model: Llama, tokens: list[int], cache: KVCache) -> Tensor:
    """Logits (V,), float32 on the CPU, of what follows `tokens` (after those in the cache)."""
    input_ids = torch.tensor([tokens], device=model.lm_head.weight.device)
    hidden = model(input_ids, cache=cache)
    return model.logits(hidden[0, -1]).float().cpu()
