"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

MIB = 1 << 20
GIB = 1 << 30

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1 << 40,
}
_SHOWN_UNITS = (
    *(("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", 1 << 10)),
    *(("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)),
)
_BYTE_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_byte_size(text: str) -> int:
    """``512MiB``, ``2GB``, ``1.5GiB`` or a plain count, as bytes.

    Raises:
        ValueError: Not a number with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB.
    """
    match = _BYTE_SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else ""
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a byte size such as 512MiB, 2GB or 1048576")
    return (
        int(float(match[1]) * _BYTE_UNITS[unit])
        if "." in match[1]
        else (int(match[1]) * _BYTE_UNITS[unit])
    )


def about_bytes(count: int) -> str:
    """For people: three digits and a binary unit, 707610 → ``691 KiB``."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:.3g} {unit}"


def format_byte_size(count: int) -> str:
    """The shortest exact form, a binary one of two: 268435456 → ``256MiB``, 2·10⁹ → ``2GB``."""
    exact = [
        f"{count // size}{unit}"
        for unit, size in _SHOWN_UNITS
        if count >= size and count % size == 0
    ]
    return min((*exact, str(count)), key=len)
