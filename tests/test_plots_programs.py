"""The figures of programs show the numbers that they were given, and read without colour."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgb

from flashedu import plots
from flashedu.plots import style
from flashedu.schedule import assign

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


def texts(fig):
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def waves(ax):
    """True where an SM runs a program: (waves, SMs)."""
    (mesh,) = (c for c in ax.collections if isinstance(c, QuadMesh))
    return mesh.get_array().astype(bool)


@pytest.mark.parametrize(
    ("programs", "last_wave"), [(1, 1), (8, 8), (131, 131), (132, 132), (133, 1), (1500, 48)]
)
def test_as_many_sms_are_busy_as_programs_run(programs, last_wave):
    (ax,) = plots.busy_sms({"flash1": programs}, 132, "title").axes
    busy = waves(ax)
    assert busy.shape == (-(-programs // 132), 132)
    assert busy.sum() == programs
    assert busy[:-1].all()
    assert busy[-1].sum() == busy[-1, :last_wave].sum() == last_wave


def test_each_launch_has_its_own_panel_and_says_its_numbers():
    fig = plots.busy_sms({"flash1": 3, "flash2": 12}, 8, "title")
    titles = [ax.get_title("left") for ax in fig.axes]
    assert titles == [
        "flash1: 3 programs, 1 wave, 38% busy",
        "flash2: 12 programs, 2 waves, 75% busy",
    ]


@pytest.mark.parametrize("look", style.THEMES.values(), ids=style.THEMES)
def test_busy_and_idle_differ_in_greyscale(look):
    luminance = [np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in (look.sram, look.faint)]
    assert abs(luminance[1] - luminance[0]) > 0.3


@pytest.mark.parametrize(("n", "block"), [(10, 4), (8, 4), (1, 4)])
def test_elements_that_do_not_exist_are_dashed(n, block):
    fig = plots.masked_tiles(n, block, "title")
    programs = -(-n // block)
    dashed = [patch.get_linestyle() not in ("-", "solid") for patch in fig.axes[0].patches]
    dashed = dashed[: programs * block]
    assert dashed == [at >= n for at in range(programs * block)]
    assert ("masked" in texts(fig)) == (n % block > 0)
    assert sum("program" in text for text in texts(fig)) == programs


def test_busy_and_waiting_add_up_to_the_last_sm_of_each_order():
    finish = {"a": [3, 7, 5], "b": [5, 5, 6]}
    fig = plots.waiting(finish, 5.0, "tiles", "title")
    for ax, times in zip(fig.axes, finish.values(), strict=True):
        heights = [patch.get_height() for patch in ax.patches]
        assert heights[:3] == sorted(times, reverse=True)
        assert [a + b for a, b in zip(heights[:3], heights[3:], strict=True)] == [max(times)] * 3
        assert list(ax.lines[0].get_ydata()) == [5.0, 5.0]
    assert [ax.get_title("left") for ax in fig.axes] == ["a: 7", "b: 6"]
    assert len({ax.get_ylim() for ax in fig.axes}) == 1


def runs(ax):
    """(SM, start, stop) of each bar."""
    (bars,) = (c for c in ax.collections if isinstance(c, PolyCollection))
    boxes = [path.get_extents() for path in bars.get_paths()]
    return [(round(box.y0), box.x0, box.x1) for box in boxes], bars.get_facecolors()


def test_a_timeline_says_how_long_each_schedule_keeps_the_sms_busy():
    fig = plots.sm_timeline(
        {"short": assign([2, 1], 2), "long": assign([6, 1, 1], 2)}, 2, "steps", "Busy"
    )
    assert [ax.get_title("left") for ax in fig.axes] == [
        "short: done at 2, 75% busy", "long: done at 6, 67% busy"
    ]  # fmt: skip


@pytest.mark.parametrize("work", [[], [0, 0]])
def test_a_timeline_of_no_time_is_refused_in_a_sentence(work):
    with pytest.raises(ValueError, match="a run that takes time, got none in 'b'"):
        plots.sm_timeline({"a": assign([1], 4), "b": assign(work, 4)}, 4, "steps", "No work")


def test_a_timeline_has_a_bar_for_each_program_on_its_sm():
    schedules = {"a": assign([3, 1, 2], 2), "b": assign([1] * 5, 2)}
    fig = plots.sm_timeline(schedules, 2, "unit", "title", programs_a_head={"b": 2})
    for ax, found in zip(fig.axes, schedules.values(), strict=True):
        assert runs(ax)[0] == [(run.sm, run.start, run.stop) for run in found]
    assert [ax.get_title("left") for ax in fig.axes] == ["a: done at 3, 100% busy",
                                                         "b: done at 3, 83% busy"]  # fmt: skip
    assert len({ax.get_xlim() for ax in fig.axes}) == 1


def test_programs_of_a_head_have_one_shade_and_the_next_head_another():
    fig = plots.sm_timeline({"b": assign([1] * 5, 2)}, 2, "unit", "title",
                            programs_a_head={"b": 2})  # fmt: skip
    shades = [to_hex(colour).upper() for colour in runs(fig.axes[0])[1]]
    first, second, third = style.LIGHT.shades
    assert shades == [first, first, second, second, third]


@pytest.mark.parametrize("look", style.THEMES.values(), ids=style.THEMES)
def test_shades_and_idle_are_told_apart_in_greyscale(look):
    greys = [np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in (*look.shades, look.faint)]
    assert all(abs(a - b) > 0.12 for a, b in itertools.combinations(greys, 2))


def test_the_share_at_work_and_the_time_are_drawn_for_each_number_of_splits():
    rows = [(1, 0.25, 40.0), (2, 0.5, 20.0), (3, 0.75, 13.0), (4, 1.0, 10.0)]
    fig = plots.splits({"a": rows, "b": rows[:3]}, {"a": 4, "b": 2}, "unit", "title")
    above, other_above, below, other_below = fig.axes
    assert above.get_title("left") == "a: 4 splits, 100% busy"
    assert other_above.get_title("left") == "b: 2 splits, 50% busy"
    for ax, shown, mark in ((below, rows, rows[3]), (other_below, rows[:3], rows[1])):
        curve, point, _ = ax.lines
        assert list(curve.get_xdata()) == [row[0] for row in shown]
        assert list(curve.get_ydata()) == [row[2] for row in shown]
        assert (*point.get_xdata(), *point.get_ydata()) == (mark[0], mark[2])
    edge = above.collections[0].get_paths()[0].vertices
    assert edge[:, 1].max() == 1.0


def test_memory_is_as_long_as_its_keys_and_what_is_idle():
    (ax,) = plots.idle_memory({"a": (60, 0.4), "b": (60, 0.25)}, "title").axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([60, 40, 60, 20])
    assert [bar.get_x() for bar in ax.patches] == [0, 60, 0, 60]
    assert [text.get_text() for text in ax.texts] == ["40.0% idle", "25.0% idle"]
