"""One step of a server: `paged`, for sequences that each bring queries of their own number.

What changed from `paged`: the queries. A server takes a step for many sequences at once. One has
just come and brings its whole prompt, or a chunk of it; most bring the token that they wrote last.
So the queries lie one behind another, as in `varlen`, and `starts` says where each sequence begins.
A tile of queries belongs to one sequence: `tiles_of_step` lists the tiles, once for all layers of a
model, and a program looks its own up. Where each sequence has one query there is nothing to list.

The rest is paged and flash2: the key heads' query heads are rows of a tile, keys come from pages,
tiles that need no mask go first, and few queries share their keys between splits that are merged.

What it costs: a tile for each sequence, full or not. What it gains: a step of prompts and single
tokens is one call, and what has been written before is read where it lies. Forward only.

Source: PagedAttention (arXiv 2309.06180), Section 4; mixed steps: Sarathi-Serve (arXiv 2403.02310).
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch

from flashedu.memory import hbm
from flashedu.memory.kernels import counted
from flashedu.memory.machine import UNCOUNTED
from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.contract import check_scale, check_splits, refuse_gradients
from flashedu.stages.decode import merge
from flashedu.stages.decode_tiles import in_pages, splits_for_call, tile_for
from flashedu.stages.descriptors import columns, in_tiles, tiles_of
from flashedu.stages.flash2_tiles import Tile, tiles_for
from flashedu.stages.paged import check_contents, check_shapes

import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0
TINY = torch.finfo(torch.float32).tiny
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))


def attention(
    q, k, v, block_table, lengths, starts, *, scale=None, splits=None, check=True, machine=None
):
    """Causal attention of the new tokens of each sequence, from a paged cache.

    q: (1, H, N, D), the queries of all sequences one behind another. k, v: (n_pages, H_kv,
    page_size, D), as `paged` takes them; float16, bfloat16 or float32. Any strides.
    block_table: (B, max_pages), int32. lengths: (B,), int32: keys of each sequence, those of its
    queries included.
    starts: (B + 1,), int32: queries starts[b] to starts[b + 1] − 1 are those of sequence b. Its
    i-th query sees the keys up to i + lengths[b] − Nq, where Nq are its queries; if none, it
    gives 0, as do queries behind starts[B].
    scale: 1/√D if None. splits: parts that the keys are cut into; None takes one where a sequence
    has more than a query, else as many as fill the card.
    check: read the tables back from the GPU, and refuse what would lead out of the arrays. False
    saves the wait, and is for tables that are known to be right; it takes any number of queries.
    machine: a `Machine` that counts what the interpreted kernels move, or None.
    Returns o: (1, H, N, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract.
    """
    return attention_with_lse(
        q, k, v, block_table, lengths, starts,
        scale=scale, splits=splits, check=check, machine=machine,
    )[0]  # fmt: skip


def attention_with_lse(
    q, k, v, block_table, lengths, starts, *, scale=None, splits=None, check=True, machine=None
):
    """As `attention`; returns o and lse, (1, H, N), float32, −inf where a query sees no key."""
    tables = {"block_table": (block_table, 2), "lengths": (lengths, 1), "starts": (starts, 1)}
    check_shapes("paged_varlen", q, k, v, tables)
    scale = check_scale(scale, q.shape[3])
    if splits is not None:
        check_splits(splits)
    triton_mode.check("paged_varlen", q, machine)
    refuse_gradients("paged_varlen", q, k, v)
    n_tokens, longest = q.shape[2], block_table.shape[1] * k.shape[2]
    if check:
        longest = check_contents(block_table, lengths, n_pages=k.shape[0], page_size=k.shape[2])
        _check_starts(starts, n_tokens)
    if scale < TINY:  # the kernel wants a positive one
        q, scale = (-q, -scale) if scale <= -TINY else (0 * q, 1.0)
    if machine is not None:
        k, v = k.clone(), v.clone()  # told apart by their addresses, also if k is v
    few = check and n_tokens == len(lengths) and bool((starts.diff() == 1).all())
    step = plan(
        block_table.contiguous(), lengths.contiguous(), starts.contiguous(),
        q.shape, k.shape, q.dtype, few=few, longest=longest, splits=splits,
    )  # fmt: skip
    return forward(q, k, v, step, scale, machine or UNCOUNTED)


class Step(NamedTuple):
    """What all layers of a model share in one step. `plan` makes it."""

    block_table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    tiles: torch.Tensor | None  # see `tiles_of_step`; None: each sequence has one query
    problem: Problem
    page_size: int
    tile: Tile
    splits: int


def plan(block_table, lengths, starts, q_shape, k_shape, dtype, *, few, longest, splits=None):
    """The `Step` of these tables, for any q and k of these shapes and this dtype.

    few: whether each sequence has one query. longest: keys of the longest, or a bound. splits: as
    for `attention`. Nothing waits for the GPU, and no table is copied: a CUDA graph that holds a
    step reads what they hold when it is replayed.
    """
    (_, H, N, D), (_, H_kv, page_size, _) = q_shape, k_shape
    problem = Problem(
        B=len(lengths) if few else 1, H=H, H_kv=H_kv, Nq=1 if few else N, Nk=longest, D=D,
        dtype=str(dtype).removeprefix("torch."), causal=True,
    )  # fmt: skip
    capability, heads = triton_mode.capability(lengths), heads_of_tile(problem)
    sizes = capability, columns(D), dtype.itemsize
    if few:
        tile = in_pages(tile_for(*sizes, heads), page_size, capability)
        if columns(D) * dtype.itemsize > 512:  # with 4 it spills most
            tile = tile._replace(warps=8)
    else:
        tile = tiles_for(*sizes, causal=True, N=longest).forward
        tile = tile._replace(block_k=min(tile.block_k, page_size, 64), stages=tile.stages + 1)
    tile = tile._replace(block_q=max(tile.block_q, heads))
    if splits is None:
        splits = splits_for_call(lengths, problem, tile) if few else 1
    tiles = None if few else tiles_of_step(starts, N, tile.block_q // heads)
    return Step(block_table, lengths, starts, tiles, problem, page_size, tile, int(splits))


def heads_of_tile(problem):
    """Rows that a query takes in a tile: its heads of a group, rounded up to a power of two."""
    return 1 << (problem.group - 1).bit_length()


def tiles_of_step(starts, n_tokens, tokens):
    """The query tiles of all sequences: (n_tiles, 2), int32, sequence and first query.

    The number of rows follows from sizes alone, so nothing waits for the GPU: n_tokens
    in whole tiles, and one more for each sequence. Rows that are left over have
    sequence −1. The last tiles come first: they see the most keys.
    """
    Nq = starts.diff().clamp(min=0)
    of_each = -(-Nq // tokens)
    end = of_each.cumsum(0)
    n_tiles = n_tokens // tokens + len(Nq)
    tile = torch.arange(n_tiles - 1, -1, -1, device=starts.device)
    sequence = torch.searchsorted(end, tile, right=True)
    here = sequence.clamp(max=len(Nq) - 1)
    first = (tile - (end - of_each)[here]) * tokens
    sequence = torch.where(sequence < len(Nq), sequence, -1)
    return torch.stack((sequence, first), 1).to(torch.int32)


# A server's steps are of all sizes: none of these is compiled for on its own.
ANY_SIZE = ("n_tokens", "max_pages", "n_tiles", "splits", "table_row")


@triton.jit(do_not_specialize=ANY_SIZE)
def paged_varlen_kernel(
    Q, K, V, O, LSE, TABLE, LENGTHS, STARTS, TILES, scale,
    H_kv, n_tokens, max_pages, n_tiles, splits, D, table_row, q_row, q_head, o_row, o_head,
    PAGE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of one sequence's queries, over one split of its keys.

    Rows of a tile: the heads of a group, HEADS of them (GROUP, rounded up to a power of two), query
    by query. table_row, q_row, q_head, o_row, o_head: strides. LSE: None if it is not wanted.
    TILES: None if each sequence has one query.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    if TILES is None:  # neighbours have the same keys of other heads, which lie beside theirs
        h, part = tl.program_id(0) % H_kv, tl.program_id(0) // H_kv
        b, split = part // splits, part % splits
        i, begin, Nq = 0, b, 1
    else:  # neighbours have the same head: its keys stay in L2
        tile, part = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
        h, split = part // splits, part % splits
        b = tl.load(TILES + 2 * tile)
        if b < 0:
            return
        i = tl.load(TILES + 2 * tile + 1)
        begin = tl.maximum(0, tl.load(STARTS + b))
        Nq = tl.minimum(tl.load(STARTS + b + 1), n_tokens) - begin

    rows, cols = tl.arange(0, BLOCK_Q), tl.arange(0, COLUMNS)
    queries, g = i + rows // HEADS, rows % HEADS
    exist = (queries < Nq) & (g < GROUP)
    here = exist[:, None] & (cols < D)[None, :]
    token, head = (begin + queries).to(tl.int64), h * GROUP + g
    q_i = tl.load(Q + (token * q_row + head * q_head)[:, None] + cols[None, :], mask=here, other=0)
    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    Nk = tl.load(LENGTHS + b)
    Nk = tl.minimum(tl.maximum(0, Nk), max_pages * PAGE)  # as the table has
    keys_per_split = tl.cdiv(tl.cdiv(Nk, BLOCK_K), splits) * BLOCK_K
    start = split * keys_per_split
    last = tl.minimum(Nq, i + BLOCK_Q // HEADS) - 1
    seen_by_all = tl.maximum(0, i + 1 + Nk - Nq) // BLOCK_K * BLOCK_K
    stop = tl.minimum(start + keys_per_split, last + 1 + Nk - Nq)
    whole = tl.maximum(start, tl.minimum(stop, seen_by_all))
    if TILES is None:
        whole = start  # one loop, which waits for its first tile once
    scale_log2 = scale * LOG2E  # positive: the largest product is the largest score
    for MASKED in tl.static_range(2):  # first the tiles that need no mask
        j_first, j_stop = (whole, stop) if MASKED else (start, whole)
        for j in tl.range(j_first, j_stop, BLOCK_K):
            page = tl.load(TABLE + b.to(tl.int64) * table_row + j // PAGE)
            k_j = K.load([page, h, j % PAGE, 0]).reshape(BLOCK_K, COLUMNS)
            v_j = V.load([page, h, j % PAGE, 0]).reshape(BLOCK_K, COLUMNS)
            s_ij = tl.dot(q_i, k_j.T, input_precision="ieee")  # scaled below, with − m
            if MASKED:
                keys = j + tl.arange(0, BLOCK_K)
                visible = keys[None, :] <= queries[:, None] + Nk - Nq
                s_ij = tl.where(visible, s_ij, float("-inf"))
                v_j = tl.where((keys < Nk)[:, None], v_j, 0.0)

            m_new = tl.maximum(m_i, scale_log2 * tl.max(s_ij, 1))
            alpha = tl.exp2(m_i - m_new)
            p_ij = tl.exp2(scale_log2 * s_ij - m_new[:, None])
            l_i = alpha * l_i + tl.sum(p_ij, 1)
            acc_i = acc_i * alpha[:, None]
            acc_i = tl.dot(p_ij.to(v_j.dtype), v_j, acc_i, input_precision="ieee")
            m_i = m_new

    some = l_i > 0  # False for a row that sees no key of this split
    o_i = acc_i / tl.where(some, l_i, 1)[:, None]
    o_rows = token * o_row + ((h * splits + split) * GROUP + g) * o_head
    tl.store(O + o_rows[:, None] + cols[None, :], o_i.to(O.dtype.element_ty), mask=here)
    if LSE is not None:
        lse_i = tl.where(some, LN2 * (m_i + tl.log2(tl.where(some, l_i, 1))), float("-inf"))
        lse_rows = ((token * H_kv + h) * splits + split) * GROUP + g
        tl.store(LSE + lse_rows, lse_i, mask=exist)


@triton_mode.on_its_card
def forward(q, k, v, step, scale, machine):
    """o (1, H, N, D) and lse (1, H, N)."""
    (_, H, N, D), p = q.shape, step.problem
    like, dtype = q, q.dtype
    if triton_mode.INTERPRETED and dtype == torch.bfloat16:
        like = q.float()  # the interpreter has no bfloat16 arithmetic
    width = -(-D * like.itemsize // 16) * 16 // like.itemsize  # rows of whole 16 bytes
    o = hbm.empty((N, H, width), like, like.dtype).zero_()[..., :D]
    lse = machine.hbm.scratch("lse", (N, p.H_kv, p.group, 1), like=q, dtype=torch.float32)
    lse = lse.data[..., 0].fill_(-torch.inf)
    if 0 not in (len(step.lengths), N, p.Nk):
        pages = tiles_of(k, step.tile.block_k), tiles_of(v, step.tile.block_k)
        attend(like, *pages, o, lse, step, scale, machine)
    return o.transpose(0, 1)[None].to(dtype), lse.flatten(1).T[None].contiguous()


def attend(q, K, V, o, lse, step, scale, machine=UNCOUNTED):
    """Write o, (N, H, D), and lse, (N, H_kv, group), by a program for each query tile, key head and
    split. K, V: see `tiles_of`. lse: None if nobody wants it. Rows of no sequence are not written.
    """
    p, tile, splits = step.problem, step.tile, step.splits
    n_tiles = len(step.lengths if step.tiles is None else step.tiles)
    o_part, lse_part, o_head = o, lse, o.stride(1)
    if splits > 1:
        o_part, lse_part, o_head = scratch(q, p, splits, machine)
        lse = hbm.empty((len(o), p.H_kv, p.group), o, torch.float32) if lse is None else lse
    read = dict(q=q, k=K, v=V, block_table=step.block_table, lengths=step.lengths)
    read |= {} if step.tiles is None else dict(starts=step.starts, tiles=step.tiles)
    written = dict(o=o[None], lse=lse) if splits == 1 else dict(o_split=o_part, lse_split=lse_part)
    with counted(machine, "paged_varlen", p, **read, **written):
        paged_varlen_kernel[(n_tiles * p.H_kv * splits,)](
            q, K, V, o_part, lse_part, step.block_table, step.lengths, step.starts, step.tiles,
            scale, p.H_kv, len(o), step.block_table.shape[1], n_tiles, splits, p.D,
            step.block_table.stride(0), q.stride(2), q.stride(1), o_part.stride(0), o_head,
            PAGE=step.page_size, GROUP=p.group, HEADS=heads_of_tile(p), COLUMNS=columns(p.D),
            EARLY=splits > 1 and triton_mode.starts_early(q),
            BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if splits > 1:
        merge(o_part, lse_part, o.unflatten(1, (p.H_kv, p.group)), lse, splits, p, machine)


def scratch(q, p, splits, machine):
    """Room for o and lse of every split, as `decode` merges them, and the width of a row of o."""
    N, width = q.shape[2], -(-p.D // 4) * 4  # rows of whole 16 bytes
    o_split, lse_split = (
        machine.hbm.scratch(name, (N, p.H_kv * splits, p.group, n), like=q, dtype=torch.float32)
        for name, n in (("o_split", width), ("lse_split", 1))
    )
    return o_split.data[..., : p.D], lse_split.data[..., 0], width


# what does not fit


def _check_starts(starts, n_tokens):
    starts = starts.tolist()
    for b, (begin, end) in enumerate(pairwise(starts)):
        if not 0 <= begin <= end <= n_tokens:
            raise ValueError(
                f"starts must grow from 0 to at most the {n_tokens} queries of q, got {begin} and "
                f"then {end} for sequence {b}"
            )
