"""The error budget is neither tight nor loose, and each family of inputs is what it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from flashedu.memory import Problem
from flashedu.stages import reference
from flashedu.stages.reference import Reference
from flashedu.testing import assert_right, draw, errors, plain, truth
from tests.contract import BLIND, FAMILIES, GQA, PRIMES

DTYPES = ("float16", "bfloat16", "float32", "float64")
P = PRIMES.replace(causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_formula_is_within_its_own_budget(dtype: str) -> None:
    for p, family in itertools.product((PRIMES, GQA, BLIND), FAMILIES):
        p = p.replace(dtype=dtype)
        inputs = draw(p, family, framework="torch")
        got = plain(*inputs, causal=True, scale=p.D**-0.5)
        # lse is float32 where q is float16, from scores that the plain formula has rounded
        assert_right(got._replace(lse=None), *inputs, causal=True)


@pytest.mark.parametrize(
    ("dtype", "off"),
    [("float16", 0.02), ("bfloat16", 0.15), ("float32", 5e-5), ("float64", 1e-13)],
)
def test_the_exact_result_rounded_is_within_budget_and_one_that_is_off_is_not(
    dtype: str, off: float
) -> None:
    inputs = draw(P.replace(dtype=dtype), framework="torch")
    exact = reference.attention(*inputs, causal=True)
    rounded = Reference(*(x.to(inputs[0].dtype) for x in exact))._replace(lse=exact.lse)
    assert_right(rounded, *inputs, causal=True)
    found = errors(Reference(*((1 + off) * x for x in exact)), *inputs, causal=True)
    assert not any(e.within for e in found.values()), found


@pytest.mark.parametrize("name", Reference._fields)
def test_nan_is_never_right(name: str) -> None:
    inputs = draw(P, framework="torch")
    exact = reference.attention(*inputs, causal=True)
    wrong = exact._replace(**{name: getattr(exact, name).clone()})
    getattr(wrong, name).view(-1)[0] = torch.nan
    with pytest.raises(AssertionError, match=f"{name} differs from float64 by nan"):
        assert_right(wrong, *inputs, causal=True)


def test_a_result_of_the_wrong_shape_is_named() -> None:
    q, k, v, _ = draw(P)
    with pytest.raises(AssertionError, match=r"the shape is \(2, 3, 13, 37\), not \(2, 3, 37, 13"):
        assert_right(Reference(q.swapaxes(-1, -2), None), q, k, v)


def test_only_minus_infinity_stands_for_minus_infinity() -> None:
    inputs = draw(Problem(Nq=5, Nk=2, D=3, causal=True, dtype="float32"))
    exact = reference.attention(*inputs, causal=True)
    assert_right(exact, *inputs, causal=True)
    with pytest.raises(AssertionError, match="lse differs from float64 by inf"):
        assert_right(exact._replace(lse=exact.lse.clamp(min=-1e30)), *inputs, causal=True)


def test_families_are_what_they_say() -> None:
    p = Problem(Nq=64, Nk=64, D=16, dtype="float64")

    def scores(family: str) -> np.ndarray:
        q, k, _, _ = draw(p, family)
        return (q @ k.swapaxes(-1, -2) / 4)[0, 0]

    weights = {f: np.exp(scores(f) - scores(f).max(-1, keepdims=True)) for f in FAMILIES}
    largest = {f: (w / w.sum(-1, keepdims=True)).max(-1) for f, w in weights.items()}
    assert np.median(largest["normal"]) < 0.2
    assert np.median(largest["peaked"]) > 0.8
    assert scores("large").max() > np.log(np.finfo(np.float32).max)
    running = np.maximum.accumulate(scores("rising"), axis=-1)[:, 7::8]
    assert ((np.diff(running, axis=-1) > 0).mean()) > 0.8


def test_every_framework_and_precision_gets_the_same_values() -> None:
    arrays = draw(P.replace(dtype="float32"))
    for x, y in zip(arrays, draw(P.replace(dtype="float32"), framework="torch"), strict=True):
        assert (x == y.numpy()).all()
    assert not (arrays[0] == draw(P.replace(dtype="float32"), seed=1)[0]).any()
    half = draw(P.replace(dtype="bfloat16"), framework="torch")[0]
    assert half.equal(torch.from_numpy(arrays[0]).bfloat16())


def test_what_cannot_be_drawn_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"family must be normal, peaked, .*, got 'odd'"):
        draw(P, "odd")
    with pytest.raises(ValueError, match="bfloat16; float16 would do"):
        draw(P.replace(dtype="bfloat16"))


def test_an_unknown_framework_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="framework must be numpy or torch, got 'jax'"):
        draw(Problem(Nq=2, D=2), framework="jax")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_truth_by_some_rows_at_a_time_is_the_truth(dtype: str, causal: bool) -> None:
    for p in (PRIMES, GQA, BLIND):
        inputs = draw(p.replace(dtype=dtype), framework="torch")
        whole = truth(*inputs, causal=causal)
        parts = truth(*inputs, causal=causal, rows=4)
        for name, want in whole.exact.items():
            torch.testing.assert_close(parts.exact[name], want, rtol=1e-12, atol=1e-12)
            assert parts.budget[name] == pytest.approx(whole.budget[name], rel=0.5)
