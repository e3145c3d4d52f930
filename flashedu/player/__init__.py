"""The tile player: a stage's run in a notebook, step by step, as its trace recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from flashedu.memory import Problem
from flashedu.player import page
from flashedu.player.film import Film, Pack, pack, record
from flashedu.stages import LADDER, rung

__all__ = ["Film", "Player", "play"]

MAX_BYTES = 150_000  # of HTML: a notebook holds several players
MAX_TILES = 1000  # of S, in steps: more are refused before they are run,
MAX_SCORES = 2**24  # and so are more elements of S, of all heads: a run takes a moment


class Player:
    """One or two recorded runs. The last line of a cell shows it; `save` makes a page of it."""

    def __init__(self, films: Sequence[Film]) -> None:
        self.films = tuple(films)

    @cached_property
    def packs(self) -> list[Pack]:
        """What the page gets, a film each."""
        return [pack(film) for film in self.films]

    @cached_property
    def html(self) -> str:
        """An element and the script that builds the player in it."""
        return page.fragment(self.packs)

    @cached_property
    def still(self) -> bytes:
        """The run in one picture, as PNG: what is seen where scripts are off."""
        from flashedu.player.still import png

        return png(self.films)

    def save(self, path: str | Path) -> None:
        """Write the player as a page that needs no network and no other file."""
        text = page.page(self.packs, self.still, repr(self))
        Path(path).write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        return "Tile player: " + "; ".join(
            f"{film.stage}, {len(film.trace):,} steps, {film.machine.counted.hbm_bytes:,} bytes"
            for film in self.films
        )

    def _ipython_display_(self) -> None:
        """First the still, then the player, which hides it when its script runs."""
        from IPython.display import display

        for kind, data in (("image/png", self.still), ("text/html", self.html)):
            display({kind: data, "text/plain": repr(self)}, raw=True)


def play(*stages_and_problem: Any, seed: int = 0) -> Player:
    """Record a stage, or two to step side by side, and return the player.

    `play("tiled", problem)`, `play("tiled", "online", problem)` or `play(["tiled", "online"],
    problem)`. `seed` draws the inputs. Raises ValueError for an unknown stage, for a problem that a
    stage does not take, and for one whose player would take more than 150,000 bytes or whose run
    more than a moment.
    """
    *names, problem = stages_and_problem or (None,)
    if len(names) == 1 and isinstance(names[0], list | tuple):
        names = list(names[0])
    if not isinstance(problem, Problem):
        raise TypeError(
            "problem must be a flashedu.memory.Problem and come last, as in "
            f'play("tiled", Problem(Nq=64, D=16, block_q=8, block_k=8)), got {problem!r}'
        )
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer of 0 or more, got {seed!r}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"stages must be names, as 'tiled', got {name!r}")
        if rung(name) not in LADDER:  # its rows are those of several heads
            known = ", ".join(found.name for found in LADDER)
            raise ValueError(f"stages must be of the ladder ({known}), got {name!r}")
        reason = rung(name).refuses(problem)
        if reason is not None:
            raise ValueError(reason)
    if len(names) not in (1, 2):
        raise ValueError(f"stages must be one or two, got {len(names)}")

    player = _fitting(names, problem, seed)
    if player is None:
        smaller = problem
        while player is None:
            if smaller.Nq == smaller.Nk == 1:
                raise ValueError(
                    f"problem must be small enough for {MAX_BYTES:,} bytes of HTML, got "
                    f"B={problem.B}, H={problem.H}: with one query and key, too; fewer heads would "
                    "do"
                )
            smaller = smaller.replace(Nq=-(-smaller.Nq // 2), Nk=-(-smaller.Nk // 2))
            player = _fitting(names, smaller, seed)
        raise ValueError(
            f"problem must be small enough for {MAX_BYTES:,} bytes of HTML and {MAX_SCORES:,} "
            f"scores, got Nq={problem.Nq}, Nk={problem.Nk}; Nq={smaller.Nq}, Nk={smaller.Nk} "
            "would do with these tiles"
        )
    return player


def _fitting(names: Sequence[str], p: Problem, seed: int) -> Player | None:
    """The player; None if it would be too large."""
    if p.B * p.H * p.Nq * p.Nk > MAX_SCORES:
        return None
    tiles = -(-p.Nq // p.block_q) * -(-p.Nk // p.block_k)
    for found in map(rung, names):
        heads = p.B * p.H if found.is_triton else 1  # others step through all heads at once
        if found.tile_sizes and heads * tiles > MAX_TILES:
            return None
    player = Player([record(name, p, seed=seed) for name in names])
    return player if len(player.html.encode()) <= MAX_BYTES else None
