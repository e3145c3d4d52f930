"""What happened, in order: one event for each tile that moved or was made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Event(NamedTuple):
    """One load, store or hold.

    `hbm_bytes` is summed over all programs (batches and heads), 0 for a hold: a tile that was
    made in SRAM and moved nothing. `sram_bytes` is what one program holds just after the event.
    A Triton kernel is traced program by program: `step` is then the number of the program, and
    what it holds is not known (0).
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


class Visit(NamedTuple):
    """A tile of S, computed once more."""

    query: int  # first query of the tile
    key: int  # first key of the tile
    step: int


def visits(trace: Iterable[Event]) -> list[Visit]:
    """The tiles of S that a trace computes, in order; one that is computed again comes again.

    Of q and k, what a kernel loads first stays, and each load of the other is a visit.
    Raises ValueError for a kernel that works on whole matrices: its S has no tiles.
    """
    stays: dict[str, str] = {}  # kernel → q or k
    at = {"q": 0, "k": 0}
    found = []
    for event in trace:
        if event.tensor == "s" and event.op != "hold":
            raise ValueError(
                f"trace must be of a stage that works in tiles, got {event.kernel!r}, which moves "
                f"the whole of s; tiled, online, flash1 or flash2 would do"
            )
        if event.op == "load" and event.tensor in at:
            at[event.tensor] = event.start
            if event.tensor != stays.setdefault(event.kernel, event.tensor):
                found.append(Visit(at["q"], at["k"], event.step))
    return found
