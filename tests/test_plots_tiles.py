"""The figures of the score matrix show what a trace holds, and read without colour."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgb

from flashedu import ladder, plots
from flashedu.memory import Event, Problem, cost
from flashedu.memory.trace import visits
from flashedu.plots import style

SQUARE = Problem(Nq=64, D=16, block_q=16, block_k=16)
# 5 query tiles, the last of 2 rows, and 4 key tiles, the last of 6
ODD = Problem(Nq=66, Nk=54, D=16, causal=True, block_q=16, block_k=16)
KERNELS = {"flash2 dkdv": "dkdv", "flash2 dq": "dq"}


pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


@pytest.fixture(scope="module", params=[SQUARE, SQUARE.replace(causal=True), ODD])
def problem(request):
    return request.param


@pytest.fixture(scope="module")
def trace(problem):
    return ladder.count("flash2", problem, trace=True, backward=True).trace


def numbers(ax):
    """(query tile, key tile) → the number that stands in it."""
    found = {}
    for text in ax.texts:
        if text.get_text():
            x, y = text.get_position()
            found[int(y) // 16, int(x) // 16] = int(text.get_text())
    return found


def colours(ax):
    """(query tile, key tile) → its colour."""
    return {
        (int(p.get_y()) // 16, int(p.get_x()) // 16): to_hex(p.get_facecolor(), keep_alpha=False)
        for p in ax.patches
        if hasattr(p, "get_x")
    }


def panels(trace, problem, **options):
    kernels = {"flash2": "forward", **KERNELS}
    return plots.walks(trace, problem, kernels, "title", **options).axes


def test_a_row_is_a_program_of_forward_and_dq_and_a_column_one_of_dkdv(trace, problem):
    forward, dkdv, dq = panels(trace, problem)
    last = -(-problem.Nq // 16) - 1
    for (i, _), program in [*numbers(forward).items(), *numbers(dq).items()]:
        assert program == (last - i if problem.causal else i)
    assert all(program == j for (_, j), program in numbers(dkdv).items())


def test_the_tiles_with_a_number_are_those_that_the_closed_form_visits(trace, problem):
    one_product = 2 * 16 * 16 * 16
    visited = cost.flash2(problem).flops // (2 * one_product)
    for ax in panels(trace, problem):
        blank = [tile for tile, colour in colours(ax).items() if colour == "#ffffff"]
        assert len(numbers(ax)) == visited == len(colours(ax)) - len(blank)
        assert not set(blank) & set(numbers(ax))


def test_a_tile_needs_the_mask_if_one_of_its_queries_sees_only_some_of_its_keys(trace, problem):
    sees = np.ones((problem.Nq, problem.Nk), dtype=bool)
    if problem.causal:
        sees = np.tril(sees, problem.Nk - problem.Nq)
    for ax in panels(trace, problem):
        found = colours(ax)
        for i, j in numbers(ax):
            whole = sees[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].all()
            wanted = style.TENSOR["s"] if whole else style.LIGHT.masked
            assert found[i, j] == wanted.lower()


def test_a_marked_program_stands_out_and_says_what_stays_passes_and_is_stored(trace, problem):
    dkdv, dq = plots.walks(trace, problem, KERNELS, "title", mark=1).axes
    for ax in (dkdv, dq):
        bright = {tile for tile, c in colours(ax).items() if c not in ("#ffffff", "#dddddd")}
        assert bright == {tile for tile, program in numbers(ax).items() if program == 1}
    assert dkdv.get_xlabel().split("\n")[1:] == [
        "loaded once: k, v",
        "pass by: q, lse, do, delta",
        "stored once: dk, dv",
    ]
    assert dq.get_xlabel().split("\n")[1:] == [
        "loaded once: q, do, lse, delta",
        "pass by: k, v",
        "stored once: dq",
    ]


def arrows(ax):
    """From where to where, each."""
    return [(np.array(text.xyann), np.array(text.xy)) for text in ax.texts if not text.get_text()]


def test_the_arrow_points_along_the_walk():
    trace = ladder.count("flash2", SQUARE, trace=True, backward=True).trace
    dkdv, dq = plots.walks(trace, SQUARE, KERNELS, "title", mark=2).axes
    for ax, along in ((dkdv, 1), (dq, 0)):
        ((start, end),) = arrows(ax)
        assert end[1 - along] == start[1 - along]
        assert 0 <= start[along] < 16 < 48 < end[along] <= 64
        assert 32 < start[1 - along] < 48


def test_a_walk_that_comes_back_to_the_masked_tile_has_an_arrow_more():
    causal = SQUARE.replace(causal=True)
    trace = ladder.count("flash2", causal, trace=True, backward=True).trace
    dkdv, dq = plots.walks(trace, causal, KERNELS, "title", mark=0).axes
    (without_start, without_end), (masked_start, masked_end) = arrows(dkdv)
    assert 16 < without_start[1] < 32 < 48 < without_end[1] < 64
    assert 0 < masked_start[1] < masked_end[1] < 16
    ((start, end),) = arrows(dq)
    assert 0 < start[0] < 16 < 48 < end[0] < 64


def test_two_heads_are_refused_as_their_programs_visit_the_same_tiles():
    two = SQUARE.replace(H=2)
    trace = ladder.count("flash2", two, trace=True).trace
    with pytest.raises(ValueError, match="one head, got programs 0 and 4 at the tile of query 0"):
        plots.walks(trace, two, {"flash2": "forward"}, "title")


def test_a_kernel_that_is_not_in_the_trace_is_refused():
    trace = ladder.count("flash2", SQUARE, trace=True).trace
    with pytest.raises(ValueError, match=r"in the trace \(flash2\), got 'flash2 dq'"):
        plots.walks(trace, SQUARE, {"flash2 dq": "dq"}, "title")


@pytest.mark.parametrize("look", style.THEMES.values(), ids=style.THEMES)
def test_tiles_are_told_apart_in_greyscale(look):
    def luminance(colour):
        return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))

    s = look.tensor["s"]
    for a, b in ((s, look.masked), (look.masked, look.paper), (s, look.faint)):
        assert abs(luminance(a) - luminance(b)) > 0.15


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


# when each tile is computed


def turns(fig):
    """The turn at which each tile was computed first, as coloured; masked: never."""
    (mesh,) = (c for c in fig.axes[0].collections if isinstance(c, QuadMesh))
    return mesh.get_array()


def strokes(fig):
    """(query tile, key tile) of those with a stroke."""
    lines = [c for c in fig.axes[0].collections if isinstance(c, LineCollection)][-1]
    return {(int(s[0, 1]) // 16, int(s[0, 0]) // 16) for s in lines.get_segments()}


@pytest.mark.parametrize("stage", ["tiled", "online", "flash1", "flash2"])
def test_tiles_are_coloured_by_the_turn_at_which_they_were_computed_first(stage, problem):
    trace = ladder.count(stage, problem, trace=True).trace
    fig = plots.visits(trace, problem, "title")
    found = turns(fig)
    first = {}
    for turn, (i, j, *_) in enumerate(visits(trace), 1):
        first.setdefault((i // 16, j // 16), turn)
    assert found.shape == (-(-problem.Nq // 16), -(-problem.Nk // 16))
    assert {tile: int(found[tile]) for tile in zip(*np.nonzero(~found.mask), strict=True)} == first
    numbers = [t.get_text() for t in fig.axes[0].texts]
    assert sorted(int(n) for text in numbers for n in text.split(",")) == list(
        range(1, len(visits(trace)) + 1)
    )


def test_a_stroke_marks_the_tiles_that_need_the_mask(trace, problem):
    forward = [event for event in trace if event.kernel == "flash2"]
    sees = np.tri(problem.Nq, problem.Nk, problem.Nk - problem.Nq, dtype=bool)
    if not problem.causal:
        sees[:] = True
    some = {
        (i // 16, j // 16)
        for i, j, *_ in visits(forward)
        if not sees[i : i + 16, j : j + 16].all()
    }  # fmt: skip
    assert strokes(plots.visits(forward, problem, "title")) == some


def test_many_tiles_have_no_numbers():
    p = Problem(Nq=26, Nk=24, D=4, block_q=2, block_k=2)
    trace = ladder.count("tiled", p, trace=True).trace
    fig = plots.visits(trace, p, "title")
    assert not fig.axes[0].texts
    assert turns(fig).count() == 13 * 12
    assert fig.axes[1].child_axes[0].get_yticklabels()[-1].get_text() == "turn 468"


def test_whole_matrices_have_no_turns():
    trace = ladder.count("naive", SQUARE, trace=True).trace
    with pytest.raises(ValueError, match="in tiles, got 'naive scores', which moves the whole"):
        plots.visits(trace, SQUARE, "title")


def test_turns_of_two_heads_or_two_kernels_are_refused():
    two = SQUARE.replace(H=2)
    for problem, backward in ((two, False), (SQUARE, True)):
        trace = ladder.count("flash2", problem, trace=True, backward=backward).trace
        with pytest.raises(ValueError, match="one kernel and one head, got the tile of query 0"):
            plots.visits(trace, problem, "title")
