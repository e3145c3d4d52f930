"""The kernels compile for cards that are not here, fit them, and use their matrix units."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest

from flashedu.memory import GPUS, gpu
from flashedu.notebook import record
from flashedu.stages import rung

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench import compiled
from flashedu.bench.compiled import Case, Compiled
from flashedu.stages.decode_tiles import PROGRAMS_PER_SM
from flashedu.stages.flash2_tiles import TABLE, Tile, tiles_for

SRAM_BYTES = {
    **{card.compute_capability: card.sram_bytes_per_program for card in GPUS},
    (8, 6): 99 * 2**10,
    (12, 0): 99 * 2**10,
}
UNITS = {  # of each card, for float16
    (7, 5): {None},  # Triton 3.6 and 3.7 have no matrix instruction for it
    (8, 0): {"mma.sync"},
    (8, 6): {"mma.sync"},
    (8, 9): {"mma.sync"},
    (9, 0): {"wgmma.mma_async"},
    (10, 0): {"tcgen05.mma"},
    (12, 0): {"mma.sync"},
}
NO_PRODUCT = ("delta_kernel", "merge_kernel", "start_kernel", "round_kernel")
FEW_ROWS = ("decode_kernel", "paged_kernel")


def has_few_rows(found: Compiled) -> bool:
    single = found.kernel == "paged_varlen_kernel" and found.block_q == 16
    return found.kernel in FEW_ROWS or single


HALF, SINGLE = ("float16",), ("float32",)
WANTED = [  # compiled by the tests; the record has the rest
    *compiled.cases([(9, 0), (10, 0)], (64, 128), HALF),
    *compiled.cases([(8, 0)], (64, 128), HALF, masks=(True,)),
    *compiled.cases([(7, 5), (8, 9)], (64,), HALF, masks=(True,)),
    *compiled.cases([(8, 9)], (16, 256), HALF, masks=(False,)),
    *compiled.cases([(9, 0)], (64,), SINGLE, masks=(True,)),
]
# varlen, paged and paged_varlen are much like flash2 and decode: one card and size of each here.
# flash3 is compiled by tests/test_flash3_compiled.py.
WANTED = [
    case
    for case in WANTED
    if case.stage in ("flash1", "flash2", "decode")
    or (not case.stage.startswith("flash3") and (case.capability, case.D) == ((9, 0), 128))
]
KERNELS = {
    "flash1": {"forward_kernel"},
    "flash2": {"forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"},
    "varlen": {"forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"},
    "decode": {"decode_kernel", "merge_kernel"},
    "paged": {"paged_kernel", "merge_kernel"},
    # for prompts, and for single queries
    "paged_varlen": ("paged_varlen_kernel", "paged_varlen_kernel", "merge_kernel"),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """Compiled now: Triton finds nothing in its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return compiled.compile_all(WANTED)


@pytest.fixture(scope="module")
def recorded() -> list[Compiled]:
    """For all cards, when the kernels or their tiles last changed."""
    return compiled.from_record(record("compiled_triton3.7.1"))


def test_every_kernel_of_every_case_is_compiled(kernels: list[Compiled]) -> None:
    for case in WANTED:
        names = [found.kernel for found in kernels if found.case == case]
        assert sorted(names) == sorted(KERNELS[case.stage])


def test_every_kernel_fits_the_shared_memory_of_its_card(kernels: list[Compiled]) -> None:
    for found in kernels:
        assert found.sram_bytes <= SRAM_BYTES[found.case.capability], found


def test_float16_uses_the_matrix_units_of_its_card(
    kernels: list[Compiled], recorded: list[Compiled]
) -> None:
    for found in [*kernels, *recorded]:
        if found.case.dtype == "float16" and found.kernel not in NO_PRODUCT:
            units = UNITS[found.case.capability]
            if has_few_rows(found) and units != {None}:
                units = {"mma.sync"}  # the newer units want 64 rows, and its tile has 16
            assert found.matrix_instruction in units, found


def test_tiles_come_while_others_are_used(
    kernels: list[Compiled], recorded: list[Compiled]
) -> None:
    """By the TMA from Hopper on, 16 bytes at a time on Ampere and Ada; before, not at all."""
    for found in [*kernels, *recorded]:
        card, D = found.case.capability, found.case.D
        wanted = "cp.async.bulk.tensor" if card >= (9, 0) else "cp.async.cg"
        if (
            found.case.dtype == "float16"
            and found.case.stage != "flash1"
            and found.kernel in ("forward_kernel", "dq_kernel", "paged_varlen_kernel", *FEW_ROWS)
            and card >= (8, 0)
            and D >= 64  # smaller tiles have less than 16 bytes for each thread
        ):
            assert found.copy_instruction == wanted, found


def test_float32_uses_no_matrix_unit_and_so_no_tf32(
    kernels: list[Compiled], recorded: list[Compiled]
) -> None:
    found = {k.matrix_instruction for k in [*kernels, *recorded] if k.case.dtype == "float32"}
    assert found == {None}


def test_spills_are_few_where_tiles_are_tuned_and_bounded_elsewhere(
    kernels: list[Compiled], recorded: list[Compiled]
) -> None:
    """The tuned tiles were the fastest, spills included."""
    for found in [*kernels, *recorded]:
        card, dtype = found.case.capability, found.case.dtype
        tuned = (card, dtype) == ((9, 0), "float16") and found.case.D in (64, 128)
        most = 192 if tuned and found.case.stage == "flash2" else 4096
        assert found.spilled_bytes <= most, found


def test_decoding_fits_twice_on_an_sm_of_a_hopper_card_and_spills_nothing(
    kernels: list[Compiled],
) -> None:
    """As its number of splits takes for granted."""
    for found in kernels:
        case = found.case
        if has_few_rows(found) and (case.capability, case.dtype) == ((9, 0), "float16"):
            assert found.programs_per_sm(gpu("h200")) >= PROGRAMS_PER_SM
            assert found.spilled_bytes == 0


def test_the_record_is_what_is_compiled_now(
    kernels: list[Compiled], recorded: list[Compiled]
) -> None:
    if version("triton") != "3.7.1":
        pytest.skip("the record was made by triton 3.7.1")
    assert set(kernels) <= set(recorded), "python -m flashedu.bench.compiled --write"


def test_the_record_has_every_card_and_head_size(recorded: list[Compiled]) -> None:
    assert {found.case for found in recorded} == set(compiled.recorded_cases())


def test_one_kernel_does_not_fit_its_card(recorded: list[Compiled]) -> None:
    too_large = {
        (found.kernel, found.case.dtype, found.case.D, found.case.capability, found.sram_bytes)
        for found in recorded
        if found.sram_bytes > SRAM_BYTES[found.case.capability]
    }
    assert too_large == {("dkdv_kernel", "float32", 256, (7, 5), 65 * 2**10)}


# the table of tiles


def test_tiles_depend_on_the_mask_and_on_n() -> None:
    def forward(causal: bool, N: int) -> Tile:
        return tiles_for((9, 0), 128, 2, causal=causal, N=N).forward

    assert forward(True, 1) == Tile(64, 64, 4, 3)
    assert forward(False, 1) == Tile(128, 64, 4, 2)
    short = tiles_for((9, 0), 64, 2, causal=True, N=1024).forward
    assert short == Tile(64, 64, 4, 2)
    assert tiles_for((9, 0), 64, 2, causal=True, N=1025).forward == Tile(64, 128, 4, 2)


def test_every_row_of_the_table_is_taken_by_some_case() -> None:
    taken = {
        tiles_for((*card,), D, item, causal=causal, N=N)
        for card in (*compiled.CAPABILITIES, (13, 0))
        for D in compiled.HEAD_SIZES
        for item in (2, 4)
        for causal in (False, True)
        for N in compiled.LENGTHS
    }
    assert taken == {(row.forward, row.dkdv, row.dq) for row in TABLE}


def test_a_card_that_is_yet_to_come_gets_tiles_that_fit_64_kib() -> None:
    for D in compiled.HEAD_SIZES:
        for item_bytes in (2, 4):
            how = {"causal": True, "N": 4096}
            unknown = tiles_for((13, 0), D, item_bytes, **how)
            assert unknown == tiles_for((7, 5), D, item_bytes, **how)


def test_a_size_without_tiles_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"columns must be at most 256 .* got 512, 2"):
        tiles_for((9, 0), 512, 2, causal=False, N=1)


# programs on an SM


def test_programs_on_an_sm_by_hand() -> None:
    """An H200 has 64 Ki registers and 228 KiB on an SM, 1 KiB of it reserved by each program."""
    case = Case("flash2", (9, 0), 128, "float16", False, 4096)

    def programs(registers: int, sram_bytes: int, warps: int = 4) -> int:
        takes = (registers, 0, sram_bytes, None, None)
        found = Compiled(case, "forward_kernel", 128, 64, warps, 2, *takes)
        return found.programs_per_sm(gpu("h200"))

    assert programs(255, 96 * 2**10) == 2  # 2 · 128 · 256 registers are all there are
    assert programs(169, 1) == 2  # 176 of them: 2.9
    assert programs(168, 1) == 3
    assert programs(32, 75 * 2**10) == 3
    assert programs(32, 75 * 2**10 + 1) == 2
    assert programs(16, 0, warps=8) == 8  # 2048 threads


def test_the_table_names_each_kernel_of_one_card_once(recorded: list[Compiled]) -> None:
    rows = compiled.table(recorded, gpu("h100"))
    ours = [found for found in recorded if found.case.capability == (9, 0)]
    assert len(rows) == len({replace(found, case=replace(found.case, N=0)) for found in ours})
    assert all(row["programs"] >= 1 for row in rows)


# the mode, and the command


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def test_a_kernel_that_can_only_be_compiled_says_so() -> None:
    program = "import torch, flashedu\nq = torch.ones(1, 1, 4, 8)\n"
    program += "flashedu.attention(q, q, q, stage='flash2')"
    done = python("-c", program, TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert re.search(
        r"RuntimeError: stage 'flash2' cannot run: TRITON_INTERPRET=0 only compiles .* unset it",
        done.stderr,
    )
    assert python("-c", program, TRITON_INTERPRET="1").returncode == 0


def test_a_kernel_that_does_not_compile_gets_a_sentence() -> None:
    with pytest.raises(RuntimeError, match="the kernels did not compile: KeyError: 'flash9'"):
        compiled.compile_all([Case("flash9", (9, 0), 64, "float16", False, 64)])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("--gpu=v100", "gpu must be one of .* got 'v100'"), ("--all", "unrecognized arguments: --al")],
)
def test_a_wrong_option_gets_one_line(
    option: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compiled.main([option])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)
