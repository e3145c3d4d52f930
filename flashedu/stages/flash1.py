"""FlashAttention, as first published, as a GPU program: K and V outside, Q inside.

What changed from `online`: it runs as a Triton kernel, one program for each head, and its loops
are the other way round. A key tile is loaded once, and all query tiles pass by. A query tile meets
its keys one tile at a time, far apart, so its o, m and l cannot stay on chip: they wait in HBM, and
each pass reads them, updates them and writes them back.

    m_new = max(m, rowmax(s))    α = exp(m − m_new)    p = exp(s − m_new)
    l_new = α l + rowsum(p)      o ← (α l o + p v) / l_new

What it costs: o crosses HBM twice for each key tile, and only as many programs run as there are
heads. `flash2` turns the loops round and mends both. Forward only.

Source: FlashAttention (arXiv 2205.14135), Algorithm 1.
"""

import torch

from flashedu.memory.kernels import counted
from flashedu.memory.machine import UNCOUNTED
from flashedu.stages import triton_mode
from flashedu.stages.contract import check, refuse_gradients
from flashedu.stages.descriptors import columns, empty_like, in_tiles, tiles_of
from flashedu.stages.flash2_tiles import tiles_for_call

import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: a row with no key gives 0


def attention(q, k, v, *, causal=False, scale=None, block_q=None, block_k=None, machine=None):
    """softmax(scale · q kᵀ) v by a Triton kernel; no gradients.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, bfloat16 or float32, on
    the GPU, or on the CPU where there is none and kernels are interpreted. Any strides.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. block_q, block_k: queries and keys in a tile, powers of two from 16 to 256;
    None takes some that fit this card.
    machine: a `Machine` that counts what the interpreted kernel moves, or None.
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
    sees, −inf if it sees none.
    """
    problem, scale = check(
        "flash1", q, k, v,
        causal=causal, scale=scale, block_q=block_q, block_k=block_k, machine=machine,
    )  # fmt: skip
    triton_mode.check("flash1", q, machine)
    if machine is not None:
        k, v = k.clone(), v.clone()  # told apart by their addresses, also if k is v
    tile = tiles_for_call(q, problem, block_q, block_k).forward
    refuse_gradients("flash1", q, k, v)
    return forward(q, k, v, problem, scale, machine or UNCOUNTED, tile)


@triton.jit
def forward_kernel(
    Q, K, V, O, LSE, O_F32, M, L, scale, H, Nq, Nk, D,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """o and lse of one head. Q, K, V, O: (B, heads, N, D), from `tiles_of`."""
    Q, O = in_tiles(Q, BLOCK_Q, COLUMNS), in_tiles(O, BLOCK_Q, COLUMNS)
    K, V = in_tiles(K, BLOCK_K, COLUMNS), in_tiles(V, BLOCK_K, COLUMNS)
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    head = tl.program_id(0).to(tl.int64) * Nq  # its first row in LSE, O_F32, M and L
    cols = tl.arange(0, COLUMNS)

    lowest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    for i in tl.range(0, Nq, BLOCK_Q):
        rows = i + tl.arange(0, BLOCK_Q)
        here, exist = _elements(head + rows, rows < Nq, cols, D)
        tl.store(O_F32 + here, tl.zeros([BLOCK_Q, COLUMNS], tl.float32), mask=exist)
        tl.store(M + head + rows, lowest, mask=rows < Nq)
        tl.store(L + head + rows, tl.zeros([BLOCK_Q], tl.float32), mask=rows < Nq)

    for j in tl.range(0, Nk, BLOCK_K):
        tl.debug_barrier()  # what some threads stored, others load
        k_j = K.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
        v_j = V.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)

        first = 0
        if CAUSAL:  # the first query tile that sees a key of this one
            first = tl.maximum(0, j - (Nk - Nq)) // BLOCK_Q * BLOCK_Q
        for i in tl.range(first, Nq, BLOCK_Q):
            rows = i + tl.arange(0, BLOCK_Q)
            here, exist = _elements(head + rows, rows < Nq, cols, D)
            q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)
            o_i = tl.load(O_F32 + here, mask=exist, other=0)
            m_i = tl.load(M + head + rows, mask=rows < Nq, other=LOWEST)
            l_i = tl.load(L + head + rows, mask=rows < Nq, other=0)

            s_ij = scale * tl.dot(q_i, k_j.T, input_precision="ieee")
            visible = (j + tl.arange(0, BLOCK_K) < Nk)[None, :]
            if CAUSAL:
                keys = j + tl.arange(0, BLOCK_K)
                visible = visible & (keys[None, :] <= rows[:, None] + Nk - Nq)
            s_ij = tl.where(visible, s_ij, float("-inf"))

            m_new = tl.maximum(m_i, tl.max(s_ij, 1))
            alpha = tl.exp(m_i - m_new)
            p_ij = tl.exp(s_ij - m_new[:, None])
            l_new = alpha * l_i + tl.sum(p_ij, 1)
            pv_ij = tl.dot(p_ij.to(v_j.dtype), v_j, input_precision="ieee")
            divisor = tl.where(l_new > 0, l_new, 1)
            o_i = (o_i * (alpha * l_i)[:, None] + pv_ij) / divisor[:, None]

            tl.store(O_F32 + here, o_i, mask=exist)
            tl.store(M + head + rows, m_new, mask=rows < Nq)
            tl.store(L + head + rows, l_new, mask=rows < Nq)

    tl.debug_barrier()
    for i in tl.range(0, Nq, BLOCK_Q):
        rows = i + tl.arange(0, BLOCK_Q)
        here, exist = _elements(head + rows, rows < Nq, cols, D)
        o_i = tl.load(O_F32 + here, mask=exist, other=0)
        m_i = tl.load(M + head + rows, mask=rows < Nq, other=0)
        l_i = tl.load(L + head + rows, mask=rows < Nq, other=0)
        log_l = tl.log(tl.where(l_i > 0, l_i, 1))
        lse_i = tl.where(l_i > 0, m_i + log_l, float("-inf"))
        O.store([b, h, i, 0], o_i.to(O.dtype).reshape(1, 1, BLOCK_Q, COLUMNS))
        tl.store(LSE + head + rows, lse_i, mask=rows < Nq)


@triton.jit
def _elements(rows, rows_exist, cols, D):
    """Where the elements of some rows of a contiguous array of D columns are; which exist."""
    return rows[:, None] * D + cols[None, :], rows_exist[:, None] & (cols < D)[None, :]


@triton_mode.on_its_card
def forward(q, k, v, problem, scale, machine, tile):
    """o (B, H, Nq, D) and lse (B, H, Nq), by one program for each head.

    Parallel over heads alone: two programs of one head would both update its o.
    """
    (B, H, Nq, D), (_, H_kv, Nk, _) = q.shape, k.shape
    f32 = torch.float32
    o_f32 = machine.hbm.scratch("o_f32", (B, H, Nq, D), like=q, dtype=f32).data
    m, l, lse = (
        machine.hbm.scratch(name, (B, H, Nq, 1), like=q, dtype=f32).data[..., 0]
        for name in ("m", "l", "lse")
    )
    if 0 in (B, Nq, Nk):
        return torch.zeros_like(q), lse.fill_(-torch.inf)
    o = empty_like(q)
    Q, O = tiles_of(q, tile.block_q), tiles_of(o, tile.block_q)
    K, V = tiles_of(k, tile.block_k), tiles_of(v, tile.block_k)

    arrays = dict(q=Q, k=K, v=V, o=O, lse=lse, o_f32=o_f32, m=m, l=l)
    with counted(machine, "flash1", problem, **arrays):
        forward_kernel[(B * H,)](
            Q, K, V, O, lse, o_f32, m, l, scale, H, Nq, Nk, D,
            GROUP=H // H_kv, COLUMNS=columns(D), CAUSAL=problem.causal,
            BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return o.to(q.dtype).contiguous(), lse
