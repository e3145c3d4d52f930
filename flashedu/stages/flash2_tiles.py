"""Tile sizes for flash2's kernels, by card and head size. `Tile` is all there is to tune."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.descriptors import columns


class Tile(NamedTuple):
    """How one kernel is cut: rows of q, rows of k, warps of a program, copies in flight."""

    block_q: int
    block_k: int
    warps: int = 4
    stages: int = 2

    def sized(self, block_q: int | None, block_k: int | None) -> Tile:
        """With the caller's sizes, where there are any."""
        return self._replace(block_q=block_q or self.block_q, block_k=block_k or self.block_k)


class Tiles(NamedTuple):
    """One tile for each of flash2's kernels."""

    forward: Tile
    dkdv: Tile
    dq: Tile


# (compute capability, columns of a tile, bytes of a value) → tiles: the fastest of some ten, tried
# on an H200 at N = 16384 (torch 2.11, triton 3.6, 2026-11-23).
TUNED = {
    ((9, 0), 64, 2): Tiles(Tile(128, 128, 4, 3), Tile(128, 64, 4, 2), Tile(128, 64, 8, 3)),
    ((9, 0), 128, 2): Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
}

INTERPRETED = Tiles(Tile(64, 64), Tile(64, 64), Tile(64, 64))  # few tiles: each pass costs a ms


def tiles_for(capability: tuple[int, int] | None, columns: int, item_bytes: int) -> Tiles:
    """The tuned tiles, or small ones.

    `capability` is None where kernels are interpreted. `columns`: D, rounded up as in kernels.
    """
    if capability is None:
        return INTERPRETED
    tuned = TUNED.get((capability, columns, item_bytes))
    if tuned is not None:
        return tuned
    rows = 64 if columns * item_bytes <= 128 else 32 if columns * item_bytes <= 512 else 16
    tile = Tile(rows, rows, 4, 1 if capability < (8, 0) else 2)
    return Tiles(tile, tile, tile)


def tiles_for_call(q: Any, problem: Problem, block_q: int | None, block_k: int | None) -> Tiles:
    """The tiles for q's card and this problem, with the caller's sizes, where there are any."""
    tuned = tiles_for(triton_mode.capability(q), columns(problem.D), q.itemsize)
    return Tiles(*(tile.sized(block_q, block_k) for tile in tuned))
