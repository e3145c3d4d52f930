"""`flashedu doctor`: what this machine has, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from flashedu.cli.output import print_parts, rule, with_status, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flashedu.doctor import Finding


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine has, what is wrong with it, and what to do.

    Exit code 1 if the course cannot run here.
    """
    from flashedu import doctor as checks

    (facts,) = with_status((checks.look() for _ in range(1)), "looking around")
    findings = checks.diagnose(facts)
    if as_json:
        write_json(checks.as_dict(facts, findings))
    else:
        print_parts(_doctor_report(findings))
    if not checks.course_runs(findings):
        raise typer.Exit(1)


def _doctor_report(findings: list[Finding]) -> Iterable[RenderableType]:
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
    yield table
    blocking = [finding.name for finding in findings if finding.blocks]
    if blocking:
        yield Text(f"The course cannot run here. Put right: {', '.join(blocking)}.", "bold red")
        return
    runs = [f.name.removeprefix("stage ") for f in findings if f.found == "runs here"]
    yield Text(f"The course runs here. Stages that run: {', '.join(runs) or 'none'}.", "bold")
