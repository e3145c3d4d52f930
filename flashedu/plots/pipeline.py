"""Figures of flash3's pipeline: who waits for whom on one SM, and what each step is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from flashedu import sm
from flashedu.plots.style import Look, headline, styled
from flashedu.sm import Span, Timeline

SOFTMAX = ("maximum", "exponentials", "sum, rescale")
PRODUCTS = ("q k", "p v")

# Waits are pale, and told apart by their hatch.
HATCHES = {
    sm.TILE: "....",
    sm.PLACE: "xxxx",
    sm.OTHERS_PRODUCT: "////",
    sm.UNIT_BUSY: "////",
    sm.TURN: "////",
    sm.ALL_WARPS: "\\\\\\\\",
    sm.STORED: "oo",
    sm.STARTS: "",
}
NAMES = {sm.UNIT_BUSY: sm.OTHERS_PRODUCT, sm.TURN: sm.OTHERS_PRODUCT}
SHOWN_AS = {sm.OTHERS_PRODUCT: "it is another's turn"}


class _Bar(NamedTuple):
    """Spans in a row that are drawn as one."""

    kind: str
    start: float
    stop: float
    text: str


def who_waits(
    timelines: Mapping[str, Timeline], title: str, *, start_s: float = 0.0, stop_s: float = 0.0
) -> Figure:
    """Rows for the memory, the tensor cores and each group of warps; time to the right.

    `timelines`: label → what `simulate` gives, a panel each. `start_s`, `stop_s`: the part to show,
    all if both are 0. A load has its tile's name, a product the number of the consumer that it is
    for, a softmax the number of its key tile.
    """
    stop_s = stop_s or max(timeline.seconds for timeline in timelines.values())
    if not 0 <= start_s < stop_s:
        raise ValueError(f"start_s must be 0 or more and before stop_s, got {start_s} and {stop_s}")
    rows = {label: [sm.MEMORY, sm.TENSOR, *t.warps] for label, t in timelines.items()}
    with styled() as look:
        heights = [len(names) + 0.8 for names in rows.values()]
        fig, axes = plt.subplots(
            len(rows), 1, figsize=(8, 1.5 + 0.36 * sum(heights)), sharex=True, squeeze=False,
            height_ratios=heights,
        )  # fmt: skip
        shown: dict[str, Patch] = {}
        for ax, (label, names) in zip(axes[:, 0], rows.items(), strict=True):
            timeline = timelines[label]
            for row, name in enumerate(names):
                for bar in _bars(timeline, name):
                    if bar.stop > start_s and bar.start < stop_s:
                        shown |= _draw(ax, look, row, bar, start_s, stop_s)
            busy = _busy(timeline, sm.TENSOR, start_s, min(stop_s, timeline.seconds))
            ax.set_title(f"{label}: tensor cores {busy:.0%} busy", fontsize=10.5,
                         fontweight="normal")  # fmt: skip
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        axes[-1, 0].set_xlim(start_s * 1e6, stop_s * 1e6)
        axes[-1, 0].set_xlabel("µs")
        order = [*_work(look), *dict.fromkeys(HATCHES)]
        handles = sorted(shown.items(), key=lambda item: order.index(item[0]))
        fig.legend(
            [patch for _, patch in handles],
            [SHOWN_AS.get(kind, kind) for kind, _ in handles],
            loc="outside lower center", ncols=4, handlelength=2.4,
        )  # fmt: skip
        headline(fig, title)
    return fig


def _work(look: Look) -> dict[str, str]:
    """What is done → its colour."""
    loads = {f"load {x}": look.tensor[x] for x in "qkv"}
    products = {"q k": look.tensor["s"], "p v": look.tensor["acc"]}
    rest = {"softmax": look.tensor["p"], "divide by l": look.tensor["l"],
            "store o": look.tensor["delta"], sm.OWN_PRODUCT: look.tints[0]}  # fmt: skip
    return loads | products | rest


def _bars(timeline: Timeline, row: str) -> list[_Bar]:
    """A row's spans; those of one kind and tile that follow each other are one bar."""
    bars: list[_Bar] = []
    for span in timeline.of(row):
        kind = "softmax" if span.what in SOFTMAX else NAMES.get(span.what, span.what)
        bar = _Bar(kind, span.start, span.stop, _text(span))
        if bars and _joins(bars[-1], bar):
            bar = bar._replace(start=bars.pop().start)
        bars.append(bar)
    return bars


def _joins(last: _Bar, bar: _Bar) -> bool:
    of_warps = bar.kind in ("softmax", *sm.CAUSES)
    return of_warps and last[0] == bar[0] and last[3] == bar[3] and bar.start - last.stop < 1e-12


def _text(span: Span) -> str:
    if span.what in PRODUCTS:
        return span.by.split()[1]
    if span.what.startswith("load"):
        return f"{span.what[5:]}{span.tile}"
    return str(span.tile) if span.what in SOFTMAX else ""


def _draw(ax: Axes, look: Look, row: int, bar: _Bar, start: float, stop: float) -> dict[str, Patch]:
    work = _work(look)
    colour, hatch = work.get(bar.kind, look.faint), HATCHES.get(bar.kind)
    left, right = max(bar.start, start), min(bar.stop, stop)
    at, size = (left * 1e6, row - 0.37), (right - left) * 1e6
    # Bars and texts lie within the axes: a layout that measured each would take twice as long.
    ax.add_patch(Rectangle(at, size, 0.74, facecolor=colour, hatch=hatch, edgecolor=look.paper,
                           linewidth=0.7, in_layout=False))  # fmt: skip
    room = (right - left) / (stop - start) * 440  # points: an axis is about that wide
    if room > 6.5 * len(bar.text) + 3:
        middle = (left + right) / 2 * 1e6
        ax.text(middle, row, bar.text, ha="center", va="center_baseline", fontsize=9,
                color=look.text_on(colour), in_layout=False)  # fmt: skip
    return {bar.kind: Patch(facecolor=colour, hatch=hatch, edgecolor=look.paper, linewidth=0)}


def _busy(timeline: Timeline, unit: str, start: float, stop: float) -> float:
    spans = timeline.of(unit)
    return sum(max(0.0, min(s.stop, stop) - max(s.start, start)) for s in spans) / (stop - start)


class Step(NamedTuple):
    """A step between two kernels: what each then reaches, in one unit; None: not measured."""

    label: str
    predicted: float
    measured: float | None = None
    kept: bool = True  # False: it was tried, and the next step begins where this one began


def waterfall(steps: Sequence[Step], title: str, unit: str = "TFLOP/s") -> Figure:
    """What each step gains or loses, predicted above and measured below, from the first bar on.

    A step that was not kept stands there too. One that changes nothing is a line.
    """
    if not steps:
        raise ValueError("steps must hold at least the first bar, got none")
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 1.2 + 0.62 * len(steps)))
        widest = max(x for step in steps for x in (step.predicted, step.measured) if x)
        for i, (colour, hatch) in enumerate(((look.faint, "////"), (look.sram, ""))):
            before: float | None = None
            came = 0.0  # from which height
            for row, step in enumerate(steps):
                value, at = (step.predicted, step.measured)[i], row + (i - 0.5) * 0.4
                if value is None:
                    ax.text(0.01 * widest, at, "not measured", va="center", fontsize=9.5,
                            color=look.muted)  # fmt: skip
                    continue
                left = min(before or 0.0, value)
                ax.barh(at, max(before or 0.0, value) - left, 0.34, left=left, color=colour,
                        hatch=hatch, edgecolor=look.paper, linewidth=0.5)  # fmt: skip
                ax.plot([value] * 2, [at - 0.17, at + 0.17], color=look.ink, linewidth=2)
                if before:
                    ax.plot([before] * 2, [came, at + 0.17], color=look.muted, linewidth=0.8,
                            linestyle=":", zorder=0)  # fmt: skip
                change = f"   × {value / before:.2f}" if before else ""
                end = max(before or 0.0, value)
                ax.text(end + 0.012 * widest, at, f"{value:.0f}{change}", va="center",
                        fontsize=9.5, bbox={"facecolor": look.paper, "edgecolor": "none",
                                            "pad": 1.5})  # fmt: skip
                if step.kept or before is None:
                    before, came = value, at
        labels = [step.label if step.kept else f"tried: {step.label}" for step in steps]
        ax.set_yticks(range(len(steps)), labels)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(steps) - 0.5, -0.6)
        ax.set_xlim(0, 1.2 * widest)
        ax.set_xlabel(unit, loc="left")
        fig.legend(
            handles=[
                Patch(facecolor=look.faint, hatch="////", edgecolor=look.paper, linewidth=0,
                      label="predicted"),
                Patch(color=look.sram, label="measured"),
            ],
            loc="outside lower right", ncols=2,
        )  # fmt: skip
        ax.set_title(title)
    return fig
