"""What this machine has, what is wrong with it, and what to do.

`look` gathers facts; `diagnose` turns facts into findings and looks at nothing else, so that any
machine can be imagined.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "note", "problem"]

PYTHON = ((3, 11), (3, 13))  # first and last that work
# As in pyproject.toml: lowest version that works, and the first that does not.
NEEDED: dict[str, tuple[str, str | None]] = {
    "numpy": ("1.26", "3"),
    "torch": ("2.11", None),
    "matplotlib": ("3.8", None),
    "pillow": ("10", None),
    "typer": ("0.12", None),
    "rich": ("13.7", None),
}
NOTEBOOKS = {
    "jupyterlab": ("4.2", "open the chapters"),
    "ipykernel": ("6.29", "run the chapters"),
    "nbval": ("0.11", "test the chapters"),
}
TRITON = "3.6"
# Each torch release is built for one Triton.
TRITON_OF_TORCH = {(2, 11): (3, 6), (2, 13): (3, 7), (2, 14): (3, 8), (2, 15): (3, 9)}


@dataclass(frozen=True)
class Card:
    """One NVIDIA GPU, as its driver reports it."""

    name: str
    driver: str | None
    compute_capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class Facts:
    """A machine. The defaults are a bare Linux."""

    python: str
    system: str = "Linux"  # or "Darwin", "Windows"
    platform: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # of what is installed
    broken: Mapping[str, str] = field(default_factory=dict)  # installed, but fails to import: why
    cards: Sequence[Card] = ()  # what the driver sees
    torch_cuda: str | None = None  # the CUDA that torch was built for
    torch_sees_gpu: bool = False
    torch_gpu_warning: str = ""  # what torch said when it looked for one
    triton_interpret: bool = False
    triton_compile_only: bool = False
    rungs: Sequence[tuple[str, str, str | None]] = ()  # name, framework, why it cannot run


@dataclass(frozen=True)
class Finding:
    """One line of the report. `blocks`: the course cannot run until this is put right."""

    name: str
    found: str
    status: Status = "ok"
    advice: str = ""
    blocks: bool = False


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, in the order in which to read them."""
    return [
        _python(facts),
        Finding("platform", facts.platform or facts.system),
        *(_needed(facts, name) for name in NEEDED),
        *(_for_notebooks(facts, name) for name in NOTEBOOKS),
        *_gpu(facts),
        *_triton(facts),
        *_rungs(facts),
    ]


def course_runs(findings: Sequence[Finding]) -> bool:
    """Whether nothing stands in the way of the chapters."""
    return not any(finding.blocks for finding in findings)


def as_dict(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON."""
    return {
        "course_runs": course_runs(findings),
        "facts": {**asdict(facts), "versions": dict(facts.versions), "broken": dict(facts.broken)},
        "findings": [asdict(finding) for finding in findings],
    }


# from facts to findings


def _python(facts: Facts) -> Finding:
    first, last = (".".join(map(str, v)) for v in PYTHON)
    if PYTHON[0] <= version(facts.python)[:2] <= PYTHON[1]:
        return Finding("Python", facts.python)
    return Finding(
        "Python",
        facts.python,
        "problem",
        f"the course runs on Python {first} to {last}: install one of them, "
        f"and make the environment again with it",
        blocks=True,
    )


def _needed(facts: Facts, name: str) -> Finding:
    (low, high), found = NEEDED[name], facts.versions.get(name)
    install = f'pip install "{name}>={low}{f",<{high}" if high else ""}"'
    if found is None:
        return Finding(name, "not installed", "problem", install, blocks=True)
    if name in facts.broken:
        return Finding(
            name,
            f"{found}, which fails to import: {facts.broken[name]}",
            "problem",
            f"pip install --force-reinstall {name}",
            blocks=True,
        )
    if not version(found):
        return Finding(name, "a version without a number", "note", f"{low} or newer is needed")
    if version(found) < version(low):
        return Finding(name, found, "problem", f"too old: {install}", blocks=True)
    if high and version(found) >= version(high):
        return Finding(name, found, "problem", f"too new: {install}", blocks=True)
    return Finding(name, found)


def _for_notebooks(facts: Facts, name: str) -> Finding:
    (low, use), found = NOTEBOOKS[name], facts.versions.get(name)
    advice = f'to {use}: pip install "{name}>={low}"'
    if found is None:
        return Finding(name, "not installed", "note", advice)
    if version(found) < version(low):
        return Finding(name, found, "note", f"too old {advice}")
    return Finding(name, found)


def _gpu(facts: Facts) -> list[Finding]:
    findings = []
    for card in facts.cards:
        major, minor = card.compute_capability
        found = (
            f"{card.name}, {card.memory_bytes / 2**30:.0f} GiB, "
            f"compute capability {major}.{minor}, driver {card.driver or 'unknown'}"
        )
        if card.compute_capability < (8, 0):
            advice = "no bfloat16 on this card: take float16 in the Triton chapters"
            findings.append(Finding("GPU", found, "note", advice))
        else:
            findings.append(Finding("GPU", found))
    if not facts.cards:
        advice = "none is needed: what takes a GPU is shown as it was recorded"
        findings.append(Finding("GPU", "no NVIDIA GPU", "ok", advice))
    elif not facts.torch_sees_gpu and _usable(facts, "torch"):
        if facts.torch_cuda is None:
            advice = "this torch is built for the CPU: install the CUDA build, see pytorch.org"
        else:
            advice = (
                f"torch is built for CUDA {facts.torch_cuda}: is the driver new enough, and is "
                "CUDA_VISIBLE_DEVICES set?"
            )
        said = f": {facts.torch_gpu_warning}" if facts.torch_gpu_warning else ""
        findings.append(Finding("GPU in torch", f"torch does not see it{said}", "note", advice))
    return findings


def _triton(facts: Facts) -> list[Finding]:
    found = facts.versions.get("triton")
    if found is None:
        if facts.system == "Linux":
            advice = f'for the chapters on Triton: pip install "triton>={TRITON}"'
            return [Finding("triton", "not installed", "note", advice)]
        advice = "Triton exists for Linux only; the chapters before it run here, the rest is shown"
        return [Finding("triton", f"not available on {facts.system}", "note", advice)]
    if "triton" in facts.broken:
        reason = f"{found}, which fails to import: {facts.broken['triton']}"
        return [Finding("triton", reason, "problem", "pip install --force-reinstall triton")]
    if version(found) < version(TRITON):
        return [Finding("triton", found, "problem", f'too old: pip install "triton>={TRITON}"')]
    return [_triton_with_torch(facts, found), _triton_mode(facts), *_triton_traps(facts, found)]


def _triton_with_torch(facts: Facts, found: str) -> Finding:
    torch = facts.versions.get("torch", "")
    major, minor = (*version(torch), 0, 0)[:2]
    wanted = TRITON_OF_TORCH.get((major, minor))
    if wanted is None or wanted == version(found)[:2]:
        return Finding("triton", found)
    pair = ".".join(map(str, wanted))
    return Finding(
        "triton",
        f"{found}, but torch {torch} is built for triton {pair}",
        "problem",
        f'pip install "triton=={pair}.*"',
    )


def _triton_mode(facts: Facts) -> Finding:
    name = "Triton kernels"
    if facts.triton_compile_only:
        found = "only compiled: TRITON_INTERPRET=0, and torch sees no GPU"
        return Finding(name, found, "note", "unset it to interpret them on the CPU")
    if facts.triton_interpret:
        found = "interpreted: TRITON_INTERPRET is set"
        if not facts.torch_sees_gpu:
            return Finding(name, found)
        advice = "kernels run on the CPU, slowly: unset TRITON_INTERPRET to compile for the GPU"
        return Finding(name, found, "note", advice)
    if facts.torch_sees_gpu:
        return Finding(name, "compiled for the GPU")
    return Finding(name, "interpreted on the CPU: torch sees no GPU to compile for")


def _triton_traps(facts: Facts, found: str) -> list[Finding]:
    findings = []
    interpreted = facts.triton_interpret or not facts.torch_sees_gpu
    numpy = facts.versions.get("numpy", "0")
    if version(found)[:2] == (3, 6) and version(numpy) >= (2, 4):  # a GPU machine counts so too
        findings.append(Finding(
            "Triton interpreter",
            f"triton {found} with NumPy {numpy}: masked loads and stores fail (triton #9171)",
            "problem",
            'pip install "numpy<2.4", or triton 3.7 with the torch that goes with it',
        ))  # fmt: skip
    if interpreted and not facts.triton_compile_only:
        findings.append(Finding(
            "bfloat16 in Triton",
            "float32 stands in for it in the stages: interpreted, it is wrong (triton #11584)",
            "ok",
            "in a kernel of your own, cast to float32 right after each load",
        ))  # fmt: skip
    elif facts.torch_sees_gpu and any(c.compute_capability >= (8, 0) for c in facts.cards):
        findings.append(Finding(
            "float32 in Triton",
            "tl.dot rounds float32 inputs to TF32 unless told otherwise",
            "note",
            'in a kernel of your own, pass input_precision="ieee" to tl.dot',
        ))  # fmt: skip
    return findings


def _rungs(facts: Facts) -> list[Finding]:
    findings = []
    for name, framework, reason in facts.rungs:
        if reason is None and not _usable(facts, "numpy"):
            reason = "needs numpy"
        if reason is None and not _usable(facts, framework):
            reason = f"needs {framework}"
        if reason is None:
            findings.append(Finding(f"stage {name}", "runs here"))
        else:
            findings.append(Finding(f"stage {name}", "does not run here", "note", reason))
    return findings


def _usable(facts: Facts, name: str) -> bool:
    return name in facts.versions and name not in facts.broken


def version(text: str) -> tuple[int, ...]:
    """(2, 13, 0) for 2.13.0+cpu; () for what is no version.

    A release candidate counts as the release.
    """
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


# from the machine to facts


def look(*more: str) -> Facts:
    """The facts of this machine. Imports torch, triton and `more`, if they are there."""
    names = [*NEEDED, *NOTEBOOKS, "triton", *more]
    versions = {name: v for name in names if (v := _installed(name)) is not None}
    broken: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("numpy", "torch", "triton", *more):
            # triton by way of triton_mode, which chooses its mode before it is imported
            by_mode = name == "triton" and "torch" in versions and "torch" not in broken
            module = "flashedu.stages.triton_mode" if by_mode else name.replace("-", "_")
            if name in versions and (reason := _import_error(module)):
                broken[name] = reason
        caught.clear()
        torch = None if "torch" in broken else sys.modules.get("torch")
        sees_gpu = bool(torch and torch.cuda.is_available())
        warning = " ".join(str(caught[0].message).split()) if caught else ""
    return Facts(
        python=platform.python_version(),
        system=platform.system(),
        platform=f"{platform.system()} {platform.machine()}",
        versions=versions,
        broken=broken,
        cards=_cards(torch if sees_gpu else None),
        torch_cuda=torch.version.cuda if torch else None,
        torch_sees_gpu=sees_gpu,
        torch_gpu_warning=warning,
        triton_interpret=_interpret(),
        triton_compile_only=_compile_only(),
        rungs=_this_ladder(),
    )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    if importlib.util.find_spec(name) is None:
        return None
    return str(getattr(sys.modules.get(name), "__version__", "unknown"))


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken install raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _interpret() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _compile_only() -> bool:
    mode = sys.modules.get("flashedu.stages.triton_mode")
    return bool(mode and mode.COMPILE_ONLY)


def _cards(torch: Any) -> tuple[Card, ...]:
    drivers = _nvidia_smi()
    if torch is None:
        return drivers
    driver = drivers[0].driver if drivers else None
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(Card(p.name, driver, (p.major, p.minor), p.total_memory) for p in found)


def _nvidia_smi() -> tuple[Card, ...]:
    query = "--query-gpu=name,driver_version,compute_cap,memory.total"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return read_nvidia_smi(ran.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


def read_nvidia_smi(text: str) -> tuple[Card, ...]:
    """The cards in the CSV that nvidia-smi prints, memory in MiB."""
    cards = []
    for line in text.strip().splitlines():
        name, driver, capability, memory = (part.strip() for part in line.rsplit(",", 3))
        major, minor = capability.split(".")
        cards.append(Card(name, driver, (int(major), int(minor)), int(memory) * 2**20))
    return tuple(cards)


def _this_ladder() -> tuple[tuple[str, str, str | None], ...]:
    from flashedu.stages import RUNGS

    only = "TRITON_INTERPRET=0 only compiles kernels where there is no GPU: unset it"
    return tuple(
        (rung.name, rung.framework, only if rung.is_triton and _compile_only() else rung.missing())
        for rung in RUNGS
    )
