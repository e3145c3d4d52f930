"""Figures of bytes: by tensor and direction, over a run, against SRAM, tiles and N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from flashedu.memory.gpus import GPU
from flashedu.memory.trace import Event
from flashedu.plots.style import STAGE_MARKER, spread, styled
from flashedu.units import human_bytes

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def traffic(
    stages: Mapping[str, Mapping[str, tuple[int, int]]], title: str, *, unit_bytes: int = 2**20
) -> Figure:
    """Bars: bytes that each stage moves, by tensor, what is read and (hatched) what is written.

    `stages`: label → tensor → (bytes read, bytes written), as `Machine.bytes_by_tensor` gives.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 0.9 + 0.72 * len(stages)))
        totals = [sum(r + w for r, w in tensors.values()) for tensors in stages.values()]
        for row, tensors in enumerate(stages.values()):
            left = 0.0
            for name, moved in tensors.items():
                colour = look.colour_of(name)
                for n_bytes, hatch in zip(moved, ("", "////"), strict=True):
                    if not n_bytes:
                        continue
                    width = n_bytes / unit_bytes
                    ax.barh(
                        row, width, left=left, height=0.66, color=colour, hatch=hatch,
                        edgecolor=look.paper, linewidth=0.8,
                    )  # fmt: skip
                    if n_bytes > 0.035 * max(totals):
                        ax.text(
                            left + width / 2, row, name, ha="center", va="center",
                            color=look.text_on(colour), fontweight="bold",
                            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
                        )  # fmt: skip
                    left += width
            ax.text(left, row, f"  {human_bytes(totals[row])}", va="center")
        ax.set_yticks(range(len(stages)), list(stages))
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlim(0, 1.13 * max(totals) / unit_bytes)
        unit = human_bytes(unit_bytes).split()[1]
        ax.set_xlabel(f"bytes moved between HBM and SRAM ({unit})", loc="left")
        ax.legend(
            handles=[Patch(facecolor=look.muted, label="read"),
                     Patch(facecolor=look.muted, hatch="////", edgecolor=look.paper,
                           label="written")],
            loc="upper right", bbox_to_anchor=(1, 0), ncols=2, borderaxespad=2,
        )  # fmt: skip
        ax.set_title(title)
    return fig


def cumulative_traffic(traces: Mapping[str, Sequence[Event]], title: str) -> Figure:
    """Curves: HBM bytes so far over the run, and, dashed, those read; the rest was written.

    `traces`: label, beginning with the stage's name → its trace. A run is as long as its trace has
    events, and all are drawn equally long.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4.2))
        largest = human_bytes(max(sum(event.hbm_bytes for event in t) for t in traces.values()))
        unit = largest.split()[-1]
        ends, labels = [], []
        for turn, (label, trace) in enumerate(traces.items()):
            name = label.split()[0]
            read, written = (
                np.cumsum([0, *(event.hbm_bytes * (event.op == op) for event in trace)])
                for op in ("load", "store")
            )
            n, moved = len(trace), read + written
            labels.append(f"{label} {human_bytes(moved[-1])}, {human_bytes(written[-1])} written")
            read, moved = read / UNITS[unit], moved / UNITS[unit]
            share = 100 * np.arange(n + 1) / n
            ax.step(share, read, where="post", color=look.stage[name], linestyle="--",
                    linewidth=1.1)  # fmt: skip
            # Markers of lines that coincide stand side by side.
            at = np.unique(np.linspace(0, n, 7).astype(int))[1:] - (turn * n // 40 if n > 60 else 0)
            ax.step(share, moved, where="post", color=look.stage[name], marker=STAGE_MARKER[name],
                    markevery=list(at), markersize=7, markeredgecolor=look.ink,
                    clip_on=False)  # fmt: skip
            ends.append(float(moved[-1]))
        top = 1.06 * max(ends)
        places = spread(ends, 0.062 * top)
        lift = max(0.0, 0.025 * top - min(places))
        for end, place, label in zip(ends, places, labels, strict=True):
            line = {"arrowstyle": "-", "color": look.muted, "linewidth": 0.7, "shrinkB": 3}
            ax.annotate(label, (100, end), xytext=(104, place + lift), va="center",
                        annotation_clip=False, arrowprops=line)  # fmt: skip
        ax.legend(
            handles=[Line2D([], [], color=look.muted, label="moved"),
                     Line2D([], [], color=look.muted, linestyle="--", linewidth=1.1,
                            label="read")],
            loc="upper left",
        )  # fmt: skip
        ax.set_xlim(0, 100)
        ax.set_ylim(0, top)
        ax.set_xlabel("share of the run's events (%)")
        ax.set_ylabel(f"HBM bytes so far ({unit})")
        ax.set_title(title)
    return fig


def traffic_against_sram(
    sram_bytes: Sequence[int],
    stages: Mapping[str, Sequence[int]],
    theory: Sequence[float],
    cards: Sequence[GPU],
    title: str,
) -> Figure:
    """Curves: HBM bytes of each stage against the SRAM that it may fill, beside Θ(N²d²/M).

    `stages`: label, beginning with the stage's name → bytes, one for each of `sram_bytes`.
    `theory`: the theorem's curve at the same sizes, in bytes. `cards` are marked on the axis.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4))
        x = np.array(sram_bytes) / 1024
        ax.loglog(x, np.array(theory) / 2**20, color=look.ink, linestyle=":", linewidth=1.3)
        middle = len(x) // 2
        ax.annotate(
            "N²d²/M, the theorem's slope", (x[middle], theory[middle] / 2**20), xytext=(-8, -14),
            textcoords="offset points", ha="right",
        )  # fmt: skip
        for label, n_bytes in stages.items():
            name = label.split()[0]
            y = np.array(n_bytes) / 2**20
            ax.loglog(x, y, color=look.stage[name], marker=STAGE_MARKER[name], label=label)
        low = ax.get_ylim()[0]
        for card in cards:
            at = card.sram_bytes_per_program / 1024
            ax.axvline(at, color=look.faint, zorder=0)
            ax.text(at, 1, f"{card.name} ", rotation=90, va="top", ha="right", fontsize=9,
                    transform=ax.get_xaxis_transform())  # fmt: skip
        ax.set_xlabel("SRAM that one program may fill, M (KiB)")
        ax.set_ylabel("HBM traffic (MiB)")
        ax.set_xticks(x, [f"{value:.0f}" for value in x])
        ticks = [2.0**e for e in range(30) if low / 2 < 2.0**e < ax.get_ylim()[1]]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_ylim(bottom=low)
        ax.minorticks_off()
        ax.legend(loc="lower left")
        ax.set_title(title)
    return fig


def traffic_against_tile(
    tiles: Sequence[int], stages: Mapping[str, Sequence[int]], xlabel: str, title: str
) -> Figure:
    """Curves: HBM bytes of each stage against a tile size, each named at its right end.

    `stages`: label, beginning with the stage's name → bytes, one for each of `tiles`.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4))
        for label, n_bytes in stages.items():
            name = label.split()[0]
            y = np.array(n_bytes) / 2**20
            ax.loglog(tiles, y, color=look.stage[name], marker=STAGE_MARKER[name], markersize=7)
            ax.annotate(f"{label}: {human_bytes(n_bytes[-1])}", (tiles[-1], y[-1]), xytext=(9, 0),
                        textcoords="offset points", va="center", fontweight="bold")  # fmt: skip
        ticks = [2.0**e for e in range(30) if ax.get_ylim()[0] < 2.0**e < ax.get_ylim()[1]]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks(tiles, [str(tile) for tile in tiles])
        ax.set_xlim(0.9 * tiles[0], tiles[-1] ** 1.45 / tiles[0] ** 0.45)
        ax.minorticks_off()
        ax.set_xlabel(xlabel)
        ax.set_ylabel("HBM traffic (MiB)")
        ax.set_title(title)
    return fig


def memory_against_n(
    n: Sequence[int], stages: Mapping[str, Sequence[int]], cards: Sequence[GPU], title: str
) -> Figure:
    """Curves: extra memory of each stage against N, with the memory of some cards as lines.

    `stages`: stage → bytes beside inputs and output, one for each of `n`.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4))
        for name, n_bytes in stages.items():
            ax.loglog(n, n_bytes, color=look.stage[name], marker=STAGE_MARKER[name])
            ax.annotate(
                name, (n[-1], n_bytes[-1]), xytext=(8, 0), textcoords="offset points",
                va="center", fontweight="bold",
            )  # fmt: skip
        for card in cards:
            ax.axhline(card.hbm_bytes, color=look.ink, linewidth=0.9, linestyle="--")
            text = f"all the memory of one {card.name}"
            ax.text(n[0], card.hbm_bytes, text, va="bottom", fontsize=9)
        low, high = (f(map(f, stages.values())) for f in (min, max))
        ticks = [2.0**e for e in range(10, 60, 4) if low / 4 < 2.0**e < high * 4]
        ax.set_yticks(ticks, [human_bytes(tick) for tick in ticks])
        ax.set_xlabel("sequence length N")
        ax.set_ylabel("extra memory")
        ax.set_xlim(n[0] * 0.9, n[-1] * 1.9)
        ax.set_xticks(n, [f"{value:,}" for value in n], rotation=30)
        ax.minorticks_off()
        ax.set_title(title)
    return fig


def bars(values: Mapping[str, float], unit: str, title: str, *, log: bool = False) -> Figure:
    """Plain horizontal bars with their values: label → value in `unit`."""
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 0.9 + 0.5 * len(values)))
        greys = [look.stage.get(label.split()[0], look.muted) for label in values]
        drawn = ax.barh(list(values), list(values.values()), color=greys, height=0.66)
        ax.bar_label(drawn, [f" {value:,.3g}" for value in values.values()])
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.12)
        if log:
            ax.set_xscale("log")
        ax.set_xlabel(unit)
        ax.set_title(title)
    return fig
