"""The backward of FlashAttention-3: one kernel for dk, dv and dq, made for Hopper.

flash2 computes P twice: for dk and dv, by a program for each key tile, and again for dq. Here the
program of a key tile computes it once, and has what it owes to dq_i added to a float32 array in
HBM by the unit that copies tiles (the TMA), which it need not wait for. Five products, not seven:

    sᵀ = k qᵀ    pᵀ = exp(scale · sᵀ − lse)    dpᵀ = v doᵀ    dsᵀ = pᵀ ∘ (dpᵀ − delta)
    dv ← dv + pᵀ do          dk ← dk + dsᵀ q           dq_i ← dq_i + ds k

A product adds to what its accumulator holds: sᵀ begins at −lse / scale and dpᵀ at −delta, and what
the equations subtract is already off.

As in the forward, one warp only loads. Eight compute, 64 keys for each four, and always have
products under way. While those of this query tile run, they do the arithmetic of the next:

    products      | pᵀ do | ds k | next sᵀ       | next dpᵀ | dsᵀ q  |
    arithmetic    |              | send ds k off | exp      | dsᵀ    |    one turn of the loop

The additions to dq_i come in any order, so its last bits vary from run to run. deterministic=True
leaves them out and computes dq in a kernel of its own (flash3_dq.py): seven products again.

Source: FlashAttention-3 (arXiv 2407.08608), Appendix B.1 and its code; FlashAttention-2 (arXiv
2307.08691), Algorithm 2.
"""

import math
from typing import NamedTuple

import torch

from flashedu.memory import hbm
from flashedu.stages import descriptors, triton_mode
from flashedu.stages.descriptors import empty_like, without_padding
from flashedu.stages.flash3_dq import dq_alone
from flashedu.stages.gluon_names import load_tile, store_tile, version
from flashedu.stages.hopper import (
    barriers,
    columns,
    descriptor,
    fill,
    places,
    shared_out,
    tiles_of,
    tiles_of_piece,
)

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1 / math.log(2))
ROWS = 64  # of a tile, in the kernels before and after


class Tile(NamedTuple):
    """How the backward is cut."""

    block_q: int  # queries that pass by at a time
    block_k: int  # keys that a program keeps
    stages: int  # tiles of q, and of do, on chip


# By columns: D, rounded up. 128 keys: 64 for each four warps. What fits with two tiles of dsᵀ
# fills the 227 KiB on chip.
TILES = {64: Tile(128, 128, 2), 128: Tile(64, 128, 3)}


if version >= (3, 8):
    add_tile = tma.async_atomic_add
else:

    @builtin
    def add_tile(tensor_desc, coord, src, _semantic=None):
        """Have a tile added to an array in HBM. These versions have no name for it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        add = gl._core.ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(add, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpreted(place, dtype, shape, layout, _semantic=None):
    """A place in shared memory, for a tile of another type."""
    reinterpret = place.reinterpret if version >= (3, 9) else place._reinterpret
    return reinterpret(dtype, shape, layout, _semantic=_semantic)


# before


@triton.jit(do_not_specialize=["H", "Nq", "padded"])
def start_kernel(
    O, DO, LSE, S_START, DP_START, DQ_SUM, scale, H, Nq, padded,
    COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Where sᵀ, dpᵀ and dq of one query tile begin: −lse / scale, −delta = −rowsum(do ∘ o), 0.

    −inf where a row sees no key or does not exist: its p is 0.
    """
    tiles = padded // BLOCK_Q
    i, head = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(0) // tiles
    b, h = head // H, head % H
    rows = i + tl.arange(0, BLOCK_Q)
    lse_i = tl.load(LSE + head.to(tl.int64) * Nq + rows, mask=rows < Nq, other=float("-inf"))
    lse_i = tl.where(lse_i == float("-inf"), float("inf"), lse_i)
    o_i = O.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS).to(tl.float32)
    do_i = DO.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS).to(tl.float32)
    tl.store(S_START + head.to(tl.int64) * padded + rows, -lse_i / scale)
    tl.store(DP_START + head.to(tl.int64) * padded + rows, -tl.sum(do_i * o_i, 1))
    if SUM:
        DQ_SUM.store([b, h, i, 0], tl.zeros([1, 1, BLOCK_Q, COLUMNS], tl.float32))


# dk, dv and dq


@gluon.jit(do_not_specialize=["H_kv", "Nq", "Nk", "pieces"])
def gradients_kernel(
    Q, K, V, DO, S_START, DP_START, DQ, DK, DV, scale, H_kv, Nq, Nk, pieces,
    GROUP: gl.constexpr, COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    """dk and dv of key tiles, and what they add to dq. The warps part here."""
    dtype: gl.constexpr = Q.dtype
    k_tile = places(K, 1, BLOCK_K, COLUMNS, 1)
    v_tile = places(V, 1, BLOCK_K, COLUMNS, 1)
    q_i = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, COLUMNS], Q.layout)
    do_i = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, COLUMNS], DO.layout)
    s_start = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], S_START.layout)
    dp_start = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_Q], DP_START.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_Q], dtype)
    ds_ji = gl.allocate_shared_memory(dtype, [2, BLOCK_K, BLOCK_Q], DS)
    OUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_Q, COLUMNS], gl.float32)
    out = gl.allocate_shared_memory(gl.float32, [1, 1, BLOCK_Q, COLUMNS], OUT)
    q_full, do_full, i_empty = barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    i_tiles = (q_i, do_i, s_start, dp_start, q_full, do_full, i_empty)
    sizes = (H_kv, Nq, Nk, pieces)
    group: gl.constexpr = GROUP  # Gluon passes on only what it has named itself
    causal: gl.constexpr = CAUSAL
    sum: gl.constexpr = SUM
    gl.warp_specialize(
        [
            (_consume, (k_tile, v_tile, i_tiles, ds_ji, out, DQ, DK, DV, scale, sizes,
                        group, causal, sum)),
            (_produce, (Q, K, V, DO, S_START, DP_START, k_tile, v_tile, i_tiles, sizes,
                        group, causal)),
        ],
        [1], [24],
    )  # fmt: skip


@gluon.jit
def _produce(
    Q, K, V, DO, S_START, DP_START, k_tile, v_tile, i_tiles, sizes,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Have every tile loaded as soon as there is a place for it."""
    BLOCK_Q: gl.constexpr = i_tiles[0].shape[3]
    BLOCK_K: gl.constexpr = k_tile[0].shape[3]
    H_kv, Nq, Nk, pieces = sizes
    n, t = 0, 0  # key tiles and query tiles so far
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head_kv, start, stop, step = tiles_of_piece(piece, Nk, BLOCK_K, CAUSAL)
        b, h_kv = head_kv // H_kv, head_kv % H_kv
        for tile in range(start, stop, step):
            j = tile * BLOCK_K
            i, tiles, _ = _queries(j, Nq, Nk, BLOCK_Q, BLOCK_K, CAUSAL)
            g = 0
            for x in range(GROUP * tiles):
                if x == 0:
                    fill(K, b, h_kv, j, k_tile, n)
                h, head = h_kv * GROUP + g, head_kv * GROUP + g
                _fill_i(Q, DO, S_START, DP_START, b, h, head, i, i_tiles, t)
                if x == 0:
                    fill(V, b, h_kv, j, v_tile, n)
                g, i = _next(g, i, Nq, GROUP, BLOCK_Q)
                t += 1
            n += 1


@gluon.jit
def _fill_i(Q, DO, S_START, DP_START, b, h, head, i, i_tiles, t):
    q_i, do_i, s_start, dp_start, q_full, do_full, empty = i_tiles
    STAGES: gl.constexpr = q_i.shape[0]
    place, phase = t % STAGES, t // STAGES & 1
    BYTES: gl.constexpr = Q.block_type.nbytes + S_START.block_type.nbytes
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(q_full.index(place), BYTES)
    load_tile(Q, [b, h, i, 0], q_full.index(place), q_i.index(place))
    load_tile(S_START, [head, i], q_full.index(place), s_start.index(place))
    mbarrier.expect(do_full.index(place), BYTES)
    load_tile(DO, [b, h, i, 0], do_full.index(place), do_i.index(place))
    load_tile(DP_START, [head, i], do_full.index(place), dp_start.index(place))


@gluon.jit
def _consume(
    k_tile, v_tile, i_tiles, ds_ji, out, DQ, DK, DV, scale, sizes,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    """dk and dv of every key tile, and what it adds to dq."""
    q_places, do_places, s_start, dp_start, q_full, do_full, i_empty = i_tiles
    dtype: gl.constexpr = q_places.dtype
    STAGES: gl.constexpr = q_places.shape[0]
    BLOCK_Q: gl.constexpr = q_places.shape[3]
    BLOCK_K: gl.constexpr = k_tile[0].shape[3]
    COLUMNS: gl.constexpr = k_tile[0].shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_Q, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLUMNS, 16])
    DQ_ACC: gl.constexpr = gl.NVMMADistributedLayout(  # 64 queries: half the columns for each four
        [3, 0], [BLOCK_Q // 16, 128 // BLOCK_Q], [16, COLUMNS * BLOCK_Q // 128, 16]
    )
    H_kv, Nq, Nk, pieces = sizes
    scale_log2 = scale * LOG2E
    s_zero = gl.zeros([BLOCK_K, BLOCK_Q], gl.float32, S)
    dq_zero = gl.zeros([BLOCK_Q, COLUMNS], gl.float32, DQ_ACC)
    n, t = 0, 0  # key tiles and query tiles so far
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head_kv, start, stop, step = tiles_of_piece(piece, Nk, BLOCK_K, CAUSAL)
        for tile in range(start, stop, step):
            j = tile * BLOCK_K
            i, tiles, masked = _queries(j, Nq, Nk, BLOCK_Q, BLOCK_K, CAUSAL)
            g = 0
            end = t + GROUP * tiles
            first_whole = gl.minimum(gl.maximum(t, t + GROUP * masked - 1), end - 1)
            dk_j = gl.zeros([BLOCK_K, COLUMNS], gl.float32, ACC)
            dv_j = gl.zeros([BLOCK_K, COLUMNS], gl.float32, ACC)

            mbarrier.wait(k_tile[1].index(0), n & 1)
            k_j = k_tile[0].index(0).reshape([BLOCK_K, COLUMNS])
            s_ji = _scores(k_j, q_places, s_start, q_full, t, s_zero)
            s_ji = warpgroup_mma_wait(0, deps=[s_ji])
            p_ji = gl.exp2(scale_log2 * _masked(s_ji, i, j, Nq, Nk, CAUSAL))
            mbarrier.wait(v_tile[1].index(0), n & 1)
            v_j = v_tile[0].index(0).reshape([BLOCK_K, COLUMNS])
            dp_ji = _scores(v_j, do_places, dp_start, do_full, t, s_zero)
            dp_ji = warpgroup_mma_wait(0, deps=[dp_ji])
            tma.store_wait(0)  # of dk, from the places of ds
            ds_ji.index(t & 1).store((p_ji * dp_ji).to(dtype))
            p_16 = gl.convert_layout(p_ji.to(dtype), gl.DotOperandLayout(0, ACC, 2))

            for PART in gl.static_range(3):  # the next tile is masked, is not, there is none
                begin_part = t if PART == 0 else (first_whole if PART == 1 else end - 1)
                end_part = first_whole if PART == 0 else (end - 1 if PART == 1 else end)
                for t in range(begin_part, end_part):
                    here = t >> 30  # 0. A 0 that the compiler knew would cost too many registers
                    k_j = k_tile[0].index(here).reshape([BLOCK_K, COLUMNS])
                    v_j = v_tile[0].index(here).reshape([BLOCK_K, COLUMNS])
                    q_i = q_places.index(t % STAGES).reshape([BLOCK_Q, COLUMNS])
                    do_i = do_places.index(t % STAGES).reshape([BLOCK_Q, COLUMNS])
                    ds_place = ds_ji.index(t & 1)

                    dv_j = warpgroup_mma(p_16, do_i, dv_j, is_async=True)
                    fence_async_shared()
                    if SUM:
                        dq_i = warpgroup_mma(
                            ds_place.permute((1, 0)), k_j, dq_zero, use_acc=False, is_async=True
                        )
                    if PART < 2:
                        s_ji = _scores(k_j, q_places, s_start, q_full, t + 1, s_zero)
                    # waited for: all but the last so many that were started
                    dv_j, p_16 = warpgroup_mma_wait((PART < 2) + SUM, deps=[dv_j, p_16])
                    if SUM:
                        dq_i = warpgroup_mma_wait(PART < 2, deps=[dq_i])
                        _add(dq_i, DQ, [head_kv * GROUP + g, i, 0], out.index(here))
                    if PART < 2:
                        dp_ji = _scores(v_j, do_places, dp_start, do_full, t + 1, s_zero)
                    dk_j = warpgroup_mma(ds_place, q_i, dk_j, is_async=True)
                    if PART < 2:
                        s_ji = warpgroup_mma_wait(2, deps=[s_ji])
                        if PART == 0:
                            i_next = _next(g, i, Nq, GROUP, BLOCK_Q)[1]
                            s_ji = _masked(s_ji, i_next, j, Nq, Nk, CAUSAL)
                        p_ji = gl.exp2(scale_log2 * s_ji)
                        dp_ji = warpgroup_mma_wait(1, deps=[dp_ji])
                        ds_ji.index((t & 1) ^ 1).store((p_ji * dp_ji).to(dtype))
                        p_16 = gl.convert_layout(p_ji.to(dtype), gl.DotOperandLayout(0, ACC, 2))
                    dk_j = warpgroup_mma_wait(0, deps=[dk_j])
                    mbarrier.arrive(i_empty.index(t % STAGES), count=1)
                    g, i = _next(g, i, Nq, GROUP, BLOCK_Q)

            t = end
            mbarrier.arrive(k_tile[2].index(0), count=1)
            mbarrier.arrive(v_tile[2].index(0), count=1)
            b, h_kv = head_kv // H_kv, head_kv % H_kv
            tma.store_wait(0)  # of dq
            _store(dv_j, DV, [b, h_kv, j, 0], out)
            _store(scale * dk_j, DK, [b, h_kv, j, 0], ds_ji)
            n += 1
    tma.store_wait(0)


@gluon.jit
def _scores(x_j, places, starts, full, t, zero):
    """Start x_j · y_tᵀ, of a tile that has come, on top of where it begins."""
    S: gl.constexpr = zero.type.layout
    STAGES: gl.constexpr = places.shape[0]
    place = t % STAGES
    mbarrier.wait(full.index(place), t // STAGES & 1)
    y_i = places.index(place).reshape([places.shape[3], places.shape[4]])
    start = gl.broadcast(starts.index(place).load(S), zero)[0]
    return warpgroup_mma(x_j, y_i.permute((1, 0)), start, is_async=True)


@gluon.jit
def _masked(s_ji, i, j, Nq, Nk, CAUSAL: gl.constexpr):
    """-inf where the key does not exist, or its p could overflow, or is in the query's future."""
    S: gl.constexpr = s_ji.type.layout
    cols = j + gl.arange(0, s_ji.shape[0], layout=gl.SliceLayout(1, S))
    visible = (cols < Nk)[:, None]
    if CAUSAL:
        rows = i + gl.arange(0, s_ji.shape[1], layout=gl.SliceLayout(0, S))
        visible = visible & (cols[:, None] <= rows[None, :] + (Nk - Nq))
    return gl.where(visible, s_ji, float("-inf"))


@gluon.jit
def _add(x, X, at, place):
    """Have x added to a tile of X, as soon as the TMA has read what was in place."""
    tma.store_wait(0)
    place.reshape(x.shape).store(x)
    fence_async_shared()
    add_tile(X, at, place)


@gluon.jit
def _store(x, X, at, room):
    """Have x stored as a tile of X, from room that held tiles of another kind."""
    VALUES: gl.constexpr = room.shape[0] * room.shape[-2] * room.shape[-1]
    WIDER: gl.constexpr = room.dtype.primitive_bitwidth // X.dtype.primitive_bitwidth
    COUNT: gl.constexpr = VALUES * WIDER // (x.shape[0] * x.shape[1])  # tiles of X that fit
    shape: gl.constexpr = [COUNT, 1, 1, x.shape[0], x.shape[1]]
    place = reinterpreted(room, X.dtype, shape, X.layout).index(0)
    place.reshape(x.shape).store(x.to(X.dtype))
    fence_async_shared()
    store_tile(X, at, place)


@gluon.jit
def _queries(
    j, Nq, Nk, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """The first row of the query tiles that see any key of the tile; how many there are; how many
    of them, the first, do not see all of it."""
    first = 0
    masked = 0
    if CAUSAL:
        first = gl.maximum(0, j - (Nk - Nq)) // BLOCK_Q
        masked = gl.maximum(0, gl.cdiv(j + BLOCK_K - 1 - (Nk - Nq), BLOCK_Q) - first)
    tiles = gl.cdiv(Nq, BLOCK_Q) - first
    return first * BLOCK_Q, tiles, gl.where(j + BLOCK_K > Nk, tiles, masked)


@gluon.jit
def _next(g, i, Nq, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr):
    """After query tile i of head g of the group: first the other heads, then the next tile."""
    i = gl.where(g == GROUP - 1, i + BLOCK_Q, i)
    return gl.where(g == GROUP - 1, 0, g + 1), gl.where(i >= Nq, 0, i)


# after


@triton.jit(do_not_specialize=["H", "Nq"])
def round_kernel(DQ_SUM, DQ, scale, H, Nq, BLOCK_Q: tl.constexpr):
    """dq of one query tile, from its sum in float32."""
    tiles = tl.cdiv(Nq, BLOCK_Q)
    i, head = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(0) // tiles
    dq_i = scale * DQ_SUM.load([head // H, head % H, i, 0])
    DQ.store([head // H, head % H, i, 0], dq_i.to(DQ.dtype))


# launches


@triton_mode.on_its_card
def backward(q, k, v, o, lse, do, problem, scale, deterministic=False, dlse=None, tile=None):
    """dq, dk, dv from do (B, H, Nq, D) and dlse (B, H, Nq), the gradient of lse or None.

    scale: 1e-30 or more. deterministic: dq too is the same, to the bit, in every run, as dk and dv
    always are. tile: a `Tile`; None takes that of TILES.
    """
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tile = tile or TILES[columns(D)]
    causal = problem.causal
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    padded = triton.cdiv(Nq, 128) * 128  # whole tiles of any kernel
    s_start = hbm.empty((B * H, padded), q, torch.float32)
    dp_start = hbm.empty((B * H, padded), q, torch.float32)
    dq_sum = dq
    if not deterministic:
        dq_sum = hbm.empty((B, H, Nq, -(-D // 4) * 4), q, torch.float32)  # rows of whole 16 bytes

    O, DO, DQ_SUM = (descriptors.tiles_of(x, ROWS) for x in (o, do, dq_sum))
    start_kernel[(padded // ROWS * B * H,)](
        O, DO, lse, s_start, dp_start, DQ_SUM, scale, H, Nq, padded,
        COLUMNS=descriptors.columns(D), BLOCK_Q=ROWS, SUM=not deterministic,
    )  # fmt: skip
    if dlse is not None:
        dp_start.view(B, H, padded)[..., :Nq] += dlse  # ∂lse/∂s = p

    Q, DO = tiles_of(q, tile.block_q), tiles_of(do, tile.block_q)
    K, V, DK, DV = (tiles_of(x, tile.block_k) for x in (k, v, dk, dv))
    S_START, DP_START = (descriptor(x, 1, tile.block_q) for x in (s_start, dp_start))
    DQ = DK  # not used
    if not deterministic:
        DQ = descriptor(dq_sum.flatten(0, 1), 1, tile.block_q, columns(D))
    pieces, programs = shared_out(q, Nk, tile.block_k, B * H_kv, causal)
    gradients_kernel[(programs,)](
        Q, K, V, DO, S_START, DP_START, DQ, DK, DV, scale, H_kv, Nq, Nk, pieces,
        GROUP=H // H_kv, COLUMNS=columns(D), CAUSAL=causal, BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k, STAGES=tile.stages, SUM=not deterministic, num_warps=8,
    )  # fmt: skip

    if deterministic:
        dq_alone(q, k, v, do, s_start, dp_start, dq, scale, causal)
    else:
        DQ = descriptors.tiles_of(dq, ROWS)
        round_kernel[(triton.cdiv(Nq, ROWS) * B * H,)](DQ_SUM, DQ, scale, H, Nq, BLOCK_Q=ROWS)
    return tuple(without_padding(dx, x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
