"""HBM: the large slow memory. Arrays in it are reached by `load` and `store` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flashedu.memory.machine import Machine

Array = Any  # numpy.ndarray or torch.Tensor

EVERYTHING = slice(None)


def acc_dtype(x: Array) -> Any:
    """The dtype of the arithmetic on `x`: float64 for float64, else float32."""
    if isinstance(x, np.ndarray):
        return np.float64 if x.dtype == np.float64 else np.float32
    import torch

    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty(shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
    """An array of the framework and device of `like`, contents undefined."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    return like.new_empty(shape, dtype=dtype)


class HBMArray:
    """An array (B, heads, N, D) in HBM; a tile of it is some of its N rows, for every head.

    Bytes are those of the array's own dtype: a float16 value counts 2, although `load` hands it
    out as float32, as a GPU does.
    """

    def __init__(self, name: str, data: Array, machine: Machine, shared_by: int = 1) -> None:
        self.name = name
        self.data = data
        self.shared_by = shared_by
        self._machine = machine
        self._is_numpy = isinstance(data, np.ndarray)
        self._acc_dtype = acc_dtype(data)
        batches, heads, self._n, self._d = data.shape
        self._heads = heads * shared_by
        self._row_bytes = self._d * data.dtype.itemsize  # of one head
        self._all_row_bytes = batches * self._heads * self._row_bytes  # of all programs
        self._head_row_bytes = batches * self._row_bytes  # of one head of every batch

    def load(self, rows: slice = EVERYTHING, heads: slice = EVERYTHING) -> Array:
        """Copy a tile to SRAM: (B, heads, rows, D), as float32 (float64 stays)."""
        tile = self.data[:, heads, rows]
        if self.shared_by > 1:  # each query head's program loads its own copy
            repeat = np.repeat if self._is_numpy else type(tile).repeat_interleave
            tile = repeat(tile, self.shared_by, 1)
        if self._machine.counting:
            self._machine.count("load", self, rows, self._bytes_of(rows, heads))
        if self._is_numpy:
            return tile.astype(self._acc_dtype)
        return tile.to(self._acc_dtype, copy=True)

    def store(self, rows: slice, tile: Array, heads: slice = EVERYTHING) -> None:
        """Copy a tile (B, heads, rows, D) from SRAM, rounded to the array's dtype."""
        self.data[:, heads, rows] = tile
        if self._machine.counting:
            self._machine.count("store", self, rows, self._bytes_of(rows, heads))

    def _bytes_of(self, rows: slice, heads: slice) -> int:
        n_rows = self._n if rows.start is None else rows.stop - rows.start
        if heads is EVERYTHING:
            return n_rows * self._all_row_bytes
        return n_rows * self._head_row_bytes * len(range(self._heads)[heads])


class HBM:
    """Makes arrays in the HBM of one machine, and knows how many bytes were asked of it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.extra_bytes = 0

    def array(self, name: str, data: Array, *, shared_by: int = 1) -> HBMArray:
        """An input that is in HBM already.

        `shared_by` query heads share a head of it: the programs of all of them load it.
        """
        return HBMArray(name, data, self._machine, shared_by)

    def output(self, name: str, shape: tuple[int, ...], *, like: Array) -> HBMArray:
        """A result, with the dtype, framework and device of `like`."""
        return HBMArray(name, empty(shape, like, like.dtype), self._machine)

    def scratch(
        self, name: str, shape: tuple[int, ...], *, like: Array, dtype: Any = None
    ) -> HBMArray:
        """Extra memory: what the algorithm needs beside its inputs and results."""
        x = self.array(name, empty(shape, like, like.dtype if dtype is None else dtype))
        if self._machine.counting:
            self.extra_bytes += x._n * x._all_row_bytes
        return x
