"""The command line: the ladder, the doctor, and one line for each way to ask wrongly."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flashedu import __version__, cli, doctor, ladder
from flashedu.doctor import Card, Facts, Finding
from flashedu.memory import GPUS, Machine, Problem, gpu
from flashedu.memory.problem import ITEM_BYTES
from flashedu.stages import LADDER, naive
from flashedu.units import human_bytes

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--n", "48", "--d", "16", "--heads", "2", "--block-q", "16", "--block-k", "16"]


def run_main(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def run_process(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashedu", *args],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def ladder_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    code, out, err = run_main(capsys, "ladder", "--json", *args)
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))


# ladder


@pytest.mark.parametrize(
    "options",
    [
        "--n 1",
        "--n 129 --d 40",
        "--n 1000 --causal --heads 1",
        "--n 100 --heads 4 --kv-heads 2 --batch 2 --causal",
        "--n 65 --dtype bfloat16",
        "--n 65 --dtype float64 --d 256",
        "--n 50 --dtype float32 --block-q 7 --block-k 1000000000",
    ],
)
def test_every_rung_is_right_and_counts_its_closed_form(capsys, options: str) -> None:
    report = ladder_json(capsys, *options.split())
    assert report["ok"] is True
    assert [row["rung"] for row in report["rows"]] == [rung.name for rung in LADDER]
    ran = [row for row in report["rows"] if row["skipped"] is None]
    assert ran
    for row in ran:
        assert row["counted_equals_closed_form"] is True
        assert row["error"] <= row["budget"]
        assert all(row[name] == value for name, value in row["closed_form"].items())
        assert row["bound_s"] > 0
        assert row["limit"] in ("memory", "compute")


def test_json_says_what_was_run_and_with_what(capsys) -> None:
    report = ladder_json(capsys, *SMALL, "--gpu", "T4")
    assert report["problem"]["Nq"] == 48
    assert report["problem"]["block_k"] == 16
    assert report["gpu"]["key"] == "t4"
    assert report["versions"]["flashedu"] == __version__


def test_json_can_be_piped_to_another_program() -> None:
    result = run_process("ladder", "--json", *SMALL)
    assert result.returncode == 0
    check = [sys.executable, "-m", "json.tool"]
    subprocess.run(check, input=result.stdout, text=True, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(capsys, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run_main(capsys, "ladder", "--n", "1024", "--heads", "1", "--d", "16")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    for rung in LADDER:  # one line has all of a rung's numbers
        (line,) = (line for line in lines if line.split()[:1] == [rung.name])
        assert " ok " in line
        assert line.endswith(("memory", "compute"))


def test_a_narrow_terminal_still_gets_a_table(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert run_main(capsys, "ladder", *SMALL)[0] == 0


def test_more_sram_than_the_card_has_is_marked(capsys) -> None:
    _, out, _ = run_main(capsys, "ladder", "--n", "600", "--heads", "1")
    assert "KiB on H200" in out
    _, out, _ = run_main(capsys, "ladder", *SMALL)
    assert "KiB on H200" not in out


def test_a_rung_without_the_dtype_is_skipped_with_a_reason(capsys) -> None:
    code, out, _ = run_main(capsys, "ladder", *SMALL, "--dtype", "bfloat16")
    assert code == 0
    assert "naive skipped: stage 'naive' (numpy) has no bfloat16; float16" in out


def test_a_wrong_rung_gives_exit_code_1(capsys, monkeypatch) -> None:
    right = naive.attention
    monkeypatch.setattr(naive, "attention", lambda *a, **k: 1.5 * right(*a, **k))
    code, out, _ = run_main(capsys, "ladder", *SMALL)
    assert code == 1
    assert "WRONG" in out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rung_that_gives_no_number_is_wrong_and_still_json(capsys, monkeypatch, value) -> None:
    right = naive.attention
    monkeypatch.setattr(naive, "attention", lambda *a, **k: value * right(*a, **k))
    code, out, _ = run_main(capsys, "ladder", "--json", *SMALL)
    assert code == 1
    row = json.loads(out, parse_constant=pytest.fail)["rows"][0]
    assert (row["error"], row["within_budget"]) == (None, False)


def test_a_rung_with_another_shape_is_wrong(capsys, monkeypatch) -> None:
    right = naive.attention
    monkeypatch.setattr(naive, "attention", lambda *a, **k: right(*a, **k)[:, :, 1:])
    assert run_main(capsys, "ladder", *SMALL)[0] == 1


def test_bytes_that_are_not_counted_give_exit_code_1(capsys, monkeypatch) -> None:
    right = naive.attention

    def uncounted(*args, machine, **options):
        return right(*args, machine=Machine(), **options)

    monkeypatch.setattr(naive, "attention", uncounted)
    code, out, _ = run_main(capsys, "ladder", *SMALL)
    assert code == 1
    assert "naive counts Cost(hbm_read_bytes=0" in " ".join(out.split())


def test_the_takeaway_follows_the_rows(capsys) -> None:
    report = ladder_json(capsys, *SMALL)
    low, high = report["rows"][0], report["rows"][-1]
    assert report["takeaway"].startswith(f"From {low['rung']} to {high['rung']}: ")
    for row in (low, high):
        traffic = row["hbm_read_bytes"] + row["hbm_write_bytes"]
        assert human_bytes(traffic) in report["takeaway"]
    only = ladder_json(capsys, *SMALL, "--dtype", "bfloat16", "--block-q", "100")["takeaway"]
    assert only.startswith("online moves ")


def test_all_rungs_get_the_same_values(monkeypatch) -> None:
    seen = []

    def spy(q, *args, **options):
        seen.append(q)
        return original(q, *args, **options)

    problem = Problem(Nq=8, D=4)
    for rung in LADDER:
        module = rung.load()
        original = module.attention
        monkeypatch.setattr(module, "attention", spy)
        next(row for row in ladder.run(problem, gpu("h200")) if row.rung == rung.name)
        monkeypatch.undo()
    values = [x.tolist() for x in seen]
    assert len(values) == len(LADDER)
    assert all(x == values[0] for x in values)


def test_the_markdown_table_has_one_line_a_rung_and_no_measured_number() -> None:
    problem, card = Problem(Nq=40, D=8), gpu("h200")
    rows = list(ladder.run(problem, card))
    table = ladder.markdown_table(rows)
    assert len(table.splitlines()) == 2 + len(LADDER)
    assert table == ladder.markdown_table(list(ladder.run(problem, card, seed=1)))
    for rung in LADDER:
        assert f"| `{rung.name}` | {rung.idea} |" in table


# wrong options

BAD_OPTIONS = {
    "ladder --n 0": "flashedu ladder: --n must be an integer from 1 to 1000000000, got '0'",
    "ladder --n abc": "flashedu ladder: --n must be an integer from 1 to 1000000000, got 'abc'",
    "ladder --n 1.5": "flashedu ladder: --n must be an integer from 1 to 1000000000, got '1.5'",
    "ladder --d -1": "flashedu ladder: --d must be an integer from 1 to 256, got '-1'",
    "ladder --d 300": "flashedu ladder: --d must be an integer from 1 to 256, got '300'",
    "ladder --dtype int3": "flashedu ladder: --dtype must be one of float16, bfloat16, float32, "
    "float64, got 'int3'",
    "ladder --gpu banana": "flashedu ladder: --gpu must be one of t4, a100-40, a100-80, rtx4090, "
    "h100, h200, b200, got 'banana'",
    "ladder --gpu t4 --dtype bfloat16": "flashedu ladder: --dtype bfloat16 --gpu t4: "
    "T4 has no bfloat16; float16 would do",
    "ladder --heads 0": "flashedu ladder: --heads must be an integer from 1 to 1000000000, got '0'",
    "ladder --batch 0": "flashedu ladder: --batch must be an integer from 1 to 1000000000, got '0'",
    "ladder --heads 4 --kv-heads 3": "flashedu ladder: --kv-heads must divide --heads 4 "
    "(1, 2, 4 would do), got 3",
    "ladder --block-q 0": "flashedu ladder: --block-q must be an integer from 1 to 1000000000, "
    "got '0'",
    "ladder --block-k x": "flashedu ladder: --block-k must be an integer from 1 to 1000000000, "
    "got 'x'",
    "ladder --blokc-q 3": "flashedu ladder: no option --blokc-q; did you mean --block-q?",
    "ladder --zzz": "flashedu ladder: no option --zzz; flashedu ladder --help lists the options",
    "ladder --n": "flashedu ladder: --n needs a value, as in --n 1024",
    "ladder --gpu": "flashedu ladder: --gpu needs a value, as in --gpu h200",
    "ladder --causal=yes": "flashedu ladder: --causal takes no value",
    "laddr": "flashedu: no command 'laddr'; did you mean ladder?",
    "zzz": "flashedu: no command 'zzz'; the commands are ladder, doctor, plan, bench",
    "--verzion": "flashedu: no option --verzion; did you mean --version?",
    "doctor --jsn": "flashedu doctor: no option --jsn; did you mean --json?",
    "bench --d 64,x": "flashedu bench: --d must be an integer from 1 to 256, got 'x'",
    "bench --sections fast": "flashedu bench: --sections must be one of speed, flash1, memory, "
    "standard, short, decode, flash-decoding, paged, varlen, model, got 'fast'",
    "bench --rounds 0": "flashedu bench: --rounds must be an integer from 1 to 1000000000, got '0'",
    "bench --dtype float64": "flashedu bench: --dtype must be one of bfloat16, float16, float32, "
    "got 'float64'",
    "bench --peer flex": "flashedu bench: no option --peer; did you mean --peers?",
    "bench shw": "flashedu bench: no command 'shw'; did you mean show?",
    "bench show --pgn x": "flashedu bench show: no option --pgn; did you mean --png?",
    "bench tune --rounds": "flashedu bench tune: --rounds needs a value, as in --rounds 10",
}  # fmt: skip


@pytest.mark.parametrize("args", BAD_OPTIONS)
def test_a_wrong_option_gets_one_line_and_exit_code_2(capsys, args: str) -> None:
    assert run_main(capsys, *args.split()) == (2, "", BAD_OPTIONS[args] + "\n")


def test_an_argument_too_many_gets_one_line(capsys) -> None:
    code, out, err = run_main(capsys, "ladder", "more")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "more" in err


def test_a_long_wrong_value_is_cut_short(capsys) -> None:
    _, _, err = run_main(capsys, "ladder", "--n", "9" * 5000)
    assert len(err) < 150


def test_the_known_names_are_those_of_the_package() -> None:
    assert cli.ladder.GPU_KEYS.split(", ") == [card.key for card in GPUS]
    assert cli.ladder.DTYPES.split(", ") == sorted(ITEM_BYTES, key=list(ITEM_BYTES).index)


def test_an_n_too_large_for_this_machine_names_one_that_fits(capsys, monkeypatch) -> None:
    monkeypatch.setattr(ladder, "physical_memory_bytes", lambda: 2**30)
    code, out, err = run_main(capsys, "ladder", "--n", "100000", "--heads", "1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    fits = int(err.split(": --n ")[-1].split(" ")[0])
    problem = Problem(Nq=fits, D=64)
    assert ladder.needed_bytes(problem) <= 2**29
    assert ladder.needed_bytes(problem.replace(Nq=fits + 1, Nk=fits + 1)) > 2**29


def test_what_no_n_makes_fit_is_refused_too(capsys, monkeypatch) -> None:
    monkeypatch.setattr(ladder, "physical_memory_bytes", lambda: 2**30)
    code, _, err = run_main(capsys, "ladder", "--n", "4", "--batch", "1000000000")
    assert code == 2
    assert "fewer --heads or --batch" in err


def test_running_out_of_memory_is_one_line(capsys, monkeypatch) -> None:
    def no_memory(*args, **options):
        raise MemoryError

    monkeypatch.setattr(naive, "attention", no_memory)
    assert run_main(capsys, "ladder", *SMALL) == (1, "", cli.OUT_OF_MEMORY + "\n")


def test_ctrl_c_is_one_line_and_exit_code_130(capsys, monkeypatch) -> None:
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(naive, "attention", interrupted)
    assert run_main(capsys, "ladder", *SMALL) == (130, "", "flashedu: stopped\n")


# where the output goes


def test_version_and_help(capsys) -> None:
    assert run_main(capsys, "--version") == (0, f"flashedu {__version__}\n", "")
    for args in ([], ["--help"], ["-h"]):
        code, out, _ = run_main(capsys, *args)
        assert code == 0
        assert "ladder" in out
        assert "doctor" in out
    _, out, _ = run_main(capsys, "ladder", "--help")
    assert all(option in out for option in ("--kv-heads", "--block-k", "--json", "h200"))


def test_importing_the_command_line_loads_neither_torch_nor_numpy() -> None:
    slow = "numpy torch triton matplotlib flashedu.memory flashedu.stages"
    code = (
        "import sys; from flashedu import cli; cli.main(['--version']); "
        f"sys.exit(' '.join(m for m in '{slow}'.split() if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_ascii_terminal_gets_ascii() -> None:
    result = run_process("ladder", *SMALL, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii()
    assert "16 x 16" in result.stdout
    assert "?" not in result.stdout


def test_piped_output_has_no_colour(capsys) -> None:
    assert "\x1b" not in run_main(capsys, "ladder", *SMALL)[1]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flashedu"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


# doctor

VERSIONS = {
    "numpy": "2.4.6", "torch": "2.13.0", "matplotlib": "3.11.2",
    "pillow": "13.0.0", "typer": "0.29.2", "rich": "15.0.0", "jupyterlab": "4.6.6",
    "ipykernel": "7.4.0", "nbval": "0.11.0", "triton": "3.7.1",
}  # fmt: skip
RUNGS = (("naive", "numpy", None), ("online", "torch", None))
H200 = Card("NVIDIA H200", "580.1", (9, 0), 141 * 2**30)


def machine(*missing: str, python: str = "3.12.4", versions=None, **facts) -> Facts:
    installed = {k: v for k, v in {**VERSIONS, **(versions or {})}.items() if k not in missing}
    return Facts(python=python, versions=installed, rungs=RUNGS, **facts)


def gpu_machine(**facts) -> Facts:
    return machine(cards=(H200,), torch_cuda="13.0", torch_sees_gpu=True, **facts)


def finding(facts: Facts, name: str) -> Finding:
    (found,) = (f for f in doctor.diagnose(facts) if f.name == name)
    return found


def names(facts: Facts, status: str) -> list[str]:
    return [f.name for f in doctor.diagnose(facts) if f.status == status]


def test_a_good_gpu_machine_has_no_problem() -> None:
    facts = gpu_machine()
    assert names(facts, "problem") == []
    assert doctor.course_runs(doctor.diagnose(facts))
    assert (
        "NVIDIA H200, 141 GiB, compute capability 9.0, driver 580.1" in finding(facts, "GPU").found
    )
    assert finding(facts, "Triton kernels").found == "compiled for the GPU"
    assert "input_precision" in finding(facts, "float32 in Triton").advice


def test_a_laptop_without_a_gpu_runs_the_course() -> None:
    facts = machine()
    assert names(facts, "problem") == []
    assert names(facts, "note") == []
    assert "interpreted on the CPU" in finding(facts, "Triton kernels").found


def test_macos_without_triton_runs_the_course() -> None:
    facts = machine("triton", system="Darwin")
    assert names(facts, "problem") == []
    assert finding(facts, "triton").found == "not available on Darwin"
    assert "pip" not in finding(facts, "triton").advice


def test_linux_without_triton_is_told_how_to_get_it() -> None:
    assert "pip install" in finding(machine("triton"), "triton").advice


def test_the_interpreter_is_reported_with_its_bfloat16_trap() -> None:
    facts = machine(triton_interpret=True)
    assert finding(facts, "Triton kernels").status == "ok"
    for interpreted in (facts, machine()):
        assert "cast to float32" in finding(interpreted, "bfloat16 in Triton").advice
    assert "bfloat16 in Triton" not in names(gpu_machine(), "ok")
    assert finding(gpu_machine(triton_interpret=True), "Triton kernels").status == "note"


def test_kernels_that_can_only_be_compiled_are_reported() -> None:
    facts = machine(triton_compile_only=True)
    assert "unset it" in finding(facts, "Triton kernels").advice
    assert "bfloat16 in Triton" not in names(facts, "ok")


@pytest.mark.parametrize(
    ("triton", "numpy", "bad"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.4.6", False)],
)
def test_triton_3_6_does_not_interpret_with_numpy_2_4(triton, numpy, bad) -> None:
    facts = machine(versions={"triton": triton, "numpy": numpy, "torch": "2.12.0"})
    assert ("Triton interpreter" in names(facts, "problem")) is bad
    on_gpu = gpu_machine(versions={"triton": triton, "numpy": numpy, "torch": "2.12.0"})
    assert ("Triton interpreter" in names(on_gpu, "problem")) is bad


@pytest.mark.parametrize(
    ("torch", "triton", "status"),
    [
        ("2.13.0+cpu", "3.8.0", "problem"),
        ("2.11.0", "3.6.0", "ok"),
        ("2.14.0", "3.8.0", "ok"),
        ("2.15.0", "3.8.0", "problem"),
        ("2.16.0", "3.9.0", "ok"),
    ],
)
def test_torch_and_triton_must_go_together(torch: str, triton: str, status: str) -> None:
    facts = machine(versions={"torch": torch, "triton": triton})
    assert finding(facts, "triton").status == status
    assert doctor.course_runs(doctor.diagnose(facts))


@pytest.mark.parametrize(
    ("python", "runs"),
    [("3.10.14", False), ("3.11.0", True), ("3.13.9", True), ("3.14.0rc1", False)],
)
def test_the_course_runs_on_python_3_11_to_3_13(python: str, runs: bool) -> None:
    facts = machine(python=python)
    assert doctor.course_runs(doctor.diagnose(facts)) is runs
    assert (finding(facts, "Python").status == "ok") is runs


@pytest.mark.parametrize("name", ["numpy", "torch", "matplotlib"])
def test_the_course_cannot_run_without(name: str) -> None:
    facts = machine(name)
    assert not doctor.course_runs(doctor.diagnose(facts))
    assert finding(facts, name).advice.startswith(f'pip install "{name}>=')


@pytest.mark.parametrize(
    ("name", "version", "advice"),
    [("torch", "2.10.1", "too old"), ("numpy", "1.25.9", "too old"), ("numpy", "3.0.0", "too new"),
     ("matplotlib", "3.7.5", "too old")],
)  # fmt: skip
def test_the_course_cannot_run_with_a_version_out_of_range(name, version, advice) -> None:
    facts = machine(versions={name: version})
    assert finding(facts, name).advice.startswith(advice)
    assert not doctor.course_runs(doctor.diagnose(facts))


def test_missing_jupyter_is_no_more_than_a_note() -> None:
    facts = machine("jupyterlab", "nbval")
    assert {"jupyterlab", "nbval"} <= set(names(facts, "note"))
    assert doctor.course_runs(doctor.diagnose(facts))


def test_a_torch_that_fails_to_import_is_a_problem_that_says_why() -> None:
    facts = machine(broken={"torch": "OSError: libcudart.so: not found"})
    assert "libcudart" in finding(facts, "torch").found
    assert finding(facts, "stage online").advice == "needs torch"
    assert finding(facts, "stage naive").found == "runs here"


def test_a_gpu_that_torch_does_not_see_is_reported_with_a_cause() -> None:
    cpu_torch = machine(cards=(H200,))
    assert "built for the CPU" in finding(cpu_torch, "GPU in torch").advice
    old_driver = machine(cards=(H200,), torch_cuda="13.0", torch_gpu_warning="driver is too old")
    assert "driver is too old" in finding(old_driver, "GPU in torch").found


def test_an_old_card_is_told_about_bfloat16() -> None:
    facts = machine(cards=(Card("Tesla T4", "580.1", (7, 5), 15 * 2**30),), torch_sees_gpu=True)
    assert "bfloat16" in finding(facts, "GPU").advice


def test_what_nvidia_smi_prints_is_read() -> None:
    text = "NVIDIA H200, 580.1, 9.0, 144384\nTesla T4, 535.2, 7.5, 15360\n"
    assert doctor.read_nvidia_smi(text) == (H200, Card("Tesla T4", "535.2", (7, 5), 15 * 2**30))
    assert doctor.read_nvidia_smi("") == ()


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    machines = [
        machine(*VERSIONS, python="3.9"),
        machine(versions=dict.fromkeys(VERSIONS, "0.1")),
        machine("triton"),
        machine(cards=(H200,)),
        gpu_machine(),
    ]
    for facts in machines:
        assert all(f.advice for f in doctor.diagnose(facts) if f.status != "ok")


def test_the_doctor_asks_for_the_bounds_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    asked = {}
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        bounds = {part.operator: part.version for part in requirement.specifier}
        asked[requirement.name] = (bounds[">="], bounds.get("<"))
    required = {Requirement(line).name for line in project["dependencies"]}
    assert {name: asked[name] for name in required} == doctor.NEEDED
    assert {name: asked[name][0] for name in doctor.NOTEBOOKS} == {
        name: low for name, (low, _) in doctor.NOTEBOOKS.items()
    }
    assert asked["triton"][0] == doctor.TRITON
    first, last = (".".join(map(str, version)) for version in doctor.PYTHON)
    major, minor = last.split(".")
    assert project["requires-python"] == f">={first},<{major}.{int(minor) + 1}"


def test_the_doctor_reports_this_machine(capsys) -> None:
    code, out, err = run_main(capsys, "doctor", "--json")
    report = json.loads(out)
    assert err == ""
    assert report["course_runs"] is (code == 0)
    assert report["facts"]["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert {f"stage {rung.name}" for rung in LADDER} <= {f["name"] for f in report["findings"]}
    code_again, out, _ = run_main(capsys, "doctor")
    assert code_again == code
    assert "naive" in " ".join(out.splitlines()[-2:])


def test_the_doctor_works_without_torch(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = run_main(capsys, "doctor")
    assert (code, err) == (1, "")
    assert "Put right: torch." in out


def test_the_ladder_without_torch_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = run_main(capsys, "ladder", *SMALL)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "pip install torch" in err


def test_a_row_that_was_skipped_is_ok_but_not_right() -> None:
    p, card = Problem(Nq=8, D=4, dtype="bfloat16"), gpu("h200")
    row = next(iter(ladder.run(p, card)))
    assert (row.ok, row.within_budget, row.counted) == (True, False, None)
    assert row.cost == row.closed_form
