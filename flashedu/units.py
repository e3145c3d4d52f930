"""Numbers for people: three digits and a unit."""

from __future__ import annotations


def human_bytes(n_bytes: float) -> str:
    """`0`, `512 B`, `16 KiB`, `33.5 MiB`, `1,020 MiB`."""
    if n_bytes < 1024:
        return f"{n_bytes:.0f} B" if n_bytes else "0"
    size, unit = n_bytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{_three_digits(size)} {unit}"


def human_seconds(seconds: float) -> str:
    """`2.03 µs`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if seconds >= size or unit == "ns":
            break
    return f"{_three_digits(seconds / size)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
