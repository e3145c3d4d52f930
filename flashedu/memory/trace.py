"""What happened, in order: one event for each tile that moved or was made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

Tile = tuple[int, int, int]  # rows, columns, bytes


class Event(NamedTuple):
    """One load, store or hold.

    `hbm_bytes` is summed over all programs (batches and heads), 0 for a hold: a tile that was
    made in SRAM and moved nothing. `sram_bytes` is what one program holds just after the event, and
    `live` lists it, tile by tile. A Triton kernel is traced program by program: `step` is then the
    number of the program, and what it holds is not known (0 and nothing).
    """

    step: int  # counts the passes through tile loops
    kernel: str
    op: str  # "load", "store" or "hold"
    tensor: str
    start: int  # first row of the tile, in the tensor
    stop: int  # one past its last row
    hbm_bytes: int
    sram_bytes: int
    line: int  # of the stage's source
    live: tuple[tuple[str, Tile], ...] = ()  # name, and rows, columns and bytes


class Visit(NamedTuple):
    """A tile of S, computed once more."""

    query: int  # first query of the tile
    key: int  # first key of the tile
    step: int
    at: int  # place in the trace of the load that it waited for


def visits(trace: Iterable[Event]) -> list[Visit]:
    """The tiles of S that a trace computes, in order; one that is computed again comes again.

    Of q and k, what a kernel loads first stays, and each load of the other is a visit. A stage that
    works on whole matrices has one.
    """
    found = []
    kernel, stays, first = "", "", {"q": 0, "k": 0}
    for at, event in enumerate(trace):
        if event.op != "load" or event.tensor not in first:
            continue
        if event.kernel != kernel:
            kernel, stays, first = event.kernel, event.tensor, {"q": 0, "k": 0}
        first[event.tensor] = event.start
        if event.tensor != stays:
            found.append(Visit(first["q"], first["k"], event.step, at))
    return found
