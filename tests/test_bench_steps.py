"""`flashedu bench steps`: each change to flash3's source finds its words, and what is recorded."""

from __future__ import annotations

import ast
import itertools
import json

import pytest

from flashedu.bench import record
from flashedu.memory import Problem
from flashedu.stages import rung

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench import serving, steps
from flashedu.bench.steps import BY_NAME, STEPS, Step, plan, ratios_of, waterfall_of
from flashedu.bench.variants import changed
from tests.test_bench import BY_NAME as PEER
from tests.test_bench import cli_run, toy  # noqa: F401  a fixture

BASE = Problem(B=1, H=2, Nq=64, D=64, dtype="bfloat16")
every_step = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)


@every_step
def test_its_changes_are_found_in_flash3_and_leave_python(step):
    source = changed(steps.FLASH3_MODULE, step.changes, steps.BENEATH)
    ast.parse(source)
    assert (source == changed(steps.FLASH3_MODULE, (), steps.BENEATH)) == (not step.changes)


def test_a_change_that_finds_no_words_says_which():
    with pytest.raises(ValueError, match=r"stand once in flashedu\.stages\.flash3, got 0"):
        changed(steps.FLASH3_MODULE, (("STAGES = gl.constexpr(7)", ""),))
    with pytest.raises(ValueError, match="got 2 times"):
        changed(steps.FLASH3_MODULE, (("v_j, v_used = _full(v_tiles, t)", ""),))


@every_step
def test_its_module_is_imported(step):
    module = steps.module_of(step)
    assert module.__name__.startswith("mutant_" if step.changes else "flashedu.stages.")
    constants = {"one-stage": (1, 1), "two-q": (2, 2), "roles": (1, 1)}
    if step.name in constants:
        assert (module.Q_TILES.value, module.STAGES.value) == constants[step.name]


def test_no_two_steps_are_the_same_kernel():
    sources = [changed(steps.FLASH3_MODULE, s.changes, steps.BENEATH) for s in STEPS if s.changes]
    assert len(set(sources)) == len(sources)
    assert len(BY_NAME) == len(STEPS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_each_step_is_measured_against_one_that_is_timed_before_or_flash3(D, causal):
    p = BASE.replace(D=D, causal=causal)
    names = [step.name for step in plan(p)]
    for number, name in enumerate(names):
        before = steps.against(BY_NAME[name], p)
        assert (before is None) == (number == 0)
        assert before in (None, "flash3", *names[:number])
    kept = [name for name in names if BY_NAME[name].kept]
    assert (kept[0], kept[-1]) == ("flash2", "flash3")
    assert [steps.against(BY_NAME[name], p) for name in kept[1:]] == kept[:-1]


# what is recorded


@pytest.fixture
def run_on_toy(toy, monkeypatch):  # noqa: F811
    """The steps are plain attention; some are wrong, or do not pass their trial."""
    formula = PEER["standard"].prepare

    def attention_of(step, p):
        right = formula(p, "cpu")
        return lambda q, k, v: right(q, k, v) * (2 if step.name == "beside" else 1)

    few = tuple(BY_NAME[x] for x in ("flash2", "flash2-128", "longest", "flash3", "beside",
                                     "one-consumer"))  # fmt: skip
    monkeypatch.setattr(steps, "STEPS", few)
    monkeypatch.setattr(steps, "attention_of", attention_of)
    monkeypatch.setattr(steps, "CUDNN", "standard")
    hung = {("one-consumer", False): "in a process of its own, it took more than 1 s"}
    monkeypatch.setattr(
        steps, "trials",
        lambda problems: {(s.name, p): hung.get((s.name, p.causal)) for p in problems for s in few},
    )  # fmt: skip
    toy.ticks = itertools.cycle((2.0, 4.0))
    return toy


def test_the_command_records_and_shows_the_steps(capsys, run_on_toy, tmp_path):
    options = ("--d", "64", "--n", "64", "--tokens", "64", "--rounds", "2")
    code, out, err = cli_run(capsys, "steps", *options)
    assert code == 0, err
    (path,) = tmp_path.glob("*.json")
    found = record.load(path)
    assert (found.data["kind"], found.data["planned"], len(found.data["cases"])) == ("steps", 2, 2)
    full, causal = found.data["cases"]
    runs = {run["peer"]: run for run in full["runs"]}
    assert list(runs) == ["standard", "flash2", "flash2-128", "flash3", "beside", "one-consumer"]
    assert "longest" in [run["peer"] for run in causal["runs"]]
    assert runs["beside"]["why"].startswith("wrong: o differs from float64")
    assert runs["one-consumer"]["why"].endswith("it took more than 1 s")
    assert runs["flash2-128"]["times_as_fast_as"].keys() == {"standard", "flash2"}
    assert runs["flash2"]["tflops"] == 4 * 64 * 64 * 64 / 4e12
    assert runs["flash3"]["against"] == "products"
    assert "softmax beside p v at N 64: wrong: o differs" in " ".join(out.split())
    recorded = {step["name"]: step for step in found.data["steps"]}
    assert recorded["flash3"]["changes"] == []
    # drawn
    bars = waterfall_of(found, D=64, N=64)
    assert [bar.label for bar in bars] == [BY_NAME["flash2"].label, BY_NAME["flash2-128"].label,
                                           BY_NAME["flash3"].label]  # fmt: skip
    assert [bar.kept for bar in bars] == [True, False, True]
    assert [bar.measured for bar in bars] == [
        runs[x]["tflops"] for x in ("flash2", "flash2-128", "flash3")
    ]
    assert all(bar.predicted > 0 for bar in bars)
    tried = waterfall_of(found, D=64, N=64, tried=True)
    assert [bar.measured for bar in tried[3:]] == [None, None]
    with pytest.raises(ValueError, match="record must have the steps at D 128, N 64, full"):
        waterfall_of(found, D=128, N=64)
    # as ratios
    ratios = {r.step.name: r for r in ratios_of(found, D=64, N=64)}
    assert list(ratios) == ["flash2-128", "flash3", "beside", "one-consumer"]
    first = ratios["flash2-128"]
    assert first.against.name == "flash2"
    assert first.predicted == pytest.approx(bars[1].predicted / bars[0].predicted)
    assert first.predicted != pytest.approx(1, abs=0.05)  # two kernels for the model, too
    assert first.measured == runs["flash2-128"]["times_as_fast_as"]["flash2"][0]
    assert ratios["one-consumer"].measured is None
    assert ratios["one-consumer"].why == runs["one-consumer"]["why"]
    assert ratios["one-consumer"].predicted > 0
    assert ratios_of(found, D=64, N=64, names=["flash2-128"]) == [first]
    code, out, _ = cli_run(capsys, "show", path, "--png", tmp_path / "f.png")
    assert code == 0
    assert len(list(tmp_path.glob("f_steps_d64_*.png"))) == 2


def test_another_card_is_refused_in_a_sentence(capsys, toy, monkeypatch):  # noqa: F811
    facts = {**toy.facts(), "compute_capability": [8, 0]}
    monkeypatch.setattr(toy, "facts", lambda: facts)
    code, out, err = cli_run(capsys, "steps")
    assert (code, out) == (1, "")
    assert err == "flashedu bench steps: needs a Hopper GPU, got NVIDIA Toy\n"


@pytest.mark.parametrize(
    ("D", "causal", "N", "shape"),
    [
        (128, False, 4096, (1, 128, 64, 2, 2)),
        (128, True, 4096, (1, 64, 64, 3, 2)),
        (64, False, 4096, (1, 64, 128, 2, 3)),
        (64, True, 1024, (1, 64, 64, 2, 4)),
    ],
)
def test_the_model_takes_flash2_for_the_kernel_that_is_timed(D, causal, N, shape):
    p = Problem(Nq=N, D=D, causal=causal, dtype="bfloat16")
    kernel = steps._model(BY_NAME["flash2"], p, 2)
    assert (
        kernel.consumers, kernel.rows, kernel.block_k, kernel.stages, kernel.programs
    ) == shape  # fmt: skip
    same = steps._model(BY_NAME["flash2-128"], p, 2)
    assert (same.D, same.block_q, same.block_k, same.consumers) == (D, 128, 128, 2)
    assert (same.stages, same.programs, same.specialised) == (2, 1, False)


# trials


def test_a_trial_that_ends_early_costs_the_sizes_that_are_left(monkeypatch):
    problems = [BASE, BASE.replace(Nq=128), BASE.replace(causal=True)]
    jobs = []

    def program(module, arguments, *, limit_s):
        job = json.loads(arguments[0])
        jobs.append(job)
        hangs = job["step"] == "beside"
        told = [{"why": None}] * (1 if hangs else len(job["problems"]))
        return told, "", "it took more than 7 s" if hangs else "it did not end"

    monkeypatch.setattr(serving, "program", program)
    whys = steps.trials(problems)
    assert {job["step"] for job in jobs} == set(BY_NAME)
    assert whys["flash3", problems[1]] is None
    assert whys["beside", problems[0]] is None
    assert whys["beside", problems[1]] == "in a process of its own, it took more than 7 s"
    assert ("no-skip", BASE) not in whys  # without a mask it is no other kernel
    assert len(whys) == sum(step.applies(p) for step in STEPS for p in problems)


def test_a_trial_writes_a_line_for_each_size_and_why_one_failed(monkeypatch, tmp_path):
    def attention_of(step: Step, p):
        if p.causal:
            raise RuntimeError("no such kernel")
        return PEER["standard"].prepare(p, "cpu")

    monkeypatch.setattr(steps, "attention_of", attention_of)
    sizes = [vars(BASE), vars(BASE.replace(causal=True)), vars(BASE)]
    out = tmp_path / "out.jsonl"
    steps.main(out, {"step": "beside", "problems": sizes}, device="cpu")
    whys = [json.loads(line)["why"] for line in out.read_text().splitlines()]
    assert whys == [None, "RuntimeError: no such kernel", None]
