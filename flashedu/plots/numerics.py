"""Figures of rounding: bits of a format, errors beside their budgets, sums that stand still."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from flashedu.plots.style import FORMAT_MARKER, styled

if TYPE_CHECKING:  # both load torch
    from flashedu.numerics import Format
    from flashedu.testing import Error


def two_answers(errors: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Points: the error of each of some outputs, for two results of the same inputs.

    `errors`: label → result minus exact, one for each output; two labels.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 3.4))
        pair = np.array(list(errors.values()), dtype=float)
        power = int(np.floor(np.log10(np.abs(pair).max())))
        pair = pair / 10.0**power
        at = np.arange(pair.shape[1])
        ax.axhline(0, color=look.ink, linewidth=1)
        ax.vlines(at, pair[0], pair[1], color=look.faint, linewidth=2.5, zorder=1)
        faces = (("o", look.ink), ("s", look.paper))
        for label, y, (marker, face) in zip(errors, pair, faces, strict=True):
            ax.plot(
                at, y, marker, color=look.ink, markerfacecolor=face, markersize=5.5, label=label
            )
        ax.text(at[-1] + 0.8, 0, "exact", va="center")
        ax.set_xlim(-1, at[-1] + 0.6)
        ax.set_xlabel("output")
        ax.set_ylabel(f"error (10$^{{{power}}}$)")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        ax.set_title(title, pad=26)
    return fig


def bit_layout(formats: Sequence[Format], title: str) -> Figure:
    """Each format as a row of bits, its exponent and mantissa side by side with the others'."""
    with styled() as look:
        fig, ax = plt.subplots(figsize=(9, 0.7 + 0.55 * len(formats)))
        for row, form in enumerate(formats):
            parts = (
                ("", -form.exponent_bits - 1, 1, look.ink),
                (f"exponent {form.exponent_bits}", -form.exponent_bits, form.exponent_bits,
                 look.exponent),
                (f"mantissa {form.mantissa_bits}", 0, form.mantissa_bits, look.mantissa),
            )  # fmt: skip
            for text, left, width, colour in parts:
                for bit in range(left, left + width):
                    ax.add_patch(Rectangle((bit, row - 0.36), 1, 0.72, facecolor=colour,
                                           edgecolor=look.paper, linewidth=1.2))  # fmt: skip
                ax.text(left + width / 2, row, text, ha="center", va="center", fontsize=10.5,
                        color=look.text_on(colour),
                        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})  # fmt: skip
            ax.text(-9.6, row, form.name, ha="right", va="center", fontweight="bold")
            ax.text(23.6, row, f"ε = 2$^{{-{form.mantissa_bits}}}$, up to {_large(form.largest)}",
                    va="center")  # fmt: skip
        ax.text(-8.5, -0.55, "sign", ha="center", fontsize=10.5)
        ax.set_xlim(-14, 34.5)
        ax.set_ylim(len(formats) - 0.5, -0.8)
        ax.axis("off")
        ax.set_title(title)
    return fig


def error_against_n(
    n: Sequence[int],
    found: Mapping[str, Sequence[Error]],
    impostor: Sequence[float],
    atol: float,
    title: str,
) -> Figure:
    """Curves: errors of right results and (dashed) their budgets, beside an impostor's error.

    `found`: format → an error and its budget for each of `n`. `impostor`: the error of a wrong
    result for each of `n`. `atol`: a fixed tolerance, drawn as a line.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4.6))
        for name, errors in found.items():
            ax.loglog(n, [e.budget for e in errors], color=look.format[name], linestyle="--")
            ax.loglog(
                n, [e.error for e in errors], color=look.format[name], marker=FORMAT_MARKER[name]
            )
            ax.annotate(name, (n[-1], errors[-1].error), xytext=(10, 0), va="center",
                        textcoords="offset points", fontweight="bold")  # fmt: skip
        ax.loglog(n, impostor, color=look.tensor["s"], marker="X", markersize=8, linewidth=2.6)
        ax.annotate("mean of v, wrong", (n[1], impostor[1]), xytext=(6, 8),
                    textcoords="offset points", fontweight="bold")  # fmt: skip
        ax.axhline(atol, color=look.ink, linewidth=1)
        ax.text(n[-1] * 1.2, atol * 1.1, f"tolerance {atol:g}", va="bottom", fontsize=9.5)
        ax.legend(
            handles=[Line2D([], [], color=look.ink, marker="o", label="error"),
                     Line2D([], [], color=look.ink, linestyle="--", label="its budget")],
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0,
        )  # fmt: skip
        ax.set_xticks(n, [f"{value:,}" for value in n])
        ax.set_xlim(n[0] * 0.8, n[-1] * 4.2)
        ax.set_xlabel("keys N")
        ax.set_ylabel("largest error of o")
        ax.minorticks_off()
        ax.set_title(title, pad=26)
    return fig


def against_budget(rows: Mapping[str, Mapping[str, Error]], title: str) -> Figure:
    """Points: error over budget, a row for each result; right of the line is too much.

    `rows`: label → format → error and budget.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 1.1 + 0.3 * len(rows)))
        names = list(next(iter(rows.values())))
        for y, found in enumerate(rows.values()):
            ratios = [error.error / error.budget for error in found.values()]
            ax.plot(ratios, [y] * len(ratios), color=look.faint, linewidth=2.5, zorder=1)
            for name, ratio in zip(names, ratios, strict=True):
                ax.plot(ratio, y, FORMAT_MARKER[name], color=look.format[name], markersize=8,
                        label=name if y == 0 else None)  # fmt: skip
        ax.axvline(1, color=look.ink, linewidth=1.2, zorder=0)
        ax.text(1, -0.75, " the budget", fontsize=9.5, va="bottom")
        ax.set_xscale("log")
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set_ylim(len(rows) - 0.5, -0.8)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", color=look.faint, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel("error / budget")
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
        ax.set_title(title, pad=18)
    return fig


def running_sums(sums: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Curves: a sum of ones after each addition, in each format, beside the true one.

    `sums`: format → the sum after 1, 2, … additions.
    """
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 3.8))
        for name, values in sums.items():
            n = np.arange(1, len(values) + 1)
            every = max(1, len(values) // 8)
            ax.plot(n, values, color=look.format[name], marker=FORMAT_MARKER[name],
                    markevery=(every - 1, every), linewidth=2.4)  # fmt: skip
            ax.annotate(f"{name}: {values[-1]:,.0f}", (n[-1], values[-1]), xytext=(10, 0),
                        textcoords="offset points", va="center", fontweight="bold")  # fmt: skip
        ax.set_xlim(0, 1.28 * n[-1])
        ax.set_ylim(bottom=0)
        ax.set_xticks(np.linspace(0, n[-1], 6))
        ax.set_xlabel("ones added")
        ax.set_ylabel("sum")
        ax.set_title(title)
    return fig


def orders(steps: Sequence[int], title: str) -> Figure:
    """Bars: how many orders of the same additions ended how many steps from the exact sum."""
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 3.2))
        found, counts = np.unique(np.asarray(steps), return_counts=True)
        bars = ax.bar(found, counts, width=0.8, color=look.format["float32"])
        ax.bar_label(bars)
        ax.set_xticks(range(int(found.min()), int(found.max()) + 1))
        ax.set_xlabel("float32 steps between the sum and the exact one, rounded")
        ax.set_ylabel("orders")
        ax.set_title(title)
    return fig


def _large(x: float) -> str:
    if x < 1e6:
        return f"{x:,.0f}"
    power = int(np.floor(np.log10(x)))
    return f"{x / 10.0**power:.2f} · 10$^{{{power}}}$"
