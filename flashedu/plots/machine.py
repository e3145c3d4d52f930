"""Figures of the machine: its memories to scale, its roofline, its SRAM as a kernel runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from flashedu.memory.gpus import GPU
from flashedu.memory.trace import Event
from flashedu.plots.style import STAGE_MARKER, Look, spread, styled
from flashedu.units import human_bytes


def hierarchy(card: GPU, title: str) -> Figure:
    """The memories of a card as squares, areas to scale: HBM, L2, and the SRAM of all its SMs."""
    per_sm = human_bytes(card.sram_bytes_per_sm)
    on_chip = card.sm_count * card.sram_bytes_per_sm
    with styled() as look:
        levels = (
            ("HBM", card.hbm_bytes, look.hbm, f"{card.hbm_bytes / 1e9:,.0f} GB"),
            ("L2 cache", card.l2_bytes, look.l2, human_bytes(card.l2_bytes)),
            ("SRAM", on_chip, look.sram, f"{human_bytes(on_chip)}, {card.sm_count} × {per_sm}"),
        )
        fig, ax = plt.subplots(figsize=(7, 3.4))
        ax.add_patch(Rectangle((0, 0), 1, 1, color=look.hbm))
        ax.text(0.5, 0.5, f"HBM\n{levels[0][3]}\n{card.hbm_bytes_per_s / 1e12:.3g} TB/s",
                ha="center", va="center", color=look.text_on(look.hbm), fontsize=15,
                weight="bold")  # fmt: skip
        for (name, n_bytes, colour, text), bottom in zip(levels[1:], (0.6, 0.35), strict=True):
            side = (n_bytes / card.hbm_bytes) ** 0.5
            ax.add_patch(Rectangle((1.1, bottom), side, side, color=colour))
            ax.text(1.16, bottom + side / 2, f"{name}, {text}", va="center")
        ax.set_xlim(-0.02, 2.2)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
        ax.axis("off")
        ax.set_title(title)
    return fig


def roofline(cards: Sequence[GPU], points: Mapping[str, float], dtype: str, title: str) -> Figure:
    """The rate that memory and arithmetic allow, against FLOPs per byte of HBM traffic.

    `points`: label, beginning with a stage's name → arithmetic intensity. Each is set on the roof
    of the last card: the best it can reach there.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4.2))
        x = np.logspace(0, 4, 200)
        same_roof: dict[float, list[str]] = {}
        for card, style in zip(cards, ("-", "--", "-.", ":"), strict=False):
            roof = np.minimum(x * card.hbm_bytes_per_s, card.flops_per_s(dtype)) / 1e12
            ax.loglog(x, roof, color=look.ink, linewidth=1.3, linestyle=style, label=card.name)
            same_roof.setdefault(roof[-1], []).append(card.name)
        for rate, names in same_roof.items():
            ax.text(1e4, rate, ", ".join(names) + " ", va="bottom", ha="right", fontsize=9.5)
        if len(cards) > 1:
            ax.legend(loc="lower right")
        ax.set_xlim(1, 1e4)
        ax.set_xlabel("arithmetic intensity (FLOPs per byte of HBM traffic)")
        ax.set_ylabel("at most (TFLOP/s)")
        ax.set_title(title)
        fig.draw_without_rendering()  # from here on it is known where a point is on the page
        _points(ax, look, cards[-1], points, dtype)
    return fig


def _points(ax: Any, look: Look, card: GPU, points: Mapping[str, float], dtype: str) -> None:
    """A dot each on the roof. The labels, with the stages' markers, stand apart to the left."""
    order = sorted(points, key=lambda label: points[label])
    roof = [min(points[label] * card.hbm_bytes_per_s, card.flops_per_s(dtype)) / 1e12
            for label in order]  # fmt: skip
    dots = ax.transData.transform(list(zip(map(points.get, order), roof, strict=True)))
    dots = dots * 72 / ax.figure.dpi  # pixels → points of the page
    places = spread([y + 8 for _, y in dots], 16)
    for label, rate, (x, y), place in zip(order, roof, dots, places, strict=True):
        name, xy = label.split()[0], (points[label], rate)
        left = min(other for other, height in dots if abs(height - y) < 8) - x - 26
        line = {"arrowstyle": "-", "color": look.muted, "linewidth": 0.8, "shrinkA": 0}
        ax.annotate("", xy, xytext=(left, place - y), textcoords="offset points", arrowprops=line)
        moved = ScaledTranslation(left / 72, (place - y) / 72, ax.figure.dpi_scale_trans)
        ax.plot(*xy, STAGE_MARKER[name], color=look.stage[name], markersize=9,
                markeredgecolor=look.ink, transform=ax.transData + moved, zorder=4)  # fmt: skip
        ax.plot(*xy, ".", color=look.ink, markersize=9, zorder=5)
        ax.annotate(f"{label}: {points[label]:,.0f}", xy, xytext=(left - 9, place - y),
                    textcoords="offset points", ha="right", va="center",
                    bbox={"facecolor": look.paper, "edgecolor": "none", "pad": 1})  # fmt: skip


def sram_occupancy(
    trace: Sequence[Event], title: str, *, capacity_bytes: int | None = None
) -> Figure:
    """SRAM that one program holds, event by event, with the capacity as a line."""
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 3.6))
        used = np.array([event.sram_bytes for event in trace], dtype=float)
        unit, per_unit = ("bytes", 1) if used.max() < 1024 else ("KiB", 1024)
        used /= per_unit
        ax.step(range(len(used)), used, where="post", color=look.sram)
        ax.fill_between(range(len(used)), used, step="post", color=look.sram, alpha=0.18)
        if len(trace) <= 40:
            for at, event in enumerate(trace):
                ax.plot(at, used[at], "o", color=look.colour_of(event.tensor), zorder=3)
                ax.annotate(f"{event.op} {event.tensor}", (at, used[at]), xytext=(0, 6),
                            textcoords="offset points", rotation=75, fontsize=9)  # fmt: skip
        if capacity_bytes is not None:
            ax.axhline(capacity_bytes / per_unit, color=look.ink, linestyle="--", linewidth=1)
            ax.text(0, capacity_bytes / per_unit, " capacity", va="bottom")
        ax.set_ylim(0, 1.3 * max(used.max(), (capacity_bytes or 0) / per_unit))
        ax.set_xlabel("event")
        ax.set_ylabel(f"SRAM held ({unit})")
        ax.set_title(title)
    return fig
