"""Which tiles are fastest on this card: candidates for each of flash2's kernels, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flashedu.bench.run import Check, OnCase, interleaved, sentence, summary, wrong
from flashedu.memory import Problem
from flashedu.memory.machine import UNCOUNTED
from flashedu.stages import flash2
from flashedu.stages.descriptors import columns
from flashedu.stages.flash2_tiles import Tile, Tiles

from triton.runtime.errors import OutOfResources

Candidates = Mapping[str, Sequence[tuple[int, int, int, int]]]  # kernel → tiles

# rows of q, rows of k, warps, copies in flight
CANDIDATES: Candidates = {
    "forward": (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 2),
        (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3),
    ),
    "dkdv": (
        (32, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2),
        (64, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2),
    ),
    "dq": (
        (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
        (128, 128, 8, 2),
    ),
}  # fmt: skip


def tune(
    problems: Sequence[Problem],
    device: Any,
    *,
    rounds: int,
    seed: int = 0,
    candidates: Candidates | None = None,
    on_case: OnCase,
) -> Iterator[dict[str, Any]]:
    """Time the candidates of each kernel on each problem, the best of the kernels before in place.

    dk/dv and dq are timed as the whole backward, of which one tile changes.
    """
    candidates = candidates or CANDIDATES
    steps = [(p, kernel) for p in problems for kernel in candidates]
    tiles: dict[Problem, Tiles] = {p: _start(p) for p in problems}
    for number, (p, kernel) in enumerate(steps):
        on_case(number, len(steps), f"{kernel} N {p.Nq} D {p.D} {'causal' if p.causal else 'full'}")
        found = _best(p, kernel, tiles[p], candidates[kernel], device, rounds, seed)
        if found["best"] is not None:
            tiles[p] = tiles[p]._replace(**{kernel: Tile(*found["best"])})
        yield found
        device.free()


def _start(p: Problem) -> Tiles:
    """Small enough for every card that has the dtype."""
    row_bytes = columns(p.D) * p.item_bytes
    rows = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return Tiles(*[Tile(rows, rows, 4, 2)] * 3)


def _best(
    p: Problem, kernel: str, tiles: Tiles, candidates: Sequence[tuple[int, int, int, int]],
    device: Any, rounds: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    inputs = device.draw(p, seed)
    check = Check(inputs, p, seed, gradients=kernel != "forward")
    first = {} if kernel == "forward" else _launch("forward", p, tiles, inputs, {})
    entries: list[dict[str, Any]] = []
    turns: dict[str, Callable[[], float]] = {}
    for candidate in candidates:
        with_it = tiles._replace(**{kernel: Tile(*candidate)})
        entry: dict[str, Any] = {"tile": list(candidate), "why": None, "extra_bytes": None}
        entries.append(entry)

        def call(with_it: Tiles = with_it) -> dict[str, Any]:
            return _launch(kernel, p, with_it, inputs, first)

        try:
            entry["why"] = wrong(check.errors({**first, **call()}))
        except OutOfResources as error:
            entry["why"] = f"does not fit the card: {sentence(error)}"
        except Exception as error:  # the compiler cannot do it: the others are tried all the same
            entry["why"] = sentence(error)
        if entry["why"] is None:
            turns[str(candidate)] = lambda call=call: device.seconds(call, wait=False)  # type: ignore[misc]
    times = interleaved(turns, rounds)
    for entry, candidate in zip(entries, candidates, strict=True):
        entry |= summary(times.get(str(candidate), []))
    timed = [entry for entry in entries if entry["median_s"] is not None]
    best = min(timed, key=lambda entry: entry["median_s"], default=None)
    return {
        "section": kernel,
        **{size: getattr(p, size) for size in ("B", "H", "D", "dtype", "causal")},
        "N": p.Nq,
        "columns": columns(p.D),
        "item_bytes": p.item_bytes,
        "checked": str(check),
        "best": best and best["tile"],
        "runs": entries,
    }


def _launch(
    kernel: str, p: Problem, tiles: Tiles, inputs: Sequence[Any], first: Mapping[str, Any]
) -> dict[str, Any]:
    """flash2's kernels with these tiles. `first`: o and lse, for the backward."""
    (q, k, v, do), scale = inputs, p.D**-0.5
    if kernel == "forward":
        o, lse = flash2.forward(q, k, v, p, scale, UNCOUNTED, tiles.forward)
        return {"o": o, "lse": lse}
    o, lse = first["o"], first["lse"]
    gradients = flash2.backward(do, None, q, k, v, o, lse, p, scale, UNCOUNTED, tiles)
    return dict(zip(("dq", "dk", "dv"), gradients, strict=True))
