"""The PyTorch rungs on a card: the same contract, with CUDA tensors."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashedu.memory import Machine, Problem, cost
from flashedu.stages import online, rung
from flashedu.stages.reference import Reference
from flashedu.testing import assert_right, draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none"
    ),
]

P = Problem(B=2, H=4, H_kv=2, Nq=67, Nk=131, D=40, block_q=32, block_k=48)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(name, dtype) for name in ("online", "flash2") for dtype in rung(name).dtypes],
)
def test_matches_float64_on_the_card(stage: str, dtype: str) -> None:
    tiles = {"block_q": P.block_q, "block_k": P.block_k} if rung(stage).tiles else {}
    for family, causal in itertools.product(("normal", "peaked", "rising"), (False, True)):
        p = P.replace(dtype=dtype, causal=causal)
        q, k, v, do = (x.cuda() for x in draw(p, family, framework="torch"))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o, lse = rung(stage).load().attention_with_lse(*leaves, causal=causal, **tiles)
        assert o.device == q.device
        o.backward(do)
        got = Reference(o, lse, *(x.grad for x in leaves))
        assert_right(got, q, k, v, do, causal=causal)


def test_counted_bytes_are_those_of_the_cpu() -> None:
    machine = Machine()
    q, k, v, _ = (x.cuda() for x in draw(P, framework="torch"))
    online.attention(q, k, v, block_q=P.block_q, block_k=P.block_k, machine=machine)
    assert machine.counted == cost.online(P)


def test_tensors_on_two_devices_get_a_sentence() -> None:
    q, k, v, _ = draw(P, framework="torch")
    with pytest.raises(ValueError, match="k must be on the device of q, cuda:0, got cpu"):
        online.attention(q.cuda(), k, v.cuda())


def test_a_watched_tile_comes_to_the_host() -> None:
    machine = Machine(watch=["m_i"])
    q, k, v, _ = (x.cuda() for x in draw(P, framework="torch"))
    online.attention(q, k, v, block_q=P.block_q, block_k=P.block_k, machine=machine)
    assert machine.watched["m_i"][-1].shape == (P.B, P.H, 3, 1)  # the last tile: 67 = 2 · 32 + 3


@pytest.mark.parametrize("D", [7, 64, 128, 256])
def test_flash2_gives_the_same_bits_each_time(D: int) -> None:
    q, k, v, do = (x.cuda() for x in draw(P.replace(D=D), framework="torch"))

    def run() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o, lse = rung("flash2").load().attention_with_lse(*leaves, causal=True)
        return [o, lse, *torch.autograd.grad(o, leaves, do)]

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, run(), first))
