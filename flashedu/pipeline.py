"""flash3's kernel on a model of one SM: who waits for whom, and which change helps.

The warps read as the kernel's do, line by line; `Kernel` has a switch for each step between flash2
and flash3. What a query's mask hides is not loaded, as in the kernel; masks themselves cost
nothing here, and neither do too few registers. Use it to compare: a card is slower.

Source: FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from flashedu.memory.gpus import GPU
from flashedu.memory.problem import Problem
from flashedu.schedule import assign
from flashedu.sm import (
    ALL_WARPS,
    CUDA,
    EXP,
    H100,
    MEMORY,
    SM,
    STARTS,
    TENSOR,
    TURN,
    Arrive,
    Ask,
    Barrier,
    Do,
    Job,
    Join,
    Part,
    Pause,
    Places,
    Rates,
    Timeline,
    Wait,
    Warps,
    fill,
    full,
)

WARPGROUP_REGISTERS = 65536 // 128  # of an SM, for each thread of a warpgroup
PRODUCER_REGISTERS = 24
OTHER_REGISTERS = 32  # of a thread, beside acc, s and p: assumed
SYSTEM_BYTES = 1024  # of shared memory, for each program


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
        """Of a program, 16 bits each: q, k and v in their places, and flash3's o on its way out.

        flash2's has the room of k and v, which are done with.
        """
        q, o = self.q_places * self.block_q, self.specialised * self.block_q
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
        """Whether an SM of the card holds its tiles and its registers."""
        room = card.sram_bytes_per_sm // self.programs - SYSTEM_BYTES
        sram = self.sram_bytes <= min(room, card.sram_bytes_per_program)
        return sram and self.registers_needed + OTHER_REGISTERS <= self.registers_given

    def programs_per_sm(self, card: GPU) -> int:
        """How many run on an SM of the card at a time, where none of its warps is a producer.

        A thread has 255 registers at most, and spills what it needs beyond that.
        """
        registers = min(255, self.registers_needed + OTHER_REGISTERS)
        by_registers = WARPGROUP_REGISTERS // (self.consumers * registers)
        return min(by_registers, card.sram_bytes_per_sm // (self.sram_bytes + SYSTEM_BYTES))


FLASH2 = Kernel(specialised=False)  # with 8 warps and tiles of 128 × 128
FLASH3 = Kernel(persistent=True, order="pairs")


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
