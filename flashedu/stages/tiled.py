"""Attention in tiles: S is made on chip, a tile at a time, and never sees HBM.

A tile of queries stays in SRAM while tiles of keys pass by. The softmax of a row needs the row's
maximum before its first exponential and its sum before its first weight, so the keys pass by
three times, and each time the same scores are computed again:

    m = max(s)        l = Σ exp(s − m)        o = Σ exp(s − m) / l · v

S costs no traffic any more; K costs three readings for each tile of queries.

Source: the three-pass safe softmax of Milakov and Gimelshein (arXiv 1805.02867), Algorithm 2.
"""

import numpy as np

from flashedu.memory.machine import UNCOUNTED
from flashedu.stages.contract import check


def attention(q, k, v, *, causal=False, scale=None, block_q=128, block_k=64, machine=None):
    """softmax(scale · q kᵀ) v, tile by tile, in three passes over k.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D), H a multiple of H_kv. float16, float32 or float64.
    causal: query i sees the keys up to i + Nk − Nq. A query that sees no key gives 0.
    scale: 1/√D if None. block_q, block_k: queries and keys in a tile.
    machine: a `Machine` that counts, or None.
    Returns o: (B, H, Nq, D), of q's dtype.
    Raises TypeError or ValueError for inputs outside this contract, and SRAMOverflow if the tiles
    do not fit the machine.
    """
    problem, scale = check(
        "tiled", q, k, v,
        causal=causal, scale=scale, block_q=block_q, block_k=block_k, machine=machine,
    )  # fmt: skip
    return forward(q, k, v, problem, scale, machine or UNCOUNTED)


def forward(q, k, v, problem, scale, machine):
    """o (B, H, Nq, D). No query tile needs another."""
    Nq, Nk, causal = problem.Nq, problem.Nk, problem.causal
    hbm, sram, matmul = machine.hbm, machine.sram, machine.matmul

    Q = hbm.array("q", q)
    K = hbm.array("k", k, shared_by=problem.group)
    V = hbm.array("v", v, shared_by=problem.group)
    O = hbm.output("o", q.shape, like=q)

    def scores(q_i, i, j):
        """s_ij = scale · q_i k_jᵀ: (B, H, block_q, block_k)."""
        s_ij = scale * matmul(q_i, K.load(j).swapaxes(-1, -2))
        if causal:
            queries, keys = np.arange(i.start, i.stop), np.arange(j.start, j.stop)
            s_ij = np.where(keys <= queries[:, None] + Nk - Nq, s_ij, -np.inf)
        sram.hold(s_ij=s_ij)
        return s_ij

    with machine.kernel("tiled", problem):
        for i in sram.tiles(Nq, problem.block_q):
            keys_seen = max(0, i.stop + Nk - Nq) if causal else Nk
            q_i = Q.load(i)  # (B, H, block_q, D)

            lowest = np.finfo(q_i.dtype).min  # finite: a row with no key gives 0
            m_i = np.full_like(q_i[..., :1], lowest)  # (B, H, block_q, 1)
            sram.hold(m_i=m_i)
            for j in sram.tiles(Nk, problem.block_k, stop=keys_seen):
                s_ij = scores(q_i, i, j)
                m_i = np.maximum(m_i, s_ij.max(axis=-1, keepdims=True))

            l_i = np.zeros_like(m_i)
            sram.hold(l_i=l_i)
            for j in sram.tiles(Nk, problem.block_k, stop=keys_seen):
                s_ij = scores(q_i, i, j)
                l_i = l_i + np.exp(s_ij - m_i).sum(axis=-1, keepdims=True)
            l_i = np.where(l_i == 0, 1, l_i)

            o_i = np.zeros_like(q_i)
            sram.hold(o_i=o_i)
            for j in sram.tiles(Nk, problem.block_k, stop=keys_seen):
                p_ij = np.exp(scores(q_i, i, j) - m_i) / l_i  # takes the place of s_ij
                o_i = o_i + matmul(p_ij, V.load(j))
            O.store(i, o_i)

    return O.data
