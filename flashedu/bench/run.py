"""Timing peers beside one another: each is checked first, then they take turns, round after round.

A busy moment of the machine so hits all of them, and a ratio is taken within a round.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch

from flashedu import testing
from flashedu.bench.cases import AnyCase, Case, ModelCase
from flashedu.bench.peers import AnyPeer, Missing, Peer
from flashedu.memory import Problem

OnCase = Callable[[int, int, str], None]  # number, of how many, what
SCORES_AT_ONCE = 2**25  # of one head, in float64: 256 MiB a matrix
OUT_OF_MEMORY = "out of memory"
OF_HEAD = {"o": "q", "dq": "q", "dk": "k", "dv": "k"}  # whose heads a result has


def run(
    cases: Sequence[AnyCase],
    peers: Mapping[str, AnyPeer],
    device: Any,
    *,
    rounds: int,
    seed: int = 0,
    on_case: OnCase,
) -> Iterator[dict[str, Any]]:
    """Measure each case. `device`: a `Cuda`, or what tests put in its place."""
    for number, case in enumerate(cases):
        on_case(number, len(cases), str(case))
        chosen = [peers[name] for name in case.peers if name in peers]
        yield measure(case, chosen, device, rounds=rounds, seed=seed + number)
        device.free()


def measure(
    case: AnyCase, peers: Sequence[AnyPeer], device: Any, *, rounds: int, seed: int
) -> dict[str, Any]:
    """One case, as it stands in a record."""
    entries: dict[str, dict[str, Any]] = {
        peer.name: {"peer": peer.name, "why": None, "errors": {}, "extra_bytes": None}
        for peer in peers
    }
    seconds: dict[str, list[float]] = {}
    checked = "nothing"
    try:
        check, attempt = _set_up(case, device, seed)
        checked = str(check)
        ready = _admit(peers, attempt, check, device, entries)
        if case.timed:
            seconds = interleaved({name: ready[name].seconds for name in ready}, rounds)
    except (torch.OutOfMemoryError, Missing) as error:  # for the inputs, or for all at once
        for entry in entries.values():
            entry["why"] = entry["why"] or sentence(error)
    for name, entry in entries.items():
        times = seconds.get(name, [])
        entry |= summary(times)
        entry["tflops"] = case.flops / entry["median_s"] / 1e12 if times else None
        entry["gb_per_s"] = case.bytes / entry["median_s"] / 1e9 if times else None
        entry["times_as_fast_as"] = {
            other: spread([b / a for a, b in zip(times, seconds[other], strict=True)])
            for other in seconds
            if times and other != name
        }
    return {
        "section": case.section,
        **case.sizes,
        "pass": case.pass_,
        "mode": case.mode,
        "flops": case.flops,
        "bytes": case.bytes,
        "seed": seed,
        "checked": checked,
        "runs": list(entries.values()),
    }


def _set_up(case: AnyCase, device: Any, seed: int) -> tuple[Any, Callable[[Any], Any]]:
    """What results are held against, and how a peer is tried."""
    if isinstance(case, ModelCase):
        from flashedu.bench import models

        return models.set_up(case, device, seed)
    inputs = device.draw(case.problem, seed)
    gradients = case.pass_ != "fwd"
    check = Check(inputs, case.problem, seed, gradients=gradients, lengths=case.lengths)
    return check, lambda peer: Attempt(peer, case, inputs, device)


def _admit(
    peers: Sequence[Any], attempt_by: Callable[[Any], Any], check: Any, device: Any, entries: Any
) -> dict[str, Any]:
    """The peers that are right and fit, warmed up; in `entries`, errors and memory, and why not."""
    ready = {}
    for peer in peers:
        entry = entries[peer.name]
        try:
            attempt = attempt_by(peer)
            results = attempt.results()
            errors = check.errors(results) if peer.attends else {}
            entry["errors"] = {name: [_finite(x) for x in error] for name, error in errors.items()}
            entry["why"] = wrong(errors)
            if entry["why"] is None:
                entry["extra_bytes"] = attempt.extra_bytes()
                ready[peer.name] = attempt
        except Exception as error:  # a peer is others' code: the run goes on without it
            entry["why"] = sentence(error)
        attempt = None
        if entry["why"]:
            device.free()
    return ready


class Attempt:
    """One peer on the inputs of one case."""

    def __init__(self, peer: Peer, case: Case, inputs: Sequence[Any], device: Any) -> None:
        laid = peer.layout(case, inputs)
        *qkv, self._do = laid.inputs
        self._more, self._back = laid.more, laid.back
        self._peer, self._case, self._device = peer, case, device
        self._with_grad = case.pass_ != "fwd"
        self._leaves = [x.detach().requires_grad_(self._with_grad) for x in qkv]
        self._results: dict[str, Any] = {}
        self._attention = peer.prepare(laid.problem, device.name)
        steps = [self._forward, self._backward] if self._with_grad else [self._forward]
        if case.mode == "graph":
            with self._running():
                steps = device.capture(*steps)
        self._steps = steps
        self._untimed = steps[:-1] if case.pass_ == "bwd" else []
        self._timed = steps[len(self._untimed) :]

    def results(self) -> dict[str, Any]:
        """o and, with a backward, dq, dk and dv, by name."""
        with self._running():
            _all(self._steps)
        return {name: self._back(x) for name, x in self._results.items()}

    def extra_bytes(self) -> int | None:
        """Peak memory of the whole, beyond inputs; None for a graph, which keeps its own."""
        if self._case.mode == "graph":
            return None
        self._results.clear()
        with self._running():
            peak: int = self._device.peak_bytes(lambda: _all(self._steps))
        self._results.clear()
        return peak

    def seconds(self) -> float:
        """One timing."""
        with self._running():
            _all(self._untimed)
            wait = self._case.mode != "queued"
            took: float = self._device.seconds(lambda: _all(self._timed), wait=wait)
        if self._case.mode != "graph":  # its results stay where they are
            self._results.clear()
        return took

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.set_grad_enabled(self._with_grad), self._peer.around():
            yield

    def _forward(self) -> None:
        self._results["o"] = self._attention(*self._leaves, *self._more)

    def _backward(self) -> None:
        gradients = torch.autograd.grad(self._results["o"], self._leaves, self._do)
        self._results.update(zip(("dq", "dk", "dv"), gradients, strict=True))


class Check:
    """Some heads of a case, held against float64 in every row by the error budget of the course.

    Two heads: one drawn from `seed`, and the last one, whose addresses are the largest; with
    gradients, all heads that share their key head. `lengths`: of sequences one behind another, each
    of which is held against its own.
    """

    def __init__(
        self, inputs: Sequence[Any], p: Problem, seed: int, *, gradients: bool,
        lengths: Sequence[int] = (),
    ) -> None:  # fmt: skip
        heads = {random.Random(seed).randrange(p.B * p.H), p.B * p.H - 1}
        self.heads = [divmod(head, p.H) for head in sorted(heads)]
        self._names = ("o", "dq", "dk", "dv") if gradients else ("o",)
        self._group, self._lengths = p.group, lengths
        self._truths = []
        for part in self._parts():
            q, k, v, do = (x[part[of]] for x, of in zip(inputs, "qkkq", strict=True))
            do, at_once = do if gradients else None, max(64, SCORES_AT_ONCE // max(1, k.shape[2]))
            self._truths.append(testing.truth(q, k, v, do, causal=p.causal, rows=at_once))

    def errors(self, results: Mapping[str, Any]) -> dict[str, testing.Error]:
        """The worst error of each result, beside its budget."""
        found: dict[str, testing.Error] = {}
        for part, truth in zip(self._parts(), self._truths, strict=True):
            got = {name: results[name][part[OF_HEAD[name]]] for name in self._names}
            for name, error in truth.errors(got).items():
                if name not in found or not error.within or error.error > found[name].error:
                    found[name] = error
        return found

    def _parts(self) -> Iterator[dict[str, tuple[slice, slice, slice]]]:
        """What belongs together of arrays with q's heads, and of those with k's.

        The rows of one sequence, all that are left for the last.
        """
        starts = [0, *itertools.accumulate(self._lengths[:-1])]
        for b, h in self.heads:
            g = h // self._group
            mine = slice(h, h + 1)
            if len(self._names) > 1:  # dk and dv are sums over the group
                mine = slice(g * self._group, (g + 1) * self._group)
            for rows in itertools.starmap(slice, itertools.pairwise([*starts, None])):
                yield {"q": (slice(b, b + 1), mine, rows),
                       "k": (slice(b, b + 1), slice(g, g + 1), rows)}  # fmt: skip

    def __str__(self) -> str:
        heads = " and ".join(f"(b {b}, h {h})" for b, h in self.heads)
        each = f" of each of {len(self._lengths)} sequences" if self._lengths else ""
        return f"{', '.join(self._names)} of {heads}, every row{each}, against float64"


def wrong(errors: Mapping[str, testing.Error]) -> str | None:
    """Which result is outside its budget, and by how much, in a sentence."""
    for name, (error, budget) in errors.items():
        if not error <= budget:
            return f"wrong: {name} differs from float64 by {error:.3g}, its budget is {budget:.3g}"
    return None


def interleaved(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns: A, B, C, A, B, C … The first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name].append(turn())
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    """All seconds, their median, and the 10th and 90th percentile; None for no times."""
    middle, low, high = spread(times) if times else (None, None, None)
    return {"seconds": list(times), "median_s": middle, "p10_s": low, "p90_s": high}


def spread(values: Sequence[float]) -> list[float]:
    """Median, 10th and 90th percentile."""
    if len(values) < 2:
        return [values[0]] * 3
    tenths = quantiles(values, n=10, method="inclusive")
    return [median(values), tenths[0], tenths[-1]]


def sentence(error: Exception) -> str:
    """An error, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _all(steps: Iterable[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
