"""The figures that hold numbers against each other show these numbers, and judge by them."""

from __future__ import annotations

import pytest

from flashedu import plots
from flashedu.bench.published import Claim

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


def texts(fig):
    return [text.get_text() for text in fig.axes[0].texts]


def test_ring_cross_and_dot_are_the_bytes_predicted_counted_and_measured():
    kernels = {"naive": {"whole": (1000, None, 1100)}, "flash2": {"64 × 64": (4000, 4000, 3900)}}
    fig = plots.predicted_counted_measured(kernels, "title")
    (ax,) = fig.axes
    found = {}
    for line in ax.lines:
        if line.get_marker() != "None":
            look = (line.get_marker(), line.get_markerfacecolor() == "none")
            found.setdefault(line.get_ydata()[0], {})[look] = line.get_xdata()[0]
    ring, cross, dot = ("o", True), ("x", False), ("o", False)
    assert found == {1: {ring: 1000, dot: 1100}, 3: {ring: 4000, cross: 4000, dot: 3900}}
    assert [t for t in texts(fig) if t.endswith("%")] == ["110.0%", "97.5%"]
    labels = [(t.get_text(), t.get_fontweight()) for t in ax.get_yticklabels()]
    assert labels == [("naive", "bold"), ("whole", "normal"), ("flash2", "bold"),
                      ("64 × 64", "normal")]  # fmt: skip


def test_bars_of_sms_and_dram_are_as_long_as_their_bytes():
    mib = 2**20
    row = {"sm_read": 64 * mib, "sm_written": mib, "dram_read": 2 * mib, "dram_written": mib}
    sms, dram = plots.l2_and_dram({"64 × 64": row}, 3 * mib, "title").axes
    for ax, read, written in ((sms, 64, 1), (dram, 2, 1)):
        assert [bar.get_width() for bar in ax.patches] == [read, written]
        assert [bar.get_x() for bar in ax.patches] == [0, read]
        assert [bool(bar.get_hatch()) for bar in ax.patches] == [False, True]
        assert list(ax.lines[0].get_xdata()) == [3, 3]
        assert ax.get_xlim()[1] > max(3, read + written)


@pytest.mark.parametrize(
    ("ours", "verdict", "looks"),
    [
        ((2.0, 4.0), "yes: 2 to 4, ours 2 to 4", ("D", "full")),
        ((5.0, 5.0), "more: 2 to 4, ours 5", ("D", "full")),
        ((1.0, 3.0), "in part: 2 to 4, ours 1 to 3", ("D", "left")),
        ((0.25, 0.25), "less: 2 to 4, ours 0.25", ("D", "none")),
    ],
)
def test_a_claim_shows_both_ranges_and_whether_it_is_reproduced(ours, verdict, looks):
    claim = Claim("faster", "a paper", (2.0, 4.0), ours, True, "why")
    fig = plots.against_published([claim], "title")
    assert texts(fig)[0] == verdict
    published, measured, *_ = fig.axes[0].lines
    assert tuple(published.get_xdata()) == (2.0, 4.0)
    assert tuple(measured.get_xdata()) == ours
    assert (measured.get_marker(), measured.get_fillstyle()) == looks


def test_what_cannot_be_compared_is_crossed():
    claim = Claim("faster", "a paper", (2.0, 4.0), (3.0, 3.0), False, "why")
    fig = plots.against_published([claim], "title")
    assert fig.axes[0].lines[1].get_marker() == "X"
    assert texts(fig)[0].startswith("another thing: ")
