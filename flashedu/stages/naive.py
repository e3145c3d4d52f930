"""Standard attention, as a library runs it: three kernels, one after the other.

    S = scale · q kᵀ        P = softmax(S)        O = P v

A kernel's on-chip memory is lost when it ends, so S and P, N × N each, are written to HBM and
read back. They are the bill: 4 N² values moved, for 4 N D of inputs and output. The backward keeps
P from the forward and moves 7 N² values more.

Source: FlashAttention (arXiv 2205.14135), Algorithm 0, and Algorithm 3 for the backward.
"""

import numpy as np

from flashedu.memory.machine import UNCOUNTED
from flashedu.stages.contract import check


def attention(q, k, v, *, causal=False, scale=None, machine=None):
    """softmax(scale · q kᵀ) v, with S and P in HBM.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, float32 or float64.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. machine: a `Machine` that counts, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract, and ValueError where a score
    is too large for float16, in which S is stored.
    """
    problem, scale = check("naive", q, k, v, causal=causal, scale=scale, machine=machine)
    try:
        return forward(q, k, v, problem, scale, machine or UNCOUNTED)[0]
    except FloatingPointError:
        raise ValueError(
            f"q and k must have scores within ±{np.finfo(q.dtype).max:g}, the range of {q.dtype}, "
            "in which standard attention stores S; got larger ones: pass a wider dtype, or take "
            "the stage 'tiled', which never stores S"
        ) from None


def forward(q, k, v, problem, scale, machine):
    """o (B, H, Nq, D), and P (B, H, Nq, Nk), which a backward would need."""
    B, H, Nq, Nk = problem.B, problem.H, problem.Nq, problem.Nk
    hbm, sram, matmul = machine.hbm, machine.sram, machine.matmul

    Q = hbm.array("q", q)
    K = hbm.array("k", k, shared_by=problem.group)
    V = hbm.array("v", v, shared_by=problem.group)
    S = hbm.scratch("s", (B, H, Nq, Nk), like=q)
    P = hbm.scratch("p", (B, H, Nq, Nk), like=q)
    O = hbm.output("o", q.shape, like=q)
    rows = slice(0, Nq)  # all of them

    with machine.kernel("naive scores", problem):
        s = scale * matmul(Q.load(), K.load().swapaxes(-1, -2))  # (B, H, Nq, Nk)
        sram.hold(s_ij=s)
        with np.errstate(over="raise"):  # a score beyond float16
            S.store(rows, s)

    with machine.kernel("naive softmax", problem):
        s = S.load()
        if problem.causal:
            s = np.where(np.tri(Nq, Nk, Nk - Nq, dtype=bool), s, -np.inf)
        lowest = np.finfo(s.dtype).min  # finite: a row with no key gives 0
        m = s.max(axis=-1, keepdims=True, initial=lowest)  # (B, H, Nq, 1)
        p = np.exp(s - m)
        l = p.sum(axis=-1, keepdims=True)
        p = p / np.where(l == 0, 1, l)
        sram.hold(p_ij=p)
        P.store(rows, p)

    with machine.kernel("naive output", problem):
        o = matmul(P.load(), V.load())  # (B, H, Nq, D)
        sram.hold(o_i=o)
        O.store(rows, o)

    return O.data, P.data


def backward(do, q, k, v, p, problem, scale, machine):
    """dq, dk, dv from do (B, H, Nq, D) and the P that `forward` left: five kernels.

    dv = pᵀ do    dp = do vᵀ    ds = p ∘ (dp − rowsum(p ∘ dp))    dq = scale · ds k
    dk = scale · dsᵀ q
    """
    B, H, Nq, Nk, D = problem.B, problem.H, problem.Nq, problem.Nk, problem.D
    hbm, sram, matmul = machine.hbm, machine.sram, machine.matmul

    Q, DO, P = hbm.array("q", q), hbm.array("do", do), hbm.array("p", p)
    K = hbm.array("k", k, shared_by=problem.group)
    V = hbm.array("v", v, shared_by=problem.group)
    DP = hbm.scratch("dp", (B, H, Nq, Nk), like=q)
    DS = hbm.scratch("ds", (B, H, Nq, Nk), like=q)
    DQ = hbm.output("dq", q.shape, like=q)
    DK, DV = hbm.output("dk", k.shape, like=k), hbm.output("dv", v.shape, like=v)
    queries, keys = slice(0, Nq), slice(0, Nk)  # all of them

    def sum_over_group(dx):
        """(B, H, Nk, D) → (B, H_kv, Nk, D): heads that share a key head add up."""
        return dx.reshape(B, problem.H_kv, problem.group, Nk, D).sum(axis=2)

    with machine.kernel("naive dv", problem):
        dv = matmul(P.load().swapaxes(-1, -2), DO.load())
        sram.hold(dv_j=dv)
        DV.store(keys, sum_over_group(dv))

    with machine.kernel("naive dp", problem):
        dp = matmul(DO.load(), V.load().swapaxes(-1, -2))  # (B, H, Nq, Nk)
        sram.hold(dp_ij=dp)
        DP.store(queries, dp)

    with machine.kernel("naive ds", problem):
        p, dp = P.load(), DP.load()
        ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
        sram.hold(ds_ij=ds)
        DS.store(queries, ds)

    with machine.kernel("naive dq", problem):
        dq = scale * matmul(DS.load(), K.load())
        sram.hold(dq_i=dq)
        DQ.store(queries, dq)

    with machine.kernel("naive dk", problem):
        dk = scale * matmul(DS.load().swapaxes(-1, -2), Q.load())
        sram.hold(dk_j=dk)
        DK.store(keys, sum_over_group(dk))

    return DQ.data, DK.data, DV.data
