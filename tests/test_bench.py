"""`flashedu bench`, with a clock and a card that tests control; on a GPU, the real ones too."""

from __future__ import annotations

import io
import itertools
import json
import sys

import pytest
import torch
from rich.console import Console

from flashedu import cli
from flashedu.bench import cases, record, show
from flashedu.bench import device as devices
from flashedu.bench.cases import USUAL, Case, Choice, plan
from flashedu.bench.record import NoRecord, Writer, latest, load
from flashedu.bench.run import Check, measure, run, spread
from flashedu.memory import Problem
from flashedu.stages import rung
from flashedu.units import human_bytes, human_seconds
from tests import pretend

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench import tune
from flashedu.bench.peers import PEERS, Peer, Uncompiled
from flashedu.stages import flash2
from flashedu.stages.flash2_tiles import Tile

BY_NAME = {peer.name: peer for peer in PEERS}
CARD = {
    "card": "NVIDIA Toy", "compute_capability": [9, 0], "sm_count": 4, "l2_bytes": 2**20,
    "memory_bytes": 2**34, "driver": "1.2.3",
}  # fmt: skip
HEAD = {
    "kind": "attention", "date": "2026-01-01T00:00:00+00:00", **CARD, "torch": "2.13",
    "triton": "3.7", "cuda": "13.0", "quick": False, "planned": 1, "commit": "abc",
}  # fmt: skip
P = Problem(B=2, H=2, Nq=64, D=16, dtype="float16")
SPEED = ("--sections", "speed", "--d", "16", "--n", "64", "--tokens", "64", "--rounds", "2")


class Toy:
    """A device on the CPU whose clock shows what a test wants."""

    name = "cpu"

    def __init__(self, ticks=(1.0,)):
        self.ticks, self.waits, self.captured = itertools.cycle(ticks), [], 0

    def draw(self, p, seed):
        return devices.draw(p, seed, "cpu")

    def seconds(self, call, *, wait):
        call()
        self.waits.append(wait)
        return next(self.ticks)

    def peak_bytes(self, call):
        call()
        return 12345

    def capture(self, *calls):
        self.captured += 1
        return list(calls)

    def free(self):
        pass

    def facts(self):
        return dict(CARD)

    def state(self):
        return {"clocks.sm": "1980", "temperature.gpu": "40"}


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The command line runs on a `Toy`, and keeps its records in an empty folder."""
    device = Toy()
    monkeypatch.setattr(devices, "why_not", lambda: None)
    monkeypatch.setattr(devices, "Cuda", lambda: device)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(cases, "HIDDEN", 32)
    return device


def cli_run(capsys, *args):
    capsys.readouterr()
    code = cli.main(["bench", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def logged(log, name, attention=None):
    attention = attention or BY_NAME["standard"].prepare(P, "cpu")

    def attend(q, k, v):
        log.append(name)
        return attention(q, k, v)

    return Peer(name, lambda p, device: attend)


def one(case_run, name):
    (found,) = (entry for entry in case_run["runs"] if entry["peer"] == name)
    return found


def measured(attention, pass_="fwd", problem=P):
    """What the record says of one peer, and how often it was timed."""
    device = Toy()
    case = Case("speed", problem, pass_, ("peer",))
    found = measure(case, [logged([], "peer", attention)], device, rounds=3, seed=0)
    return one(found, "peer"), len(device.waits)


# what is measured


def test_flops_are_counted_as_the_papers_do():
    p = Problem(B=2, H=3, Nq=5, D=7)
    assert Case("speed", p, "fwd", ()).flops == 4 * 2 * 3 * 5 * 5 * 7
    assert Case("speed", p, "bwd", ()).flops == 2.5 * Case("speed", p, "fwd", ()).flops
    assert Case("speed", p, "both", ()).flops == 3.5 * Case("speed", p, "fwd", ()).flops
    causal = Case("speed", p.replace(causal=True), "fwd", ())
    assert causal.flops == Case("speed", p, "fwd", ()).flops / 2


def test_the_plan_has_the_shapes_of_the_table():
    speed = plan(Choice(), ("speed",))
    backward = {peer for case in speed if case.pass_ == "bwd" for peer in case.peers}
    assert set(USUAL) - backward == {"flash1"}
    asked = plan(Choice(peers=("flash3", "flash3-det")), ("speed",))
    assert {case.peers for case in asked if case.pass_ == "fwd"} == {("flash3",)}
    assert {case.peers for case in asked if case.pass_ == "bwd"} == {("flash3", "flash3-det")}
    assert len(speed) == 2 * 4 * 2 * 2
    for case in speed:
        p = case.problem
        assert (p.B * p.Nq, p.H * p.D, p.dtype) == (16384, 2048, "bfloat16")
        assert ("flash1" in case.peers) == (case.pass_ == "fwd")
    heads = [c.problem.B * c.problem.H for c in plan(Choice(causal=(False,)), ("flash1",))]
    assert heads == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] * 2
    memory = [c.problem for c in plan(Choice(), ("memory",))]
    assert [p.Nq for p in memory] == [512 * 2**i for i in range(8)]
    assert {(p.B, p.H, p.D, p.dtype) for p in memory} == {(16, 8, 64, "float16")}
    standard = [(c.problem.Nq, c.problem.D, c.problem.causal, c.pass_)
                for c in plan(Choice(), ("standard",))]  # fmt: skip
    assert standard == [(4096, 64, True, "both"), (4096, 128, True, "both")]
    short = {(c.problem.Nq, c.pass_, c.mode) for c in plan(Choice(), ("short",))}
    assert short == set(itertools.product((512, 1024), ("fwd", "bwd"), ("direct", "graph")))


def test_a_choice_of_peers_leaves_out_the_others_and_empty_cases():
    chosen = plan(Choice(peers=("flash1",), causal=(True,)), ("speed", "memory"))
    assert {case.peers for case in chosen} == {("flash1",)}
    assert {case.section for case in chosen} == {"speed"}


@pytest.mark.parametrize("pass_", ["fwd", "bwd", "both"])
@pytest.mark.parametrize("mode", ["queued", "graph"])
def test_the_real_peers_pass_the_check_and_are_timed(pass_, mode):
    device, names = Toy(), ("flash2", "standard", "sdpa-math")
    case = Case("speed", P.replace(B=1, causal=True), pass_, names, mode)
    (found,) = run([case], BY_NAME, device, rounds=2, on_case=lambda *_: None)
    assert [entry["peer"] for entry in found["runs"]] == list(names)
    for entry in found["runs"]:
        assert entry["why"] is None
        assert len(entry["seconds"]) == 2
        assert set(entry["errors"]) == ({"o"} if pass_ == "fwd" else {"o", "dq", "dk", "dv"})
        assert entry["extra_bytes"] == (None if mode == "graph" else 12345)
    assert device.waits == [mode != "queued"] * 9
    assert device.captured == (3 if mode == "graph" else 0)


def test_peers_take_turns_and_each_was_checked_before_the_first_timing():
    log = []
    peers = [logged(log, name) for name in "abc"]
    measure(Case("speed", P, "fwd", tuple("abc")), peers, Toy(), rounds=3, seed=0)
    assert "".join(log) == "aabbcc" + 4 * "abc"  # checked, measured; then in turns, one to warm up


def test_only_the_backward_is_timed_as_backward():
    log, device, forwards = [], Toy(), []
    seconds = device.seconds

    def watched(call, *, wait):
        before = len(log)
        taken = seconds(call, wait=wait)
        forwards.append(len(log) - before)
        return taken

    device.seconds = watched
    for pass_ in ("fwd", "bwd", "both"):
        measure(Case("speed", P, pass_, ("a",)), [logged(log, "a")], device, rounds=1, seed=0)
    assert forwards == [1, 1, 0, 0, 1, 1]  # each pass: a warm-up, a round


# who is refused


def ignores_k(q, k, v):
    return v.mean(2, keepdim=True).expand_as(q)


def test_a_peer_that_ignores_k_is_refused_and_not_timed():
    entry, timings = measured(ignores_k)
    assert entry["why"].startswith("wrong: o differs from float64 by ")
    assert (timings, entry["seconds"], entry["median_s"], entry["tflops"]) == (0, [], None, None)


def test_a_wrong_gradient_is_refused_though_o_is_right():
    right = BY_NAME["standard"].prepare(P, "cpu")
    entry, timings = measured(lambda q, k, v: right(q + 0.1 * (q - q.detach()), k, v), "bwd")
    assert entry["why"].startswith("wrong: dq differs")
    assert timings == 0


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (lambda q, k, v: q * torch.nan, "wrong: o differs from float64 by nan"),
        (lambda q, k, v: q[:, :, 1:], "AssertionError: the shape is (1, 1, 63, 16)"),
        (lambda q, k, v: q @ k, "RuntimeError: "),
    ],
)
def test_what_gives_no_result_is_refused_with_a_sentence(attention, why):
    entry, timings = measured(attention)
    assert entry["why"].startswith(why)
    assert "\n" not in entry["why"]
    assert timings == 0
    json.dumps(entry, allow_nan=False)


def test_a_peer_without_memory_does_not_stop_the_others():
    def greedy(q, k, v):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    peers = [logged([], "a", greedy), logged([], "b")]
    found = measure(Case("speed", P, "fwd", ("a", "b")), peers, Toy(), rounds=2, seed=0)
    assert one(found, "a")["why"] == "out of memory"
    assert one(found, "b")["seconds"] == [1.0, 1.0]
    assert one(found, "b")["times_as_fast_as"] == {}


def test_inputs_that_do_not_fit_are_told_and_the_run_goes_on():
    def greedy(p, seed):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    device = Toy()
    device.draw = greedy
    found = measure(Case("speed", P, "fwd", ("a",)), [logged([], "a")], device, rounds=2, seed=0)
    assert one(found, "a")["why"] == "out of memory"
    assert found["checked"] == "nothing"


def test_an_error_in_the_last_head_or_the_last_key_tile_is_seen():
    p = Problem(B=2, H=3, Nq=1024, D=64, dtype="bfloat16")
    q, k, v, _ = devices.draw(p, 0, "cpu")
    check = Check((q, k, v, q), p, 0, gradients=False)
    o = BY_NAME["standard"].prepare(p, "cpu")(q, k, v)
    assert check.errors({"o": o})["o"].within
    assert check.heads[-1] == (1, 2)
    skipped = BY_NAME["standard"].prepare(p, "cpu")(q, k[:, :, :-64], v[:, :, :-64])
    assert not check.errors({"o": skipped})["o"].within
    o[1, 2, -1, 0] += 0.05
    assert not check.errors({"o": o})["o"].within


def test_flex_attention_that_is_not_compiled_is_not_timed():
    attention = BY_NAME["flex"].prepare(P.replace(causal=True), "cpu")
    q, k, v, _ = devices.draw(P, 0, "cpu")
    with torch.compiler.set_stance("force_eager"), pytest.raises(Uncompiled):
        attention(q, k, v)


def test_an_sdpa_peer_has_no_other_backend_to_fall_back_on():
    peer, (q, k, v, _) = BY_NAME["sdpa-cudnn"], devices.draw(P, 0, "cpu")
    attention = peer.prepare(P, "cpu")
    with peer.around(), pytest.raises(RuntimeError, match="No viable backend"):
        attention(q, k, v)


# the numbers


def test_median_spread_and_ratios_are_those_of_the_rounds():
    ticks = (9.0, 9.0, 1.0, 3.0, 2.0, 4.0, 1.0, 2.0)  # a warm-up; then a, b, a, b, a, b
    peers = [logged([], "a"), logged([], "b")]
    found = measure(Case("speed", P, "fwd", ("a", "b")), peers, Toy(ticks), rounds=3, seed=0)
    a, b = one(found, "a"), one(found, "b")
    assert (a["seconds"], b["seconds"]) == ([1.0, 2.0, 1.0], [3.0, 4.0, 2.0])
    assert (a["median_s"], b["median_s"]) == (1.0, 3.0)
    assert b["tflops"] == found["flops"] / 3.0 / 1e12
    assert a["times_as_fast_as"]["b"][0] == 2.0  # of 3/1, 4/2, 2/1: within a round
    assert b["times_as_fast_as"]["a"][0] == 0.5


def test_spread_is_median_and_the_tenth_from_either_end():
    assert spread([5.0]) == [5.0, 5.0, 5.0]
    assert spread([float(x) for x in range(100, -1, -1)]) == [50.0, 10.0, 90.0]


# the record


def test_a_run_is_a_record_that_show_prints(capsys, toy, tmp_path):
    toy.ticks = itertools.cycle((1e-9, 2e-9, 4e-9))  # as many as peers
    peers = "flash2,standard,sdpa-math"
    code, out, err = cli_run(capsys, *SPEED, "--peers", peers, "--causal", "--passes", "fwd")
    assert code == 0
    assert err == "[1/1] speed: fwd B 1 H 2 N 64 D 16 bfloat16 causal queued\n"
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("attention_toy_20")
    found = load(path)
    head = found.data
    assert head["command"].startswith("flashedu bench --sections speed --d 16")
    assert head["torch"] == torch.__version__
    assert head["after"] == toy.state()
    assert (head["planned"], head["rounds"], head["quick"]) == (1, 2, False)
    assert found.label == latest("speed").label
    assert found.label.startswith(f"recorded {head['date'][:10]} on an NVIDIA Toy, torch ")
    (case,) = found.cases("speed", N=64)
    assert case["checked"].endswith("every row, against float64")
    assert all(run["errors"]["o"][0] <= run["errors"]["o"][1] for run in case["runs"])
    assert [run["median_s"] for run in case["runs"]] == [1e-9, 2e-9, 4e-9]
    for run_ in case["runs"]:
        assert f"{run_['tflops']:.3g}" in out.split()
    assert cli_run(capsys, "show") == (0, out, "")
    assert cli_run(capsys, "show", path) == (0, out, "")


def test_no_record_is_overwritten(capsys, toy, tmp_path):
    path = tmp_path / "old.json"
    path.write_text("precious")
    code, out, err = cli_run(capsys, *SPEED, "--peers", "standard", "--out", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is there already" in err
    assert path.read_text() == "precious"
    with pytest.raises(FileExistsError):
        Writer(path, {})


def test_what_was_measured_before_an_end_is_kept(capsys, toy, tmp_path):
    def interrupted(call, *, wait):
        if len(toy.waits) == 6:  # a warm-up and two rounds of two cases
            raise KeyboardInterrupt
        toy.waits.append(wait)
        return 1.0

    toy.seconds = interrupted
    code, _, err = cli_run(capsys, *SPEED, "--peers", "standard", "--passes", "fwd,bwd")
    assert (code, err.splitlines()[-1]) == (130, "flashedu: stopped")
    (path,) = tmp_path.iterdir()
    assert len(load(path).data["cases"]) == 2
    assert "It ended early, after 2 of 4 cases." in cli_run(capsys, "show")[1]


def test_a_quick_run_stays_out_of_the_records(capsys, toy, tmp_path):
    path = tmp_path / "quick.json"
    options = ("--quick", "--peers", "standard", "--causal", "--out", path)
    assert cli_run(capsys, *options, *SPEED[:-2])[0] == 0
    assert load(path).data["rounds"] == 3
    assert load(path).data["command"].startswith("flashedu bench --quick")
    assert str(tmp_path) not in load(path).data["command"]
    with pytest.raises(NoRecord, match="no record of flashedu bench"):
        latest("speed", folder=tmp_path)


def written(folder, name, **changes):
    section = changes.pop("section", "speed")
    writer = Writer(folder / name, {**HEAD, **changes})
    (case, *_) = pretend.record((section,)).data["cases"]
    writer.add(case)
    return writer.path


def test_latest_is_the_newest_that_has_the_section(tmp_path):
    written(tmp_path, "a.json", date="2026-03-01T00:00:00+00:00")
    newest = written(tmp_path, "b.json", date="2026-04-01T00:00:00+00:00")
    memory = written(tmp_path, "c.json", date="2026-05-01T00:00:00+00:00", section="memory")
    other = written(tmp_path, "d.json", card="NVIDIA Other")
    (tmp_path / "e.json").write_text('{"not": "ours"}')
    assert latest("speed", folder=tmp_path).path == newest
    assert latest(folder=tmp_path).path == memory
    assert latest("speed", card="other", folder=tmp_path).path == other
    with pytest.raises(NoRecord, match="section 'short' of H200"):
        latest("short", card="H200", folder=tmp_path)


def test_a_label_says_where_when_and_with_what(tmp_path):
    assert load(written(tmp_path, "a.json")).label == (
        "recorded 2026-01-01 on an NVIDIA Toy, torch 2.13, triton 3.7, CUDA 13.0, driver 1.2.3"
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "it is not text"),
        (b"{", "it is not JSON"),
        (b"[]", "its parts have other types"),
        (b"{}", "it has no 'kind'"),
        (b'{"kind": "attention", "date": 1}', "it has no 'card'"),
        (json.dumps({**HEAD, "cases": [{"section": "speed"}]}).encode(), "it has no 'B'"),
        (json.dumps({**HEAD, "cases": 7}).encode(), "its parts have other types"),
    ],
)
def test_a_file_that_is_no_record_gets_one_line(capsys, tmp_path, content, why):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    code, out, err = cli_run(capsys, "show", path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert why in err


def shown(found, width):
    console = Console(width=width, file=io.StringIO())
    for part in show.tables(found):
        console.print(part)
    return console.file.getvalue()


def test_the_pretended_record_has_what_a_measured_one_has():
    made = pretend.record(("speed",)).data["cases"][0]
    real = measure(Case("speed", P, "fwd", ("a",)), [logged([], "a")], Toy(), rounds=1, seed=0)
    assert set(made) == set(real)
    assert set(made["runs"][0]) == set(one(real, "a"))


BESIDE = {  # section → who stands in its last columns
    "speed": {"sdpa-flash", "sdpa-cudnn"},
    "decode": {"sdpa-flash", "copy"},
    "flash-decoding": {"flash2", "standard"},
    "paged": {"paged-16", "paged-64", "paged-256"},
    "varlen": {"padded", "padded-mask", "unmasked", "torch-varlen"},
    "model": {"hf-sdpa", "hf-eager"},
}


def test_every_section_has_its_table_with_its_numbers():
    found = pretend.record()
    text = shown(found, 80)
    assert "…" not in text
    for case in found.data["cases"]:
        for entry in case["runs"]:
            if case["section"] == "memory" and entry["extra_bytes"] is not None:
                assert human_bytes(entry["extra_bytes"]) in text
            elif case["section"] in ("decode", "paged"):
                assert f" {entry['gb_per_s']:.0f} " in text
            elif case["section"] in ("short", "flash-decoding", "model"):
                assert f" {human_seconds(entry['median_s'])} " in text
            elif entry["tflops"] is not None:
                assert f" {entry['tflops']:.3g} " in text
        runs, beside = case["runs"], BESIDE.get(case["section"], set())
        if runs[1]["peer"] == "flash3":
            runs, beside = runs[1:], {"sdpa-cudnn"}
        ours = runs[0]["times_as_fast_as"]
        for peer in beside & set(ours):
            assert f" {ours[peer][0]:.2f} ±" in text
    assert "standard at N 32768: out of memory" in text
    assert "at most 25% of its error budget was used" in " ".join(text.split())


def test_a_peer_that_ran_at_no_size_is_told_once_and_has_no_column():
    found = pretend.record(("speed",))
    for case in found.data["cases"]:
        for entry in case["runs"]:
            if entry["peer"] == "fa4":
                entry |= {"why": "Missing: it is not here", "median_s": None, "tflops": None}
            entry["times_as_fast_as"].pop("fa4", None)
    text, tables = shown(found, 80), 2 * 2 * 2
    assert text.count("FA4") == text.count("\nFA4: Missing: it is not here\n") == tables
    found.data["cases"][0]["runs"][0]["why"] = "out of memory"
    assert "flash2 at N 512: out of memory" in shown(found, 80)


def test_the_version_of_fa4_is_recorded_and_shown(monkeypatch):
    def version(package):
        if package == "flash-attn-4":
            return "4.0.0b0"
        raise devices.PackageNotFoundError

    head = devices.provenance(Toy(), "flashedu bench")
    assert head["triton"] is not None
    monkeypatch.setattr(devices, "version", version)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    head = devices.provenance(Toy(), "flashedu bench")
    assert (head["flash-attn-4"], head["nvidia-cutlass-dsl"]) == ("4.0.0b0", None)
    found = pretend.record(("speed",))
    assert "FA4: flash-attn-4" not in shown(found, 80)
    found.data["flash-attn-4"] = "4.0.0b0"
    assert "FA4: flash-attn-4 4.0.0b0, nvidia-cutlass-dsl unknown\n" in shown(found, 80)


def test_show_draws_the_figures(capsys, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(pretend.record().data))
    code, out, err = cli_run(capsys, "show", path, "--png", tmp_path / "f.png")
    assert (code, err) == (0, "")
    drawn = sorted(tmp_path.glob("*.png"))
    assert [x.name for x in drawn] == [
        "f_flash1.png", "f_memory.png", "f_speed_d128.png", "f_speed_d64.png",
    ]  # fmt: skip
    assert all(x.read_bytes().startswith(b"\x89PNG") and str(x) in out for x in drawn)
    code, _, err = cli_run(capsys, "show", path, "--png", tmp_path / "no" / "f.png")
    assert (code, err.count("\n")) == (1, 1)


# the command line


@pytest.mark.parametrize("command", [(), ("tune",), ("steps",)])
def test_without_a_gpu_a_sentence_names_what_can_be_shown(capsys, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = cli_run(capsys, *command)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "needs an NVIDIA GPU, and torch sees none" in err


def test_without_triton_or_with_interpreted_kernels_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if flash2.triton_mode.INTERPRETED:
        assert "TRITON_INTERPRET is set: unset it" in cli_run(capsys)[2]
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert "needs Triton: pip install triton" in cli_run(capsys)[2]


def test_without_torch_it_says_so(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "flashedu.bench.device")
    monkeypatch.delattr("flashedu.bench.device")
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = cli_run(capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert "needs torch: pip install torch" in err


def test_the_known_names_are_those_of_the_package():
    assert cli.bench.BENCH_SECTIONS.split(", ") == list(cases.SECTIONS)
    assert cli.bench.BENCH_PEERS.split(", ") == list(cases.PEERS) == [peer.name for peer in PEERS]
    assert cli.bench.BENCH_PASSES.split(", ") == list(cases.PASSES)
    assert set(cli.bench.GPU_DTYPES.split(", ")) == set(rung("flash2").dtypes)
    assert set(USUAL) == set(cases.DRAWN) - {"sdpa-math", "flash3-det", "decode", "copy"}


# tune


def test_tune_takes_the_fastest_right_tile_that_fits(capsys, toy, tmp_path, monkeypatch):
    def pretend(q, k, v, p, scale, machine, tile):
        if tile.block_q == 128:
            raise tune.OutOfResources(300_000, 232_448, "shared memory")
        o, lse = flash2_forward(q, k, v, p, scale, machine, Tile(64, 64))
        return (o if tile.block_k == 64 else 1.1 * o), lse

    flash2_forward = flash2.forward
    monkeypatch.setattr(flash2, "forward", pretend)
    few = {
        "forward": ((128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2)),
        "dkdv": ((64, 64, 4, 2),),
        "dq": ((64, 64, 8, 2), (64, 64, 4, 2)),
    }
    monkeypatch.setattr(tune, "CANDIDATES", few)
    monkeypatch.setattr(
        tune.tune, "__kwdefaults__", {**tune.tune.__kwdefaults__, "candidates": few}
    )
    toy.ticks = itertools.cycle((3.0, 1.0))  # the second tile is the fastest
    options = ("--d", "16", "--n", "32", "--tokens", "32", "--causal", "--dtype", "float16")
    code, out, err = cli_run(capsys, "tune", *options, "--rounds", "2")
    assert (code, err.count("\n")) == (0, 3)
    (path,) = tmp_path.iterdir()
    forward, _, dq = load(path).data["cases"]
    assert forward["best"] == [64, 64, 4, 3]
    assert [run["why"] is None for run in forward["runs"]] == [False, True, True, False]
    assert forward["runs"][0]["why"].startswith("does not fit the card: ")
    assert forward["runs"][3]["why"].startswith("wrong: o differs from float64")
    assert dq["best"] is not None
    row = "((9, 0), 16, 2, True, 32): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, "
    assert row in " ".join(out.split())


def test_every_candidate_is_one_that_a_kernel_takes():
    for tiles in tune.CANDIDATES.values():
        assert len(set(tiles)) == len(tiles)
        for tile in tiles:
            block_q, block_k, warps, stages = tile
            assert {block_q, block_k} <= {16, 32, 64, 128, 256}
            assert warps in (4, 8)
            assert stages in (1, 2, 3, 4)


# on a card

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none"
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("default")  # of torch.compile, by version
@pytest.mark.parametrize("mode", ["queued", "graph"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_on_a_card_our_kernels_are_timed_beside_pytorchs(pass_, mode):
    names = USUAL if mode == "queued" else ("flash2", "sdpa-flash", "sdpa-cudnn")
    problem = Problem(B=2, H=4, Nq=512, D=64, dtype="float16", causal=True)
    peers = [BY_NAME[name] for name in names if name != "flash1" or pass_ == "fwd"]
    case = Case("speed", problem, pass_, tuple(names), mode)
    found = measure(case, peers, devices.Cuda(), rounds=3, seed=0)
    for name in ("flash2", "sdpa-flash"):
        assert one(found, name)["why"] is None
        assert 1e-6 < one(found, name)["median_s"] < 1
    if mode == "queued":
        assert one(found, "flash2")["extra_bytes"] < one(found, "standard")["extra_bytes"]


@pytest.mark.gpu
@needs_gpu
def test_on_a_card_the_facts_are_there():
    facts = devices.provenance(devices.Cuda(), "flashedu bench")
    assert facts["card"] in torch.cuda.get_device_name()
    assert facts["sm_count"] > 0
