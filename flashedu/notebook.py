"""What the chapters show beside figures: a stage's source, and tables."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from IPython.display import Markdown


def source(function: Callable[..., Any]) -> Markdown:
    """The function's source, from the package, highlighted."""
    text = textwrap.dedent(inspect.getsource(function)).rstrip()
    return Markdown(f"```python\n{text}\n```")


def table(rows: Iterable[Mapping[str, Any]]) -> Markdown:
    """A table of rows, each column → cell. All but the first column stand right."""
    rows = list(rows)
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)]]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
