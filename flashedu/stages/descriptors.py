"""Tensors as kernels see them: arrays (B, heads, N, D) that are read and written in tiles.

A descriptor holds an array's address, shape and strides, and the shape of a tile. A kernel names a
tile by its first row, as in `Q.load([b, h, i, 0])`. What lies beyond the array reads as 0 and is
not written, so any N and D will do.
"""

from __future__ import annotations

import torch

from flashedu.memory import hbm
from flashedu.stages import triton_mode

from triton.tools.tensor_descriptor import TensorDescriptor


def tiles_of(x: torch.Tensor, block: int) -> TensorDescriptor:
    """A descriptor of x, (B, heads, N, D), in tiles of `block` rows.

    The hardware wants rows that are contiguous and strides of whole 16 bytes; other arrays are
    copied.
    """
    if triton_mode.INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()  # the interpreter has no bfloat16 arithmetic
    *strides, last = x.stride()
    per_16_bytes = 16 // x.itemsize
    strides_fit = all(stride > 0 and stride % per_16_bytes == 0 for stride in strides)
    if not (last == 1 and strides_fit and x.data_ptr() % 16 == 0):
        x = empty_like(x).copy_(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, columns(x.shape[3])])


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An array of x's shape that a descriptor can address: its rows begin every 16 bytes."""
    bfloat16_is_float32 = triton_mode.INTERPRETED and x.dtype == torch.bfloat16
    dtype = torch.float32 if bfloat16_is_float32 else x.dtype
    per_16_bytes, D = 16 // dtype.itemsize, x.shape[3]
    width = -(-D // per_16_bytes) * per_16_bytes
    return hbm.empty((*x.shape[:3], width), x, dtype)[..., :D]


def columns(D: int) -> int:
    """Columns of a tile: the matrix units want a power of two, 16 or more."""
    return max(16, 1 << (D - 1).bit_length())
