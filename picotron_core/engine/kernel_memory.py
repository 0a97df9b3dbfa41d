"""What each kernel keeps for its backward, and makes while it runs, from the sizes alone.

Every formula is read off a kernel, none is fitted; where one needs a backend's own constant, a test
holds the two together. Letters are those of `picotron_core.ops.attention`, with F the MLP's width
and N = B * T. Nothing is allocated and no device is looked at, so any card can be asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from picotron_core.engine.stages import Stage, counted_stages
from picotron_core.hardware import Device
from picotron_core.model.architecture import Architecture
from picotron_core.parallel import vocabulary
from picotron_core.registry.types import Candidate, normalise
from picotron_core.schema import Parallel

FLOAT32, INT64 = 4, 8  # bytes
QUERY_BLOCK, KEY_BLOCK = 128, 256  # mem_efficient's
CHUNK_LOGITS = 2**22  # mem_efficient's
DIVIDED = "vocabulary-parallel"  # no backend: a vocabulary that is divided has a loss of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One rank's training step: all that decides its memory.

    architecture: all layers of the model, with this rank's part of each matrix, see `slice_of`.
    dtype, reduce_dtype: torch's names of what is computed in, and what gradients travel in.
    seq_len: this rank's part of a sequence. replicas: ranks that sum their gradients.
    kernels: op -> the bundled backend by whose formulas it is counted, see `counted_as`.
    """

    architecture: Architecture
    device: Device
    dtype: str
    seq_len: int
    micro_batch: int
    accumulation: int = 1
    document_mask: bool = False
    reduce_dtype: str = "float32"
    replicas: int = 1
    parallel: Parallel = field(default_factory=Parallel)
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """N."""
        return self.micro_batch * self.seq_len

    @property
    def tokens_between(self) -> int:
        """Between a layer's blocks, where sequence parallelism divides them."""
        return self.tokens // (self.parallel.tp if self.parallel.sequence else 1)

    @property
    def shards(self) -> int:
        """Ranks that divide the optimizer's state."""
        return self.replicas if self.parallel.zero else 1

    @property
    def stages(self) -> list[Stage]:
        layers = self.architecture.num_hidden_layers
        return counted_stages(self.parallel, layers, self.accumulation)

    @property
    def size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return bytes_of(self.dtype)

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """kept: bytes from an op's forward to its backward. extra: beyond those, while it runs."""

    kept: int
    extra: int = 0


def cost(op: str, work: Work) -> Cost:
    return _FORMULAS[op][work.kernels[op]](work)


def counted_as(op: str, candidate: Candidate) -> str:
    """The bundled backend whose formulas count for a backend: its own, or by its claim of memory.

    A kernel that claims linear memory is counted as mem_efficient, any other as naive-math.
    """
    name = normalise(candidate.backend.name)
    if candidate.provider.bundled and name in _FORMULAS[op]:
        return name
    if candidate.backend.memory == "linear" and "mem_efficient" in _FORMULAS[op]:
        return "mem_efficient"
    return "naive_math"


def bytes_of(dtype: str) -> int:
    return FLOAT32 if dtype == "float32" else 2


# An op's cost counts the inputs that it saves and its output that the next projection saves, each
# once: the projections themselves keep nothing else but weights.


def _norm(work: Work) -> Cost:
    """Its input in float32 (x itself, or a copy), 1 / rms, x / rms and y; four float32 back.

    Of y the next projection keeps all tokens, whatever part of them the norm saw.
    """
    E = work.architecture.hidden_size
    numbers = work.tokens_between * E
    kept = numbers * (FLOAT32 + work.size) + work.tokens_between * FLOAT32
    return Cost(kept=kept + work.tokens * E * work.size, extra=4 * numbers * FLOAT32)


def _fused_norm(work: Work) -> Cost:
    """On CUDA x, x / rms and y in the compute dtype; on a CPU torch composes it as `_norm` does."""
    E = work.architecture.hidden_size
    numbers = work.tokens_between * E
    kept = (2 * numbers + work.tokens * E) * work.size
    return _norm(work) if work.on_cpu else Cost(kept=kept, extra=numbers * 8)


def _swiglu(work: Work) -> Cost:
    """gate, silu(gate), up and y."""
    numbers = work.tokens * work.architecture.intermediate_size * work.size
    return Cost(kept=4 * numbers, extra=2 * numbers)


def _lean_swiglu(work: Work) -> Cost:
    """gate, up and y. Backward: dy takes y's place, and two more."""
    numbers = work.tokens * work.architecture.intermediate_size * work.size
    return Cost(kept=3 * numbers, extra=2 * numbers)


def _naive_attention(work: Work) -> Cost:
    """The softmax before and after its mask, q, repeated k and v in float32, two masks; out."""
    a = work.architecture
    square = work.micro_batch * a.num_attention_heads * work.seq_len**2
    masks = 2 * (work.micro_batch if work.document_mask else 1) * work.seq_len**2
    kept = 2 * square * FLOAT32 + masks + 3 * _of_queries(work, FLOAT32)
    return Cost(
        kept=kept + _of_queries(work, work.size),
        extra=square * FLOAT32 + 2 * _of_queries(work, FLOAT32),
    )


def _sdpa(work: Work) -> Cost:
    """Torch's flash kernel: q, k, v, out, the lse, and out once more as o_proj's rows. A CPU's
    works in float32. On CUDA, where flash cannot serve, the memory-efficient one: `_pinned`.
    """
    if not work.on_cpu and (work.device.below_ampere or work.size > 2 or work.document_mask):
        cost = _pinned(work)
    else:
        size = FLOAT32 if work.on_cpu else work.size
        kept = _qkvo(work, size) + _of_queries(work, work.size) + _lse(work)
        extra = _qkvo(work, size, repeated=not work.on_cpu)
        if not work.on_cpu:  # dq is summed in float32
            extra += _of_queries(work, FLOAT32)
        cost = Cost(kept=kept, extra=extra)
    if not work.document_mask:
        return cost
    bias = work.micro_batch * work.seq_len**2 * (FLOAT32 if work.on_cpu else work.size)
    return Cost(kept=cost.kept + bias, extra=cost.extra)


def _lean_attention(work: Work) -> Cost:
    """Torch's kernel on CUDA, which takes no documents; else block by block, with k's and v's
    gradients summed in float32 and three blocks of logits at a time.
    """
    if not work.on_cpu and not work.document_mask:
        return _pinned(work)
    a = work.architecture
    kept = _qkvo(work, work.size) + _of_queries(work, work.size) + _lse(work)
    sums = 2 * work.tokens * a.num_key_value_heads * a.head_dim * FLOAT32
    block = min(QUERY_BLOCK, work.seq_len) * min(KEY_BLOCK, work.seq_len)
    blocks = 3 * work.micro_batch * a.num_attention_heads * block * FLOAT32
    return Cost(kept=kept, extra=_qkvo(work, work.size) + sums + blocks)


def _pinned(work: Work) -> Cost:
    """Torch's memory-efficient CUDA kernel: it knows no groups, and puts out in o_proj's order."""
    qkvo = _qkvo(work, work.size, repeated=True)
    return Cost(kept=qkvo + _lse(work), extra=qkvo + _of_queries(work, FLOAT32))


def _qkvo(work: Work, size: int, *, repeated: bool = False) -> int:
    """q, k, v and out, or their gradients; k and v for all H heads if they are repeated."""
    a = work.architecture
    heads = a.num_attention_heads if repeated else a.num_key_value_heads
    return 2 * _of_queries(work, size) + 2 * work.tokens * heads * a.head_dim * size


def _of_queries(work: Work, size: int) -> int:
    """One tensor like q."""
    return work.tokens * work.architecture.num_attention_heads * work.architecture.head_dim * size


def _lse(work: Work) -> int:
    return work.tokens * work.architecture.num_attention_heads * FLOAT32


def _naive_loss(work: Work) -> Cost:
    """The float32 logits; in the backward of logsumexp three more of their size."""
    logits = work.tokens * work.architecture.vocab_size * FLOAT32
    return Cost(kept=logits, extra=3 * logits)


def _lean_loss(work: Work) -> Cost:
    """Both gradients, made in the forward; a chunk's logits thrice, then both gradients scaled."""
    a, N = work.architecture, work.tokens
    head = a.vocab_size * a.hidden_size
    dhidden = N * a.hidden_size * work.size
    rows = chunk_rows(N=N, E=a.hidden_size, V=a.vocab_size)
    forward = 3 * rows * a.vocab_size * FLOAT32
    if not work.on_cpu and work.size < FLOAT32:
        forward += head * FLOAT32  # a product in float32, before it is added
    backward = dhidden + head * (FLOAT32 + (work.size if work.size < FLOAT32 else 0))
    return Cost(kept=dhidden + head * FLOAT32, extra=max(forward, backward))


def _divided_loss(work: Work) -> Cost:
    """As mem_efficient's, on a part of the vocabulary, in chunks of its own: the logits of two at a
    time, and a copy of one while its logsumexp is made.
    """
    a, N = work.architecture, work.tokens
    head = a.vocab_size * a.hidden_size
    dhidden = N * a.hidden_size * work.size
    rows = max(1, vocabulary.CHUNK_LOGITS // a.vocab_size)
    forward = (3 if rows < N else 2) * min(N, rows) * a.vocab_size * FLOAT32
    backward = dhidden + head * (FLOAT32 + (work.size if work.size < FLOAT32 else 0))
    return Cost(kept=dhidden + head * FLOAT32, extra=max(forward, backward))


def chunk_rows(*, N: int, E: int, V: int) -> int:
    """mem_efficient's."""
    return min(max(1, CHUNK_LOGITS // V, min(N, E) // 2), max(1, (N + 1) // 2))


def _naive_optimizer(work: Work) -> Cost:
    """Three temporaries of the largest parameter."""
    a = work.architecture
    rows = max(a.vocab_size, a.intermediate_size, a.num_attention_heads * a.head_dim)
    return Cost(kept=0, extra=3 * rows * a.hidden_size * FLOAT32)


def _fused_optimizer(work: Work) -> Cost:
    """In place."""
    return Cost(kept=0)


_FORMULAS: Mapping[str, Mapping[str, Callable[[Work], Cost]]] = {
    "norm": {"naive_math": _norm, "torch_fused": _fused_norm},
    "swiglu": {"naive_math": _swiglu, "mem_efficient": _lean_swiglu},
    "attention": {
        "naive_math": _naive_attention,
        "sdpa": _sdpa,
        "mem_efficient": _lean_attention,
    },
    "loss": {"naive_math": _naive_loss, "mem_efficient": _lean_loss, DIVIDED: _divided_loss},
    "optimizer": {"naive_math": _naive_optimizer, "torch_fused": _fused_optimizer},
}
COUNTED = tuple(_FORMULAS)  # rope keeps its tables alone, comm nothing
