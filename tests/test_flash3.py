"""The Hopper rung, on a machine without one: who takes it, what it says, how PyTorch calls it.

tests/test_flash3_compiled.py has its kernels. What they compute is checked on a card, by
tests/test_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashedu
from flashedu.memory import UNCOUNTED, Machine, Problem
from flashedu.stages import Rung, contract, dispatch, online, rung
from flashedu.testing import draw
from tests.contract import Subject, claims

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

REGISTERS, THREADS_OF_A_WARPGROUP = 64 * 2**10, 128  # of an SM


def test_consumers_and_the_producer_share_the_registers_that_an_sm_has() -> None:
    from flashedu.stages.flash3 import PRODUCER_REGISTERS, registers_for

    for consumers, registers in ((2, 240), (3, 160)):
        assert registers_for(consumers) == registers
        each = consumers * registers + PRODUCER_REGISTERS.value
        assert each * THREADS_OF_A_WARPGROUP <= REGISTERS
        assert (each + consumers * 8) * THREADS_OF_A_WARPGROUP > REGISTERS, "some are left over"


@pytest.mark.parametrize("Nq", [1, 5, 128, 1000, 4096])
@pytest.mark.parametrize("block", [128, 192])
def test_each_query_tile_is_in_one_piece_and_pieces_are_even(Nq: int, block: int) -> None:
    """As `tiles_of_piece` cuts them, written out."""
    tiles = -(-Nq // block)
    half = -(-tiles // 2)
    pieces = [list(range(x, tiles - x, max(1, tiles - 1 - 2 * x))) for x in range(half)]
    assert sorted(tile for piece in pieces for tile in piece) == list(range(tiles))
    assert len({sum(piece) for piece in pieces if len(piece) == 2}) <= 1


# who takes it


def test_on_a_hopper_card_it_is_the_default_for_what_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def best(x: torch.Tensor, **options: Any) -> str:
        return dispatch._best_for(x, x, x, **{"causal": True, "scale": None, **options}).name

    monkeypatch.setattr(dispatch, "_runs_on", lambda rung, q: contract.dtype_name(q) in rung.dtypes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(Rung, "missing", lambda self: None)
    x = torch.ones(1, 1, 2, 64, dtype=torch.float16)
    assert best(x) == best(x.bfloat16()) == best(x.clone().requires_grad_()) == "flash3"
    assert best(x.float()) == best(x, block_q=64) == best(x.repeat(1, 1, 1, 3)) == "flash2"
    assert best(x, machine=Machine()) == "online"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    assert best(x) == "flash2"


# what it says where it cannot run


def test_where_there_is_no_hopper_card_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    q = torch.ones(1, 1, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="needs a Hopper GPU, as H100 or H200, and there is no "
                                           "GPU; stage 'flash2' would do"):  # fmt: skip
        flashedu.attention(q, q, q, stage="flash3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert rung("flash3").missing() == (
        "stage 'flash3' needs a Hopper GPU, as H100 or H200, got NVIDIA A100 (8.0); "
        "stage 'flash2' would do"
    )


def test_what_it_does_not_take_gets_a_sentence_that_names_flash2() -> None:
    q = torch.ones(1, 1, 2, 64)
    with pytest.raises(TypeError, match="float16, bfloat16 for stage 'flash3', got float32; "
                                        "stage 'flash2' would do"):  # fmt: skip
        contract.check("flash3", q, q, q, causal=False, scale=None)
    q = torch.ones(1, 1, 2, 136, dtype=torch.float16)
    with pytest.raises(ValueError, match="D of 1 to 128 for stage 'flash3', got D=136; "
                                         "stage 'flash2' takes up to 256"):  # fmt: skip
        contract.check("flash3", q, q, q, causal=False, scale=None)


def test_called_by_itself_it_says_so_too() -> None:
    from flashedu.stages import flash3, triton_mode

    if not triton_mode.INTERPRETED:
        pytest.skip("kernels are compiled here")
    q = torch.ones(1, 1, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="needs a Hopper GPU, and kernels are interpreted here"):
        flash3.attention(q, q, q)
    with pytest.raises(TypeError, match="deterministic must be True or False, got 'yes'"):
        flash3.attention(q, q, q, deterministic="yes")


# between PyTorch and the kernels: `online` stands in for them


@pytest.fixture
def flash3_here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """flash3's module with other kernels; `.asked` is what each backward was asked for."""
    from flashedu.stages import flash3, triton_mode

    def tiled(p: Problem) -> Problem:
        return p.replace(block_q=16, block_k=16)

    def forward(q: Any, k: Any, v: Any, p: Problem, scale: float) -> Any:
        assert scale >= flash3.SMALLEST_SCALE
        return online.forward(q, k, v, tiled(p), scale, UNCOUNTED)

    def backward(
        q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, p: Problem, scale: float,
        deterministic: bool, dlse: Any,
    ) -> Any:  # fmt: skip
        asked.append(deterministic)
        return online.backward(do, dlse, q, k, v, o, lse, tiled(p), scale, UNCOUNTED)

    asked: list[bool] = []
    monkeypatch.setattr(flash3, "forward", forward)
    monkeypatch.setattr(flash3, "backward", backward)
    monkeypatch.setattr(flash3, "asked", asked, raising=False)
    monkeypatch.setattr(flash3, "_check_card", lambda q: None)
    monkeypatch.setattr(triton_mode, "check", lambda *rest: None)
    return flash3


P = Problem(B=2, H=4, H_kv=2, Nq=17, Nk=23, D=8, dtype="float16", causal=True)


@pytest.mark.parametrize("claim", [
    "gradients_of_lse_match_float64", "any_scale_is_right", "strides_do_not_matter",
    "inputs_are_not_modified",
])  # fmt: skip
def test_gradients_pass_between_pytorch_and_the_kernels(claim: str, flash3_here: Any) -> None:
    subject = Subject.of(rung("flash3"), flash3_here)
    claims(subject)[claim](subject)
    assert flash3_here.asked


def test_a_backward_is_as_deterministic_as_was_asked(flash3_here: Any) -> None:
    q, k, v, do = draw(P, framework="torch")
    q.requires_grad_()
    for deterministic in (False, True):
        flash3_here.attention(q, k, v, deterministic=deterministic).backward(do)
    torch.use_deterministic_algorithms(True)
    try:
        flash3_here.attention(q, k, v).backward(do)
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash3_here.asked == [False, True, True]


def test_second_derivatives_get_a_sentence(flash3_here: Any) -> None:
    q, k, v, do = draw(P, framework="torch")
    o = flash3_here.attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="create_graph must be False for stage 'flash3'"):
        torch.autograd.grad(o, q, do, create_graph=True)


def test_the_operators_pass_opcheck(flash3_here: Any) -> None:
    q, k, v = (x.requires_grad_() for x in draw(P, framework="torch")[:3])
    found = torch.library.opcheck(flash3_here.flash3_op, (q, k, v, True, 0.25, True))
    assert set(found.values()) == {"SUCCESS"}
    assert set(flash3_here.asked) == {True}


@pytest.mark.parametrize("scale", [0.3, -0.3, 1e-29, 1e-30, 9e-31, -1e-31, 2e-38, -2e-38])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_that_kernels_take_makes_the_same_scores(scale: float, dtype: torch.dtype) -> None:
    """In bfloat16 to the bit; in float16 q may vanish, where scores are below any rounding."""
    from flashedu.stages import flash3

    q = torch.linspace(-4, 4, 31).to(dtype)
    scaled, taken = flash3._scaled(q, scale)
    assert taken >= flash3.SMALLEST_SCALE
    want, got = scale * q.double(), taken * scaled.double()
    atol = 0 if dtype == torch.bfloat16 else 1e-28
    torch.testing.assert_close(got, want, rtol=1e-15, atol=atol)


def test_a_scale_below_all_normal_numbers_is_0() -> None:
    from flashedu.stages import flash3

    for scale in (0.0, 1e-40, -1e-40):
        q, taken = flash3._scaled(torch.ones(3), scale)
        assert taken == 1
        assert not q.any()
