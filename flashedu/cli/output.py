"""Writing to a terminal, a pipe or a file, whatever its encoding."""

from __future__ import annotations

import codecs
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


class ClosedPipe(Exception):
    """Nobody reads stdout any more."""


def rule() -> Any:
    """The lines of a table."""
    from rich import box

    return box.SIMPLE_HEAD


def console(stderr: bool = False) -> Any:
    """Plain text: what looks like markup is none."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def print_parts(parts: Iterable[RenderableType]) -> None:
    """Texts and tables, with no blanks at the ends of lines."""
    terminal = console()
    with terminal.capture() as captured:
        for part in parts:
            terminal.print(part)
    write("\n".join(line.rstrip() for line in captured.get().split("\n")))


def write_json(value: Any) -> None:
    """As strict JSON."""
    write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same, with None where a float is NaN or infinite, as JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(text: str) -> None:
    """To stdout. Raises ClosedPipe if nobody reads it."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ClosedPipe from None


def with_status(steps: Iterable[Any], doing: str) -> list[Any]:
    """All of `steps`; a person who waits at a terminal sees that something runs."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    with console(stderr=True).status(doing) if terminal else nullcontext():
        return list(steps)


_ASCII = str.maketrans(
    {"×": "x", "→": "->", "·": "*", "µ": "u", "…": ".", "−": "-", "–": "-", "—": "-", "√": "v"}
    | dict.fromkeys("─━═╌┄╶╴╺╸", "-")
    | dict.fromkeys("│┃║", "|")
    | dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰", "+")
)


def print_what_the_encoding_lacks_as_ascii() -> None:
    """→ as ->, and so on, where stdout or stderr is not UTF-8."""

    def replace(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end].translate(_ASCII)
        return "".join(c if c.isascii() else "?" for c in text), error.end

    codecs.register_error("flashedu-ascii", replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="flashedu-ascii")


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr; a line for each case where nobody watches."""
    if not (sys.stderr is not None and sys.stderr.isatty()):
        yield lambda number, total, what: print(
            f"[{number + 1}/{total}] {what}", file=sys.stderr, flush=True
        )
        return
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda number, total, what: bar.update(
            task, completed=number, total=total, description=what
        )
