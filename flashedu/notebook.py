"""What the chapters show beside figures: a stage's source, and tables."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from IPython.display import Markdown


def source(function: Callable[..., Any]) -> Markdown:
    """The function's source, from the package, highlighted."""
    text = textwrap.dedent(inspect.getsource(function)).rstrip()
    return Markdown(f"```python\n{text}\n```")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A table; numbers of thousands get separators, and all but the first column stand right."""

    def cell(value: Any) -> str:
        return (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )

    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines))
