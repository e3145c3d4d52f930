"""Every rung keeps every claim of the contract."""

from __future__ import annotations

import traceback

import pytest

from flashedu.stages import RUNGS, Rung, contract
from tests.contract import Bad, Check, Subject, bad_calls, claims, good_call

RUNNABLE = [r for r in RUNGS if r.missing() is None]
QUICK = [r for r in RUNNABLE if not r.is_triton]  # the kernels: test_flash1.py and on
CLAIMS = [(r, claim, check) for r in QUICK for claim, check in claims(r).items()]
BAD_CALLS = [(r, title, bad) for r in RUNNABLE for title, bad in bad_calls(r).items()]


@pytest.mark.parametrize(
    ("stage", "check"),
    [pytest.param(r, check, id=f"{r.name}-{claim}") for r, claim, check in CLAIMS],
)
def test_contract(stage: Rung, check: Check) -> None:
    check(Subject.of(stage))


@pytest.mark.parametrize(
    ("stage", "bad"), [pytest.param(r, bad, id=f"{r.name}-{title}") for r, title, bad in BAD_CALLS]
)
def test_bad_input_gets_a_sentence(stage: Rung, bad: Bad) -> None:
    """It names the argument and what came, and the contract says it, not code further down."""
    call = good_call(stage.framework) | bad.changes
    with pytest.raises(bad.error) as caught:
        stage.load().attention(**call)
    message = str(caught.value)
    for word in bad.words:
        assert word in message
    raised_in = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert raised_in == contract.__file__


@pytest.mark.parametrize("stage", RUNNABLE, ids=[r.name for r in RUNNABLE])
def test_the_call_that_the_bad_ones_change_is_good(stage: Rung) -> None:
    call = good_call(stage.framework)
    o = stage.load().attention(**call)
    assert o.shape == call["q"].shape
