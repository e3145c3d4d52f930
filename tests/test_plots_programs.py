"""The figures of programs show the numbers that they were given, and read without colour."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb

from flashedu import plots
from flashedu.memory import Event
from flashedu.plots import style

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


def test_busy_and_idle_differ_in_greyscale():
    luminance = [np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in (style.SRAM, style.FAINT)]
    assert luminance[1] - luminance[0] > 0.5


@pytest.mark.parametrize(("n", "block"), [(10, 4), (8, 4), (1, 4)])
def test_elements_that_do_not_exist_are_dashed(n, block):
    fig = plots.masked_tiles(n, block, "title")
    programs = -(-n // block)
    dashed = [patch.get_linestyle() not in ("-", "solid") for patch in fig.axes[0].patches]
    dashed = dashed[: programs * block]
    assert dashed == [at >= n for at in range(programs * block)]
    assert ("masked" in texts(fig)) == (n % block > 0)
    assert sum("program" in text for text in texts(fig)) == programs


def load(tensor, start):
    return Event(0, "kernel", "load", tensor, start, start + 2, 0, 0, 0)


def test_turns_follow_the_inner_loop_of_a_trace():
    starts = (0, 2, 4)
    rows = [e for i in starts for e in (load("q", i), *(load("k", j) for j in starts))]
    columns = [e for j in starts for e in (load("k", j), *(load("q", i) for i in starts))]
    fig = plots.loop_orders({"online": rows, "flash1": columns}, 2, 2, "title")
    places = [{int(t.get_text()): t.get_position() for t in ax.texts} for ax in fig.axes]
    assert [places[0][turn] for turn in (1, 2, 4)] == [(1, 1), (3, 1), (1, 3)]
    assert [places[1][turn] for turn in (1, 2, 4)] == [(1, 1), (1, 3), (3, 1)]
    assert all(sorted(found) == list(range(1, 10)) for found in places)


def test_curves_against_the_tile_hold_the_bytes_given():
    stages = {"naive": [2**22, 2**22], "flash1": [2**24, 2**23]}
    fig = plots.traffic_against_tile([16, 32], stages, "block_k", "title")
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [[4, 4], [16, 8]]
    assert texts(fig) == ["naive: 4 MiB", "flash1: 8 MiB"]
