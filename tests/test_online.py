"""The rung `online` as a PyTorch operator: its gradients, and what it keeps for them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from flashedu.memory import Problem
from flashedu.stages import online
from flashedu.testing import draw
from tests.contract import bits

# Small, as gradcheck runs the forward twice for each input value.
CHECKED = {
    "square": Problem(Nq=4, Nk=4, D=2, block_q=2, block_k=2),
    "causal": Problem(Nq=4, Nk=4, D=2, block_q=2, block_k=3, causal=True),
    "Nq < Nk": Problem(Nq=2, Nk=5, D=2, block_q=2, block_k=2, causal=True),
    "rows that see no key": Problem(Nq=5, Nk=2, D=2, block_q=2, block_k=2, causal=True),
    "GQA": Problem(B=2, H=4, H_kv=2, Nq=2, Nk=3, D=1, block_q=2, block_k=2, causal=True),
    "MQA": Problem(H=3, H_kv=1, Nq=2, Nk=3, D=1, block_q=1, block_k=2),
}
P = Problem(B=2, H=4, H_kv=2, Nq=7, Nk=9, D=3, block_q=4, block_k=4, causal=True)


def leaves(p: Problem, *, needed: str = "qkv") -> list[torch.Tensor]:
    q, k, v, _ = draw(p.replace(dtype="float64"), framework="torch")
    return [x.requires_grad_(name in needed) for name, x in zip("qkv", (q, k, v), strict=True)]


def options(p: Problem) -> dict[str, int]:
    return {"causal": p.causal, "block_q": p.block_q, "block_k": p.block_k}


@pytest.mark.parametrize("p", CHECKED.values(), ids=CHECKED)
def test_gradients_of_o_equal_finite_differences(p: Problem) -> None:
    function = functools.partial(online.attention, **options(p))
    assert torch.autograd.gradcheck(function, leaves(p), fast_mode=False)


@pytest.mark.parametrize("p", CHECKED.values(), ids=CHECKED)
def test_gradients_of_o_and_lse_together_equal_finite_differences(p: Problem) -> None:
    blind = max(0, p.Nq - p.Nk) if p.causal else 0  # -inf there: no finite difference

    def function(q, k, v):
        o, lse = online.attention_with_lse(q, k, v, **options(p))
        return o, lse[:, :, blind:]

    assert torch.autograd.gradcheck(function, leaves(p))


def test_gradients_are_right_where_q_k_and_v_are_one_tensor() -> None:
    x = leaves(Problem(Nq=4, D=2))[0]
    assert torch.autograd.gradcheck(lambda x: online.attention(x, x, x, block_k=3), x)


def test_lse_alone_has_gradients_and_none_for_v() -> None:
    q, k, v = leaves(P)
    _, lse = online.attention_with_lse(q, k, v, **options(P))
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    assert dq.any()
    assert dk.any()
    assert not dv.any()


@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "qv", "kv"])
def test_only_the_gradients_asked_for_are_given(needed: str) -> None:
    everything, some = leaves(P), leaves(P, needed=needed)
    for tensors in (everything, some):
        online.attention(*tensors, **options(P)).square().sum().backward()
    for name, want, got in zip("qkv", everything, some, strict=True):
        if name in needed:
            assert bits(got.grad) == bits(want.grad)
        else:
            assert got.grad is None


def test_nothing_of_size_n_times_n_is_kept_for_the_backward() -> None:
    p = Problem(H=2, Nq=96, Nk=96, D=4, block_q=96, block_k=96)
    sizes: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with saved_tensors_hooks(note, lambda x: x):
        o = online.attention(*leaves(p), **options(p))
    n = p.H * p.Nq
    assert sorted(sizes) == [n, *[n * p.D] * 4]  # lse; q, k, v, o
    assert not any(isinstance(x, torch.Tensor) for x in o.grad_fn.rest)


def test_a_second_derivative_gets_an_error_not_a_wrong_number() -> None:
    q, k, v = leaves(P)
    for loss in (torch.square, lambda o: o):  # of a linear loss, autograd alone would say nothing
        o = loss(online.attention(q, k, v, **options(P)))
        with pytest.raises(RuntimeError, match="create_graph must be False"):
            torch.autograd.grad(o.sum(), q, create_graph=True)


def test_autocast_does_not_change_a_bit() -> None:
    q, k, v = leaves(P)
    plain = torch.autograd.grad(online.attention(q, k, v, **options(P)).sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(online.attention(q, k, v, **options(P)).sum(), (q, k, v))
    assert all(map(torch.equal, cast, plain))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_without_autograd(mode) -> None:
    tensors = leaves(P)
    want = online.attention_with_lse(*tensors, **options(P))
    with mode():
        got = online.attention_with_lse(*tensors, **options(P))
    for x, y in zip(got, want, strict=True):
        assert not x.requires_grad
        assert bits(x) == bits(y)


def test_a_backward_may_run_twice_if_the_graph_is_kept() -> None:
    q, k, v = leaves(P)
    o = online.attention(q, k, v, **options(P)).sum()
    first = torch.autograd.grad(o, (q, k, v), retain_graph=True)
    second = torch.autograd.grad(o, (q, k, v))
    assert all(bits(x) == bits(y) for x, y in zip(first, second, strict=True))


def test_a_gradient_that_is_expanded_or_strided_is_taken() -> None:
    q, k, v = leaves(P)
    o = online.attention(q, k, v, **options(P))
    do = torch.full((), 0.5).double().expand(o.shape)
    strided = do.contiguous().mT.contiguous().mT
    results = [torch.autograd.grad(o, (q, k, v), x, retain_graph=True) for x in (do, strided)]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)
