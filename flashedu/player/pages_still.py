"""The still picture of a cache: three moments of its pages, and its keys in pages and without."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flashedu.player.page import Pack
from flashedu.plots.style import Look, styled


def storyboard(packed: Pack) -> Figure:
    """Three moments of a cache: its pages, and its keys in pages and without, to one scale."""
    recorded, n = packed["moments"], packed["n_pages"]
    total = n * packed["page_size"]
    scale = max(total, *(sum(moment["contiguous"]) for moment in recorded))
    lines = -(-n // _columns(n))
    with styled() as look:
        fig = plt.figure(figsize=(9.2, 1.9 + 0.33 * lines), layout="none")
        grid = fig.add_gridspec(2, 3, height_ratios=(0.33 * lines, 0.62), left=0.012, right=0.988,
                                top=1 - 0.72 / (1.9 + 0.33 * lines), bottom=0.02,
                                wspace=0.06, hspace=0.1)  # fmt: skip
        title = f"{n} pages of {packed['page_size']} keys, and room for {packed['longest']} each"
        fig.suptitle(title, fontsize=11.5, fontweight="bold", x=0.008, y=0.985, ha="left")
        for column, at in enumerate(moments(packed)):
            ax = fig.add_subplot(grid[0, column])
            _pages(ax, packed, at, look)
            ax.set_title(_wrapped(f"step {at}: {recorded[at]['text']}"), fontsize=8.5,
                         fontweight="normal", loc="center")  # fmt: skip
            _keys(fig.add_subplot(grid[1, column]), recorded[at], total, scale, look)
    return fig


def moments(packed: Pack) -> list[int]:
    """The first copy, or a third of the way where there is none; the fullest memory; the end."""
    recorded = packed["moments"]
    last = len(recorded) - 1
    copies = [at for at, moment in enumerate(recorded) if moment["copied"]]
    fullest = min(range(len(recorded)), key=lambda at: recorded[at]["in_pages"][2])
    return sorted([copies[0] if copies else last // 3, fullest, last])


def _columns(n_pages: int) -> int:
    return max(4, math.ceil(math.sqrt(n_pages)))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 46)[:3])


def _pages(ax: Any, packed: Pack, at: int, look: Look) -> None:
    """Each page a box of its slots; a slot has the colours of the sequences that see its key."""
    n, size, moment = packed["n_pages"], packed["page_size"], packed["moments"][at]
    columns = _columns(n)
    for page in range(n):
        x, y = page % columns * 1.1, page // columns * 1.35
        users = [one for one in moment["sequences"] if page in one[2]]
        touched = page in moment["touched"]
        for i in range(size if users else 0):
            here = [one for one in users if one[2].index(page) * size + i < one[1]]
            for band, (name, *_) in enumerate(here):
                ax.add_artist(Rectangle(
                    (x + i / size, y + 0.45 + 0.6 * band / len(here)), 1 / size, 0.6 / len(here),
                    facecolor=packed["colours"][name], edgecolor="none",
                ))  # fmt: skip
            ax.add_artist(Rectangle(
                (x + i / size, y + 0.45), 1 / size, 0.6, facecolor="none" if here else look.faint,
                edgecolor=look.muted, linewidth=0.4, hatch=None if here else "////",
            ))  # fmt: skip
        ax.add_artist(Rectangle(
            (x, y), 1, 1.05, facecolor="none", edgecolor=look.ink if touched else look.muted,
            linewidth=1.8 if touched else 0.6, linestyle="-" if users else (0, (3, 3)),
        ))  # fmt: skip
        ax.text(x + 0.05, y + 0.24, str(page), fontsize=6.5, va="center", color=look.muted)
        ax.text(x + 0.95, y + 0.24, " ".join(one[0] for one in users), fontsize=7.5,
                fontweight="bold", va="center", ha="right")  # fmt: skip
    ax.set_xlim(-0.03, columns * 1.1 - 0.07)
    ax.set_ylim(-(-n // columns) * 1.35 - 0.25, -0.05)
    ax.axis("off")


def _keys(ax: Any, moment: Pack, total: int, scale: int, look: Look) -> None:
    """Keys held and idle, in pages and without; the stroke is the memory's end."""
    for line, (name, parts) in enumerate(
        (("pages", moment["in_pages"]), ("no pages", moment["contiguous"]))
    ):
        held, idle, _ = parts
        ax.barh(line, held, color=look.muted, height=0.42)
        ax.barh(line, idle, left=held, color=look.faint, hatch="////", height=0.42)
        ax.text(0, line - 0.33, f"{name}: {held} keys, {idle} idle", fontsize=8, va="bottom")
        ax.vlines(total, line - 0.28, line + 0.28, color=look.ink, linewidth=1.4)
    ax.set_xlim(0, 1.01 * scale)
    ax.set_ylim(1.3, -0.85)
    ax.axis("off")
