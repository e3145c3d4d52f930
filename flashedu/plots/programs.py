"""Figures of programs: which tile each has, and on which SM it runs, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter

from flashedu.plots.style import headline, styled
from flashedu.schedule import Run


def busy_sms(programs: Mapping[str, int], sm_count: int, title: str) -> Figure:
    """The SMs of a card as columns, waves as rows: which run a program, one each at a time.

    `programs`: label → programs of one launch, 1 or more.
    """
    waves = {label: -(-n // sm_count) for label, n in programs.items()}
    heights = [min(max(n, 1), 8) + 2.2 for n in waves.values()]
    with styled() as look:
        fig, axes = plt.subplots(
            len(programs), 1, figsize=(8, 0.7 + 0.17 * sum(heights)), sharex=True, squeeze=False,
            height_ratios=heights,
        )  # fmt: skip
        for ax, (label, n) in zip(axes[:, 0], programs.items(), strict=True):
            busy = np.arange(waves[label] * sm_count).reshape(-1, sm_count) < n
            thin = waves[label] > 8
            ax.pcolormesh(
                np.arange(sm_count + 1), np.arange(waves[label] + 1), busy, vmin=0, vmax=1,
                cmap=ListedColormap([look.faint, look.sram]),
                edgecolors="none" if thin else look.paper, linewidth=0 if thin else 0.8,
            )  # fmt: skip
            ax.invert_yaxis()
            plural = "s" if waves[label] > 1 else ""
            ax.set_title(
                f"{label}: {n:,} programs, {waves[label]} wave{plural}, {busy.mean():.0%} busy",
                fontsize=10.5, fontweight="normal",
            )  # fmt: skip
            ends = sorted({1, waves[label]})
            ax.set_yticks([wave - 0.5 for wave in ends], ends)
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
            ax.set_ylabel("wave")
        ax.set_xticks([0.5, *np.arange(20, sm_count + 1, 20) - 0.5],
                      [1, *range(20, sm_count + 1, 20)])  # fmt: skip
        ax.set_xlabel("SM")
        fig.legend(
            handles=[Patch(color=look.sram, label="runs a program"),
                     Patch(color=look.faint, label="idle")],
            loc="outside lower right", ncols=2,
        )  # fmt: skip
        headline(fig, title)
    return fig


def masked_tiles(n: int, block: int, title: str) -> Figure:
    """The elements of a vector of n, each in its program's tile; what the mask hides is dashed."""
    programs = -(-n // block)
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 1.75))
        for at in range(programs * block):
            exists = at < n
            shade = look.tints[at // block % 2]
            ax.add_patch(Rectangle((at, 0), 1, 1, facecolor=shade if exists else look.paper,
                                   edgecolor=look.ink if exists else look.muted,
                                   linestyle="-" if exists else (0, (3, 3)),
                                   zorder=2 if exists else 1))  # fmt: skip
            ax.text(at + 0.5, 0.5, str(at), ha="center", va="center",
                    color=look.ink if exists else look.muted)  # fmt: skip
        for program in range(programs):
            left, middle = program * block, (program + 0.5) * block
            ax.annotate(
                "",
                (left + 0.08, 1.18),
                (left + block - 0.08, 1.18),
                arrowprops={"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": look.ink},
            )
            ax.text(middle, 1.32, f"program {program}", ha="center", va="bottom")
        ax.text(n / 2, -0.15, f"the vector: {n} elements", ha="center", va="top")
        if hidden := programs * block - n:
            ax.text(n + hidden / 2, -0.15, "masked", ha="center", va="top", color=look.muted)
        ax.set_xlim(-0.05, programs * block + 0.05)
        ax.set_ylim(-0.6, 1.9)
        ax.axis("off")
        ax.set_title(title)
    return fig


def waiting(finish: Mapping[str, Sequence[float]], ideal: float, unit: str, title: str) -> Figure:
    """When each SM is done, from the last to the first, one panel for each order of the programs.

    `finish`: label → a time for each SM, in `unit`. `ideal`: the time if all were shared evenly.
    """
    with styled() as look:
        fig, axes = plt.subplots(1, len(finish), figsize=(8.8, 3.4), sharey=True, squeeze=False)
        latest = max(max(times) for times in finish.values())
        for ax, (label, times) in zip(axes[0], finish.items(), strict=True):
            at = np.arange(len(times))
            heights = np.sort(np.asarray(times, dtype=float))[::-1]
            ax.bar(at, heights, width=1, color=look.sram, align="edge", label="busy")
            ax.bar(at, heights[0] - heights, width=1, bottom=heights, color=look.faint,
                   align="edge", label="waiting for the last")  # fmt: skip
            ax.axhline(ideal, color=look.ink, linestyle="--", linewidth=1.2)
            ax.text(2, ideal, f"evenly shared: {ideal:,.0f}", va="top", zorder=1.5,
                    color=look.text_on(look.sram),
                    bbox={"facecolor": look.sram, "edgecolor": "none", "pad": 1.5})  # fmt: skip
            ax.set_xlim(0, len(times))
            ax.set_ylim(0, 1.18 * latest)
            ax.set_xlabel("SM, from the last to be done to the first")
            ax.set_title(f"{label}: {heights[0]:,.0f}", fontweight="normal", fontsize=10.5)
        axes[0][0].set_ylabel(unit)
        axes[0][-1].legend(loc="upper right", ncols=2)
        headline(fig, title)
    return fig


def sm_timeline(
    schedules: Mapping[str, Sequence[Run]],
    sm_count: int,
    unit: str,
    title: str,
    *,
    programs_a_head: Mapping[str, int] | None = None,
) -> Figure:
    """Which SM runs a program when: SMs from top to bottom, time to the right, a panel a schedule.

    `schedules`: label → its runs, as `flashedu.schedule.assign` gives them; `unit` is that of their
    times. `programs_a_head`: label → how many programs in a row belong to one head and have one
    shade; 1 where a label is missing. Raises ValueError for a schedule that takes no time.
    """
    for label, runs in schedules.items():
        if not any(run.stop for run in runs):
            raise ValueError(
                f"schedules must each have a run that takes time, got none in {label!r}"
            )
    with styled() as look:
        fig, axes = plt.subplots(
            1, len(schedules), figsize=(8, 4.2), sharex=True, sharey=True, squeeze=False
        )
        latest = max(run.stop for runs in schedules.values() for run in runs)
        for ax, (label, runs) in zip(axes[0], schedules.items(), strict=True):
            last = max(run.stop for run in runs)
            ax.add_patch(Rectangle((0, 0), last, sm_count, color=look.faint, linewidth=0))
            of_a_head = (programs_a_head or {}).get(label, 1)
            bars = [[(run.start, run.sm), (run.stop, run.sm), (run.stop, run.sm + 1),
                     (run.start, run.sm + 1)] for run in runs]  # fmt: skip
            shades = [look.shades[run.program // of_a_head % 3] for run in runs]
            ax.add_collection(PolyCollection(bars, facecolors=shades, linewidths=0))
            ends = [[(run.stop, run.sm), (run.stop, run.sm + 1)] for run in runs]
            ax.add_collection(LineCollection(ends, colors=look.paper, linewidths=0.8))
            busy = sum(run.stop - run.start for run in runs) / (sm_count * last)
            ax.set_title(f"{label}: done at {last:,.0f}, {busy:.0%} busy", fontsize=10.5,
                         fontweight="normal")  # fmt: skip
            ax.set_xlabel(unit)
        axes[0][0].set_xlim(0, 1.01 * latest)
        axes[0][0].set_ylim(sm_count, 0)
        axes[0][0].set_yticks([0.5, *np.arange(20, sm_count + 1, 20) - 0.5],
                              [1, *range(20, sm_count + 1, 20)])  # fmt: skip
        axes[0][0].set_ylabel("SM")
        busy_handle: Any = tuple(Patch(color=shade) for shade in look.shades)
        fig.legend(
            [busy_handle, Patch(color=look.faint)],
            ["runs a program, the heads shaded in turn", "idle"],
            handler_map={tuple: HandlerTuple(None, pad=0)}, handlelength=3.6,
            loc="outside lower center", ncols=2,
        )  # fmt: skip
        headline(fig, title)
    return fig


def splits(
    cases: Mapping[str, Sequence[tuple[int, float, float]]],
    chosen: Mapping[str, int],
    unit: str,
    title: str,
) -> Figure:
    """What the number of splits does: above the share of a card at work, below the time.

    `cases`: label → (splits, busy share, time in `unit`), a panel each. `chosen`: label → the
    number of splits to mark.
    """
    with styled() as look:
        fig, axes = plt.subplots(
            2, len(cases), figsize=(8.8, 4.6), sharex="col", sharey="row", squeeze=False
        )
        for (above, below), (label, rows) in zip(axes.T, cases.items(), strict=True):
            counts, busy, times = zip(*rows, strict=True)
            above.fill_between(counts, busy, step="mid", color=look.sram, linewidth=0)
            above.fill_between(counts, busy, 1, step="mid", color=look.faint, linewidth=0)
            below.plot(counts, times, color=look.ink, drawstyle="steps-mid")
            mark = chosen[label]
            at = counts.index(mark)
            below.plot([mark], [times[at]], marker="o", color=look.sram, markersize=8)
            above.axvline(mark, color=look.ink, linewidth=1, linestyle="--")
            below.axvline(mark, color=look.ink, linewidth=1, linestyle="--", zorder=0)
            above.set_title(f"{label}: {mark} splits, {busy[at]:.0%} busy", fontsize=10.5,
                            fontweight="normal")  # fmt: skip
            above.set_ylim(0, 1)
            above.set_xlim(counts[0] - 0.5, counts[-1] + 0.5)
            above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            below.set_yscale("log")
            below.set_xlabel("splits of the keys")
        ticks = _round_ticks(*axes[1][0].get_ylim())
        axes[1][0].set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes[1][0].minorticks_off()
        axes[0][0].set_ylabel("SMs at work")
        axes[1][0].set_ylabel(unit)
        fig.legend(
            handles=[Patch(color=look.sram, label="busy"), Patch(color=look.faint, label="idle")],
            loc="outside lower right", ncols=2,
        )  # fmt: skip
        headline(fig, title)
    return fig


def _round_ticks(low: float, high: float) -> list[float]:
    """1, 3, 10, 30 … between the two."""
    return [tick for e in range(-3, 9) for tick in (10.0**e, 3 * 10.0**e) if low <= tick <= high]
