"""The ladder, measured: every rung on the same inputs, its bytes counted and its result checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashedu.memory import GPU, Cost, Machine, Problem, cost
from flashedu.memory.gpus import Bound
from flashedu.stages import LADDER, Rung
from flashedu.stages import rung as find_rung
from flashedu.units import human_bytes, human_seconds


@dataclass(frozen=True)
class Row:
    """What one rung did, or why it did not run.

    `closed_form` and `bound` are there for a skipped rung too; `counted`, `error` and `budget`
    are None.
    """

    rung: str
    framework: str
    idea: str
    gpu: str  # the card that `bound` is for
    closed_form: Cost
    bound: Bound
    skipped: str | None = None
    counted: Cost | None = None
    error: float | None = None  # the largest difference from float64
    budget: float | None = None

    @property
    def cost(self) -> Cost:
        """What was counted; for a skipped rung, the closed form."""
        return self.counted or self.closed_form

    @property
    def within_budget(self) -> bool:
        """False for a skipped rung, and for NaN."""
        return self.error is not None and self.budget is not None and self.error <= self.budget

    @property
    def counted_equals_closed_form(self) -> bool:
        """False for a skipped rung."""
        return self.counted == self.closed_form

    @property
    def ok(self) -> bool:
        """Skipped, or right in result and in bytes."""
        return self.skipped is not None or (self.within_budget and self.counted_equals_closed_form)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the counters stand beside `error`, and are None where the rung was skipped."""
        return {
            "rung": self.rung,
            "framework": self.framework,
            "idea": self.idea,
            "skipped": self.skipped,
            "error": self.error,
            "budget": self.budget,
            "within_budget": None if self.skipped else self.within_budget,
            **(_fields(self.counted) if self.counted else dict.fromkeys(_fields(Cost()))),
            "closed_form": _fields(self.closed_form),
            "counted_equals_closed_form": (
                None if self.skipped else self.counted_equals_closed_form
            ),
            "bound_s": self.bound.seconds,
            "limit": self.bound.limit,
        }


def run(problem: Problem, card: GPU, *, seed: int = 0) -> Iterator[Row]:
    """Run the rungs from the bottom up, all on the same values; one row each.

    Raises ValueError for a dtype that `card` lacks.
    """
    card.flops_per_s(problem.dtype)
    return (_row(rung, problem, card, seed) for rung in LADDER)


def _row(rung: Rung, p: Problem, card: GPU, seed: int) -> Row:
    closed_form = cost.FORWARD[rung.name](p)
    skipped = rung.refuses(p) or rung.missing()
    counted, error, budget = (
        (None, None, None) if skipped else _counting(rung, _measure, rung, p, seed)
    )
    return Row(
        rung=rung.name,
        framework=rung.framework,
        idea=rung.idea,
        gpu=card.name,
        closed_form=closed_form,
        bound=card.bound(counted or closed_form, p.dtype),
        skipped=skipped,
        counted=counted,
        error=error,
        budget=budget,
    )


def count(
    stage: str,
    problem: Problem,
    *,
    lengths: Sequence[int] | None = None,
    trace: bool = False,
    backward: bool = False,
    seed: int = 0,
) -> Machine:
    """Run a stage's forward on drawn inputs, on the CPU; return the machine that counted it.

    `lengths`: of texts one behind another, which add up to N, for a stage that takes runs.
    `backward`: run its backward too. Raises ValueError for a problem that the stage does not take.
    """
    rung = find_rung(stage)
    reason = rung.refuses(problem)
    if reason is not None:
        raise ValueError(reason)
    return _counting(rung, _count, rung, problem, lengths, trace, backward, seed)


def _count(
    rung: Rung, p: Problem, lengths: Sequence[int] | None, trace: bool, backward: bool, seed: int
) -> Machine:
    from flashedu import testing

    q, k, v, do = testing.draw(p, framework=rung.framework, seed=seed)
    machine = Machine(trace=trace)
    if not backward:
        _attend(rung, p, q, k, v, machine, lengths)
        return machine
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    _attend(rung, p, q, k, v, machine, lengths).backward(do)
    return machine


def _attend(
    rung: Rung, p: Problem, q: Any, k: Any, v: Any, machine: Machine, lengths: Any = None
) -> Any:
    how: dict[str, Any] = {"causal": p.causal}
    if lengths is not None:
        from flashedu.stages.runs import packed

        how = {"runs": packed(lengths, causal=p.causal)}
    return rung.load().attention(q, k, v, machine=machine, **how, **rung.tiles_of(p))


def _counting(rung: Rung, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, where a kernel can be counted."""
    if not rung.is_triton:
        return function(*args)
    from flashedu.stages import triton_mode

    return triton_mode.interpreting(function, *args)


def _measure(rung: Rung, p: Problem, seed: int) -> tuple[Cost, float, float]:
    from flashedu import testing
    from flashedu.stages.reference import Reference

    q, k, v, _ = testing.draw(p, framework=rung.framework, seed=seed)
    machine = Machine(trace=False)
    o = _attend(rung, p, q, k, v, machine)
    try:
        found = testing.errors(Reference(o, None), q, k, v, causal=p.causal)["o"]  # type: ignore[arg-type]
    except AssertionError:  # a wrong shape
        return machine.counted, float("inf"), 0.0
    return machine.counted, found.error, found.budget


def takeaway(rows: Sequence[Row]) -> str:
    """What to see in the rows, in a sentence: from the lowest to the highest rung that ran."""
    ran = [row for row in rows if row.skipped is None]
    if not ran:
        return "No rung ran."
    low, high = ran[0], ran[-1]
    if low is high:
        return (
            f"{high.rung} moves {human_bytes(high.cost.hbm_bytes)} and needs "
            f"{human_bytes(high.cost.hbm_extra_bytes)} beside its inputs and result: "
            f"{high.gpu} needs {human_seconds(high.bound.seconds)} at least, "
            f"limited by {high.bound.limit}."
        )
    return (
        f"From {low.rung} to {high.rung}: "
        f"HBM traffic {_change(low.cost.hbm_bytes, high.cost.hbm_bytes)}, extra memory "
        f"{human_bytes(low.cost.hbm_extra_bytes)} → {human_bytes(high.cost.hbm_extra_bytes)}, "
        f"least time on {high.gpu} {human_seconds(low.bound.seconds)} ({low.bound.limit}) → "
        f"{human_seconds(high.bound.seconds)} ({high.bound.limit})."
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """The ladder for a README: what follows from the sizes alone, the same on every machine."""
    heads = ("rung", "idea", "HBM traffic", "extra memory", "FLOPs per byte", "least time")
    lines = [heads, ("---", "---", "---:", "---:", "---:", "---:")]
    for row in rows:
        lines.append((
            f"`{row.rung}`",
            row.idea,
            human_bytes(row.closed_form.hbm_bytes),
            human_bytes(row.closed_form.hbm_extra_bytes),
            f"{row.closed_form.intensity:.0f}",
            f"{human_seconds(row.bound.seconds)} ({row.bound.limit})",
        ))  # fmt: skip
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# how much memory a run takes


def needed_bytes(problem: Problem) -> int:
    """About what `run` needs, mostly for the oracle, which keeps S and P in float64. Measured."""
    p = problem
    scores, values = p.B * p.H * p.Nq * p.Nk, p.B * p.H * max(p.Nq, p.Nk) * p.D
    return scores * (48 if p.dtype == "float64" else 32) + values * 128


def largest_n(problem: Problem, limit_bytes: int) -> int:
    """The largest N, with all else as in `problem`, that `run` can do in so many bytes; maybe 0."""
    fits, too_large = 0, 1
    while needed_bytes(problem.replace(Nq=too_large, Nk=too_large)) <= limit_bytes:
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if needed_bytes(problem.replace(Nq=middle, Nk=middle)) <= limit_bytes:
            fits = middle
        else:
            too_large = middle
    return fits


def physical_memory_bytes() -> int | None:
    """This machine's memory, or its container's limit if that is less; None if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def _change(before: int, after: int) -> str:
    change = f"{human_bytes(before)} → {human_bytes(after)}"
    if before == after or not min(before, after):
        return change
    ratio, word = max(before, after) / min(before, after), "less" if after < before else "more"
    return f"{change} ({ratio:.1f} times {word})" if ratio >= 1.05 else change


def _fields(c: Cost) -> dict[str, Any]:
    return {**asdict(c), "intensity": c.intensity}
