"""The shape of a Llama: what of transformers' `LlamaConfig` decides the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from picotron_core.errors import ConfigError, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched to a longer context.

    "linear" divides them all by `factor` and reads nothing else. "llama3" does so only to
    wavelengths beyond original_max_position_embeddings / low_freq_factor, leaves those below
    original_max_position_embeddings / high_freq_factor alone, and blends in between.
    """

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise _refusal("rope_type", self.rope_type, "'default', 'linear' or 'llama3'")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _check_positive(name, getattr(self, name))
        _check_size("original_max_position_embeddings", self.original_max_position_embeddings)
        if self.high_freq_factor <= self.low_freq_factor:
            wanted = f"above low_freq_factor = {self.low_freq_factor}"
            raise _refusal("high_freq_factor", self.high_freq_factor, wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a Llama, by the names of transformers' `LlamaConfig`.

    Raises: ConfigError, naming the key, for numbers that make no Llama.
    """

    hidden_size: int  # E
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, divides H
    head_dim: int  # D, even
    vocab_size: int  # V
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
        if type(self.tie_word_embeddings) is not bool:
            raise _refusal("tie_word_embeddings", self.tie_word_embeddings, "true or false")
        _check_tokens("bos_token_id", self.bos_token_id)
        _check_tokens("eos_token_id", self.eos_token_id)
        _check_tokens("pad_token_id", self.pad_token_id)
        if self.num_attention_heads % self.num_key_value_heads:
            wanted = f"a divisor of num_attention_heads = {self.num_attention_heads}"
            raise _refusal("num_key_value_heads", self.num_key_value_heads, wanted)
        # With an explicit head_dim we could do without, but transformers could not load the result.
        if self.hidden_size % self.num_attention_heads:
            wanted = f"a multiple of num_attention_heads = {self.num_attention_heads}"
            raise _refusal("hidden_size", self.hidden_size, wanted)
        if self.head_dim % 2:
            raise _refusal("head_dim", self.head_dim, "even: rope rotates pairs")

    @classmethod
    def from_transformers(cls, llama_config: Any) -> Architecture:
        """The architecture of a transformers `LlamaConfig`, or of the dict of its config.json.

        Missing keys mean what they mean to transformers. Reads both places where rope's numbers
        live: `rope_parameters` (5.x), `rope_theta` and `rope_scaling` (4.x).

        Raises: ConfigError, naming the key, for whatever this Llama would compute differently.
        """
        given = llama_config if isinstance(llama_config, Mapping) else llama_config.to_dict()
        _refuse_other_family(given.get("model_type"))
        if given.get("quantization_config") is not None:
            raise ConfigError(
                "The model is quantised (quantization_config), and Picotron trains full weights. "
                "Name the repository that it was made from."
            )
        for key, computed in _COMPUTED.items():
            if given.get(key, computed[-1]) not in computed:
                raise _refusal(key, given[key], " or ".join(map(repr, computed[:1])))
        for key in _SIZES:
            _check_size(key, given.get(key))
        heads = given["num_attention_heads"]
        max_position_embeddings = given.get("max_position_embeddings", 2048)
        theta, scaling = _rope(given, max_position_embeddings)
        kv_heads, head_dim = given.get("num_key_value_heads"), given.get("head_dim")
        eos = given.get("eos_token_id", 2)
        return cls(
            **{key: given[key] for key in _SIZES},
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=given["hidden_size"] // heads if head_dim is None else head_dim,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=given.get("tie_word_embeddings", False),
            initializer_range=given.get("initializer_range", 0.02),
            bos_token_id=given.get("bos_token_id", 1),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=given.get("pad_token_id"),
        )

    def to_transformers(self) -> dict[str, Any]:
        """The contents of a config.json that transformers (5.x) loads as this architecture."""
        written = asdict(self)
        del written["rope_theta"], written["rope_scaling"]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope |= {"rope_type": self.rope_scaling.rope_type, "factor": self.rope_scaling.factor}
            if self.rope_scaling.rope_type == "llama3":
                rope |= asdict(self.rope_scaling)
        if isinstance(self.eos_token_id, tuple):
            written["eos_token_id"] = list(self.eos_token_id)
        return written | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_parameters": rope,
        }

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained; a tied head counts once."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self._matrix_parameters + norms + lookup

    @property
    def _matrix_parameters(self) -> int:
        """Numbers that meet every token in a matrix product: all projections and the head."""
        E, D = self.hidden_size, self.head_dim
        attention = 2 * E * D * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * E * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + self.vocab_size * E

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward, per token of a causal sequence.

        A matrix of P numbers costs a token 2 P forward (multiply and add) and 4 P backward (the
        gradient of its input and its own): 6 P. The head is such a matrix, tied or not; the
        embedding's look-up is none. In attention a token meets T / 2 keys on average, twice (q k^T
        and the sum over v), 2 D operations each: 2 H D T forward, 6 L H D T with the backward.
        Norms, rope, softmax and what a backend recomputes are left out, as is the custom (Chowdhery
        et al. 2022, arXiv:2204.02311, appendix B, but with half the attention for causality).
        """
        H, D, L = self.num_attention_heads, self.head_dim, self.num_hidden_layers
        return 6 * self._matrix_parameters + 6 * L * H * D * seq_len


SUPPORTED = "llama"  # the one model_type that is computed

# Without these there is no telling what model was meant; transformers would take Llama-2-7B's.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)

# Above these nothing is computed: sizes overflow, or building the model takes for ever.
_LARGEST = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**27}
_LARGEST_SIZE = 2**24

# The keys that change what is computed, and the values (the last: if absent) that we compute.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
}

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_SCALING_KEYS = {field.name for field in fields(RopeScaling)} - {"rope_type"}


def _rope(
    given: Mapping[str, Any], max_position_embeddings: int
) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from either generation of config.json."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise _refusal("rope_parameters", rope, "a table")
    for key in rope:
        if key not in _ROPE_KEYS | _SCALING_KEYS:
            raise _refusal(f"rope_parameters.{key}", rope[key], "absent")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _refusal("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    theta = rope.get("rope_theta") or given.get("rope_theta") or 10000.0
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return theta, None
    scaling = {key: rope[key] for key in _SCALING_KEYS if rope.get(key) is not None}
    needed = ["factor"]
    if rope_type == "llama3":
        needed += ["low_freq_factor", "high_freq_factor"]
        scaling["original_max_position_embeddings"] = (
            given.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or max_position_embeddings
        )
    for key in needed:
        if key not in scaling:
            raise _refusal(f"rope_parameters.{key}", None, f"a number, for rope_type {rope_type!r}")
    if rope_type == "linear":
        scaling = {"factor": scaling["factor"]}
    return theta, RopeScaling(rope_type=rope_type, **scaling)


def _refuse_other_family(found: object) -> None:
    if found == SUPPORTED:
        return
    what = "No model_type" if found is None else f"Unsupported model_type {quoted(found)}"
    raise ConfigError(
        f"{what}. Supported: {SUPPORTED} (Llama 2 and 3, TinyLlama, SmolLM and all others of this "
        "model_type). Other families, such as mistral, qwen2, qwen3, gemma and phi3, are not "
        "supported yet: give --model.path another model."
    )


def _check_size(key: str, found: object) -> None:
    largest = _LARGEST.get(key, _LARGEST_SIZE)
    if type(found) is not int or not 1 <= found <= largest:
        raise _refusal(key, found, f"a whole number from 1 to {largest}")


def _check_positive(key: str, found: object) -> None:
    # Below, float32 rounds it to 0 or, as a divisor, to infinity.
    if type(found) not in (int, float) or not 1e-20 <= found <= 1e20:  # type: ignore[operator]
        raise _refusal(key, found, "a number from 1e-20 to 1e20")


def _check_tokens(key: str, found: object) -> None:
    tokens = found if isinstance(found, tuple) else (found,)
    if found is not None and not all(type(t) is int and -1 <= t < 2**31 for t in tokens):
        raise _refusal(key, found, "a token's id, a list of ids, or null")


def _refusal(key: str, found: object, wanted: str) -> ConfigError:
    return ConfigError(f"The model's {key} is {quoted(found)}, but it must be {wanted}.")
