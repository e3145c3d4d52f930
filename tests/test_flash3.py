"""The Hopper rung, on a machine without one: it compiles for sm_90, and says what it needs.

What it computes is checked on a card, by tests/test_gpu.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import flashedu
from flashedu.memory import GPUS, Problem
from flashedu.stages import contract, rung

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

REGISTERS, THREADS_OF_A_WARPGROUP = 64 * 2**10, 128  # of an SM
SRAM_BYTES = {card.sram_bytes_per_program for card in GPUS if card.compute_capability == (9, 0)}
CASES = [(64, True), (128, True), (128, False)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the compiler and ptxas tell of each case: see `compile_in_this_process`."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests import test_flash3 as t; t.compile_in_this_process()"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "0",
             "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_in_this_process() -> None:
    """Print, for each case, the PTX, what ptxas says of it, and the shared memory, as JSON."""
    import tempfile
    from pathlib import Path

    from flashedu.bench.compiled import _NoCard
    from flashedu.stages import flash3, triton_mode

    import triton
    from triton.runtime import driver

    taken = []

    def take(*, fn, compile, **rest):
        taken.append((fn.jit_function, compile["signature"], compile["constants"],
                      compile["configs"][0]))  # fmt: skip
        return True  # so Triton neither compiles nor launches it

    driver.set_active(_NoCard((9, 0)))
    triton.knobs.runtime.jit_cache_hook = take
    triton_mode.sm_count = lambda device: 132
    found = []
    for D, causal in CASES:
        p = Problem(Nq=4096, D=D, H=16, dtype="bfloat16", causal=causal)
        q = torch.empty(p.B, p.H, p.Nq, p.D, dtype=torch.bfloat16, device="meta")
        flash3.forward(q, q, q, p, 0.1, flash3.TILES[D])
        (arguments,) = taken
        taken.clear()
        target = _NoCard((9, 0)).get_current_target()
        source = arguments[0].ASTSource(*arguments)
        made = triton.compile(source, target=target, options={"num_warps": 4})
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder) / "kernel.ptx"
            ptx.write_text(made.asm["ptx"], encoding="utf-8")
            told = subprocess.run(
                [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", ptx, "-o", f"{ptx}.cubin"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        found.append(
            {"D": D, "ptx": made.asm["ptx"], "ptxas": told.stdout + told.stderr,
             "shared": made.metadata.shared}
        )  # fmt: skip
    print(json.dumps(found))


def test_it_uses_what_hopper_has_of_its_own(kernels: list[dict]) -> None:
    for found in kernels:
        for instruction in (
            "wgmma.mma_async.sync.aligned", "cp.async.bulk.tensor.4d.shared",
            "cp.async.bulk.tensor.4d.global", "mbarrier.try_wait",
            "setmaxnreg.inc", "setmaxnreg.dec",
        ):  # fmt: skip
            assert instruction in found["ptx"], (found["D"], instruction)


def test_products_run_while_warps_go_on(kernels: list[dict]) -> None:
    """ptxas warns (C7510 to C7515) where it must wait for each wgmma at once."""
    for found in kernels:
        assert not re.findall(r"C75\d\d", found["ptxas"]), found["ptxas"]


def test_nothing_is_spilled(kernels: list[dict]) -> None:
    for found in kernels:
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", found["ptxas"])
        assert spills == [("0", "0")], found["ptxas"]


def test_it_fits_the_shared_memory_and_registers_of_an_sm(kernels: list[dict]) -> None:
    for found in kernels:
        assert found["shared"] <= min(SRAM_BYTES)
        threads = int(re.search(r"\.reqntid (\d+)", found["ptx"])[1])
        (registers,) = map(int, re.findall(r"Used (\d+) registers", found["ptxas"]))
        assert registers * threads <= REGISTERS


def test_consumers_and_the_producer_share_the_registers_that_the_program_has() -> None:
    from flashedu.stages.flash3 import TILES

    for tile in TILES.values():
        each = tile.consumers * tile.registers + 24
        assert each * THREADS_OF_A_WARPGROUP <= REGISTERS


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
    with pytest.raises(ValueError, match="must not require gradients for stage 'flash3'"):
        flash3.attention(q.requires_grad_(), q, q)
