"""Players, for a notebook or a page of their own: what was recorded, step by step.

`play` shows a stage's run, as its trace has it; `play_pages` the pages of a cache, as its allocator
handed them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flashedu.memory import Problem
from flashedu.player.film import Film, pack, record
from flashedu.player.page import MAX_BYTES, Pack, Player
from flashedu.player.pages import PagePlayer, RecordedAllocator, play_pages
from flashedu.stages import LADDER, rung

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Film", "PagePlayer", "Player", "RecordedAllocator", "TilePlayer", "play", "play_pages"]

MAX_TILES = 1000  # of S, in steps: more are refused before they are run,
MAX_SCORES = 2**24  # and so are more elements of S, of all heads: a run takes a moment


class TilePlayer(Player):
    """One or two recorded runs."""

    kind = "tiles"

    def __init__(self, films: Sequence[Film]) -> None:
        self.films = tuple(films)

    @cached_property
    def packs(self) -> list[Pack]:
        """What the page gets, a film each."""
        return [pack(film) for film in self.films]

    def storyboard(self) -> Figure:
        """Three moments of each run, its tiles of S, and its bytes."""
        from flashedu.player.still import storyboard

        return storyboard(self.films)

    def __repr__(self) -> str:
        return "Tile player: " + "; ".join(
            f"{film.stage}, {len(film.trace):,} steps, {film.machine.counted.hbm_bytes:,} bytes"
            for film in self.films
        )


def play(*stages_and_problem: Any, seed: int = 0) -> TilePlayer:
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


def _fitting(names: Sequence[str], p: Problem, seed: int) -> TilePlayer | None:
    """The player; None if it would be too large."""
    if p.B * p.H * p.Nq * p.Nk > MAX_SCORES:
        return None
    tiles = -(-p.Nq // p.block_q) * -(-p.Nk // p.block_k)
    for found in map(rung, names):
        heads = p.B * p.H if found.is_triton else 1  # others step through all heads at once
        if found.tile_sizes and heads * tiles > MAX_TILES:
            return None
    player = TilePlayer([record(name, p, seed=seed) for name in names])
    return player if len(player.html.encode()) <= MAX_BYTES else None
