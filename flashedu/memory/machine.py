"""The two-level machine: every byte between HBM and SRAM is counted as the code moves it."""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from flashedu.memory import cost
from flashedu.memory.cost import Cost
from flashedu.memory.hbm import HBM, HBMArray
from flashedu.memory.problem import Problem
from flashedu.memory.sram import SRAM, FreeSRAM
from flashedu.memory.trace import Event


class Machine:
    """A GPU reduced to its two memories.

    Pass one to a stage, as `machine=`, and read the counters afterwards. They add up over calls.

    `sram_bytes`: capacity of the SRAM that one program has; None for no limit.
    `trace`: keep one `Event` for each tile moved or made; False keeps the counters only.
    `watch`: names of tiles, such as "m_i", whose values are kept in `watched`, one list a name,
    each time the stage holds them.
    """

    counting = True

    def __init__(
        self, sram_bytes: int | None = None, *, trace: bool = True, watch: Sequence[str] = ()
    ) -> None:
        if sram_bytes is not None and not isinstance(sram_bytes, int):
            raise TypeError(f"sram_bytes must be an integer, or None, got {sram_bytes!r}")
        if sram_bytes is not None and sram_bytes < 1:
            raise ValueError(f"sram_bytes must be 1 or more, or None, got {sram_bytes}")
        self.hbm = HBM(self)
        self.sram = SRAM(sram_bytes)
        self.flops = 0
        self.trace: list[Event] | None = [] if trace else None
        self.launches: list[str] = []
        self.programs: dict[str, int] = {}  # of the last launch of each Triton kernel
        self._bytes: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._kernel = ""
        self.watched: dict[str, list[np.ndarray]] = {name: [] for name in watch}
        if trace:
            self.sram._record = self._record_hold
        if watch:
            self.sram._watch = self._watch_hold

    # what a stage calls

    @contextmanager
    def kernel(self, name: str, problem: Problem) -> Iterator[None]:
        """One launch. SRAM is empty when it starts, and what it leaves there is lost."""
        self._kernel = name
        self.launches.append(name)
        self.sram._suggest = partial(cost.suggest_tiles, name, problem, self.sram.capacity_bytes)
        scope = self.sram._open()
        try:
            yield
        finally:
            self.sram._close(scope)
            self._kernel = ""

    def matmul(self, a: Any, b: Any) -> Any:
        """`a @ b`, its multiplications and additions counted: 2 · m · n · k a head."""
        batches, heads, m, k = a.shape
        self.flops += 2 * batches * heads * m * k * b.shape[3]
        return a @ b

    def count(self, op: str, array: HBMArray, rows: slice, n_bytes: int) -> None:
        """Note that `rows` of `array` moved; `op` is "load" or "store"."""
        self._bytes[self._kernel, array.name, op] += n_bytes
        start, stop = (0, array._n) if rows.start is None else (rows.start, rows.stop)
        if op == "load":
            n_rows = stop - start
            self.sram._place(array.name, (n_rows, array._d, n_rows * array._row_bytes))
        if self.trace is not None:
            self._append(op, array.name, start, stop, n_bytes)

    # what counts a Triton kernel (memory/kernels.py)

    def count_programs(self, n: int) -> None:
        """Note that a kernel was launched as `n` programs."""
        self.programs[self._kernel] = n

    def next_program(self) -> None:
        """Note that the next program of the kernel starts."""
        self.sram.step += 1

    def count_kernel(self, op: str, tensor: str, rows: slice, n_bytes: int, line: int) -> None:
        """Note that one program of a Triton kernel moved `rows` of `tensor`."""
        self._bytes[self._kernel, tensor, op] += n_bytes
        if self.trace is not None:
            step = self.sram.step
            self.trace.append(
                Event(step, self._kernel, op, tensor, rows.start, rows.stop, n_bytes, 0, line)
            )

    # what a reader calls

    @property
    def hbm_read_bytes(self) -> int:
        """Bytes loaded from HBM."""
        return sum(n for (_, _, op), n in self._bytes.items() if op == "load")

    @property
    def hbm_write_bytes(self) -> int:
        """Bytes stored to HBM."""
        return sum(n for (_, _, op), n in self._bytes.items() if op == "store")

    @property
    def hbm_extra_bytes(self) -> int:
        """Bytes of HBM used beside inputs and results."""
        return self.hbm.extra_bytes

    @property
    def sram_peak_bytes(self) -> int | None:
        """The most that one program held in SRAM at once; None once a Triton kernel has run here,
        as what that keeps on chip is the compiler's choice."""
        return None if self.programs else self.sram.peak_bytes

    @property
    def counted(self) -> Cost:
        """All counters, in the form of `flashedu.memory.cost`, to compare with."""
        return Cost(
            hbm_read_bytes=self.hbm_read_bytes,
            hbm_write_bytes=self.hbm_write_bytes,
            hbm_extra_bytes=self.hbm_extra_bytes,
            sram_peak_bytes=self.sram_peak_bytes,
            flops=self.flops,
        )

    def bytes_by_tensor(self) -> dict[str, tuple[int, int]]:
        """Tensor → (bytes read, bytes written), in order of first use."""
        return self._grouped_by(1)

    def bytes_by_kernel(self) -> dict[str, tuple[int, int]]:
        """Kernel → (bytes read, bytes written), in order of launch."""
        return self._grouped_by(0)

    def _grouped_by(self, part: int) -> dict[str, tuple[int, int]]:
        grouped: dict[str, tuple[int, int]] = {}
        for key, n in self._bytes.items():
            read, written = grouped.get(key[part], (0, 0))
            grouped[key[part]] = (read + n, written) if key[2] == "load" else (read, written + n)
        return grouped

    def _record_hold(self, op: str, name: str, start: int, stop: int) -> None:
        self._append(op, name, start, stop, 0)

    def _watch_hold(self, name: str, tile: Any) -> None:
        if name in self.watched:
            on_host = tile if isinstance(tile, np.ndarray) else tile.cpu().numpy()
            self.watched[name].append(on_host.copy())

    def _append(self, op: str, name: str, start: int, stop: int, n: int) -> None:
        assert self.trace is not None
        sram, line = self.sram, sys._getframe(3).f_lineno  # of who called load, store or hold
        live = tuple(sram.live.items())
        self.trace.append(
            Event(sram.step, self._kernel, op, name, start, stop, n, sram.used_bytes, line, live)
        )


class FreeMachine(Machine):
    """Counts nothing, so that a stage runs as fast as its framework does."""

    counting = False

    def __init__(self) -> None:
        super().__init__(trace=False)
        self.sram = FreeSRAM()
        self.matmul = operator.matmul  # type: ignore[assignment]

    @contextmanager
    def kernel(self, name: str, problem: Problem) -> Iterator[None]:
        yield


UNCOUNTED = FreeMachine()
