"""flash1's kernel, interpreted on the CPU. On a GPU: see test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from flashedu.memory import Machine, Problem
from flashedu.stages import rung
from flashedu.testing import draw
from tests import contract
from tests.contract import GQA, Subject

if rung("flash1").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here; see test_gpu.py", allow_module_level=True)

from flashedu.stages import flash1, flash2

CLAIMS = list(contract.claims(rung("flash1")))


@pytest.mark.parametrize("claim", CLAIMS)
def test_contract(claim: str) -> None:
    contract.claims(rung("flash1"))[claim](Subject.of(rung("flash1")))


def test_inputs_that_require_gradients_get_a_sentence() -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    with pytest.raises(ValueError, match="must not require gradients for stage 'flash1'"):
        flash1.attention(q, k.requires_grad_(), v)
    with torch.no_grad():
        flash1.attention(q, k, v)


def test_one_program_a_head_where_flash2_has_one_a_query_tile() -> None:
    p = Problem(B=2, H=3, Nq=70, D=16, dtype="float32")
    q, k, v, _ = draw(p, framework="torch")
    one, two = Machine(), Machine()
    flash1.attention(q, k, v, block_q=32, block_k=32, machine=one)
    flash2.attention(q, k, v, block_q=32, block_k=32, machine=two)
    assert one.programs == {"flash1": 2 * 3}
    assert two.programs == {"flash2": 2 * 3 * 3}


def test_o_crosses_hbm_for_each_key_tile() -> None:
    """Read and written once a key tile, and once more at the start and at the end."""
    p = Problem(Nq=64, D=16, dtype="float16")
    q, k, v, _ = draw(p, framework="torch")
    machine = Machine()
    flash1.attention(q, k, v, block_q=32, block_k=16, machine=machine)
    once = p.Nq * p.D * 4  # in float32
    assert machine.bytes_by_tensor()["o_f32"] == (5 * once, 5 * once)
    assert machine.bytes_by_tensor()["k"] == (p.Nk * p.D * 2, 0)
