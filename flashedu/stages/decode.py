"""Flash-Decoding: few queries against a long cache of keys, as a model writes token by token.

What changed from `flash2`: who works in parallel. With one query a head, flash2 has one program a
head, and most of the GPU is idle. Here
1. the query heads that share a key head are the rows of one tile: k and v are loaded once for all
   of them, where flash2 loads them for each;
2. the keys are cut into splits, a program each. It writes the o and the lse of its own keys;
3. a second kernel merges them, by the online softmax once more. The lse of a split is its score,
   and its o is its value:

    m_new = max(m, max(lse_j))    α = exp(m − m_new)    p = exp(lse_j − m_new)
    l ← α l + sum(p)    acc ← α acc + p o_j    o = acc / l and lse = m + log l at the end

What it costs: the o of every split, in float32, to HBM and back. What it gains: k and v cross once,
by as many programs as the GPU runs at a time. Forward only.

Source: Flash-Decoding for long-context inference (PyTorch blog, October 2023).
"""

import torch

from flashedu.memory.kernels import counted
from flashedu.memory.machine import UNCOUNTED
from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.contract import check, dtype_name, refuse_gradients
from flashedu.stages.decode_tiles import merged_at_once, splits_for_call, tile_for_call
from flashedu.stages.descriptors import columns, empty_like, in_tiles, tiles_of
from flashedu.stages.runs import Runs

import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0


def attention(
    q, k, v, *, causal=False, scale=None, runs=None,
    block_q=None, block_k=None, splits=None, machine=None,
):  # fmt: skip
    """softmax(scale · q kᵀ) v by Triton kernels, for few queries and many keys; no gradients.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, bfloat16 or float32, on
    the GPU, or on the CPU where there is none and kernels are interpreted. Any strides.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    runs: the keys that each query sees, where it is not all or a causal mask, as
    `flashedu.stages.runs` makes them; or None.
    scale: 1/√D if None. block_q: rows in a tile, a row for each query of each head of a group;
    block_k: keys in a tile. Powers of two from 16 to 256; None takes some that fit this card.
    splits: how many parts the keys are cut into; None takes as many as fill the card.
    machine: a `Machine` that counts what the interpreted kernels move, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract.
    """
    return attention_with_lse(
        q, k, v, causal=causal, scale=scale, runs=runs,
        block_q=block_q, block_k=block_k, splits=splits, machine=machine,
    )[0]  # fmt: skip


def attention_with_lse(
    q, k, v, *, causal=False, scale=None, runs=None,
    block_q=None, block_k=None, splits=None, machine=None,
):  # fmt: skip
    """As `attention`; returns o and lse.

    lse: (B, H, Nq), float32, the natural log of Σ exp(scale · q kᵀ) over the keys that a query
    sees, −inf if it sees none.
    """
    problem, scale = check(
        "decode", q, k, v, causal=causal, scale=scale, runs=runs,
        block_q=block_q, block_k=block_k, splits=splits, machine=machine,
    )  # fmt: skip
    triton_mode.check("decode", q, machine)
    refuse_gradients("decode", q, k, v)
    if machine is not None:
        k, v = k.clone(), v.clone()  # told apart by their addresses, also if k is v
    if runs is not None:
        runs = Runs(*(x.contiguous() for x in runs))
    if machine is None and torch.compiler.is_compiling():
        first, stop = runs or (None, None)
        return decode_op(
            q, k, v, first, stop, problem.causal, scale, block_q or 0, block_k or 0, splits or 0
        )
    tile = tile_for_call(q, problem, block_q, block_k)
    splits = splits or splits_for_call(q, problem, tile)
    return forward(q, k, v, problem, scale, machine or UNCOUNTED, tile, int(splits), runs)


@triton.jit
def decode_kernel(
    Q, K, V, O, LSE, FIRST, STOP, scale, H_kv, Nq, Nk, splits,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    EARLY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of packed rows, over one split of the keys of their head.

    FIRST, STOP: the runs, (B, Nq), or None. EARLY: the merge may start, and wait.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    Q, O = in_tiles(Q, BLOCK_Q, COLUMNS), in_tiles(O, BLOCK_Q, COLUMNS)
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    n_rows = Nq * GROUP
    tiles = tl.cdiv(n_rows, BLOCK_Q)
    i, part = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(0) // tiles
    head, split = part // splits, part % splits
    b, h = head // H_kv, head % H_kv
    rows = i + tl.arange(0, BLOCK_Q)
    queries = rows // GROUP  # a row for each head of the group, then the next query

    begin, end = 0, Nk  # what the splits share
    if FIRST is not None:
        run = b.to(tl.int64) * Nq + tl.minimum(queries, Nq - 1)
        first_i = tl.minimum(tl.maximum(tl.load(FIRST + run), 0), Nk)
        stop_i = tl.minimum(tl.maximum(tl.load(STOP + run), 0), Nk)
        begin = tl.min(first_i) // BLOCK_K * BLOCK_K
        end = tl.max(stop_i)
    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    keys_per_split = tl.cdiv(tl.cdiv(end - begin, BLOCK_K), splits) * BLOCK_K
    start = begin + split * keys_per_split
    stop = tl.minimum(end, start + keys_per_split)
    if CAUSAL:  # and no further than the last query of the tile sees
        last = tl.minimum(Nq - 1, (i + BLOCK_Q - 1) // GROUP)
        stop = tl.minimum(stop, last + 1 + Nk - Nq)
    for j in tl.range(start, stop, BLOCK_K):
        k_j = K.load([b, h, j, 0]).reshape(BLOCK_K, COLUMNS)
        s_ij = scale * tl.dot(q_i, k_j.T, input_precision="ieee")
        cols = j + tl.arange(0, BLOCK_K)
        visible = (cols < Nk)[None, :]
        if CAUSAL:
            visible = visible & (cols[None, :] <= queries[:, None] + Nk - Nq)
        if FIRST is not None:
            visible = cols[None, :] >= first_i[:, None]
            visible = visible & (cols[None, :] < stop_i[:, None])
        s_ij = tl.where(visible, s_ij, float("-inf"))

        m_new = tl.maximum(m_i, tl.max(s_ij, 1))
        alpha = tl.exp(m_i - m_new)
        p_ij = tl.exp(s_ij - m_new[:, None])
        l_i = alpha * l_i + tl.sum(p_ij, 1)
        v_j = V.load([b, h, j, 0]).reshape(BLOCK_K, COLUMNS)
        acc_i = acc_i * alpha[:, None]
        acc_i = tl.dot(p_ij.to(v_j.dtype), v_j, acc_i, input_precision="ieee")
        m_i = m_new

    some = l_i > 0  # False for a row that sees no key of this split
    o_i = acc_i / tl.where(some, l_i, 1)[:, None]
    lse_i = tl.where(some, m_i + tl.log(tl.where(some, l_i, 1)), float("-inf"))
    o_i = o_i.to(O.dtype).reshape(1, 1, BLOCK_Q, COLUMNS)
    O.store([b, h * splits + split, i, 0], o_i)
    tl.store(LSE + part.to(tl.int64) * n_rows + rows, lse_i, mask=rows < n_rows)


@triton.jit
def merge_kernel(
    O_SPLIT, LSE_SPLIT, O, LSE, H_kv, n_rows, splits, D, width,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of packed rows, from those of its splits.

    width: from a row of O_SPLIT to the next. EARLY: it starts before they are done.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    O = in_tiles(O, BLOCK_Q, COLUMNS)
    tiles = tl.cdiv(n_rows, BLOCK_Q)
    i, head = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(0) // tiles
    b, h = head // H_kv, head % H_kv
    rows, cols = i + tl.arange(0, BLOCK_Q), tl.arange(0, COLUMNS)

    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    for j in tl.range(0, splits, BLOCK_SPLITS):
        split = j + tl.arange(0, BLOCK_SPLITS)
        first = (head.to(tl.int64) * splits + split) * n_rows  # row of each split
        here = first[:, None] + rows[None, :]
        exist = (split < splits)[:, None] & (rows < n_rows)[None, :]
        lse_j = tl.load(LSE_SPLIT + here, mask=exist, other=float("-inf"))
        o_j = tl.load(
            O_SPLIT + here[:, :, None] * width + cols[None, None, :],
            mask=exist[:, :, None] & (cols < D)[None, None, :], other=0,
        )  # fmt: skip

        m_new = tl.maximum(m_i, tl.max(lse_j, 0))
        alpha = tl.exp(m_i - m_new)
        p_j = tl.exp(lse_j - m_new[None, :])
        l_i = alpha * l_i + tl.sum(p_j, 0)
        acc_i = alpha[:, None] * acc_i + tl.sum(p_j[:, :, None] * o_j, 0)
        m_i = m_new

    some = l_i > 0  # False for a row that sees no key at all
    o_i = acc_i / tl.where(some, l_i, 1)[:, None]
    lse_i = tl.where(some, m_i + tl.log(tl.where(some, l_i, 1)), float("-inf"))
    O.store([b, h, i, 0], o_i.to(O.dtype).reshape(1, 1, BLOCK_Q, COLUMNS))
    tl.store(LSE + head.to(tl.int64) * n_rows + rows, lse_i, mask=rows < n_rows)


@triton_mode.on_its_card
def forward(q, k, v, problem, scale, machine, tile, splits, runs=None):
    """o (B, H, Nq, D) and lse (B, H, Nq), by a program for each row tile and split of a key head.

    Parallel over splits too: no two programs write the same row of the same split.
    """
    (B, H, Nq, _), (_, H_kv, Nk, _) = q.shape, k.shape
    lse = machine.hbm.scratch("lse", (B, H_kv, Nq * (H // H_kv), 1), like=q, dtype=torch.float32)
    lse = lse.data[..., 0]
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), unpacked(lse.fill_(-torch.inf), H)
    q = packed(q, H_kv)
    o = empty_like(q)
    if splits == 1:  # nothing to merge
        attend(q, k, v, o, lse, 1, problem, scale, machine, tile, runs)
    else:
        o_split, lse_split = scratch(q, splits, machine)
        attend(q, k, v, o_split, lse_split, splits, problem, scale, machine, tile, runs)
        merge(o_split, lse_split, o, lse, splits, problem, machine)
    return unpacked(o.to(q.dtype), H).contiguous(), unpacked(lse, H).contiguous()


def packed(q, H_kv):
    """(B, H, Nq, D) as (B, H_kv, Nq · group, D): the heads of a group are rows.

    They go query by query. One query a head moves nothing; more are copied, as q is
    small.
    """
    return q.unflatten(1, (H_kv, -1)).transpose(2, 3).flatten(2, 3)


def unpacked(x, H):
    """(B, H_kv, Nq · group, …) as (B, H, Nq, …)."""
    group = H // x.shape[1]
    return x.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)


def scratch(q, splits, machine):
    """Room for o and lse of every split: float32, as they are added up; rows of whole 16 bytes."""
    B, H_kv, n_rows, D = q.shape
    o_split, lse_split = (
        machine.hbm.scratch(name, (B, H_kv * splits, n_rows, n), like=q, dtype=torch.float32).data
        for name, n in (("o_split", -(-D // 4) * 4), ("lse_split", 1))
    )
    return o_split[..., :D], lse_split[..., 0]


def attend(q, k, v, o, lse, splits, problem, scale, machine, tile, runs):
    """Write o and lse of every split; of one split, the results themselves."""
    (B, H_kv, n_rows, D), Nk = q.shape, k.shape[2]
    Q, O = tiles_of(q, tile.block_q), tiles_of(o, tile.block_q)
    K, V = tiles_of(k, tile.block_k), tiles_of(v, tile.block_k)
    written = dict(o=O, lse=lse) if splits == 1 else dict(o_split=o, lse_split=lse)
    first, stop = runs or (None, None)
    read = dict(q=Q, k=K, v=V) | ({} if runs is None else dict(first=first, stop=stop))
    with counted(machine, "decode", problem, **read, **written):
        decode_kernel[(triton.cdiv(n_rows, tile.block_q) * B * H_kv * splits,)](
            Q, K, V, O, lse, first, stop, scale, H_kv, problem.Nq, Nk, splits,
            GROUP=problem.group, COLUMNS=columns(D), CAUSAL=problem.causal,
            EARLY=splits > 1 and triton_mode.starts_early(q),
            BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def merge(o_split, lse_split, o, lse, splits, problem, machine):
    """Write o and lse from those of the splits, by a program for each row or tile of rows."""
    B, H_kv, n_rows, D = o.shape
    block_q, block_splits = merged_at_once(splits, columns(D))
    O, early = tiles_of(o, block_q), triton_mode.starts_early(o)
    arrays = dict(o_split=o_split, lse_split=lse_split, o=O, lse=lse)
    with counted(machine, "decode merge", problem, **arrays):
        merge_kernel[(triton.cdiv(n_rows, block_q) * B * H_kv,)](
            o_split, lse_split, O, lse, H_kv, n_rows, splits, D, o_split.stride(2),
            COLUMNS=columns(D), EARLY=early, BLOCK_Q=block_q, BLOCK_SPLITS=block_splits,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip


# The same as an operator, which torch.compile takes whole. A tile size or number of splits of 0 is
# that for the card.


@torch.library.custom_op("flashedu::decode", mutates_args=())
def decode_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    first: torch.Tensor | None, stop: torch.Tensor | None,
    causal: bool, scale: float, block_q: int, block_k: int, splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`forward`, as an operator."""
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    problem = Problem(B=B, H=H, H_kv=H_kv, Nq=Nq, Nk=Nk, D=D, dtype=dtype_name(q), causal=causal)
    tile = tile_for_call(q, problem, block_q, block_k)
    runs = None if first is None else Runs(first, stop)
    splits = splits or splits_for_call(q, problem, tile)
    return forward(q, k, v, problem, scale, UNCOUNTED, tile, splits, runs)


@decode_op.register_fake
def _(q, k, v, *rest):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:3], dtype=torch.float32
    )
