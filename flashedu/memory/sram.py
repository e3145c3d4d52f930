"""SRAM: the small fast memory of one program, and the tiles that live in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class SRAMOverflow(MemoryError):
    """A tile did not fit. The message lists what is live and tile sizes that would fit."""


class Tile(NamedTuple):
    rows: int
    cols: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.rows} × {self.cols}, {kib(self.bytes)}"


def kib(n_bytes: float) -> str:
    """Bytes as text: `96.5 KiB`."""
    return f"{n_bytes / 1024:,.1f} KiB"


class SRAM:
    """The on-chip memory of one program, which works on one head of one batch.

    A tile lives until the pass of the tile loop in which it was loaded or held ends, or the
    kernel does. Nothing survives a kernel: what the next one needs goes through HBM.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self.live: dict[str, Tile] = {}
        self.step = 0
        self._scopes: list[list[str]] = []
        self._suggest: Callable[[], str] | None = None
        self._record: Callable[[str, str, int, int], None] | None = None
        self._watch: Callable[[str, Any], None] | None = None

    def tiles(
        self, n: int, block: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[slice]:
        """Walk rows 0 … n in tiles of `block`: yields the slice of rows of each.

        Only tiles that hold a row of `start` … `stop` are visited, each of them whole. Tiles
        loaded or held in a pass of the loop are freed when the pass ends.
        """
        first_tile = start // block * block
        for first in range(first_tile, n if stop is None else min(n, stop), block):
            scope = self._open()
            try:
                yield slice(first, min(first + block, n))
            finally:
                self._close(scope)

    def hold(self, **tiles: Any) -> None:
        """Give tiles that were made on chip, by name, a place in SRAM."""
        for name, x in tiles.items():
            rows, cols = x.shape[-2:]
            self._place(name, Tile(rows, cols, rows * cols * x.dtype.itemsize))
            if self._record is not None:
                self._record("hold", name, 0, rows)
            if self._watch is not None:
                self._watch(name, x)

    def _place(self, name: str, tile: Tile) -> None:
        old = self.live.get(name)
        used = self.used_bytes + tile.bytes - (old.bytes if old else 0)
        if self.capacity_bytes is not None and used > self.capacity_bytes:
            raise SRAMOverflow(self._overflow_message(name, tile))
        if old is None:
            self._scopes[-1].append(name)
        self.live[name] = tile
        self.used_bytes = used
        if used > self.peak_bytes:
            self.peak_bytes = used

    def _open(self) -> list[str]:
        self.step += 1
        self._scopes.append([])
        return self._scopes[-1]

    def _close(self, scope: list[str]) -> None:
        """Free the tiles of `scope` and of those opened in it: an error may have left some open."""
        while any(scope is still_open for still_open in self._scopes):
            for name in self._scopes.pop():
                self.used_bytes -= self.live.pop(name).bytes

    def _overflow_message(self, name: str, tile: Tile) -> str:
        live = "; ".join(f"{other} ({t})" for other, t in self.live.items()) or "nothing"
        message = (
            f"SRAM overflow: {name} ({tile}) does not fit. "
            f"{kib(self.used_bytes)} of {kib(self.capacity_bytes or 0)} are in use. Live: {live}."
        )
        return f"{message} {self._suggest()}" if self._suggest else message


class FreeSRAM(SRAM):
    """SRAM of a run that is not counted: any tile fits, and none is noted."""

    def tiles(
        self, n: int, block: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[slice]:
        first_tile = start // block * block
        for first in range(first_tile, n if stop is None else min(n, stop), block):
            yield slice(first, min(first + block, n))

    def hold(self, **tiles: Any) -> None:
        """Note nothing."""
