"""Tile sizes for flash2's kernels: by card, head size, dtype, mask and N. All there is to tune."""

from __future__ import annotations

from typing import Any, NamedTuple

from flashedu.memory.problem import Problem


class Tile(NamedTuple):
    """How one kernel is cut: rows of q, rows of k, warps of a program, copies in flight."""

    block_q: int
    block_k: int
    warps: int = 4
    stages: int = 2

    def sized(self, block_q: int | None, block_k: int | None) -> Tile:
        """With the caller's sizes, where there are any."""
        return self._replace(
            block_q=int(block_q or self.block_q), block_k=int(block_k or self.block_k)
        )


class Tiles(NamedTuple):
    """One tile for each of flash2's kernels."""

    forward: Tile
    dkdv: Tile
    dq: Tile


class Row(NamedTuple):
    """Where its tiles apply."""

    capabilities: tuple[tuple[int, int], ...] | None  # None: any card
    columns: int  # of a tile, at most: D, rounded up to a power of two
    item_bytes: int
    causal: bool | None  # None: with and without a mask
    longest: int | None  # the most keys; None: any number
    forward: Tile
    dkdv: Tile
    dq: Tile


HOPPER = ((9, 0),)
LARGE = ((9, 0), (10, 0))  # 227 KiB of shared memory for a program
MIDDLE = ((8, 0), (8, 6), (8, 9), (12, 0))  # 99 KiB or more; T4, and cards yet to come: 64 KiB

# The first row that applies is taken.
TABLE = (
    # Fastest of some ten each at D 64 and 128, on an H200 (bfloat16, torch 2.11, triton 3.6,
    # 2026-11-23; `flashedu bench tune`), or within 4% of it; dkdv at D 64, causal, up to 1024 keys:
    # 5 to 10% from it.
    Row(HOPPER, 64,  2, True,  1024, Tile(64, 64, 4, 2),  Tile(128, 64, 4, 2), Tile(64, 64, 4, 3)),
    Row(HOPPER, 64,  2, None,  None, Tile(64, 128, 4, 2), Tile(128, 64, 4, 2), Tile(64, 64, 4, 3)),
    Row(HOPPER, 128, 2, True,  None, Tile(64, 64, 4, 3),  Tile(64, 64, 4, 2),  Tile(128, 64, 8, 3)),
    Row(HOPPER, 128, 2, False, None, Tile(128, 64, 4, 2), Tile(64, 64, 4, 2),  Tile(128, 64, 8, 3)),
    # Never timed: of the shapes tried, those that fit the card's shared memory and spill least
    # (see flashedu.bench.compiled). One does not fit: dkdv of float32 at D 256 takes 65 KiB, and a
    # T4 has 64; no smaller tile is possible.
    Row(LARGE,  128, 2, None,  None, Tile(128, 64, 4, 2), Tile(64, 64, 4, 2),  Tile(64, 64, 4, 2)),
    Row(LARGE,  256, 2, None,  None, Tile(64, 64, 4, 2),  Tile(32, 64, 8, 2),  Tile(64, 32, 8, 2)),
    Row(MIDDLE, 64,  2, None,  None, Tile(128, 64, 4, 3), Tile(64, 64, 4, 2),  Tile(128, 64, 8, 2)),
    Row(MIDDLE, 128, 2, None,  None, Tile(64, 64, 4, 3),  Tile(64, 64, 8, 2),  Tile(64, 64, 4, 2)),
    Row(MIDDLE, 256, 2, None,  None, Tile(64, 32, 8, 2),  Tile(64, 32, 8, 2),  Tile(32, 32, 8, 2)),
    Row(None,   128, 2, None,  None, Tile(32, 32, 8, 1),  Tile(32, 32, 8, 1),  Tile(32, 32, 8, 1)),
    Row(None,   256, 2, None,  None, Tile(16, 16, 8, 1),  Tile(16, 16, 8, 1),  Tile(16, 16, 8, 1)),
    Row(None,   64,  4, None,  None, Tile(32, 32, 8, 2),  Tile(32, 32, 8, 2),  Tile(32, 32, 8, 2)),
    Row(None,   256, 4, None,  None, Tile(16, 16, 8, 1),  Tile(16, 16, 8, 1),  Tile(16, 16, 8, 1)),
)  # fmt: skip

INTERPRETED = Tiles(Tile(64, 64), Tile(64, 64), Tile(64, 64))  # few tiles: each pass costs a ms


def tiles_for(
    capability: tuple[int, int] | None, columns: int, item_bytes: int, *, causal: bool, N: int
) -> Tiles:
    """The tuned tiles, or a guess that fits the card.

    `capability` is None where kernels are interpreted. `columns`: D, rounded up as in kernels, at
    most 256. `item_bytes`: 2 or 4. `N`: number of keys.
    """
    if capability is None:
        return INTERPRETED
    for row in TABLE:
        if (
            (row.capabilities is None or capability in row.capabilities)
            and columns <= row.columns
            and item_bytes == row.item_bytes
            and row.causal in (None, causal)
            and (row.longest is None or row.longest >= N)
        ):
            return Tiles(row.forward, row.dkdv, row.dq)
    raise ValueError(
        f"columns must be at most 256 and item_bytes 2 or 4, got {columns}, {item_bytes}"
    )


def tiles_for_call(q: Any, problem: Problem, block_q: int | None, block_k: int | None) -> Tiles:
    """The tiles for q's card and this problem, with the caller's sizes, where there are any."""
    from flashedu.stages import triton_mode  # here: the table is read without Triton, too
    from flashedu.stages.descriptors import columns

    tuned = tiles_for(
        triton_mode.capability(q), columns(problem.D), q.itemsize,
        causal=problem.causal, N=problem.Nk,
    )  # fmt: skip
    return Tiles(*(tile.sized(block_q, block_k) for tile in tuned))
