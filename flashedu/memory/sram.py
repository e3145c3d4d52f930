"""SRAM: the small fast memory of one program, and the tiles that live in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flashedu.memory.trace import Tile
from flashedu.units import human_bytes


class SRAMOverflow(MemoryError):
    """A tile did not fit. The message lists what is live and tile sizes that would fit."""


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
            _, _, rows, cols = x.shape
            self._place(name, (rows, cols, rows * cols * x.itemsize))
            if self._record is not None:
                self._record("hold", name, 0, rows)
            if self._watch is not None:
                self._watch(name, x)

    def _place(self, name: str, tile: Tile) -> None:
        old = self.live.get(name)
        used = self.used_bytes + tile[2] - (old[2] if old else 0)
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
        scopes = self._scopes
        innermost = scopes[-1] if scopes else None
        if innermost is not scope and not any(scope is still_open for still_open in scopes):
            return  # closed already
        while True:
            innermost = scopes.pop()
            for name in innermost:
                self.used_bytes -= self.live.pop(name)[2]
            if innermost is scope:
                return

    def _overflow_message(self, name: str, tile: Tile) -> str:
        live = "; ".join(f"{other} ({_text(t)})" for other, t in self.live.items()) or "nothing"
        message = (
            f"SRAM overflow: {name} ({_text(tile)}) does not fit. {human_bytes(self.used_bytes)} "
            f"of {human_bytes(self.capacity_bytes or 0)} are in use. Live: {live}."
        )
        return f"{message} {self._suggest()}" if self._suggest else message


def _text(tile: Tile) -> str:
    rows, cols, n_bytes = tile
    return f"{rows} × {cols}, {human_bytes(n_bytes)}"


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
