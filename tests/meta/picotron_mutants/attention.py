"""Wrong attentions. Each is the right one of `flash.py` with one thing wrong."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from picotron_core.ops.attention import visible
from picotron_mutants.flash import LOWEST, Call, Flash
from picotron_mutants.flash import right as _right
from picotron_mutants.memory import as_if_dense, as_if_rows_dense, instance, narrow, truncated


def _fp8(x: Tensor, dtype: torch.dtype, kind: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return x if dtype == torch.float32 else x.to(kind).float()


class _KnowsDtype(Flash):
    """`dtype` is that of the call under way."""

    dtype = torch.float32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        self.dtype = q.dtype
        return super().forward(q, k, v, call)

    def backward(self, *tensors: Any) -> tuple[Tensor | None, ...]:
        self.dtype = tensors[0].dtype
        return super().backward(*tensors)


# Scale and logits.


@instance
class scale_of_padded_width(Flash):
    def scale(self, scale: float | None, D: int) -> float:
        return super().scale(scale, 1 << (D - 1).bit_length())


@instance
class scale_ignored(Flash):
    def scale(self, scale: float | None, D: int) -> float:
        return D**-0.5


@instance
class scale_zero_is_default(Flash):
    def scale(self, scale: float | None, D: int) -> float:
        return scale or D**-0.5


@instance
class scale_always_positive(Flash):
    def scale(self, scale: float | None, D: int) -> float:
        return abs(super().scale(scale, D))


@instance
class query_scaled_in_16_bits(_KnowsDtype):
    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return self.product(narrow(q * call.scale, self.dtype), k.mT)


@instance
class width_tail_dropped(Flash):
    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        D = q.shape[-1]
        whole = D // 8 * 8 or D
        return super().logits(q[..., :whole], k[..., :whole], call)


@instance
class width_beyond_128_dropped(Flash):
    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return super().logits(q[..., :128], k[..., :128], call)


@instance
class logits_in_16_bits(_KnowsDtype):
    """What tier B may do, claimed as tier A."""

    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return narrow(super().logits(q, k, call), self.dtype)


@instance
class logits_capped(Flash):
    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return 50 * torch.tanh(super().logits(q, k, call) / 50)


@instance
class logits_clamped(Flash):
    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return super().logits(q, k, call).clamp(-30, 30)


@instance
class positions_biased(Flash):
    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return super().logits(q, k, call) + 1e-3 * torch.arange(k.shape[-2])


@instance
class products_in_tf32(Flash):
    """The operands' mantissas cut to ten bits, as tensor cores do, claimed as tier A."""

    def load(self, x: Tensor) -> Tensor:
        return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32)


# Who sees whom.


@instance
class causal_strict(Flash):
    def not_ahead(self, ahead: Tensor) -> Tensor:
        return ahead < 0


@instance
class causal_one_ahead(Flash):
    def not_ahead(self, ahead: Tensor) -> Tensor:
        return ahead <= 1


@instance
class causal_top_left(Flash):
    def position(self, rows: slice, call: Call) -> Tensor:
        return torch.arange(rows.start, rows.stop)


@instance
class causal_top_left_when_fewer_keys(Flash):
    def position(self, rows: slice, call: Call) -> Tensor:
        return torch.arange(rows.start, rows.stop) + (call.first if call.T <= call.S else 0)


@instance
class causal_always(Flash):
    def hide(self, logits: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        ahead = torch.arange(columns.start, columns.stop) > self.position(rows, call)[:, None]
        return super().hide(logits, rows, columns, call).masked_fill(ahead, -torch.inf)


@instance
class one_query_sees_all(Flash):
    """A decoding path that knows neither window nor documents."""

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        sees = super().sees(rows, columns, call)
        return sees if call.T > 1 else torch.ones_like(sees)


@instance
class first_key_always_seen(Flash):
    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        sees = super().sees(rows, columns, call).clone()
        sees[..., 0] |= columns.start == 0
        return sees


@instance
class mask_of_minus_1e4(Flash):
    def hide(self, logits: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        return logits.masked_fill(~self.sees(rows, columns, call), -1e4)


@instance
class mask_in_last_tile_alone(Flash):
    """Right where the diagonal lies within one tile."""

    tile = 16

    def hide(self, logits: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        last = columns.stop >= min(call.S, rows.stop + call.first)
        masked = last or call.window is not None or call.doc_ids is not None
        return super().hide(logits, rows, columns, call) if masked else logits


@instance
class tiles_skipped_by_query_index(Flash):
    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(min(call.S, rows.stop) if call.causal else call.S)


@instance
class large_tiles_skipped_by_query_index(Flash):
    tile = 64

    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(min(call.S, rows.stop) if call.causal else call.S)


@instance
class window_skips_by_last_row(Flash):
    """The first tile of keys is that of the block's last query; its first one sees further back."""

    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        first = 0 if call.window is None else rows.stop - 1 + call.first - call.window + 1
        return (tile for tile in self.tiles(call.S) if tile.stop > first)


@instance
class window_one_short(Flash):
    def in_window(self, behind: Tensor, window: int) -> Tensor:
        return behind < max(1, window - 1)


@instance
class window_one_long(Flash):
    def in_window(self, behind: Tensor, window: int) -> Tensor:
        return behind <= window


@instance
class window_symmetric(Flash):
    """Half of it on each side, as in encoders."""

    def in_window(self, behind: Tensor, window: int) -> Tensor:
        return behind < (window + 1) // 2


@instance
class window_ignored(Flash):
    def in_window(self, behind: Tensor, window: int) -> Tensor:
        return torch.ones_like(behind, dtype=torch.bool)


class _SeesOtherwise(Flash):
    """Loses an argument in some calls."""

    def seen_as(self, call: Call) -> Call:
        raise NotImplementedError

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        return super().sees(rows, columns, self.seen_as(call))


def _but(call: Call, **changes: Any) -> Call:
    fields = {name: getattr(call, name) for name in Call.__slots__}
    return Call(**{**fields, **changes})


@instance
class window_ignored_unless_square(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.T == call.S else _but(call, window=None)


@instance
class window_ignored_with_documents(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.doc_ids is None else _but(call, window=None)


@instance
class documents_ignored_with_window(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.window is None else _but(call, doc_ids=None)


@instance
class documents_ignored_unless_causal(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.causal else _but(call, doc_ids=None)


@instance
class causal_ignored_with_documents(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.doc_ids is None else _but(call, causal=False)


@instance
class documents_of_first_batch(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.doc_ids is None else _but(call, doc_ids=call.doc_ids[:1])


@instance
class documents_by_head_and_batch(Flash):
    """The masks are repeated for (heads, batch) where the rows lie as (batch, heads)."""

    def hide(self, logits: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        sees = self.sees(rows, columns, call)
        if sees.dim() == 4:
            sees = sees.repeat(logits.shape[1], 1, 1, 1).view(logits.shape)
        return logits.masked_fill(~sees, -torch.inf)


@instance
class documents_of_first_tokens(Flash):
    def documents(self, doc_ids: Tensor, rows: slice, call: Call) -> Tensor:
        return doc_ids[:, rows]


@instance
class documents_in_float32(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.doc_ids is None else _but(call, doc_ids=call.doc_ids.float())


@instance
class documents_in_int32(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.doc_ids is None else _but(call, doc_ids=call.doc_ids.int())


@instance
class documents_in_order(Flash):
    """A query sees ids up to its own: right for packed documents under a causal mask."""

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        return one <= other


@instance
class negative_documents_are_padding(Flash):
    def same(self, one: Tensor, other: Tensor) -> Tensor:
        return (one == other) & (other >= 0)


@instance
class documents_read_with_stride_1(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.doc_ids is None else _but(call, doc_ids=as_if_dense(call.doc_ids))


# Where the queries stand.


@instance
class query_offset_ignored(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T


@instance
class query_offset_one_more(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T if offset is None else offset + 1


@instance
class query_offset_negated(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T if offset is None else -offset


@instance
class query_offset_zero_is_none(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return offset or S - T


@instance
class query_offset_from_the_end(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T + (offset or 0)


@instance
class query_offset_never_negative(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T if offset is None else max(0, offset)


@instance
class query_offset_among_the_keys(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T if offset is None else min(offset, S - T)


@instance
class query_offset_ignored_when_square(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T if T == S else super().first(offset, T, S)


@instance
class query_offset_ignored_unless_square(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return super().first(offset, T, S) if T == S else S - T


@instance
class query_offset_ignored_in_decoding(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T if T == 1 else super().first(offset, T, S)


def _at_the_end(call: Call) -> Call:
    """Without an offset; the documents stay those of the queries."""
    own = call.query_doc_ids
    if own is None and call.doc_ids is not None:
        own = call.doc_ids[:, call.first :][:, : call.T]
    return _but(call, first=call.S - call.T, query_doc_ids=own)


def _of_their_positions(call: Call) -> Call:
    """Without query_doc_ids; beyond the keys the documents are those of the last key."""
    if call.doc_ids is None:
        return call
    position = (torch.arange(call.T) + call.first).clamp(0, call.S - 1)
    return _but(call, query_doc_ids=call.doc_ids[:, position])


@instance
class query_offset_ignored_with_documents(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.doc_ids is None else _at_the_end(call)


@instance
class query_offset_ignored_with_a_window(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.window is None else _at_the_end(call)


@instance
class window_without_query_offset(Flash):
    """The diagonal is where it belongs, the window's end where it is without an offset."""

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        sees = super().sees(rows, columns, _but(call, window=None))
        if call.window is None:
            return sees
        near = _but(_at_the_end(call), causal=False)
        return sees & super().sees(rows, columns, near)


@instance
class causal_without_query_offset(Flash):
    """The window's end is where it belongs, the diagonal where it is without an offset."""

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        sees = super().sees(rows, columns, _but(call, causal=False))
        return sees & super().sees(rows, columns, _but(_at_the_end(call), window=None))


@instance
class window_bound_overflows(Flash):
    """The first key of a block, position minus window, wraps around where that is negative."""

    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        if call.window is None:
            return self.tiles(call.S)
        before = torch.tensor(rows.start + call.first) - call.window
        return (tile for tile in self.tiles(call.S) if tile.stop > before)


@instance
class tiles_skipped_without_query_offset(Flash):
    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(min(call.S, rows.stop + call.S - call.T) if call.causal else call.S)


@instance
class large_tiles_skipped_without_query_offset(Flash):
    tile = 128

    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(min(call.S, rows.stop + call.S - call.T) if call.causal else call.S)


@instance
class mask_remembered_for_any_offset(Flash):
    def __init__(self) -> None:
        self.masks: dict[Any, Tensor] = {}

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        if call.doc_ids is not None:
            return super().sees(rows, columns, call)
        key = (call.T, call.S, call.causal, call.window, rows.start, columns.start)
        if key not in self.masks:
            self.masks[key] = super().sees(rows, columns, call)
        return self.masks[key]


@instance
class positions_in_float32(Flash):
    def position(self, rows: slice, call: Call) -> Tensor:
        return super().position(rows, call).float()


@instance
class query_documents_ignored(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return _of_their_positions(call)


@instance
class query_documents_ignored_when_square(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return _of_their_positions(call) if call.T == call.S else call


@instance
class query_documents_ignored_with_window(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.window is None else _of_their_positions(call)


@instance
class query_documents_ignored_unless_causal(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return call if call.causal else _of_their_positions(call)


@instance
class query_documents_of_first_batch(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        own = call.query_doc_ids
        return call if own is None else _but(call, query_doc_ids=own[:1])


@instance
class query_documents_read_from_the_offset_on(_SeesOtherwise):
    """As if they were those of all keys."""

    def seen_as(self, call: Call) -> Call:
        own = call.query_doc_ids
        return call if own is None else _but(call, query_doc_ids=own.roll(-call.first, 1))


@instance
class query_documents_of_the_first_tile(Flash):
    def documents(self, doc_ids: Tensor, rows: slice, call: Call) -> Tensor:
        own = call.query_doc_ids
        return (
            super().documents(doc_ids, rows, call)
            if own is None
            else own[:, : rows.stop - rows.start]
        )


@instance
class query_documents_meet_the_first_keys(Flash):
    """Every tile of keys is compared by the documents of the first."""

    tile = 8

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        if call.query_doc_ids is None:
            return super().sees(rows, columns, call)
        assert call.doc_ids is not None
        first = call.doc_ids[:, : columns.stop - columns.start]
        ids = call.doc_ids.clone()
        ids[:, columns] = first
        return super().sees(rows, columns, _but(call, doc_ids=ids))


@instance
class keys_take_the_documents_of_queries(_SeesOtherwise):
    """Where there are as many."""

    def seen_as(self, call: Call) -> Call:
        own = call.query_doc_ids
        return call if own is None or call.T != call.S else _but(call, doc_ids=own)


@instance
class query_documents_in_int32(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        own = call.query_doc_ids
        if own is None or call.doc_ids is None:
            return call
        return _but(call, query_doc_ids=own.int(), doc_ids=call.doc_ids.int())


@instance
class query_documents_read_with_stride_1(_SeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        own = call.query_doc_ids
        return call if own is None else _but(call, query_doc_ids=as_if_dense(own))


# Tiles and sums.


@instance
class last_key_dropped(Flash):
    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(max(1, call.S - 1))


@instance
class tail_tile_dropped(Flash):
    tile = 16

    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(call.S // 16 * 16 or call.S)


@instance
class keys_beyond_512_dropped(Flash):
    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        return self.tiles(min(call.S, 512))


@instance
class zeros_unless_whole_tiles(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call)
        return (out, lse) if call.S % 16 == 0 else (torch.zeros_like(out), lse)


@instance
class padded_keys_counted(Flash):
    """The tail of a tile is zeros, and exp(0 - top) is in the sum."""

    def total(self, total: Tensor, shrink: Tensor, p: Tensor, top: Tensor) -> Tensor:
        padding = (self.tile - p.shape[-1]) * self.exp(-top).masked_fill(top == LOWEST, 0)
        return super().total(total, shrink, p, top) + padding


@instance
class first_tile_not_cleared(Flash):
    """Softmax plus one: the running sum starts at 1."""

    def divide(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums / (1 + total)


@instance
class sums_not_rescaled(Flash):
    def gather(self, sums: Tensor, shrink: Tensor, pv: Tensor) -> Tensor:
        return sums + pv


@instance
class total_not_rescaled(Flash):
    def total(self, total: Tensor, shrink: Tensor, p: Tensor, top: Tensor) -> Tensor:
        return total + p.sum(-1, keepdim=True)


@instance
class max_not_subtracted(Flash):
    def highest(self, top: Tensor, logits: Tensor) -> Tensor:
        return torch.zeros_like(top)


@instance
class max_of_last_tile(Flash):
    """Right until a later tile holds only lower logits by far."""

    def highest(self, top: Tensor, logits: Tensor) -> Tensor:
        return logits.amax(-1, keepdim=True).clamp(min=LOWEST)


@instance
class nan_where_nothing_seen(Flash):
    def divide(self, sums: Tensor, total: Tensor) -> Tensor:
        return sums / total


@instance
class mean_where_nothing_seen(Flash):
    """A row that sees nothing takes the mean of v, as softmax of equal logits does."""

    def hide(self, logits: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        return super().hide(logits, rows, columns, call).clamp(min=LOWEST)


@instance
class exp_of_three_terms(_KnowsDtype):
    """exp by a polynomial between powers of two that errs by one in a thousand."""

    def exp(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return x.exp()
        y = (x * 1.4426950408889634).clamp(min=-126)
        whole = y.floor()
        part = y - whole
        return torch.where(x < -87, 0.0, torch.exp2(whole) * (1 + part * (0.6565 + 0.3435 * part)))


@instance
class log2e_of_three_digits(_KnowsDtype):
    def exp(self, x: Tensor) -> Tensor:
        return x.exp() if self.dtype == torch.float32 else torch.exp2(x * 1.443)


@instance
class weights_in_fp8(Flash):
    def weights(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        return _fp8(p, dtype)


@instance
class sums_in_16_bits(_KnowsDtype):
    tile = 16

    def gather(self, sums: Tensor, shrink: Tensor, pv: Tensor) -> Tensor:
        return narrow(super().gather(sums, shrink, pv), self.dtype)


@instance
class total_in_16_bits(_KnowsDtype):
    tile = 16

    def total(self, total: Tensor, shrink: Tensor, p: Tensor, top: Tensor) -> Tensor:
        return narrow(super().total(total, shrink, p, top), self.dtype)


@instance
class sums_in_float16(_KnowsDtype):
    """Fine until the sum of large values leaves float16's range."""

    def gather(self, sums: Tensor, shrink: Tensor, pv: Tensor) -> Tensor:
        kept = torch.float16 if self.dtype == torch.bfloat16 else self.dtype
        return narrow(super().gather(sums, shrink, pv), kept)


@instance
class truncating_store(Flash):
    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return truncated(x, dtype)


@instance
class float16_by_way_of_bfloat16(Flash):
    def load(self, x: Tensor) -> Tensor:
        return x.bfloat16().float() if x.dtype == torch.float16 else x.float()


@instance
class one_row_larger(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call)
        out[:, :, 7:8] *= 1.02
        return out, lse


@instance
class a_little_larger(_KnowsDtype):
    """A normaliser that is off by one roundoff everywhere."""

    def divide(self, sums: Tensor, total: Tensor) -> Tensor:
        return super().divide(sums, total) * (1 + torch.finfo(self.dtype).eps / 2)


@instance
class returns_float32(Flash):
    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)


# Heads, batches, strides.


@instance
class kv_head_modulo(Flash):
    def kv_head(self, h: Tensor, H: int, K: int) -> Tensor:
        return h % K


@instance
class kv_head_over_groups_of_k(Flash):
    """H = 4, K = 2 is the usual test, and the one where it is right."""

    def kv_head(self, h: Tensor, H: int, K: int) -> Tensor:
        return (h // K).clamp(max=K - 1)


@instance
class kv_of_first_batch(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return super().forward(q, k[:1].expand_as(k), v, call)


@instance
class batches_beyond_two_dropped(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call)
        out[2:] = 0
        return out, lse


@instance
class heads_beyond_eight_dropped(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call)
        out[:, 8:] = 0
        return out, lse


@instance
class dense_inputs_assumed(Flash):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_dense(x))


@instance
class dense_rows_assumed(Flash):
    def load(self, x: Tensor) -> Tensor:
        return super().load(as_if_rows_dense(x))


@instance
class v_read_with_strides_of_k(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return super().forward(q, k, v.as_strided(v.shape, k.stride()), call)


@instance
class offset_ignored(Flash):
    def load(self, x: Tensor) -> Tensor:
        return super().load(x.as_strided(x.shape, x.stride(), max(0, x.storage_offset() - 1)))


@instance
class reads_past_the_end(Flash):
    """One key too many with weight 0; 0 times what lies there is not always 0."""

    def divide(self, sums: Tensor, total: Tensor) -> Tensor:
        return super().divide(sums + self.beyond, total)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        longer = v.as_strided((*v.shape[:2], v.shape[2] + 1, v.shape[3]), v.stride())
        heads = self.kv_head(torch.arange(q.shape[1]), q.shape[1], k.shape[1])
        self.beyond = 0 * longer[:, heads, -1:].float()
        return super().forward(q, k, v, call)


@instance
class nothing_to_do_fails(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        q.amax()
        return super().forward(q, k, v, call)


@instance
class result_in_other_order(Flash):
    """(B, T, H, D) given out as (B, H, T, D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call)
        return out.transpose(1, 2).reshape(out.shape), lse


# The log-sum-exp.


@instance
class lse_of_base_2(Flash):
    def log_sum(self, top: Tensor, total: Tensor, call: Call) -> Tensor:
        return super().log_sum(top, total, call) * 1.4426950408889634

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        *others, lse = super().restored(ctx)
        return (*others, lse / 1.4426950408889634)


@instance
class lse_without_max(Flash):
    def log_sum(self, top: Tensor, total: Tensor, call: Call) -> Tensor:
        return total.log().squeeze(-1)


@instance
class lse_unscaled(Flash):
    def log_sum(self, top: Tensor, total: Tensor, call: Call) -> Tensor:
        return super().log_sum(top / call.scale, total, call)


@instance
class lse_in_16_bits(Flash):
    def log_sum(self, top: Tensor, total: Tensor, call: Call) -> Tensor:
        return super().log_sum(top, total, call).bfloat16().float()


@instance
class lse_finite_where_nothing_seen(Flash):
    def log_sum(self, top: Tensor, total: Tensor, call: Call) -> Tensor:
        return super().log_sum(top, total, call).clamp(min=-1e30)


@instance
class lse_of_inputs_dtype(Flash):
    def __call__(self, *args: Any, **options: Any) -> Any:
        answer = super().__call__(*args, **options)
        return (answer[0], answer[1].to(args[0].dtype)) if isinstance(answer, tuple) else answer


@instance
class lse_with_one_more_dim(Flash):
    def __call__(self, *args: Any, **options: Any) -> Any:
        answer = super().__call__(*args, **options)
        return (answer[0], answer[1][..., None]) if isinstance(answer, tuple) else answer


@instance
class lse_gradient_dropped(Flash):
    def shift(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        return super().shift(dout, out, torch.zeros_like(dlse))


@instance
class lse_gradient_negated(Flash):
    def shift(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        return super().shift(dout, out, -dlse)


@instance
class lse_gradient_of_dense_memory(Flash):
    def shift(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        return super().shift(dout, out, as_if_dense(dlse))


@instance
class lse_detached(Flash):
    def __call__(self, *args: Any, **options: Any) -> Any:
        answer = super().__call__(*args, **options)
        return (answer[0], answer[1].detach()) if isinstance(answer, tuple) else answer


# Gradients.


@instance
class delta_forgotten(Flash):
    def shift(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        return -dlse[..., None]


@instance
class delta_in_16_bits(_KnowsDtype):
    def shift(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        return narrow(super().shift(dout, out, dlse), self.dtype)


@instance
class delta_of_first_batch(Flash):
    def shift(self, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
        shift = super().shift(dout, out, dlse)
        return shift[:1].expand_as(shift)


class _Backward(Flash):
    """Wrong in what a gradient is made into."""

    def backward(self, *tensors: Any) -> tuple[Tensor | None, ...]:
        dq, dk, dv = super().backward(*tensors)
        return self.instead(dq, dk, dv, tensors[-1])

    def instead(
        self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, call: Call
    ) -> tuple[Tensor | None, ...]:
        raise NotImplementedError


@instance
class dk_scaled_twice(_Backward):
    def instead(self, dq: Any, dk: Any, dv: Any, call: Call) -> tuple[Tensor | None, ...]:
        return dq, dk * call.scale, dv


@instance
class dq_not_scaled(_Backward):
    def instead(self, dq: Any, dk: Any, dv: Any, call: Call) -> tuple[Tensor | None, ...]:
        return (dq / call.scale if call.scale else dq), dk, dv


@instance
class dv_missing(_Backward):
    def instead(self, dq: Any, dk: Any, dv: Any, call: Call) -> tuple[Tensor | None, ...]:
        return dq, dk, None


@instance
class dk_and_dv_swapped(_Backward):
    def instead(self, dq: Any, dk: Any, dv: Any, call: Call) -> tuple[Tensor | None, ...]:
        return dq, dv, dk


class _BackwardSeesOtherwise(Flash):
    def seen_as(self, call: Call) -> Call:
        raise NotImplementedError

    def backward(self, *tensors: Any) -> tuple[Tensor | None, ...]:
        return super().backward(*tensors[:-1], self.seen_as(tensors[-1]))


@instance
class backward_not_causal(_BackwardSeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return _but(call, causal=False)


@instance
class backward_without_window(_BackwardSeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return _but(call, window=None)


@instance
class backward_without_documents(_BackwardSeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return _but(call, doc_ids=None)


@instance
class backward_without_query_offset(_BackwardSeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return _at_the_end(call)


@instance
class backward_without_query_documents(_BackwardSeesOtherwise):
    def seen_as(self, call: Call) -> Call:
        return _of_their_positions(call)


@instance
class backward_of_default_scale(Flash):
    def backward(self, *tensors: Any) -> tuple[Tensor | None, ...]:
        scale = tensors[0].shape[-1] ** -0.5
        return super().backward(*tensors[:-1], _but(tensors[-1], scale=scale))


@instance
class backward_drops_tail_tile(Flash):
    tile = 16

    def backward(self, *tensors: Any) -> tuple[Tensor | None, ...]:
        return super().backward(
            *tensors[:-1], _but(tensors[-1], S=max(16, tensors[-1].S // 16 * 16))
        )


@instance
class dv_not_causal(Flash):
    def backward(self, *tensors: Any) -> tuple[Tensor | None, ...]:
        dq, dk, _ = super().backward(*tensors)
        return dq, dk, super().backward(*tensors[:-1], _but(tensors[-1], causal=False))[2]


@instance
class dlogits_in_fp8(Flash):
    def dlogits(self, p: Tensor, dp: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return _fp8(p * (dp - shift), dtype, torch.float8_e5m2)


@instance
class dp_in_16_bits(Flash):
    """What tier B may do, claimed as tier A."""

    def dlogits(self, p: Tensor, dp: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return super().dlogits(p, narrow(dp, dtype), shift, dtype)


@instance
class gradients_summed_in_16_bits(_KnowsDtype):
    tile = 16

    def collect(self, sums: Tensor, at: slice, part: Tensor) -> None:
        sums[:, :, at] = narrow(sums[:, :, at] + part, self.dtype)


@instance
class tile_overwrites_gradient(Flash):
    def collect(self, sums: Tensor, at: slice, part: Tensor) -> None:
        sums[:, :, at] = part


@instance
class group_summed_in_16_bits(Flash):
    def ungroup(self, dheads: Tensor, K: int, dtype: torch.dtype) -> Tensor:
        B, H, S, D = dheads.shape
        total = torch.zeros(B, K, S, D, dtype=dtype)
        for heads in dheads.view(B, K, H // K, S, D).unbind(2):
            total += heads.to(dtype)
        return total


@instance
class gradient_of_last_head_of_group(Flash):
    def ungroup(self, dheads: Tensor, K: int, dtype: torch.dtype) -> Tensor:
        return dheads[:, dheads.shape[1] // K - 1 :: dheads.shape[1] // K].to(dtype)


@instance
class group_averaged(Flash):
    def ungroup(self, dheads: Tensor, K: int, dtype: torch.dtype) -> Tensor:
        return super().ungroup(dheads * (K / dheads.shape[1]), K, dtype)


@instance
class nan_gradient_where_nothing_seen(Flash):
    def again(self, q: Tensor, k: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        logits = super().again(q, k, rows, columns, call)
        blind = (logits == -torch.inf).all(-1, keepdim=True) & (columns.stop == call.S)
        return logits.masked_fill(blind, torch.nan)


@instance
class gradient_where_nothing_seen(Flash):
    def again(self, q: Tensor, k: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        logits = super().again(q, k, rows, columns, call)
        blind = torch.isneginf(logits).all(-1, keepdim=True)
        return logits.masked_fill(blind, LOWEST)


@instance
class dense_upstream_assumed(Flash):
    def upstream(self, dout: Tensor) -> Tensor:
        return super().upstream(as_if_dense(dout))


@instance
class dense_upstream_rows_assumed(Flash):
    def upstream(self, dout: Tensor) -> Tensor:
        return super().upstream(as_if_rows_dense(dout))


@instance
class upstream_assumed_constant(Flash):
    def upstream(self, dout: Tensor) -> Tensor:
        return super().upstream(dout[..., :1].expand_as(dout))


@instance
class upstream_changed(Flash):
    def upstream(self, dout: Tensor) -> Tensor:
        dout.mul_(1.0)
        return super().upstream(dout)


@instance
class input_scaled_in_place(Flash):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        q.mul_(call.scale)
        return super().forward(q, k, v, _but(call, scale=1.0))


@instance
class input_rewritten_unseen(Flash):
    """By way of `.data`, so that no version counter moves, and put back but for rounding."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        q.data.mul_(1.1)
        answer = super().forward(q, k, v, call)
        q.data.div_(1.1)
        return answer


@instance
class output_is_a_view_of_v(Flash):
    """For one key, whose weight is 1."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if k.shape[2] == 1 and q.shape[:3] == v.shape[:3] and not options.get("return_lse"):
            return v.view_as(v)
        return super().__call__(q, k, v, **options)


@instance
class looks_at_q_alone(Flash):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if q.requires_grad:
            return super().__call__(q, k, v, **options)
        return super().__call__(q, k.detach(), v.detach(), **options)


@instance
class gradients_only_if_all_are_wanted(Flash):
    def differentiate(self, ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        if all(ctx.needs_input_grad[:3]):
            return super().differentiate(ctx, dout, dlse)
        return None, None, None


@instance
class dk_only_if_dq_is_wanted(Flash):
    def differentiate(self, ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = super().differentiate(ctx, dout, dlse)
        return dq, (dk if ctx.needs_input_grad[0] else torch.zeros_like(dk)), dv


class _Constants(torch.autograd.Function):
    """Its backward can be differentiated, but takes some of what it was made of for constant."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, constant: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = _right.forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.constant = call, constant
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        first = ctx.constant
        kept = (*kept[:first], *(x.detach() for x in kept[first:]))
        return (*_right.backward(*kept, dout, dlse, ctx.call), None, None)


class _SecondDerivative(Flash):
    constant = 0  # the first of q, k, v, out, lse that is taken for constant

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **asked: Any
    ) -> Any:
        answer = _Constants.apply(q, k, v, self.asked(q, k, **asked), self.constant)
        return answer if return_lse else answer[0]


@instance
class second_derivative_of_constants(_SecondDerivative):
    constant = 0


@instance
class second_derivative_of_constant_results(_SecondDerivative):
    constant = 3


# State.


@instance
class gradient_buffer_kept(Flash):
    """dq is summed into a buffer per shape that is cleared once."""

    def __init__(self) -> None:
        self.buffers: dict[torch.Size, Tensor] = {}

    def zeros(self, like: Tensor) -> Tensor:
        return self.buffers.setdefault(like.shape, torch.zeros(like.shape))


@instance
class output_buffer_kept(Flash):
    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self.buffers.setdefault((shape, dtype), torch.empty(shape, dtype=dtype)).detach()


class _Remembers(Flash):
    """Answers from memory where it believes to know the call."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[Tensor, Tensor]] = {}

    def key(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        key = self.key(q, k, v, call)
        if key not in self.known:
            self.known[key] = super().forward(q, k, v, call)
        out, lse = self.known[key]
        return out.clone(), lse.clone()


@instance
class remembers_by_shape(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        return q.shape, k.shape, q.dtype, call.causal, call.window, call.scale


@instance
class remembers_by_address(_Remembers):
    def key(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        return tuple(x.data_ptr() for x in (q, k, v)), q.shape, k.shape, call.causal, call.window


@instance
class remembers_by_checksum(_Remembers):
    """Of the sums of the inputs: another order of the same values is taken for the same call."""

    def key(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        sums = tuple(float(x.double().sum()) for x in (q, k, v))
        return sums, q.shape, k.shape, call.causal, call.window, call.scale


@instance
class mask_remembered_by_shape(Flash):
    """The mask of the first documents of a shape serves all."""

    def __init__(self) -> None:
        self.masks: dict[Any, Tensor] = {}

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        B = None if call.doc_ids is None else len(call.doc_ids)
        asked = (call.causal, call.window, call.first, call.query_doc_ids is None)
        key = (B, call.T, call.S, *asked, rows.start, columns.start)
        if key not in self.masks:
            self.masks[key] = super().sees(rows, columns, call)
        return self.masks[key]


@instance
class scratch_too_small(Flash):
    """A scratch buffer of the first call's size: a longer call reads what it did not write."""

    def __init__(self) -> None:
        self.length = 0

    def key_tiles(self, rows: slice, call: Call) -> Iterator[slice]:
        self.length = self.length or call.S
        return self.tiles(min(call.S, self.length))


class _Counts(Flash):
    def __init__(self) -> None:
        self.calls = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        self.calls += 1
        out, lse = super().forward(q, k, v, call)
        return out * self.factor(), lse

    def factor(self) -> float:
        raise NotImplementedError


@instance
class right_ten_times(_Counts):
    def factor(self) -> float:
        return 1.0 if self.calls <= 10 else 0.0


@instance
class right_but_each_seventh_time(_Counts):
    """A race that is lost now and then."""

    def factor(self) -> float:
        return 1.0 if self.calls % 7 else 1.05


@instance
class keeps_the_last_call_alone(Flash):
    """What the backward needs lies in the kernel, not in the graph."""

    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        self.last = tensors

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        return self.last


@instance
class backward_uses_up_its_tensors(Flash):
    """The backward writes dlogits where the forward kept the lse."""

    def saved(self, ctx: Any, *tensors: Tensor) -> None:
        ctx.kept = tensors

    def restored(self, ctx: Any) -> tuple[Tensor, ...]:
        kept = ctx.kept
        ctx.kept = (*kept[:4], torch.zeros_like(kept[4]))
        return kept


@instance
class results_of_any_order(Flash):
    """Tiles are added up in an order that no seed decides, as by atomics."""

    tile = 8

    def tiles(self, length: int) -> Iterator[slice]:
        order = list(super().tiles(length))
        random.Random(os.urandom(8)).shuffle(order)
        return iter(order)


# What surrounds the call.


def _after(meddle: Callable[[], Any]) -> Callable[..., Any]:
    """The right kernel, and then something that is not its business."""

    def kernel(*args: Any, **options: Any) -> Any:
        answer = _right(*args, **options)
        meddle()
        return answer

    return kernel


random_numbers_drawn = _after(lambda: torch.rand(1))
python_random_seeded = _after(lambda: random.seed(0))
generator_seeded = _after(lambda: torch.manual_seed(0))
default_dtype_changed = _after(lambda: torch.set_default_dtype(torch.bfloat16))
threads_changed = _after(lambda: torch.set_num_threads(torch.get_num_threads() + 1))
grad_mode_left_off = _after(lambda: torch.set_grad_enabled(False))
matmul_precision_changed = _after(lambda: torch.set_float32_matmul_precision("medium"))
deterministic_switched_on = _after(lambda: torch.use_deterministic_algorithms(True))
autocast_left_on = _after(lambda: torch.set_autocast_enabled("cpu", True))
flush_denormal_set = _after(lambda: torch.set_flush_denormal(True))
tf32_switched_on = _after(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True))
environment_changed = _after(lambda: os.environ.update(PICOTRON_MUTANT="1"))
comparison_patched = _after(lambda: setattr(torch, "equal", lambda a, b: True))


@instance
class tail_never_written(Flash):
    """Rows beyond the last whole tile stay what the allocator gave."""

    tile = 16

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        right, lse = super().forward(q, k, v, call)
        out = torch.empty_like(right)
        whole = call.T // 16 * 16 if call.T > 16 else call.T
        out[:, :, :whole] = right[:, :, :whole]
        return out, lse


@instance
class blind_rows_never_written(Flash):
    """Where a query sees nothing, `out` stays as allocated: zeros, on a good day."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        right, lse = super().forward(q, k, v, call)
        out = torch.empty_like(right)
        seeing = (lse > -torch.inf)[..., None].expand_as(right)
        out[seeing] = right[seeing]
        return out, lse


@instance
class gradient_never_cleared(Flash):
    """dk and dv are summed into memory as allocated: zeros, on a good day."""

    def zeros(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape)


@instance
class nan_swallowed(Flash):
    def hide(self, logits: Tensor, rows: slice, columns: slice, call: Call) -> Tensor:
        return super().hide(logits.nan_to_num(0.0), rows, columns, call)


@instance
class nan_of_v_swallowed(Flash):
    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return super().store(x.nan_to_num(0.0), dtype)


@instance
class infinity_swallowed(Flash):
    def logits(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return super().logits(q, k, call).nan_to_num(posinf=1e4, neginf=-1e4, nan=torch.nan)


@instance
class nan_spread(Flash):
    """One NaN makes all of the answer NaN, sequences and heads that never met it too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, call)
        return (out * torch.nan if out.isnan().any() else out), lse


@instance
class output_wants_gradient_always(Flash):
    def __call__(self, *args: Any, **options: Any) -> Any:
        answer = super().__call__(*args, **options)
        if not torch.is_grad_enabled() and isinstance(answer, Tensor):
            return answer.requires_grad_()
        return answer


@instance
class lesser_without_gradient(Flash):
    """A fast path for inference that nobody asked for."""

    def weights(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        return _fp8(p, dtype) if self.fast else super().weights(p, dtype)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.fast = not (q.requires_grad and torch.is_grad_enabled())
        return super().__call__(q, k, v, **options)


@instance
class reads_version_counters(Flash):
    """Which tensors of inference mode do not have."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        assert q._version >= 0
        return super().__call__(q, k, v, **options)


# Claims.


def quadratic_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    return_lse: bool = False,
    **placed: Any,
) -> Any:
    """All weights at once; claims linear memory, or that it can be compiled."""
    who = {"causal": causal, "window": None, "doc_ids": None, **placed}
    _right.check(q, k, **who)
    groups = q.shape[1] // k.shape[1]
    sees = visible(T=q.shape[2], S=k.shape[2], device=q.device, **who)
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    logits = (q.float() @ keys.mT) * _right.scale(scale, q.shape[3])
    logits = logits.masked_fill(~sees, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~sees, 0)
    out = (weights @ values).to(q.dtype)
    return (out, logits.logsumexp(-1)) if return_lse else out


@instance
class quadratic_mask(Flash):
    """The sums go tile by tile, but the mask is made whole."""

    tile = 512

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.mask = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2])
        return super().__call__(q, k, v, **options)


class _WholeMask(Flash):
    """The mask is made whole for some calls alone."""

    tile = 256

    def whole(self, **options: Any) -> bool:
        raise NotImplementedError

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        if self.whole(**options):
            self.mask = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2])
        return super().__call__(q, k, v, **options)


@instance
class quadratic_for_an_offset(_WholeMask):
    def whole(self, **options: Any) -> bool:
        return options.get("offset") is not None


@instance
class quadratic_for_query_documents(_WholeMask):
    def whole(self, **options: Any) -> bool:
        return options.get("query_doc_ids") is not None


@instance
class quadratic_backward(Flash):
    """Linear in the forward; the backward makes all dlogits at once."""

    tile = 512

    def differentiate(self, ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        scratch = dout.new_zeros(*dout.shape[:3], ctx.call.S)
        dq, dk, dv = super().differentiate(ctx, dout, dlse)
        return dq + scratch[..., :1], dk, dv


def breaks_the_graph(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """A branch on a value; claims that it compiles."""
    if float(q.detach().abs().sum()) < 0:
        return torch.zeros_like(q)
    return quadratic_memory(q, k, v, **options)


def prints_while_compiled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Python that cannot be traced; claims that it compiles."""
    os.getpid()
    torch._dynamo.graph_break()
    return quadratic_memory(q, k, v, **options)


def reads_memory_of_fake_tensors(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """The bytes of q by way of numpy, which a fake tensor does not have."""
    assert q.detach().float().numpy().ndim == 4
    return quadratic_memory(q, k, v, **options)


def wrong_when_compiled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Another formula under torch.compile than without it."""
    if torch.compiler.is_compiling():
        q = q * 1.01
    return quadratic_memory(q, k, v, **options)


def falls_back_to_the_reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """The kernel of another backend, in its own name, where its own cannot."""
    from picotron_backends.naive_math.attention import attention

    return attention(q, k, v, **options)


def falls_back_for_odd_widths(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Only where D is no multiple of eight."""
    if q.shape[-1] % 8:
        from picotron_backends.mem_efficient.attention import attention

        return attention(q, k, v, **options)
    return _right(q, k, v, **options)


def never_launches(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Claims to launch `acme::flash_fwd`, and calls plain torch."""
    return _right(q, k, v, **options)


def launches_now_and_then(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Claims torch's fused kernel, and takes it only for even head dims."""
    plain = not (options.get("window") or options.get("return_lse") or options.get("scale"))
    plain = plain and options.get("doc_ids") is None and options.get("offset") is None
    plain = plain and q.shape[2] == k.shape[2]
    if plain and q.shape[-1] % 16 == 0:
        return scaled_dot_product_attention(q, k, v, is_causal=options["causal"], enable_gqa=True)
    return _right(q, k, v, **options)


@instance
class ignores_unclaimed_window(Flash):
    """Its `supports` says no to a window; called all the same, it computes something else."""

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        return super().sees(rows, columns, _but(call, window=None))


@instance
class ignores_unclaimed_documents(Flash):
    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        return super().sees(rows, columns, _but(call, doc_ids=None))


@instance
class ignores_unclaimed_query_offset(Flash):
    def first(self, offset: int | None, T: int, S: int) -> int:
        return S - T


@instance
class ignores_unclaimed_query_documents(Flash):
    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        return super().sees(rows, columns, _of_their_positions(call))


@instance
class misaligned_unclaimed_lengths(Flash):
    """Its `supports` says no to T != S; called all the same, it aligns top-left."""

    def position(self, rows: slice, call: Call) -> Tensor:
        return torch.arange(rows.start, rows.stop)


@instance
class forgets_unclaimed_lse(Flash):
    """Its `supports` says no to the lse; asked for it, it returns zeros."""

    def __call__(self, *args: Any, return_lse: bool = False, **options: Any) -> Any:
        out = super().__call__(*args, **options)
        return (out, out.detach().float().sum(-1) * 0) if return_lse else out


@instance
class detaches_unclaimed_training(Flash):
    """Its `supports` says no to training; called all the same, it gives out no gradient."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return super().__call__(q.detach(), k.detach(), v.detach(), **options)


@instance
class arguments_unchecked(Flash):
    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        pass


@instance
class arguments_asserted(Flash):
    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        try:
            super().check(q, k, **asked)
        except ValueError as error:
            raise AssertionError(str(error)) from None


@instance
class window_unchecked(Flash):
    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        super().check(q, k, **(asked | {"window": None}))


@instance
class documents_unchecked(Flash):
    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        super().check(q, k, **(asked | {"doc_ids": None}))


@instance
class query_documents_unchecked(Flash):
    """Without doc_ids they are ignored, and one row of them serves all."""

    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        if asked["query_doc_ids"] is not None:
            asked |= {"query_doc_ids": None, "doc_ids": None}
        super().check(q, k, **asked)


@instance
class positions_of_documents_unchecked(Flash):
    """A query that stands at no key has the document of the nearest."""

    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        super().check(q, k, **(asked | {"offset": 0}))

    def sees(self, rows: slice, columns: slice, call: Call) -> Tensor:
        near = _of_their_positions(call) if call.query_doc_ids is None else call
        return super().sees(rows, columns, near)


@instance
class heads_unchecked(Flash):
    """Heads that cannot be shared evenly: the last ones read the last key/value head."""

    def check(self, q: Tensor, k: Tensor, **asked: Any) -> None:
        if q.shape[1] % k.shape[1] == 0:
            super().check(q, k, **asked)

    def kv_head(self, h: Tensor, H: int, K: int) -> Tensor:
        return super().kv_head(h, H, K).clamp(max=K - 1)


right = _right  # for those that are wrong in what they declare alone


@instance
class upstream_nan_dropped(Flash):
    def upstream(self, dout: Tensor) -> Tensor:
        return super().upstream(dout).nan_to_num(0, 0, 0)


@instance
class upstream_clamped(Flash):
    def upstream(self, dout: Tensor) -> Tensor:
        return super().upstream(dout).clamp(-100, 100)


@instance
class wide_heads_ignore_the_window(Flash):
    D = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        self.D = q.shape[-1]
        return super().forward(q, k, v, call)

    def sees(self, rows: Any, columns: Any, call: Call) -> Tensor:
        return super().sees(rows, columns, _but(call, window=None) if self.D >= 128 else call)


@instance
class later_batches_take_documents_of_the_fourth(Flash):
    def sees(self, rows: Any, columns: Any, call: Call) -> Tensor:
        if call.doc_ids is not None and len(call.doc_ids) > 3:
            ids = call.doc_ids.clone()
            ids[3:] = ids[3]
            call = _but(call, doc_ids=ids)
        return super().sees(rows, columns, call)


@instance
class returned_lse_wrong_in_decoding(Flash):
    def log_sum(self, top: Tensor, total: Tensor, call: Call) -> Tensor:
        right = super().log_sum(top, total, call)
        return right + 0.01 if call.T == 1 and not torch.is_grad_enabled() else right


@instance
class lse_gradient_dropped_under_a_window(Flash):
    def backward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *saved, dlse, call = rest
        if call.window is not None:
            dlse = torch.zeros_like(dlse)
        return super().backward(q, k, v, *saved, dlse, call)


@instance
class one_tensor_half_gradient(Flash):
    def backward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = super().backward(q, k, v, *rest)
        return dq, dk, dv * 0 if v.numel() and k.data_ptr() == v.data_ptr() else dv
