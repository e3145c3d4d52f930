"""What the chapters show beside figures: a stage's source, tables, and recorded runs."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from IPython.display import Markdown

from flashedu.bench.record import RESULTS, label

__all__ = ["label", "record", "source", "table"]


def source(function: Callable[..., Any]) -> Markdown:
    """The function's source, from the package, highlighted."""
    text = textwrap.dedent(inspect.getsource(function)).rstrip()
    return Markdown(f"```python\n{text}\n```")


def table(rows: Iterable[Mapping[str, Any]]) -> Markdown:
    """A table of rows, each column → cell. Numbers stand right, but in the first column."""
    rows = list(rows)
    cells = [[_cell(value) for value in row.values()] for row in rows]
    _, *rest = zip(*cells, strict=True)
    marks = ["---", *("---:" if all(map(_is_number, column)) else "---" for column in rest)]
    lines = [list(rows[0]), marks, *cells]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def record(name: str) -> dict[str, Any]:
    """What was measured once, as recorded in benchmarks/results/ of the checkout.

    Raises FileNotFoundError, listing the records, if there is none of that name.
    For the records of `flashedu bench` see `flashedu.bench.record`.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in RESULTS.glob("*.json"))) or "none"
        raise FileNotFoundError(f"name must be one of the records ({known}), got {name!r}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _is_number(cell: str) -> bool:
    """Whether it begins as one does: 12, −0.5, 3.1 ms; or stands for none."""
    return cell[:1] in "0123456789+-−" or not cell


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
