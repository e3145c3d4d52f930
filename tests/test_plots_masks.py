"""The figures of masks and of training show what they were given."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Polygon, Rectangle

from flashedu import plots
from flashedu.plots.style import LIGHT

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


def seen(ax):
    """(query, key) of each coloured square."""
    colour = LIGHT.tensor["s"].lower()
    return {
        (int(patch.get_y()), int(patch.get_x()))
        for patch in ax.patches
        if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) == colour
    }


def area(triangle):
    (x0, y0), (_, y1), (x2, _), *_ = triangle.get_xy()
    return (x2 - x0) * (y1 - y0) / 2


def test_a_square_is_coloured_where_a_query_sees_a_key():
    one, other = plots.runs({"a": ([0, 1], [1, 3]), "b": ([2], [2])}, 3, "title").axes
    assert seen(one) == {(0, 0), (1, 1), (1, 2)}
    assert seen(other) == set()
    assert len(other.patches) == 3


def test_the_numbers_of_a_run_stand_beside_its_row():
    (ax,) = plots.runs({"a": ([0, 1], [1, 3])}, 3, "title").axes
    assert [text.get_text() for text in ax.texts] == ["0", "1", "1", "3", "first", "stop"]
    (ax,) = plots.runs({"a": ([0, 1], [1, 3])}, 3, "title", numbers=False).axes
    assert not ax.texts


def test_the_triangles_of_texts_are_as_large_padded_and_packed():
    lengths = [41, 23, 9, 32]
    left, right = plots.padded_and_packed(lengths, "title").axes
    of_texts, padded = [], []
    for patch in left.patches:
        if isinstance(patch, Polygon):
            (padded if patch.get_hatch() else of_texts).append(area(patch))
    assert of_texts == pytest.approx([n * n / 2 for n in lengths])
    assert padded == pytest.approx([41 * 41 / 2] * 4)
    packed = [patch for patch in right.patches if isinstance(patch, Polygon)]
    assert [area(patch) for patch in packed] == pytest.approx(of_texts)
    assert [tuple(patch.get_xy()[0]) for patch in packed] == [(0, 0), (41, 41), (64, 64), (73, 73)]


def test_areas_have_one_scale_on_both_sides():
    fig = plots.padded_and_packed([41, 23, 9, 32], "title")
    fig.canvas.draw()
    left, right = (ax.transData.get_matrix()[0, 0] for ax in fig.axes)
    assert left == pytest.approx(right, rel=0.1)


def test_losses_are_drawn_with_their_difference_and_its_bound():
    above, below = plots.losses({"a": [3.0, 2.0], "b": [3.0, 2.5]}, 0.1, "title").axes
    one, other = above.get_lines()
    assert (list(one.get_ydata()), list(other.get_ydata())) == ([3.0, 2.0], [3.0, 2.5])
    apart, bound = below.get_lines()
    assert list(apart.get_ydata()) == [1e-8, 0.5]
    assert list(bound.get_ydata()) == [0.1, 0.1]
    assert below.get_ylim()[1] > 0.5
