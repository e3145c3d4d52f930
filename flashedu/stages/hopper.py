"""What both directions of flash3 share: tiles on chip, who waits for them, who does which.

A place for a tile has two barriers, `full` and `empty`. The producer waits for the
second, and has the TMA open the first; a consumer waits for the first, and arrives at
the second. A barrier has a phase, 0 or 1, that changes each time it opens: tile t of
COUNT places is the t // COUNT'th of its place, and so one knows which phase to await.
"""

import functools

import torch

from flashedu.stages import triton_mode
from flashedu.stages.descriptors import addressable
from flashedu.stages.gluon_names import load_tile

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# on chip


@gluon.jit
def places(
    X, COUNT: gl.constexpr, BLOCK: gl.constexpr, COLUMNS: gl.constexpr,
    READERS: gl.constexpr,
):  # fmt: skip
    """Room for COUNT tiles of X, and two barriers for each.

    One opens when the tile has come, the other when all READERS have done with it.
    """
    shape: gl.constexpr = [COUNT, 1, 1, BLOCK, COLUMNS]
    room = gl.allocate_shared_memory(X.dtype, shape, X.layout)
    return room, barriers(COUNT, 1), barriers(COUNT, READERS)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, of which each opens when so many have arrived."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(COUNT):
        mbarrier.init(made.index(x), count=ARRIVALS)
    return made


@gluon.jit
def fill(X, b, h, row, tiles, t):
    """Have tile t loaded, from X's `row` on, as soon as its place is empty."""
    room, full, empty = tiles
    COUNT: gl.constexpr = room.shape[0]
    place, phase = t % COUNT, t // COUNT & 1
    mbarrier.wait(empty.index(place), phase ^ 1)  # all places are empty at first
    mbarrier.expect(full.index(place), X.block_type.nbytes)
    load_tile(X, [b, h, row, 0], full.index(place), room.index(place))


@gluon.jit
def tiles_of_piece(piece, N, BLOCK: gl.constexpr, PAIRS: gl.constexpr):
    """The head, counted through all batches, and a range of its tiles.

    In pairs, tile x and tile x from the end are one piece: causal, the first has the
    most work and the last the least, or the other way round, and all pairs about as
    much.
    """
    tiles = gl.cdiv(N, BLOCK)
    each = gl.cdiv(tiles, 2) if PAIRS else tiles
    head, x = piece // each, piece % each
    start, stop, step = x, x + 1, 1
    if PAIRS:
        stop, step = tiles - x, gl.maximum(1, tiles - 1 - 2 * x)
    return head, start, stop, step


# on the host


def pieces_of(N, block, heads, pairs):
    """How many pieces of work there are: see `tiles_of_piece`."""
    tiles = triton.cdiv(N, block)
    return heads * (triton.cdiv(tiles, 2) if pairs else tiles)


def shared_out(x, N, block, heads, pairs):
    """Pieces of work, and the programs that share them out: at most one for each SM."""
    pieces = pieces_of(N, block, heads, pairs)
    return pieces, min(pieces, triton_mode.sm_count(x.device))


def tiles_of(x, rows):
    """x, (B, heads, N, D), as the TMA takes it: in tiles of `rows` rows, 0 beyond D."""
    x = addressable(x)
    return descriptor(x, 1, 1, rows, columns(x.shape[3]))


def descriptor(x, *block):
    """x, which the TMA can address, in tiles of this shape."""
    layout = _layout(x.dtype, *block)
    return TensorDescriptor(x, [*x.shape], [*x.stride()], [*block], layout)


def columns(D):
    """Columns of a tile in shared memory: the swizzles are for 64 and 128."""
    return 64 if D <= 64 else 128


DTYPES = {
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32,
}  # fmt: skip


@functools.cache  # finding it takes longer than the launch
def _layout(dtype, *block):
    """How a tile lies in shared memory: swizzled, as TMA writes and wgmma reads it."""
    return gl.NVMMASharedLayout.get_default_for([*block], DTYPES[dtype])
