"""One SM of a Hopper GPU, event by event: its units, its barriers, and the warps that wait there.

Four units work side by side: the memory brings tiles, the tensor cores multiply, the exponential
units and the CUDA cores do the softmax. Each does one thing at a time, in the order in which it
was asked. Warps are generators, and time passes only in what they yield: they wait at barriers,
have tiles loaded, have units work.

The model has no caches and no instruction but these, and its units always run at their full rate.
So a real SM takes longer. Nothing in it was fitted to a measured kernel.

Source: PTX ISA 8.0, mbarrier; the rates' are beside them.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flashedu.memory.gpus import GPU, gpu

MEMORY, TENSOR, EXP, CUDA = "memory", "tensor cores", "exponential units", "CUDA cores"
UNITS = (MEMORY, TENSOR, EXP, CUDA)

# What warps wait for.
TILE = "a tile has not come"
PLACE = "no place is empty"
OWN_PRODUCT = "its own product runs"
OTHERS_PRODUCT = "another's product runs"
UNIT_BUSY = "another has the units"
ALL_WARPS = "not all warps are here"
TURN = "it is another's turn"
STORED = "o is not stored yet"
CAUSES = (TILE, PLACE, OWN_PRODUCT, OTHERS_PRODUCT, UNIT_BUSY, ALL_WARPS, TURN, STORED)

STARTS = "program starts"


# rates


@dataclass(frozen=True)
class Rates:
    """What the units of one SM do, each clock, and what takes a time of its own."""

    clock_hz: float
    tensor_flops: float = 4096  # 16-bit products, dense: 4 tensor cores, 512 multiply-adds each
    exponentials: float = 16  # 2^x; CUDA C++ Programming Guide, arithmetic instructions, 9.0
    float32: float = 128  # additions, multiplications; ditto
    maxima: float = 64  # ditto
    conversions: float = 64  # from float32 to 16 bits; ditto
    memory_bytes: float = 5120 / 132  # from L2: A100 whitepaper, shared by 132 SMs here
    # From a copy's order to its first byte. An ordinary load takes 260 clocks from L2 and 480 from
    # HBM (arXiv 2402.13499); what the copy engine adds is assumed: about as much again.
    latency_s: float = 0.5e-6
    start_s: float = 1e-6  # of a program, until its warps run. Assumed: a round number

    def seconds(self, amount: float, a_clock: float) -> float:
        """How long that much takes a unit that does so much a clock."""
        return amount / a_clock / self.clock_hz


def rates_of(card: GPU, clock_hz: float | None = None) -> Rates:
    """A Hopper card's SM: at the clock of its data sheet's tensor rate, or at another.

    A card that multiplies without pause reaches its power limit and lowers its clock: then give
    the clock at which it multiplies. Raises ValueError for a card that is not Hopper.
    """
    if card.compute_capability != (9, 0):
        raise ValueError(f"card must be a Hopper GPU, h100 or h200, got {card.key}")
    known = card.tensor_flops_per_s / card.sm_count / Rates.tensor_flops
    return Rates(clock_hz or known)


H100 = rates_of(gpu("h100"))


# barriers and places


class Deadlock(RuntimeError):
    """All wait, and nothing is under way."""


class Race(RuntimeError):
    """A tile was read that is not there."""


@dataclass(eq=False)
class Barrier:
    """An mbarrier: it completes a phase when `count` have arrived, and begins the next.

    Phases are told apart by one bit, their parity: 0, 1, 0, 1 … `passed(parity)` asks whether the
    last phase that is complete has that parity. Before the first one, that counts as 1.
    """

    name: str
    count: int
    arrived: int = 0
    completed: int = 0  # phases
    opened: list[float] = field(default_factory=list, repr=False)  # when, in seconds
    waiting: list[_Actor] = field(default_factory=list, repr=False)

    def passed(self, parity: int) -> bool:
        """Whether a warp that waits for the phase of that parity may go on."""
        return self.completed & 1 != parity


class Places:
    """Room on chip for `count` tiles, and two barriers for each place.

    `full` completes when the tile has come, `empty` when all `readers` have done with it.
    """

    def __init__(self, name: str, count: int, readers: int, n_bytes: int) -> None:
        self.name, self.count, self.n_bytes = name, count, n_bytes
        self.full = [Barrier(f"{name} full[{x}]", 1) for x in range(count)]
        self.empty = [Barrier(f"{name} empty[{x}]", readers) for x in range(count)]
        self.holds: list[int | None] = [None] * count


# what warps yield


class Wait(NamedTuple):
    """Until the barrier's phase of that parity is complete."""

    barrier: Barrier
    parity: int
    cause: str = TILE


class Arrive(NamedTuple):
    """Count at the barrier; takes no time."""

    barrier: Barrier


class Load(NamedTuple):
    """Have tile t of `places` brought to its place, asynchronously: its `full` then completes."""

    places: Places
    t: int


class Ask(NamedTuple):
    """Have a unit do something, asynchronously. Gives the `Job`."""

    unit: str
    seconds: float
    what: str
    tile: int
    reads: Places | None = None  # whose tile it reads


class Job(NamedTuple):
    """What a unit was asked for: from when to when."""

    unit: str
    start: float
    stop: float


class Join(NamedTuple):
    """Wait until the job is done."""

    job: Job


class Do(NamedTuple):
    """Have a unit do something, and wait for it: what the warps do themselves."""

    unit: str
    seconds: float
    what: str
    tile: int


class Pause(NamedTuple):
    """Let time pass."""

    seconds: float
    what: str


Warps = Generator[Any, Any, None]  # a warp or more that run the same code
Part = Generator[Any, Any, Any]  # of it


# time


class Span(NamedTuple):
    """A row's time from start to stop, in seconds: what it did, or what it waited for.

    Rows are units and warps. `by`: for a unit, whose work it was.
    """

    row: str
    what: str
    tile: int
    start: float
    stop: float
    by: str = ""


@dataclass(frozen=True)
class Timeline:
    """All that happened."""

    spans: tuple[Span, ...]
    seconds: float
    warps: tuple[str, ...]  # rows, beside those of UNITS

    def of(self, row: str) -> list[Span]:
        """A row's spans, in order of time."""
        return sorted((s for s in self.spans if s.row == row), key=lambda s: (s.start, s.stop))

    def busy(self, unit: str) -> float:
        """The share of the time in which the unit works."""
        return sum(s.stop - s.start for s in self.spans if s.row == unit) / self.seconds

    def waits(self, row: str) -> dict[str, float]:
        """Seconds for each cause that made these warps wait, longest first."""
        found: dict[str, float] = defaultdict(float)
        for span in self.of(row):
            if span.what in CAUSES:
                found[span.what] += span.stop - span.start
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(eq=False)
class _Actor:
    name: str
    steps: Warps
    since: float = 0.0  # when it began to wait
    wait: Wait | None = None
    done: bool = False


class SM:
    """Units and a clock. `run` lets warps run until all are done."""

    def __init__(self, rates: Rates = H100) -> None:
        self.rates, self.now = rates, 0.0
        self._free = dict.fromkeys(UNITS, 0.0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._spans: list[Span] = []

    def run(self, warps: Mapping[str, Warps]) -> Timeline:
        """What happens when they all start at once.

        Raises Deadlock if none can go on, and Race if one reads a tile that is not there.
        """
        actors = [_Actor(name, steps) for name, steps in warps.items()]
        for actor in actors:
            self._at(0.0, lambda actor=actor: self._go_on(actor))  # type: ignore[misc]
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        if stuck := [actor for actor in actors if not actor.done]:
            raise Deadlock(self._sentence(stuck))
        seconds = max((span.stop for span in self._spans), default=0.0)
        return Timeline(tuple(self._spans), seconds, tuple(warps))

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._number), event))

    def _note(
        self, row: str, what: str, tile: int, start: float, stop: float, by: str = ""
    ) -> None:
        if stop > start:
            self._spans.append(Span(row, what, tile, start, stop, by))

    def _go_on(self, actor: _Actor, answer: Any = None) -> None:
        """Until it must wait, or is done."""
        while True:
            try:
                step = actor.steps.send(answer)
            except StopIteration:
                actor.done = True
                return
            answer = None
            match step:
                case Arrive(barrier):
                    self._arrive(barrier)
                case Load(places, t):
                    self._load(actor, places, t)
                case Ask():
                    answer = self._ask(actor, step)
                case Wait(barrier, parity):
                    if not barrier.passed(parity):
                        actor.wait, actor.since = step, self.now
                        barrier.waiting.append(actor)
                        return
                case Do(unit, seconds, what, tile):
                    job = self._take(unit, seconds, what, tile, actor.name)
                    self._note(actor.name, UNIT_BUSY, tile, self.now, job.start)
                    self._note(actor.name, what, tile, job.start, job.stop)
                    return self._resume(actor, job.stop)
                case Join(job):
                    if job.stop > self.now:
                        stored = job.unit == MEMORY
                        begun = max(self.now, job.start)
                        before = STORED if stored else OTHERS_PRODUCT
                        self._note(actor.name, before, -1, self.now, begun)
                        during = STORED if stored else OWN_PRODUCT
                        self._note(actor.name, during, -1, begun, job.stop)
                        return self._resume(actor, job.stop)
                case Pause(seconds, what):
                    self._note(actor.name, what, -1, self.now, self.now + seconds)
                    return self._resume(actor, self.now + seconds)
                case _:
                    raise TypeError(f"{actor.name} must yield a step such as Wait, got {step!r}")

    def _resume(self, actor: _Actor, time: float) -> None:
        self._at(time, lambda: self._go_on(actor))

    def _arrive(self, barrier: Barrier) -> None:
        barrier.arrived += 1
        if barrier.arrived < barrier.count:
            return
        barrier.arrived, barrier.completed = 0, barrier.completed + 1
        barrier.opened.append(self.now)
        for actor in [a for a in barrier.waiting if a.wait and barrier.passed(a.wait.parity)]:
            assert actor.wait is not None
            barrier.waiting.remove(actor)
            self._note(actor.name, actor.wait.cause, -1, actor.since, self.now)
            actor.wait = None
            self._resume(actor, self.now)

    def _take(self, unit: str, seconds: float, what: str, tile: int, by: str) -> Job:
        """A unit's next free time. What memory brings begins after the latency."""
        ready = self.now + (self.rates.latency_s if unit == MEMORY else 0.0)
        start = max(ready, self._free[unit])
        self._free[unit] = start + seconds
        self._note(unit, what, tile, start, start + seconds, by)
        return Job(unit, start, start + seconds)

    def _load(self, actor: _Actor, places: Places, t: int) -> None:
        place = t % places.count
        places.holds[place] = None  # neither the old tile nor the new one
        seconds = self.rates.seconds(places.n_bytes, self.rates.memory_bytes)
        job = self._take(MEMORY, seconds, f"load {places.name}", t, actor.name)

        def came() -> None:
            places.holds[place] = t
            self._arrive(places.full[place])

        self._at(job.stop, came)

    def _ask(self, actor: _Actor, step: Ask) -> Job:
        job = self._take(step.unit, step.seconds, step.what, step.tile, actor.name)
        if step.reads is not None:
            places = step.reads

            def check() -> None:
                held = places.holds[step.tile % places.count]
                if held != step.tile:
                    there = "a tile that is still coming" if held is None else f"tile {held}"
                    raise Race(
                        f"{actor.name} reads tile {step.tile} of {places.name}, and in its place "
                        f"is {there}: a wait was passed too early, or a place called empty too soon"
                    )

            check()
            self._at(job.stop, check)
        return job

    def _sentence(self, stuck: list[_Actor]) -> str:
        waits = []
        for actor in stuck:
            assert actor.wait is not None
            barrier, parity, _ = actor.wait
            waits.append(
                f"{actor.name} waits at {barrier.name} for a phase of parity {parity}, while its "
                f"phase {barrier.completed} (parity {barrier.completed & 1}) is open with "
                f"{barrier.arrived} of {barrier.count} arrived"
            )
        return f"deadlock at {self.now * 1e6:.2f} µs: " + "; ".join(waits)


# what producers and consumers do at a place


def fill(places: Places, t: int) -> Part:
    """Have tile t loaded, as soon as its place is empty."""
    place, phase = t % places.count, t // places.count & 1
    yield Wait(places.empty[place], phase ^ 1, PLACE)  # all places are empty at first
    yield Load(places, t)


def full(places: Places, t: int) -> Part:
    """Wait until tile t has come. Gives the barrier to arrive at when it is used."""
    place, phase = t % places.count, t // places.count & 1
    yield Wait(places.full[place], phase, TILE)
    return places.empty[place]
