"""`flashedu doctor --vllm`: machines that are imagined, and the vLLM here, if there is one."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flashedu import cli, doctor
from flashedu.doctor import Card, Facts, Finding
from flashedu.doctor_vllm import VllmFacts, diagnose, summary
from flashedu.integrations import vllm as adapter
from flashedu.integrations.vllm import BACKEND, Choice

H200 = Facts("3.12.1", cards=(Card("NVIDIA H200", "580.1", (9, 0), 141 * 2**30),))
ON_A_CARD = Choice(sees_gpu=True, picked="FLASH_ATTN", custom_path=BACKEND)


def vllm(choice: Choice | None = ON_A_CARD, **facts: Any) -> VllmFacts:
    return VllmFacts(**{"version": "0.24.0", "entry_point": True, "choice": choice, **facts})


def found(facts: VllmFacts, name: str, machine: Facts = H200) -> Finding:
    (finding,) = (f for f in diagnose(machine, facts) if f.name == name)
    return finding


def test_on_a_card_it_says_what_is_picked_and_how_to_take_flashedu() -> None:
    findings = diagnose(H200, vllm())
    assert [f.status for f in findings] == ["ok"] * 5
    assert found(vllm(), "vLLM picks").found.startswith("FLASH_ATTN: the first in its order, for")
    assert summary(findings, vllm()) == (
        "By itself, vLLM picks FLASH_ATTN here. --attention-backend CUSTOM makes it take FlashEdu."
    )


def test_what_vllm_passed_over_is_named_with_its_reasons() -> None:
    refused = {"FLASH_ATTN": ("ImportError",), "FLASHINFER": ("no head", "no dtype")}
    facts = vllm(Choice(True, "TRITON_ATTN", refused, BACKEND))
    assert found(facts, "FLASHINFER").found == "no head; no dtype"
    assert "the first in its order that it can take" in found(facts, "vLLM picks").found


IN_THE_WAY = {
    "no GPU": (vllm(Choice(False, custom_path=BACKEND)), "GPU", "sees no NVIDIA GPU"),
    "no entry point": (vllm(entry_point=False), "entry point", "not installed"),
    "nobody's": (vllm(Choice(True, "FLASH_ATTN")), "CUSTOM", "nobody's"),
    "another's": (vllm(Choice(True, "FLASH_ATTN", {}, "its.Backend")), "CUSTOM", r"its.Backend"),
    "a card too old": (vllm(Choice(True, "FLEX_ATTENTION", {}, BACKEND, ("compute capability",))),
                       "CUSTOM", "cannot be taken: compute capability"),
    "a broken vLLM": (vllm(None, broken="ImportError: no"), "vLLM", "cannot be asked: ImportError"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "name", "words"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_in_the_way_is_named_with_what_would_do(
    facts: VllmFacts, name: str, words: str
) -> None:
    finding = found(facts, name)
    assert (finding.blocks, finding.status) == (True, "problem")
    assert words in finding.found
    assert finding.advice
    assert f"put right: {name}" in summary(diagnose(H200, facts), facts)


def test_a_version_that_was_not_tried_is_a_note() -> None:
    finding = found(vllm(version="0.30.0"), "vLLM")
    assert (finding.status, finding.blocks) == ("note", False)
    assert finding.advice == "FlashEdu was tried with 0.24.0 and 0.33.0"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(["doctor", "--vllm", *args])
    return code, *capsys.readouterr()


def test_without_vllm_it_is_one_line_with_the_command(capsys: Any, monkeypatch: Any) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: None if n == "vllm" else installed(n))
    code, out, err = run(capsys)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("flashedu doctor: --vllm: vLLM is not installed: pip install")


def test_a_vllm_that_fails_to_import_is_a_finding(capsys: Any, monkeypatch: Any) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: "0.24.0" if n == "vllm" else installed(n))
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.plugins", None)
    code, out, err = run(capsys, "--json")
    report = json.loads(out)
    assert (code, err, report["takes_flashedu"]) == (1, "", False)
    assert "ModuleNotFoundError" in report["vllm"]["broken"]


def test_a_model_and_vllm_are_two_questions(capsys: Any) -> None:
    code, _, err = run(capsys, "--model", "llama")
    assert (code, err.count("\n")) == (2, 1)
    assert "ask one at a time" in err


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: the extra [vllm] has it",
)


@needs_vllm
def test_vllm_is_asked_for_its_own_order_and_reasons(monkeypatch: Any) -> None:
    """As on two cards. What this machine cannot import is a reason of vLLM's, too."""
    for operators in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"):
        monkeypatch.setitem(sys.modules, operators, ModuleType(operators))  # need libcuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that vLLM imports
        adapter.register()
        from vllm.platforms.cuda import CudaPlatformBase
        from vllm.platforms.interface import DeviceCapability
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        for capability, reasons in ((9, 0), 0), ((7, 5), 2):
            platform = SimpleNamespace(
                get_device_capability=lambda c=capability: DeviceCapability(*c),
                get_valid_backends=CudaPlatformBase.get_valid_backends,
            )
            choice = adapter._ask(platform, AttentionBackendEnum.CUSTOM, BACKEND)
            assert choice.picked in AttentionBackendEnum.__members__
            assert "CUSTOM" not in choice.refused
            assert all(choice.refused.values())
            assert len(choice.custom_reasons) == bool(reasons)


@needs_vllm
def test_json_is_all_that_is_printed(capsys: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that vLLM imports
        code, out, _ = run(capsys, "--json")
    report = json.loads(out)
    assert report["takes_flashedu"] == (code == 0)
    assert report["vllm"]["version"] == doctor._installed("vllm")
