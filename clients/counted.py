"""Formats a number with its noun."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """``1 token``, ``2 tokens``; ``thing`` is one whose plural takes an s."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
