"""How `decode` is cut to fit a card: its tiles, and the number of splits. All there is to tune."""

from __future__ import annotations

import functools
import math
from typing import Any

from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.descriptors import columns
from flashedu.stages.flash2_tiles import LARGE, MIDDLE, Tile

# k and v pass by once, so speed is bytes in flight: tiles on their way while others are used. With
# 3 stages two of k and two of v are on chip; at 32 KiB each, one program then fills an SM of
# Hopper, and at 16 KiB one of a card with 99 KiB. Fastest of eight on an H100 (bfloat16, D 128, 8
# heads a key head, 8192 to 131072 keys, torch 2.11, triton 3.6, 2026-11-25); elsewhere never timed.
TILE_BYTES = {True: 32 * 2**10, False: 16 * 2**10}  # of k, on LARGE cards and on others
PROGRAMS_PER_SM = 1
MIN_KEYS = 256  # of a split: o of 8 heads, written and read, is then 1/16 of k and v in 16 bits

MERGED_VALUES = 8192  # of o that a merging program holds: 64 a thread

INTERPRETED_ROWS = 16  # of a merging program
INTERPRETED_SPLITS = 3  # few programs, as each costs some ms; but some to merge


def tile_for(capability: tuple[int, int] | None, columns: int, item_bytes: int, rows: int) -> Tile:
    """How the kernel is cut, for a card's compute capability; None: interpreted.

    `columns`: D, rounded up as in kernels. `rows`: queries times the query heads of a key head.
    """
    largest = 64 if item_bytes == 2 and columns <= 128 else 16  # more does not fit, or spills
    block_q = min(largest, max(16, 1 << (rows - 1).bit_length()))
    if capability is None:
        return Tile(block_q, 64)
    block_k = min(128, TILE_BYTES[capability in LARGE] // (item_bytes * columns))
    stages = 3 if capability in LARGE + MIDDLE else 1
    return Tile(block_q, block_k, 4, stages)


def tile_for_call(q: Any, p: Problem, block_q: int | None, block_k: int | None) -> Tile:
    """The tile for q's card and this problem, with the caller's sizes, where there are any."""
    tile = tile_for(triton_mode.capability(q), columns(p.D), q.itemsize, p.Nq * p.group)
    return tile.sized(block_q, block_k)


def in_pages(tile: Tile, page_size: int, capability: tuple[int, int] | None) -> Tile:
    """The same for keys in pages: a tile lies in one page, and has 64 keys at most.

    A page number is loaded before its tile can be, and the compiler spreads its stages over both
    loads: 3 stages have no tile on its way, 4 have one, 6 have two. LARGE cards have room for two.
    """
    stages = 6 if capability in LARGE else 4 if capability in MIDDLE else tile.stages
    return tile._replace(block_k=min(tile.block_k, page_size, 64), stages=stages)


@functools.cache  # a model asks once a layer
def splits_for(slots: int, parts: int, Nk: int, block_k: int) -> int:
    """So many splits that programs fill the card, in whole waves.

    `slots`: programs that the card runs at a time. `parts`: programs there would be
    without splits. Of 100 programs on 264 slots 2.64 would be one wave: 2 splits fill
    0.76 of it, 5 fill 0.95 of two. The fullest is taken, of equals the fewest; at most
    two waves, and no split shorter than MIN_KEYS.
    """
    most = max(1, min(Nk // MIN_KEYS, 2 * slots // parts))

    def fullness(splits: int) -> float:
        waves = parts * splits / slots
        return waves / math.ceil(waves)

    splits = max(range(1, most + 1), key=fullness)
    tiles = -(-Nk // block_k)
    tiles_of_a_split = -(-tiles // splits)
    return -(-tiles // tiles_of_a_split)  # none is left without a key


def splits_for_call(q: Any, p: Problem, tile: Tile) -> int:
    """The splits for q's card and this problem."""
    if triton_mode.INTERPRETED:
        return INTERPRETED_SPLITS
    parts = p.B * p.H_kv * -(-p.Nq * p.group // tile.block_q)
    slots = PROGRAMS_PER_SM * triton_mode.sm_count(q.device)
    return splits_for(slots, max(1, parts), p.Nk, tile.block_k) if p.Nk else 1


def merged_at_once(splits: int, columns: int) -> tuple[int, int]:
    """Rows of a merging program, and splits that it takes at once: powers of two.

    On a GPU a program for each row: rows are few, and it waits for memory once, not once a split.
    """
    if triton_mode.INTERPRETED:
        return INTERPRETED_ROWS, 2
    return 1, min(1 << (splits - 1).bit_length(), MERGED_VALUES // columns)
