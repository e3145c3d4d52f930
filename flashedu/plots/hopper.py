"""Figures of what Hopper has: one SM, a warpgroup's product, phases of barriers, registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from flashedu.plots.style import Look, headline, styled
from flashedu.units import human_bytes

QUARTERS = 4
UNITS = ("tensor core", "exponential units", "CUDA cores", "registers")
REGISTERS = "////"  # the hatch of what lies there


def one_sm(
    warps: Mapping[str, int],
    places: Sequence[tuple[str, int]],
    sram_bytes: int,
    title: str,
) -> Figure:
    """One SM as a drawing: four quarters, the warps in them, shared memory to scale, the TMA.

    `warps`: group → how many; the first of a group sits in the first quarter. `places`: tensor and
    bytes of each tile that has room in shared memory, which holds `sram_bytes`. Raises ValueError
    for tiles that do not fit.
    """
    if sum(n_bytes for _, n_bytes in places) > sram_bytes:
        raise ValueError(f"places must fit the {sram_bytes} bytes of shared memory, got {places}")
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 2.9 + 0.42 * len(warps)))
        left, width, gap = 2.2, 2.0, 0.12
        right = left + QUARTERS * (width + gap) - gap
        top = 0.0
        for x in range(QUARTERS):
            ax.text(left + x * (width + gap) + width / 2, top - 0.35, f"quarter {x}",
                    ha="center", fontsize=9.5)  # fmt: skip
        colours = (look.tensor["s"], look.tensor["p"], look.faint, look.tints[1])
        for name, fill in zip(UNITS, colours, strict=True):
            for x in range(QUARTERS):
                _box(ax, look, left + x * (width + gap), top, width, 0.8, name, fill)
            top += 0.9
        ax.text(left - 0.2, 1.6, "units", ha="right", va="center")
        number, top = 0, top + 0.25
        for group, count in warps.items():
            ax.text(left - 0.2, top + 0.4, group, ha="right", va="center")
            for n in range(count):
                _box(ax, look, left + n % QUARTERS * (width + gap), top + n // QUARTERS * 0.9,
                     width, 0.8, f"warp {number + n}", look.tints[0])  # fmt: skip
            number, top = number + count, top + 0.9 * -(-count // QUARTERS)
        top += 0.25
        ax.text(left - 0.2, top + 0.5, "shared memory", ha="right", va="center")
        ax.add_patch(Rectangle((left, top), right - left, 1, facecolor=look.paper,
                               edgecolor=look.ink, linewidth=1.2))  # fmt: skip
        at, scale = left, (right - left) / sram_bytes
        for tensor, n_bytes in places:
            _box(ax, look, at, top, n_bytes * scale, 1, tensor, look.tensor[tensor])
            at += n_bytes * scale
        ax.text(right + 0.15, top + 0.5, human_bytes(sram_bytes), va="center", fontsize=9.5)
        middle = (left + right) / 2
        _box(ax, look, middle - 2.1, top + 1.55, 4.2, 0.8, "TMA: copies tiles", look.tints[0])
        _box(ax, look, left, top + 2.9, right - left, 0.8, "L2 cache, and behind it HBM", look.hbm)
        for low, high in ((top + 1.55, top + 1.03), (top + 2.88, top + 2.38)):
            arrow = {"arrowstyle": "<->", "color": look.ink, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", (middle, high), xytext=(middle, low), arrowprops=arrow)
        ax.add_patch(Rectangle((0, -0.95), right + 1.7, top + 3.4, fill=False,
                               edgecolor=look.muted, linewidth=1.2, linestyle="--"))  # fmt: skip
        ax.text(0.15, top + 2.3, "one SM", va="bottom", color=look.muted)
        ax.set_xlim(-0.05, right + 1.75)
        ax.set_ylim(top + 3.8, -1)
        ax.axis("off")
        ax.set_title(title)
    return fig


def _box(
    ax: Axes, look: Look, x: float, y: float, width: float, height: float, text: str, colour: Any
) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=look.paper,
                           linewidth=0.8, in_layout=False))  # fmt: skip
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5,
            color=look.text_on(colour), in_layout=False)  # fmt: skip


def tile_copy(N: int, D: int, block: int, places: int, title: str) -> Figure:
    """A tensor of N rows in HBM, cut into tiles; its last tile on the way to its place on chip.

    Between them what the TMA knows: the descriptor. What lies beyond the tensor's end comes as 0.
    Raises ValueError where no tile reaches beyond the end.
    """
    tiles, beyond = -(-N // block), -N % block
    if not beyond:
        raise ValueError(f"block must not divide N, or nothing lies beyond the end, got {block}")
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 3.7))
        unit = 1.0 / block  # a tile is 1 high
        colour = look.tensor["k"]
        for tile in range(tiles):
            height = 1 - (beyond * unit if tile == tiles - 1 else 0)
            _box(ax, look, 0, tile, 1.6, height, f"tile {tile}", look.hbm)
        ax.add_patch(Rectangle((0, tiles - 1), 1.6, 1, fill=False, edgecolor=look.ink,
                               linestyle="--", linewidth=1.4))  # fmt: skip
        ax.text(0.8, -0.15, f"k in HBM: {N} × {D}", ha="center", va="bottom")
        lines = ("descriptor", "where k begins", f"its shape: {N} × {D}", "its strides, its type",
                 f"of a tile: {block} × {D}")  # fmt: skip
        middle = tiles / 2
        ax.add_patch(Rectangle((2.75, middle - 1.35), 2.5, 2.7, facecolor=look.tints[1],
                               edgecolor=look.muted, linewidth=1))  # fmt: skip
        for n, line in enumerate(lines):
            ax.text(4, middle - 1.0 + 0.5 * n, line, ha="center", va="center",
                    fontweight="bold" if n == 0 else "normal",
                    color=look.text_on(look.tints[1]))  # fmt: skip
        top = middle - places * 1.15 / 2
        for place in range(places):
            y, here = top + place * 1.15, place == (tiles - 1) % places
            ax.add_patch(Rectangle((6.4, y), 1.6, 1, facecolor=look.paper, edgecolor=look.ink,
                                   linewidth=1.2))  # fmt: skip
            if here:
                kept = 1 - beyond * unit
                _box(ax, look, 6.4, y, 1.6, kept, f"tile {tiles - 1}", colour)
                ax.add_patch(
                    Rectangle((6.4, y + kept), 1.6, 1 - kept, facecolor=look.faint, hatch="....",
                              edgecolor=look.paper, linewidth=0)
                )  # fmt: skip
                ax.text(8.1, y + (1 + kept) / 2, "zeros", va="center")
                arrow = {"arrowstyle": "->", "color": look.ink, "linewidth": 1.4}
                ax.annotate("", (2.7, middle + 0.6), xytext=(1.65, tiles - 0.5), arrowprops=arrow)
                ax.annotate("", (6.35, y + 0.5), xytext=(5.3, middle + 0.6), arrowprops=arrow)
            else:
                ax.text(7.2, y + 0.5, "a place", ha="center", va="center", color=look.muted)
        ax.text(7.2, top - 0.15, "shared memory", ha="center", va="bottom")
        ax.text(4, middle - 1.5, "TMA", ha="center", va="bottom")
        ax.set_xlim(-0.1, 8.8)
        ax.set_ylim(tiles + 0.1, -0.6)
        ax.axis("off")
        ax.set_title(title)
    return fig


class Product(NamedTuple):
    """left (rows × depth) times right (depth × columns), added to or put into `result`."""

    label: str
    left: str
    right: str
    result: str
    columns: int
    depth: int
    left_in_registers: bool = False


def warpgroup_product(products: Sequence[Product], title: str, rows: int = 64) -> Figure:
    """Which rows of a product each warp of a warpgroup has, and where its operands lie.

    A panel for each product, matrices to one scale: the left operand beside the result, the right
    one above it. Hatched: in registers.
    """
    gap, warps = 18, 4
    with styled() as look:
        widths = [p.depth + gap + p.columns for p in products]
        fig, axes = plt.subplots(
            1, len(products), figsize=(8, 3.9), width_ratios=widths, squeeze=False
        )
        high = max(p.depth for p in products) + gap + rows
        for ax, p in zip(axes[0], products, strict=True):
            right, below = p.depth + gap, high - rows
            _matrix(ax, look, right, below - gap - p.depth, p.columns, p.depth, p.right, False)
            ax.text(right + p.columns / 2, below - gap - p.depth / 2, p.right, ha="center",
                    va="center", fontsize=12, color=look.text_on(_of(look, p.right)))  # fmt: skip
            for x, width, name, hatched in (
                (0, p.depth, p.left, p.left_in_registers),
                (right, p.columns, p.result, True),
            ):
                for warp in range(warps):
                    height = rows / warps
                    _matrix(ax, look, x, below + warp * height, width, height, name, hatched)
                    colour = _of(look, name)
                    ax.text(x + width / 2, below + (warp + 0.5) * height, f"warp {warp}",
                            ha="center", va="center", fontsize=9.5, color=look.text_on(colour),
                            bbox={"facecolor": colour, "edgecolor": "none",
                                  "pad": 0.8})  # fmt: skip
                ax.text(x + width / 2, high + 5, f"{name}: {rows} × {width}", ha="center", va="top")
            ax.text(right + p.columns / 2, below - gap - p.depth - 5,
                    f"{p.depth} × {p.columns}", ha="center", va="bottom")  # fmt: skip
            ax.set_xlim(-2, p.depth + gap + p.columns + 2)
            ax.set_ylim(high + 20, -18)
            ax.set_aspect("equal")
            ax.axis("off")
            ax.set_title(p.label, fontsize=10.5, fontweight="normal")
        fig.legend(
            handles=[Patch(facecolor=look.faint, label="in shared memory"),
                     Patch(facecolor=look.faint, hatch=REGISTERS, edgecolor=look.paper, linewidth=0,
                           label="in registers of the warp's own threads")],
            loc="outside lower center", ncols=2,
        )  # fmt: skip
        headline(fig, title)
    return fig


def _of(look: Look, name: str) -> str:
    return look.colour_of(name.rstrip("ᵀ"))


def _matrix(
    ax: Axes, look: Look, x: float, y: float, width: float, height: float, name: str, hatched: bool
) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=_of(look, name),
                           hatch=REGISTERS if hatched else "", edgecolor=look.paper,
                           linewidth=1.2))  # fmt: skip


def phases(barriers: Mapping[str, Sequence[float]], stop_s: float, title: str) -> Figure:
    """The phases of barriers against time, a row each: number, and parity as shade and hatch.

    `barriers`: label → when each phase was completed, in seconds. `stop_s`: the end of the axis.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 1.6 + 0.4 * len(barriers)))
        colours, hatches = (look.tints[1], look.tints[0]), ("", "....")
        for row, opened in enumerate(barriers.values()):
            ends = [*(time for time in opened if time < stop_s), stop_s]
            for number, (start, stop) in enumerate(zip([0.0, *ends], ends, strict=False)):
                parity = number % 2
                ax.barh(row, (stop - start) * 1e6, left=start * 1e6, height=0.74,
                        color=colours[parity], hatch=hatches[parity], edgecolor=look.paper,
                        linewidth=0.9)  # fmt: skip
                ax.text((start + stop) / 2 * 1e6, row, f"phase {number}", ha="center",
                        va="center_baseline", fontsize=9, color=look.text_on(colours[parity]),
                        bbox={"facecolor": colours[parity], "edgecolor": "none",
                              "pad": 0.8})  # fmt: skip
        ax.set_yticks(range(len(barriers)), list(barriers))
        ax.set_ylim(len(barriers) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlim(0, stop_s * 1e6)
        ax.set_xlabel("µs")
        fig.legend(
            handles=[Patch(facecolor=colour, hatch=hatch, edgecolor=look.paper, linewidth=0,
                           label=f"parity {x}")
                     for x, (colour, hatch) in enumerate(zip(colours, hatches, strict=True))],
            loc="outside lower right", ncols=2,
        )  # fmt: skip
        ax.set_title(title)
    return fig


class Share(NamedTuple):
    """Registers of each thread of a group: all, and those that its tiles need."""

    group: str
    registers: int
    needed: int = 0
    threads: int = 128


def register_shares(splits: Mapping[str, Sequence[Share]], total: int, title: str) -> Figure:
    """Stacked bars: the registers of an SM, a bracket a group of warps, and what its tiles need.

    `splits`: label → its groups. `total`: registers of the SM. Raises ValueError for more.
    """
    for label, shares in splits.items():
        if (used := sum(s.registers * s.threads for s in shares)) > total:
            raise ValueError(f"splits must have at most {total} registers, got {used} for {label}")
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 1.7 + 0.75 * len(splits)))
        for row, shares in enumerate(splits.values()):
            left = 0
            for share in shares:
                tiles = min(share.needed, share.registers)
                at = left
                for registers, colour in (
                    (tiles, look.sram), (share.registers - tiles, look.tints[0])
                ):  # fmt: skip
                    ax.barh(row, registers * share.threads / 1024, left=at / 1024, height=0.5,
                            color=colour, edgecolor=look.paper, linewidth=0.8)  # fmt: skip
                    at += registers * share.threads
                wide = share.registers * share.threads / total > 0.1
                text = (
                    f"{share.group}: {share.registers} a thread" if wide else f"{share.registers}"
                )
                ends = (left / 1024 + 0.2, at / 1024 - 0.2)
                ax.plot([ends[0], *ends, ends[1]], [row - y for y in (0.32, 0.37, 0.37, 0.32)],
                        color=look.ink, linewidth=0.9)  # fmt: skip
                ax.text(sum(ends) / 2, row - 0.41, text, ha="center", va="bottom", fontsize=9.5)
                left += share.registers * share.threads
        ax.axvline(total / 1024, color=look.ink, linewidth=1.2, linestyle="--")
        ax.set_yticks(range(len(splits)), list(splits))
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(splits) - 0.6, -0.8)
        ax.set_xlim(0, 1.02 * total / 1024)
        ax.set_xlabel("registers, in units of 1024 (dashed: all that an SM has)")
        fig.legend(
            handles=[Patch(color=look.sram, label="acc, s and p of a consumer"),
                     Patch(color=look.tints[0], label="all else")],
            loc="outside lower right", ncols=2,
        )  # fmt: skip
        ax.set_title(title)
    return fig
