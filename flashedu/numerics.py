"""Floating-point formats, and float32 values rounded to one of them: what TF32 hardware sees."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """A sign, an exponent and a mantissa: ±1.mantissa · 2^exponent."""

    name: str
    exponent_bits: int
    mantissa_bits: int

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def eps(self) -> float:
        """The step from 1 to the next number."""
        return 2.0**-self.mantissa_bits

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return (2 - self.eps) * 2.0 ** (2 ** (self.exponent_bits - 1) - 1)

    @property
    def all_integers_to(self) -> int:
        """Every integer up to here is a number of the format; the next one is not."""
        return 2 ** (self.mantissa_bits + 1)


FORMATS = (
    Format("float32", 8, 23),
    Format("tf32", 8, 10),
    Format("float16", 5, 10),
    Format("bfloat16", 8, 7),
)


def round_to(x: torch.Tensor, name: str) -> torch.Tensor:
    """x rounded to the nearest number of a format, ties to even; float32, as x is.

    name: one of FORMATS. Infinities and NaN stay; what is too large becomes infinite.
    Raises TypeError if x is not float32, and ValueError for another name.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}; x.float() would do")
    known = {form.name: form for form in FORMATS}
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
    if name == "float32":
        return x.clone()
    if name == "float16":  # its exponent is shorter too
        return x.half().float()
    return round_mantissa(x, known[name].mantissa_bits)


def round_mantissa(x: torch.Tensor, kept: int) -> torch.Tensor:
    """float32 with `kept` (0 to 22) of its 23 mantissa bits; nearest, ties to even."""
    drop = 23 - kept
    bits = x.view(torch.int32)  # the same 32 bits, as an integer
    last = (bits >> drop) & 1  # of the bits that are kept
    almost_half = (1 << drop - 1) - 1
    bits = bits + almost_half + last  # carries above half, and at half if last is 1
    rounded = (bits >> drop << drop).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


__all__ = ["FORMATS", "Format", "round_mantissa", "round_to"]
