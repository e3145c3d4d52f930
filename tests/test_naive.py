"""Standard attention: what float16 scores cost, and its backward."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flashedu.memory import UNCOUNTED
from flashedu.stages import naive, tiled
from flashedu.stages.contract import check
from flashedu.stages.reference import Reference
from flashedu.testing import assert_right, draw
from tests.contract import EMPTY, SIZES, case


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_does_not_fit_float16_gets_a_sentence(sign: int) -> None:
    q = np.full((1, 1, 2, 4), 300, np.float16)
    with pytest.raises(
        ValueError, match=r"q and k must have scores within ±65504, the range of float16"
    ):
        naive.attention(q, sign * q, q)
    assert (tiled.attention(q, sign * q, q) == q).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
def test_standard_gradients_match_float64(causal: bool, dtype: str) -> None:
    for family, p in itertools.product(("normal", "peaked", "rising"), (SIZES | EMPTY).values()):
        p = p.replace(causal=causal, dtype=dtype)
        q, k, v, do = draw(p, family)
        problem, scale = check("naive", q, k, v, causal=causal, scale=None)
        o, stored = naive.forward(q, k, v, problem, scale, UNCOUNTED)
        gradients = naive.backward(do, q, k, v, stored, problem, scale, UNCOUNTED)
        with case(p, family):
            assert_right(Reference(o, None, *gradients), q, k, v, do, causal=causal)
