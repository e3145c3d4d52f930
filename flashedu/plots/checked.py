"""Figures that hold numbers against each other: formulas, counts, a card's, ours, a paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from flashedu.plots.style import headline, styled
from flashedu.units import human_bytes

if TYPE_CHECKING:
    from flashedu.bench.published import Claim


def predicted_counted_measured(
    kernels: Mapping[str, Mapping[str, tuple[float, float | None, float]]], title: str
) -> Figure:
    """Points: the bytes that each kernel moves, by formula, as counted and as a card measured them.

    `kernels`: kernel → label, such as its tile → bytes predicted, counted (None: not counted) and
    measured. Measured over predicted stands at the right. Where all agree, the cross and the dot
    are in the ring.
    """
    rows = [(kernel, label, found) for kernel, labels in kernels.items()
            for label, found in ((None, None), *labels.items())]  # fmt: skip
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 1.3 + 0.245 * len(rows)))
        ink: dict[str, Any] = {"color": look.ink, "linestyle": "none"}
        marks: tuple[dict[str, Any], ...] = (
            ink | {"marker": "o", "markersize": 11, "markerfacecolor": "none",
                   "label": "predicted"},
            ink | {"marker": "x", "markersize": 8, "markeredgewidth": 1.3, "label": "counted"},
            {"color": look.sram, "linestyle": "none", "marker": "o", "markersize": 5.5,
             "label": "measured"},
        )  # fmt: skip
        for y, (_, label, found) in enumerate(rows):
            if label is None or found is None:
                continue
            there = [n_bytes for n_bytes in found if n_bytes is not None]
            ax.hlines(y, min(there), max(there), color=look.muted, linewidth=1)
            for n_bytes, mark in zip(found, marks, strict=True):
                if n_bytes is not None:
                    ax.plot(n_bytes, y, **mark)
            ax.text(1.02, y, f"{100 * found[2] / found[0]:.1f}%", va="center",
                    transform=ax.get_yaxis_transform())  # fmt: skip
        ax.set_xscale("log", base=2)
        low, high = ax.get_xlim()
        ax.set_xlim(low / 1.3, high * 1.3)
        _byte_ticks(ax)
        ax.set_yticks(range(len(rows)), [label or kernel for kernel, label, _ in rows])
        for tick, (_, label, _) in zip(ax.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("normal" if label else "bold")
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(rows) - 0.5, -0.6)
        for y, (_, label, _) in enumerate(rows):
            if label:
                ax.axhline(y, color=look.faint, linewidth=0.6, zorder=0)
        ax.text(1.02, 1.01, "measured /\npredicted", va="bottom", transform=ax.transAxes)
        ax.set_xlabel("bytes moved")
        handles = [Line2D([], [], **mark) for mark in marks]
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3,
                  borderaxespad=0.2)  # fmt: skip
        ax.set_title(title, pad=30)
    return fig


def l2_and_dram(
    rows: Mapping[str, Mapping[str, float]], compulsory_bytes: float, title: str
) -> Figure:
    """Bars: what a kernel's SMs read and write, and beside it what its DRAM does.

    `rows`: label → bytes "sm_read", "sm_written", "dram_read" and "dram_written". A line marks
    `compulsory_bytes`: each input once, the output once. Each panel has a scale of its own.
    """
    with styled() as look:
        fig, axes = plt.subplots(
            1, 2, figsize=(8, 1.7 + 0.36 * len(rows)), sharey=True, width_ratios=(1.3, 1)
        )
        panels = (("sm", look.sram, "into and out of the SMs, through L2"),
                  ("dram", look.hbm, "read from and written to DRAM"))  # fmt: skip
        for ax, (place, colour, above) in zip(axes, panels, strict=True):
            largest = compulsory_bytes
            for y, found in enumerate(rows.values()):
                read, written = found[f"{place}_read"], found[f"{place}_written"]
                for left, width, hatch in ((0, read, ""), (read, written, "////")):
                    ax.barh(y, width / 2**20, left=left / 2**20, height=0.7, color=colour,
                            hatch=hatch, edgecolor=look.paper, linewidth=0.8)  # fmt: skip
                ax.annotate(human_bytes(read + written), ((read + written) / 2**20, y),
                            xytext=(5, 0), textcoords="offset points", va="center",
                            bbox={"facecolor": look.paper, "edgecolor": "none",
                                  "pad": 0.8})  # fmt: skip
                largest = max(largest, read + written)
            ax.axvline(compulsory_bytes / 2**20, color=look.ink, linestyle="--", linewidth=1.2)
            ax.set_xlim(0, 1.3 * largest / 2**20)
            ax.set_xlabel("MiB")
            ax.set_title(above, fontsize=10.5, fontweight="normal")
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        axes[0].set_yticks(range(len(rows)), list(rows))
        axes[0].set_ylim(len(rows) - 0.45, -0.55)
        grey: dict[str, Any] = {"facecolor": look.muted, "edgecolor": look.paper}
        line = Line2D([], [], color=look.ink, linestyle="--", linewidth=1.2,
                      label=f"compulsory, {human_bytes(compulsory_bytes)}")  # fmt: skip
        fig.legend(
            handles=[Patch(**grey, label="read"), Patch(**grey, hatch="////", label="written"),
                     line],
            loc="outside lower center", ncols=3,
        )  # fmt: skip
        headline(fig, title)
    return fig


def against_published(claims: Sequence[Claim], title: str) -> Figure:
    """Bars: what a paper says of each claim, and on them what was measured here, on a log axis.

    Open marks: less. Half open: in part. Crosses: another thing was measured.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(9.2, 1.3 + 0.42 * len(claims)))
        grey = look.stage["tiled"]
        fill = {"in part": "left", "less": "none", "another thing": "none"}
        for y, claim in enumerate(claims):
            ax.plot(claim.published, [y, y], color=grey, linewidth=9, zorder=1, marker="o",
                    markersize=14, markeredgewidth=0)  # fmt: skip
            ax.plot(claim.ours, [y, y], color=look.ink, linewidth=1.4, zorder=3, markersize=8,
                    marker="X" if claim.reproduced == "another thing" else "D",
                    fillstyle=fill.get(claim.reproduced, "full"),
                    markerfacecoloralt=look.paper)  # fmt: skip
            text = f"{claim.reproduced}: {_ends(claim.published)}, ours {_ends(claim.ours)}"
            ax.text(1.02, y, text, va="center", transform=ax.get_yaxis_transform())
            ax.axhline(y, color=look.faint, linewidth=0.6, zorder=0)
        ax.set_xscale("log", base=2)
        low, high = ax.get_xlim()
        ax.set_xlim(low / 1.15, high * 1.15)
        ticks = [tick for tick in (4.0**e for e in range(-3, 10)) if low <= tick <= high]
        ax.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_yticks(range(len(claims)), [claim.what for claim in claims])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(claims) - 0.4, -0.6)
        ax.set_xlabel("ratio")
        ax.text(1.02, 1.0, "reproduced?", va="bottom", fontweight="bold", transform=ax.transAxes)
        ink: dict[str, Any] = {"color": look.ink, "linewidth": 1.4, "markersize": 7}
        ax.legend(
            handles=[Line2D([], [], color=grey, linewidth=7, label="published"),
                     Line2D([], [], marker="D", label="ours", **ink)],
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2,
        )  # fmt: skip
        headline(fig, title)
    return fig


def _ends(values: tuple[float, float]) -> str:
    low, high = (f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in values)
    return low if low == high else f"{low} to {high}"


def _byte_ticks(ax: Any) -> None:
    low, high = np.log2(ax.get_xlim())
    step = max(1, round((high - low) / 6))
    ticks = [2.0**e for e in range(int(np.ceil(low)), int(high) + 1) if e % step == 0]
    ax.set_xticks(ticks, [human_bytes(tick) for tick in ticks])
    ax.minorticks_off()
