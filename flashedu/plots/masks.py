"""Figures of masks: which keys each query sees, and what padding computes for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon, Rectangle

from flashedu.plots.style import Look, headline, styled


def runs(
    panels: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    Nk: int,
    title: str,
    *,
    numbers: bool = True,
) -> Figure:
    """The Nq × Nk mask of each panel, a square for each key that a query sees.

    `panels`: label → the runs, first and stop of each query. `numbers`: write them beside the rows.
    """
    with styled() as look:
        fig, axes = plt.subplots(1, len(panels), figsize=(8.8, 2.9), squeeze=False)
        for ax, (label, (firsts, stops)) in zip(axes[0], panels.items(), strict=True):
            Nq = len(firsts)
            for i, (first, stop) in enumerate(zip(firsts, stops, strict=True)):
                for j in range(Nk):
                    colour = look.tensor["s"] if first <= j < stop else look.paper
                    ax.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor=look.muted,
                                           linewidth=0.6))  # fmt: skip
                if numbers:
                    for x, number in ((1.2, first), (2.8, stop)):
                        ax.text(Nk + x, i + 0.5, str(number), ha="center", va="center")
            if numbers:
                for x, word in ((0.9, "first"), (3.1, "stop")):
                    ax.text(Nk + x, -0.3, word, ha="center", va="bottom", fontsize=9.9)
            ax.set_xlim(0, Nk + (4.2 if numbers else 0.05))
            ax.set_ylim(Nq + 0.05, -1.2 if numbers else -0.05)
            ax.set_aspect("equal", anchor="NW")
            ax.axis("off")
            ax.set_title(label, fontsize=10.5, fontweight="normal")
        fig.legend(
            handles=[Patch(facecolor=look.tensor["s"], label="the query of this row sees the key"),
                     Patch(facecolor=look.paper, edgecolor=look.muted, label="it does not")],
            loc="outside lower center", ncols=2,
        )  # fmt: skip
        headline(fig, title)
    return fig


def padded_and_packed(lengths: Sequence[int], title: str) -> Figure:
    """Causal scores of texts of these lengths, in areas to one scale: padded, and packed.

    Left, a square of the longest for each text. Right, all texts one behind another: nothing but
    the triangles on the diagonal is computed.
    """
    longest, total = max(lengths), sum(lengths)
    columns = -(-len(lengths) // 2)
    with styled() as look:
        gap = 0.06 * longest
        wide = columns * (longest + gap) - gap
        fig, (left, right) = plt.subplots(1, 2, figsize=(8.8, 4.6), width_ratios=(wide, total))
        for turn, n in enumerate(lengths):
            x = turn % columns * (longest + gap)
            y = turn // columns * (longest + gap)
            _triangle(left, x, y, longest, facecolor=look.faint, hatch="////",
                      edgecolor=look.muted, linewidth=0)  # fmt: skip
            _text(left, look, x, y, n)
            left.add_patch(Rectangle((x, y), longest, longest, fill=False, edgecolor=look.muted,
                                     linewidth=0.8))  # fmt: skip
        at = 0
        for n in lengths:
            _text(right, look, at, at, n)
            at += n
        right.add_patch(Rectangle((0, 0), total, total, fill=False, edgecolor=look.muted,
                                  linewidth=0.8))  # fmt: skip
        high = max(total, 2 * longest + gap)
        for ax, width, label in ((left, wide, f"padded: {len(lengths)} × {longest} tokens"),
                                 (right, total, f"packed: {total} tokens")):  # fmt: skip
            ax.set_xlim(-0.01 * total, width + 0.01 * total)
            ax.set_ylim(1.01 * high, -0.01 * high)
            ax.set_aspect("equal")
            ax.axis("off")
            ax.set_title(label, fontsize=10.5, fontweight="normal")
        fig.legend(
            handles=[Patch(facecolor=look.tensor["s"], label="scores of a text"),
                     Patch(facecolor=look.faint, hatch="////", edgecolor=look.muted, linewidth=0,
                           label="computed for padding"),
                     Patch(facecolor=look.paper, edgecolor=look.muted, label="not computed")],
            loc="outside lower center", ncols=3,
        )  # fmt: skip
        headline(fig, title)
    return fig


def _text(ax: Any, look: Look, x: float, y: float, n: int) -> None:
    colour = look.tensor["s"]
    _triangle(ax, x, y, n, facecolor=colour, linewidth=0)
    ax.text(x + 0.3 * n, y + 0.7 * n, str(n), ha="center", va="center", fontweight="bold",
            fontsize=10, color=look.text_on(colour),
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.5})  # fmt: skip


def _triangle(ax: Any, x: float, y: float, n: int, **how: Any) -> None:
    ax.add_patch(Polygon([(x, y), (x, y + n), (x + n, y + n)], **how))
