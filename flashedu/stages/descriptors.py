"""Tensors as kernels see them: arrays (B, heads, N, D) that are read and written in tiles.

A descriptor holds an array's address, shape and strides, and the shape of a tile. A kernel names a
tile by its first row, as in `Q.load([b, h, i, 0])`. What lies beyond the array reads as 0 and is
not written, so any N and D will do.
"""

from __future__ import annotations

from typing import Any

import torch

from flashedu.memory import hbm
from flashedu.stages import triton_mode

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


def tiles_of(x: torch.Tensor, block: int) -> Any:
    """x, (B, heads, N, D), as a kernel takes it: a descriptor, in tiles of `block` rows.

    The hardware wants rows that are contiguous and strides of whole 16 bytes; other arrays are
    copied. From Hopper on, a unit of its own (the TMA) moves tiles by a descriptor that the host
    has made. On other cards the kernel makes it from its parts, and the compiler sees the strides.
    """
    if triton_mode.INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()  # the interpreter has no bfloat16 arithmetic
    x = addressable(x)
    strides = x.stride()[:3]
    if triton_mode.has_tma(x):
        return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, columns(x.shape[3])])
    return x, *x.shape, *strides


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it that a descriptor can address."""
    *strides, last = x.stride()
    per_16_bytes = 16 // x.itemsize
    strides_fit = all(stride > 0 and stride % per_16_bytes == 0 for stride in strides)
    if last == 1 and strides_fit and x.data_ptr() % 16 == 0:
        return x
    return empty_like(x).copy_(x)


@triton.jit
def in_tiles(X, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """X as a descriptor, in tiles (1, 1, BLOCK, COLUMNS): made here if the host has not."""
    if isinstance(X, tl.tuple):
        x, B, H, N, D, batch, head, row = X
        X = tl.make_tensor_descriptor(
            x, [B, H, N, D], [batch, head, row, 1], [1, 1, BLOCK, COLUMNS]
        )
    return X


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An array of x's shape that a descriptor can address: its rows begin every 16 bytes.

    Heads lie in memory as those of x: in a model, where all heads of a token lie side by side, its
    projections give and take tensors without a copy.
    """
    bfloat16_is_float32 = triton_mode.INTERPRETED and x.dtype == torch.bfloat16
    dtype = torch.float32 if bfloat16_is_float32 else x.dtype
    per_16_bytes, (B, heads, N, D) = 16 // dtype.itemsize, x.shape
    width = -(-D // per_16_bytes) * per_16_bytes
    if x.stride(1) < x.stride(2):
        return hbm.empty((B, N, heads, width), x, dtype).transpose(1, 2)[..., :D]
    return hbm.empty((B, heads, N, width), x, dtype)[..., :D]


def without_padding(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a kernel wrote into `empty_like`, as a result: dense, and of the caller's dtype."""
    x = x.to(dtype)
    is_dense = x.numel() == x.untyped_storage().nbytes() // x.itemsize
    return x if is_dense else x.contiguous()


def columns(D: int) -> int:
    """Columns of a tile: the matrix units want a power of two, 16 or more."""
    return max(16, 1 << (D - 1).bit_length())
