"""flash2's kernels keep the contract, interpreted on the CPU. On a GPU: see test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from flashedu import attention
from flashedu.stages import rung
from flashedu.testing import draw
from tests import contract
from tests.contract import GQA, Subject

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here; see test_gpu.py", allow_module_level=True)

from flashedu.stages import flash2, triton_mode

NOT_YET = {  # nothing counts a kernel's bytes yet; float64 has no matrix units
    "counting_does_not_change_a_bit",
    "counted_bytes_are_the_closed_form",
    "counted_bytes_of_the_backward_are_the_closed_form",
    "gradients_of_lse_match_float64",
}
CLAIMS = [claim for claim in contract.claims(rung("flash2")) if claim not in NOT_YET]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of(rung("flash2"))


class TestContract:
    @pytest.mark.parametrize("claim", CLAIMS[::2])
    def test_contract(self, subject: Subject, claim: str) -> None:
        contract.claims(subject)[claim](subject)


class TestTheOtherHalfOfTheContract:  # a class of its own: another worker can take it
    @pytest.mark.parametrize("claim", CLAIMS[1::2])
    def test_contract(self, subject: Subject, claim: str) -> None:
        contract.claims(subject)[claim](subject)


def test_without_a_gpu_kernels_are_interpreted() -> None:
    assert triton_mode.INTERPRETED


def test_the_gradient_of_lse_is_that_of_logsumexp() -> None:
    p = GQA.replace(dtype="float32")
    q, k, v, do = (x.requires_grad_() for x in draw(p, framework="torch"))
    _, lse = flash2.attention_with_lse(q, k, v)
    s = p.D**-0.5 * q @ k.repeat_interleave(p.group, 1).mT
    w = do[..., 0].detach()
    got = torch.autograd.grad(lse, (q, k), w)
    want = torch.autograd.grad(torch.logsumexp(s, -1), (q, k), w)
    torch.testing.assert_close(got, want)


def test_tiles_do_not_change_the_result_beyond_rounding() -> None:
    p = GQA.replace(Nq=70, Nk=90, causal=True, dtype="float32")
    q, k, v, _ = draw(p, framework="torch")
    results = [
        flash2.attention(q, k, v, causal=True, block_q=block_q, block_k=block_k)
        for block_q, block_k in ((32, 32), (64, 32), (32, 64))
    ]
    for o in results[1:]:
        torch.testing.assert_close(o, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 8, 24, 512])
def test_a_tile_that_a_gpu_cannot_have_gets_a_sentence(size: int) -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    with pytest.raises(ValueError, match=f"block_k must be a power of two .* got {size}"):
        flash2.attention(q, k, v, block_k=size)


def test_it_is_an_operator_that_torch_compile_can_take() -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    arguments = (q.requires_grad_(), k, v, True, 0.25, 0, 0)
    found = torch.library.opcheck(flash2.flash2_op, arguments)
    assert set(found.values()) == {"SUCCESS"}


def test_it_is_taken_by_name() -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    assert torch.equal(attention(q, k, v, stage="flash2"), flash2.attention(q, k, v))
