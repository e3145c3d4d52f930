"""Figures of a key and value cache: how much of its memory holds a key."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flashedu.plots.style import styled


def idle_memory(rooms: Mapping[str, tuple[int, float]], title: str) -> Figure:
    """Bars of memory in keys: what holds a key, and what is reserved and idle.

    `rooms`: label → the keys that are held, and the share of the memory that is idle, below 1.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 0.9 + 0.42 * len(rooms)))
        widest = max(keys / (1 - idle) for keys, idle in rooms.values())
        for line, (keys, idle) in enumerate(rooms.values()):
            room = keys / (1 - idle)
            names = ("holds a key", "idle") if line == 0 else (None, None)
            ax.barh(line, keys, color=look.hbm, label=names[0])
            ax.barh(line, room - keys, left=keys, color=look.faint, hatch="////",
                    edgecolor=look.muted, linewidth=0, label=names[1])  # fmt: skip
            ax.text(room + 0.01 * widest, line, f"{idle:.1%} idle", va="center", fontsize=9.5)
        ax.set_yticks(range(len(rooms)), list(rooms))
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15 * widest)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_xlabel("memory, in keys")
        ax.legend(loc="lower right")
        ax.set_title(title)
    return fig
