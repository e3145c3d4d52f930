"""`flashedu bench traffic`: what ncu printed is read as it stands, and the record says three times
the same number: by formula, by running the kernel interpreted, and by the card's counters."""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from flashedu import ladder
from flashedu.bench import device as devices
from flashedu.bench import record, show
from flashedu.memory import Problem, cost
from flashedu.stages import rung
from tests.test_bench import Toy, cli_run, shown

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench import traffic

PRINTED = (Path(__file__).parent / "data" / "ncu_h200.csv").read_text(encoding="utf-8")
QUICK = traffic.plan(quick=True)


# what ncu prints


def test_each_launch_is_found_with_its_case_and_its_bytes():
    found = traffic.parse(PRINTED)
    assert [(n, [run["launched"] for run in runs]) for n, runs in found.items()][:3] == [
        (0, ["forward_kernel"]),
        (1, ["forward_kernel"]),
        (2, ["delta_kernel", "dkdv_kernel", "dq_kernel"]),
    ]
    assert found[1] == [{
        "launched": "forward_kernel", "grid": [8, 1, 1], "l2_to_sm_bytes": 589_824,
        "sm_to_l2_bytes": 67_584, "dram_read_bytes": 219_904, "dram_write_bytes": 0,
    }]  # fmt: skip


def test_the_small_run_counted_what_the_closed_form_says():
    """Also an end-to-end check of which case is which: the log is of a quick run."""
    for number, runs in traffic.parse(PRINTED).items():
        case = QUICK[number]
        for kernel, run in zip(case.kernels, runs, strict=bool(case.kernels)):
            assert run["l2_to_sm_bytes"] == pytest.approx(
                traffic.predicted(case, kernel)["read"], rel=0.03
            )


def test_another_unit_than_bytes_is_refused():
    with pytest.raises(traffic.Unreadable, match="'Kbyte', not in bytes"):
        traffic.parse(PRINTED.replace('"byte"', '"Kbyte"'))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"219,904"', '"219.904.000"', "'219.904.000' for dram__bytes_read.sum, not a number"),
        ('"219,904"', '"n/a"', "'n/a' for dram__bytes_read.sum, not a number"),
        ("dram__bytes_read.sum", "another", "ncu gave no dram__bytes_read.sum"),
        ("Kernel Name", "another", "ncu gave no Kernel Name"),
    ],
)
def test_a_log_that_lacks_a_number_is_refused_in_a_sentence(old, new, why):
    with pytest.raises(traffic.Unreadable, match=re.escape(why)):
        traffic.parse(PRINTED.replace(old, new))


def test_a_number_may_have_commas_and_a_fraction():
    (first, *_) = traffic.parse(PRINTED.replace('"222,720"', '"1,222,720.00"'))[0]
    assert first["dram_read_bytes"] == 1_222_720


@pytest.mark.parametrize(
    ("log", "said", "code", "why"),
    [
        (PRINTED, "0\tran\n", 0, None),
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "", 1,
         "may not read the GPU's counters"),
        ("", "==ERROR== Failed to initialize the profiler: LibraryNotLoaded.\n", 1,
         "ncu failed: Failed to initialize the profiler: LibraryNotLoaded"),
        ("", "Traceback\nImportError: no torch\n", 1, "failed: ImportError: no torch"),
        ("", "", 3, "failed: exit code 3"),
    ],
    ids=["none", "permission", "profiler", "program", "silent"],
)  # fmt: skip
def test_a_failure_is_told_in_a_sentence(log, said, code, why):
    found = traffic.failure(log, said, code)
    assert found is None if why is None else why in found


# the command, with a program in the place of ncu


FAKE = """#!{python}
import sys
if "--version" in sys.argv:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 1)")
    raise SystemExit
with open(sys.argv[sys.argv.index("--log-file") + 1], "w") as log:
    log.write({log!r})
print({said!r})
raise SystemExit({code})
"""


@pytest.fixture
def ncu(monkeypatch, tmp_path):
    """A card, and what stands on the PATH as ncu, which prints and logs what a test wants."""
    monkeypatch.setattr(devices, "why_not", lambda: None)
    monkeypatch.setattr(devices, "Cuda", Toy)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def install(log=PRINTED, said="", code=0):
        program = tmp_path / "ncu"
        text = FAKE.format(python=sys.executable, log=log, said=said, code=code)
        program.write_text(text, encoding="utf-8")
        program.chmod(0o755)

    return install


def test_a_run_is_recorded_and_shown(capsys, ncu, tmp_path):
    went = "\n".join(f"{n}\t{'out of memory' if n == 7 else 'ran'}" for n in range(len(QUICK)))
    ncu(said=went)
    code, out, err = cli_run(capsys, "traffic", "--quick", "--out", tmp_path / "x.json")
    assert code == 0
    assert "[1/22] tiles: flash1 fwd N 256 full 32 × 64" in err
    data = record.load(tmp_path / "x.json").data
    assert (data["ncu"], data["metrics"]) == ("2025.3.1.0", traffic.METRICS)
    flash2 = data["cases"][1]
    assert (flash2["peer"], flash2["pass"], flash2["N"]) == ("flash2", "fwd", 256)
    assert flash2["runs"][0]["counted"] == flash2["runs"][0]["closed_form"]
    assert flash2["runs"][0]["closed_form"] == {"read": 589_824, "written": 67_584}
    assert data["cases"][8]["runs"][0]["closed_form"] is None
    assert "standard, fwd, N 256: out of memory" in out


@pytest.mark.parametrize(
    ("log", "why"),
    [("==ERROR== ERR_NVGPUCTRPERM", "may not read the GPU's counters"),
     ("==ERROR== no such metric", "ncu failed: no such metric")],
)  # fmt: skip
def test_where_ncu_fails_a_sentence_and_the_recorded_run_are_shown(capsys, ncu, tmp_path, log, why):
    ncu(log=log, code=1)
    real = record.latest(kind="traffic", folder=record.CHECKOUT / "benchmarks" / "results")
    (tmp_path / real.path.name).write_bytes(real.path.read_bytes())
    code, out, err = cli_run(capsys, "traffic", "--quick", "--out", tmp_path / "x.json")
    assert code == 1
    assert why in err.splitlines()[-1]
    assert real.path.name in out
    assert not (tmp_path / "x.json").exists(), "a record of nothing is left"


@pytest.mark.parametrize("log", ["", PRINTED.split('"ID"')[0]], ids=["nothing", "no table"])
def test_an_ncu_that_counts_nothing_leaves_no_record(capsys, ncu, tmp_path, log):
    ncu(log=log, said="\n".join(f"{n}\tran" for n in range(len(QUICK))))
    code, _, err = cli_run(capsys, "traffic", "--quick", "--out", tmp_path / "x.json")
    assert code == 1
    assert "flashedu bench traffic: ncu counted no launch of any kernel\n" in err
    assert not (tmp_path / "x.json").exists()


def test_a_case_of_which_ncu_counted_nothing_says_so(capsys, ncu, tmp_path):
    """The log has the first cases of a run only."""
    ncu(said="\n".join(f"{n}\tran" for n in range(len(QUICK))))
    code, out, _ = cli_run(capsys, "traffic", "--quick", "--out", tmp_path / "x.json")
    assert code == 0
    for case in record.load(tmp_path / "x.json").data["cases"]:
        assert case["why"] == (None if case["runs"] else "ncu counted no launch of it")
    assert "SDPA cuDNN, bwd, N 256: ncu counted no launch of it" in out


def test_a_pass_of_which_ncu_counted_some_kernels_only_says_which_it_lacks(capsys, ncu, tmp_path):
    lines = PRINTED.splitlines(keepends=True)
    ncu(log="".join(line for line in lines if '"dq_kernel"' not in line))
    cli_run(capsys, "traffic", "--quick", "--out", tmp_path / "x.json")
    backward = record.load(tmp_path / "x.json").data["cases"][2]
    assert [run["kernel"] for run in backward["runs"]] == ["flash2 delta", "flash2 dkdv"]
    assert backward["why"] == "ncu counted no launch of flash2 dq"


def test_ncu_prints_numbers_in_one_notation_whatever_the_locale(monkeypatch, ncu, tmp_path):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    ncu()
    text = (tmp_path / "ncu").read_text(encoding="utf-8")
    told = text.replace(
        "import sys\n", "import os, sys\nprint('==ERROR==', os.environ['LC_ALL'])\n"
    )
    (tmp_path / "ncu").write_text(told, encoding="utf-8")
    with pytest.raises(traffic.Unreadable, match=r"ncu failed: C$"):
        traffic._profile(QUICK, lambda *_: None)


def test_a_launch_that_fails_leaves_neither_range_nor_profiler_open(monkeypatch):
    """What ran next would be counted as this case's."""
    called = []
    monkeypatch.setattr(traffic.Cuda, "__init__", lambda self: None)
    for place, name in ((torch.cuda.nvtx, "range_start"), (torch.cuda.nvtx, "range_end"),
                        (torch.cuda.profiler, "start"), (torch.cuda.profiler, "stop"),
                        (torch.cuda, "synchronize")):  # fmt: skip
        monkeypatch.setattr(place, name, lambda *_, name=name: called.append(name))

    def call():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        traffic.Profiled(3).seconds(call, wait=False)
    assert called == ["synchronize", "start", "range_start", "range_end", "stop"]


@pytest.mark.parametrize(("factor", "told"), [(1, "ran"), (2, "wrong: o differs")])
def test_a_kernel_with_a_wrong_result_is_not_profiled(monkeypatch, factor, told):
    device = Toy()
    monkeypatch.setattr(traffic, "Profiled", lambda number: device)
    right = traffic.peer_of(traffic.Case("peers", QUICK[0].problem, "fwd", "standard"))

    def prepare(p, name):
        attention = right.prepare(p, name)
        return lambda q, k, v: factor * attention(q, k, v)

    monkeypatch.setattr(traffic, "peer_of", lambda case: traffic.peers.Peer("standard", prepare))
    case = traffic.Case("peers", QUICK[0].problem, "fwd", "standard")
    assert traffic.run_one(0, case).startswith(told)
    assert len(device.waits) == (factor == 1)


def test_without_ncu_it_says_so_and_shows_the_recorded_run(capsys, monkeypatch):
    monkeypatch.setattr(devices, "why_not", lambda: None)
    monkeypatch.setenv("PATH", "")
    code, out, err = cli_run(capsys, "traffic")
    assert (code, err.count("\n")) == (1, 1)
    assert "there is no ncu on the PATH" in err
    assert "flash2 dkdv" in out


def test_without_a_gpu_it_says_so_and_shows_the_recorded_run(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = cli_run(capsys, "traffic")
    assert (code, err.count("\n")) == (1, 1)
    assert "needs an NVIDIA GPU, and torch sees none" in err
    assert "flash2 dkdv" in out


# the recorded run


RECORDED = record.latest(kind="traffic", card="H200")
SAME = 0.01  # of the card's count


def ours(section):
    """(case, run) of our kernels in a section."""
    return [
        (case, run) for case in RECORDED.cases(section) for run in case["runs"] if run["kernel"]
    ]


def problem_of(case, run):
    p = Problem(B=case["B"], H=case["H"], Nq=case["N"], D=case["D"], dtype=case["dtype"],
                causal=case["causal"])  # fmt: skip
    if run["tile"]:
        p = p.replace(block_q=run["tile"][0], block_k=run["tile"][1])
    return p


def named(case, run):
    tile = "x".join(map(str, run["tile"][:2])) if run["tile"] else "own"
    return f"{run['kernel']} {tile} {'causal' if case['causal'] else 'full'} {case['N']}"


every_kernel = pytest.mark.parametrize(
    ("case", "run"),
    [pytest.param(case, run, id=named(case, run)) for case, run in ours("tiles")],
)


def test_the_record_has_every_kernel_at_every_tile_size():
    for causal in (False, True):
        for kernel, side in (("flash1", 1), ("flash2", 0), ("flash2 dkdv", 1), ("flash2 dq", 0)):
            sizes = {
                run["tile"][side]
                for case, run in ours("tiles")
                if (run["kernel"], case["causal"]) == (kernel, causal)
            }
            assert sizes == {32, 64, 128, 256}
    assert not any(case["why"] for case in RECORDED.data["cases"])
    peers = {(case["peer"], case["pass"]) for case in RECORDED.cases("peers")}
    assert peers == {
        (peer, pass_)
        for peer in ("flash2", "standard", "sdpa-flash", "sdpa-cudnn")
        for pass_ in ("fwd", "bwd")
    }


@every_kernel
def test_the_closed_form_is_what_the_record_says(case, run):
    found = cost.KERNELS[run["kernel"]](problem_of(case, run))
    assert run["closed_form"] == {"read": found.hbm_read_bytes, "written": found.hbm_write_bytes}


@functools.cache
def interpreted(stage, p, backward):
    machine = ladder.count(stage, p, backward=backward)
    return machine.bytes_by_kernel()


@every_kernel
def test_the_interpreted_kernel_counts_the_closed_form(case, run):
    """As recorded in all cases; again here for one head, with the largest tiles, as time allows."""
    assert run["counted"] == run["closed_form"]
    if run["tile"] is None or max(run["tile"]) < 256:
        return
    p = problem_of(case, run).replace(B=1, H=1, H_kv=1)
    name = run["kernel"]
    read, written = interpreted(name.split()[0], p, " " in name)[name]
    heads = case["B"] * case["H"]
    assert {"read": heads * read, "written": heads * written} == run["closed_form"]


@every_kernel
def test_the_rung_in_pytorch_counts_the_same(case, run):
    """`online` is flash2's forward, one tile after another; the others have no such rung."""
    if run["kernel"] != "flash2":
        return
    p = problem_of(case, run).replace(B=1, H=1, H_kv=1)
    counted = ladder.count("online", p).counted
    heads = case["B"] * case["H"]
    assert heads * counted.hbm_read_bytes == run["closed_form"]["read"]
    assert heads * counted.hbm_write_bytes == run["closed_form"]["written"]


@every_kernel
def test_the_card_counted_the_same_bytes_into_its_sms(case, run):
    """flash1, causal: what a short sweep has stored is in the SM's L1 still when it comes back."""
    ratio = run["l2_to_sm_bytes"] / run["closed_form"]["read"]
    if run["kernel"] == "flash1" and case["causal"]:
        assert 0.97 < ratio <= 1
    else:
        assert ratio == pytest.approx(1, abs=SAME)


@every_kernel
def test_the_card_counted_the_same_bytes_out_of_its_sms(case, run):
    ratio = run["sm_to_l2_bytes"] / run["closed_form"]["written"]
    assert ratio == pytest.approx(1, abs=0.016), "two registers of dkdv are spilled at 32 × 128"


@pytest.mark.parametrize("kernel", ["flash2", "flash2 delta", "flash2 dq"])
def test_to_the_byte_where_nothing_is_loaded_twice_by_an_sm(kernel):
    for case, run in ours("tiles"):
        if run["kernel"] == kernel:
            assert run["l2_to_sm_bytes"] == run["closed_form"]["read"], named(case, run)
            assert run["sm_to_l2_bytes"] == run["closed_form"]["written"], named(case, run)


def test_a_ragged_tail_is_fetched_as_a_whole_tile():
    """The unit that copies tiles counts rows that do not exist: N is as if rounded up."""
    for case, run in ours("ragged"):
        if run["kernel"] == "flash2" and not case["causal"]:
            p = problem_of(case, run)
            whole = -(-p.Nq // 64) * 64
            assert (
                run["l2_to_sm_bytes"] == cost.flash2(p.replace(Nq=whole, Nk=whole)).hbm_read_bytes
            )


def test_the_other_side_of_the_tile_changes_nothing():
    for kernel in ("flash1", "flash2"):
        runs = [run for _, run in ours("other side") if run["kernel"] == kernel]
        assert len({run["closed_form"]["read"] for run in runs}) == 1 < len(runs)
        for run in runs:
            assert run["l2_to_sm_bytes"] == pytest.approx(run["closed_form"]["read"], rel=SAME)


def test_the_table_of_the_record_fits_a_terminal_and_has_all_ratios():
    text = shown(RECORDED, 80)
    assert "…" not in text
    for case in RECORDED.data["cases"]:
        for run in case["runs"]:
            if run["kernel"]:
                assert f" {run['l2_to_sm_bytes'] / run['closed_form']['read']:.4f} " in text
    assert " NO " not in text


def test_a_count_that_differs_from_the_closed_form_is_shown(tmp_path):
    data = copy.deepcopy(RECORDED.data)
    data["cases"][0]["runs"][0]["counted"]["read"] += 1
    assert shown(record.Record(tmp_path / "x.json", data), 80).count(" NO ") == 1


def test_the_figure_of_l2_and_dram_has_what_the_card_counted():
    drawn = show.l2_and_dram(RECORDED)
    runs = [run for case in RECORDED.cases("tiles", peer="flash2", causal=False)
            for run in case["runs"] if case["pass"] == "fwd"]  # fmt: skip
    assert [list(row.values()) for row in drawn.values()] == [
        [run[name] for name in ("l2_to_sm_bytes", "sm_to_l2_bytes", "dram_read_bytes",
                                "dram_write_bytes")]
        for run in runs
    ]  # fmt: skip
