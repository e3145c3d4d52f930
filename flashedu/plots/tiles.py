"""Figures of the score matrix: when each tile is computed, in which order, by which program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from flashedu.memory.problem import Problem
from flashedu.memory.trace import Event, Visit
from flashedu.memory.trace import visits as visits_of
from flashedu.plots.style import Look, headline, styled

FEW = 144  # so many tiles have room for numbers


def visits(trace: Sequence[Event], problem: Problem, title: str) -> Figure:
    """The N × N scores in tiles, coloured by when a trace of one head computed them first.

    Tiles that were never computed are blank, and a stroke marks those that the causal mask cuts. Up
    to 144 tiles have the numbers of all their turns. Raises ValueError for a stage without tiles.
    """
    p, turns = problem, _turns(trace)
    rows, columns = -(-p.Nq // p.block_q), -(-p.Nk // p.block_k)
    first = np.ma.masked_all((rows, columns))
    for (i, j), found in turns.items():
        first[i // p.block_q, j // p.block_k] = found[0]
    last = max(map(max, turns.values()), default=1)
    with styled() as look:
        fig, (ax, side) = plt.subplots(1, 2, figsize=(8, 4.4), width_ratios=(4.2, 1))
        few = rows * columns <= FEW
        x = np.minimum(np.arange(columns + 1) * p.block_k, p.Nk)
        y = np.minimum(np.arange(rows + 1) * p.block_q, p.Nq)
        grey, width, above = (look.ink, 0.8, 3) if few else (look.muted, 0.3, 0)
        ax.vlines(x, 0, p.Nq, color=grey, linewidth=width, zorder=above)
        ax.hlines(y, 0, p.Nk, color=grey, linewidth=width, zorder=above)
        mesh = ax.pcolormesh(x, y, first, cmap=look.turn_map, norm=Normalize(1, max(2, last)))
        if few:
            colours = mesh.to_rgba(first)
            for (i, j), found in turns.items():
                colour = colours[i // p.block_q, j // p.block_k]
                middle = (min(j + p.block_k, p.Nk) + j) / 2, (min(i + p.block_q, p.Nq) + i) / 2
                ax.text(*middle, ", ".join(map(str, found)), ha="center", va="center",
                        fontweight="bold", zorder=5, color=look.text_on(colour),
                        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})  # fmt: skip
        cut = [tile for tile in turns if _is_masked(p, *tile)]
        corners = [[(j, i), (min(j + p.block_k, p.Nk), min(i + p.block_q, p.Nq))] for i, j in cut]
        ax.add_collection(LineCollection(corners, colors=look.ink, linewidths=1.2, zorder=4))
        _axes(ax, p)
        again = max(map(len, turns.values()), default=1) > 1
        bar = fig.colorbar(mesh, cax=side.inset_axes((0, 0.02, 0.15, 0.53)))
        bar.ax.invert_yaxis()
        bar.set_ticks([1, last], labels=["turn 1", f"turn {last:,}"])
        bar.ax.tick_params(length=0)
        bar.ax.set_title("first computed at" if again else "computed at", fontsize=10.5,
                         fontweight="normal", pad=8, loc="left")  # fmt: skip
        if p.causal:
            stroke = Line2D([], [], color=look.ink, linewidth=1.2, label="partly masked")
            blank = Patch(facecolor=look.paper, edgecolor=grey, label="skipped")
            side.legend(handles=[stroke, blank], loc="upper left", borderpad=0, borderaxespad=0)
        side.axis("off")
        ax.set_anchor("E")
        ax.set_title(title)
    return fig


def loop_orders(
    traces: Mapping[str, Sequence[Event]], block_q: int, block_k: int, title: str
) -> Figure:
    """The tiles of S of one head, a grid a trace, each with its turn; each is computed once."""
    with styled() as look:
        fig, axes = plt.subplots(1, len(traces), figsize=(8, 3.3), squeeze=False)
        for ax, (label, trace) in zip(axes[0], traces.items(), strict=True):
            turns = visited_tiles(trace)
            for turn, (i, j, *_) in enumerate(turns, 1):
                ax.add_patch(Rectangle((j, i), block_k, block_q, facecolor=look.masked,
                                       edgecolor=look.paper, linewidth=2))  # fmt: skip
                ax.text(j + 0.5 * block_k, i + 0.5 * block_q, str(turn), ha="center", va="center",
                        fontweight="bold", zorder=5, color=look.text_on(look.masked),
                        bbox={"facecolor": look.masked, "edgecolor": "none", "pad": 1})  # fmt: skip
            ax.plot([j + 0.5 * block_k for _, j, *_ in turns],
                    [i + 0.5 * block_q for i, *_ in turns],
                    color=look.ink, linewidth=1.3, zorder=3)  # fmt: skip
            Nq, Nk = max(i for i, *_ in turns), max(j for _, j, *_ in turns)
            ax.set_xticks(range(0, Nk + block_k + 1, block_k))
            ax.set_yticks(range(0, Nq + block_q + 1, block_q))
            ax.set_xlim(0, 1.01 * (Nk + block_k))
            ax.set_ylim(1.01 * (Nq + block_q), 0)
            ax.set_aspect("equal")
            ax.set_xlabel("key")
            ax.set_ylabel("query")
            ax.set_title(label, fontweight="normal", fontsize=10.5)
        headline(fig, title)
    return fig


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
    with styled() as look:
        n = len(kernels)
        fig, axes = plt.subplots(1, n, figsize=(8 if n == 1 else 4.4 * n, 4.4), squeeze=False)
        for ax, (kernel, above) in zip(axes[0], kernels.items(), strict=True):
            events = [event for event in trace if event.kernel == kernel]
            if not events:
                known = ", ".join(dict.fromkeys(event.kernel for event in trace))
                raise ValueError(f"kernels must be in the trace ({known}), got {kernel!r}")
            _walk(ax, look, events, problem, mark)
            ax.set_title(above, loc="center", fontweight="normal", fontsize=10.5)
        handles = [Patch(facecolor=look.tensor["s"], label="visited")]
        if mark is not None:
            handles = [
                Patch(facecolor=look.tensor["s"], label=f"visited by program {mark}"),
                Patch(facecolor=look.faint, label="by the program of that number"),
            ]
        if problem.causal:
            handles += [
                Patch(facecolor=look.masked, label="visited, needs the mask"),
                Patch(facecolor=look.paper, edgecolor=look.ink, label="not visited"),
            ]
        columns = len(handles) if n == 1 else 2
        fig.legend(handles=handles, loc="outside lower center", ncols=columns)
        headline(fig, title)
    return fig


def _walk(ax: Any, look: Look, events: Sequence[Event], p: Problem, mark: int | None) -> None:
    first_step = events[0].step
    visited: dict[tuple[int, int], int] = {}
    for i, j, step, _ in visited_tiles(events):
        program = step - first_step
        if visited.setdefault((i, j), program) != program:
            raise ValueError(
                f"trace must be of one head, got programs {visited[i, j]} and {program} at the "
                f"tile of query {i} and key {j}"
            )
    for i in range(0, p.Nq, p.block_q):
        for j in range(0, p.Nk, p.block_k):
            shown = visited.get((i, j))
            height, width = min(p.block_q, p.Nq - i), min(p.block_k, p.Nk - j)
            colour = look.masked if _is_masked(p, i, j) else look.tensor["s"]
            if mark is not None and shown != mark:
                colour = look.faint
            colour = look.paper if shown is None else colour
            ax.add_patch(Rectangle((j, i), width, height, facecolor=colour, edgecolor=look.ink,
                                   linewidth=0.8))  # fmt: skip
            if shown is not None:
                ax.text(j + width / 2, i + height / 2, str(shown), ha="center", va="center",
                        fontweight="bold" if colour == look.tensor["s"] else "normal",
                        color=look.text_on(colour),
                        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})  # fmt: skip
    _axes(ax, p)
    ax.set_xticks(range(0, p.Nk + 1, 2 * p.block_k))
    ax.set_yticks(range(0, p.Nq + 1, 2 * p.block_q))
    if mark is not None:
        _arrows(ax, look, [tile for tile, program in visited.items() if program == mark], p)
        ax.set_xlabel(f"key\n{_described(events)}")


def _arrows(ax: Any, look: Look, walk: Sequence[tuple[int, int]], p: Problem) -> None:
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
        arrow = {"arrowstyle": "-|>", "color": look.ink, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
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


def _turns(trace: Sequence[Event]) -> dict[tuple[int, int], list[int]]:
    """(first query, first key) of a tile → its turns."""
    turns: dict[tuple[int, int], list[int]] = {}
    is_triton = not any(event.sram_bytes for event in trace)
    for turn, (i, j, *_) in enumerate(visited_tiles(trace), 1):
        if is_triton and (i, j) in turns:
            raise ValueError(
                f"trace must be of one kernel and one head, got the tile of query {i} and key {j} "
                f"twice"
            )
        turns.setdefault((i, j), []).append(turn)
    return turns


def _is_masked(p: Problem, i: int, j: int) -> bool:
    """Whether some query of the tile does not see some key of it."""
    return p.causal and min(j + p.block_k, p.Nk) - 1 > i + p.Nk - p.Nq


def _axes(ax: Any, p: Problem) -> None:
    ax.set_xlim(0, 1.004 * p.Nk)
    ax.set_ylim(1.004 * p.Nq, 0)
    ax.set_aspect("equal")
    ax.set_xlabel("key")
    ax.set_ylabel("query")


def visited_tiles(trace: Sequence[Event]) -> list[Visit]:
    """In order. Raises ValueError for a stage that works on whole matrices."""
    for event in trace:
        if event.tensor == "s" and event.op != "hold":
            raise ValueError(
                f"trace must be of a stage that works in tiles, got {event.kernel!r}, which moves "
                f"the whole of s; tiled, online, flash1 or flash2 would do"
            )
    return visits_of(trace)
