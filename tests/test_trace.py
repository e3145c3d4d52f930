"""A trace says in which order the tiles of S are computed."""

from __future__ import annotations

import pytest

from flashedu import ladder
from flashedu.memory import Problem, cost
from flashedu.memory.trace import visits

P = Problem(Nq=48, D=16, block_q=16, block_k=16)
STARTS = (0, 16, 32)
ROWS = [(i, j) for i in STARTS for j in STARTS]
COLUMNS = [(i, j) for j in STARTS for i in STARTS]


def order(stage, problem=P, kernel=None, **options):
    trace = ladder.count(stage, problem, trace=True, **options).trace
    return [(i, j) for i, j, *_ in visits(e for e in trace if kernel in (None, e.kernel))]


def test_online_and_flash2_go_by_rows_and_flash1_by_columns():
    assert order("online") == order("flash2") == ROWS
    assert order("flash1") == COLUMNS


def test_tiled_computes_each_row_of_tiles_three_times():
    assert order("tiled") == [(i, j) for i in STARTS for _ in range(3) for j in STARTS]


def test_a_single_tile_is_visited_once_for_each_pass():
    one = P.replace(Nq=16, Nk=16)
    assert order("tiled", one) == 3 * [(0, 0)]
    assert order("online", one) == order("flash1", one) == [(0, 0)]


def test_each_kernel_of_a_backward_has_its_own_order():
    assert order("flash2", backward=True) == ROWS + COLUMNS + ROWS
    assert order("online", backward=True) == ROWS + COLUMNS


@pytest.mark.parametrize("stage", ["online", "flash1", "flash2"])
def test_there_are_as_many_visits_as_the_closed_form_has(stage):
    causal = Problem(Nq=66, Nk=54, D=16, causal=True, block_q=16, block_k=16)
    tile = 2 * 16 * 16 * 16
    found = order(stage, causal)
    assert len(found) == len(set(found)) == cost.flash2(causal).flops // (2 * tile)


def test_the_step_is_the_program_of_a_triton_kernel():
    found = visits(ladder.count("flash2", P, trace=True).trace)
    programs = [visit.step - found[0].step for visit in found]
    assert programs == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_visit_is_a_load_of_what_passes_by():
    for stage, inner in (("online", "k"), ("flash1", "q"), ("flash2", "k")):
        trace = ladder.count(stage, P, trace=True).trace
        for query, key, _, at in visits(trace):
            event = trace[at]
            start = query if inner == "q" else key
            assert (event.op, event.tensor, event.start) == ("load", inner, start)


def test_whole_matrices_are_one_visit():
    assert order("naive") == [(0, 0)]
