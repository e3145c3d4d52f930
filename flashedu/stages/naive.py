"""Standard attention, as a library runs it: three kernels, one after the other.

    S = scale · q kᵀ        P = softmax(S)        O = P v

A kernel's on-chip memory is lost when it ends, so S and P, N × N each, are written to HBM and
read back. They are the bill: 4 N² values moved, for 4 N D of inputs and output.

Source: FlashAttention (arXiv 2205.14135), Algorithm 0.
"""

import numpy as np

from flashedu.memory.machine import UNCOUNTED
from flashedu.stages.contract import check

LOWEST = np.finfo(np.float32).min  # in place of -inf, so that a row with no key gives 0, not NaN


def attention(q, k, v, *, causal=False, scale=None, machine=None):
    """softmax(scale · q kᵀ) v, with S and P in HBM.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, float32 or float64.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. machine: a `Machine` that counts, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract, and ValueError where a score
    is too large for float16, in which S is stored.
    """
    problem, scale = check("naive", q, k, v, causal=causal, scale=scale)
    B, H, Nq, Nk = problem.B, problem.H, problem.Nq, problem.Nk
    machine = machine or UNCOUNTED
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
        try:
            with np.errstate(over="raise"):
                S.store(rows, s)
        except FloatingPointError:
            raise ValueError(
                f"q and k must have scores below {np.finfo(q.dtype).max:g}, the largest "
                f"{q.dtype}, in which standard attention stores S; got {abs(s).max():g}: "
                "pass float32, or take the stage 'tiled', which never stores S"
            ) from None

    with machine.kernel("naive softmax", problem):
        s = S.load()
        if causal:
            s = np.where(np.tri(Nq, Nk, Nk - Nq, dtype=bool), s, -np.inf)
        m = s.max(axis=-1, keepdims=True, initial=LOWEST)  # (B, H, Nq, 1)
        p = np.exp(s - m)
        l = p.sum(axis=-1, keepdims=True)
        p = p / np.where(l == 0, 1, l)
        sram.hold(p_ij=p)
        P.store(rows, p)

    with machine.kernel("naive output", problem):
        o = matmul(P.load(), V.load())  # (B, H, Nq, D)
        sram.hold(o_i=o)
        O.store(rows, o)

    return O.data
