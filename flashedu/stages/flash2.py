"""FlashAttention-2: the online softmax as GPU programs, one for each tile of queries.

What changed from `online`: the outer loop is gone. Each of its passes is a program of its own, and
a GPU runs hundreds of them side by side: the grid is query tiles × heads × batches. A program
keeps q_i, m_i, l_i and acc_i on chip and walks over k and v, so o is written once and never read.

    s = scale · q kᵀ    m_new = max(m, rowmax(s))    α = 2^(m − m_new)    p = 2^(s − m_new)
    l ← α l + rowsum(p)    acc ← α acc + p v    o = acc / l and lse = ln2 · (m + log2 l) at the end

The GPU's exponential is 2^x, so scale takes a factor log2 e, and m is in base 2.

Backward: three kernels and no atomics. delta; then dk and dv, a program for each key tile, which
walks over the queries that see it; then dq, a program for each query tile. P is computed twice,
and in return each gradient has one owner: no sum depends on which program came first.

Source: FlashAttention-2 (arXiv 2307.08691), Algorithms 1 and 2.
"""

import math

import torch

from flashedu.memory.kernels import counted
from flashedu.memory.machine import UNCOUNTED
from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.contract import check, dtype_name
from flashedu.stages.descriptors import (
    columns,
    empty_like,
    in_tiles,
    tiles_of,
    without_padding,
)
from flashedu.stages.flash2_tiles import tiles_for_call

import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0
TINY = torch.finfo(torch.float32).tiny
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))
DELTA_ROWS = 64


def attention(q, k, v, *, causal=False, scale=None, block_q=None, block_k=None, machine=None):
    """softmax(scale · q kᵀ) v by Triton kernels; differentiable.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, bfloat16 or float32, on
    the GPU, or on the CPU where there is none and kernels are interpreted. Any strides.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. block_q, block_k: queries and keys in a tile, powers of two from 16 to 256;
    None takes those tuned for this card.
    machine: a `Machine` that counts what the interpreted kernels move, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract.
    """
    options = dict(causal=causal, scale=scale, block_q=block_q, block_k=block_k, machine=machine)
    return attention_with_lse(q, k, v, **options)[0]


def attention_with_lse(
    q, k, v, *, causal=False, scale=None, block_q=None, block_k=None, machine=None
):
    """As `attention`; returns o and lse.

    lse: (B, H, Nq), float32, the natural log of Σ exp(scale · q kᵀ) over the keys that a query
    sees, −inf if it sees none. Gradients flow through it too.
    """
    problem, scale = check(
        "flash2", q, k, v,
        causal=causal, scale=scale, block_q=block_q, block_k=block_k, machine=machine,
    )  # fmt: skip
    triton_mode.check("flash2", q, machine)
    if machine is not None:
        k, v = k.clone(), v.clone()  # told apart by their addresses, also if k is v
    if scale < TINY:  # the kernels want a positive one
        q, scale = (-q, -scale) if scale <= -TINY else (0 * q, 1.0)
    if machine is None and torch.compiler.is_compiling():
        return flash2_op(q, k, v, problem.causal, scale, block_q or 0, block_k or 0)
    tiles = tiles_for_call(q, problem, block_q, block_k)
    return _Attention.apply(q, k, v, problem, scale, machine or UNCOUNTED, tiles)


# forward


@triton.jit
def forward_kernel(
    Q, K, V, O, LSE, scale, H, Nq, Nk,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one query tile of one head. Q, K, V, O: see `tiles_of`."""
    Q, O = in_tiles(Q, BLOCK_Q, COLUMNS), in_tiles(O, BLOCK_Q, COLUMNS)
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    i, head = tile_and_head(Nq, BLOCK_Q, CAUSAL)
    b, h = head // H, head % H
    rows = i + tl.arange(0, BLOCK_Q)

    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    scale_log2 = scale * LOG2E  # positive: the largest product is the largest score
    seen_by_all, seen_by_any = _keys_seen(i, Nq, Nk, BLOCK_Q, BLOCK_K, CAUSAL)
    for MASKED in tl.static_range(2):  # first the tiles that need no mask
        start, stop = (seen_by_all, seen_by_any) if MASKED else (0, seen_by_all)
        for j in tl.range(start, stop, BLOCK_K):
            k_j = K.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            s_ij = tl.dot(q_i, k_j.T, input_precision="ieee")  # scaled below, with − m
            if MASKED:
                cols = j + tl.arange(0, BLOCK_K)
                visible = _visible(rows, cols, Nq, Nk, CAUSAL)
                s_ij = tl.where(visible, s_ij, float("-inf"))

            m_new = tl.maximum(m_i, scale_log2 * tl.max(s_ij, 1))
            alpha = tl.exp2(m_i - m_new)
            p_ij = tl.exp2(scale_log2 * s_ij - m_new[:, None])
            l_i = alpha * l_i + tl.sum(p_ij, 1)
            v_j = V.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            acc_i = acc_i * alpha[:, None]
            acc_i = tl.dot(p_ij.to(v_j.dtype), v_j, acc_i, input_precision="ieee")
            m_i = m_new

    some = l_i > 0  # False for a row that sees no key
    o_i = acc_i / tl.where(some, l_i, 1)[:, None]
    lse_i = tl.where(some, LN2 * (m_i + tl.log2(tl.where(some, l_i, 1))), float("-inf"))
    O.store([b, h, i, 0], o_i.to(O.dtype).reshape(1, 1, BLOCK_Q, COLUMNS))
    tl.store(LSE + head.to(tl.int64) * Nq + rows, lse_i, mask=rows < Nq)


@triton.jit
def tile_and_head(N, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The first row of this program's tile, and its head, counted through all batches.

    Neighbours have the same head: what they all load, k and v or q and do, stays in L2.
    Causal, the last query tile sees most keys: it starts first, and none ends alone.
    """
    tiles = tl.cdiv(N, BLOCK)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile * BLOCK, head


@triton.jit
def _keys_seen(
    i, Nq, Nk, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """Keys that all queries of tile i see, in whole tiles; keys that any one sees."""
    by_all, by_any = Nk, Nk
    if CAUSAL:
        by_all = tl.minimum(Nk, tl.maximum(0, i + 1 + Nk - Nq))
        by_any = tl.minimum(Nk, tl.maximum(0, i + BLOCK_Q + Nk - Nq))
    return by_all // BLOCK_K * BLOCK_K, by_any


@triton.jit
def _visible(rows, cols, Nq, Nk, CAUSAL: tl.constexpr):
    """(BLOCK_Q or 1, BLOCK_K): True where the key exists and is not in the query's future.

    Queries that do not exist may see what they like: their rows are not stored, and dk and dv take
    their p as 0.
    """
    visible = (cols < Nk)[None, :]
    if CAUSAL:
        visible = visible & (cols[None, :] <= rows[:, None] + Nk - Nq)
    return visible


# backward


@triton.jit
def delta_kernel(O, DO, DELTA, H, Nq, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """delta = rowsum(do ∘ o) of one query tile."""
    O, DO = in_tiles(O, BLOCK_Q, COLUMNS), in_tiles(DO, BLOCK_Q, COLUMNS)
    i, head = tile_and_head(Nq, BLOCK_Q, False)
    b, h = head // H, head % H
    rows = i + tl.arange(0, BLOCK_Q)
    o_i = O.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS).to(tl.float32)
    do_i = DO.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS).to(tl.float32)
    delta_i = tl.sum(do_i * o_i, 1)
    tl.store(DELTA + head.to(tl.int64) * Nq + rows, delta_i, mask=rows < Nq)


@triton.jit
def dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, scale, H_kv, Nq, Nk,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile: it walks over its queries, of all heads it serves.

    The tiles stand on end, (BLOCK_K, BLOCK_Q): pᵀ and dsᵀ are what the products need.
    """
    Q, DO = in_tiles(Q, BLOCK_Q, COLUMNS), in_tiles(DO, BLOCK_Q, COLUMNS)
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    DK, DV = in_tiles(DK, BLOCK_K, COLUMNS), in_tiles(DV, BLOCK_K, COLUMNS)
    j, head_kv = tile_and_head(Nk, BLOCK_K, False)
    b, h_kv = head_kv // H_kv, head_kv % H_kv
    cols = j + tl.arange(0, BLOCK_K)

    k_j = K.load([b, h_kv, j, 0]).reshape(BLOCK_K, COLUMNS)
    v_j = V.load([b, h_kv, j, 0]).reshape(BLOCK_K, COLUMNS)
    dk_j = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    dv_j = tl.zeros([BLOCK_K, COLUMNS], tl.float32)

    first, all_see = 0, 0
    if CAUSAL:  # the first query that sees any key of the tile, the first that sees all
        first = tl.maximum(0, j - (Nk - Nq)) // BLOCK_Q * BLOCK_Q
        all_see = tl.maximum(0, j + BLOCK_K - 1 - (Nk - Nq))
        all_see = tl.minimum(tl.cdiv(all_see, BLOCK_Q), tl.cdiv(Nq, BLOCK_Q)) * BLOCK_Q
    if j + BLOCK_K > Nk:  # keys that do not exist: masked, or their p could overflow
        all_see = tl.cdiv(Nq, BLOCK_Q) * BLOCK_Q
    for g in range(GROUP):
        h = h_kv * GROUP + g
        head_rows = (head_kv * GROUP + g).to(tl.int64) * Nq
        for MASKED in tl.static_range(2):
            start, stop = (first, all_see) if MASKED else (all_see, Nq)
            for i in tl.range(start, stop, BLOCK_Q):
                rows = i + tl.arange(0, BLOCK_Q)
                q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
                lse_i = load_lse(LSE + head_rows, rows, Nq)
                s_ji = tl.dot(k_j, q_i.T, input_precision="ieee") * (scale * LOG2E)
                if MASKED:
                    visible = _visible(rows, cols, Nq, Nk, CAUSAL)
                    s_ji = tl.where(visible.T, s_ji, float("-inf"))
                p_ji = tl.exp2(s_ji - lse_i[None, :])

                do_i = DO.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
                dv_j = tl.dot(p_ji.to(do_i.dtype), do_i, dv_j, input_precision="ieee")
                delta_i = tl.load(DELTA + head_rows + rows, mask=rows < Nq, other=0)
                dp_ji = tl.dot(v_j, do_i.T, input_precision="ieee")
                ds_ji = p_ji * (dp_ji - delta_i[None, :])
                dk_j = tl.dot(ds_ji.to(q_i.dtype), q_i, dk_j, input_precision="ieee")

    dk_j = scale * dk_j
    DK.store([b, h_kv, j, 0], dk_j.to(DK.dtype).reshape(1, 1, BLOCK_K, COLUMNS))
    DV.store([b, h_kv, j, 0], dv_j.to(DV.dtype).reshape(1, 1, BLOCK_K, COLUMNS))


@triton.jit
def dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, scale, H, Nq, Nk,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of one query tile: it walks over the keys that it sees, as the forward."""
    Q, DO = in_tiles(Q, BLOCK_Q, COLUMNS), in_tiles(DO, BLOCK_Q, COLUMNS)
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    DQ = in_tiles(DQ, BLOCK_Q, COLUMNS)
    i, head = tile_and_head(Nq, BLOCK_Q, CAUSAL)
    b, h = head // H, head % H
    rows = i + tl.arange(0, BLOCK_Q)
    head_rows = head.to(tl.int64) * Nq

    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    do_i = DO.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    lse_i = load_lse(LSE + head_rows, rows, Nq)
    delta_i = tl.load(DELTA + head_rows + rows, mask=rows < Nq, other=0)
    dq_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    seen_by_all, seen_by_any = _keys_seen(i, Nq, Nk, BLOCK_Q, BLOCK_K, CAUSAL)
    for MASKED in tl.static_range(2):
        start, stop = (seen_by_all, seen_by_any) if MASKED else (0, seen_by_all)
        for j in tl.range(start, stop, BLOCK_K):
            k_j = K.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            v_j = V.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            s_ij = tl.dot(q_i, k_j.T, input_precision="ieee") * (scale * LOG2E)
            if MASKED:
                cols = j + tl.arange(0, BLOCK_K)
                visible = _visible(rows, cols, Nq, Nk, CAUSAL)
                s_ij = tl.where(visible, s_ij, float("-inf"))
            p_ij = tl.exp2(s_ij - lse_i[:, None])
            dp_ij = tl.dot(do_i, v_j.T, input_precision="ieee")
            ds_ij = p_ij * (dp_ij - delta_i[:, None])
            dq_i = tl.dot(ds_ij.to(k_j.dtype), k_j, dq_i, input_precision="ieee")

    DQ.store([b, h, i, 0], (scale * dq_i).to(DQ.dtype).reshape(1, 1, BLOCK_Q, COLUMNS))


@triton.jit
def load_lse(LSE, rows, Nq):
    """In base 2. +inf where a row sees no key or does not exist: p = 2^−inf is 0."""
    lse_i = tl.load(LSE + rows, mask=rows < Nq, other=float("inf"))
    return tl.where(lse_i == float("-inf"), float("inf"), lse_i) * LOG2E


# launches


@triton_mode.on_its_card
def forward(q, k, v, problem, scale, machine, tile):
    """o (B, H, Nq, D), lse (B, H, Nq), by one program for each query tile of each head.

    Parallel over heads and query tiles: no two programs write the same row.
    """
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    LSE = machine.hbm.scratch("lse", (B, H, Nq, 1), like=q, dtype=torch.float32)
    lse = LSE.data[..., 0]
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), lse.fill_(-torch.inf)
    o = empty_like(q)
    Q, O = tiles_of(q, tile.block_q), tiles_of(o, tile.block_q)
    K, V = tiles_of(k, tile.block_k), tiles_of(v, tile.block_k)

    with counted(machine, "flash2", problem, q=Q, k=K, v=V, o=O, lse=lse):
        forward_kernel[(triton.cdiv(Nq, tile.block_q) * B * H,)](
            Q, K, V, O, lse, scale, H, Nq, Nk,
            GROUP=H // H_kv, COLUMNS=columns(D), CAUSAL=problem.causal,
            BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return without_padding(o, q.dtype), lse


@triton_mode.on_its_card
def backward(do, dlse, q, k, v, o, lse, problem, scale, machine, tiles):
    """dq, dk, dv from do (B, H, Nq, D) and dlse (B, H, Nq), the gradient of lse or None."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    delta = machine.hbm.scratch("delta", (B, H, Nq, 1), like=q, dtype=torch.float32).data[..., 0]
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    sizes = dict(GROUP=H // H_kv, COLUMNS=columns(D), CAUSAL=problem.causal)

    O, DO = tiles_of(o, DELTA_ROWS), tiles_of(do, DELTA_ROWS)
    with counted(machine, "flash2 delta", problem, o=O, do=DO, delta=delta):
        delta_kernel[(triton.cdiv(Nq, DELTA_ROWS) * B * H,)](
            O, DO, delta, H, Nq, COLUMNS=columns(D), BLOCK_Q=DELTA_ROWS
        )
    if dlse is not None:
        delta -= dlse  # ∂lse/∂s = p

    t = tiles.dkdv
    Q, DO = tiles_of(q, t.block_q), tiles_of(do, t.block_q)
    K, V, DK, DV = (tiles_of(x, t.block_k) for x in (k, v, dk, dv))
    arrays = dict(q=Q, k=K, v=V, do=DO, lse=lse, delta=delta)
    with counted(machine, "flash2 dkdv", problem, **arrays, dk=DK, dv=DV):
        dkdv_kernel[(triton.cdiv(Nk, t.block_k) * B * H_kv,)](
            Q, K, V, DO, lse, delta, DK, DV, scale, H_kv, Nq, Nk,
            **sizes, BLOCK_Q=t.block_q, BLOCK_K=t.block_k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    t = tiles.dq
    Q, DO, DQ = (tiles_of(x, t.block_q) for x in (q, do, dq))
    K, V = tiles_of(k, t.block_k), tiles_of(v, t.block_k)
    arrays = dict(q=Q, k=K, v=V, do=DO, lse=lse, delta=delta)
    with counted(machine, "flash2 dq", problem, **arrays, dq=DQ):
        dq_kernel[(triton.cdiv(Nq, t.block_q) * B * H,)](
            Q, K, V, DO, lse, delta, DQ, scale, H, Nq, Nk,
            **sizes, BLOCK_Q=t.block_q, BLOCK_K=t.block_k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return tuple(without_padding(dx, x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))


# for PyTorch


class _Attention(torch.autograd.Function):
    """Hands `forward` and `backward` to PyTorch. Saved for the backward: O(N), never S or P."""

    @staticmethod
    def forward(ctx, q, k, v, problem, scale, machine, tiles):
        o, lse = forward(q, k, v, problem, scale, machine, tiles.forward)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = problem, scale, machine, tiles
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        if torch.is_grad_enabled():  # a result without a graph would drop terms without a word
            raise RuntimeError(
                "create_graph must be False for stage 'flash2': it has first derivatives only"
            )
        q, k, v, o, lse = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        return *backward(do, dlse, q, k, v, o, lse, *ctx.rest), None, None, None, None


# The same as operators, which torch.compile takes whole, without looking inside. A tile size of 0
# is the tuned one. In eager mode their checks would cost more time than a small kernel takes.


@torch.library.custom_op("flashedu::flash2", mutates_args=())
def flash2_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    causal: bool, scale: float, block_q: int, block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`forward`, as an operator."""
    problem = _problem(q, k, causal)
    tiles = tiles_for_call(q, problem, block_q, block_k)
    return forward(q, k, v, problem, scale, UNCOUNTED, tiles.forward)


@flash2_op.register_fake
def _(q, k, v, causal, scale, block_q, block_k):
    return without_padding(empty_like(q), q.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flashedu::flash2_backward", mutates_args=())
def flash2_backward_op(
    do: torch.Tensor, dlse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    causal: bool, scale: float, block_q: int, block_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`backward`, as an operator."""
    problem = _problem(q, k, causal)
    tiles = tiles_for_call(q, problem, block_q, block_k)
    return backward(do, dlse, q, k, v, o, lse, problem, scale, UNCOUNTED, tiles)


@flash2_backward_op.register_fake
def _(do, dlse, q, k, v, *rest):
    return tuple(without_padding(empty_like(x), x.dtype) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    q, k, v, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    gradients = flash2_backward_op(do, dlse, q, k, v, o, lse, *ctx.rest)
    return *gradients, None, None, None, None


flash2_op.register_autograd(_backward, setup_context=_save_for_backward)


def _problem(q, k, causal):
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    return Problem(B=B, H=H, H_kv=H_kv, Nq=Nq, Nk=Nk, D=D, dtype=dtype_name(q), causal=causal)
