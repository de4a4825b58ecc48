"""What a matrix may weigh, and what is said where it weighs more."""

from __future__ import annotations

from functools import partial

from avalanche_curv.core.options import check_count


def check_memory(name: str, needed: int, allowed: int, remedy: str) -> None:
    """Raises MemoryError with both sizes and a remedy if `needed` exceeds `allowed` bytes."""
    if needed > allowed:
        raise MemoryError(
            f"{name} needs {human_bytes(needed)} for its matrix, over its limit of {human_bytes(allowed)}. {remedy}"
        )


check_limit = partial(check_count, hint="It is a number of bytes: 2**30 is a GiB.")
"""A check for `max_bytes`, the limit of a structure."""


def human_bytes(count: float) -> str:
    """A number of bytes in B, KiB, MiB or GiB, with one decimal.

    >>> human_bytes(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
