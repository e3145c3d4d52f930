"""Which attention backend does vLLM pick here, and can it take FlashEdu's?

As in `doctor`: `look` gathers facts, and `diagnose` turns facts into findings and looks at nothing
else. A finding that blocks is in the way of FlashEdu as vLLM's CUSTOM backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashedu import doctor
from flashedu.doctor import Facts, Finding
from flashedu.integrations import vllm as adapter
from flashedu.integrations.vllm import BACKEND, DTYPE, HEAD_SIZE, HEADS, INSTALL, TRIED, Choice

ASKED = f"attention as in Llama-2-7B: {HEADS} heads of size {HEAD_SIZE}, {DTYPE}"


class NotHere(RuntimeError):
    """vLLM is not installed. The message says how to get it."""


@dataclass(frozen=True)
class VllmFacts:
    """A vLLM. choice: None if it could not be asked, and `broken` says why."""

    version: str
    entry_point: bool  # whether it finds FlashEdu's by itself
    choice: Choice | None
    broken: str = ""


def diagnose(machine: Facts, vllm: VllmFacts) -> list[Finding]:
    """All findings, in the order in which to read them."""
    findings = [_version(vllm), _entry_point(vllm)]
    if vllm.choice is not None:
        findings += [_gpu(machine, vllm.choice), *_refused(vllm.choice), _picked(vllm.choice)]
        findings.append(_custom(vllm.choice))
    return findings


def summary(findings: Sequence[Finding], vllm: VllmFacts) -> str:
    """What it comes to, in two sentences at most."""
    blocking = ", ".join(finding.name for finding in findings if finding.blocks)
    picked = vllm.choice.picked if vllm.choice else None
    first = f"By itself, vLLM picks {picked or 'no backend'} here."
    if blocking:
        return f"{first} It cannot take FlashEdu; put right: {blocking}."
    return f"{first} --attention-backend CUSTOM makes it take FlashEdu."


def as_dict(machine: Facts, vllm: VllmFacts, findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON."""
    return {
        "picked": vllm.choice.picked if vllm.choice else None,
        "takes_flashedu": not any(finding.blocks for finding in findings),
        "vllm": asdict(vllm),
        "machine": doctor.as_dict(machine, ())["facts"],
        "findings": [asdict(finding) for finding in findings],
    }


def _version(vllm: VllmFacts) -> Finding:
    if vllm.broken:
        found = f"{vllm.version}, which cannot be asked: {vllm.broken}"
        return Finding("vLLM", found, "problem", f"reinstall it: {INSTALL}", blocks=True)
    if vllm.version in TRIED:
        return Finding("vLLM", vllm.version)
    return Finding("vLLM", vllm.version, "note", f"FlashEdu was tried with {' and '.join(TRIED)}")


def _entry_point(vllm: VllmFacts) -> Finding:
    if vllm.entry_point:
        return Finding("entry point", "vLLM finds FlashEdu by vllm.general_plugins")
    return Finding(
        "entry point",
        "vLLM does not find FlashEdu: it is on the path, but not installed",
        "problem",
        "pip install it in this environment, or call flashedu.integrations.vllm.register() before "
        "the engine starts",
        blocks=True,
    )


def _gpu(machine: Facts, choice: Choice) -> Finding:
    if choice.sees_gpu:
        names = ", ".join(card.name for card in machine.cards) or "vLLM sees one"
        return Finding("GPU", names)
    advice = "vLLM chooses for NVIDIA GPUs where it sees one: is there a driver, and is "
    return Finding(
        "GPU", "vLLM sees no NVIDIA GPU here, and has no attention backend to pick", "problem",
        f"{advice}CUDA_VISIBLE_DEVICES set?", blocks=True,
    )  # fmt: skip


def _refused(choice: Choice) -> list[Finding]:
    """What comes before the choice in vLLM's own order, and why it was passed over."""
    return [Finding(name, "; ".join(reasons), "note") for name, reasons in choice.refused.items()]


def _picked(choice: Choice) -> Finding:
    if choice.picked is None:
        return Finding("vLLM picks", "none of its backends", "note", f"asked for {ASKED}")
    why = "the first in its order that it can take" if choice.refused else "the first in its order"
    return Finding("vLLM picks", f"{choice.picked}: {why}, for {ASKED}")


def _custom(choice: Choice) -> Finding:
    if choice.custom_path is None:
        advice = "flashedu.integrations.vllm.register() puts FlashEdu there"
        return Finding("CUSTOM", "nobody's", "problem", advice, blocks=True)
    if choice.custom_path != BACKEND:
        return Finding(
            "CUSTOM", f"{choice.custom_path}, of another plugin", "problem",
            "VLLM_PLUGINS=flashedu loads FlashEdu's alone", blocks=True,
        )  # fmt: skip
    if choice.custom_reasons:
        reasons = "; ".join(choice.custom_reasons)
        return Finding("CUSTOM", f"FlashEdu's, which cannot be taken: {reasons}", "problem",
                       "take another card, or one of vLLM's own backends", blocks=True)  # fmt: skip
    return Finding("CUSTOM", "FlashEdu's")


def look() -> tuple[Facts, VllmFacts]:
    """This machine, and the vLLM on it. Raises NotHere if there is none."""
    if doctor._installed("vllm") is None:
        raise NotHere(f"--vllm: vLLM is not installed: {INSTALL}")
    machine = doctor.look()
    version, seen = doctor._installed("vllm") or "unknown", adapter.entry_point_seen()
    try:
        return machine, VllmFacts(version, seen, adapter.ask())
    except Exception as error:  # whatever a broken install raises
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return machine, VllmFacts(version, seen, None, why)
