"""The oracle rests on what is not ours: PyTorch's autograd and attention, and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashedu.memory import Problem
from flashedu.stages import reference
from flashedu.testing import draw
from tests.contract import BLIND, EMPTY, GQA, PRIMES, SIZES

ATOL = 1e-12  # float64: some thousands of roundings of values near 1


def inputs(p: Problem) -> tuple[torch.Tensor, ...]:
    return draw(p.replace(dtype="float64"), framework="torch")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=ATOL, atol=ATOL)


def by_loops(q, k, v, *, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One query at a time, one key at a time, with Python's own floats."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    q_values, k_values = q.tolist(), k.tolist()
    o, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf).double()
    for b in range(B):
        for h in range(H):
            for i in range(Nq):
                weights = []
                for j in range(Nk):
                    if causal and j > i + (Nk - Nq):
                        continue
                    q_i, k_j = q_values[b][h][i], k_values[b][h * H_kv // H][j]
                    s = math.fsum(q_i[d] * k_j[d] for d in range(D))
                    weights.append((j, math.exp(scale * s)))
                total = math.fsum(w for _, w in weights)
                if total:
                    lse[b, h, i] = math.log(total)
                for j, w in weights:
                    o[b, h, i] += w / total * v[b, h * H_kv // H, j]
    return o, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "p",
    [
        Problem(B=2, H=6, H_kv=3, Nq=5, Nk=7, D=4),
        Problem(B=2, H=6, H_kv=3, Nq=7, Nk=5, D=4),
        Problem(B=1, H=5, H_kv=1, Nq=3, Nk=3, D=2),
    ],
    ids=["Nq < Nk", "Nq > Nk", "MQA"],
)
def test_oracle_equals_plain_loops(p: Problem, causal: bool) -> None:
    q, k, v, _ = inputs(p)
    o, lse = by_loops(q, k, v, causal=causal, scale=0.7)
    got = reference.attention(q, k, v, causal=causal, scale=0.7)
    close(got.o, o)
    close(got.lse, lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", [PRIMES.replace(Nq=53), GQA.replace(Nk=17)], ids=["MHA", "GQA"])
def test_oracle_equals_pytorch_attention_and_its_gradients(p: Problem, causal: bool) -> None:
    q, k, v, do = inputs(p)
    got = reference.attention(q, k, v, do, causal=causal)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        o = scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=p.group > 1)
    close(got.o, o.detach())
    for gradient, want in zip(got[2:], torch.autograd.grad(o, leaves, do), strict=True):
        close(gradient, want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("p", SIZES.values(), ids=SIZES)
def test_oracle_gradients_equal_autograd(p: Problem, causal: bool) -> None:
    """Masked by -inf and logsumexp, rows with no key left out."""
    q, k, v, do = inputs(p)
    got = reference.attention(q, k, v, do, causal=causal, scale=0.7)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    blind = max(0, p.Nq - p.Nk) if causal else 0
    s = 0.7 * torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(p.group, 1))[:, :, blind:]
    if causal:
        i, j = torch.arange(blind, p.Nq)[:, None], torch.arange(p.Nk)
        s = s.masked_fill(j > i + p.Nk - p.Nq, -torch.inf)
    lse = torch.logsumexp(s, -1)
    o = torch.exp(s - lse[..., None]) @ v.repeat_interleave(p.group, 1)
    gradients = torch.autograd.grad(o, leaves, do[:, :, blind:])
    close(got.o[:, :, blind:], o.detach())
    close(got.lse[:, :, blind:], lse.detach())
    for gradient, want in zip(got[2:], gradients, strict=True):
        close(gradient, want)
    assert not got.o[:, :, :blind].any()
    assert not got.dq[:, :, :blind].any()
    assert (got.lse[:, :, :blind] == -torch.inf).all()


def test_oracle_scale_defaults_to_that_of_pytorch() -> None:
    q, k, v, _ = inputs(PRIMES)
    with sdpa_kernel(SDPBackend.MATH):
        close(reference.attention(q, k, v).o, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("p", EMPTY.values(), ids=EMPTY)
def test_oracle_takes_empty_inputs(p: Problem) -> None:
    q, k, v, do = inputs(p)
    got = reference.attention(q, k, v, do, causal=True)
    assert not any(x.any() for x in (got.o, *got[2:]))
    assert (got.lse == -torch.inf).all()
    assert [x.shape for x in got[2:]] == [x.shape for x in (q, k, v)]


def test_oracle_takes_arrays_of_any_dtype_and_answers_in_float64() -> None:
    arrays = draw(BLIND, framework="numpy")
    tensors = draw(BLIND, framework="torch")
    for x, y in zip(reference.attention(*arrays), reference.attention(*tensors), strict=True):
        assert x.dtype == torch.float64
        assert x.equal(y)
