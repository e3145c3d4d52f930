"""Decoding from a paged cache: `decode`, and one more step from a key to where it lies.

What changed from `decode`: the keys of a sequence no longer lie in a row. They are in pages, and a
block table says which page comes next. The kernel looks a tile's page up in the table, and then
loads as ever. Each sequence has a length of its own, and the end of its last page holds anything:
those keys are masked, and their v is set to 0, as 0 · NaN is no 0.

What it costs: a page number for each tile of keys, read before the tile can be. What it gains: no
memory is kept for keys that may never come (see `flashedu.pages`). Forward only.

Source: PagedAttention (arXiv 2309.06180), Section 4.
"""

import torch

from flashedu.memory.kernels import counted
from flashedu.memory.machine import UNCOUNTED
from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode
from flashedu.stages.contract import (
    check_array,
    check_scale,
    check_splits,
    dtype_name,
    refuse_gradients,
)
from flashedu.stages.decode import merge, packed, scratch, unpacked
from flashedu.stages.decode_tiles import in_pages, splits_for_call, tile_for_call
from flashedu.stages.descriptors import columns, empty_like, in_tiles, tiles_of

import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0
DTYPES = ("float16", "bfloat16", "float32")
MAX_D = 256


def attention(q, k, v, block_table, lengths, *, scale=None, splits=None, check=True, machine=None):
    """Causal attention of the last Nq tokens of each sequence, from a paged cache.

    q: (B, H, Nq, D). k, v: (n_pages, H_kv, page_size, D), H a multiple of H_kv, page_size a power
    of two from 16 on; float16, bfloat16 or float32.
    block_table: (B, max_pages), int32: key j of sequence b is row j % page_size of page
    block_table[b, j // page_size]. lengths: (B,), int32: keys of each sequence, those of the Nq
    queries included. Query i of sequence b sees the keys up to i + lengths[b] − Nq; if none, it
    gives 0.
    scale: 1/√D if None. splits: parts that the keys are cut into; None takes as many as fill the
    card.
    check: read block_table and lengths back from the GPU, and refuse what would lead out of the
    cache. False saves the wait, and is for tables that are known to be right.
    machine: a `Machine` that counts what the interpreted kernels move, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract.
    """
    return attention_with_lse(
        q, k, v, block_table, lengths, scale=scale, splits=splits, check=check, machine=machine
    )[0]


def attention_with_lse(
    q, k, v, block_table, lengths, *, scale=None, splits=None, check=True, machine=None
):
    """As `attention`; returns o and lse, (B, H, Nq), float32, −inf where a query sees no key."""
    check_shapes("paged", q, k, v, {"block_table": (block_table, 2), "lengths": (lengths, 1)})
    scale = check_scale(scale, q.shape[3])
    if splits is not None:
        check_splits(splits)
    triton_mode.check("paged", q, machine)
    refuse_gradients("paged", q, k, v)
    longest = block_table.shape[1] * k.shape[2]
    if check:
        longest = check_contents(block_table, lengths, n_pages=k.shape[0], page_size=k.shape[2])
    if machine is not None:
        k, v = k.clone(), v.clone()  # told apart by their addresses, also if k is v
    (B, H, Nq, D), H_kv = q.shape, k.shape[1]
    problem = Problem(B=B, H=H, H_kv=H_kv, Nq=Nq, Nk=longest, D=D, dtype=dtype_name(q), causal=True)
    tile = tile_for_call(q, problem, None, None)
    tile = in_pages(tile, k.shape[2], triton_mode.capability(q))
    splits = int(splits or splits_for_call(q, problem, tile))
    tables = block_table.contiguous(), lengths.contiguous()
    return forward(q, k, v, *tables, problem, scale, machine or UNCOUNTED, tile, splits)


@triton.jit
def paged_kernel(
    Q, K, V, O, LSE, TABLE, LENGTHS, scale, H_kv, Nq, max_pages, splits,
    PAGE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of packed rows, over one split of its sequence's keys."""
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
    queries = rows // GROUP

    Nk = tl.load(LENGTHS + b)  # on its way while q_i is
    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc_i = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)

    Nk = tl.minimum(tl.maximum(0, Nk), max_pages * PAGE)  # as the table has
    keys_per_split = tl.cdiv(tl.cdiv(Nk, BLOCK_K), splits) * BLOCK_K
    start = split * keys_per_split
    last = tl.minimum(Nq - 1, (i + BLOCK_Q - 1) // GROUP)
    seen_by_all = tl.maximum(0, i // GROUP + 1 + Nk - Nq) // BLOCK_K * BLOCK_K
    stop = tl.minimum(start + keys_per_split, last + 1 + Nk - Nq)
    whole = tl.maximum(start, tl.minimum(stop, seen_by_all))
    for MASKED in tl.static_range(2):  # first the tiles that need no mask
        j_first, j_stop = (whole, stop) if MASKED else (start, whole)
        for j in tl.range(j_first, j_stop, BLOCK_K):
            page = tl.load(TABLE + b.to(tl.int64) * max_pages + j // PAGE)
            k_j = K.load([page, h, j % PAGE, 0]).reshape(BLOCK_K, COLUMNS)
            v_j = V.load([page, h, j % PAGE, 0]).reshape(BLOCK_K, COLUMNS)
            s_ij = scale * tl.dot(q_i, k_j.T, input_precision="ieee")
            if MASKED:
                cols = j + tl.arange(0, BLOCK_K)
                visible = cols[None, :] <= queries[:, None] + Nk - Nq
                s_ij = tl.where(visible, s_ij, float("-inf"))
                v_j = tl.where((cols < Nk)[:, None], v_j, 0.0)

            m_new = tl.maximum(m_i, tl.max(s_ij, 1))
            alpha = tl.exp(m_i - m_new)
            p_ij = tl.exp(s_ij - m_new[:, None])
            l_i = alpha * l_i + tl.sum(p_ij, 1)
            acc_i = acc_i * alpha[:, None]
            acc_i = tl.dot(p_ij.to(v_j.dtype), v_j, acc_i, input_precision="ieee")
            m_i = m_new

    some = l_i > 0  # False for a row that sees no key of this split
    o_i = acc_i / tl.where(some, l_i, 1)[:, None]
    lse_i = tl.where(some, m_i + tl.log(tl.where(some, l_i, 1)), float("-inf"))
    o_i = o_i.to(O.dtype).reshape(1, 1, BLOCK_Q, COLUMNS)
    O.store([b, h * splits + split, i, 0], o_i)
    tl.store(LSE + part.to(tl.int64) * n_rows + rows, lse_i, mask=rows < n_rows)


@triton_mode.on_its_card
def forward(q, k, v, block_table, lengths, problem, scale, machine, tile, splits):
    """o (B, H, Nq, D) and lse (B, H, Nq), by a program for each row tile, key head and split."""
    (B, H, Nq, _), (_, H_kv, page_size, _) = q.shape, k.shape
    lse = machine.hbm.scratch("lse", (B, H_kv, Nq * (H // H_kv), 1), like=q, dtype=torch.float32)
    lse = lse.data[..., 0]
    if 0 in (B, Nq, problem.Nk):
        return torch.zeros_like(q), unpacked(lse.fill_(-torch.inf), H)
    q = packed(q, H_kv)
    o = empty_like(q)
    o_split, lse_split = scratch(q, splits, machine) if splits > 1 else (o, lse)

    Q, O = tiles_of(q, tile.block_q), tiles_of(o_split, tile.block_q)
    K, V = tiles_of(k, tile.block_k), tiles_of(v, tile.block_k)
    written = dict(o=O, lse=lse) if splits == 1 else dict(o_split=o_split, lse_split=lse_split)
    tables = dict(block_table=block_table, lengths=lengths)
    with counted(machine, "paged", problem, q=Q, k=K, v=V, **written, **tables):
        paged_kernel[(triton.cdiv(q.shape[2], tile.block_q) * B * H_kv * splits,)](
            Q, K, V, O, lse_split, block_table, lengths, scale, H_kv, Nq,
            block_table.shape[1], splits,
            PAGE=page_size, GROUP=problem.group, COLUMNS=columns(problem.D),
            EARLY=splits > 1 and triton_mode.starts_early(q),
            BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if splits > 1:
        merge(o_split, lse_split, o, lse, splits, problem, machine)
    return unpacked(o.to(q.dtype), H).contiguous(), unpacked(lse, H).contiguous()


# what does not fit


def check_shapes(stage, q, k, v, tables):
    """tables: by its name, each table and how many dimensions it must have. The sequences are as
    many as batches of q, or of lengths where queries are packed: then starts has one more."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_array(stage, "torch", DTYPES, name, x)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            wanted = dtype_name(q)
            raise TypeError(f"{name} must have the dtype of q, {wanted}, got {dtype_name(x)}")
    (B, H, _, D), (_, H_kv, page_size, _) = q.shape, k.shape
    if not 1 <= D <= MAX_D:
        raise ValueError(f"q must have a head size D of 1 to {MAX_D}, got D={D}")
    if k.shape[3] != D:
        raise ValueError(f"k must have the head size of q, D={D}, got D={k.shape[3]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if H < 1 or H_kv < 1 or H % H_kv:
        raise ValueError(f"q must have a multiple of the heads of k (H_kv={H_kv}), got H={H}")
    if page_size < 16 or page_size & (page_size - 1):
        raise ValueError(
            f"k must have pages of 16, 32, 64 … keys, (n_pages, H_kv, page_size, D), got "
            f"page_size={page_size}"
        )
    packed = "starts" in tables
    if packed and B != 1:
        raise ValueError(f"q must be (1, H, N, D), all queries in a row, got {tuple(q.shape)}")
    for name, (x, ndim) in tables.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must have the dtype int32, got {dtype_name(x)}")
        if packed and name == "block_table" and x.ndim == ndim:
            B = x.shape[0]
        wanted = "(B, max_pages)" if ndim == 2 else "(B + 1,)" if name == "starts" else "(B,)"
        if x.ndim != ndim or x.shape[0] != B + (name == "starts"):
            raise ValueError(f"{name} must be {wanted} with B={B}, got shape {tuple(x.shape)}")
    devices = {"k": k, "v": v} | {name: x for name, (x, _) in tables.items()}
    for name, x in devices.items():
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def check_contents(block_table, lengths, *, n_pages, page_size):
    """The greatest length."""
    table, lengths = block_table.cpu(), lengths.cpu()
    room = table.shape[1] * page_size
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= room:
            raise ValueError(
                f"lengths must be 0 to {room}, as block_table has {table.shape[1]} pages of "
                f"{page_size} keys a sequence, got {length} for sequence {b}"
            )
        pages = table[b, : -(-length // page_size)]
        wrong = pages[(pages < 0) | (pages >= n_pages)]
        if len(wrong):
            raise ValueError(
                f"block_table must hold pages 0 to {n_pages - 1}, got {int(wrong[0])} in "
                f"sequence {b}"
            )
    return int(lengths.max()) if len(lengths) else 0
