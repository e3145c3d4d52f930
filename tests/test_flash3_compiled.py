"""The Hopper rung's kernels, on a machine without such a card: they compile for sm_90.

What they compute is checked on a card, by tests/test_gpu.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest

from flashedu.memory import GPUS
from flashedu.notebook import record
from flashedu.stages import rung

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench import compiled
from flashedu.bench.compiled import Case, Compiled

REGISTERS = 64 * 2**10  # of an SM
SRAM_BYTES = min(card.sram_bytes_per_program for card in GPUS if card.compute_capability == (9, 0))
CASES = [
    Case(stage, (9, 0), D, "float16", causal=causal, N=N)
    for stage, D, causal, N in (
        ("flash3", 64, True, 4096), ("flash3", 64, False, 1024), ("flash3", 128, True, 1024),
        ("flash3", 128, False, 1024), ("flash3-det", 128, True, 1024),
    )
]  # fmt: skip
LAUNCHED = {
    "flash3": ["forward_kernel", "start_kernel", "gradients_kernel", "round_kernel"],
    "flash3-det": ["start_kernel", "gradients_kernel", "dq_kernel"],
}
IN_GLUON = ("forward_kernel", "gradients_kernel", "dq_kernel")
SCALARS = 16  # bytes that a thread of the backward may put by between tiles
SPILLED = {(64, False): 56}  # of the forward; each once a query tile, none in a loop over keys


class Kernel(NamedTuple):
    takes: Compiled  # as in the record
    ptx: str


class Found(NamedTuple):
    kernels: list[Kernel]
    ptxas: str  # what ptxas says of them all


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Compiled now: Triton finds nothing in its cache."""
    done = subprocess.run(
        [sys.executable, "-c",
         "from tests import test_flash3_compiled as t; t.compile_in_this_process()"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "0",
             "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels, ptxas = json.loads(done.stdout)
    return Found([Kernel(compiled._from_row(row), ptx) for row, ptx in kernels], ptxas)


def compile_in_this_process() -> None:
    """Print the record's row and the PTX of each kernel, and what ptxas says, as JSON."""
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = True  # printed
    launches = [launch for case in CASES for launch in compiled._launches(case)]
    with contextlib.redirect_stdout(io.StringIO()) as ptxas, ThreadPoolExecutor(2) as pool:
        kernels = list(pool.map(_row_and_ptx, launches))
    print(json.dumps([kernels, ptxas.getvalue()]))


def _row_and_ptx(launch: Any) -> tuple[dict[str, Any], str]:
    row = compiled._row(compiled._compile(launch))
    return row, compiled._made(launch).asm["ptx"]  # from Triton's cache


def test_each_call_launches_its_kernels_once(found: Found) -> None:
    for case in CASES:
        names = [takes.kernel for takes, _ in found.kernels if takes.case == case]
        assert names == LAUNCHED[case.stage]


def test_they_use_what_hopper_has_of_its_own(found: Found) -> None:
    for takes, ptx in found.kernels:
        if takes.kernel in IN_GLUON:
            for instruction in (
                "wgmma.mma_async.sync.aligned", "cp.async.bulk.tensor.4d.shared",
                "cp.async.bulk.tensor.4d.global", "mbarrier.try_wait",
                "setmaxnreg.inc", "setmaxnreg.dec",
            ):  # fmt: skip
                assert instruction in ptx, (takes, instruction)


def test_only_where_the_order_may_vary_is_anything_added_to_in_hbm(found: Found) -> None:
    for takes, ptx in found.kernels:
        adds = re.search(r"cp\.reduce|\bred\.|\batom\.", ptx) is not None
        may = (takes.case.stage, takes.kernel) == ("flash3", "gradients_kernel")
        assert adds == may, takes


def test_products_run_while_warps_go_on(found: Found) -> None:
    """ptxas warns (C7510 to C7515) where it must wait for each wgmma at once."""
    different = {ptx for _, ptx in found.kernels}
    assert found.ptxas.count("Compiling entry function") >= len(different), "some are not told of"
    assert not re.findall(r".*C75\d\d.*", found.ptxas)


def test_what_is_in_use_in_the_loops_stays_in_registers(found: Found) -> None:
    for takes, _ in found.kernels:
        most = SCALARS
        if takes.kernel == "forward_kernel":
            most = SPILLED.get((takes.case.D, takes.case.causal), 0)
        assert takes.spilled_bytes <= most, takes


def test_they_fit_the_shared_memory_and_registers_of_an_sm(found: Found) -> None:
    for takes, ptx in found.kernels:
        assert takes.sram_bytes <= SRAM_BYTES
        assert takes.threads == int(re.search(r"\.reqntid (\d+)", ptx)[1])
        assert takes.registers * takes.threads <= REGISTERS


def test_the_record_is_what_is_compiled_now(found: Found) -> None:
    if version("triton") != "3.7.1":
        pytest.skip("the record was made by triton 3.7.1")
    recorded = compiled.from_record(record("compiled_triton3.7.1"))
    for takes, _ in found.kernels:
        assert takes in recorded, (
            "python -m flashedu.bench.compiled --write --stage flash3 flash3-det"
        )
