"""One look for every figure: a colour a concept, units on the axes, direct labels.

Tensors have colours (Okabe and Ito's, told apart by colour-blind readers); stages have greys and a
marker each, so that a curve of a stage is never taken for a tensor. Writes are hatched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt

TENSOR = {
    "q": "#0072B2",
    "k": "#E69F00",
    "v": "#009E73",
    "s": "#D55E00",
    "p": "#8A4B2A",
    "o": "#CC79A7",
    "lse": "#56B4E9",
    "m": "#56B4E9",
    "l": "#3B4CA8",
    "acc": "#CC79A7",
    "delta": "#999933",
}
HBM = "#9AA5B1"
SRAM = "#7F3C8D"
INK = "#222222"
FAINT = "#DDDDDD"

STAGE = {
    "naive": "#C4C4C4",
    "tiled": "#9C9C9C",
    "online": "#737373",
    "flash1": "#494949",
    "flash2": "#111111",
}
STAGE_MARKER = {"naive": "o", "tiled": "s", "online": "D", "flash1": "v", "flash2": "^"}

# What `flashedu bench` times: grey, marker, line. Ours are black.
PEER = {
    "flash2": ("#111111", "D", "-"),
    "flash1": ("#111111", "s", "--"),
    "sdpa-cudnn": ("#5A5A5A", "^", "-"),
    "sdpa-flash": ("#5A5A5A", "o", "--"),
    "flex": ("#8C8C8C", "P", "-"),
    "sdpa-efficient": ("#8C8C8C", "v", "--"),
    "sdpa-math": ("#B4B4B4", "*", "--"),
    "standard": ("#B4B4B4", "X", "-"),
}

_RC = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "hatch.color": "white",
    "svg.hashsalt": "flashedu",
}


def colour_of(name: str) -> str:
    """The colour of a tensor or of a tile of it: `q`, `s_ij` and `dq` have those of q, s and q."""
    tensor = name.split("_")[0]
    return TENSOR.get(tensor) or TENSOR.get(tensor.removeprefix("d")) or INK


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the course's style, and leave the caller's as it was."""
    # Not rc_context: that would also undo what a notebook's backend sets at the first figure.
    settings: Any = plt.rcParams
    before = {key: settings[key] for key in _RC}
    settings.update(_RC)
    try:
        yield
    finally:
        settings.update(before)
