"""The figures of flash3's pipeline show what the model says, and steps that gain nothing too."""

from __future__ import annotations

import pytest

from flashedu import plots
from flashedu.pipeline import FLASH2, Kernel, simulate
from flashedu.plots.pipeline import Step
from flashedu.sm import CAUSES, TENSOR

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


def bars(ax, row):
    """(start, stop) of each bar in a row, in µs."""
    found = [p for p in ax.patches if round(p.get_y() + p.get_height() / 2) == row]
    return sorted((p.get_x(), p.get_x() + p.get_width()) for p in found)


def test_a_timeline_has_a_row_for_the_units_and_for_each_group_of_warps():
    fig = plots.who_waits({"a": simulate(Kernel(), [3]), "b": simulate(FLASH2, [3])}, "title")
    rows = [[t.get_text() for t in ax.get_yticklabels()] for ax in fig.axes]
    assert rows == [
        ["memory", "tensor cores", "producer", "consumer 1", "consumer 2"],
        ["memory", "tensor cores", "warps 1", "warps 2"],
    ]


def test_a_timeline_draws_each_product_from_its_start_to_its_stop():
    timeline = simulate(Kernel(), [4])
    (ax,) = plots.who_waits({"two consumers": timeline}, "title").axes
    spans = [(1e6 * s.start, 1e6 * s.stop) for s in timeline.of(TENSOR)]
    assert bars(ax, 1) == [pytest.approx(span) for span in spans]
    assert ax.get_title("left") == f"two consumers: tensor cores {timeline.busy(TENSOR):.0%} busy"


def test_a_part_of_a_timeline_is_cut_where_it_ends():
    timeline = simulate(Kernel(), [8])
    (ax,) = plots.who_waits({"": timeline}, "title", start_s=4e-6, stop_s=6e-6).axes
    assert ax.get_xlim() == pytest.approx((4, 6))
    for row in range(5):
        assert all(4 - 1e-9 <= x < y <= 6 + 1e-9 for x, y in bars(ax, row))
    whole = bars(ax, 3)  # a consumer always does something, or waits
    assert sum(y - x for x, y in whole) == pytest.approx(2)


def test_every_cause_that_is_drawn_has_a_hatch_of_its_own_kind():
    from flashedu.plots.pipeline import HATCHES, NAMES

    hatches = {NAMES.get(c, c): HATCHES[c] for c in CAUSES if c in HATCHES}
    assert set(CAUSES) - set(HATCHES) == {"its own product runs"}  # a plain tint
    assert len(set(hatches.values())) == len(hatches)


@pytest.mark.parametrize(("start_s", "stop_s"), [(-1e-6, 0.0), (2e-6, 1e-6)])
def test_a_timeline_needs_a_part_that_takes_time(start_s, stop_s):
    with pytest.raises(ValueError, match="start_s must be 0 or more and before stop_s"):
        plots.who_waits({"": simulate(Kernel(), [1])}, "t", start_s=start_s, stop_s=stop_s)


STEPS = [
    Step("first", 400, 300),
    Step("gain", 600, 330),
    Step("nothing", 600, 330, kept=False),
    Step("loss", 300, None, kept=False),
    Step("last", 660, 429),
]


def test_a_waterfall_starts_each_step_at_the_last_that_was_kept():
    (ax,) = plots.waterfall(STEPS, "title").axes
    ranges = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
    assert ranges == [
        (0, 400), (400, 600), (600, 600), (300, 600), (600, 660),  # predicted
        (0, 300), (300, 330), (330, 330), (330, 429),  # measured
    ]  # fmt: skip
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["first", "gain", "tried: nothing", "tried: loss", "last"]


def test_a_waterfall_says_each_ratio_and_what_was_not_measured():
    (ax,) = plots.waterfall(STEPS, "title").axes
    assert [t.get_text() for t in ax.texts] == [
        "400", "600   × 1.50", "600   × 1.00", "300   × 0.50", "660   × 1.10",
        "300", "330   × 1.10", "330   × 1.00", "not measured", "429   × 1.30",
    ]  # fmt: skip


def test_a_waterfall_without_steps_is_refused():
    with pytest.raises(ValueError, match="steps must hold at least the first bar, got none"):
        plots.waterfall([], "title")
