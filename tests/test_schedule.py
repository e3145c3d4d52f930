"""The model of the SMs: programs start in order, and a free SM takes the next."""

from __future__ import annotations

from itertools import pairwise

import pytest

from flashedu.schedule import Run, assign, finish_times


def test_a_free_sm_takes_the_next_program():
    assert assign([3, 1, 1, 2], 2) == [Run(0, 0, 0, 3), Run(1, 1, 0, 1), Run(2, 1, 1, 2),
                                       Run(3, 1, 2, 4)]  # fmt: skip


def test_of_several_free_sms_the_first_takes_it():
    assert [run.sm for run in assign([2, 2, 2, 1, 1, 1], 3)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("sms", [1, 3, 132])
def test_no_sm_runs_two_programs_at_a_time_or_waits_while_one_is_left(sms):
    work = [(7 * i) % 11 for i in range(200)]
    runs = assign(work, sms)
    assert [run.program for run in runs] == list(range(200))
    assert [run.stop - run.start for run in runs] == work
    starts = [run.start for run in runs]
    assert starts == sorted(starts)
    for sm in range(sms):
        own = [run for run in runs if run.sm == sm]
        assert all(b.start == a.stop for a, b in pairwise(own))
        assert not own or own[0].start == 0


def test_finish_times_are_those_of_the_last_programs_and_zero_without_one():
    assert finish_times(assign([3, 1, 1], 4), 4) == [3, 1, 1, 0]
    assert finish_times([], 2) == [0, 0]


def test_longest_first_ends_sooner():
    work = [2 * (i + 1) for i in range(128)]
    slow, fast = (max(finish_times(assign(4 * order, 132), 132)) for order in (work, work[::-1]))
    assert (slow, fast) == (652, 510)  # as chapter 06 says


def test_what_cannot_be_assigned_is_refused():
    with pytest.raises(ValueError, match="sms must be 1 or more, got 0"):
        assign([1], 0)
    with pytest.raises(ValueError, match="work must be 0 or more for each program, got -1"):
        assign([1, -1], 2)
