"""What the commands share: how an option is read, and how a wrong one is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperGroup

LARGEST = 10**9
given: list[str] = []  # the arguments of this call, as typed


class Refused(Exception):
    """One line for stderr, and exit code 2."""


class Stopped(Exception):
    """One line for stderr, and exit code 1: asked rightly, but not possible here."""


class Group(TyperGroup):
    """Commands, and the close one for a name that is none."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            commands = ", ".join(self.commands)
            nearest = close(args[0], self.commands) or f"the commands are {commands}"
            raise Refused(f"{ctx.command_path}: no command {shown(args[0])}; {nearest}")
        return super().resolve_command(ctx, args)


def integer(value: str, least: int, most: int = LARGEST) -> int:
    """Parses an integer within bounds."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise typer.BadParameter(f"must be an integer from {least} to {most}, got {shown(value)}")
    return number


def whole(value: str) -> int:
    """Parses 1, 2, 3 …"""
    return integer(value, 1)


def natural(value: str) -> int:
    """Parses 0, 1, 2 …"""
    return integer(value, 0)


def rate(value: str) -> float:
    """Parses a number above 0, or inf."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise typer.BadParameter(f"must be a number above 0, or inf, got {shown(value)}")
    return number


def head_size(value: str) -> int:
    """Parses a D that the stages take."""
    from flashedu.stages.contract import MAX_D

    return integer(value, 1, MAX_D)


def one_of(known: str) -> Callable[[str], str]:
    """Parses one of these names, in any case."""

    def parse(value: str) -> str:
        if value.lower() not in known.split(", "):
            raise typer.BadParameter(f"must be one of {known}, got {shown(value)}")
        return value.lower()

    return parse


def number(name: str, what: str, parser: Callable[[str], Any] = whole) -> Any:
    """An option that takes a number."""
    return typer.Option(name, help=what, parser=parser, metavar="INTEGER")


def each(one: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Parses a list whose parts `one` parses."""
    return lambda value: tuple(one(part.strip()) for part in value.split(","))


def list_of(name: str, what: str, one: Callable[[str], Any] = whole) -> Any:
    """An option that takes a list."""
    return typer.Option(name, help=what, parser=each(one), metavar="LIST")


def close(name: str, known: Iterable[str]) -> str:
    """Asks for the name that may be meant; "" if none is near."""
    bare = {candidate.lstrip("-"): candidate for candidate in known}
    found = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1, cutoff=0.6)
    return f"did you mean {bare[found[0]]}?" if found else ""


def shown(value: str) -> str:
    """In quotes, cut if long."""
    return repr(value if len(value) <= 40 else value[:37] + "...")
