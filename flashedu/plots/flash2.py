"""Figures of programs: which tiles of the scores each walks over, and when each SM is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from flashedu.memory.problem import Problem
from flashedu.memory.trace import Event
from flashedu.plots.style import FAINT, INK, SRAM, TENSOR, styled

MASKED = "#F3B58F"


def walks(
    trace: Sequence[Event],
    problem: Problem,
    kernels: Mapping[str, str],
    title: str,
    *,
    mark: int | None = None,
) -> Figure:
    """The N × N scores in tiles, each with the program of a Triton kernel that visits it.

    `trace`: of one head. `kernels`: name in the trace → what stands above its panel. `mark`: the
    program whose walk is drawn, with the tensors that stay and those that pass by; None for none.
    """
    with styled():
        n = len(kernels)
        fig, axes = plt.subplots(1, n, figsize=(8 if n == 1 else 4.4 * n, 4.4), squeeze=False)
        for ax, (kernel, above) in zip(axes[0], kernels.items(), strict=True):
            events = [event for event in trace if event.kernel == kernel]
            if not events:
                known = ", ".join(dict.fromkeys(event.kernel for event in trace))
                raise ValueError(f"kernels must be in the trace ({known}), got {kernel!r}")
            _panel(ax, events, problem, mark)
            ax.set_title(above, loc="center", fontweight="normal", fontsize=10.5)
        handles = [Patch(facecolor=TENSOR["s"], label="visited")]
        if mark is not None:
            handles = [Patch(facecolor=TENSOR["s"], label=f"visited by program {mark}"),
                       Patch(facecolor=FAINT, label="by the program of that number")]  # fmt: skip
        if problem.causal:
            handles += [Patch(facecolor=MASKED, label="visited, needs the mask"),
                        Patch(facecolor="white", edgecolor=INK, label="not visited")]  # fmt: skip
        if n == 1:
            axes[0][0].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1))
        else:
            fig.legend(handles=handles, loc="outside lower center", ncols=2)
        fig.suptitle(title, fontsize=11.5, fontweight="bold", x=0.02, ha="left")
    return fig


def _panel(ax: Any, events: Sequence[Event], p: Problem, mark: int | None) -> None:
    visited = _visits(events)
    for i in range(0, p.Nq, p.block_q):
        for j in range(0, p.Nk, p.block_k):
            program = visited.get((i, j))
            height, width = min(p.block_q, p.Nq - i), min(p.block_k, p.Nk - j)
            hidden = p.causal and j + width - 1 > i + p.Nk - p.Nq
            colour = MASKED if hidden else TENSOR["s"]
            if mark is not None and program != mark:
                colour = FAINT
            colour = "white" if program is None else colour
            ax.add_patch(Rectangle((j, i), width, height, facecolor=colour, edgecolor=INK,
                                   linewidth=0.8))  # fmt: skip
            if program is not None:
                ax.text(j + width / 2, i + height / 2, str(program), ha="center", va="center",
                        fontsize=9.5, fontweight="bold" if colour == TENSOR["s"] else "normal",
                        color="white" if colour == TENSOR["s"] else INK,
                        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})  # fmt: skip
    ax.set_xlim(0, 1.004 * p.Nk)
    ax.set_ylim(1.004 * p.Nq, 0)
    ax.set_aspect("equal")
    ax.set_xticks(range(0, p.Nk + 1, 2 * p.block_k))
    ax.set_yticks(range(0, p.Nq + 1, 2 * p.block_q))
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    if mark is not None:
        _arrows(ax, [tile for tile, program in visited.items() if program == mark], p)
        ax.set_xlabel(f"key\n{_described(events)}")


def _arrows(ax: Any, walk: Sequence[tuple[int, int]], p: Problem) -> None:
    """One along each run of neighbours: tiles that need the mask come last, wherever they are."""
    down = walk[0][1] == walk[-1][1]
    first = walk[0]
    for tile, then in zip(walk, [*walk[1:], (-1, -1)], strict=True):
        (i, j), bottom, right = tile, min(tile[0] + p.block_q, p.Nq), min(tile[1] + p.block_k, p.Nk)
        if then == ((bottom, j) if down else (i, right)):
            continue
        x, y = j + 0.16 * p.block_k, i + 0.84 * p.block_q
        start = (x, first[0] + 0.1 * p.block_q) if down else (first[1] + 0.1 * p.block_k, y)
        stop = (x, bottom - 0.1 * p.block_q) if down else (right - 0.1 * p.block_k, y)
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", stop, start, arrowprops=arrow)
        first = then


def _described(events: Sequence[Event]) -> str:
    """What stays with a program, what passes by, and what it stores."""
    loads = [event.tensor for event in events if event.op == "load"]
    programs = len({event.step for event in events})
    stay = [name for name in dict.fromkeys(loads) if loads.count(name) == programs]
    pass_by = [name for name in dict.fromkeys(loads) if loads.count(name) > programs]
    stored = dict.fromkeys(event.tensor for event in events if event.op == "store")
    return (
        f"loaded once: {', '.join(stay)}\npass by: {', '.join(pass_by)}\n"
        f"stored once: {', '.join(stored)}"
    )


def _visits(events: Sequence[Event]) -> dict[tuple[int, int], int]:
    """(query tile, key tile), by their first rows → program, in order.

    Of q and k, what a program loads first stays with it, and each load of the other is a visit.
    """
    moves = [event for event in events if event.op == "load" and event.tensor in ("q", "k")]
    first_step, stays = moves[0].step, moves[0].tensor
    at = {"q": 0, "k": 0}
    found: dict[tuple[int, int], int] = {}
    for event in moves:
        at[event.tensor] = event.start
        if event.tensor != stays:
            tile, program = (at["q"], at["k"]), event.step - first_step
            if found.setdefault(tile, program) != program:
                raise ValueError(
                    f"trace must be of one head, got programs {found[tile]} and {program} at the "
                    f"tile of query {tile[0]} and key {tile[1]}"
                )
    return found


def waiting(finish: Mapping[str, Sequence[float]], ideal: float, unit: str, title: str) -> Figure:
    """When each SM is done, from the last to the first, one panel for each order of the programs.

    `finish`: label → a time for each SM, in `unit`. `ideal`: the time if all were shared evenly.
    """
    with styled():
        fig, axes = plt.subplots(1, len(finish), figsize=(8.8, 3.4), sharey=True, squeeze=False)
        latest = max(max(times) for times in finish.values())
        for ax, (label, times) in zip(axes[0], finish.items(), strict=True):
            at = np.arange(len(times))
            heights = np.sort(np.asarray(times, dtype=float))[::-1]
            ax.bar(at, heights, width=1, color=SRAM, align="edge", label="busy")
            ax.bar(at, heights[0] - heights, width=1, bottom=heights, color=FAINT,
                   align="edge", label="waiting for the last")  # fmt: skip
            ax.axhline(ideal, color=INK, linestyle="--", linewidth=1.2)
            ax.text(2, ideal, f"evenly shared: {ideal:,.0f}", va="top", color="white",
                    bbox={"facecolor": SRAM, "edgecolor": "none", "pad": 1.5},
                    zorder=1.5)  # fmt: skip
            ax.set_xlim(0, len(times))
            ax.set_ylim(0, 1.18 * latest)
            ax.set_xlabel("SM, from the last to be done to the first")
            ax.set_title(f"{label}: {heights[0]:,.0f}", fontweight="normal", fontsize=10.5)
        axes[0][0].set_ylabel(unit)
        axes[0][-1].legend(loc="upper right", ncols=2)
        fig.suptitle(title, fontsize=11.5, fontweight="bold", x=0.02, ha="left")
    return fig
