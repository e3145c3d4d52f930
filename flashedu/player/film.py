"""A run of a stage, recorded and packed: what the player shows, as plain lists and names."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from flashedu import ladder, testing
from flashedu.memory import Event, Machine, Problem
from flashedu.memory.trace import visits
from flashedu.player.page import Pack
from flashedu.plots.style import LIGHT
from flashedu.stages import Rung, rung

STATE = ("m_i", "l_i", "acc_i", "o_i")  # the tiles whose numbers are shown, where a stage has them
TENSORS = ("q", "k", "v", "s", "p", "o_f32", "m", "l", "o", "lse")  # in the order shown
STATE_ROWS, STATE_COLUMNS = 8, 4  # of each, the first
LOWEST = np.finfo(np.float64).min  # a maximum before the first key

Values = list[list[float]]  # the first rows and columns of a tile


@dataclass(frozen=True)
class Film:
    """One run: its trace, and the numbers of the running rows at each event."""

    stage: str
    problem: Problem
    machine: Machine
    state: list[dict[str, Values]]  # by event: name → values; [] for a stage that has none

    @property
    def trace(self) -> list[Event]:
        """The events of the run."""
        assert self.machine.trace is not None
        return self.machine.trace


def record(stage: str, problem: Problem, *, seed: int = 0) -> Film:
    """Run a stage on drawn inputs, and on the same in float64 for the numbers.

    Raises ValueError for a problem that the stage does not take, and RuntimeError for a stage that
    cannot run here.
    """
    found = rung(stage)
    for name in ("B", "Nq", "Nk"):
        if not getattr(problem, name):
            raise ValueError(f"problem must have a {name} of 1 or more to be played, got 0")
    if not found.tile_sizes:  # one tile, the whole
        problem = problem.replace(block_q=problem.Nq, block_k=problem.Nk)
    machine = _count(found, problem, seed)
    state = [] if found.is_triton else _state(found, problem, seed)
    return Film(stage, problem, machine, state)


def _count(found: Rung, problem: Problem, seed: int) -> Machine:
    """As `ladder.count`, with a sentence where the stage cannot run."""
    reason = found.missing()
    if reason is not None:
        raise RuntimeError(reason)
    return ladder.count(found.name, problem, trace=True, seed=seed)


class _Watch(list[Event]):
    """A trace that looks, at each event, at the variables of the function that runs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.seen: list[dict[str, Values]] = []
        self._code = function.__code__

    def append(self, event: Event) -> None:
        super().append(event)
        frame = sys._getframe(1)
        while frame.f_code is not self._code:
            assert frame.f_back is not None
            frame = frame.f_back
        on_chip = {name for name, _ in event.live}
        there = [name for name in STATE if name in on_chip and name in frame.f_locals]
        old = self.seen[-1] if self.seen else {}
        # One call holds several tiles, one event after another: each shows its own.
        changed = {event.tensor} if event.op == "hold" and event.tensor in there else set(there)
        self.seen.append({
            name: frame.f_locals[name][0, 0, :STATE_ROWS, :STATE_COLUMNS].tolist()
            if name in changed or name not in old else old[name]
            for name in there
        })  # fmt: skip


def _state(found: Rung, p: Problem, seed: int) -> list[dict[str, Values]]:
    """The first rows of m_i, l_i and acc_i, of the first head, at each event of the run in float64.

    In float64 they round to the same three digits on every machine.
    """
    q, k, v, _ = testing.draw(p, framework=found.framework, seed=seed)
    if found.framework == "numpy":
        q, k, v = (x.astype("float64") for x in (q, k, v))
    else:
        q, k, v = (x.double() for x in (q, k, v))
    module, machine = found.load(), Machine()
    machine.trace = watch = _Watch(module.forward)
    module.attention(q, k, v, causal=p.causal, machine=machine, **found.tiles_of(p))
    return watch.seen


# packed


def pack(film: Film) -> Pack:
    """The film in integers and names, for JSON: what repeats is said once, in a table."""
    p, trace, found = film.problem, film.trace, rung(film.stage)
    kernels = list(dict.fromkeys(event.kernel for event in trace))
    in_hbm = {event.tensor for event in trace if event.op != "hold"}
    moves, live, states, numbers = _Table(), _Table(), _Table(), _Table()
    first_step = trace[0].step
    programs = [event.step - first_step for event in trace] if found.is_triton else []
    on_chip = _loaded(trace) if found.is_triton else [event.live for event in trace]
    packed: Pack = {
        "stage": film.stage,
        "idea": found.idea,
        "triton": found.is_triton,
        "sizes": {name: getattr(p, name) for name in (
            "B", "H", "H_kv", "Nq", "Nk", "D", "dtype", "causal", "block_q", "block_k")},
        "kernels": kernels,
        "tensors": [_tensor(name, trace, p) for name in TENSORS if name in in_hbm],
        "events": [
            moves.add((e.op, e.tensor, e.start, e.stop, e.hbm_bytes, e.line,
                       kernels.index(e.kernel)))
            for e in trace
        ],
        "moves": moves.rows,
        "live": [live.add([[name, *tile] for name, tile in tiles]) for tiles in on_chip],
        "lives": live.rows,
        "tile_colours": {name: LIGHT.colour_of(name) for tiles in on_chip for name, _ in tiles},
        "s_colour": LIGHT.tensor["s"],
        "visits": [[visit.query, visit.key] for visit in visits(trace)],
        "visit": _visits_begun(trace),
        "now": _computing(trace, on_chip),
        "program": programs,
        "n_programs": sum(film.machine.programs.values()),
        "state": [
            states.add({name: numbers.add(_numbers(tile)) for name, tile in tiles.items()})
            for tiles in film.state
        ],
        "states": states.rows,
        "numbers": numbers.rows,
        "source": _source(found.load(), {event.line for event in trace}),
    }  # fmt: skip
    return packed


class _Table:
    """Distinct rows, each at its number."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._numbers: dict[str, int] = {}

    def add(self, row: Any) -> int:
        """The row's number, new if it was not there."""
        number = self._numbers.setdefault(repr(row), len(self.rows))
        if number == len(self.rows):
            self.rows.append(row)
        return number


def _tensor(name: str, trace: Sequence[Event], p: Problem) -> Pack:
    """What an array in HBM looks like: rows, columns, and rows of a tile."""
    of_keys = name in ("k", "v")
    cols = {"s": p.Nk, "p": p.Nk, "m": 1, "l": 1, "lse": 1}.get(name, p.D)
    first = next(event for event in trace if event.tensor == name)
    return {
        "name": name,
        "colour": LIGHT.colour_of(name),
        "rows": p.Nk if of_keys else p.Nq,
        "cols": cols,
        "block": p.block_k if of_keys else p.block_q,
        "input": first.op == "load",
    }


def _loaded(trace: Sequence[Event]) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
    """What each program of a Triton kernel has loaded of the rows it works on; no bytes.

    It works on one tile of queries and one of keys: with the first load from the next, what was
    loaded of the last is done with.
    """
    found: list[tuple[tuple[str, tuple[int, ...]], ...]] = []
    loaded: dict[str, tuple[int, int]] = {}
    program: tuple[str, int] | None = None
    for event in trace:
        if program != (event.kernel, event.step):
            program, loaded = (event.kernel, event.step), {}
        if event.op == "load":
            rows, keys = (event.start, event.stop), ("k", "v")
            loaded = {name: other for name, other in loaded.items()
                      if other == rows or (name in keys) != (event.tensor in keys)}  # fmt: skip
            loaded[event.tensor] = rows
        found.append(tuple((name, (stop - start,)) for name, (start, stop) in loaded.items()))
    return found


def _visits_begun(trace: Sequence[Event]) -> list[int]:
    """At each event: how many tiles of S have been begun."""
    at = [visit.at for visit in visits(trace)]
    return np.searchsorted(at, np.arange(len(trace)), side="right").tolist()


def _computing(trace: Sequence[Event], on_chip: Sequence[Iterable[tuple[str, Any]]]) -> list[int]:
    """At each event: 1 while the last tile of S that was begun is being computed.

    It is done once what was loaded for it has left the chip, or the program turns to the result.
    """
    found = []
    turns = {visit.at for visit in visits(trace)}
    computing, begun = False, trace[0]
    for at, (event, live) in enumerate(zip(trace, on_chip, strict=True)):
        if at in turns:
            computing, begun = True, event
        elif begun.tensor not in {name for name, _ in live} or event.tensor in ("o", "lse"):
            computing = False
        found.append(int(computing))
    return found


def _numbers(tile: Values) -> str:
    """Three digits each, row by row."""
    return "|".join(" ".join(_text(x) for x in row) for row in tile)


def _text(x: float) -> str:
    if x == LOWEST:
        return "lowest"
    return f"{x:.3g}".replace("-", "−").replace("inf", "∞")


def _source(module: ModuleType, lines: set[int]) -> Pack:
    """The function of the stage that the lines are in."""
    text = inspect.getsource(module)
    (function,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and lines <= set(range(node.lineno, (node.end_lineno or 0) + 1))
    )
    shown = text.splitlines()[function.lineno - 1 : function.end_lineno]
    file = f"{module.__name__.replace('.', '/')}.py"
    return {"file": file, "function": function.name, "first": function.lineno, "lines": shown}
