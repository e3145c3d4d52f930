"""flash2's kernels, interpreted on the CPU. On a GPU: see test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from flashedu import attention
from flashedu.memory import Problem
from flashedu.stages import rung
from flashedu.testing import assert_right, draw
from tests import contract
from tests.contract import GQA, Subject

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here; see test_gpu.py", allow_module_level=True)

from flashedu.stages import flash2, triton_mode
from flashedu.stages.reference import Reference

CLAIMS = list(contract.claims(rung("flash2")))
HALF = len(CLAIMS) // 2  # neighbours share results


class TestContract:
    @pytest.mark.parametrize("claim", CLAIMS[:HALF])
    def test_contract(self, claim: str) -> None:
        contract.claims(rung("flash2"))[claim](Subject.of(rung("flash2")))


class TestTheOtherHalfOfTheContract:  # a class of its own: another worker can take it
    @pytest.mark.parametrize("claim", CLAIMS[HALF:])
    def test_contract(self, claim: str) -> None:
        contract.claims(rung("flash2"))[claim](Subject.of(rung("flash2")))


def test_without_a_gpu_kernels_are_interpreted() -> None:
    assert triton_mode.INTERPRETED


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_many_tiles_are_right(dtype: str) -> None:
    """N of several of the tuned tiles, and a tile that is not full at either end."""
    p = Problem(Nq=200, Nk=330, D=64, H=2, H_kv=1, dtype=dtype, causal=True)
    q, k, v, do = draw(p, "rising", framework="torch")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = flash2.attention_with_lse(*leaves, causal=True)
    gradients = torch.autograd.grad(o, leaves, do)
    got = Reference(o.detach(), lse.detach(), *gradients)
    assert_right(got, *(x.detach() for x in leaves), do, causal=True)


def test_the_backward_has_no_second_backward() -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    o = flash2.attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(o.sum(), q, create_graph=True)


def test_it_is_an_operator_that_torch_compile_can_take() -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    arguments = (q.requires_grad_(), k, v, True, 0.25, 0, 0)
    found = torch.library.opcheck(flash2.flash2_op, arguments)
    assert set(found.values()) == {"SUCCESS"}


def test_torch_compile_takes_it_whole() -> None:
    """fullgraph: an error where the compiler would have to give up and go on in Python."""
    p = GQA.replace(dtype="float32", causal=True)
    q, k, v, do = draw(p, framework="torch")

    def double(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 2 * flash2.attention(q, k, v, causal=True)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    results = []
    for function in (double, compiled):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = function(*leaves)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
    assert all(map(torch.equal, *results))


def test_it_is_taken_by_name() -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    assert torch.equal(attention(q, k, v, stage="flash2"), flash2.attention(q, k, v))
