"""One look for every figure: a colour a concept, units on the axes, direct labels.

Tensors have colours (Okabe and Ito's, told apart by colour-blind readers); stages have greys and a
marker each, so that a curve of a stage is never taken for a tensor. Writes are hatched.

There are two themes, `light` for paper and `dark` for dark slides and notebooks: `use` chooses one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

STAGE_MARKER = {
    "naive": "o", "tiled": "s", "online": "D", "flash1": "v", "flash2": "^",
    "varlen": "<", "decode": "P", "flash3": "*",
}  # fmt: skip

# What `flashedu bench` times: marker and line. Their greys are in `Look.peer`.
PEER_LINE = {
    "decode": ("d", "-."),
    "flash2": ("D", "-"),
    "flash3": ("h", ":"),
    "flash3-det": ("H", ":"),
    "flash1": ("s", "--"),
    "sdpa-cudnn": ("^", "-"),
    "sdpa-flash": ("o", "--"),
    "flex": ("P", "-"),
    "fa4": ("p", "-."),
    "sdpa-efficient": ("v", "--"),
    "sdpa-math": ("*", "--"),
    "standard": ("X", "-"),
    "copy": ("x", ":"),
}

# Sequences in a cache, in turn, in both themes; dark text on them. From Tol's light scheme.
SEQUENCES = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#BBCC33")

FORMAT_MARKER = {"float32": "o", "tf32": "^", "float16": "s", "bfloat16": "D"}


@dataclass(frozen=True)
class Look:
    """The colours of one theme."""

    paper: str  # behind everything
    ink: str  # text, axes
    muted: str  # text and marks of what is only mentioned
    faint: str  # what is idle, and lines that guide the eye
    tensor: dict[str, str]
    turns: tuple[str, ...]  # tiles of s, from the first that is computed to the last
    masked: str  # a tile of s that needs the mask
    hbm: str
    l2: str
    sram: str
    shades: tuple[str, str, str]  # of sram, for programs side by side
    tints: tuple[str, str]  # paler, with text on them
    stage: dict[str, str]
    peer: dict[str, str]
    format: dict[str, str]
    exponent: str
    mantissa: str

    def colour_of(self, name: str) -> str:
        """The colour of a tensor or of a tile of it: `s_ij` and `dq` have those of s and q."""
        tensor = name.split("_")[0]
        return self.tensor.get(tensor) or self.tensor.get(tensor.removeprefix("d")) or self.ink

    def text_on(self, colour: Any) -> str:
        """For a label on this colour: paper or ink, whichever is easier to read."""
        return max((self.paper, self.ink), key=lambda text: contrast(text, colour))

    @property
    def turn_map(self) -> LinearSegmentedColormap:
        """`turns` as a colour map."""
        return LinearSegmentedColormap.from_list("turns", self.turns)


LIGHT = Look(
    paper="#FFFFFF",
    ink="#222222",
    muted="#6B6B6B",
    faint="#DDDDDD",
    tensor={
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
    },
    turns=("#FFCDB1", "#FF9D61", "#EA721F", "#C15300", "#933A00", "#642600"),
    masked="#F3B58F",
    hbm="#9AA5B1",
    l2="#5B7FA6",
    sram="#7F3C8D",
    shades=("#7F3C8D", "#BE95C8", "#4A1758"),
    tints=("#D9C3DE", "#F1E8F3"),
    stage={
        "naive": "#C4C4C4",
        "tiled": "#9C9C9C",
        "online": "#737373",
        "flash1": "#494949",
        "flash2": "#111111",
        "varlen": "#5E5E5E",  # beside flash2, never among the ladder
        "decode": "#868686",
        "flash3": "#2E2E2E",
    },
    peer={  # ours are black, but for one
        "decode": "#111111",
        "flash2": "#111111",
        "flash3": "#111111",
        "flash1": "#111111",
        "sdpa-cudnn": "#5A5A5A",
        "sdpa-flash": "#5A5A5A",
        "flex": "#8C8C8C",
        "fa4": "#5A5A5A",
        "flash3-det": "#8C8C8C",
        "sdpa-efficient": "#8C8C8C",
        "sdpa-math": "#B4B4B4",
        "standard": "#B4B4B4",
        "copy": "#B4B4B4",
    },
    format={
        "float32": "#222255",
        "tf32": "#5599BB",
        "float16": "#AA3377",
        "bfloat16": "#DDAA33",
    },
    exponent="#8FA3B8",
    mantissa="#E3C97F",
)

DARK = Look(
    paper="#14161B",
    ink="#ECECEC",
    muted="#A0A0A0",
    faint="#3A3D44",
    tensor={
        "q": "#3F93D6",
        "k": "#F0B429",
        "v": "#22A87C",
        "s": "#EE7D34",
        "p": "#9C5F3C",
        "o": "#E8A5C8",
        "lse": "#8FD0F5",
        "m": "#8FD0F5",
        "l": "#8292E6",
        "acc": "#E8A5C8",
        "delta": "#B5B54A",
    },
    turns=("#7A3000", "#A74500", "#D35F04", "#F97E2C", "#FEAF80", "#FFDBC8"),
    masked="#8A4820",
    hbm="#8692A0",
    l2="#7FA3CC",
    sram="#B57BC6",
    shades=("#B57BC6", "#84529A", "#DDB8E8"),
    tints=("#5C3D66", "#38283E"),
    stage={
        "naive": "#626262",
        "tiled": "#898989",
        "online": "#B0B0B0",
        "flash1": "#D7D7D7",
        "flash2": "#FEFEFE",
        "varlen": "#C4C4C4",
        "decode": "#9C9C9C",
        "flash3": "#ECECEC",
    },
    peer={
        "decode": "#F4F4F4",
        "flash2": "#F4F4F4",
        "flash3": "#F4F4F4",
        "flash1": "#F4F4F4",
        "sdpa-cudnn": "#BEBEBE",
        "sdpa-flash": "#BEBEBE",
        "flex": "#909090",
        "fa4": "#BEBEBE",
        "flash3-det": "#909090",
        "sdpa-efficient": "#909090",
        "sdpa-math": "#6A6A6A",
        "standard": "#6A6A6A",
        "copy": "#6A6A6A",
    },
    format={
        "float32": "#F2F2FF",
        "tf32": "#5AA5CB",
        "float16": "#C2508F",
        "bfloat16": "#F0CE6B",
    },
    exponent="#5F7890",
    mantissa="#C9A94E",
)

THEMES = {"light": LIGHT, "dark": DARK}

TENSOR, STAGE = LIGHT.tensor, LIGHT.stage

_current = LIGHT


def use(name: str) -> None:
    """Draw all figures from now on in that theme: "light", as at the start, or "dark"."""
    global _current
    if name not in THEMES:
        raise ValueError(f"name must be one of {', '.join(THEMES)}, got {name!r}")
    _current = THEMES[name]


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Draw the figures of a `with` block in that theme."""
    global _current
    before = _current
    use(name)
    try:
        yield
    finally:
        _current = before


def contrast(a: Any, b: Any) -> float:
    """From 1, none, to 21, black on white. Source: WCAG 2.2, contrast ratio."""
    low, high = sorted(map(_luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Any) -> float:
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _settings(look: Look) -> dict[str, Any]:
    inks = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    return {
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "figure.constrained_layout.use": True,
        "figure.facecolor": look.paper,
        "figure.edgecolor": look.paper,
        "axes.facecolor": look.paper,
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(inks, look.ink),
        "lines.linewidth": 1.8,
        "lines.markersize": 6,
        "legend.frameon": False,
        "hatch.linewidth": 0.7,
        "hatch.color": look.paper,
        "svg.hashsalt": "flashedu",
    }


@contextmanager
def styled() -> Iterator[Look]:
    """Draw in the course's style, and leave the caller's as it was. Yields the theme's colours."""
    # Not rc_context: that would also undo what a notebook's backend sets at the first figure.
    settings: Any = plt.rcParams
    look, new = _current, _settings(_current)
    before = {key: settings[key] for key in new}
    settings.update(new)
    try:
        yield look
    finally:
        settings.update(before)


def headline(fig: Figure, title: str) -> None:
    """The title of a figure of several panels."""
    fig.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places as near to those wanted as can be, in the same order, at least `gap` apart.

    For labels at the ends of lines. Equal places keep the order in which they stand.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Neighbours that are too near form a group, which is centred on the mean of what it wanted.
    groups: list[list[int]] = []
    middles: list[float] = []
    for i in order:
        group, middle = [i], wanted[i]
        while groups and middle - middles[-1] < gap * (len(group) + len(groups[-1])) / 2:
            group = groups.pop() + group
            middles.pop()
            middle = sum(wanted[j] for j in group) / len(group)
        groups.append(group)
        middles.append(middle)
    places = [0.0] * len(wanted)
    for group, middle in zip(groups, middles, strict=True):
        for at, i in enumerate(group):
            places[i] = middle + gap * (at - (len(group) - 1) / 2)
    return places
