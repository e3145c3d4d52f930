"""Formats are what their bits say, and rounding to one equals rounding by arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashedu.memory import Machine, Problem
from flashedu.numerics import FORMATS, round_mantissa, round_to
from flashedu.stages import online
from flashedu.stages.reference import Reference
from flashedu.testing import draw, errors

BY_NAME = {form.name: form for form in FORMATS}
IN_TORCH = [form for form in FORMATS if form.name != "tf32"]


def values() -> torch.Tensor:
    """float32 of all sizes, ties between two neighbours of each format among them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000) * 2.0 ** rng.integers(-100, 100, 20_000)
    ties = [
        (1 + n * 2.0**-bits) * 2.0**e for bits in (8, 11) for n in range(99) for e in (-9, 0, 9)
    ]
    x = torch.tensor(np.concatenate([x, ties, np.negative(ties), [0.0, -0.0]]))
    return x.float()


@pytest.mark.parametrize("form", IN_TORCH, ids=lambda form: form.name)
def test_a_format_has_the_numbers_that_torch_gives_it(form) -> None:
    info = torch.finfo(getattr(torch, form.name))
    assert (form.bits, form.eps, form.largest) == (info.bits, info.eps, info.max)


def test_tf32_has_the_range_of_float32_and_the_steps_of_float16() -> None:
    tf32 = BY_NAME["tf32"]
    assert tf32.exponent_bits == BY_NAME["float32"].exponent_bits
    assert tf32.eps == BY_NAME["float16"].eps
    assert tf32.bits == 19


@pytest.mark.parametrize("form", IN_TORCH, ids=lambda form: form.name)
def test_a_format_counts_to_its_limit_and_no_further(form) -> None:
    last = torch.tensor(form.all_integers_to, dtype=getattr(torch, form.name))
    assert last - 1 != last
    assert last + 1 == last


@pytest.mark.parametrize("form", IN_TORCH, ids=lambda form: form.name)
def test_rounding_to_a_format_of_torch_is_torchs_rounding(form) -> None:
    x = values()
    want = x.to(getattr(torch, form.name)).float()
    got = round_to(x, form.name)
    assert got.equal(want)
    assert got.signbit().equal(want.signbit())


@pytest.mark.parametrize("kept", [0, 1, 7, 10, 22])
def test_rounding_the_bits_is_rounding_the_number_with_ties_to_even(kept: int) -> None:
    x = values()
    mantissa, exponent = np.frexp(x.double().numpy())  # 0.5 ≤ |mantissa| < 1
    want = np.ldexp(np.rint(mantissa * 2 ** (kept + 1)), exponent - kept - 1)
    assert (round_mantissa(x, kept).double().numpy() == want).all()
    assert (want != x.numpy()).mean() > 0.3


def test_tf32_rounds_half_a_step_to_even_and_leaves_what_it_holds() -> None:
    step = 2.0**-10
    x = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2**-23, 1 + 5 * step, -1e30])
    assert round_to(x, "tf32")[:4].tolist() == [1, 1 + 2 * step, 1 + step, 1 + 5 * step]
    assert round_to(round_to(x, "tf32"), "tf32").equal(round_to(x, "tf32"))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_infinities_and_nan_stay_and_what_is_too_large_becomes_infinite(form) -> None:
    odd_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([torch.inf, -torch.inf, torch.nan]), odd_nan])
    rounded = round_to(x, form.name)
    assert rounded[:2].tolist() == [torch.inf, -torch.inf]
    assert rounded[2:].isnan().all()
    beyond = torch.tensor([torch.finfo(torch.float32).max])
    assert round_to(beyond, form.name).isinf().item() == (form.name != "float32")


def test_rounding_leaves_its_input_and_keeps_its_shape() -> None:
    x = torch.full((2, 3), 1 + 2.0**-20).T
    for form in FORMATS:
        rounded = round_to(x, form.name)
        assert rounded.shape == x.shape
        rounded.zero_()
        assert (x == 1 + 2.0**-20).all()


def test_what_cannot_be_rounded_gets_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"x must be float32, got torch.float64; x.float\(\)"):
        round_to(torch.ones(1, dtype=torch.float64), "tf32")
    with pytest.raises(ValueError, match=r"name must be one of float32, tf32, .*, got 'fp8'"):
        round_to(torch.ones(1), "fp8")


class TF32Machine(Machine):
    def matmul(self, a, b):
        return super().matmul(round_to(a, "tf32"), round_to(b, "tf32"))


def test_products_in_tf32_are_over_the_budget_of_float32_and_pass_1e_3() -> None:
    inputs = draw(Problem(H=2, Nq=256, D=64, dtype="float32"), framework="torch")

    def found(machine: Machine):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        o, lse = online.attention_with_lse(*leaves, machine=machine)
        return errors(Reference(o, lse, *torch.autograd.grad(o, leaves, inputs[3])), *inputs)

    assert all(error.within for error in found(Machine(trace=False)).values())
    for name, error in found(TF32Machine(trace=False)).items():
        assert not error.within, name
        assert error.error < 1e-3, name
