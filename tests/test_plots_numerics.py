"""The figures of rounding show the numbers that they were given, and read without colour."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from flashedu import plots
from flashedu.numerics import FORMATS
from flashedu.plots import style
from flashedu.testing import Error

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


def lines(fig, marker=None):
    found = [line for line in fig.axes[0].lines if len(line.get_xdata()) > 1]
    return [line for line in found if marker is None or line.get_marker() == marker]


def test_two_answers_are_drawn_in_the_unit_on_the_axis():
    fig = plots.two_answers({"a": [1e-8, -4e-8], "b": [2e-8, 3e-8]}, "title")
    assert "10$^{-8}$" in fig.axes[0].get_ylabel()
    first, second = lines(fig, "o") + lines(fig, "s")
    assert list(first.get_ydata()) == pytest.approx([1, -4])
    assert list(second.get_ydata()) == pytest.approx([2, 3])
    with pytest.raises(ValueError, match="zip"):
        plots.two_answers({"a": [1.0], "b": [1.0], "c": [1.0]}, "title")


def test_a_format_has_as_many_cells_as_bits_and_mantissas_begin_together():
    fig = plots.bit_layout(FORMATS, "title")
    for row, form in enumerate(FORMATS):
        cells = [p for p in fig.axes[0].patches if round(p.get_y() + 0.36) == row]
        assert len(cells) == form.bits
        assert sum(cell.get_x() >= 0 for cell in cells) == form.mantissa_bits
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert any("65,504" in text for text in texts)
    assert any("3.39 · 10$^{38}$" in text for text in texts)


def test_errors_and_budgets_are_the_ones_given():
    found = {"float16": [Error(1e-4, 1e-3), Error(2e-5, 5e-4)]}
    fig = plots.error_against_n([256, 1024], found, [0.1, 0.05], 1e-2, "title")
    budget, error, impostor, tolerance = lines(fig)
    assert list(budget.get_ydata()) == [1e-3, 5e-4]
    assert budget.get_linestyle() == "--"
    assert list(error.get_ydata()) == [1e-4, 2e-5]
    assert list(impostor.get_ydata()) == [0.1, 0.05]
    assert list(tolerance.get_ydata()) == [1e-2, 1e-2]


def test_a_point_right_of_the_line_is_over_its_budget():
    row = {"float32": Error(1e-7, 1e-5), "tf32": Error(4e-5, 1e-5)}
    fig = plots.against_budget({"o": row, "dq": row}, "title")
    points = [line for line in fig.axes[0].lines if line.get_marker() != "None"]
    assert [line.get_xdata()[0] for line in points] == pytest.approx([0.01, 4] * 2)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["o", "dq"]
    legend = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert legend == ["float32", "tf32"]


def test_a_running_sum_ends_at_its_last_value():
    fig = plots.running_sums({"float32": [1, 2, 3], "bfloat16": [1, 2, 2]}, "title")
    assert [list(line.get_ydata()) for line in lines(fig)] == [[1, 2, 3], [1, 2, 2]]
    assert [text.get_text() for text in fig.axes[0].texts] == ["float32: 3", "bfloat16: 2"]


def test_every_order_is_counted_once():
    fig = plots.orders([0, 0, 1, -2, 0], "title")
    bars = {p.get_x() + p.get_width() / 2: p.get_height() for p in fig.axes[0].patches}
    assert {round(x): height for x, height in bars.items()} == {-2: 1, 0: 3, 1: 1}


@pytest.mark.parametrize("look", style.THEMES.values(), ids=style.THEMES)
def test_every_format_has_a_colour_that_greyscale_tells_apart_and_a_marker(look):
    names = {form.name for form in FORMATS}
    assert set(look.format) == set(style.FORMAT_MARKER) == names
    assert len(set(style.FORMAT_MARKER.values())) == len(names)
    greys = [np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in look.format.values()]
    for a, b in itertools.combinations(greys, 2):
        assert abs(a - b) > 0.12


def test_a_figure_leaves_the_readers_style_as_it_was():
    before = dict(matplotlib.rcParams)
    plots.bit_layout(FORMATS, "title")
    assert dict(matplotlib.rcParams) == before
