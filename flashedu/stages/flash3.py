"""FlashAttention-3: flash2's forward, made for Hopper by warps that do different things.

In flash2 every warp loads, multiplies and takes exponentials in turn, and the matrix units wait
while it does the last. Here one warp only loads; the others, in groups of four, only compute:

    producer:  for each tile of k and v: wait until its place is empty, then have it filled
    consumer:  for each tile of k and v: wait until it is full, compute, and say that it is empty

and a consumer has two products under way while it computes the softmax: p v of the tile before
runs beside it.

Source: FlashAttention-3 (arXiv 2407.08608), Algorithm 1 and section 3.2; written in Gluon.
"""

import functools
import math
from typing import NamedTuple

import torch

from flashedu.memory import hbm
from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.contract import check, dtype_name, refuse_gradients
from flashedu.stages.descriptors import addressable, empty_like, without_padding
from flashedu.stages.gluon_names import load_tile, store_tile

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

LOWEST = gl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0
TINY = torch.finfo(torch.float32).tiny
LN2 = gl.constexpr(math.log(2))
LOG2E = gl.constexpr(1 / math.log(2))


class Tile(NamedTuple):
    """How the forward is cut and who does what."""

    consumers: int  # warpgroups of 64 queries each
    block_k: int = 128
    stages: int = 2  # tiles of k, and of v, on chip
    registers: int = 240  # of a consumer's thread
    q_places: int = 1  # query tiles on chip: with two, the next comes while one is in use
    persistent: bool = False  # one program an SM, that takes one query tile after another
    pairs: bool = False  # causal: a long tile and a short one are one piece of work
    early_k: bool = False  # the first k of a query tile is loaded before its q
    skip: bool = False  # a consumer leaves out the key tiles that only its neighbours see
    if_needed: bool = False  # the mask of the first key tile only where it hides something


TILES = {  # by columns: D, rounded up
    64: Tile(3, registers=160, persistent=True, pairs=True, q_places=2, early_k=True, skip=True),
    128: Tile(2, persistent=True, pairs=True, q_places=2, early_k=True),
}


def attention(q, k, v, *, causal=False, scale=None, machine=None):
    """softmax(scale · q kᵀ) v on a Hopper GPU.

    q: (B, H, Nq, D), D at most 128. k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16 or
    bfloat16, on the GPU. Any strides.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. machine: None, as no kernel of this stage can be counted.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract, RuntimeError on another card.
    """
    return attention_with_lse(q, k, v, causal=causal, scale=scale, machine=machine)[0]


def attention_with_lse(q, k, v, *, causal=False, scale=None, machine=None):
    """As `attention`; returns o and lse.

    lse: (B, H, Nq), float32, the natural log of Σ exp(scale · q kᵀ) over the keys that a query
    sees, −inf if it sees none.
    """
    problem, scale = check("flash3", q, k, v, causal=causal, scale=scale, machine=machine)
    refuse_gradients("flash3", q, k, v)
    _check_card(q)
    triton_mode.check("flash3", q, machine)
    if scale < TINY:  # the kernel wants a positive one
        q, scale = (-q, -scale) if scale <= -TINY else (0 * q, 1.0)
    if torch.compiler.is_compiling():
        return flash3_op(q, k, v, problem.causal, scale)
    return forward(q, k, v, problem, scale, TILES[columns(problem.D)])


def columns(D):
    """Columns of a tile in shared memory: the swizzles are for 64 and 128."""
    return 64 if D <= 64 else 128


def _check_card(q):
    if triton_mode.INTERPRETED:
        raise RuntimeError(
            "stage 'flash3' needs a Hopper GPU, and kernels are interpreted here; "
            "stage 'flash2' would do"
        )
    if q.is_cuda and triton_mode.capability(q) != (9, 0):
        raise RuntimeError(
            f"q must be on a Hopper GPU for stage 'flash3', got "
            f"{torch.cuda.get_device_name(q.device)}; stage 'flash2' would do"
        )


@gluon.jit(do_not_specialize=["H", "group", "Nq", "Nk", "heads"])
def forward_kernel(
    Q, K, V, O, LSE, scale, H, group, Nq, Nk, heads,
    COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_K: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    Q_PLACES: gl.constexpr, PAIRS: gl.constexpr, EARLY_K: gl.constexpr, SKIP: gl.constexpr,
    IF_NEEDED: gl.constexpr,
):  # fmt: skip
    """o and lse of query tiles of CONSUMERS · 64 rows. The warps part here."""
    dtype: gl.constexpr = Q.dtype
    ROWS: gl.constexpr = Q.block_type.shape[2]
    q_i = gl.allocate_shared_memory(dtype, [Q_PLACES * CONSUMERS, 1, 1, ROWS, COLUMNS], Q.layout)
    o_i = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, COLUMNS], O.layout)
    k_j = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, COLUMNS], K.layout)
    v_j = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, COLUMNS], V.layout)
    q_full, q_empty = _barriers(Q_PLACES, 1), _barriers(Q_PLACES, CONSUMERS)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)

    q_tile = (q_i, q_full, q_empty)
    k_tiles, v_tiles = (k_j, k_full, k_empty), (v_j, v_full, v_empty)
    sizes = (H, group, Nq, Nk, heads)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    third: gl.constexpr = 2
    causal: gl.constexpr = CAUSAL
    pairs: gl.constexpr = PAIRS
    early_k: gl.constexpr = EARLY_K
    skip: gl.constexpr = SKIP
    if_needed: gl.constexpr = IF_NEEDED
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (first, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes,
                            causal, pairs, skip, if_needed)),
                (_produce, (Q, K, V, q_tile, k_tiles, v_tiles, sizes, causal, pairs, early_k)),
            ],
            [1], [24],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (first, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes,
                            causal, pairs, skip, if_needed)),
                (_consume, (second, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes,
                            causal, pairs, skip, if_needed)),
                (_produce, (Q, K, V, q_tile, k_tiles, v_tiles, sizes, causal, pairs, early_k)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (first, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes,
                            causal, pairs, skip, if_needed)),
                (_consume, (second, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes,
                            causal, pairs, skip, if_needed)),
                (_consume, (third, q_tile, k_tiles, v_tiles, o_i, O, LSE, scale, sizes,
                            causal, pairs, skip, if_needed)),
                (_produce, (Q, K, V, q_tile, k_tiles, v_tiles, sizes, causal, pairs, early_k)),
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
def _produce(
    Q, K, V, q_tile, k_tiles, v_tiles, sizes, CAUSAL: gl.constexpr, PAIRS: gl.constexpr,
    EARLY_K: gl.constexpr,
):  # fmt: skip
    """Have every tile loaded as soon as there is a place for it."""
    CONSUMERS: gl.constexpr = q_tile[0].shape[0] // q_tile[1].shape[0]
    ROWS: gl.constexpr = q_tile[0].shape[3]
    BLOCK_K: gl.constexpr = k_tiles[0].shape[3]
    H, group, Nq, Nk, heads = sizes
    n = 0
    t = 0
    pieces = _pieces(Nq, heads, CONSUMERS * ROWS, PAIRS)
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head, start, stop, step = _piece(piece, Nq, CONSUMERS * ROWS, CAUSAL, PAIRS)
        b, h = head // H, head % H
        for tile in range(start, stop, step):
            i = tile * CONSUMERS * ROWS
            tiles = _tiles_seen(i, Nq, Nk, CONSUMERS * ROWS, BLOCK_K, CAUSAL)
            if EARLY_K:
                _fill(K, b, h // group, (tiles - 1) * BLOCK_K, k_tiles, t)
            _fill_q(Q, b, h, i, q_tile, n)
            if not EARLY_K:
                _fill(K, b, h // group, (tiles - 1) * BLOCK_K, k_tiles, t)
            _fill(V, b, h // group, (tiles - 1) * BLOCK_K, v_tiles, t)
            t += 1
            for x in range(1, tiles):
                j = (tiles - 1 - x) * BLOCK_K
                _fill(K, b, h // group, j, k_tiles, t)
                _fill(V, b, h // group, j, v_tiles, t)
                t += 1
            n += 1


@gluon.jit
def _fill_q(Q, b, h, i, q_tile, n):
    places, full, empty = q_tile
    Q_PLACES: gl.constexpr = full.shape[0]
    CONSUMERS: gl.constexpr = places.shape[0] // Q_PLACES
    ROWS: gl.constexpr = places.shape[3]
    place, phase = n % Q_PLACES, n // Q_PLACES & 1
    mbarrier.wait(empty.index(place), phase ^ 1)
    mbarrier.expect(full.index(place), CONSUMERS * Q.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        q_c = places.index(place * CONSUMERS + c)
        load_tile(Q, [b, h, i + c * ROWS, 0], full.index(place), q_c)


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
    PAIRS: gl.constexpr, SKIP: gl.constexpr, IF_NEEDED: gl.constexpr,
):  # fmt: skip
    """o and lse of 64 queries of every tile."""
    q_places, q_full, q_empty = q_tile
    Q_PLACES: gl.constexpr = q_full.shape[0]
    CONSUMERS: gl.constexpr = q_places.shape[0] // Q_PLACES
    ROWS: gl.constexpr = q_places.shape[3]
    COLUMNS: gl.constexpr = q_places.shape[4]
    BLOCK_K: gl.constexpr = k_tiles[0].shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, BLOCK_K, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, COLUMNS, 16])
    H, _, Nq, Nk, heads = sizes
    scale_log2 = scale * LOG2E
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    n = 0
    t = 0
    pieces = _pieces(Nq, heads, CONSUMERS * ROWS, PAIRS)
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head, start, stop, step = _piece(piece, Nq, CONSUMERS * ROWS, CAUSAL, PAIRS)
        for tile in range(start, stop, step):
            i = tile * CONSUMERS * ROWS
            tiles = _tiles_seen(i, Nq, Nk, CONSUMERS * ROWS, BLOCK_K, CAUSAL)
            i += C * ROWS
            if SKIP:
                for _ in range(_tiles_seen(i, Nq, Nk, ROWS, BLOCK_K, CAUSAL), tiles):
                    _, k_empty = _full(k_tiles, t)
                    mbarrier.arrive(k_empty, count=1)
                    _, v_empty = _full(v_tiles, t)
                    mbarrier.arrive(v_empty, count=1)
                    t += 1
                tiles = _tiles_seen(i, Nq, Nk, ROWS, BLOCK_K, CAUSAL)
            rows = i + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
            masked = tiles - gl.minimum(_seen_by_all(i, Nq, Nk, BLOCK_K, CAUSAL), tiles)
            last = (tiles - 1) * BLOCK_K

            m_i = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
            l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
            acc_i = gl.zeros([ROWS, COLUMNS], gl.float32, ACC)

            mbarrier.wait(q_full.index(n % Q_PLACES), n // Q_PLACES & 1)
            q_i = q_places.index(n % Q_PLACES * CONSUMERS + C).reshape([ROWS, COLUMNS])
            k_j, k_empty = _full(k_tiles, t)
            s_ij = warpgroup_mma(q_i, k_j.permute((1, 0)), zero, use_acc=False)
            mbarrier.arrive(k_empty, count=1)
            if IF_NEEDED:
                if masked > 0:
                    s_ij = _masked(s_ij, rows, last, Nq, Nk, CAUSAL)
            else:
                s_ij = _masked(s_ij, rows, last, Nq, Nk, CAUSAL)
            t += 1

            for MASKED in gl.static_range(1, -1, -1):  # the tiles that need no mask come last
                begin = 1 if MASKED else gl.maximum(1, masked)
                end = masked if MASKED else tiles
                for x in range(begin, end):
                    p_ij, alpha, m_i, l_i = _softmax(s_ij, m_i, l_i, scale_log2)
                    acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
                    p_16 = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
                    v_j, v_empty = _full(v_tiles, t - 1)
                    acc_i = warpgroup_mma(p_16, v_j, acc_i, is_async=True)
                    k_j, k_empty = _full(k_tiles, t)
                    s_ij = warpgroup_mma(
                        q_i, k_j.permute((1, 0)), zero, use_acc=False, is_async=True
                    )
                    acc_i, s_ij, p_16 = warpgroup_mma_wait(0, deps=[acc_i, s_ij, p_16])
                    mbarrier.arrive(v_empty, count=1)
                    mbarrier.arrive(k_empty, count=1)
                    if MASKED:
                        s_ij = _masked(s_ij, rows, last - x * BLOCK_K, Nq, Nk, CAUSAL)
                    t += 1

            mbarrier.arrive(q_empty.index(n % Q_PLACES), count=1)
            p_ij, alpha, m_i, l_i = _softmax(s_ij, m_i, l_i, scale_log2)
            acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
            p_16 = gl.convert_layout(p_ij.to(O.dtype), gl.DotOperandLayout(0, ACC, 2))
            v_j, v_empty = _full(v_tiles, t - 1)
            acc_i = warpgroup_mma(p_16, v_j, acc_i, is_async=True)
            acc_i, p_16 = warpgroup_mma_wait(0, deps=[acc_i, p_16])
            mbarrier.arrive(v_empty, count=1)

            some = l_i > 0  # False for a row that sees no key
            l_some = gl.where(some, l_i, 1.0)
            lse_i = gl.where(some, LN2 * (m_i + gl.log2(l_some)), float("-inf"))
            gl.store(LSE + head.to(gl.int64) * Nq + rows, lse_i, mask=rows < Nq)
            o_i = acc_i * gl.convert_layout(1 / l_some, gl.SliceLayout(1, ACC))[:, None]
            tma.store_wait(0)  # of the tile before
            o_tile.index(C).reshape([ROWS, COLUMNS]).store(o_i.to(O.dtype))
            fence_async_shared()
            store_tile(O, [head // H, head % H, i, 0], o_tile.index(C))
            n += 1
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
def _pieces(N, heads, BLOCK: gl.constexpr, PAIRS: gl.constexpr):
    """How many pieces of work there are."""
    tiles = gl.cdiv(N, BLOCK)
    return heads * gl.cdiv(tiles, 2) if PAIRS else heads * tiles


@gluon.jit
def _piece(piece, N, BLOCK: gl.constexpr, CAUSAL: gl.constexpr, PAIRS: gl.constexpr):
    """The head, heads counted through all batches, and the range of query tiles of a piece.

    A pair is tile x and tile x from the end: all pairs of a head see as many keys.
    """
    tiles = gl.cdiv(N, BLOCK)
    if PAIRS:
        half = gl.cdiv(tiles, 2)
        head, x = piece // half, piece % half
        start, stop, step = x, tiles - x, gl.maximum(1, tiles - 1 - 2 * x)
    else:
        head, x = piece // tiles, piece % tiles
        if CAUSAL:  # the longest first
            x = tiles - 1 - x
        start, stop, step = x, x + 1, 1
    return head, start, stop, step


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
    Q, O = tiles_of(q, 64), tiles_of(o, 64)
    K, V = tiles_of(k, tile.block_k), tiles_of(v, tile.block_k)
    pairs = tile.pairs and problem.causal
    tiles = triton.cdiv(Nq, tile.consumers * 64)
    pieces = B * H * (triton.cdiv(tiles, 2) if pairs else tiles)
    programs = min(pieces, triton_mode.sm_count(q.device)) if tile.persistent else pieces
    forward_kernel[(programs,)](
        Q, K, V, O, lse, scale, H, H // H_kv, Nq, Nk, B * H,
        COLUMNS=columns(D), CAUSAL=problem.causal, BLOCK_K=tile.block_k,
        CONSUMERS=tile.consumers, STAGES=tile.stages, REGISTERS=tile.registers,
        Q_PLACES=tile.q_places, PAIRS=pairs, EARLY_K=tile.early_k,
        SKIP=tile.skip and problem.causal, IF_NEEDED=tile.if_needed, num_warps=4,
    )  # fmt: skip
    return without_padding(o, q.dtype), lse


def tiles_of(x, rows):
    """x, (B, heads, N, D), as the TMA takes it: in tiles of `rows` rows, with zeros beyond D."""
    x = addressable(x)
    block = [1, 1, rows, columns(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(x.dtype, *block))


@functools.cache  # finding it takes longer than the launch
def _layout(dtype, *block):
    """How a tile lies in shared memory: swizzled, as the TMA writes it and wgmma reads it."""
    dtype = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


# for torch.compile, which takes it whole


@torch.library.custom_op("flashedu::flash3", mutates_args=())
def flash3_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward`, as an operator."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    p = Problem(B=B, H=H, H_kv=H_kv, Nq=Nq, Nk=Nk, D=D, dtype=dtype_name(q), causal=causal)
    return forward(q, k, v, p, scale, TILES[columns(D)])


@flash3_op.register_fake
def _(q, k, v, causal, scale):
    return without_padding(empty_like(q), q.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)
