"""Cases of attention whose queries stand anywhere: a block of a ring, or a chunk of a cache.

As in `attention.py`, each row is what differs from B=2, H=4, K=2, T=S=17, D=16, causal. Cases of
equal length are the more for it: there a kernel is tempted to take the queries' positions, and
documents, for the keys'.
"""

from __future__ import annotations

import sys
from typing import Any

QUICK_BLOCKS: dict[str, dict[str, Any]] = {
    "offset": {"offset": 4},
    "offset-before": {"offset": -5},  # rows that see nothing
    "offset-beyond": {"offset": 40},  # each sees all
    "offset-nothing": {"offset": -20},
    "offset-full": {"offset": -5, "causal": False},  # changes nothing
    "offset-chunk": {"T": 6, "offset": 5},
    "offset-0": {"T": 6, "offset": 0},  # not the same as none
    "offset-decode": {"T": 1, "S": 37, "offset": 20},
    "offset-window": {"offset": 5, "window": 4},
    "offset-window-beyond": {"offset": 12, "window": 9},  # the later ones see nothing
    "offset-window-passed": {"offset": 60, "window": 9},
    "offset-window-max": {"offset": -5, "window": sys.maxsize},
    "offset-docs": {"T": 6, "offset": 5, "docs": "packed"},
    "query-docs": {"docs": "packed", "query_docs": True, "B": 3},
    "query-docs-mixed": {"docs": "mixed", "query_docs": True},
    "query-docs-int32": {"docs": "int32", "query_docs": True},
    "query-docs-full": {"docs": "packed", "query_docs": True, "causal": False},
    "query-docs-strided": {
        **{"docs": "packed", "query_docs": True},
        "layouts": {"doc_ids": "sliced", "query_doc_ids": "strided"},
    },
    "offset-query-docs": {"T": 9, "offset": 10, "docs": "packed", "query_docs": True},
    "fewer-keys-query-docs": {
        **{"T": 23, "S": 5, "offset": -4},
        **{"docs": "mixed", "query_docs": True},
    },
    "offset-window-query-docs": {"offset": 6, "window": 9, "docs": "packed", "query_docs": True},
    "lse-offset": {"lse": "lse", "offset": -5},
    "lse-backward-query-docs-full": {
        **{"lse": "lse_backward", "causal": False},
        **{"docs": "packed", "query_docs": True},
    },
    "lse-backward-ring": {
        **{"lse": "lse_backward", "offset": 10, "window": 12},
        **{"docs": "packed", "query_docs": True},
    },
    # The diagonal, the window's end and the documents cross tiles of 128 queries and 256 keys.
    "offset-tiles": {"T": 40, "S": 280, "offset": 230, "B": 1, "H": 2, "K": 1, "D": 8},
    "offset-window-tiles": {"S": 140, "offset": 60, "window": 90, "B": 1, "H": 2, "K": 1},
    "query-docs-tiles": {
        **{"T": 140, "S": 270, "offset": 125, "B": 1, "H": 2, "K": 1, "D": 8},
        **{"docs": "packed", "query_docs": True},
    },
}
FULL_BLOCKS: dict[str, dict[str, Any]] = {
    "offset-mha": {"K": 4, "offset": 3},
    "offset-mqa-beyond": {"H": 8, "K": 1, "S": 33, "offset": 20},
    "offset-before-tiles": {"S": 200, "offset": -130, "B": 1, "H": 2, "K": 1},
    "offset-tiles-long": {"T": 300, "S": 520, "offset": 190, "B": 1, "H": 1, "K": 1, "D": 8},
    "offset-decode-long": {"T": 1, "S": 700, "offset": 511},
    "offset-window-long": {"S": 270, "offset": 130, "window": 257, "B": 1, "H": 2, "K": 1},
    "offset-window-1": {"offset": 3, "window": 1},
    "offset-window-far": {"offset": 2**25, "window": 2**25 - 5},  # float32 cannot count so far
    "wide-offset-window": {"D": 128, "S": 100, "offset": 40, "window": 70, "B": 1, "H": 2, "K": 1},
    "offset-docs-window": {"T": 40, "S": 90, "offset": 30, "window": 9, "docs": "packed"},
    "query-docs-each-its-own": {"docs": "alone", "query_docs": True},
    "query-docs-many": {"docs": "packed", "query_docs": True, "B": 6, "S": 12},
    "query-docs-decode": {"T": 1, "S": 37, "docs": "packed", "query_docs": True},
    "query-docs-long": {"S": 270, "docs": "packed", "query_docs": True, "B": 1, "H": 2, "K": 1},
    "query-docs-before": {"offset": -9, "docs": "mixed", "query_docs": True},
    "wide-query-docs": {"D": 128, "S": 70, "docs": "packed", "query_docs": True, "B": 5, "H": 2},
    "lse-offset-window-beyond": {"lse": "lse", "offset": 12, "window": 9},
    "lse-backward-offset": {"lse": "lse_backward", "offset": -5},
    "lse-backward-offset-beyond": {"lse": "lse_backward", "offset": 40},
    "lse-backward-query-docs": {"lse": "lse_backward", "docs": "packed", "query_docs": True},
    "lse-backward-ring-long": {
        **{"lse": "lse_backward", "S": 140, "offset": 100, "window": 150, "B": 1, "H": 2, "K": 1},
        **{"docs": "packed", "query_docs": True},
    },
}
