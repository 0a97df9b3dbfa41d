"""Bytes as people read them."""

from __future__ import annotations


def show_bytes(number: float) -> str:
    """Decimal units, as disks and memory bandwidths are given.

    >>> show_bytes(65_707_008)
    '65.7 MB'
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.3g} {units[0]}"
