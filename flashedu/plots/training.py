"""Figures of training: the loss, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flashedu.plots.style import headline, styled


def losses(curves: Mapping[str, Sequence[float]], bound: float, title: str) -> Figure:
    """The loss of two runs of training, one as a line and one as rings; below, their difference.

    `bound`: what the difference may be.
    """
    (first, line), (second, rings) = curves.items()
    steps = range(1, len(line) + 1)
    with styled() as look:
        fig, (ax, below) = plt.subplots(2, 1, figsize=(8, 4.4), sharex=True, height_ratios=(2.2, 1))
        ax.plot(steps, line, color=look.ink, linewidth=1.6, marker="", label=first)
        ax.plot(steps, rings, color=look.sram, linestyle="", marker="o", markerfacecolor="none",
                markersize=6, markevery=2, label=second)  # fmt: skip
        ax.set_ylabel("loss")
        ax.set_ylim(bottom=0)
        ax.legend(loc="lower left")
        off = [max(abs(a - b), 1e-8) for a, b in zip(line, rings, strict=True)]
        below.plot(steps, off, color=look.sram, marker="", linewidth=1.4)
        below.axhline(bound, color=look.ink, linewidth=1, linestyle="--")
        below.text(1, bound, "may be", va="top", fontsize=9.5)
        below.set_yscale("log")
        below.set_ylim(1e-8, 10 * max(bound, *off))
        below.minorticks_off()
        below.set_ylabel("difference")
        below.set_xlabel("step")
        headline(fig, title)
    return fig
