"""Variable length: FlashAttention-2 where each query has its own run of keys.

What changed from `flash2`: the mask. A batch of texts of different lengths, padded to the longest,
is mostly padding. Put the texts one behind another instead, as one long sequence, and let each
query see the keys of its own text only. For that a kernel needs two numbers a query: the first key
that it sees, and the one behind the last (`flashedu.stages.runs`). A causal mask, a sliding window
and padding are such runs too, and are the same two numbers to this kernel.

The rest is flash2. A tile of queries visits the key tiles from the least `first` to the greatest
`stop` of its rows. Those that all its rows see need no mask; they lie in the middle, so the masked
ones are at both ends. Backward, a key tile visits the queries that see it; which these are is
found before, by searching the runs.

What it costs: two integers a query, and a tile that holds the end of one text and the beginning of
the next visits the keys of both, mostly masked. What it gains: nothing is computed for padding.
All values must be finite, also those of other texts: 0 · inf is no 0.

Source: FlashAttention-2 (arXiv 2307.08691), Algorithms 1 and 2; its flash_attn_varlen_func.
"""

import math

import torch

from flashedu.memory.kernels import counted
from flashedu.memory.machine import UNCOUNTED
from flashedu.memory.problem import Problem
from flashedu.stages import runs as runs_of
from flashedu.stages import triton_mode
from flashedu.stages.contract import check, dtype_name
from flashedu.stages.descriptors import (
    columns,
    empty_like,
    in_tiles,
    tiles_of,
    without_padding,
)
from flashedu.stages.flash2 import DELTA_ROWS, TINY, delta_kernel, load_lse, tile_and_head
from flashedu.stages.flash2_tiles import tiles_for_call

import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))


def attention(
    q, k, v, *, causal=False, scale=None, runs=None, block_q=None, block_k=None, machine=None
):
    """softmax(scale · q kᵀ) v by Triton kernels, over a run of keys for each query; differentiable.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, bfloat16 or float32, on
    the GPU, or on the CPU where there is none and kernels are interpreted. Any strides. Texts one
    behind another are one batch: B is 1, and N is the sum of their lengths.
    runs: the keys that each query sees, as `runs.packed(lengths)` makes them; None for all, or with
    causal those up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. block_q, block_k: queries and keys in a tile, powers of two from 16 to 256;
    None takes those tuned for this card.
    machine: a `Machine` that counts what the interpreted kernels move, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract.
    """
    options = dict(causal=causal, scale=scale, runs=runs, block_q=block_q, block_k=block_k)
    return attention_with_lse(q, k, v, **options, machine=machine)[0]


def attention_with_lse(
    q, k, v, *, causal=False, scale=None, runs=None, block_q=None, block_k=None, machine=None
):
    """As `attention`; returns o and lse.

    lse: (B, H, Nq), float32, the natural log of Σ exp(scale · q kᵀ) over the keys that a query
    sees, −inf if it sees none. Gradients flow through it too.
    """
    problem, scale = check(
        "varlen", q, k, v,
        causal=causal, scale=scale, runs=runs, block_q=block_q, block_k=block_k, machine=machine,
    )  # fmt: skip
    triton_mode.check("varlen", q, machine)
    if machine is not None:
        k, v = k.clone(), v.clone()  # told apart by their addresses, also if k is v
    if scale < TINY:  # the kernels want a positive one
        q, scale = (-q, -scale) if scale <= -TINY else (0 * q, 1.0)
    if runs is None:
        sizes = problem.B, problem.Nq, problem.Nk
        runs = runs_of.everywhere(*sizes, causal=problem.causal, device=q.device)
    first, stop = (x.contiguous() for x in runs)
    if machine is None and torch.compiler.is_compiling():
        return varlen_op(q, k, v, first, stop, scale, block_q or 0, block_k or 0)
    tiles = _tiles(q, problem, block_q, block_k)
    return _Attention.apply(q, k, v, first, stop, problem, scale, machine or UNCOUNTED, tiles)


# forward


@triton.jit
def forward_kernel(
    Q, K, V, O, LSE, FIRST, STOP, scale, H, Nq, Nk,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one query tile of one head. FIRST, STOP: the runs, (B, Nq)."""
    Q, O = in_tiles(Q, BLOCK_Q, COLUMNS), in_tiles(O, BLOCK_Q, COLUMNS)
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    i, head = tile_and_head(Nq, BLOCK_Q, True)
    b, h = head // H, head % H
    rows = i + tl.arange(0, BLOCK_Q)
    first_i, stop_i = _load_runs(FIRST, STOP, b, rows, Nq, Nk)

    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    scale_log2 = scale * LOG2E  # positive: the largest product is the largest score
    begin, all_begin, all_end, end = _keys_seen(first_i, stop_i, Nk, BLOCK_K)
    seen_by_all = all_end - all_begin
    for MASKED in tl.static_range(2):  # first the tiles in the middle, that need no mask
        start, stop = (begin, end - seen_by_all) if MASKED else (all_begin, all_end)
        for step in tl.range(start, stop, BLOCK_K):
            j = step + tl.where(step >= all_begin, seen_by_all, 0) if MASKED else step
            k_j = K.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            s_ij = tl.dot(q_i, k_j.T, input_precision="ieee")  # scaled below, with − m
            if MASKED:
                visible = _visible(first_i, stop_i, j + tl.arange(0, BLOCK_K))
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
def _load_runs(FIRST, STOP, b, rows, Nq, Nk):
    """first and stop, 0 to Nk. Rows beyond the last have its run, so that they widen none."""
    here = b.to(tl.int64) * Nq + tl.minimum(rows, Nq - 1)
    first_i = tl.minimum(tl.maximum(tl.load(FIRST + here), 0), Nk)
    stop_i = tl.minimum(tl.maximum(tl.load(STOP + here), 0), Nk)
    return first_i, stop_i


@triton.jit
def _keys_seen(first_i, stop_i, Nk, BLOCK_K: tl.constexpr):
    """Where the key tiles that any row sees begin and end, and those that all rows see.

    begin ≤ all_begin ≤ all_end ≤ end, or end ≤ begin if no row sees a key.
    """
    some = first_i < stop_i
    begin = tl.min(tl.where(some, first_i, Nk)) // BLOCK_K * BLOCK_K
    end = tl.max(tl.where(some, stop_i, 0))
    all_begin = tl.cdiv(tl.max(first_i), BLOCK_K) * BLOCK_K
    all_end = tl.min(stop_i) // BLOCK_K * BLOCK_K
    if all_end <= all_begin:
        all_begin = begin
        all_end = begin
    return begin, all_begin, all_end, end


@triton.jit
def _visible(first_i, stop_i, cols):
    """(BLOCK_Q, BLOCK_K): True where a key is in the run of a query."""
    return (cols[None, :] >= first_i[:, None]) & (cols[None, :] < stop_i[:, None])


# backward


@triton.jit
def dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, FIRST, STOP, SEEN, scale, H_kv, Nq, Nk,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile: it walks over the queries that see it, of all heads it serves.

    The tiles stand on end, (BLOCK_K, BLOCK_Q). SEEN: see `queries_that_see`.
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

    seen = SEEN + 4 * (b * tl.cdiv(Nk, BLOCK_K) + j // BLOCK_K)
    begin, end = tl.load(seen) // BLOCK_Q * BLOCK_Q, tl.load(seen + 3)
    all_begin = tl.cdiv(tl.load(seen + 1), BLOCK_Q) * BLOCK_Q
    all_end = tl.load(seen + 2)
    if all_end < Nq:  # rows beyond the last do no harm: their p is 0
        all_end = all_end // BLOCK_Q * BLOCK_Q
    all_end = tl.cdiv(all_end, BLOCK_Q) * BLOCK_Q
    if all_end <= all_begin:
        all_begin = begin
        all_end = begin
    see_all = all_end - all_begin
    for g in range(GROUP):
        h = h_kv * GROUP + g
        head_rows = (head_kv * GROUP + g).to(tl.int64) * Nq
        for MASKED in tl.static_range(2):
            start, stop = (begin, end - see_all) if MASKED else (all_begin, all_end)
            for step in tl.range(start, stop, BLOCK_Q):
                i = step + tl.where(step >= all_begin, see_all, 0) if MASKED else step
                rows = i + tl.arange(0, BLOCK_Q)
                q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
                lse_i = load_lse(LSE + head_rows, rows, Nq)
                s_ji = tl.dot(k_j, q_i.T, input_precision="ieee") * (scale * LOG2E)
                if MASKED:
                    first_i, stop_i = _load_runs(FIRST, STOP, b, rows, Nq, Nk)
                    s_ji = tl.where(_visible(first_i, stop_i, cols).T, s_ji, float("-inf"))
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
    Q, K, V, DO, LSE, DELTA, DQ, FIRST, STOP, scale, H, Nq, Nk,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of one query tile: it walks over the keys that it sees, as the forward."""
    Q, DO = in_tiles(Q, BLOCK_Q, COLUMNS), in_tiles(DO, BLOCK_Q, COLUMNS)
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    DQ = in_tiles(DQ, BLOCK_Q, COLUMNS)
    i, head = tile_and_head(Nq, BLOCK_Q, True)
    b, h = head // H, head % H
    rows = i + tl.arange(0, BLOCK_Q)
    head_rows = head.to(tl.int64) * Nq
    first_i, stop_i = _load_runs(FIRST, STOP, b, rows, Nq, Nk)

    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    do_i = DO.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    lse_i = load_lse(LSE + head_rows, rows, Nq)
    delta_i = tl.load(DELTA + head_rows + rows, mask=rows < Nq, other=0)
    dq_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    begin, all_begin, all_end, end = _keys_seen(first_i, stop_i, Nk, BLOCK_K)
    seen_by_all = all_end - all_begin
    for MASKED in tl.static_range(2):
        start, stop = (begin, end - seen_by_all) if MASKED else (all_begin, all_end)
        for step in tl.range(start, stop, BLOCK_K):
            j = step + tl.where(step >= all_begin, seen_by_all, 0) if MASKED else step
            k_j = K.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            v_j = V.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            s_ij = tl.dot(q_i, k_j.T, input_precision="ieee") * (scale * LOG2E)
            if MASKED:
                visible = _visible(first_i, stop_i, j + tl.arange(0, BLOCK_K))
                s_ij = tl.where(visible, s_ij, float("-inf"))
            p_ij = tl.exp2(s_ij - lse_i[:, None])
            dp_ij = tl.dot(do_i, v_j.T, input_precision="ieee")
            ds_ij = p_ij * (dp_ij - delta_i[:, None])
            dq_i = tl.dot(ds_ij.to(k_j.dtype), k_j, dq_i, input_precision="ieee")

    DQ.store([b, h, i, 0], (scale * dq_i).to(DQ.dtype).reshape(1, 1, BLOCK_Q, COLUMNS))


def queries_that_see(first, stop, Nk, block_k):
    """For each tile of block_k keys, four queries: (B, tiles, 4), int32.

    The first and the one behind the last that see a key of it; between them, the first and the one
    behind the last of those that see all of it. The maximum so far, and the minimum from here on,
    only grow along the queries, so each is found by bisection.
    """
    first, stop = first.clamp(0, Nk), stop.clamp(0, Nk)

    def so_far(x):
        return x.cummax(1).values

    def from_here_on(x):
        return x.flip(1).cummin(1).values.flip(1)

    start = torch.arange(0, Nk, block_k, dtype=torch.int32, device=first.device)
    start = start.expand(len(first), -1).contiguous()
    whole = start + block_k
    seen = (
        torch.searchsorted(so_far(stop), start, right=True),  # before it, no stop > start
        torch.searchsorted(from_here_on(stop), whole),  # from it on, each stop ≥ start + block_k
        torch.searchsorted(so_far(first), start, right=True),  # before it, each first ≤ start
        torch.searchsorted(from_here_on(first), whole.clamp(max=Nk)),  # from it on, no first < end
    )
    return torch.stack(seen, -1).to(torch.int32)


# launches


@triton_mode.on_its_card
def forward(q, k, v, first, stop, problem, scale, machine, tile):
    """o (B, H, Nq, D), lse (B, H, Nq), by one program for each query tile of each head."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    LSE = machine.hbm.scratch("lse", (B, H, Nq, 1), like=q, dtype=torch.float32)
    lse = LSE.data[..., 0]
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), lse.fill_(-torch.inf)
    o = empty_like(q)
    Q, O = tiles_of(q, tile.block_q), tiles_of(o, tile.block_q)
    K, V = tiles_of(k, tile.block_k), tiles_of(v, tile.block_k)

    arrays = dict(q=Q, k=K, v=V, o=O, lse=lse, first=first, stop=stop)
    with counted(machine, "varlen", problem, **arrays):
        forward_kernel[(triton.cdiv(Nq, tile.block_q) * B * H,)](
            Q, K, V, O, lse, first, stop, scale, H, Nq, Nk,
            GROUP=H // H_kv, COLUMNS=columns(D), BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return without_padding(o, q.dtype), lse


@triton_mode.on_its_card
def backward(do, dlse, q, k, v, o, lse, first, stop, problem, scale, machine, tiles):
    """dq, dk, dv from do (B, H, Nq, D) and dlse (B, H, Nq), the gradient of lse or None."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    delta = machine.hbm.scratch("delta", (B, H, Nq, 1), like=q, dtype=torch.float32).data[..., 0]
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    sizes = dict(GROUP=H // H_kv, COLUMNS=columns(D))

    O, DO = tiles_of(o, DELTA_ROWS), tiles_of(do, DELTA_ROWS)
    with counted(machine, "varlen delta", problem, o=O, do=DO, delta=delta):
        delta_kernel[(triton.cdiv(Nq, DELTA_ROWS) * B * H,)](
            O, DO, delta, H, Nq, COLUMNS=columns(D), BLOCK_Q=DELTA_ROWS
        )
    if dlse is not None:
        delta -= dlse  # ∂lse/∂s = p
    rest = dict(lse=lse, delta=delta, first=first, stop=stop)

    t = tiles.dkdv
    seen = queries_that_see(first, stop, Nk, t.block_k)
    Q, DO = tiles_of(q, t.block_q), tiles_of(do, t.block_q)
    K, V, DK, DV = (tiles_of(x, t.block_k) for x in (k, v, dk, dv))
    arrays = dict(q=Q, k=K, v=V, do=DO, **rest, seen=seen)
    with counted(machine, "varlen dkdv", problem, **arrays, dk=DK, dv=DV):
        dkdv_kernel[(triton.cdiv(Nk, t.block_k) * B * H_kv,)](
            Q, K, V, DO, lse, delta, DK, DV, first, stop, seen, scale, H_kv, Nq, Nk,
            **sizes, BLOCK_Q=t.block_q, BLOCK_K=t.block_k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    t = tiles.dq
    Q, DO, DQ = (tiles_of(x, t.block_q) for x in (q, do, dq))
    K, V = tiles_of(k, t.block_k), tiles_of(v, t.block_k)
    arrays = dict(q=Q, k=K, v=V, do=DO, **rest)
    with counted(machine, "varlen dq", problem, **arrays, dq=DQ):
        dq_kernel[(triton.cdiv(Nq, t.block_q) * B * H,)](
            Q, K, V, DO, lse, delta, DQ, first, stop, scale, H, Nq, Nk,
            **sizes, BLOCK_Q=t.block_q, BLOCK_K=t.block_k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return tuple(without_padding(dx, x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))


# for PyTorch


class _Attention(torch.autograd.Function):
    """Hands `forward` and `backward` to PyTorch. Saved for the backward: O(N), never S or P."""

    @staticmethod
    def forward(ctx, q, k, v, first, stop, problem, scale, machine, tiles):
        o, lse = forward(q, k, v, first, stop, problem, scale, machine, tiles.forward)
        ctx.save_for_backward(q, k, v, o, lse, first, stop)
        ctx.rest = problem, scale, machine, tiles
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        if torch.is_grad_enabled():  # a result without a graph would drop terms without a word
            raise RuntimeError(
                "create_graph must be False for stage 'varlen': it has first derivatives only"
            )
        q, k, v, o, lse, *runs = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        gradients = backward(do, dlse, q, k, v, o, lse, *runs, *ctx.rest)
        return *gradients, None, None, None, None, None, None


# The same as operators, which torch.compile takes whole, without looking inside. A tile size of 0
# is the tuned one.


@torch.library.custom_op("flashedu::varlen", mutates_args=())
def varlen_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, stop: torch.Tensor,
    scale: float, block_q: int, block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`forward`, as an operator."""
    problem = _problem(q, k)
    tiles = _tiles(q, problem, block_q, block_k)
    return forward(q, k, v, first, stop, problem, scale, UNCOUNTED, tiles.forward)


@varlen_op.register_fake
def _(q, k, v, first, stop, scale, block_q, block_k):
    return without_padding(empty_like(q), q.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flashedu::varlen_backward", mutates_args=())
def varlen_backward_op(
    do: torch.Tensor, dlse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, stop: torch.Tensor,
    o: torch.Tensor, lse: torch.Tensor, scale: float, block_q: int, block_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`backward`, as an operator."""
    problem = _problem(q, k)
    tiles = _tiles(q, problem, block_q, block_k)
    return backward(do, dlse, q, k, v, o, lse, first, stop, problem, scale, UNCOUNTED, tiles)


@varlen_backward_op.register_fake
def _(do, dlse, q, k, v, *rest):
    return tuple(without_padding(empty_like(x), x.dtype) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    *tensors, scale, block_q, block_k = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = scale, block_q, block_k
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    do = torch.zeros_like(ctx.saved_tensors[-2]) if do is None else do
    gradients = varlen_backward_op(do, dlse, *ctx.saved_tensors, *ctx.rest)
    return *gradients, None, None, None, None, None


varlen_op.register_autograd(_backward, setup_context=_save_for_backward)


def _problem(q, k):
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    return Problem(B=B, H=H, H_kv=H_kv, Nq=Nq, Nk=Nk, D=D, dtype=dtype_name(q))


def _tiles(q, problem, block_q, block_k):
    """flash2's for a mask, and for few keys: a tile that holds two texts visits the keys of both,
    so small ones win (on an H100, of five sizes)."""
    like = problem.replace(causal=True, Nk=min(problem.Nk, 1024))
    return tiles_for_call(q, like, block_q, block_k)
