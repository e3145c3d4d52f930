"""`flashedu bench sanitize`: what Compute Sanitizer printed is read as it stands, and a tool that
does not find what was planted has said nothing."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import pytest
import torch

from flashedu import cli
from flashedu.bench import device as devices
from flashedu.bench import record
from flashedu.stages import rung
from tests.test_bench import Toy, cli_run, shown

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench import sanitize

# As the tool's manual has them (version 2026.4).
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at unaligned_kernel()+0x60
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x710fdca00001 is misaligned
=========     and is inside the nearest allocation at 0x710fdca00000 of size 4 bytes
=========
========= Invalid __global__ write of size 4 bytes
=========     at out_of_bounds_kernel()+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x87654320 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sumKernel(int *, int *)+0x90
=========     and Read access at sumKernel(int *, int *)+0x100 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at mult(int *, int *, int)+0x60
=========     by thread (122,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
MANY = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at store_behind_kernel+0x60
========= ERROR SUMMARY: 32 errors
========= ERROR SUMMARY: 12 errors were not printed. Use --print-limit option to adjust
"""
KILLED = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at store_behind_kernel+0x60
=========
========= Error: process didn't terminate successfully
"""
SYNCCHECK = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp
=========     at myKernel(int *)+0x110
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 16 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
NO_RACE = """========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""
BROKEN = """========= COMPUTE-SANITIZER
========= Error: process didn't terminate successfully
=========     The application may have hit an error.
========= Error: Target application terminated before first instrumented API call
"""


@pytest.mark.parametrize(
    ("log", "errors", "first"),
    [
        (MEMCHECK, 2, "Invalid __global__ write of size 4 bytes, at unaligned_kernel()+0x60"),
        (RACECHECK, 1, "Error: Race reported between Write access at sumKernel(int *, int *)+0x90, "
                       "and Read access at sumKernel(int *, int *)+0x100 [508 hazards]"),
        (INITCHECK, 1, "Uninitialized __global__ memory read of size 4 bytes, "
                       "at mult(int *, int *, int)+0x60"),
        (SYNCCHECK, 16, "Barrier error detected. Divergent thread(s) in warp, "
                        "at myKernel(int *)+0x110"),
        (CLEAN, 0, None),
        (NO_RACE, 0, None),
        (MEMCHECK.replace("2 errors", "1,234 errors"), 1234,
         "Invalid __global__ write of size 4 bytes, at unaligned_kernel()+0x60"),
    ],
    ids=["memcheck", "racecheck", "initcheck", "synccheck", "clean", "no race", "many"],
)  # fmt: skip
def test_errors_are_counted_and_the_first_are_told(log, errors, first):
    told = sanitize.parse(log)
    assert (told.errors, told.warnings) == (errors, 0)
    assert told.first[:1] == ([first] if first else [])


def test_a_race_that_may_be_none_is_a_warning():
    told = sanitize.parse(RACECHECK.replace("(1 error, 0 warnings)", "(0 errors, 1 warning)"))
    assert (told.errors, told.warnings) == (0, 1)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("", "it has printed no summary"),
        (BROKEN, "Target application terminated before first instrumented API call"),
        (CLEAN + CLEAN, "it has printed no summary"),
    ],
    ids=["nothing", "broken", "two programs"],
)
def test_a_log_without_a_summary_is_not_a_clean_one(log, why):
    with pytest.raises(sanitize.Unreadable, match=why):
        sanitize.parse(log)


# what is launched


def test_all_kernels_are_launched_with_right_input_and_all_tables_and_runs_with_wrong():
    wanted = sanitize.plan()
    peers = {case.peer for case in wanted if case.astray is None}
    assert peers - {"flash3"} == {
        "flash1", "flash2", "varlen", "decode", "decode, runs",
        "paged-16", "paged-64", "paged-256", "paged_varlen",
    }  # fmt: skip
    assert ("flash3" in peers) == (rung("flash3").missing() is None)
    astray = {(case.peer, case.astray) for case in wanted if case.astray}
    assert astray == {
        *(
            (peer, wrong)
            for peer in ("paged-16", "paged-64", "paged_varlen")
            for wrong in sanitize.TABLES
        ),
        *((peer, wrong) for peer in ("varlen", "decode, runs") for wrong in sanitize.RUNS),
    }
    for case in wanted:
        if case.peer in ("flash2", "varlen"):
            assert case.of.pass_ == "both"
    assert len(sanitize.plan(quick=True)) < len(wanted) / 4


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case)) for case in sanitize.plan() if case.astray]
)
def test_a_wrong_input_differs_from_the_right_one_and_keeps_its_shape(case):
    inputs = devices.draw(case.of.problem, 0, "cpu")
    layout = sanitize.LAUNCHED[case.peer].layout
    right = tensors(layout(case.of, inputs).more)
    led = tensors(sanitize._led_astray(layout, case.astray)(case.of, inputs).more)
    assert [x.shape for x in led] == [x.shape for x in right]
    assert {x.dtype for x in led} == {torch.int32}
    assert any(not torch.equal(a, b) for a, b in zip(led, right, strict=True))


def tensors(more: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x for part in more for x in (part if isinstance(part, tuple) else (part,))]


def of(peer: str, astray: str | None = None) -> sanitize.Case:
    return next(
        case
        for case in sanitize.plan()
        if case.peer == peer and (case.astray.what if case.astray else None) == astray
    )


ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@ON_CPU
@pytest.mark.parametrize("peer", ["varlen", "decode, runs", "paged-64", "paged_varlen"])
def test_a_right_input_gives_a_right_result(peer):
    assert sanitize.run_one(of(peer)) == "ran"


@ON_CPU
@pytest.mark.parametrize(
    ("peer", "what"),
    [("paged-16", "pages far below 0"), ("decode, runs", "runs far beyond the keys")],
)
def test_a_wrong_input_reaches_the_kernel(peer, what):
    """No check of the host refuses it."""
    assert sanitize.run_one(of(peer, what)) == "ran"


def test_a_wrong_result_is_no_run(monkeypatch):
    case = of("decode")
    right = sanitize.peers._standard(case.of.problem, "cpu")
    doubled = sanitize.peers.Peer("decode", lambda p, device: lambda q, k, v: 2 * right(q, k, v))
    monkeypatch.setitem(sanitize.LAUNCHED, "decode", doubled)
    assert sanitize.run_one(case).startswith("wrong: o differs from float64")


# the command, with a program in the place of the tool

FAKE = """#!{python}
import os, sys
if "--version" in sys.argv:
    print("NVIDIA (R) Compute Sanitizer\\nVersion 2026.4.0.0 (build 39022338) (public-release)")
elif "--help" in sys.argv:
    print("  --check-tensor-ops arg (=no)          Enables checks")
else:
    assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    planted = "planted" in sys.argv
    race = "racecheck" in sys.argv
    log = (({planted_race!r} if race else {planted!r}) if planted
           else {no_race!r} if race else {log!r})
    open(sys.argv[sys.argv.index("--log-file") + 1], "w").write(log)
    print({said!r})
"""
RAN = "\n".join(f"{n}\tran" for n in range(len(sanitize.plan(quick=True))))


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """A card, and what stands on the PATH as compute-sanitizer, which says what a test wants."""
    monkeypatch.setattr(devices, "why_not", lambda: None)
    monkeypatch.setattr(devices, "Cuda", Toy)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def install(**says: str) -> None:
        says = {"log": CLEAN, "no_race": NO_RACE, "planted": MEMCHECK, "planted_race": RACECHECK,
                "said": RAN, **says}  # fmt: skip
        program = tmp_path / "compute-sanitizer"
        program.write_text(FAKE.format(python=sys.executable, **says), encoding="utf-8")
        program.chmod(0o755)

    return install


def sanitized(capsys, tmp_path, *more):
    return cli_run(capsys, "sanitize", "--quick", "--out", tmp_path / "x.json", *more)


def test_a_clean_run_is_recorded_and_shown(capsys, tool, tmp_path):
    tool()
    code, out, err = sanitized(capsys, tmp_path)
    assert code == 0, err
    assert "memcheck: flash1 Nq 67 Nk 131 D 24 float16 full" in err
    data = record.load(tmp_path / "x.json").data
    assert data["compute-sanitizer"] == "2026.4.0.0"
    assert [case["section"] for case in data["cases"]] == ["memcheck", "racecheck"]
    memcheck = data["cases"][0]
    assert (memcheck["errors"], memcheck["warnings"]) == (0, 0)
    assert memcheck["options"][:2] == ["--tool", "memcheck"]
    assert memcheck["options"][-2:] == ["--check-tensor-ops", "yes"]
    assert {told["errors"] for told in memcheck["planted"].values()} == {2}
    assert len(memcheck["runs"]) == len(sanitize.plan(quick=True))
    assert all(sanitize.clean(case) for case in data["cases"])
    wrong = sum(case.astray is not None for case in sanitize.plan(quick=True))
    row = next(line.split() for line in out.splitlines() if line.startswith("memcheck "))
    assert row == ["memcheck", str(len(memcheck["runs"])), str(wrong), "0", "0", "3", "of", "3"]
    assert "…" not in shown(record.load(tmp_path / "x.json"), 80)


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ({"log": MEMCHECK}, "memcheck: Invalid __global__ write of size 4 bytes, at unaligned"),
        ({"planted": CLEAN}, "planted a store behind an array: not found"),
        ({"planted_race": NO_RACE}, "planted a race in shared memory: not found"),
        ({"said": RAN.replace("0\tran", "0\twrong: o differs")}, "memcheck, flash1: wrong: o"),
        ({"said": "0\tran"}, "it did not end"),
    ],
    ids=["errors", "memcheck is blind", "racecheck is blind", "wrong", "ended early"],
)
def test_what_is_not_clean_is_recorded_and_is_a_failure(capsys, tool, tmp_path, says, told):
    tool(**says)
    code, out, _ = sanitized(capsys, tmp_path)
    assert code == 1
    assert told in out
    assert (tmp_path / "x.json").exists()


def test_a_tool_that_fails_leaves_no_record(capsys, tool, tmp_path):
    tool(log=BROKEN, said="ModuleNotFoundError: No module named 'torch'")
    code, _, err = sanitized(capsys, tmp_path)
    assert code == 1
    assert err.splitlines()[-1] == (
        "flashedu bench sanitize: compute-sanitizer failed: Target application terminated before "
        "first instrumented API call; the program said: ModuleNotFoundError: No module named "
        "'torch'"
    )
    assert not (tmp_path / "x.json").exists()


def test_one_tool_can_be_chosen(capsys, tool, tmp_path):
    tool(planted=INITCHECK)
    assert sanitized(capsys, tmp_path, "--tools", "initcheck")[0] == 0
    (case,) = record.load(tmp_path / "x.json").data["cases"]
    assert (case["section"], case["planted"]["a load of what nobody wrote"]["errors"]) == (
        "initcheck", 1,
    )  # fmt: skip


def test_without_the_tool_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(devices, "why_not", lambda: None)
    monkeypatch.setattr(devices, "Cuda", Toy)
    monkeypatch.setenv("PATH", "")
    code, out, err = cli_run(capsys, "sanitize")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "there is no compute-sanitizer on the PATH" in err


def test_the_known_tools_are_those_of_the_package():
    assert cli.bench.SANITIZERS.split(", ") == list(sanitize.OPTIONS) == list(sanitize.PLANTED)


# on a card


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none")
@pytest.mark.skipif(shutil.which(sanitize.TOOL) is None, reason="needs compute-sanitizer")
def test_on_a_card_memcheck_finds_a_planted_store():
    mistake = "a store behind an array"
    options = sanitize._options("memcheck")
    told, _ = sanitize._watch(options, ["planted", mistake], [], lambda *_: None)
    assert told.errors
    assert "store_behind_kernel" in told.first[0]


def test_errors_that_were_not_printed_are_counted_once() -> None:
    assert sanitize.parse(MANY).errors == 32


def test_a_program_that_its_planted_mistake_ended_has_found_it() -> None:
    with pytest.raises(sanitize.Unreadable, match="process didn't terminate successfully"):
        sanitize.parse(KILLED)
    found = sanitize.parse(KILLED, ended=False)
    assert found.errors == 1
    assert found.first == ["Invalid __global__ write of size 4 bytes, at store_behind_kernel+0x60"]
    with pytest.raises(sanitize.Unreadable):
        sanitize.parse(BROKEN, ended=False)
