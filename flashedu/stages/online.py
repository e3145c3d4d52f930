"""FlashAttention's idea: the softmax in one pass, and a backward that stores no S.

Forward. Keep, for each row, the maximum m and the sum l of the keys seen so far. When a tile
raises the maximum, what was summed before was too large by exp(m_new − m): rescale, and go on.

    m_new = max(m, rowmax(s))    α = exp(m − m_new)    p = exp(s − m_new)
    l ← α l + rowsum(p)          acc ← α acc + p v     o = acc / l at the end

Backward. One number a row, lse = m + log l, gives every probability back: p = exp(s − lse). So S
is computed again, tile by tile, rather than read: more FLOPs, far fewer bytes.

    delta = rowsum(do ∘ o)    dv = pᵀ do    dp = do vᵀ    ds = p ∘ (dp − delta)
    dq = scale · ds k         dk = scale · dsᵀ q

Source: the online softmax is Milakov and Gimelshein (arXiv 1805.02867), Algorithm 3; forward and
backward are FlashAttention-2 (arXiv 2307.08691), Algorithms 1 and 2, one tile after another.
"""

import torch

from flashedu.memory.hbm import acc_dtype
from flashedu.memory.machine import UNCOUNTED
from flashedu.stages.contract import check


def attention(
    q, k, v, *, causal=False, scale=None, runs=None, block_q=128, block_k=64, machine=None
):
    """softmax(scale · q kᵀ) v in one pass over k and v; differentiable.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, bfloat16, float32 or
    float64, on one device.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    runs: the keys that each query sees, where it is not all or a causal mask, as
    `flashedu.stages.runs` makes them; or None.
    scale: 1/√D if None. block_q, block_k: queries and keys in a tile.
    machine: a `Machine` that counts, forward and backward, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract, and SRAMOverflow if the tiles
    do not fit the machine.
    """
    options = dict(causal=causal, scale=scale, runs=runs, block_q=block_q, block_k=block_k)
    return attention_with_lse(q, k, v, **options, machine=machine)[0]


def attention_with_lse(
    q, k, v, *, causal=False, scale=None, runs=None, block_q=128, block_k=64, machine=None
):
    """As `attention`; returns o and lse.

    lse: (B, H, Nq), the natural log of Σ exp(scale · q kᵀ) over the keys that a query sees, −inf
    if it sees none. float32 (float64 for float64 inputs). Gradients flow through it too.
    """
    problem, scale = check(
        "online", q, k, v,
        causal=causal, scale=scale, runs=runs, block_q=block_q, block_k=block_k, machine=machine,
    )  # fmt: skip
    return _Attention.apply(q, k, v, problem, scale, machine or UNCOUNTED, runs)


def forward(q, k, v, problem, scale, machine, runs=None):
    """o (B, H, Nq, D) and lse (B, H, Nq). No query tile needs another."""
    Nq, Nk, causal = problem.Nq, problem.Nk, problem.causal
    hbm, sram, matmul = machine.hbm, machine.sram, machine.matmul

    Q = hbm.array("q", q)
    K = hbm.array("k", k, shared_by=problem.group)
    V = hbm.array("v", v, shared_by=problem.group)
    O = hbm.output("o", q.shape, like=q)
    LSE = hbm.scratch("lse", (*q.shape[:3], 1), like=q, dtype=acc_dtype(q))

    with machine.kernel("online", problem):
        for i in sram.tiles(Nq, problem.block_q):
            q_i = Q.load(i)  # (B, H, block_q, D)
            lowest = torch.finfo(q_i.dtype).min  # finite: a row with no key gives 0
            m_i = torch.full_like(q_i[..., :1], lowest)  # (B, H, block_q, 1)
            l_i = torch.zeros_like(m_i)
            acc_i = torch.zeros_like(q_i)
            sram.hold(m_i=m_i, l_i=l_i, acc_i=acc_i)

            keys_seen = max(0, i.stop + Nk - Nq) if causal else Nk
            for j in sram.tiles(Nk, problem.block_k, stop=keys_seen):
                k_j, v_j = K.load(j), V.load(j)  # (B, H, block_k, D)
                s_ij = scale * matmul(q_i, k_j.mT)  # (B, H, block_q, block_k)
                sram.hold(s_ij=s_ij)
                if causal or runs:
                    hidden = _hidden(i, j, runs, problem, q.device)
                    s_ij = s_ij.masked_fill(hidden, -torch.inf)

                m_new = torch.maximum(m_i, s_ij.amax(-1, keepdim=True))
                alpha = torch.exp(m_i - m_new)
                p_ij = torch.exp(s_ij - m_new)  # takes the place of s_ij
                l_i = alpha * l_i + p_ij.sum(-1, keepdim=True)
                acc_i = alpha * acc_i + matmul(p_ij, v_j)
                m_i = m_new
                sram.hold(m_i=m_i, l_i=l_i, acc_i=acc_i)  # in the old places

            O.store(i, acc_i / torch.where(l_i == 0, 1, l_i))
            LSE.store(i, m_i + torch.log(l_i))

    return O.data, LSE.data[..., 0]


def backward(do, dlse, q, k, v, o, lse, problem, scale, machine, runs=None):
    """dq, dk, dv from do (B, H, Nq, D) and dlse (B, H, Nq), which may be None.

    A key tile stays in SRAM, with its dk and dv, while the query tiles that see it pass
    by. Each adds to dq_i in HBM, in float32, as it belongs to no one key tile.
    """
    B, H, Nq, Nk, D = problem.B, problem.H, problem.Nq, problem.Nk, problem.D
    hbm, sram, matmul = machine.hbm, machine.sram, machine.matmul
    f32 = acc_dtype(q)  # float64 for float64 inputs

    Q, K, V = hbm.array("q", q), hbm.array("k", k), hbm.array("v", v)
    O, DO = hbm.array("o", o), hbm.array("do", do)
    LSE = hbm.array("lse", lse[..., None])
    DQ = hbm.output("dq", q.shape, like=q)
    DK, DV = hbm.output("dk", k.shape, like=k), hbm.output("dv", v.shape, like=v)
    DELTA = hbm.scratch("delta", (B, H, Nq, 1), like=q, dtype=f32)
    DQ_SUM = hbm.scratch("dq_sum", (B, H, Nq, D), like=q, dtype=f32)

    with machine.kernel("online delta", problem):
        for i in sram.tiles(Nq, problem.block_q):
            do_i, o_i = DO.load(i), O.load(i)  # (B, H, block_q, D)
            delta_i = (do_i * o_i).sum(-1, keepdim=True)  # (B, H, block_q, 1)
            if dlse is not None:
                delta_i = delta_i - dlse[:, :, i, None]  # ∂lse/∂s = p
            sram.hold(delta_i=delta_i)
            DELTA.store(i, delta_i)

    with machine.kernel("online gradients", problem):
        DQ_SUM.store(slice(0, Nq), 0)
        for j in sram.tiles(Nk, problem.block_k):
            k_j, v_j = K.load(j), V.load(j)  # (B, H_kv, block_k, D)
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            sram.hold(dk_j=dk_j, dv_j=dv_j)

            first_query = max(0, j.start - (Nk - Nq)) if problem.causal else 0
            for g in range(problem.group):  # the query heads that share k_j and v_j
                heads = slice(g, None, problem.group)
                for i in sram.tiles(Nq, problem.block_q, start=first_query):
                    q_i = Q.load(i, heads)  # (B, H_kv, block_q, D)
                    do_i = DO.load(i, heads)
                    lse_i, delta_i = LSE.load(i, heads), DELTA.load(i, heads)
                    lse_i = torch.where(lse_i == -torch.inf, torch.inf, lse_i)  # p = 0

                    s_ij = scale * matmul(q_i, k_j.mT)  # (B, H_kv, block_q, block_k)
                    if problem.causal or runs:
                        hidden = _hidden(i, j, runs, problem, q.device)
                        s_ij = s_ij.masked_fill(hidden, -torch.inf)
                    p_ij = torch.exp(s_ij - lse_i)
                    dp_ij = matmul(do_i, v_j.mT)
                    ds_ij = p_ij * (dp_ij - delta_i)
                    sram.hold(p_ij=p_ij, ds_ij=ds_ij)

                    dv_j = dv_j + matmul(p_ij.mT, do_i)
                    dk_j = dk_j + scale * matmul(ds_ij.mT, q_i)
                    dq_i = DQ_SUM.load(i, heads) + scale * matmul(ds_ij, k_j)
                    DQ_SUM.store(i, dq_i, heads)
            DK.store(j, dk_j)
            DV.store(j, dv_j)

    with machine.kernel("online round", problem):
        for i in sram.tiles(Nq, problem.block_q):
            DQ.store(i, DQ_SUM.load(i))

    return DQ.data, DK.data, DV.data


def _hidden(i, j, runs, problem, device):
    """True where a query of tile i does not see a key of tile j: in its future, or not of its run.

    (block_q, block_k), or with runs (B, 1, block_q, block_k).
    """
    keys = torch.arange(j.start, j.stop, device=device)
    if runs:
        first_i, stop_i = (x[:, None, i, None] for x in runs)
        return (keys < first_i) | (keys >= stop_i)
    queries = torch.arange(i.start, i.stop, device=device)[:, None]
    return keys > queries + problem.Nk - problem.Nq


class _Attention(torch.autograd.Function):
    """Hands `forward` and `backward` to PyTorch. Saved for the backward: O(N), never S or P."""

    @staticmethod
    def forward(ctx, q, k, v, problem, scale, machine, runs):
        with torch.autocast(q.device.type, enabled=False):  # the precision is ours to choose
            o, lse = forward(q, k, v, problem, scale, machine, runs)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = problem, scale, machine, runs
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        if torch.is_grad_enabled():  # a result without a graph would drop terms without a word
            raise RuntimeError(
                "create_graph must be False for stage 'online': it has first derivatives only"
            )
        q, k, v, o, lse = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        with torch.autocast(q.device.type, enabled=False):
            gradients = backward(do, dlse, q, k, v, o, lse, *ctx.rest)
        return *gradients, None, None, None, None
