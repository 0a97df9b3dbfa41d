"""Who sees whom, asked block by block, so that no (T, S) mask is ever made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMask:
    """The mask of the contract of attention. first: the position of query 0 among the S keys."""

    S: int
    first: int
    causal: bool
    window: int | None
    doc_ids: Tensor | None  # (B, S)
    query_doc_ids: Tensor | None = None  # (B, T)

    def reach(self, rows: slice) -> tuple[int, int]:
        """First and one past the last key that queries `rows` may see, documents aside."""
        start, stop = self._positions(rows)
        first = 0 if self.window is None else max(0, start - self.window + 1)
        return first, min(self.S, stop) if self.causal else self.S

    def hide(self, logits: Tensor, rows: slice, columns: slice) -> None:
        """In place, -inf where a query must not look: logits (B * K, H / K * rows, columns)."""
        hidden = self._hidden(rows, columns, logits.device)
        if hidden is not None and logits.numel():  # nothing has no shape to be viewed in
            batch, count = hidden.shape[0], rows.stop - rows.start
            by_batch = logits.view(batch, -1, count, columns.stop - columns.start)
            by_batch.masked_fill_(hidden, -torch.inf)

    def _hidden(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Bool (1 or B, 1, rows, columns); None where every query sees every key."""
        start, stop = self._positions(rows)
        key = torch.arange(columns.start, columns.stop, device=device)
        position = torch.arange(start, stop, device=device)[:, None]
        hidden = None
        if self.causal and columns.stop - 1 > start:
            hidden = key > position
        if self.window is not None and columns.start <= stop - 1 - self.window:
            behind = position - key >= self.window
            hidden = behind if hidden is None else hidden | behind
        if self.doc_ids is not None:
            if self.query_doc_ids is None:
                own = self.doc_ids[:, start:stop]
            else:
                own = self.query_doc_ids[:, rows]
            other = own[:, :, None] != self.doc_ids[:, None, columns]
            return (other if hidden is None else hidden | other)[:, None]
        return None if hidden is None else hidden[None, None]

    def _positions(self, rows: slice) -> tuple[int, int]:
        return rows.start + self.first, rows.stop + self.first
