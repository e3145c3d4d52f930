"""Counting Triton kernels: every load and store, told apart by tensor, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from flashedu import ladder
from flashedu.memory import Machine, Problem, cost
from flashedu.memory.kernels import counted
from flashedu.stages import rung
from flashedu.testing import draw
from tests.contract import bits

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.stages import flash2, triton_mode
from flashedu.stages import interpreter as interpreters

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import interpreter_builder

if not triton_mode.INTERPRETED:
    pytest.skip("kernels are compiled here: none can be counted", allow_module_level=True)

P = Problem(B=2, H=4, H_kv=2, Nq=37, Nk=53, D=13, dtype="float16", block_q=32, block_k=16)


@triton.jit
def copy_kernel(X, Y, N, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + rows, mask=rows < N)
    tl.store(Y + rows, x, mask=rows < N)


@pytest.mark.parametrize(
    "method",
    ["create_masked_load", "create_masked_store", "create_dot", "set_grid_dim", "set_grid_idx"],
)
def test_triton_still_has_what_the_counter_wraps(method: str) -> None:
    """If this fails, a release of Triton has moved it: flashedu/memory/kernels.py must follow."""
    assert callable(getattr(interpreter_builder, method))


def test_a_copy_moves_what_a_copy_moves() -> None:
    machine, x, y = Machine(), torch.ones(1, 1, 37), torch.zeros(1, 1, 37)
    with counted(machine, "copy", P, x=x, y=y):
        copy_kernel[(3,)](x, y, 37, BLOCK=16)
    assert torch.equal(x, y)
    assert machine.bytes_by_tensor() == {"x": (37 * 4, 0), "y": (0, 37 * 4)}
    assert machine.programs == {"copy": 3}
    assert [event[:6] for event in machine.trace] == [
        (2, "copy", "load", "x", 0, 16), (2, "copy", "store", "y", 0, 16),
        (3, "copy", "load", "x", 16, 32), (3, "copy", "store", "y", 16, 32),
        (4, "copy", "load", "x", 32, 37), (4, "copy", "store", "y", 32, 37),
    ]  # fmt: skip


def test_outside_the_block_nothing_counts() -> None:
    machine, x, y = Machine(), torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
    with counted(machine, "copy", P, x=x, y=y):
        pass
    copy_kernel[(1,)](x, y, 16, BLOCK=16)
    assert machine.hbm_read_bytes == machine.hbm_write_bytes == 0


def test_an_array_that_was_not_named_is_an_error() -> None:
    x, y = torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
    with (
        pytest.raises(Exception, match="a store at an address that no array has"),
        counted(Machine(), "copy", P, x=x),
    ):
        copy_kernel[(1,)](x, y, 16, BLOCK=16)


def test_a_load_beyond_the_end_is_an_error() -> None:
    """A kernel without a mask, on an array with others behind it."""
    memory = torch.ones(1, 1, 64)
    x, y = memory[..., :20], torch.zeros(1, 1, 64)
    with (
        pytest.raises(Exception, match="a load at an address that no array has"),
        counted(Machine(), "copy", P, x=x, y=y),
    ):
        copy_kernel[(2,)](x, y, 64, BLOCK=16)


def test_tensors_that_lie_between_one_another_are_told_apart() -> None:
    """q, k and v as slices of one projection, as models have them."""
    p = P.replace(Nk=P.Nq, H_kv=P.H, D=16)
    qkv = torch.randn(p.B, p.Nq, 3, p.H, p.D, dtype=torch.float16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    machine = Machine()
    flash2.attention(q, k, v, block_q=32, block_k=16, machine=machine)
    assert machine.counted == cost.flash2(p)
    assert [n for n, _ in machine.bytes_by_tensor().values()] == [
        n for n, _ in ladder.count("online", p).bytes_by_tensor().values()
    ]


def test_one_tensor_for_q_k_and_v_is_told_apart() -> None:
    p = P.replace(Nk=P.Nq, H_kv=P.H)
    x = draw(p, framework="torch")[0]
    machine = Machine()
    flash2.attention(x, x, x, block_q=32, block_k=16, machine=machine)
    read = machine.bytes_by_tensor()
    assert read["q"][0] == p.B * p.H * p.Nq * p.D * 2
    assert read["k"] == read["v"] == (2 * p.B * p.H * p.Nq * p.D * 2, 0)  # two query tiles


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bfloat16_counts_2_bytes_although_float32_stands_in(dtype: str) -> None:
    assert ladder.count("flash2", P.replace(dtype=dtype)).counted == cost.flash2(P)


def test_each_program_is_traced_on_its_own() -> None:
    machine = ladder.count("flash2", P, trace=True)
    loads_of_q = Counter(event.step for event in machine.trace if event.tensor == "q")
    assert len(loads_of_q) == machine.programs["flash2"] == 2 * 4 * 2
    assert set(loads_of_q.values()) == {1}


@pytest.mark.parametrize("machine", [Machine(sram_bytes=10**6), Machine(watch=["m_i"])])
def test_what_cannot_be_counted_gets_a_sentence(machine: Machine) -> None:
    q, k, v, _ = draw(P, framework="torch")
    with pytest.raises(ValueError, match="machine must have no sram_bytes and no watch for stage"):
        flash2.attention(q, k, v, machine=machine)


def test_compiled_kernels_cannot_be_counted_and_say_so() -> None:
    q, k, v, _ = draw(P, framework="torch")
    with mock.patch.object(triton_mode, "INTERPRETED", False):
        with pytest.raises(ValueError, match="q must be on cuda for stage 'flash2', got cpu"):
            flash2.attention(q, k, v)
        on_card = mock.Mock(device=mock.Mock(type="cuda"))
        with pytest.raises(ValueError, match="only the interpreter can count"):
            triton_mode.check("flash2", on_card, Machine())


def test_tiles_that_do_not_fit_a_card_get_a_sentence() -> None:
    @triton_mode.on_its_card
    def launch(x: torch.Tensor) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    with pytest.raises(ValueError, match=r"block_q and block_k must be smaller .* 300000"):
        launch(torch.zeros(1))


def test_bfloat16_on_a_card_without_it_gets_a_sentence() -> None:
    on_a_t4 = mock.Mock(device=mock.Mock(type="cuda"), dtype=torch.bfloat16)
    with (
        mock.patch.object(triton_mode, "INTERPRETED", False),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(7, 5)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="Tesla T4"),
        pytest.raises(TypeError, match="q must not be bfloat16 on Tesla T4, which has none"),
    ):
        triton_mode.check("flash2", on_a_t4, None)


def test_where_kernels_are_compiled_the_ladder_counts_in_a_process_that_interprets() -> None:
    with mock.patch.object(triton_mode, "INTERPRETED", False):
        machine = ladder.count("flash2", P, trace=True, backward=True)
    assert machine.counted == cost.flash2(P) + cost.flash2_backward(P)
    assert machine.trace == ladder.count("flash2", P, trace=True, backward=True).trace


def test_a_plain_script_is_not_run_again_for_it(tmp_path) -> None:
    """Nor does it need a guard: `if __name__ == "__main__":`."""
    script = tmp_path / "script.py"
    script.write_text(
        "from flashedu import ladder\n"
        "from flashedu.memory import Problem\n"
        "from flashedu.stages import triton_mode\n"
        "triton_mode.INTERPRETED = False\n"
        "p = Problem(Nq=16, D=16, block_q=16, block_k=16)\n"
        "print(ladder.count('flash2', p).programs)\n"
    )
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "{'flash2': 1}\n"), ran.stderr


# the interpreter without what it does for nothing


def as_triton_has_it(function: Callable[[], object]) -> object:
    with (
        mock.patch.object(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__),
        mock.patch.object(interpreter_builder, "options", interpreter.InterpreterOptions()),
    ):
        return function()


@pytest.mark.parametrize("stage", ["flash1", "flash2", "decode"])
def test_what_the_interpreter_leaves_out_changes_no_bit_and_no_count(stage: str) -> None:
    q, k, v, _ = draw(P, framework="torch")

    def run() -> tuple[object, ...]:
        machine = Machine()
        results = rung(stage).load().attention_with_lse(q, k, v, causal=True, machine=machine)
        return *map(bits, results), machine.counted, machine.trace

    assert run() == as_triton_has_it(run)


def test_tl_is_replaced_once_a_launch_and_is_then_as_it_was() -> None:
    q, k, v, _ = draw(P, framework="torch")
    calls = Counter()
    original = interpreter._patch_lang.__wrapped__

    def counting(function: Callable[..., object]) -> object:
        calls["all"] += 1
        return original(function)

    def run() -> int:
        calls.clear()
        flash2.attention(q, k, v)
        assert tl.core.is_builtin(tl.load)
        return calls["all"]

    with mock.patch.object(interpreter, "_patch_lang", counting):
        assert run() > 50
    quick = interpreters.once_a_launch(counting)
    with mock.patch.object(interpreter, "_patch_lang", quick):
        assert run() <= 3  # what sees tl, tl.core, or both
        assert run() <= 3


def test_an_error_in_a_kernel_ends_the_launch() -> None:
    @triton.jit
    def wrong_kernel(X):
        tl.store(X, tl.sum(tl.nothing))

    x = torch.zeros(1, 1, 16)
    with pytest.raises(Exception, match="nothing"):
        wrong_kernel[(1,)](x)
    assert tl.core.is_builtin(tl.load)
    copy_kernel[(1,)](x + 1, x, 16, BLOCK=16)
    assert x.all()


def test_a_problem_that_a_kernel_cannot_take_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"stage 'flash1' takes a block_k of 16, 32, .* got 24"):
        ladder.count("flash1", P.replace(block_k=24))
    with pytest.raises(ValueError, match=r"stage 'flash2' \(torch\) has no float64"):
        ladder.count("flash2", P.replace(dtype="float64"))
