"""The online softmax: what one row keeps while tiles of keys pass by."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from flashedu.plots.style import styled


def running_state(
    scores: Sequence[float],
    m: Sequence[float],
    l: Sequence[float],
    acc: Sequence[float],
    block_k: int,
    title: str,
) -> Figure:
    """One row: its scores, and m, l and a column of acc after each tile of keys.

    Tiles in which m rose are shaded, with the factor α = exp(m before − m after) by which l and acc
    were scaled there.
    """
    with styled() as look:
        fig, axes = plt.subplots(
            3, 1, figsize=(8, 6), sharex=True, height_ratios=(1.35, 1, 1), squeeze=True
        )
        n, tiles = len(scores), len(m)
        edges = np.minimum(np.arange(tiles + 1) * block_k, n)
        axes[0].bar(np.arange(n) + 0.5, scores, width=0.7, color=look.tensor["s"], label="scores s")
        for ax, name, values in zip(axes, ("m", "l", "acc"), (m, l, acc), strict=True):
            ax.step(edges, np.r_[values[0], values], where="pre", color=look.tensor[name],
                    linewidth=2.6, label="running maximum m" if name == "m" else None)  # fmt: skip
            ax.vlines(edges[1:-1], 0, 1, color=look.faint, zorder=0, linewidth=1,
                      transform=ax.get_xaxis_transform())  # fmt: skip
        for j in range(1, tiles):
            if m[j] > m[j - 1]:
                for ax in axes:
                    ax.axvspan(edges[j], edges[j + 1], color=look.faint, alpha=0.5, zorder=0,
                               linewidth=0)  # fmt: skip
                if tiles <= 12:
                    middle, alpha = (edges[j] + edges[j + 1]) / 2, np.exp(m[j - 1] - m[j])
                    axes[1].text(middle, 1.02, f"α = {alpha:.2g}", ha="center", va="bottom",
                                 transform=axes[1].get_xaxis_transform())  # fmt: skip
        axes[0].set_ylabel("score")
        axes[0].legend(loc="upper left", ncols=2)
        axes[0].set_ylim(top=1.35 * max(scores))
        axes[1].set_ylabel("running sum l")
        axes[1].set_ylim(bottom=0)
        axes[2].set_ylabel("output so far, acc")
        axes[2].axhline(0, color=look.ink, linewidth=0.8)
        axes[2].set_xlabel(f"key (a line ends a tile of {block_k}; where m rises it is shaded)")
        axes[0].set_xlim(0, n)
        axes[0].set_title(title)
    return fig
