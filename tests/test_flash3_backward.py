"""The Hopper rung's backward, on a machine without one: it compiles for sm_90.

What it computes is checked on a card.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from flashedu.memory import GPUS, Problem
from flashedu.stages import rung

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

REGISTERS, THREADS_OF_A_WARPGROUP = 64 * 2**10, 128  # of an SM
SRAM_BYTES = {card.sram_bytes_per_program for card in GPUS if card.compute_capability == (9, 0)}
CASES = [  # D, causal, deterministic
    (64, True, False), (128, False, False), (128, True, False), (128, True, True),
]  # fmt: skip
SCALARS = 16  # bytes that a thread may put by between tiles


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the compiler and ptxas tell of each kernel: see `compile_in_this_process`."""
    done = subprocess.run(
        [sys.executable, "-c",
         "from tests import test_flash3_backward as t; t.compile_in_this_process()"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "0",
             "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_in_this_process() -> None:
    """Print the PTX of each kernel, what ptxas says of it, and its shared memory, as JSON."""
    import tempfile
    from pathlib import Path

    import torch

    from flashedu.bench.compiled import _NoCard
    from flashedu.stages import flash3_backward, triton_mode

    import triton
    from triton.runtime import driver

    taken = []

    def take(*, fn, compile, **rest):
        options = json.loads(compile["specialization_data"])["options"]
        taken.append((options["num_warps"], fn.jit_function, compile["signature"],
                      compile["constants"], compile["configs"][0]))  # fmt: skip
        return True  # so Triton neither compiles nor launches it

    driver.set_active(_NoCard((9, 0)))
    triton.knobs.runtime.jit_cache_hook = take
    triton_mode.sm_count = lambda device: 132
    for D, causal, deterministic in CASES:
        p = Problem(Nq=4096, D=D, H=16, dtype="bfloat16", causal=causal)
        q = torch.empty(p.B, p.H, p.Nq, p.D, dtype=torch.bfloat16, device="meta")
        lse = torch.empty(p.B, p.H, p.Nq, device="meta")
        flash3_backward.backward(q, q, q, q, lse, q, p, 0.1, deterministic)
    found = {}
    for warps, function, *rest in taken:
        target = _NoCard((9, 0)).get_current_target()
        source = function.ASTSource(function, *rest)
        made = triton.compile(source, target=target, options={"num_warps": warps})
        with tempfile.TemporaryDirectory() as folder:
            ptx = Path(folder) / "kernel.ptx"
            ptx.write_text(made.asm["ptx"], encoding="utf-8")
            told = subprocess.run(
                [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", ptx, "-o", f"{ptx}.cubin"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        found[f"{function.fn.__name__} {len(found)}"] = {
            "ptx": made.asm["ptx"], "ptxas": told.stdout + told.stderr,
            "shared": made.metadata.shared,
        }  # fmt: skip
    print(json.dumps(found))


def _hopper(kernels: dict[str, dict]) -> dict[str, dict]:
    """Those in Gluon."""
    return {
        name: found
        for name, found in kernels.items()
        if name.startswith(("gradients_kernel", "dq_kernel"))
    }


def test_each_call_launches_its_kernels_once(kernels: dict[str, dict]) -> None:
    assert [name.split()[0] for name in kernels] == [
        *("start_kernel", "gradients_kernel", "round_kernel") * 3,
        *("start_kernel", "gradients_kernel", "dq_kernel"),
    ]


def test_it_uses_what_hopper_has_of_its_own(kernels: dict[str, dict]) -> None:
    for name, found in _hopper(kernels).items():
        for instruction in (
            "wgmma.mma_async.sync.aligned", "cp.async.bulk.tensor.4d.shared",
            "cp.async.bulk.tensor.4d.global", "mbarrier.try_wait",
            "setmaxnreg.inc", "setmaxnreg.dec",
        ):  # fmt: skip
            assert instruction in found["ptx"], (name, instruction)


def test_only_where_the_order_may_vary_is_anything_added_to_in_hbm(
    kernels: dict[str, dict],
) -> None:
    adding = [
        name
        for name, found in kernels.items()
        if re.search(r"cp\.reduce|\bred\.|\batom\.", found["ptx"])
    ]
    assert adding == ["gradients_kernel 1", "gradients_kernel 4", "gradients_kernel 7"]


def test_products_run_while_warps_go_on(kernels: dict[str, dict]) -> None:
    """ptxas warns (C7510 to C7515) where it must wait for each wgmma at once."""
    for found in kernels.values():
        assert not re.findall(r"C751[0-5]", found["ptxas"]), found["ptxas"]


def test_nothing_but_a_few_scalars_is_spilled(kernels: dict[str, dict]) -> None:
    for found in kernels.values():
        (frame,) = re.findall(r"(\d+) bytes stack frame", found["ptxas"])
        assert int(frame) <= SCALARS, found["ptxas"]


def test_it_fits_the_shared_memory_and_registers_of_an_sm(kernels: dict[str, dict]) -> None:
    for found in kernels.values():
        assert found["shared"] <= min(SRAM_BYTES)
        threads = int(re.search(r"\.reqntid (\d+)", found["ptx"])[1])
        (registers,) = map(int, re.findall(r"Used (\d+) registers", found["ptxas"]))
        assert registers * threads <= REGISTERS
