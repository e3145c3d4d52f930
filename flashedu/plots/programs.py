"""Figures of programs: which tile each has, which SMs they keep busy, what tiles cost in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from flashedu.memory.trace import Event
from flashedu.plots.style import FAINT, INK, SRAM, STAGE, STAGE_MARKER, styled
from flashedu.units import human_bytes


def busy_sms(programs: Mapping[str, int], sm_count: int, title: str) -> Figure:
    """The SMs of a card as columns, waves as rows: which run a program, one each at a time.

    `programs`: label → programs of one launch, 1 or more.
    """
    waves = {label: -(-n // sm_count) for label, n in programs.items()}
    heights = [min(max(n, 1), 8) + 2.2 for n in waves.values()]
    with styled():
        fig, axes = plt.subplots(
            len(programs), 1, figsize=(8, 0.7 + 0.17 * sum(heights)), sharex=True, squeeze=False,
            height_ratios=heights,
        )  # fmt: skip
        for ax, (label, n) in zip(axes[:, 0], programs.items(), strict=True):
            busy = np.arange(waves[label] * sm_count).reshape(-1, sm_count) < n
            thin = waves[label] > 8
            ax.pcolormesh(
                np.arange(sm_count + 1), np.arange(waves[label] + 1), busy, vmin=0, vmax=1,
                cmap=ListedColormap([FAINT, SRAM]), edgecolors="none" if thin else "white",
                linewidth=0 if thin else 0.8,
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
            handles=[Patch(color=SRAM, label="runs a program"), Patch(color=FAINT, label="idle")],
            loc="outside lower right", ncols=2,
        )  # fmt: skip
        fig.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")
    return fig


def masked_tiles(n: int, block: int, title: str) -> Figure:
    """The elements of a vector of n, each in its program's tile; what the mask hides is dashed."""
    programs = -(-n // block)
    with styled():
        fig, ax = plt.subplots(figsize=(8, 1.75))
        for at in range(programs * block):
            exists = at < n
            shade = ("#D9C3DE", "#F1E8F3")[at // block % 2]
            ax.add_patch(Rectangle((at, 0), 1, 1, facecolor=shade if exists else "white",
                                   edgecolor=INK if exists else "#777777",
                                   linestyle="-" if exists else (0, (3, 3)),
                                   zorder=2 if exists else 1))  # fmt: skip
            ax.text(at + 0.5, 0.5, str(at), ha="center", va="center",
                    color=INK if exists else "#777777")  # fmt: skip
        for program in range(programs):
            left, middle = program * block, (program + 0.5) * block
            ax.annotate(
                "",
                (left + 0.08, 1.18),
                (left + block - 0.08, 1.18),
                arrowprops={"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": INK},
            )
            ax.text(middle, 1.32, f"program {program}", ha="center", va="bottom")
        ax.text(n / 2, -0.15, f"the vector: {n} elements", ha="center", va="top")
        if hidden := programs * block - n:
            ax.text(n + hidden / 2, -0.15, "masked", ha="center", va="top", color="#777777")
        ax.set_xlim(-0.05, programs * block + 0.05)
        ax.set_ylim(-0.6, 1.9)
        ax.axis("off")
        ax.set_title(title)
    return fig


def loop_orders(
    traces: Mapping[str, Sequence[Event]], block_q: int, block_k: int, title: str
) -> Figure:
    """The tiles of S of one head, a grid a trace, each with its turn; each is computed once."""
    with styled():
        fig, axes = plt.subplots(1, len(traces), figsize=(8, 3.3), squeeze=False)
        for ax, (label, trace) in zip(axes[0], traces.items(), strict=True):
            turns = _turns(trace)
            for turn, (i, j) in enumerate(turns, 1):
                ax.add_patch(Rectangle((j, i), block_k, block_q, facecolor="#F3B58F",
                                       edgecolor="white", linewidth=2))  # fmt: skip
                ax.text(j + 0.5 * block_k, i + 0.5 * block_q, str(turn), ha="center", va="center",
                        fontweight="bold", zorder=5,
                        bbox={"facecolor": "#F3B58F", "edgecolor": "none", "pad": 1})  # fmt: skip
            path = np.array(turns)[:, ::-1] + [0.5 * block_k, 0.5 * block_q]
            ax.plot(*path.T, color=INK, linewidth=1.3, zorder=3)
            Nq, Nk = (max(start) for start in zip(*turns, strict=True))
            ax.set_xticks(range(0, Nk + block_k + 1, block_k))
            ax.set_yticks(range(0, Nq + block_q + 1, block_q))
            ax.set_xlim(0, 1.01 * (Nk + block_k))
            ax.set_ylim(1.01 * (Nq + block_q), 0)
            ax.set_aspect("equal")
            ax.set_xlabel("key")
            ax.set_ylabel("query")
            ax.set_title(label, fontweight="normal", fontsize=10.5)
        fig.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")
    return fig


def _turns(trace: Sequence[Event]) -> list[tuple[int, int]]:
    """The first query and key of each tile of S, in order: a turn is a load in the inner loop."""
    loads = [event for event in trace if event.op == "load" and event.tensor in ("q", "k")]
    of_q = sum(event.tensor == "q" for event in loads)
    inner = "q" if of_q > len(loads) - of_q else "k"
    first, turns = {"q": 0, "k": 0}, []
    for event in loads:
        first[event.tensor] = event.start
        if event.tensor == inner:
            turns.append((first["q"], first["k"]))
    return turns


def traffic_against_tile(
    tiles: Sequence[int], stages: Mapping[str, Sequence[int]], xlabel: str, title: str
) -> Figure:
    """Curves: HBM bytes of each stage against a tile size, each named at its right end.

    `stages`: label, beginning with the stage's name → bytes, one for each of `tiles`.
    """
    with styled():
        fig, ax = plt.subplots(figsize=(8, 4))
        for label, n_bytes in stages.items():
            name = label.split()[0]
            y = np.array(n_bytes) / 2**20
            ax.loglog(tiles, y, color=STAGE[name], marker=STAGE_MARKER[name], markersize=7)
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
