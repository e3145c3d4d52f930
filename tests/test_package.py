"""How the package hangs together: what imports what, and how a stage is chosen."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flashedu
from flashedu.memory import Machine, cost
from flashedu.stages import GPU_TILES, LADDER, RUNGS, Rung, naive, online, rung, tiled
from tests.contract import bits

PACKAGE = Path(flashedu.__file__).parent
STAGES = PACKAGE / "stages"
NOT_RUNGS = {
    "__init__", "contract", "decode_tiles", "descriptors", "dispatch", "flash2_tiles",
    "flash3_backward", "flash3_dq", "gluon_names", "hopper", "interpreter", "paged",
    "paged_varlen", "reference", "runs", "triton_mode",
}  # fmt: skip
BUILT_ON = {"varlen": {"flash2"}}  # beside the ladder: what it takes over as it is
MAY_USE_THE_ORACLE = ("testing.py", "exercises/", "ladder.py")

every_rung = pytest.mark.parametrize("stage", RUNGS, ids=[r.name for r in RUNGS])
Q = np.ones((1, 1, 3, 2), np.float32)


def loaded_after(statement: str, *modules: str) -> list[str]:
    """Those of the modules that a fresh Python has loaded after the statement."""
    program = f"{statement}\nimport sys\nprint(*({set(modules)!r} & set(sys.modules)))"
    return in_a_fresh_python(program).split()


def in_a_fresh_python(program: str) -> str:
    """What it prints, without the last line break."""
    environment = {**os.environ}
    environment.pop("TRITON_INTERPRET", None)  # Triton sets it where kernels are interpreted
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, cwd=PACKAGE.parent, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.rstrip("\n")


def imported_by(path: Path) -> set[str]:
    """Every module, and every name of a module, that a file imports at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


# imports


@pytest.mark.parametrize(
    ("statement", "modules"),
    [
        ("import flashedu", ("torch", "triton", "numpy", "matplotlib")),
        ("import flashedu.memory, flashedu.stages", ("torch", "triton", "matplotlib")),
        ("from flashedu.stages import naive, tiled", ("torch", "triton", "matplotlib")),
        ("import numpy as np, flashedu; x = np.ones((1, 1, 3, 2)); flashedu.attention(x, x, x)",
         ("torch", "triton")),
    ],
)  # fmt: skip
def test_import_loads_no_more_than_it_needs(statement: str, modules: tuple[str, ...]) -> None:
    assert loaded_after(statement, *modules) == []


@every_rung
def test_a_stage_imports_no_other_stage_and_not_the_oracle(stage: Rung) -> None:
    of_stages = {m for m in imported_by(STAGES / f"{stage.name}.py") if "flashedu.stages" in m}
    allowed = NOT_RUNGS - {"reference"} | BUILT_ON.get(stage.name, set())
    assert {m.split(".")[2] for m in of_stages if m.count(".") > 1} <= allowed


def test_nothing_imports_the_oracle_but_tests_and_checkers() -> None:
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith(MAY_USE_THE_ORACLE):
            oracle = {m for m in imported_by(path) if m.startswith("flashedu.stages.reference")}
            assert not oracle, f"{where} imports the oracle"


def test_memory_and_stages_import_nothing_above_them() -> None:
    above = ("plots", "player", "exercises", "integrations", "bench", "cli", "testing", "doctor",
             "ladder")  # fmt: skip
    for path in [*(PACKAGE / "memory").glob("*.py"), *STAGES.glob("*.py")]:
        found = [
            m for m in imported_by(path) if m.startswith(tuple(f"flashedu.{a}" for a in above))
        ]
        assert not found, f"{path.name} imports {found}"
    for path in (PACKAGE / "memory").glob("*.py"):
        assert not any(m.startswith("flashedu.stages") for m in imported_by(path))


# the ladder


def test_every_stage_is_a_rung_once() -> None:
    names = [r.name for r in RUNGS]
    assert len(names) == len(set(names))
    assert set(names) == {path.stem for path in STAGES.glob("*.py")} - NOT_RUNGS


@every_rung
def test_a_rung_is_what_its_module_is(stage: Rung) -> None:
    if stage.missing():
        pytest.skip(stage.missing())
    module = stage.load()
    signature = inspect.signature(module.attention)
    parameters = list(signature.parameters)
    assert parameters[:5] == ["q", "k", "v", "causal", "scale"]
    assert signature.parameters["causal"].default is False
    assert signature.parameters["scale"].default is None
    assert all(
        signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in parameters[3:]
    )
    assert ({"block_q", "block_k"} <= set(parameters)) == bool(stage.tile_sizes)
    assert ("splits" in parameters) == stage.splits
    assert (stage.is_triton and not stage.hopper_only) == (stage.tile_sizes == GPU_TILES)
    assert hasattr(module, "attention_with_lse") == stage.lse
    if stage.lse:
        assert inspect.signature(module.attention_with_lse).parameters == signature.parameters
    assert stage.framework in ("numpy", "torch")
    assert set(stage.dtypes) <= {"float16", "bfloat16", "float32", "float64"}
    assert stage.idea
    assert "\n" not in stage.idea
    assert len(stage.idea) <= 80
    assert "Source: " in module.__doc__


@pytest.mark.parametrize(
    "stage", [r for r in RUNGS if r.framework == "torch"], ids=lambda stage: stage.name
)
def test_a_rung_that_says_it_has_gradients_has_them(stage: Rung) -> None:
    if stage.missing():
        pytest.skip(stage.missing())
    q = torch.ones(1, 1, 3, 2, dtype=getattr(torch, stage.dtypes[0]), requires_grad=True)
    if stage.backward:
        assert stage.load().attention(q, q, q).requires_grad
        return
    with pytest.raises(ValueError, match=f"must not require gradients for stage '{stage.name}'"):
        stage.load().attention(q, q, q)


@every_rung
def test_a_stage_can_be_imported_first(stage: Rung) -> None:
    """In a fresh Python: a stage of kernels chooses Triton's mode before Triton is imported."""
    if stage.missing():
        pytest.skip(stage.missing())
    code = f"from flashedu.stages import {stage.name} as stage; print(stage.attention.__name__)"
    assert in_a_fresh_python(code) == "attention"


def test_triton_before_flashedu_gets_a_sentence() -> None:
    if rung("flash2").missing() or torch.cuda.is_available():
        pytest.skip("needs Triton, and no GPU")
    code = (
        "import triton\ntry:\n    import flashedu.stages.flash2\n"
        "except ImportError as error:\n    print(error)"
    )
    assert in_a_fresh_python(code).startswith("Triton was imported before flashedu could choose")


def test_where_triton_does_not_exist_the_sentence_says_so(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name)
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    assert rung("flash2").missing() == "stage 'flash2' needs Triton, which exists for Linux only"
    monkeypatch.setattr(sys, "platform", "linux")
    assert rung("flash2").missing() == "stage 'flash2' needs triton: pip install triton"


def test_the_closed_forms_know_the_rungs() -> None:
    assert set(cost.FORWARD) <= {r.name for r in RUNGS} | {"paged"}
    assert set(cost.BACKWARD) <= set(cost.FORWARD)
    assert {name.split()[0] for name in cost.KERNELS} == set(cost.FORWARD)


# choosing a stage


@every_rung
def test_a_stage_is_run_by_its_name(stage: Rung) -> None:
    if stage.missing():
        pytest.skip(stage.missing())
    x = Q if stage.framework == "numpy" else torch.from_numpy(Q)
    want = stage.load().attention(x, x, x, causal=True, scale=0.3)
    got = flashedu.attention(x, x, x, causal=True, scale=0.3, stage=stage.name)
    assert type(got) is type(want)
    assert bits(got) == bits(want)


def test_the_default_is_the_highest_rung_of_the_framework() -> None:
    machine = Machine()
    flashedu.attention(Q, Q, Q, machine=machine)
    assert machine.launches == ["tiled"]
    x = torch.from_numpy(Q)
    machine = Machine()
    flashedu.attention(x, x, x, machine=machine, block_q=2)
    assert machine.launches == ["online"]


@pytest.mark.parametrize("x", [None, [1.0], "q"])
def test_inputs_of_no_framework_get_a_sentence(x: object) -> None:
    kind = type(x).__name__
    with pytest.raises(TypeError, match=f"q must be a NumPy array or a torch tensor, got {kind}"):
        flashedu.attention(x, x, x)


def test_an_unknown_stage_gets_a_list_of_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"stage must be one of naive, tiled, .*, got 'flash9'"):
        flashedu.attention(Q, Q, Q, stage="flash9")
    with pytest.raises(ValueError, match="stage must be one of"):
        rung("reference")


def test_a_stage_that_cannot_run_here_says_why_and_what_can(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name)
    )
    assert rung("online").missing() == "stage 'online' needs torch: pip install torch"
    assert rung("tiled").missing() is None
    with pytest.raises(
        RuntimeError,
        match=r"stage 'online' needs torch: pip install torch\. Stages that run here: naive, tiled",
    ):
        flashedu.attention(Q, Q, Q, stage="online")


def test_an_option_that_a_stage_does_not_take_gets_a_sentence() -> None:
    with pytest.raises(TypeError, match="stage 'naive' takes no block_q; it takes causal, scale"):
        flashedu.attention(Q, Q, Q, stage="naive", block_q=64)
    with pytest.raises(TypeError, match=r"stage 'tiled' takes no dropout; it takes .*block_q"):
        flashedu.attention(Q, Q, Q, dropout=0.1)


def test_options_reach_the_stage() -> None:
    machine = Machine()
    flashedu.attention(Q, Q, Q, stage="tiled", block_q=1, block_k=1, machine=machine)
    assert machine.counted == cost.tiled(
        cost.Problem(Nq=3, D=2, dtype="float32", block_q=1, block_k=1)
    )


def test_a_lecturer_finds_the_stages_where_the_slide_says() -> None:
    assert [m.__name__.rpartition(".")[2] for m in (naive, tiled, online)] == [
        r.name for r in LADDER[:3]
    ]
