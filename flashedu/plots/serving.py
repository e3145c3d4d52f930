"""Figures of a model that is served: what its memory is spent on."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flashedu.memory.gpus import GPU
from flashedu.plots.style import styled
from flashedu.units import human_bytes

PARTS = ("weights", "KV cache", "attention", "activations")
HATCHES = dict(zip(PARTS, ("", "....", "////", "||||"), strict=True))  # told apart in grey too


def card_memory(
    plans: Mapping[str, Mapping[str, int]],
    card: GPU,
    title: str,
    allowed: Mapping[str, float] | None = None,
) -> Figure:
    """Stacked bars: the memory of each plan by what it is spent on, against the card's.

    `plans`: label → part → bytes, the parts those of PARTS. `allowed`: label → share of the card
    that it may use, marked where it is less than all.
    """
    with styled() as look:
        colours = {"weights": look.hbm, "KV cache": look.tensor["k"],
                   "attention": look.tensor["s"], "activations": look.tints[0]}  # fmt: skip
        fig, ax = plt.subplots(figsize=(8, 1.75 + 0.62 * len(plans)))
        totals = [sum(parts.values()) for parts in plans.values()]
        right, marked = float(max(card.hbm_bytes, *totals)), False
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
                        label=None if marked else "may be used")  # fmt: skip
                marked = True
            end = limit if left < limit < left + 0.25 * right else left
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
        fig.legend(loc="outside lower left", ncols=len(PARTS) + 1)
        ax.set_title(title)
    return fig
