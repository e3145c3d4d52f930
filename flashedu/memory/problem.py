"""The size of one attention call: all that traffic, FLOPs and memory depend on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Problem:
    """Sizes, dtype, mask and tiles of one attention call.

    `B` batches, `H` query heads, `H_kv` key and value heads (each shared by `H / H_kv` query
    heads), `Nq` queries, `Nk` keys, head size `D`. `dtype` is what HBM holds. `block_q` queries
    and `block_k` keys make a tile; a stage for decoding cuts the keys into `splits` parts. `Nk`
    and `H_kv` default to `Nq` and `H`.
    """

    Nq: int
    D: int
    B: int = 1
    H: int = 1
    Nk: int = -1
    H_kv: int = -1
    dtype: str = "float16"
    causal: bool = False
    block_q: int = 128
    block_k: int = 64
    splits: int = 1

    def __post_init__(self) -> None:
        if self.Nk == -1:
            object.__setattr__(self, "Nk", self.Nq)
        if self.H_kv == -1:
            object.__setattr__(self, "H_kv", self.H)
        for name in ("B", "H", "H_kv", "Nq", "Nk", "D", "block_q", "block_k", "splits"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
        for name in ("B", "Nq", "Nk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("H", "H_kv", "D", "block_q", "block_k", "splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.H % self.H_kv:
            raise ValueError(f"H must be a multiple of H_kv, got H={self.H}, H_kv={self.H_kv}")
        if self.dtype not in ITEM_BYTES:
            known = ", ".join(ITEM_BYTES)
            raise ValueError(f"dtype must be one of {known}, got {self.dtype!r}")

    def replace(self, **changes: object) -> Problem:
        """The same problem with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def item_bytes(self) -> int:
        """Bytes of one value in HBM."""
        return ITEM_BYTES[self.dtype]

    @property
    def acc_bytes(self) -> int:
        """Bytes of one value in the arithmetic: float32, or float64 for float64 inputs."""
        return max(4, self.item_bytes)

    @property
    def group(self) -> int:
        """Query heads that share one key and value head: 1 for multi-head attention."""
        return self.H // self.H_kv
