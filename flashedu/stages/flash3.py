"""FlashAttention-3: flash2's forward, made for Hopper by warps that do different things.

In flash2 every warp loads, multiplies and takes exponentials in turn, and the matrix units wait
while it does the last. Here one warp only loads; the others, in groups of four, only compute:

    producer:  for each tile of k and v: wait until its place is empty, then have it filled
    consumer:  for each tile of k and v: wait until it is full, compute, and say that it is empty

and a consumer has two products under way while it computes the softmax: p v of the tile before
runs beside it.

Source: FlashAttention-3 (arXiv 2407.08608), Algorithm 1 and section 3.2; written in Gluon.
"""

import math
from typing import NamedTuple

import torch

from flashedu.memory import hbm
from flashedu.stages import triton_mode
from flashedu.stages.contract import check
from flashedu.stages.descriptors import addressable, empty_like, without_padding

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashedu.stages.gluon_names import load_tile, store_tile  # isort: skip

LOWEST = gl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0
LN2 = gl.constexpr(math.log(2))
LOG2E = gl.constexpr(1 / math.log(2))


class Tile(NamedTuple):
    """How the forward is cut and who does what."""

    consumers: int  # warpgroups of 64 queries each
    block_k: int = 128
    stages: int = 2  # tiles of k, and of v, on chip
    registers: int = 240  # of a consumer's thread
    mode: str = "next"  # none, before, next
    persistent: bool = False
    section: int = 1  # heads
    warps: int = 4  # of a consumer: 16 queries each


@gluon.jit(do_not_specialize=["H", "group", "Nq", "Nk", "heads", "section"])
def forward_kernel(
    Q, K, V, O, LSE, scale, H, group, Nq, Nk, heads, section,
    COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, OVERLAP: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """o and lse of a query tile, CONSUMERS · 64 rows, of one head. The warps part here."""
    dtype: gl.constexpr = Q.dtype
    q_i = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, COLUMNS], Q.layout)
    o_i = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, COLUMNS], O.layout)
    k_j = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, COLUMNS], K.layout)
    v_j = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, COLUMNS], V.layout)
    q_full, q_empty = _barriers(1, 1), _barriers(1, CONSUMERS)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)

    q_tile, k_tiles, v_tiles = (q_i, q_full, q_empty), (k_j, k_full, k_empty), (v_j, v_full, v_empty)
    sizes = (H, group, Nq, Nk, heads, section)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    third: gl.constexpr = 2
    causal: gl.constexpr = CAUSAL
    overlap: gl.constexpr = OVERLAP
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (first, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes, causal, overlap)),
                (_produce, (Q, K, V, q_tile, k_tiles, v_tiles, sizes, causal)),
            ],
            [1], [24],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (first, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes, causal, overlap)),
                (_consume, (second, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes, causal, overlap)),
                (_produce, (Q, K, V, q_tile, k_tiles, v_tiles, sizes, causal)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (first, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes, causal, overlap)),
                (_consume, (second, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes, causal, overlap)),
                (_consume, (third, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes, causal, overlap)),
                (_produce, (Q, K, V, q_tile, k_tiles, v_tiles, sizes, causal)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, of which each opens when ARRIVALS have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(COUNT):
        mbarrier.init(barriers.index(x), count=ARRIVALS)
    return barriers


@gluon.jit
def _produce(Q, K, V, q_tile, k_tiles, v_tiles, sizes, CAUSAL: gl.constexpr):
    """Have every tile loaded as soon as there is a place for it."""
    q_i, q_full, q_empty = q_tile
    CONSUMERS: gl.constexpr = q_i.shape[0]
    ROWS: gl.constexpr = q_i.shape[3]
    BLOCK_K: gl.constexpr = k_tiles[0].shape[3]
    H, group, Nq, Nk, heads, section = sizes
    items = heads * gl.cdiv(Nq, CONSUMERS * ROWS)
    t = 0
    n_items = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i, head = _tile_and_head(item, Nq, heads, section, CONSUMERS * ROWS, CAUSAL)
        b, h = head // H, head % H
        mbarrier.wait(q_empty.index(0), (n_items & 1) ^ 1)
        mbarrier.expect(q_full.index(0), CONSUMERS * Q.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            load_tile(Q, [b, h, i + c * ROWS, 0], q_full.index(0), q_i.index(c))
        tiles = _tiles_seen(i, Nq, Nk, CONSUMERS * ROWS, BLOCK_K, CAUSAL)
        for x in range(tiles):
            j = (tiles - 1 - x) * BLOCK_K
            _fill(K, b, h // group, j, k_tiles, t)
            _fill(V, b, h // group, j, v_tiles, t)
            t += 1
        n_items += 1


@gluon.jit
def _fill(X, b, h, j, tiles, t):
    places, full, empty = tiles
    STAGES: gl.constexpr = places.shape[0]
    place, phase = t % STAGES, t // STAGES & 1
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(full.index(place), X.block_type.nbytes)
    load_tile(X, [b, h, j, 0], full.index(place), places.index(place))


@gluon.jit
def _consume(
    C: gl.constexpr, q_tile, k_tiles, v_tiles, o_tile, O, LSE, scale, sizes, CAUSAL: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """o and lse of 64 queries."""
    q_places, q_full, q_empty = q_tile
    CONSUMERS: gl.constexpr = q_places.shape[0]
    ROWS: gl.constexpr = q_places.shape[3]
    WARPS: gl.constexpr = ROWS // 16
    COLUMNS: gl.constexpr = q_places.shape[4]
    BLOCK_K: gl.constexpr = k_tiles[0].shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_K, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    H, group, Nq, Nk, heads, section = sizes
    items = heads * gl.cdiv(Nq, CONSUMERS * ROWS)
    scale_log2 = scale * LOG2E
    q_i = q_places.index(C).reshape([ROWS, COLUMNS])
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    t = 0
    n_items = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        i, head = _tile_and_head(item, Nq, heads, section, CONSUMERS * ROWS, CAUSAL)
        tiles = _tiles_seen(i, Nq, Nk, CONSUMERS * ROWS, BLOCK_K, CAUSAL)
        i += C * ROWS
        rows = i + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        seen_by_all = gl.minimum(_seen_by_all(i, Nq, Nk, BLOCK_K, CAUSAL), tiles)
        last = (tiles - 1) * BLOCK_K

        m_i = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
        l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
        acc_i = gl.zeros([ROWS, COLUMNS], gl.float32, ACC)

        mbarrier.wait(q_full.index(0), n_items & 1)
        k_j, k_empty = _full(k_tiles, t)
        s_ij = warpgroup_mma(q_i, k_j.permute((1, 0)), zero, use_acc=False)
        mbarrier.arrive(k_empty, count=1)
        s_ij = _masked(s_ij, rows, last, Nq, Nk, CAUSAL)
        if OVERLAP == "before" or OVERLAP == "before16":
            p_ij, alpha, m_i, l_i = _softmax(s_ij, m_i, l_i, scale_log2)
            if OVERLAP == "before16":
                p_ij = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
            _full(v_tiles, t)
        t += 1

        for MASKED in gl.static_range(1, -1, -1):  # the tiles that need no mask come last
            start = 1 if MASKED else gl.maximum(1, tiles - seen_by_all)
            stop = tiles - seen_by_all if MASKED else tiles
            for x in range(start, stop):
                if OVERLAP == "next":
                    k_j, k_empty = _full(k_tiles, t)
                    s_next = warpgroup_mma(q_i, k_j.permute((1, 0)), zero, use_acc=False, is_async=True)
                    p_ij, alpha, m_i, l_i = _softmax(s_ij, m_i, l_i, scale_log2)
                    acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
                    p_16 = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
                    v_j, v_empty = _full(v_tiles, t - 1)
                    acc_i = warpgroup_mma(p_16, v_j, acc_i, is_async=True)
                    s_ij = warpgroup_mma_wait(1, deps=[s_next])
                    mbarrier.arrive(k_empty, count=1)
                    if MASKED:
                        s_ij = _masked(s_ij, rows, last - x * BLOCK_K, Nq, Nk, CAUSAL)
                    acc_i, p_16 = warpgroup_mma_wait(0, deps=[acc_i, p_16])
                    mbarrier.arrive(v_empty, count=1)
                elif OVERLAP == "before" or OVERLAP == "before16":
                    k_j, k_empty = _full(k_tiles, t)
                    p_16 = p_ij
                    if OVERLAP == "before":
                        p_16 = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
                    s_ij = warpgroup_mma(q_i, k_j.permute((1, 0)), zero, use_acc=False, is_async=True)
                    v_j, v_empty = _tile(v_tiles, t - 1)
                    acc_i = warpgroup_mma(p_16, v_j, acc_i, is_async=True)
                    s_ij = warpgroup_mma_wait(1, deps=[s_ij])
                    mbarrier.arrive(k_empty, count=1)
                    if MASKED:
                        s_ij = _masked(s_ij, rows, last - x * BLOCK_K, Nq, Nk, CAUSAL)
                    p_ij, alpha, m_i, l_i = _softmax(s_ij, m_i, l_i, scale_log2)
                    _full(v_tiles, t)
                    acc_i, p_16 = warpgroup_mma_wait(0, deps=[acc_i, p_16])
                    mbarrier.arrive(v_empty, count=1)
                    acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
                    if OVERLAP == "before16":
                        p_ij = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
                else:
                    p_ij, alpha, m_i, l_i = _softmax(s_ij, m_i, l_i, scale_log2)
                    acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
                    p_16 = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
                    v_j, v_empty = _full(v_tiles, t - 1)
                    acc_i = warpgroup_mma(p_16, v_j, acc_i, is_async=True)
                    k_j, k_empty = _full(k_tiles, t)
                    s_ij = warpgroup_mma(q_i, k_j.permute((1, 0)), zero, use_acc=False, is_async=True)
                    acc_i, s_ij, p_16 = warpgroup_mma_wait(0, deps=[acc_i, s_ij, p_16])
                    mbarrier.arrive(v_empty, count=1)
                    mbarrier.arrive(k_empty, count=1)
                    if MASKED:
                        s_ij = _masked(s_ij, rows, last - x * BLOCK_K, Nq, Nk, CAUSAL)
                t += 1

        mbarrier.arrive(q_empty.index(0), count=1)
        if OVERLAP == "next" or OVERLAP == "none":
            p_ij, alpha, m_i, l_i = _softmax(s_ij, m_i, l_i, scale_log2)
            acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
        v_j, v_empty = _full(v_tiles, t - 1)
        p_16 = p_ij
        if OVERLAP != "before16":
            p_16 = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
        acc_i = warpgroup_mma(p_16, v_j, acc_i, is_async=True)
        acc_i, p_16 = warpgroup_mma_wait(0, deps=[acc_i, p_16])
        mbarrier.arrive(v_empty, count=1)

        some = l_i > 0  # False for a row that sees no key
        l_some = gl.where(some, l_i, 1.0)
        lse_i = gl.where(some, LN2 * (m_i + gl.log2(l_some)), float("-inf"))
        gl.store(LSE + head.to(gl.int64) * Nq + rows, lse_i, mask=rows < Nq)
        o_i = acc_i * gl.convert_layout(1 / l_some, gl.SliceLayout(1, ACC))[:, None]
        tma.store_wait(0)  # of the item before
        o_tile.index(C).reshape([ROWS, COLUMNS]).store(o_i.to(O.dtype))
        fence_async_shared()
        store_tile(O, [head // H, head % H, i, 0], o_tile.index(C))
        n_items += 1
    tma.store_wait(0)


@gluon.jit
def _full(tiles, t):
    """Wait until tile t has come. The tile, and the barrier that says that it is used."""
    STAGES: gl.constexpr = tiles[0].shape[0]
    mbarrier.wait(tiles[1].index(t % STAGES), t // STAGES & 1)
    return _tile(tiles, t)


@gluon.jit
def _tile(tiles, t):
    """Tile t, which has come, and the barrier that says that it is used."""
    places, _, empty = tiles
    STAGES: gl.constexpr = places.shape[0]
    ROWS: gl.constexpr = places.shape[3]
    COLUMNS: gl.constexpr = places.shape[4]
    return places.index(t % STAGES).reshape([ROWS, COLUMNS]), empty.index(t % STAGES)


@gluon.jit
def _softmax(s_ij, m_i, l_i, scale_log2):
    m_new = gl.maximum(m_i, scale_log2 * gl.max(s_ij, 1))
    alpha = gl.exp2(m_i - m_new)
    p_ij = gl.exp2(scale_log2 * s_ij - m_new[:, None])
    l_i = alpha * l_i + gl.sum(p_ij, 1)
    return p_ij, alpha, m_new, l_i


@gluon.jit
def _masked(s_ij, rows, j, Nq, Nk, CAUSAL: gl.constexpr):
    """-inf where the key does not exist or is in the query's future."""
    S: gl.constexpr = s_ij.type.layout
    cols = j + gl.arange(0, s_ij.shape[1], layout=gl.SliceLayout(0, S))
    visible = (cols < Nk)[None, :]
    if CAUSAL:
        visible = visible & (cols[None, :] <= rows[:, None] + (Nk - Nq))
    return gl.where(visible, s_ij, float("-inf"))


@gluon.jit
def _tile_and_head(item, N, heads, section, BLOCK: gl.constexpr, CAUSAL: gl.constexpr):
    """The first row and the head of a work item, heads counted through all batches.

    Causal: the longest first, among the heads of a section, whose k and v fit L2 together.
    """
    tiles = gl.cdiv(N, BLOCK)
    first = item // (section * tiles) * section
    r = item % (section * tiles)
    here = gl.minimum(section, heads - first)
    tile, head = r // here, first + r % here
    if CAUSAL:
        tile = tiles - 1 - tile
    return tile * BLOCK, head


@gluon.jit
def _tiles_seen(
    i, Nq, Nk, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """Key tiles that any query of the tile sees; at least one, or there would be nothing to do."""
    keys = Nk
    if CAUSAL:
        keys = gl.minimum(Nk, i + BLOCK_Q + Nk - Nq)
    return gl.maximum(1, gl.cdiv(keys, BLOCK_K))


@gluon.jit
def _seen_by_all(i, Nq, Nk, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr):
    """Key tiles that all queries from i on see whole."""
    keys = Nk
    if CAUSAL:
        keys = gl.minimum(Nk, gl.maximum(0, i + 1 + Nk - Nq))
    return keys // BLOCK_K


@triton_mode.on_its_card
def forward(q, k, v, problem, scale, tile):
    """o (B, H, Nq, D), lse (B, H, Nq), by one program for each query tile of each head."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    lse = hbm.empty((B, H, Nq), q, torch.float32)
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), lse.fill_(-torch.inf)
    o = empty_like(q)
    columns = 64 if D <= 64 else 128
    rows = 16 * tile.warps
    Q, O = tiles_of(q, rows, columns), tiles_of(o, rows, columns)
    K, V = tiles_of(k, tile.block_k, columns), tiles_of(v, tile.block_k, columns)
    items = triton.cdiv(Nq, tile.consumers * rows) * B * H
    programs = min(items, triton_mode.sm_count(q.device)) if tile.persistent else items
    forward_kernel[(programs,)](
        Q, K, V, O, lse, scale, H, H // H_kv, Nq, Nk, B * H, min(tile.section, B * H),
        COLUMNS=columns, CAUSAL=problem.causal, BLOCK_K=tile.block_k,
        CONSUMERS=tile.consumers, STAGES=tile.stages, REGISTERS=tile.registers,
        OVERLAP=tile.mode, ROWS=rows, num_warps=tile.warps,
    )  # fmt: skip
    return without_padding(o, q.dtype), lse


def tiles_of(x, rows, columns):
    """x, (B, heads, N, D), as the TMA takes it: in tiles of `rows` × `columns`, zeros beyond D."""
    x = addressable(x)
    block = [1, 1, rows, columns]
    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
