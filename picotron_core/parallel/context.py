"""Context parallelism: every rank of the cp axis has a part of each sequence.

A sequence is cut into 2 cp chunks. Under a causal mask the first has little to do and the last has
much, so rank r takes one of each: chunk r, and chunk 2 cp - 1 - r (zigzag). With four ranks:

    tokens   | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
    rank       0   1   2   3   3   2   1   0

All but attention is token by token. In attention each rank keeps its queries, and the keys and
values go round a ring: beside its own a rank has the part at hand, and the next (Liu et al. 2023,
arXiv:2310.01889; the pairs of chunks are those of Llama 3, arXiv:2407.21783 section 3.3.2). Of
every part that comes by, a rank computes what its queries see: attention over those keys alone, out
and its lse, which are merged as the blocks of an online softmax are.

    step         0             1             2             3
    rank 0   keys of 0     keys of 3     keys of 2     keys of 1
    rank 1   keys of 1     keys of 0     keys of 3     keys of 2      ...

`ring` makes of an attention function one of parts: neither the model nor the kernel knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from picotron_core.errors import ConfigError
from picotron_core.model.llama import Llama
from picotron_core.model.rope import Tables
from picotron_core.ops import Attention
from picotron_core.ops.comm import Work
from picotron_core.parallel.mesh import Axis
from picotron_core.parallel.timeline import Span, no_span


def refuse_context_parallel(seq_len: int, degree: int) -> None:
    """Raises: ConfigError where a sequence cannot be cut into 2 * degree equal chunks."""
    if degree > 1 and seq_len % (2 * degree):
        fitting = seq_len - seq_len % (2 * degree) or 2 * degree
        raise ConfigError(
            f"parallel.cp = {degree} cuts each sequence into {2 * degree} chunks, but data.seq_len "
            f"is {seq_len}. Use --data.seq_len {fitting}."
        )


def divide_context(model: Llama, cp: Axis, *, span: Span = no_span) -> None:
    """Let the model compute with a part of each sequence, as `own` gives it."""
    decoder = model.model
    decoder.rope_tables = _tables_of_part(decoder.rope_tables, cp)
    for number in decoder.layers:
        block = model.get_submodule(f"model.layers.{number}.self_attn")
        block.attention = ring(block.attention, cp, span=span)  # type: ignore[assignment, arg-type]


def own(whole: Tensor, index: int, ranks: int, *, dim: int) -> Tensor:
    """Of whole sequences along `dim`, the two chunks of a rank, the earlier one first."""
    if ranks == 1:
        return whole
    chunks = whole.chunk(2 * ranks, dim)
    return torch.cat((chunks[index], chunks[2 * ranks - 1 - index]), dim)


def _tables_of_part(tables: Tables, cp: Axis) -> Tables:
    def of_part(start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = tables(start, length * cp.size, device)
        return own(cos, cp.index, cp.size, dim=0), own(sin, cp.index, cp.size, dim=0)

    return of_part


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One call of attention: some of this rank's queries, and some of the keys that came by."""

    queries: slice
    keys: slice
    causal: bool
    offset: int | None = None


def blocks(
    mine: int, theirs: int, *, ranks: int, tokens: int, causal: bool, window: int | None
) -> list[Block]:
    """What the queries of rank `mine` see of the keys of rank `theirs`, in as few calls as may be.

    Args:
        tokens: of a rank.
    """
    half = tokens // 2
    everything, early, late = slice(0, tokens), slice(0, half), slice(half, tokens)
    if window is not None:
        return _blocks_in_window(mine, theirs, ranks=ranks, half=half, window=window)
    if not causal:
        return [Block(queries=everything, keys=everything, causal=False)]
    if theirs == mine:
        return [Block(queries=everything, keys=everything, causal=True)]
    if theirs < mine:  # their early chunk comes before both of mine, their late one after both
        return [Block(queries=everything, keys=early, causal=False)]
    return [Block(queries=late, keys=everything, causal=False)]  # both of theirs lie between mine


def _blocks_in_window(mine: int, theirs: int, *, ranks: int, half: int, window: int) -> list[Block]:
    """Chunk by chunk: how far apart two are decides what a query sees."""
    places = (slice(0, half), slice(half, 2 * half))
    return [
        Block(queries=queries, keys=keys, causal=True, offset=(ours - other) * half)
        for ours, queries in zip((mine, 2 * ranks - 1 - mine), places, strict=True)
        for other, keys in zip((theirs, 2 * ranks - 1 - theirs), places, strict=True)
        if other <= ours and (ours - other - 1) * half + 1 < window
    ]


def ring(attention: Attention, cp: Axis, *, span: Span = no_span) -> Attention:
    """Attention over whole sequences, of which each rank of `cp` has a part of q, k and v.

    As `picotron_core.ops.attention`, with these differences: T = S tokens of this rank, as `own`
    gives them; doc_ids (B, cp * S) are of the whole sequence; no offset, no query_doc_ids.
    `attention` must give an lse that can be differentiated. `span` is told of every turn.
    """

    def whole(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        window: int | None = None,
        doc_ids: Tensor | None = None,
        offset: int | None = None,
        query_doc_ids: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if q.shape[2] != k.shape[2] or q.shape[2] % 2:
            raise ValueError(
                f"a rank has two chunks of T={q.shape[2]} queries, S={k.shape[2]} keys"
            )
        if offset is not None or query_doc_ids is not None:
            raise ValueError("the queries of a ring are at the positions of its keys")
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"window={window} needs window >= 1 and causal=True, not {causal}")
        asked = _Ring(
            attention=attention,
            cp=cp,
            causal=causal,
            scale=scale,
            window=window,
            doc_ids=doc_ids,
            span=span,
        )
        out, lse = RingAttention.apply(q, k, v, asked)  # type: ignore[no-untyped-call]
        return (out, lse) if return_lse else out

    return whole  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ring:
    """What is asked of whole sequences."""

    attention: Attention
    cp: Axis
    causal: bool
    scale: float | None
    window: int | None
    doc_ids: Tensor | None
    span: Span

    def passing(self, mine: Tensor, direction: str) -> Iterator[tuple[int, Tensor]]:
        """Each rank and what it has, this one's own first, while the next is on its way."""
        held = mine
        for turn in range(self.cp.size):
            source = (self.cp.index - turn) % self.cp.size
            span = self.span("ring", turn=turn, block=source, direction=direction)
            if turn == self.cp.size - 1:
                with span:
                    yield source, held
                return
            coming = torch.empty_like(held)
            work = self.cp.pass_on(held, coming)  # send to the next of cp, recv from the previous
            with span:
                yield source, held
            work.wait()
            held = coming

    def blocks(self, source: int, tokens: int) -> list[Block]:
        return blocks(
            self.cp.index,
            source,
            ranks=self.cp.size,
            tokens=tokens,
            causal=self.causal,
            window=self.window,
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, block: Block, source: int
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the queries of a block over its keys alone."""
        more: dict[str, Any] = {}
        if self.doc_ids is not None:
            mine, theirs = (
                own(self.doc_ids, r, self.cp.size, dim=1) for r in (self.cp.index, source)
            )
            more["doc_ids"] = theirs[:, block.keys]
            if source != self.cp.index or block.queries != block.keys:
                more["query_doc_ids"] = mine[:, block.queries]
        if block.offset is not None:
            more |= {"offset": block.offset, "window": self.window}
        return self.attention(
            q, k, v, causal=block.causal, scale=self.scale, return_lse=True, **more
        )


class RingAttention(torch.autograd.Function):
    """Forward: send/recv of k, v round cp; backward: send/recv of k, v, dk, dv round cp.

    With the parts' outs o_i and lses l_i:  lse = logsumexp(l_i),  out = sum of exp(l_i - lse) o_i.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, asked: _Ring) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(q.dtype, torch.float32)
        total = q.new_zeros(q.shape, dtype=exact)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=exact)
        for source, (keys, values) in asked.passing(torch.stack((k, v)), "forward"):
            for block in asked.blocks(source, q.shape[2]):
                rows, columns = block.queries, block.keys
                part = asked.attend(
                    q[:, :, rows], keys[:, :, columns], values[:, :, columns], block, source
                )
                _merge(total[:, :, rows], lse[:, :, rows], *part)
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.asked = asked
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Every part is made again, and with w_i = exp(l_i - lse) gets

            do_i = w_i dout,    dl_i = w_i (dout (o_i - out) + dlse).

        What it gives its keys goes round with them, until both are home.
        """
        q, k, v, out, lse = ctx.saved_tensors
        asked: _Ring = ctx.asked
        known = lse.masked_fill(lse == -torch.inf, 0)  # of a row that sees nothing w_i is 0
        shift = dlse - (dout.to(lse.dtype) * out).sum(-1)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        arriving: tuple[Work, Tensor, Tensor] | None = None  # with what is sent, and what comes
        for source, (keys, values) in asked.passing(torch.stack((k, v)), "backward"):
            gradients = torch.zeros((2, *k.shape), dtype=lse.dtype, device=k.device)
            for block in asked.blocks(source, q.shape[2]):
                rows, columns = block.queries, block.keys
                some = (q[:, :, rows], keys[:, :, columns], values[:, :, columns])
                some_q, some_k, some_v = (t.detach().requires_grad_() for t in some)
                with torch.enable_grad():
                    part, part_lse = asked.attend(some_q, some_k, some_v, block, source)
                upstream = dout[:, :, rows]
                weight = (part_lse.detach() - known[:, :, rows]).exp()
                along = (upstream.to(lse.dtype) * part.detach()).sum(-1)
                given = (
                    (weight[..., None] * upstream).to(part.dtype),
                    weight * (along + shift[:, :, rows]),
                )
                dq_part, dk_part, dv_part = torch.autograd.grad(
                    (part, part_lse), (some_q, some_k, some_v), given
                )
                dq[:, :, rows] += dq_part
                gradients[0][:, :, columns] += dk_part
                gradients[1][:, :, columns] += dv_part
            if arriving is not None:  # what the ranks before gave the same keys
                gradients += _landed(*arriving)
                arriving = None  # or its two buffers would stand beside the next two
            coming = torch.empty_like(gradients)
            arriving = asked.cp.pass_on(gradients, coming), gradients, coming
        assert arriving is not None
        home = _landed(*arriving)  # after a whole round: the gradients of this rank's own keys
        return dq.to(q.dtype), home[0].to(k.dtype), home[1].to(v.dtype), None


def _landed(work: Work, sent: Tensor, coming: Tensor) -> Tensor:
    """What came. What was sent is held until then: the transport reads it."""
    work.wait()
    return coming


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """In place: out and lse <- those over the keys so far and the part's together."""
    total = torch.logaddexp(lse, part_lse)
    known = total.masked_fill(total == -torch.inf, 0)  # -inf - -inf would be NaN
    out.mul_((lse - known).exp()[..., None]).add_(part * (part_lse - known).exp()[..., None])
    lse.copy_(total)
