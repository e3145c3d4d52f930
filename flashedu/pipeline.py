"""Who waits for whom on one SM of a Hopper GPU: a model of flash3's kernel, event by event.

Four units work side by side: the memory brings tiles, the tensor cores multiply, the exponential
units and the CUDA cores do the softmax. Each does one thing at a time, in the order in which it
was asked. Warps are generators that read as the kernel does, line by line: they wait at barriers,
have tiles loaded, multiply. Time passes only in what they yield.

The model has no caches, no mask and no instruction but these, and its units always run at their
full rate. So a real kernel takes longer, and the model's use is to compare: which change helps, and
what a kernel then waits for. Nothing in it was fitted to a measured kernel.

Source: FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2; PTX ISA 8.0, mbarrier.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

from flashedu.memory.gpus import GPU, gpu
from flashedu.memory.problem import Problem
from flashedu.schedule import assign

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

WARPGROUP_REGISTERS = 65536 // 128  # of an SM, for each thread of a warpgroup
PRODUCER_REGISTERS = 24


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


# the kernel's switches


@dataclass(frozen=True)
class Kernel:
    """How a forward is cut, and who does what: each field is a switch between flash2 and flash3."""

    D: int = 128
    rows: int = 64  # queries of a consumer
    block_k: int = 128  # keys of a tile
    consumers: int = 2  # warpgroups that compute
    stages: int = 2  # places for tiles of k, and as many for v
    q_places: int = 1  # query tiles on chip
    specialised: bool = True  # a producer warp loads; False: the warps load in turn, as in flash2
    asynchronous: bool = True  # copies run while warps compute; only without a producer False
    programs: int = 1  # on an SM at a time, each with places of its own
    overlap: bool = False  # p v of a tile runs during the softmax of the next: FA3, Algorithm 2
    ping_pong: bool = False  # consumers take turns with the tensor cores: FA3, section 3.1
    persistent: bool = False  # a program stays on its SM and takes query tiles until none is left
    order: str = "first"  # of a head's query tiles, causal: "first", "longest" or "pairs"

    def __post_init__(self) -> None:
        for name in ("D", "rows", "block_k", "consumers", "stages", "q_places", "programs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.order not in ("first", "longest", "pairs"):
            raise ValueError(f"order must be first, longest or pairs, got {self.order!r}")
        if self.specialised and not self.asynchronous:
            raise ValueError("asynchronous must be True for a producer: its copies are")
        if self.ping_pong and (self.consumers < 2 or not self.specialised):
            raise ValueError("ping_pong needs specialised warps and 2 consumers or more")
        if self.overlap and not self.specialised:
            raise ValueError("overlap needs specialised warps: flash2's has none here")

    def replace(self, **changes: Any) -> Kernel:
        """The same kernel with some switches changed."""
        return replace(self, **changes)

    @property
    def block_q(self) -> int:
        """Queries of a program's tile."""
        return self.consumers * self.rows

    @property
    def sram_bytes(self) -> int:
        """Of a program: q in its places, k and v in theirs, and o on its way out; 16 bits each."""
        q, o = self.q_places * self.block_q, self.block_q
        return (q + o + 2 * self.stages * self.block_k) * self.D * 2

    @property
    def registers_needed(self) -> int:
        """Of a consumer's thread, for acc, s and p (16 bits) alone."""
        return self.rows * (2 * self.D + 3 * self.block_k) // 2 // 128

    @property
    def registers_given(self) -> int:
        """To a consumer's thread, at most 255: what the producer leaves, by eights."""
        left = WARPGROUP_REGISTERS // self.programs - self.specialised * PRODUCER_REGISTERS
        return min(255, left // self.consumers // 8 * 8)

    def fits(self, card: GPU) -> bool:
        """Whether an SM of the card holds its tiles and its registers (32 for all else)."""
        room = card.sram_bytes_per_sm // self.programs - 1024  # that much is the system's
        sram = self.sram_bytes <= min(room, card.sram_bytes_per_program)
        return sram and self.registers_needed + 32 <= self.registers_given


FLASH2 = Kernel(specialised=False)  # with 8 warps and tiles of 128 × 128
FLASH3 = Kernel(q_places=2, persistent=True, order="pairs")


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
    waiting: list[_Actor] = field(default_factory=list, repr=False)

    def passed(self, parity: int) -> bool:
        """Whether a warp that waits for the phase of that parity may go on."""
        return self.completed & 1 != parity


class Places:
    """Room on chip for `count` tiles, and two barriers for each place.

    `full` opens when the tile has come, `empty` when all `readers` have done with it.
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
    """Have tile t of `places` brought to its place, asynchronously: its `full` then opens."""

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

    @property
    def rows(self) -> tuple[str, ...]:
        """Units, then warps, in the order of their first span."""
        return tuple(dict.fromkeys(span.row for span in self.spans))

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
        return Timeline(tuple(self._spans), max((s.stop for s in self._spans), default=0.0))

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


# the kernel's warps


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


class Program:
    """One program: its places, its barriers, and the warps that meet there."""

    def __init__(self, kernel: Kernel, rates: Rates) -> None:
        self.kernel, self.rates = kernel, rates
        n_bytes = 2 * kernel.D
        q_places = kernel.q_places * kernel.consumers  # each has tiles of its own
        self.q = Places("q", q_places, 1, kernel.rows * n_bytes)
        self.k = Places("k", kernel.stages, kernel.consumers, kernel.block_k * n_bytes)
        self.v = Places("v", kernel.stages, kernel.consumers, kernel.block_k * n_bytes)
        self.together = Barrier("together", kernel.consumers)
        self.turns = [Barrier(f"turn[{c}]", 1) for c in range(kernel.consumers)]
        self.had = [0] * kernel.consumers  # turns so far

        scores, outputs = kernel.rows * kernel.block_k, kernel.rows * kernel.D
        self.product_s = rates.seconds(2 * scores * kernel.D, rates.tensor_flops)
        self.maximum_s = rates.seconds(scores, rates.maxima)
        self.exponentials_s = rates.seconds(scores, rates.exponentials)  # scale and − m beside them
        self.rest_s = (  # the sum, p to 16 bits, and α times acc
            rates.seconds(scores, rates.float32)
            + rates.seconds(scores, rates.conversions)
            + rates.seconds(outputs, rates.float32)
        )
        self.divide_s = rates.seconds(outputs, rates.float32) + rates.seconds(
            outputs, rates.conversions
        )
        self.store_s = rates.seconds(outputs * 2, rates.memory_bytes)

    def produce(self, query_tiles: Iterable[Sequence[int]]) -> Warps:
        """One warp: have every tile loaded as soon as there is a place for it."""
        yield Pause(self.rates.start_s, STARTS)
        consumers = self.kernel.consumers
        t = 0  # key tiles so far
        for n, seen in enumerate(query_tiles):
            for c in range(consumers):
                yield from fill(self.q, n * consumers + c)
            for _ in range(max(seen)):
                yield from fill(self.k, t)
                yield from fill(self.v, t)
                t += 1

    def consume(self, c: int, query_tiles: Iterable[Sequence[int]]) -> Warps:
        """Consumer c: its rows of every query tile."""
        yield Pause(self.rates.start_s, STARTS)
        consumers, overlap = self.kernel.consumers, self.kernel.overlap
        store = None
        t = 0  # as the producer counts
        for n, seen in enumerate(query_tiles):
            for _ in range(seen[c], max(seen)):  # key tiles for later queries only
                yield from self._turn(c)
                yield Arrive((yield from full(self.k, t)))
                yield Arrive((yield from full(self.v, t)))
                yield from self._pass_on(c)
                t += 1

            q_used = yield from full(self.q, n * consumers + c)
            yield from self._turn(c)
            k_used = yield from full(self.k, t)
            yield Join((yield self._product("q k", t, self.k)))
            yield Arrive(k_used)
            yield from self._pass_on(c)
            if overlap:
                yield from self._softmax(t)
            for _ in range(1, seen[c]):
                if not overlap:
                    yield from self._softmax(t)
                yield from self._turn(c)
                if overlap:
                    k_used = yield from full(self.k, t + 1)
                    q_k = yield self._product("q k", t + 1, self.k)
                v_used = yield from full(self.v, t)
                p_v = yield self._product("p v", t, self.v)
                if not overlap:
                    k_used = yield from full(self.k, t + 1)
                    q_k = yield self._product("q k", t + 1, self.k)
                yield from self._pass_on(c)
                if overlap:
                    yield Join(q_k)
                    yield Arrive(k_used)
                    yield from self._softmax(t + 1)
                yield Join(p_v)
                yield Join(q_k)
                yield Arrive(v_used)
                if not overlap:
                    yield Arrive(k_used)
                t += 1
            yield Arrive(q_used)
            if not overlap:
                yield from self._softmax(t)
            yield from self._turn(c)
            v_used = yield from full(self.v, t)
            p_v = yield self._product("p v", t, self.v)
            yield from self._pass_on(c)
            yield Join(p_v)
            yield Arrive(v_used)
            t += 1
            store = yield from self._store(t - 1, store)
        if store:
            yield Join(store)

    def take_turns(self, c: int, query_tiles: Iterable[Sequence[int]]) -> Warps:
        """flash2: warpgroup c loads, multiplies and takes exponentials in turn.

        The first has the tiles loaded, when all have done with the place: they meet at every tile.
        """
        yield Pause(self.rates.start_s, STARTS)
        kernel = self.kernel
        ahead = kernel.stages - 1 if kernel.asynchronous else 0
        store = None
        t = 0
        for n, seen in enumerate(query_tiles):
            first, last = t, t + max(seen)
            q_used = yield from self._own_q(c, n)
            for x in range(first, min(first + ahead, last)):
                yield from self._load_both(c, x)
            while t < last:
                yield Arrive(self.together)
                yield Wait(self.together, t & 1, ALL_WARPS)
                if t + ahead < last:
                    yield from self._load_both(c, t + ahead)
                k_used = yield from full(self.k, t)
                yield Join((yield self._product("q k", t, self.k)))
                yield Arrive(k_used)
                yield from self._softmax(t)
                if not kernel.asynchronous and c == 0:
                    yield from fill(self.v, t)
                v_used = yield from full(self.v, t)
                yield Join((yield self._product("p v", t, self.v)))
                yield Arrive(v_used)
                t += 1
            yield Arrive(q_used)
            store = yield from self._store(t - 1, store)
        if store:
            yield Join(store)

    def _own_q(self, c: int, n: int) -> Part:
        place = n * self.kernel.consumers + c
        yield from fill(self.q, place)
        return (yield from full(self.q, place))

    def _load_both(self, c: int, t: int) -> Part:
        if c == 0:
            yield from fill(self.k, t)
            if self.kernel.asynchronous:
                yield from fill(self.v, t)

    def _product(self, what: str, t: int, reads: Places) -> Ask:
        return Ask(TENSOR, self.product_s, what, t, reads)

    def _softmax(self, t: int) -> Part:
        yield Do(CUDA, self.maximum_s, "maximum", t)
        yield Do(EXP, self.exponentials_s, "exponentials", t)
        yield Do(CUDA, self.rest_s, "sum, rescale", t)

    def _store(self, t: int, before: Job | None) -> Part:
        yield Do(CUDA, self.divide_s, "divide by l", t)
        if before:
            yield Join(before)
        return (yield Ask(MEMORY, self.store_s, "store o", t))

    def _turn(self, c: int) -> Part:
        if self.kernel.ping_pong:
            phase = self.had[c] & 1 ^ (c == 0)  # the first consumer's turn is open at first
            self.had[c] += 1
            yield Wait(self.turns[c], phase, TURN)

    def _pass_on(self, c: int) -> Part:
        if self.kernel.ping_pong:
            yield Arrive(self.turns[(c + 1) % self.kernel.consumers])


def simulate(
    kernel: Kernel, key_tiles: Iterable[int | Sequence[int]], rates: Rates = H100
) -> Timeline:
    """One SM, from the start of `kernel.programs` programs that run side by side to their end.

    `key_tiles`: for each query tile of a program, one after another, how many key tiles it sees,
    or how many each consumer does. Raises ValueError for none, or for one that sees none.
    """
    counts = [(x,) * kernel.consumers if isinstance(x, int) else tuple(x) for x in key_tiles]
    if not counts or min(map(min, counts)) < 1 or {len(x) for x in counts} != {kernel.consumers}:
        raise ValueError(
            f"key_tiles must hold 1 or more for each of {kernel.consumers} consumers, got {counts}"
        )
    warps: dict[str, Warps] = {}
    for x in range(kernel.programs):
        program = Program(kernel, rates)
        of = f" of program {x + 1}" if kernel.programs > 1 else ""
        if kernel.specialised:
            warps[f"producer{of}"] = program.produce(counts)
        name, steps = (
            ("consumer", program.consume) if kernel.specialised else ("warps", program.take_turns)
        )
        for c in range(kernel.consumers):
            warps[f"{name} {c + 1}{of}"] = steps(c, counts)
    return SM(rates).run(warps)


# a whole card


def pieces(kernel: Kernel, problem: Problem) -> list[list[tuple[int, ...]]]:
    """What a program takes at a time, in the order of the grid: key tiles, as `simulate` has them.

    A pair is a head's query tile x, and tile x from its end: together they see about as many keys.
    """
    block_q, tiles = kernel.block_q, -(-problem.Nq // kernel.block_q)
    seen = [
        tuple(
            _seen(kernel, problem, x * block_q + c * kernel.rows) for c in range(kernel.consumers)
        )
        for x in range(tiles)
    ]
    order = [[x] for x in range(tiles)]
    if problem.causal and kernel.order == "longest":
        order.reverse()
    if problem.causal and kernel.order == "pairs":
        order = [sorted({x, tiles - 1 - x}) for x in range(-(-tiles // 2))]
    return [[seen[x] for x in piece] for piece in order] * problem.B * problem.H


def _seen(kernel: Kernel, problem: Problem, row: int) -> int:
    keys = problem.Nk
    if problem.causal:
        keys = min(keys, row + kernel.rows + problem.Nk - problem.Nq)
    return max(1, -(-keys // kernel.block_k))


def card_seconds(kernel: Kernel, problem: Problem, rates: Rates = H100, sms: int = 132) -> float:
    """When the last SM is done.

    A persistent kernel deals its pieces out in turn: the SM with the most key tiles is simulated.
    Otherwise each piece is a program, and a place that is free takes the next (`assign`).
    """
    work = pieces(kernel, problem)
    if kernel.persistent:
        dealt = [[*itertools.chain(*work[sm::sms])] for sm in range(min(sms, len(work)))]
        return _seconds(kernel, tuple(max(dealt, key=lambda own: sum(map(max, own)))), rates)
    runs = assign([_seconds(kernel, tuple(x), rates) for x in work], sms * kernel.programs)
    return max(run.stop for run in runs)


@lru_cache(maxsize=4096)
def _seconds(kernel: Kernel, key_tiles: tuple[tuple[int, ...], ...], rates: Rates) -> float:
    return simulate(kernel, key_tiles, rates).seconds


def flops(problem: Problem) -> float:
    """Of a forward, as papers count them: of all scores, or of half of them when causal."""
    all_scores = 4.0 * problem.B * problem.H * problem.Nq * problem.Nk * problem.D
    return all_scores / (2 if problem.causal else 1)


def tflops_per_s(kernel: Kernel, problem: Problem, rates: Rates = H100, sms: int = 132) -> float:
    """What the model predicts for the whole card, in TFLOP/s."""
    return flops(problem) / card_seconds(kernel, problem, rates, sms) / 1e12
