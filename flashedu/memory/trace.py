"""What happened, in order: one event for each tile that moved or was made."""

from __future__ import annotations

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
