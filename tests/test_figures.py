"""Every figure of the course can be read: light and dark, on paper, projected and in grey."""

from __future__ import annotations

import math
import re
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.colors import CSS4_COLORS, to_hex, to_rgba
from matplotlib.text import Annotation, Text

from flashedu import ladder, plots
from flashedu.memory import Problem
from flashedu.plots.style import DARK, LIGHT, THEMES, contrast, spread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import figures

OTHER = {"light": DARK, "dark": LIGHT}
FIGURES = sorted(set(plots.__all__) - {"theme", "use"})
CASES = [(name, theme) for name in figures.EXAMPLES for theme in THEMES]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def drawn(request):
    """A figure with its layout done, and its theme."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    name, theme = request.param
    with plots.theme(theme):
        fig = figures.EXAMPLES[name]()
    fig.canvas.draw()
    yield fig, theme
    plt.close("all")


def texts(fig):
    """All that is written: not the labels of ticks beyond the limits, or of an axis that is off."""
    hidden = set()
    for axis in fig.findobj(Axis):
        shown = axis._update_ticks() if axis.axes.axison else []
        for tick in {*axis.get_major_ticks(), *axis.get_minor_ticks()} - set(shown):
            hidden |= {tick.label1, tick.label2}
    found = (text for text in fig.findobj(Text) if text.get_visible() and text not in hidden)
    return [text for text in found if text.get_text().strip()]


def extent(text, renderer):
    """Of the text alone, without the arrow of an annotation."""
    if isinstance(text, Annotation):
        text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def corners(text, renderer):
    """Of the rectangle that a text fills, turned as the text is."""
    outer, angle = extent(text, renderer), text.get_rotation()
    text.set_rotation(0)
    flat = extent(text, renderer)
    text.set_rotation(angle)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    middle = np.array([(outer.x0 + outer.x1) / 2, (outer.y0 + outer.y1) / 2])
    half = np.array([[sx * flat.width / 2, sy * flat.height / 2]
                     for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))])  # fmt: skip
    return middle + half @ np.array([[c, s], [-s, c]])


def overlap(a, b):
    """In pixels, along the direction in which two convex shapes overlap least; 0 if they do not."""
    depths = []
    for shape in (a, b):
        for edge in np.roll(shape, -1, 0) - shape:
            normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
            pa, pb = a @ normal, b @ normal
            depths.append(min(pa.max(), pb.max()) - max(pa.min(), pb.min()))
    return max(0.0, min(depths))


def test_every_figure_has_an_example():
    assert {name for name in FIGURES if name not in figures.EXAMPLES} == set()


def test_no_text_is_over_another_or_cut_off(drawn):
    fig, _ = drawn
    renderer = fig.canvas.get_renderer()
    boxes = [(text.get_text(), corners(text, renderer)) for text in texts(fig)]
    width, height = fig.bbox.width, fig.bbox.height
    for what, box in boxes:
        assert box.min() > -1, f"{what!r} is cut off"
        assert box[:, 0].max() < width + 1, f"{what!r} is cut off at the right"
        assert box[:, 1].max() < height + 1, f"{what!r} is cut off at the top"
    for (first, a), (second, b) in combinations(boxes, 2):
        assert overlap(a, b) < 1.5, f"{first!r} and {second!r} overlap"


def test_no_text_is_too_small(drawn):
    fig, _ = drawn
    widths = max(1.0, fig.get_figwidth() / 8)
    for text in texts(fig):
        assert text.get_fontsize() / widths >= 8.99, f"{text.get_text()!r} is too small"


def test_text_stands_out_from_what_is_behind_it(drawn):
    fig, theme = drawn
    renderer, paper = fig.canvas.get_renderer(), THEMES[theme].paper
    found = [(text, extent(text, renderer)) for text in texts(fig)]
    fig.set_layout_engine("none")
    for text, _ in found:
        text.set_visible(False)
    fig.canvas.draw()
    pixels = np.asarray(fig.canvas.buffer_rgba())[::-1]
    for text, box in found:
        patch = text.get_bbox_patch()
        rows, columns = (slice(max(0, int(low)), int(high) + 1) for low, high in
                         ((box.y0, box.y1), (box.x0, box.x1)))  # fmt: skip
        behind = pixels[rows, columns].reshape(-1, 4)[:, :3]
        colours, counts = np.unique(behind, axis=0, return_counts=True)
        most = to_hex(colours[counts.argmax()] / 255)
        if patch is not None and to_rgba(patch.get_facecolor())[3]:
            most = to_hex(patch.get_facecolor())
        needed = 4.5 if contrast(most, paper) < 1.05 else 3
        seen = contrast(text.get_color(), most)
        assert seen >= needed, f"{text.get_text()!r} on {most}: {seen:.2f}"


def test_a_figure_has_no_colour_of_the_other_theme(drawn):
    fig, theme = drawn
    foreign = {OTHER[theme].paper.lower(), OTHER[theme].ink.lower()}
    assert to_hex(fig.get_facecolor()) == THEMES[theme].paper.lower()
    for artist in fig.findobj():
        for getter in ("get_facecolor", "get_edgecolor", "get_color", "get_markerfacecolor",
                       "get_markeredgecolor"):  # fmt: skip
            colours = getattr(artist, getter, list)()
            for colour in _each(colours):
                if to_rgba(colour)[3]:
                    assert to_hex(colour) not in foreign, f"{artist} has {to_hex(colour)}"


def _each(colours):
    if isinstance(colours, str):
        return [colours] if colours != "none" else []
    colours = np.atleast_2d(np.asarray(colours, dtype=float))
    return [colour for colour in colours if len(colour)]


def test_no_figure_has_a_colour_of_its_own():
    folder = Path(plots.__file__).parent
    files = sorted(set(folder.glob("*.py")) - {folder / "style.py"})
    named = "|".join(CSS4_COLORS)
    for path in files:
        found = re.findall(rf"[\"'](#[0-9A-Fa-f]{{3,8}}|C\d|{named})[\"']", path.read_text("utf-8"))
        assert not found, f"{path.name} has {found}: a colour belongs into style.py"


def test_themes_are_chosen_for_good_or_for_a_block():
    assert to_hex(plots.bars({"a": 1}, "unit", "title").get_facecolor()) == "#ffffff"
    with plots.theme("dark"):
        assert to_hex(plots.bars({"a": 1}, "unit", "title").get_facecolor()) == DARK.paper.lower()
    assert to_hex(plots.bars({"a": 1}, "unit", "title").get_facecolor()) == "#ffffff"
    plots.use("dark")
    try:
        assert to_hex(plots.bars({"a": 1}, "unit", "title").get_facecolor()) == DARK.paper.lower()
    finally:
        plots.use("light")
    with pytest.raises(ValueError, match="name must be one of light, dark, got 'sepia'"):
        plots.use("sepia")


def lightness(colour):
    """CIE L*: equal steps look equal."""
    linear = contrast(colour, "#000000") * 0.05 - 0.05
    return 116 * linear ** (1 / 3) - 16 if linear > 216 / 24389 else linear * 24389 / 27


@pytest.mark.parametrize("look", THEMES.values(), ids=THEMES)
def test_turns_are_coloured_in_even_steps_of_lightness(look):
    steps = np.diff([lightness(look.turn_map(x)[:3]) for x in np.linspace(0, 1, 21)])
    assert (steps < 0).all() if look is LIGHT else (steps > 0).all()
    assert np.abs(steps).max() < 1.25 * np.abs(steps).min()
    first, last = (lightness(look.turn_map(x)[:3]) for x in (0.0, 1.0))
    assert abs(first - last) > 55
    assert abs(first - lightness(look.paper)) > 10


@pytest.fixture(scope="module")
def long():
    problem = Problem(Nq=4096, D=16)
    return problem, ladder.count("tiled", problem, trace=True).trace


@pytest.mark.parametrize("draw", [
    lambda p, trace: plots.visits(trace, p, "title"),
    lambda p, trace: plots.cumulative_traffic({"tiled": trace}, "title"),
    lambda p, trace: plots.sram_occupancy(trace, "title", capacity_bytes=2**17),
], ids=["visits", "cumulative_traffic", "sram_occupancy"])  # fmt: skip
def test_a_trace_of_2048_tiles_is_drawn_in_two_seconds(long, draw):
    problem, trace = long
    assert len(trace) > 14_000
    start = time.process_time()
    draw(problem, trace).canvas.draw()
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("wanted", "places"),
    [([], []), ([1, 9], [1, 9]), ([5, 5], [3, 7]), ([5, 4, 20], [6.5, 2.5, 20]),
     ([0, 3, 6], [-1, 3, 7]), ([0, 0, 5], [-7 / 3, 5 / 3, 17 / 3])],
)  # fmt: skip
def test_labels_are_spread_as_little_as_they_can_be(wanted, places):
    assert spread(wanted, 4) == pytest.approx(places)


def test_the_sheet_shows_every_example(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "EXAMPLES", {"bars": figures.bars, "orders": figures.orders})
    written = figures.write(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        f"{theme}{rest}" for theme in THEMES for rest in ("/bars.png", "/orders.png", ".png")
    ]
    assert figures.main(["a", "b"]) == 2
