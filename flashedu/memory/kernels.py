"""Counting a Triton kernel: its own loads, stores and products, as the interpreter runs them.

The interpreter has one function through which every load goes, one for stores and one for matrix
products. While a kernel is counted, these are wrapped. They are private to Triton, and this file is
all that depends on them; tests/test_kernels.py says so when a release moves them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from flashedu.memory.machine import Machine
from flashedu.memory.problem import Problem


@contextmanager
def counted(machine: Machine, name: str, problem: Problem, **arrays: Any) -> Iterator[None]:
    """One launch, whose traffic counts on `machine`; none of it if `machine` counts nothing.

    `arrays`: all that the kernel reads or writes, by the name it is counted under: tensors
    (B, heads, N), or what `tiles_of` makes of tensors (B, heads, N, D), whose values count as
    `problem.dtype` although float32 may stand in for bfloat16.
    """
    if not machine.counting:
        yield
        return
    regions = [_Region(array, x, problem) for array, x in arrays.items()]
    with machine.kernel(name, problem), _wrapped(_Counter(machine, regions)):
        yield


class _Region:
    """The addresses of one array, and the row that each belongs to."""

    def __init__(self, name: str, x: Any, problem: Problem) -> None:
        described = not hasattr(x, "itemsize")
        tensor = (x[0] if isinstance(x, tuple) else x.base) if described else x
        self.name = name
        self.item_bytes = problem.item_bytes if described else tensor.itemsize
        self._start, self._width = tensor.data_ptr(), tensor.itemsize
        # largest stride first: dividing by one after another takes an address apart
        dims = zip(tensor.stride(), tensor.shape, range(tensor.ndim), strict=True)
        self._dims = sorted(dims, reverse=True)

    def row(self, address: int) -> int | None:
        """None for an address that is not in the array, but before, behind or between its rows."""
        offset, found = (address - self._start) // self._width, 0
        for stride, size, dim in self._dims:
            index, offset = divmod(offset, stride)
            if not 0 <= index < size:
                return None
            if dim == 2:
                found = index
        return found


class _Counter:
    def __init__(self, machine: Machine, regions: list[_Region]) -> None:
        self._machine, self._regions = machine, regions

    def load_or_store(self, op: str, addresses: np.ndarray, mask: np.ndarray) -> None:
        touched = addresses[mask]
        if not touched.size:
            return
        first, last = int(touched.min()), int(touched.max())
        for region in self._regions:
            start, stop = region.row(first), region.row(last)
            if start is not None and stop is not None:
                n_bytes = touched.size * region.item_bytes
                rows = slice(start, stop + 1)
                self._machine.count_kernel(op, region.name, rows, n_bytes, _line())
                return
        raise AssertionError(f"a {op} at an address that no array has: name it in counted()")

    def product(self, a: np.ndarray, b: np.ndarray) -> None:
        self._machine.flops += 2 * a.size * b.shape[-1]

    def grid(self, x: int, y: int, z: int) -> None:
        self._machine.count_programs(x * y * z)

    def program(self) -> None:
        self._machine.next_program()


@contextmanager
def _wrapped(counter: _Counter) -> Iterator[None]:
    from triton.runtime.interpreter import interpreter_builder as builder

    def before(method: str, note: Callable[..., None]) -> Any:
        original = getattr(builder, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            note(*args)
            return original(*args, **kwargs)

        return mock.patch.object(builder, method, wrapper)

    with (
        before("create_masked_load", lambda ptrs, mask, *_: counter.load_or_store(
            "load", ptrs.data, mask.data)),
        before("create_masked_store", lambda ptrs, value, mask, *_: counter.load_or_store(
            "store", ptrs.data, mask.data)),
        before("create_dot", lambda a, b, *_: counter.product(a.data, b.data)),
        before("set_grid_dim", counter.grid),
        before("set_grid_idx", lambda *_: counter.program()),
    ):  # fmt: skip
        yield


def _line() -> int:
    """Of the kernel's source: the innermost frame that is neither here nor in Triton."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or "triton" in Path(frame.f_code.co_filename).parts
    ):
        frame = frame.f_back
    return frame.f_lineno
