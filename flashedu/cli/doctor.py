"""`flashedu doctor`: what is wrong with this machine, or with the attention of a model on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from flashedu.cli.options import Refused, Stopped
from flashedu.cli.output import print_parts, rule, with_status, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flashedu.doctor import Finding
    from flashedu.doctor_model import ModelFacts

MODEL = "A folder with a config.json, a name in the Hub cache, or a type or class of Transformers."


def doctor(
    model: Annotated[str | None, typer.Option(help=MODEL, metavar="NAME_OR_PATH")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Which backend vLLM picks here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine has, what is wrong with it, and what to do.

    Exit code 1 if the course cannot run here. With --model: whether attn_implementation takes
    effect in it, and what is in the way of flash_attention_2 here. Exit code 1 if it takes none.
    With --vllm: which attention backend the installed vLLM picks here, and why, and whether it can
    take FlashEdu's. Exit code 1 if it cannot.
    """
    if vllm and model is not None:
        raise Refused("flashedu doctor: --model and --vllm are two questions: ask one at a time")
    if vllm:
        _doctor_of_vllm(as_json)
        return
    if model is not None:
        _doctor_of_a_model(model, as_json)
        return
    from flashedu import doctor as checks

    (facts,) = with_status((checks.look() for _ in range(1)), "looking around")
    findings = checks.diagnose(facts)
    if as_json:
        write_json(checks.as_dict(facts, findings))
    else:
        print_parts(_doctor_report(findings))
    if not checks.course_runs(findings):
        raise typer.Exit(1)


def _doctor_of_a_model(name: str, as_json: bool) -> None:
    from flashedu import doctor_model as checks

    try:
        ((machine, model),) = with_status((checks.look(name) for _ in range(1)), "looking around")
    except checks.NotHere as error:
        raise Stopped(f"flashedu doctor: {error}") from None
    except checks.NoSuchModel as error:
        raise Refused(f"flashedu doctor: --model: {error}") from None
    findings = checks.diagnose(machine, model)
    if as_json:
        write_json(checks.as_dict(machine, model, findings))
    else:
        print_parts(_model_report(model, findings))
    if not checks.takes_effect(model):
        raise typer.Exit(1)


def _doctor_of_vllm(as_json: bool) -> None:
    from rich.text import Text

    from flashedu import doctor_vllm as checks

    try:
        ((machine, vllm),) = with_status((checks.look() for _ in range(1)), "asking vLLM")
    except checks.NotHere as error:
        raise Stopped(f"flashedu doctor: {error}") from None
    findings = checks.diagnose(machine, vllm)
    if as_json:
        write_json(checks.as_dict(machine, vllm, findings))
    else:
        print_parts((_table(findings), Text(checks.summary(findings, vllm), "bold")))
    if any(finding.blocks for finding in findings):
        raise typer.Exit(1)


def _model_report(model: ModelFacts, findings: list[Finding]) -> Iterable[RenderableType]:
    from rich.text import Text

    from flashedu.doctor_model import SUMMARY, effect

    yield _table(findings)
    yield Text(f"attn_implementation {SUMMARY[effect(model)]} in {model.class_name}.", "bold")
    blocking = ", ".join(finding.name for finding in findings if finding.blocks)
    if blocking:
        yield Text(f"In the way of flash_attention_2 here: {blocking}.", "bold")
    else:
        yield Text("Nothing seen is in the way of flash_attention_2 here.", "bold")


def _doctor_report(findings: list[Finding]) -> Iterable[RenderableType]:
    from rich.text import Text

    yield _table(findings)
    blocking = [finding.name for finding in findings if finding.blocks]
    if blocking:
        yield Text(f"The course cannot run here. Put right: {', '.join(blocking)}.", "bold red")
        return
    runs = [f.name.removeprefix("stage ") for f in findings if f.found == "runs here"]
    yield Text(f"The course runs here. Stages that run: {', '.join(runs) or 'none'}.", "bold")


def _table(findings: list[Finding]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=rule(), pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for head in ("", "what", "found"):
        table.add_column(head)
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n{finding.advice}", "dim" if finding.status == "ok" else "bold")
        table.add_row(Text(finding.status, colours[finding.status]), finding.name, found)
    return table
