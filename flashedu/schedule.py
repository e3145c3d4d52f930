"""Which program runs on which SM, and when: a model of how a GPU hands out its programs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """One program: where it ran, from when to when, in the unit of its work."""

    program: int
    sm: int
    start: float
    stop: float


def assign(work: Sequence[float], sms: int) -> list[Run]:
    """One run a program, in order of their numbers; an SM that is free takes the next.

    `work`: how long each program runs. `sms`: SMs, each of which runs one at a time. Of
    several free ones, that with the lowest number takes it.
    Raises ValueError for less than one SM, and for a program of less than no work.
    """
    if sms < 1:
        raise ValueError(f"sms must be 1 or more, got {sms}")
    if min(work, default=0) < 0:
        raise ValueError(f"work must be 0 or more for each program, got {min(work)}")
    free = [(0.0, sm) for sm in range(sms)]  # a heap: who is free first stands first
    runs = []
    for program, length in enumerate(work):
        start, sm = free[0]
        runs.append(Run(program, sm, start, start + length))
        heapq.heapreplace(free, (start + length, sm))
    return runs


def finish_times(runs: Sequence[Run], sms: int) -> list[float]:
    """When each SM is done; 0 for one that had nothing to do."""
    done = [0.0] * sms
    for run in runs:
        done[run.sm] = max(done[run.sm], run.stop)
    return done
