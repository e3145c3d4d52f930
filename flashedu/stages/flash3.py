"""FlashAttention-3: flash2's forward, for Hopper, by warps that do different things.

In flash2 every warp loads, multiplies and takes exponentials in turn, and the matrix
units wait while it does the last. Here one warp only loads, and groups of four, the
consumers, only compute. Between them are places for tiles on chip:

    producer:  for each tile of k and v: wait until its place is empty, have it filled
    consumer:  for each tile of k and v: wait until it is full, compute, call it empty

A unit of its own (the TMA) brings the tiles, and a barrier in shared memory opens when
one has come. A consumer starts two products at once (asynchronous wgmma), p v of one
key tile and q kᵀ of the next; while it waits for them, its neighbours have their
exponentials. Registers go where they are needed: a thread that only loads keeps 24.

A program stays on its SM and takes query tiles until there are none: the next one is
loaded while this one's last product runs and its o is stored.

Source: FlashAttention-3 (arXiv 2407.08608), Algorithm 1 and section 3.1.
"""

import math

import torch

from flashedu.memory import hbm
from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.contract import check, dtype_name, gradients_wanted
from flashedu.stages.descriptors import empty_like, without_padding
from flashedu.stages.flash3_backward import backward
from flashedu.stages.gluon_names import store_tile
from flashedu.stages.hopper import (
    columns,
    fill,
    pieces_of,
    places,
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

LOWEST = gl.constexpr(torch.finfo(torch.float32).min)  # not -inf: no key gives 0
TINY = torch.finfo(torch.float32).tiny
SMALLEST_SCALE = 1e-30  # lse / scale fits float32
LN2 = gl.constexpr(math.log(2))
LOG2E = gl.constexpr(1 / math.log(2))

ROWS = gl.constexpr(64)  # queries of a consumer: what one wgmma takes
BLOCK_K = gl.constexpr(128)  # keys of a tile; with 64, 14 to 19% slower (D 128, N 16384)
STAGES = gl.constexpr(2)  # tiles of k, and of v, on chip: no more fit at D 128
Q_TILES = gl.constexpr(1)  # on chip. With the next one too, 6% slower (D 128, full, N 16384)
PRODUCER_REGISTERS = gl.constexpr(24)  # of a thread: the fewest there can be
SM_REGISTERS = 64 * 1024
WARPGROUP = 128  # threads: the four warps of a consumer


def consumers_for(columns, causal, N):
    """Consumers of a program: the more there are, the more a key tile serves.

    At D 128 acc_i and s_ij take 64 registers each of a consumer's thread, p_ij 32:
    there are enough for two. At D 64 three are 4 to 17% faster than two at N 4096 and
    16384; causal at N 1024 two are, by 28%: 192 queries are too coarse a tile (H100,
    torch 2.11, triton 3.6, `flashedu bench steps`, 2026-11-25).
    """
    return 2 if columns == 128 or (causal and N <= 2048) else 3


def registers_for(consumers):
    """Of a consumer's thread: its share of the SM's, by eights, as they are given."""
    left = SM_REGISTERS // WARPGROUP - PRODUCER_REGISTERS.value
    return left // consumers // 8 * 8


def attention(
    q, k, v, *, causal=False, scale=None, deterministic=False, machine=None
):  # fmt: skip
    """softmax(scale · q kᵀ) v on a Hopper GPU; differentiable, see below.

    q: (B, H, Nq, D), D at most 128. k, v: (B, H_kv, Nk, D), H a multiple of H_kv.
    float16 or bfloat16, on the GPU. Any strides.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. machine: None, as no kernel of this stage can be counted.
    deterministic: o, lse, dk and dv are the same, to the bit, in every run. With True
    dq is too, and the backward slower. Where PyTorch's deterministic algorithms are in
    use (torch.use_deterministic_algorithms), it is True.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract, RuntimeError on
    another card.
    """
    options = dict(causal=causal, scale=scale, deterministic=deterministic)
    return attention_with_lse(q, k, v, **options, machine=machine)[0]


def attention_with_lse(
    q, k, v, *, causal=False, scale=None, deterministic=False, machine=None
):  # fmt: skip
    """As `attention`; returns o and lse.

    lse: (B, H, Nq), float32, the natural log of Σ exp(scale · q kᵀ) over the keys that
    a query sees, −inf if it sees none. Gradients flow through it too.
    """
    options = dict(causal=causal, scale=scale, machine=machine)
    problem, scale = check("flash3", q, k, v, **options)
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
    _check_card(q)
    triton_mode.check("flash3", q, machine)
    q, scale = _scaled(q, scale)
    deterministic |= torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():
        return flash3_op(q, k, v, problem.causal, scale, deterministic)
    if gradients_wanted(q, k, v):
        return _Attention.apply(q, k, v, problem, scale, deterministic)
    return forward(q, k, v, problem, scale)


def _scaled(q, scale):
    """q and a scale with the same product, and the scale as kernels want it.

    Positive, so that the largest product is the largest score; and not so small that
    the backward, which divides by it, leaves float32.
    """
    if scale < 0:
        q, scale = -q, -scale
    if scale < TINY:
        return 0 * q, 1.0
    if scale < SMALLEST_SCALE:
        return 2.0**-30 * q, 2.0**30 * scale
    return q, scale


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


@gluon.jit(do_not_specialize=["H", "group", "Nq", "Nk", "pieces"])
def forward_kernel(
    Q, K, V, O, LSE, scale, H, group, Nq, Nk, pieces,
    COLUMNS: gl.constexpr, CAUSAL: gl.constexpr,
    BLOCK_Q: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """o and lse of all query tiles. Here the warps part."""
    CONSUMERS: gl.constexpr = BLOCK_Q // ROWS
    q_tiles = places(Q, Q_TILES * CONSUMERS, ROWS, COLUMNS, 1)
    k_tiles = places(K, STAGES, BLOCK_K, COLUMNS, CONSUMERS)
    v_tiles = places(V, STAGES, BLOCK_K, COLUMNS, CONSUMERS)
    shape: gl.constexpr = [CONSUMERS, 1, 1, ROWS, COLUMNS]
    o_tiles = gl.allocate_shared_memory(O.dtype, shape, O.layout)

    sizes = (H, group, Nq, Nk, pieces)
    on_chip = (q_tiles, k_tiles, v_tiles)
    causal: gl.constexpr = CAUSAL  # Gluon passes on only what it has named itself
    gl.warp_specialize(  # the four warps that are here become the first consumer
        [
            (_consume, (C, on_chip, o_tiles, O, LSE, scale, sizes, causal))
            if C < CONSUMERS
            else (_produce, (Q, K, V, on_chip, sizes, causal))
            for C in (0, 1, 2, 3)[: CONSUMERS + 1]
        ],
        [4] * (CONSUMERS - 1) + [1],  # warps of the others
        [REGISTERS] * (CONSUMERS - 1) + [PRODUCER_REGISTERS],
    )


@gluon.jit
def _full(tiles, t):
    """Tile t, when it has come, and the barrier to arrive at when it is used."""
    room, full, empty = tiles
    COUNT: gl.constexpr = room.shape[0]
    shape: gl.constexpr = [room.shape[3], room.shape[4]]
    place, phase = t % COUNT, t // COUNT & 1
    mbarrier.wait(full.index(place), phase)
    return room.index(place).reshape(shape), empty.index(place)


@gluon.jit
def _produce(Q, K, V, on_chip, sizes, CAUSAL: gl.constexpr):
    """One warp: have every tile loaded as soon as there is a place for it."""
    q_tiles, k_tiles, v_tiles = on_chip
    CONSUMERS: gl.constexpr = q_tiles[0].shape[0] // Q_TILES
    BLOCK_Q: gl.constexpr = CONSUMERS * ROWS
    H, group, Nq, Nk, pieces = sizes
    n, t = 0, 0  # query tiles and key tiles so far
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head, start, stop, step = tiles_of_piece(piece, Nq, BLOCK_Q, CAUSAL)
        b, h = head // H, head % H
        for tile in range(start, stop, step):
            i = tile * BLOCK_Q
            for C in gl.static_range(CONSUMERS):
                fill(Q, b, h, i + C * ROWS, q_tiles, n * CONSUMERS + C)
            n += 1
            _, seen = _tiles_seen(i, Nq, Nk, BLOCK_Q, CAUSAL)
            for x in range(seen):
                j = (seen - 1 - x) * BLOCK_K  # the last first: they are masked
                fill(K, b, h // group, j, k_tiles, t)
                fill(V, b, h // group, j, v_tiles, t)
                t += 1


@gluon.jit
def _consume(
    C: gl.constexpr, on_chip, o_tiles, O, LSE, scale, sizes, CAUSAL: gl.constexpr
):  # fmt: skip
    """Four warps, consumer C: o and lse of its 64 queries of every query tile."""
    q_tiles, k_tiles, v_tiles = on_chip
    CONSUMERS: gl.constexpr = o_tiles.shape[0]
    BLOCK_Q: gl.constexpr = CONSUMERS * ROWS
    COLUMNS: gl.constexpr = o_tiles.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    H, _, Nq, Nk, pieces = sizes
    scale_log2 = scale * LOG2E
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, S)
    n, t = 0, 0  # query tiles and key tiles so far, as the producer counts
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        head, start, stop, step = tiles_of_piece(piece, Nq, BLOCK_Q, CAUSAL)
        for tile in range(start, stop, step):
            _, seen = _tiles_seen(tile * BLOCK_Q, Nq, Nk, BLOCK_Q, CAUSAL)
            i = tile * BLOCK_Q + C * ROWS
            rows = i + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
            seen_by_all, seen_by_any = _tiles_seen(i, Nq, Nk, ROWS, CAUSAL)
            for _ in range(seen_by_any, seen):  # key tiles for later queries only
                _, k_used = _full(k_tiles, t)
                _, v_used = _full(v_tiles, t)
                mbarrier.arrive(k_used, count=1)
                mbarrier.arrive(v_used, count=1)
                t += 1

            m_i = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
            l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
            acc_i = gl.zeros([ROWS, COLUMNS], gl.float32, ACC)

            q_i, q_used = _full(q_tiles, n * CONSUMERS + C)
            n += 1
            k_j, k_used = _full(k_tiles, t)
            s_ij = warpgroup_mma(q_i, k_j.permute((1, 0)), zero, use_acc=False)
            mbarrier.arrive(k_used, count=1)
            j = (seen_by_any - 1) * BLOCK_K
            s_ij = _masked(s_ij, rows, j, Nq, Nk, CAUSAL)

            masked = seen_by_any - seen_by_all
            for WHOLE in gl.static_range(2):  # then the tiles that need no mask
                begin = gl.maximum(1, masked) if WHOLE else 1
                end = seen_by_any if WHOLE else masked
                for _ in range(begin, end):
                    p_ij, m_i, l_i, acc_i = _softmax(
                        s_ij, m_i, l_i, acc_i, scale_log2, O.dtype
                    )  # fmt: skip
                    v_j, v_used = _full(v_tiles, t)
                    acc_i = warpgroup_mma(p_ij, v_j, acc_i, is_async=True)
                    k_j, k_used = _full(k_tiles, t + 1)
                    k_t = k_j.permute((1, 0))
                    s_ij = warpgroup_mma(q_i, k_t, zero, use_acc=False, is_async=True)
                    acc_i, s_ij, p_ij = warpgroup_mma_wait(0, deps=[acc_i, s_ij, p_ij])
                    mbarrier.arrive(v_used, count=1)
                    mbarrier.arrive(k_used, count=1)
                    t += 1
                    j -= BLOCK_K
                    if not WHOLE:
                        s_ij = _masked(s_ij, rows, j, Nq, Nk, CAUSAL)

            mbarrier.arrive(q_used, count=1)
            p_ij, m_i, l_i, acc_i = _softmax(s_ij, m_i, l_i, acc_i, scale_log2, O.dtype)
            v_j, v_used = _full(v_tiles, t)
            acc_i = warpgroup_mma(p_ij, v_j, acc_i, is_async=True)
            acc_i, p_ij = warpgroup_mma_wait(0, deps=[acc_i, p_ij])
            mbarrier.arrive(v_used, count=1)
            t += 1

            some = l_i > 0  # False for a row that sees no key
            l_some = gl.where(some, l_i, 1.0)
            lse_i = gl.where(some, LN2 * (m_i + gl.log2(l_some)), float("-inf"))
            gl.store(LSE + head.to(gl.int64) * Nq + rows, lse_i, mask=rows < Nq)
            o_i = acc_i * gl.convert_layout(1 / l_some, gl.SliceLayout(1, ACC))[:, None]
            o_tile = o_tiles.index(C)
            tma.store_wait(0)  # of the tile before
            o_tile.reshape([ROWS, COLUMNS]).store(o_i.to(O.dtype))
            fence_async_shared()  # the TMA sees what was written
            store_tile(O, [head // H, head % H, i, 0], o_tile)
    tma.store_wait(0)


@gluon.jit
def _softmax(s_ij, m_i, l_i, acc_i, scale_log2, dtype: gl.constexpr):
    """A step of the online softmax, as in flash2; p_ij as wgmma takes it."""
    ACC: gl.constexpr = acc_i.type.layout
    m_new = gl.maximum(m_i, scale_log2 * gl.max(s_ij, 1))
    alpha = gl.exp2(m_i - m_new)
    p_ij = gl.exp2(scale_log2 * s_ij - m_new[:, None])
    l_i = alpha * l_i + gl.sum(p_ij, 1)
    acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
    p_ij = gl.convert_layout(p_ij.to(dtype), gl.DotOperandLayout(0, ACC, 2))
    return p_ij, m_new, l_i, acc_i


@gluon.jit
def _masked(s_ij, rows, j, Nq, Nk, CAUSAL: gl.constexpr):
    """-inf where the key does not exist or is in the query's future."""
    S: gl.constexpr = s_ij.type.layout
    cols = j + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, S))
    visible = (cols < Nk)[None, :]
    if CAUSAL:
        visible = visible & (cols[None, :] <= rows[:, None] + (Nk - Nq))
    return gl.where(visible, s_ij, float("-inf"))


@gluon.jit
def _tiles_seen(i, Nq, Nk, COUNT: gl.constexpr, CAUSAL: gl.constexpr):
    """Key tiles that all of COUNT queries from i on see whole; that any of them sees.

    The second is at least one, and hidden, where there is none: every query tile takes
    the same steps.
    """
    by_all, by_any = Nk, Nk
    if CAUSAL:
        by_all = gl.minimum(Nk, gl.maximum(0, i + 1 + Nk - Nq))
        by_any = gl.minimum(Nk, i + COUNT + Nk - Nq)
    return by_all // BLOCK_K, gl.maximum(1, gl.cdiv(by_any, BLOCK_K))


@triton_mode.on_its_card
def forward(q, k, v, problem, scale):
    """o (B, H, Nq, D), lse (B, H, Nq), by one program for each SM.

    They share out the query tiles of all heads: no two write the same row.
    """
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    lse = hbm.empty((B, H, Nq), q, torch.float32)
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), lse.fill_(-torch.inf)
    o = empty_like(q)
    Q, O = tiles_of(q, ROWS.value), tiles_of(o, ROWS.value)
    K, V = tiles_of(k, BLOCK_K.value), tiles_of(v, BLOCK_K.value)
    consumers = consumers_for(columns(D), problem.causal, Nk)
    block_q = consumers * ROWS.value
    pieces = pieces_of(Nq, block_q, B * H, problem.causal)
    forward_kernel[(min(pieces, triton_mode.sm_count(q.device)),)](
        Q, K, V, O, lse, scale, H, H // H_kv, Nq, Nk, pieces,
        COLUMNS=columns(D), CAUSAL=problem.causal,
        BLOCK_Q=block_q, REGISTERS=registers_for(consumers), num_warps=4,
    )  # fmt: skip
    return without_padding(o, q.dtype), lse


# for PyTorch


class _Attention(torch.autograd.Function):
    """Hands `forward` and `backward` to PyTorch. Saved for the backward: O(N)."""

    @staticmethod
    def forward(ctx, q, k, v, problem, scale, deterministic):
        o, lse = forward(q, k, v, problem, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = problem, scale, deterministic
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        if torch.is_grad_enabled():  # a result without a graph would drop terms
            raise RuntimeError(
                "create_graph must be False for stage 'flash3': it has first derivatives only"
            )
        q, k, v, o, lse = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        problem, scale, deterministic = ctx.rest
        gradients = backward(
            q, k, v, o, lse, do, problem, scale, deterministic, dlse
        )  # fmt: skip
        return *gradients, None, None, None


# The same as operators, which torch.compile takes whole, without looking inside.


@torch.library.custom_op("flashedu::flash3", mutates_args=())
def flash3_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    causal: bool, scale: float, deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`forward`, as an operator. `deterministic` is for its backward."""
    return forward(q, k, v, _problem(q, k, causal), scale)


@flash3_op.register_fake
def _(q, k, v, causal, scale, deterministic):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return without_padding(empty_like(q), q.dtype), lse


@torch.library.custom_op("flashedu::flash3_backward", mutates_args=())
def flash3_backward_op(
    do: torch.Tensor, dlse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    o: torch.Tensor, lse: torch.Tensor,
    causal: bool, scale: float, deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`backward`, as an operator."""
    problem = _problem(q, k, causal)
    return backward(q, k, v, o, lse, do, problem, scale, deterministic, dlse)


@flash3_backward_op.register_fake
def _(do, dlse, q, k, v, *rest):
    return tuple(without_padding(empty_like(x), x.dtype) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    o = ctx.saved_tensors[3]
    do = torch.zeros_like(o) if do is None else do
    gradients = flash3_backward_op(do, dlse, *ctx.saved_tensors, *ctx.rest)
    return *gradients, None, None, None


flash3_op.register_autograd(_backward, setup_context=_save_for_backward)


def _problem(q, k, causal):
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    sizes = dict(B=B, H=H, H_kv=H_kv, Nq=Nq, Nk=Nk, D=D)
    return Problem(**sizes, dtype=dtype_name(q), causal=causal)
