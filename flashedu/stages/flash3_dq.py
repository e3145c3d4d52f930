"""dq alone, for a backward of FlashAttention-3 that gives the same bits in every run.

A program has query tiles and goes through the keys that they see, as the forward does. So dq has an
owner, which adds in one order; and p is computed a second time:

    s = q kᵀ    p = exp(scale · s − lse)    dp = do vᵀ    ds = p ∘ (dp − delta)    dq ← dq + ds k

s and dp begin at −lse / scale and −delta, as in flash3_backward.py.

Source: FlashAttention-2 (arXiv 2307.08691), Algorithm 2, its equation for dQ.
"""

import math

from flashedu.stages.gluon_names import store_tile
from flashedu.stages.hopper import (
    columns,
    fill,
    places,
    shared_out,
    tiles_of,
    tiles_of_piece,
)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1 / math.log(2))
BLOCK_Q, BLOCK_K, STAGES = 128, 64, 2  # queries that a program keeps; keys, and places for them


@gluon.jit(do_not_specialize=["H", "group", "Nq", "Nk", "pieces", "padded"])
def dq_kernel(
    Q, K, V, DO, S_START, DP_START, DQ, scale, H, group, Nq, Nk, pieces, padded,
    COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dq of query tiles, each with the keys that it sees, as the forward."""
    dtype: gl.constexpr = Q.dtype
    q_tile = places(Q, 1, BLOCK_Q, COLUMNS, 1)
    do_tile = places(DO, 1, BLOCK_Q, COLUMNS, 1)
    k_tiles = places(K, STAGES, BLOCK_K, COLUMNS, 1)
    v_tiles = places(V, STAGES, BLOCK_K, COLUMNS, 1)
    out = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_Q, COLUMNS], DQ.layout)
    sizes = (H, group, Nq, Nk, pieces)
    causal: gl.constexpr = CAUSAL
    gl.warp_specialize(
        [
            (_consume_keys, (q_tile, do_tile, k_tiles, v_tiles, out, S_START, DP_START, DQ, scale,
                             padded, sizes, causal)),
            (_produce_keys, (Q, K, V, DO, q_tile, do_tile, k_tiles, v_tiles, sizes, causal)),
        ],
        [1], [24],
    )  # fmt: skip


@gluon.jit
def _produce_keys(
    Q, K, V, DO, q_tile, do_tile, k_tiles, v_tiles, sizes, CAUSAL: gl.constexpr
):  # fmt: skip
    """Have every tile loaded as soon as there is a place for it."""
    BLOCK_Q: gl.constexpr = q_tile[0].shape[3]
    BLOCK_K: gl.constexpr = k_tiles[0].shape[3]
    H, group, Nq, Nk, pieces = sizes
    n, t = 0, 0  # query tiles and key tiles so far
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head, start, stop, step = tiles_of_piece(piece, Nq, BLOCK_Q, CAUSAL)
        b, h = head // H, head % H
        for tile in range(start, stop, step):
            i = tile * BLOCK_Q
            tiles, _ = _keys(i, Nq, Nk, BLOCK_Q, BLOCK_K, CAUSAL)
            fill(Q, b, h, i, q_tile, n)
            fill(DO, b, h, i, do_tile, n)
            for x in range(tiles):
                j = (tiles - 1 - x) * BLOCK_K
                fill(K, b, h // group, j, k_tiles, t)
                fill(V, b, h // group, j, v_tiles, t)
                t += 1
            n += 1


@gluon.jit
def _consume_keys(
    q_tile, do_tile, k_tiles, v_tiles, out, S_START, DP_START, DQ, scale, padded, sizes,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """dq of every query tile. The key tiles come from the last that it sees to the first."""
    k_places, k_full, k_empty = k_tiles
    v_places, v_full, v_empty = v_tiles
    dtype: gl.constexpr = k_places.dtype
    STAGES: gl.constexpr = k_places.shape[0]
    BLOCK_Q: gl.constexpr = q_tile[0].shape[3]
    BLOCK_K: gl.constexpr = k_places.shape[3]
    COLUMNS: gl.constexpr = k_places.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_K, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLUMNS, 16])
    H, _, Nq, Nk, pieces = sizes
    scale_log2 = scale * LOG2E
    zero = gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, S)
    q_i = q_tile[0].index(0).reshape([BLOCK_Q, COLUMNS])
    do_i = do_tile[0].index(0).reshape([BLOCK_Q, COLUMNS])
    n, t = 0, 0  # query tiles and key tiles so far
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head, start, stop, step = tiles_of_piece(piece, Nq, BLOCK_Q, CAUSAL)
        for tile in range(start, stop, step):
            i = tile * BLOCK_Q
            tiles, masked = _keys(i, Nq, Nk, BLOCK_Q, BLOCK_K, CAUSAL)
            end = t + tiles
            first_whole = gl.minimum(gl.maximum(t, t + masked - 1), end - 1)
            rows = head.to(gl.int64) * padded + i
            rows += gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(1, S))
            s_start = gl.load(S_START + rows)
            dp_start = gl.load(DP_START + rows)
            dq_i = gl.zeros([BLOCK_Q, COLUMNS], gl.float32, ACC)

            mbarrier.wait(q_tile[1].index(0), n & 1)
            mbarrier.wait(k_full.index(t % STAGES), t // STAGES & 1)
            k_j = k_places.index(t % STAGES).reshape([BLOCK_K, COLUMNS])
            s_ij = gl.broadcast(s_start[:, None], zero)[0]
            s_ij = warpgroup_mma(q_i, k_j.permute((1, 0)), s_ij)
            s_ij = _masked_keys(s_ij, i, (end - 1 - t) * BLOCK_K, Nq, Nk, CAUSAL)
            p_ij = gl.exp2(scale_log2 * s_ij)
            mbarrier.wait(do_tile[1].index(0), n & 1)
            mbarrier.wait(v_full.index(t % STAGES), t // STAGES & 1)

            for PART in gl.static_range(3):  # the next tile is masked, is not, there is none
                begin_part = t if PART == 0 else (first_whole if PART == 1 else end - 1)
                end_part = first_whole if PART == 0 else (end - 1 if PART == 1 else end)
                for t in range(begin_part, end_part):
                    k_j = k_places.index(t % STAGES).reshape([BLOCK_K, COLUMNS])
                    v_j = v_places.index(t % STAGES).reshape([BLOCK_K, COLUMNS])
                    dp_ij = gl.broadcast(dp_start[:, None], zero)[0]
                    dp_ij = warpgroup_mma(do_i, v_j.permute((1, 0)), dp_ij, is_async=True)
                    dp_ij = warpgroup_mma_wait(0, deps=[dp_ij])
                    mbarrier.arrive(v_empty.index(t % STAGES), count=1)
                    ds_16 = (p_ij * dp_ij).to(dtype)
                    ds_16 = gl.convert_layout(ds_16, gl.DotOperandLayout(0, ACC, 2))
                    if PART < 2:
                        u = t + 1
                        mbarrier.wait(k_full.index(u % STAGES), u // STAGES & 1)
                        k_next = k_places.index(u % STAGES).reshape([BLOCK_K, COLUMNS])
                        s_ij = gl.broadcast(s_start[:, None], zero)[0]
                        s_ij = warpgroup_mma(q_i, k_next.permute((1, 0)), s_ij, is_async=True)
                    dq_i = warpgroup_mma(ds_16, k_j, dq_i, is_async=True)
                    if PART < 2:
                        s_ij = warpgroup_mma_wait(1, deps=[s_ij])
                        if PART == 0:
                            s_ij = _masked_keys(s_ij, i, (end - 1 - u) * BLOCK_K, Nq, Nk, CAUSAL)
                        p_ij = gl.exp2(scale_log2 * s_ij)
                        mbarrier.wait(v_full.index(u % STAGES), u // STAGES & 1)
                    dq_i, ds_16 = warpgroup_mma_wait(0, deps=[dq_i, ds_16])
                    mbarrier.arrive(k_empty.index(t % STAGES), count=1)

            t = end
            mbarrier.arrive(q_tile[2].index(0), count=1)
            mbarrier.arrive(do_tile[2].index(0), count=1)
            tma.store_wait(0)  # of the tile before
            out.reshape([BLOCK_Q, COLUMNS]).store((scale * dq_i).to(dtype))
            fence_async_shared()
            store_tile(DQ, [head // H, head % H, i, 0], out)
            n += 1
    tma.store_wait(0)


@gluon.jit
def _masked_keys(s_ij, i, j, Nq, Nk, CAUSAL: gl.constexpr):
    S: gl.constexpr = s_ij.type.layout
    cols = j + gl.arange(0, s_ij.shape[1], layout=gl.SliceLayout(0, S))
    visible = (cols < Nk)[None, :]
    if CAUSAL:
        rows = i + gl.arange(0, s_ij.shape[0], layout=gl.SliceLayout(1, S))
        visible = visible & (cols[None, :] <= rows[:, None] + (Nk - Nq))
    return gl.where(visible, s_ij, float("-inf"))


@gluon.jit
def _keys(
    i, Nq, Nk, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """How many key tiles any query of the tile sees, at least one, or there would be nothing to do;
    and how many of them, the last, not all queries see whole."""
    by_any = Nk
    by_all = Nk
    if CAUSAL:
        by_any = gl.minimum(Nk, i + BLOCK_Q + Nk - Nq)
        by_all = gl.minimum(Nk, gl.maximum(0, i + 1 + Nk - Nq))
    tiles = gl.maximum(1, gl.cdiv(by_any, BLOCK_K))
    return tiles, tiles - gl.minimum(by_all // BLOCK_K, tiles)


def dq_alone(q, k, v, do, s_start, dp_start, dq, scale, causal):
    """Write dq (B, H, Nq, D). Where s and dp begin: s_start, dp_start (B · H, whole tiles)."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    Q, DO, DQ = (tiles_of(x, BLOCK_Q) for x in (q, do, dq))
    K, V = tiles_of(k, BLOCK_K), tiles_of(v, BLOCK_K)
    pieces, programs = shared_out(q, Nq, BLOCK_Q, B * H, causal)
    dq_kernel[(programs,)](
        Q, K, V, DO, s_start, dp_start, DQ, scale, H, H // H_kv, Nq, Nk, pieces, s_start.shape[1],
        COLUMNS=columns(D), CAUSAL=causal, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, STAGES=STAGES,
        num_warps=8,
    )  # fmt: skip
