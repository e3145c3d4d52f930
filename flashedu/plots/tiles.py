"""Figures of the score matrix: which tiles are computed, and one row of it as it grows."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from flashedu.memory.problem import Problem
from flashedu.memory.trace import Event
from flashedu.plots.style import FAINT, INK, TENSOR, styled


def visits(trace: Sequence[Event], problem: Problem, title: str) -> Figure:
    """The N × N scores in tiles, each with the order in which a trace computed it.

    Tiles that were never computed are blank; one computed more than once shows each time.
    """
    order: dict[tuple[int, int], list[int]] = {}
    row, computed = 0, 0
    for event in trace:
        if event.tensor == "q":
            row = event.start
        if event.tensor == "k":
            computed += 1
            order.setdefault((row, event.start), []).append(computed)
    with styled():
        fig, ax = plt.subplots(figsize=(8, 4.4))
        for i in range(0, problem.Nq, problem.block_q):
            for j in range(0, problem.Nk, problem.block_k):
                times = order.get((i, j))
                height = min(problem.block_q, problem.Nq - i)
                width = min(problem.block_k, problem.Nk - j)
                hidden = problem.causal and j + width - 1 > i + problem.Nk - problem.Nq
                colour = "white" if times is None else "#F3B58F" if hidden else TENSOR["s"]
                ax.add_patch(Rectangle((j, i), width, height, facecolor=colour,
                                       edgecolor=INK, linewidth=0.8))  # fmt: skip
                if times is not None:
                    text = ", ".join(map(str, times))
                    ax.text(j + width / 2, i + height / 2, text, ha="center", va="center",
                            fontweight="bold", fontsize=9, zorder=5,
                            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})  # fmt: skip
        if problem.causal:
            seen = np.clip(np.arange(problem.Nq) + problem.Nk - problem.Nq + 1, 0, problem.Nk)
            edges = np.repeat(np.arange(problem.Nq + 1), 2)[1:-1]
            ax.plot(np.repeat(seen, 2), edges, color=INK, linewidth=1.2)
        ax.set_xlim(0, 1.004 * problem.Nk)
        ax.set_ylim(1.004 * problem.Nq, 0)
        ax.set_aspect("equal")
        ax.set_xlabel("key")
        ax.set_ylabel("query")
        handles = [Patch(facecolor=TENSOR["s"], label="computed")]
        if problem.causal:
            handles += [Patch(facecolor="#F3B58F", label="computed, partly masked"),
                        Patch(facecolor="white", edgecolor=INK, label="skipped")]  # fmt: skip
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1))
        ax.set_title(title)
    return fig


def running_state(
    scores: Sequence[float], m: Sequence[float], l: Sequence[float], block_k: int, title: str
) -> Figure:
    """One row: its scores, and the running maximum m and sum l after each tile of keys."""
    with styled():
        fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True)
        n = len(scores)
        top.bar(np.arange(n) + 0.5, scores, width=0.7, color=TENSOR["s"], label="scores s")
        edges = np.minimum(np.arange(1, len(m) + 1) * block_k, n)
        top.step(np.r_[0, edges], np.r_[m[0], m], where="pre", color=TENSOR["m"], linewidth=2.6,
                 label="running maximum m")  # fmt: skip
        bottom.step(np.r_[0, edges], np.r_[l[0], l], where="pre", color=TENSOR["l"], linewidth=2.6)
        for ax in (top, bottom):
            for edge in edges[:-1]:
                ax.axvline(edge, color=FAINT, zorder=0)
        top.set_ylabel("score")
        top.legend(loc="upper left", ncols=2)
        top.set_ylim(top=1.35 * max(scores))
        bottom.set_ylabel("running sum l")
        bottom.set_xlabel(f"key (a line ends a tile of {block_k})")
        top.set_title(title)
    return fig
