"""The figures of what Hopper has show each warp, each place, each phase and each register."""

from __future__ import annotations

import pytest

from flashedu import plots
from flashedu.plots.hopper import Product, Share
from flashedu.sm import SM, Arrive, Barrier, Pause

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


def box(ax, text):
    """(left, top, width) of the rectangle behind that text; the first of several."""
    (x, y) = next(t.get_position() for t in ax.texts if t.get_text() == text)
    inside = [p for p in ax.patches if p.contains_point(ax.transData.transform((x, y)))]
    found = min(inside, key=lambda p: p.get_width() * p.get_height())
    return found.get_x(), found.get_y(), found.get_width()


def test_a_warp_sits_in_the_quarter_of_its_number_modulo_four():
    (ax,) = plots.one_sm({"a": 4, "b": 4, "c": 1}, [("q", 10)], 100, "title").axes
    lefts = [box(ax, f"warp {n}")[0] for n in range(9)]
    assert lefts[:4] == lefts[4:8] == sorted(set(lefts))
    assert lefts[8] == lefts[0]
    assert box(ax, "tensor core")[0] == lefts[0]


def test_places_are_to_scale_with_shared_memory():
    (ax,) = plots.one_sm({"a": 4}, [("q", 25), ("k", 50)], 100, "title").axes
    whole = max(p.get_width() for p in ax.patches if p.get_height() == 1)
    assert box(ax, "q")[2] == pytest.approx(whole / 4)
    assert box(ax, "k")[2] == pytest.approx(whole / 2)
    assert box(ax, "k")[0] == pytest.approx(box(ax, "q")[0] + whole / 4)


def test_places_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="places must fit the 100 bytes of shared memory"):
        plots.one_sm({"a": 4}, [("q", 101)], 100, "title")


def test_what_lies_beyond_the_end_is_drawn_to_scale_as_zeros():
    (ax,) = plots.tile_copy(448, 128, 128, 2, "title").axes
    heights = [p.get_height() for p in ax.patches if p.get_x() == 0]
    assert heights == [1, 1, 1, 0.5, 1]  # the last is the tile as it is copied
    (zeros,) = (p for p in ax.patches if p.get_hatch())
    assert zeros.get_height() == 0.5
    with pytest.raises(ValueError, match="block must not divide N"):
        plots.tile_copy(512, 128, 128, 2, "title")


PRODUCTS = [
    Product("s = q kᵀ", "q", "kᵀ", "s", 128, 64),
    Product("acc + p v", "p", "v", "acc", 64, 128, left_in_registers=True),
]


def test_each_warp_has_a_fourth_of_the_rows_and_only_registers_are_hatched():
    fig = plots.warpgroup_product(PRODUCTS, "title")
    for ax, p in zip(fig.axes, PRODUCTS, strict=True):
        right, *stripes = ax.patches
        assert (right.get_width(), right.get_height()) == (p.columns, p.depth)
        assert not right.get_hatch()
        assert [s.get_height() for s in stripes] == [16] * 8
        assert [s.get_width() for s in stripes] == [p.depth] * 4 + [p.columns] * 4
        assert [bool(s.get_hatch()) for s in stripes] == [p.left_in_registers] * 4 + [True] * 4


def test_phases_begin_when_the_barrier_opened_and_parities_take_turns():
    barrier = Barrier("full", 1)

    def arrive():
        for _ in range(3):
            yield Pause(1e-6, "")
            yield Arrive(barrier)

    SM().run({"warp": arrive()})
    assert barrier.opened == pytest.approx([1e-6, 2e-6, 3e-6])
    (ax,) = plots.phases({"full": barrier.opened}, 5e-6, "title").axes
    ranges = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
    assert ranges == [pytest.approx(x) for x in ((0, 1), (1, 2), (2, 3), (3, 5))]
    assert [t.get_text() for t in ax.texts] == [f"phase {n}" for n in range(4)]
    first, second, third, fourth = (p.get_facecolor() for p in ax.patches)
    assert first == third != second == fourth


def test_registers_are_to_scale_and_what_tiles_need_is_marked():
    shares = [Share("producer", 24), Share("consumer", 240, 160)]
    (ax,) = plots.register_shares({"reallocated": shares}, 65536, "title").axes
    widths = [p.get_width() * 1024 / 128 for p in ax.patches]
    assert widths == [0, 24, 160, 80]
    assert [t.get_text() for t in ax.texts] == ["24", "consumer: 240 a thread"]


def test_more_registers_than_there_are_are_refused():
    with pytest.raises(ValueError, match="at most 65536 registers, got 65664 for all"):
        plots.register_shares({"all": [Share("a", 513)]}, 65536, "title")
