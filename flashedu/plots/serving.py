"""Figures of a model that is served: its memory, its batch over time, and how long users wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flashedu.memory.gpus import GPU
from flashedu.plots.style import Look, headline, styled
from flashedu.units import human_bytes, human_seconds

PARTS = ("weights", "KV cache", "attention", "activations")
HATCHES = dict(zip(PARTS, ("", "....", "////", "||||"), strict=True))  # told apart in grey too


def card_memory(
    plans: Mapping[str, Mapping[str, int]],
    card: GPU,
    title: str,
    allowed: Mapping[str, float] | None = None,
    peaks: Mapping[str, int] | None = None,
) -> Figure:
    """Stacked bars: the memory of each plan by what it is spent on, against the card's.

    `plans`: label → part → bytes, the parts those of PARTS. `allowed`: label → share of the card
    that it may use, marked where it is less than all. `peaks`: label → the most bytes that an
    allocator reported, a dot.
    """
    with styled() as look:
        colours = {"weights": look.hbm, "KV cache": look.tensor["k"],
                   "attention": look.tensor["s"], "activations": look.tints[0]}  # fmt: skip
        fig, ax = plt.subplots(figsize=(8, 1.75 + 0.62 * len(plans)))
        totals = [sum(parts.values()) for parts in plans.values()]
        right, marked, peaked = float(max(card.hbm_bytes, *totals)), False, False
        for row, (label, parts) in enumerate(plans.items()):
            left = 0.0
            for name in PARTS:
                ax.barh(
                    row, parts[name] / 2**30, left=left / 2**30, height=0.6, color=colours[name],
                    hatch=HATCHES[name], edgecolor=look.paper, linewidth=0.8,
                    label=name if row == 0 else None,
                )  # fmt: skip
                left += parts[name]
            limit = (allowed or {}).get(label, 1) * card.hbm_bytes
            if limit < card.hbm_bytes:
                ax.plot([limit / 2**30] * 2, [row - 0.38, row + 0.38], color=look.ink, linewidth=2,
                        zorder=4, label=None if marked else "may be used")  # fmt: skip
                marked = True
            end = limit if left < limit < left + 0.25 * right else left
            if peak := (peaks or {}).get(label):
                ax.plot(peak / 2**30, row, marker="o", linestyle="", color=look.ink, zorder=5,
                        markeredgecolor=look.paper, clip_on=False,
                        label=None if peaked else "allocator's peak")  # fmt: skip
                end, peaked = max(end, peak + 0.008 * right), True
            ax.text(end / 2**30, row, f"  {human_bytes(left)}, {left / card.hbm_bytes:.0%}",
                    va="center",
                    bbox={"facecolor": look.paper, "edgecolor": "none", "pad": 0})  # fmt: skip
        ax.axvline(card.hbm_bytes / 2**30, color=look.ink, linewidth=1.2, linestyle="--")
        ax.text(
            card.hbm_bytes / 2**30, len(plans) - 0.48, f"{card.name} ", ha="right", va="bottom",
            fontsize=9.5,
        )  # fmt: skip
        ax.set_yticks(range(len(plans)), list(plans))
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(plans) - 0.4, -0.6)
        ax.set_xlim(0, 1.24 * right / 2**30 if max(totals) > 0.8 * right else 1.03 * right / 2**30)
        ax.set_xlabel("memory of the card (GiB)", loc="left")
        fig.legend(loc="outside lower left", ncols=len(PARTS) + bool(allowed) + bool(peaks))
        ax.set_title(title)
    return fig


def batch_over_time(
    runs: Mapping[str, Sequence[Sequence[float]]], title: str, most_s: float | None = None
) -> Figure:
    """A panel a server: requests in its batch, and behind it those that wait, over time.

    `runs`: label → samples (seconds, running, waiting, cached tokens), as `serve` takes them; each
    stands for the time since the one before. `most_s`: where the axis ends.
    """
    with styled() as look:
        fig, axes = plt.subplots(
            len(runs), 1, figsize=(8, 0.7 + 1.35 * len(runs)), sharex=True, squeeze=False
        )
        end = most_s or max(samples[-1][0] for samples in runs.values())
        for ax, (label, samples) in zip(axes[:, 0], runs.items(), strict=True):
            times = [0.0, *(sample[0] for sample in samples)]
            running = [sample[1] for sample in samples]
            queued = [sample[1] + sample[2] for sample in samples]
            ax.stairs(queued, times, fill=True, facecolor=look.faint, label="waiting")
            ax.stairs(running, times, fill=True, color=look.sram, label="in the batch")
            ax.set_xlim(0, end)
            ax.set_ylim(0, 1.12 * max(queued))
            ax.set_title(label, fontsize=10.5, fontweight="normal")
            ax.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        axes[-1, 0].set_xlabel("seconds")
        fig.supylabel("requests", fontsize=10.5)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower right", ncols=2)
        headline(fig, title)
    return fig


def waiting_times(latencies: Mapping[str, Sequence[float]], title: str) -> Figure:
    """How long users wait: the share of requests that were answered within so many seconds.

    `latencies`: label → seconds from arrival to the last token. The dots are P50 and P99.
    """
    lines = ("-", "--", "-.", ":")
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 3.6))
        greys = _greys(look, len(latencies))
        for i, (label, values) in enumerate(latencies.items()):
            ordered = sorted(values)
            shares = [100 * (j + 1) / len(ordered) for j in range(len(ordered))]
            ax.step(ordered, shares, where="post", color=greys[i], linestyle=lines[i % 4],
                    label=label)  # fmt: skip
            for percent in (50, 99):
                at = ordered[-(-percent * len(ordered) // 100) - 1]
                ax.plot(at, percent, marker="o", color=greys[i])
                ax.annotate(
                    human_seconds(at), (at, percent), (5, -13), textcoords="offset points",
                    fontsize=9.5,
                )  # fmt: skip
        ax.set_xscale("log")
        ax.set_ylim(0, 104)
        ax.set_yticks([0, 25, 50, 75, 99])
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set_xlabel("seconds from arrival to the last token")
        ax.set_ylabel("% of requests answered")
        ax.legend(loc="upper left")
        ax.set_title(title)
    return fig


def factors(
    rates: Mapping[str, tuple[float, float | None]], title: str, unit: str = "requests a second"
) -> Figure:
    """Bars from the first setting to the last: what was predicted, and what was measured.

    `rates`: label → (predicted, measured or None). Beside a bar stands its ratio to the bar of the
    setting before.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 1.0 + 0.72 * len(rates)))
        widest = max(x for pair in rates.values() for x in pair if x)
        for i, name in enumerate(("predicted", "measured")):
            before: float | None = None
            for row, pair in enumerate(rates.values()):
                value = pair[i]
                at, height = row + (i - 0.5) * 0.38, 0.34
                colour = look.faint if name == "predicted" else look.sram
                hatch = "////" if name == "predicted" else ""
                ax.barh(at, value or 0, height, color=colour, hatch=hatch, edgecolor=look.paper,
                        label=name if row == 0 else None)  # fmt: skip
                text = "not measured" if value is None else f"{value:.3g}"
                if value and before:
                    text += f"   × {value / before:.2f}"
                ax.text((value or 0) + 0.012 * widest, at, text, va="center", fontsize=9.5)
                before = value or before
        ax.set_yticks(range(len(rates)), list(rates))
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.22 * widest)
        ax.set_xlabel(unit, loc="left")
        fig.legend(loc="outside lower right", ncols=2)
        ax.set_title(title)
    return fig


def _greys(look: Look, count: int) -> list[str]:
    """From the strongest on, so that neighbours differ."""
    greys = [look.ink, look.sram, look.muted, look.hbm]
    return [greys[i % len(greys)] for i in range(count)]
