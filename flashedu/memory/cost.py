"""Closed forms: what each stage reads, writes, holds and multiplies, as formulas.

They are written from the algorithms, not from the counters; the tests hold the two equal, to the
byte. Units: bytes, and FLOPs of matrix products (2 for each multiply-add). Exponentials, maxima
and sums are not counted, as in the papers' TFLOP/s.

Letters: w is the bytes of a value in HBM, a the bytes of a value in the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flashedu.memory.problem import Problem
from flashedu.units import human_bytes


@dataclass(frozen=True)
class Cost:
    """What one kernel, or one stage, asks of the memories and of the arithmetic units."""

    hbm_read_bytes: int = 0
    hbm_write_bytes: int = 0
    hbm_extra_bytes: int = 0  # memory beside inputs and results
    sram_peak_bytes: int | None = 0  # of one program; None where a compiler decides
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.hbm_read_bytes + other.hbm_read_bytes,
            self.hbm_write_bytes + other.hbm_write_bytes,
            self.hbm_extra_bytes + other.hbm_extra_bytes,
            _larger(self.sram_peak_bytes, other.sram_peak_bytes),
            self.flops + other.flops,
        )

    @property
    def hbm_bytes(self) -> int:
        """Bytes moved between HBM and SRAM, both ways."""
        return self.hbm_read_bytes + self.hbm_write_bytes

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: FLOPs for each byte of HBM traffic."""
        return self.flops / self.hbm_bytes if self.hbm_bytes else 0.0


def _larger(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


# naive: three kernels, S and P in HBM between them


def naive_scores(p: Problem) -> Cost:
    """S = scale · q kᵀ."""
    w, a, heads = p.item_bytes, p.acc_bytes, p.B * p.H
    return Cost(
        hbm_read_bytes=heads * (p.Nq + p.Nk) * p.D * w,
        hbm_write_bytes=heads * p.Nq * p.Nk * w,
        hbm_extra_bytes=heads * p.Nq * p.Nk * w,
        sram_peak_bytes=(p.Nq + p.Nk) * p.D * w + p.Nq * p.Nk * a,
        flops=2 * heads * p.Nq * p.Nk * p.D,
    )


def naive_softmax(p: Problem) -> Cost:
    """P = softmax(S)."""
    w, a, heads = p.item_bytes, p.acc_bytes, p.B * p.H
    return Cost(
        hbm_read_bytes=heads * p.Nq * p.Nk * w,
        hbm_write_bytes=heads * p.Nq * p.Nk * w,
        hbm_extra_bytes=heads * p.Nq * p.Nk * w,
        sram_peak_bytes=p.Nq * p.Nk * (w + a),
    )


def naive_output(p: Problem) -> Cost:
    """O = P v."""
    w, a, heads = p.item_bytes, p.acc_bytes, p.B * p.H
    return Cost(
        hbm_read_bytes=heads * (p.Nq * p.Nk + p.Nk * p.D) * w,
        hbm_write_bytes=heads * p.Nq * p.D * w,
        sram_peak_bytes=(p.Nq * p.Nk + p.Nk * p.D) * w + p.Nq * p.D * a,
        flops=2 * heads * p.Nq * p.Nk * p.D,
    )


def naive(p: Problem) -> Cost:
    """Standard attention: Θ(N D + N²) bytes."""
    return naive_scores(p) + naive_softmax(p) + naive_output(p)


def naive_backward(p: Problem) -> Cost:
    """The standard backward, with P kept from the forward: 7 N² values, and dp and ds as memory."""
    kernels = (naive_dv, naive_dp, naive_ds, naive_dq, naive_dk)
    return sum((kernel(p) for kernel in kernels), Cost())


def naive_dv(p: Problem) -> Cost:
    """dv = pᵀ do."""
    w, a, heads = p.item_bytes, p.acc_bytes, p.B * p.H
    reads = p.Nq * p.Nk + p.Nq * p.D
    return Cost(
        hbm_read_bytes=heads * reads * w,
        hbm_write_bytes=p.B * p.H_kv * p.Nk * p.D * w,
        sram_peak_bytes=reads * w + p.Nk * p.D * a,
        flops=2 * heads * p.Nq * p.Nk * p.D,
    )


def naive_dp(p: Problem) -> Cost:
    """dp = do vᵀ: as S = scale · q kᵀ."""
    return naive_scores(p)


def naive_ds(p: Problem) -> Cost:
    """ds = p ∘ (dp − rowsum(p ∘ dp))."""
    w, a, square = p.item_bytes, p.acc_bytes, p.Nq * p.Nk
    return Cost(
        hbm_read_bytes=p.B * p.H * 2 * square * w,
        hbm_write_bytes=p.B * p.H * square * w,
        hbm_extra_bytes=p.B * p.H * square * w,
        sram_peak_bytes=square * (2 * w + a),
    )


def naive_dq(p: Problem) -> Cost:
    """dq = scale · ds k: as O = P v."""
    return naive_output(p)


def naive_dk(p: Problem) -> Cost:
    """dk = scale · dsᵀ q."""
    return naive_dv(p)


# tiled and online: a query tile stays in SRAM while key tiles pass by


def tiled(p: Problem) -> Cost:
    """Three passes over k and one over v, for each query tile."""
    return _forward(p, k_passes=3, v_passes=1)


def online(p: Problem) -> Cost:
    """One pass over k and v for each query tile; the log-sum-exp is kept for the backward."""
    lse_bytes = p.B * p.H * p.Nq * p.acc_bytes
    lse = Cost(hbm_write_bytes=lse_bytes, hbm_extra_bytes=lse_bytes)
    return _forward(p, k_passes=1, v_passes=1) + lse


def _forward(p: Problem, k_passes: int, v_passes: int) -> Cost:
    w, a, heads = p.item_bytes, p.acc_bytes, p.B * p.H
    rows, keys = _query_tiles(p)
    block = np.minimum(p.block_k, keys)
    state = rows * (p.D * w + p.D * a + 2 * a)  # q_i, acc_i, and m_i and l_i
    passing = 2 * block * p.D * w + rows * block * a  # k_j, v_j, s_ij
    passes = k_passes + v_passes
    return Cost(
        hbm_read_bytes=heads * (p.Nq + passes * int(keys.sum())) * p.D * w,
        hbm_write_bytes=heads * p.Nq * p.D * w,
        sram_peak_bytes=int((state + passing).max(initial=0)),
        flops=2 * heads * passes * int((rows * keys).sum()) * p.D,
    )


# online, backward: a key tile stays in SRAM while query tiles pass by


def online_delta(p: Problem) -> Cost:
    """delta = rowsum(do ∘ o)."""
    w, a, rows = p.item_bytes, p.acc_bytes, p.B * p.H * p.Nq
    return Cost(
        hbm_read_bytes=rows * 2 * p.D * w,
        hbm_write_bytes=rows * a,
        hbm_extra_bytes=rows * a,
        sram_peak_bytes=min(p.block_q, p.Nq) * (2 * p.D * w + a),
    )


def online_gradients(p: Problem) -> Cost:
    """dk and dv in SRAM, dq summed in HBM; each tile of S is computed again: 5 products."""
    w, a, heads, kv_heads = p.item_bytes, p.acc_bytes, p.B * p.H, p.B * p.H_kv
    rows, queries = _key_tiles(p)
    queries_passed = int(queries.sum())
    block = np.minimum(p.block_q, queries)
    state = 2 * rows * p.D * (w + a)  # k_j, v_j, dk_j, dv_j
    passing = block * (2 * p.D * w + 2 * a + p.D * a)  # q_i, do_i; lse_i, delta_i; dq_i
    scores = 2 * block * rows * a  # p_ij, ds_ij
    dq_bytes = heads * p.Nq * p.D * a
    return Cost(
        hbm_read_bytes=kv_heads * 2 * p.Nk * p.D * w
        + heads * queries_passed * (2 * p.D * w + 2 * a + p.D * a),
        hbm_write_bytes=dq_bytes  # zeros, to begin with
        + heads * queries_passed * p.D * a
        + kv_heads * 2 * p.Nk * p.D * w,
        hbm_extra_bytes=dq_bytes,
        sram_peak_bytes=int((state + passing + scores).max(initial=0)),
        flops=2 * 5 * heads * int((rows * queries).sum()) * p.D,
    )


def online_round(p: Problem) -> Cost:
    """dq, from the float32 it was summed in to the dtype of q."""
    w, a, values = p.item_bytes, p.acc_bytes, p.B * p.H * p.Nq * p.D
    return Cost(
        hbm_read_bytes=values * a,
        hbm_write_bytes=values * w,
        sram_peak_bytes=min(p.block_q, p.Nq) * p.D * a,
    )


def online_backward(p: Problem) -> Cost:
    """The whole backward of `online`."""
    return online_delta(p) + online_gradients(p) + online_round(p)


# the Triton kernels: a matrix unit multiplies whole tiles, and what is on chip is not counted


def flash1(p: Problem) -> Cost:
    """K and v pass by once; q, and o with its m and l, once for each key tile that they see."""
    w, a, heads = p.item_bytes, p.acc_bytes, p.B * p.H
    state = p.D * a + 2 * a  # of a query: o, m, l in HBM
    extra = Cost(hbm_extra_bytes=heads * p.Nq * (state + a))
    if _empty(p):
        return extra
    _, queries = _key_tiles(p)
    passed = int(queries.sum())
    key_tiles_seen = int((-(-queries // p.block_q)).sum())
    return extra + Cost(
        sram_peak_bytes=None,
        hbm_read_bytes=heads * (2 * p.Nk * p.D * w + passed * (p.D * w + state) + p.Nq * state),
        hbm_write_bytes=heads * (p.Nq * state + passed * state + p.Nq * (p.D * w + a)),
        flops=2 * heads * key_tiles_seen * _tile_flops(p),
    )


def flash2(p: Problem) -> Cost:
    """The bytes of `online`."""
    moved = online(p)
    extra = Cost(hbm_extra_bytes=moved.hbm_extra_bytes)
    if _empty(p):
        return extra
    return extra + Cost(
        sram_peak_bytes=None,
        hbm_read_bytes=moved.hbm_read_bytes,
        hbm_write_bytes=moved.hbm_write_bytes,
        flops=2 * p.B * p.H * _visits(p) * _tile_flops(p),
    )


def decode(p: Problem) -> Cost:
    """The query heads of a group are rows of one tile: k and v pass once for all of them."""
    w, a, kv_heads, rows = p.item_bytes, p.acc_bytes, p.B * p.H_kv, p.group * p.Nq
    extra = Cost(hbm_extra_bytes=kv_heads * rows * a)  # lse
    if _empty(p):
        return extra
    results = p.D * w + a  # of a row: o, lse
    if p.splits > 1:
        results = p.D * a + a
        room = -(-p.D // 4) * 4 * a + a  # rows of o begin every 16 bytes
        extra += Cost(hbm_extra_bytes=kv_heads * p.splits * rows * room)
    keys = _packed_tiles(p)
    return extra + Cost(
        sram_peak_bytes=None,
        hbm_read_bytes=kv_heads * (p.splits * rows + 2 * int(keys.sum())) * p.D * w,
        hbm_write_bytes=kv_heads * p.splits * rows * results,
        flops=2 * kv_heads * int((-(-keys // p.block_k)).sum()) * _tile_flops(p),
    )


def paged(p: Problem) -> Cost:
    """As decode, causal, from pages: a last tile is read to its end, which lies in the page. A
    program reads the length of its sequence, and a page number for each tile."""
    contiguous = decode(p.replace(causal=True))
    if _empty(p):
        return contiguous
    w, kv_heads = p.item_bytes, p.B * p.H_kv
    keys = _packed_tiles(p.replace(causal=True))
    tiles = -(-keys // p.block_k)
    beyond = int((tiles * p.block_k - keys).sum())  # rows of a page behind the last key
    programs = len(keys) * p.splits
    moved = 2 * beyond * p.D * w + 4 * programs + 4 * int(tiles.sum())
    return contiguous + _whole_tiles(hbm_read_bytes=kv_heads * moved)


def paged_forward(p: Problem) -> Cost:
    """Both kernels of `paged`; one split needs no merge."""
    return paged(p) if p.splits == 1 or _empty(p) else paged(p) + decode_merge(p)


def decode_merge(p: Problem) -> Cost:
    """o and lse of each row, from those of its splits."""
    w, a, rows = p.item_bytes, p.acc_bytes, p.B * p.H * p.Nq
    return Cost(
        sram_peak_bytes=None,
        hbm_read_bytes=rows * p.splits * (p.D * a + a),
        hbm_write_bytes=rows * (p.D * w + a),
    )


def decode_forward(p: Problem) -> Cost:
    """Both kernels of `decode`; one split needs no merge."""
    return decode(p) if p.splits == 1 or _empty(p) else decode(p) + decode_merge(p)


def flash2_delta(p: Problem) -> Cost:
    """delta = rowsum(do ∘ o)."""
    return replace(online_delta(p), sram_peak_bytes=None)


def flash2_dkdv(p: Problem) -> Cost:
    """A program for each key tile: k_j and v_j once, and all queries that see them."""
    w, a, kv_heads = p.item_bytes, p.acc_bytes, p.B * p.H_kv
    _, queries = _key_tiles(p)
    visits = int((-(-queries // p.block_q)).sum())
    return Cost(
        hbm_read_bytes=kv_heads * 2 * p.Nk * p.D * w
        + p.B * p.H * int(queries.sum()) * (2 * p.D * w + 2 * a),
        hbm_write_bytes=kv_heads * 2 * p.Nk * p.D * w,
        sram_peak_bytes=None,
        flops=4 * p.B * p.H * visits * _tile_flops(p),
    )


def flash2_dq(p: Problem) -> Cost:
    """A program for each query tile: q_i and do_i once, and all keys that they see."""
    w, a, heads = p.item_bytes, p.acc_bytes, p.B * p.H
    _, keys = _query_tiles(p)
    return Cost(
        hbm_read_bytes=heads * (p.Nq * (2 * p.D * w + 2 * a) + int(keys.sum()) * 2 * p.D * w),
        hbm_write_bytes=heads * p.Nq * p.D * w,
        sram_peak_bytes=None,
        flops=3 * heads * _visits(p) * _tile_flops(p),
    )


def flash2_backward(p: Problem) -> Cost:
    """The whole backward of `flash2`: 7 products where `online` has 5, and no sum in HBM."""
    if _empty(p):
        return Cost(hbm_extra_bytes=online_delta(p).hbm_extra_bytes)
    return flash2_delta(p) + flash2_dkdv(p) + flash2_dq(p)


# varlen: flash2, and the runs; their closed forms are for runs that are a whole or a causal mask


def varlen(p: Problem) -> Cost:
    """As flash2; each program also reads the run of each of its queries."""
    if _empty(p):
        return flash2(p)
    return flash2(p) + _whole_tiles(hbm_read_bytes=_runs_of_query_tiles(p))


def varlen_dkdv(p: Problem) -> Cost:
    """As flash2. A program reads four numbers that say which queries see its keys; where those do
    not see all of a tile, it reads their runs."""
    tiles = p.B * -(-p.Nk // p.block_k)
    masked = _masked_visits(p) if not _empty(p) else 0
    moved = 16 * tiles * p.H_kv + 8 * p.B * p.H * masked * p.block_q
    return flash2_dkdv(p) + _whole_tiles(hbm_read_bytes=moved)


def varlen_dq(p: Problem) -> Cost:
    """As flash2, and the runs."""
    return flash2_dq(p) + _whole_tiles(hbm_read_bytes=_runs_of_query_tiles(p))


def varlen_backward(p: Problem) -> Cost:
    """The whole backward of `varlen`."""
    if _empty(p):
        return flash2_backward(p)
    return flash2_delta(p) + varlen_dkdv(p) + varlen_dq(p)


def _runs_of_query_tiles(p: Problem) -> int:
    """Two int32 a query, in whole tiles, for each head."""
    return 8 * p.B * p.H * -(-p.Nq // p.block_q) * p.block_q


def _masked_visits(p: Problem) -> int:
    """Query tiles that the key tiles of one head visit, and that do not see all of the tile."""
    starts, (_, queries) = np.arange(0, p.Nk, p.block_k), _key_tiles(p)
    visits = -(-queries // p.block_q)
    sees_all = np.zeros_like(starts)  # the first query that sees the whole tile
    if p.causal:
        sees_all = np.clip(starts + p.block_k - 1 - (p.Nk - p.Nq), 0, p.Nq)
    sees_all = np.where(starts + p.block_k > p.Nk, p.Nq, sees_all)  # none does
    unmasked = -(-p.Nq // p.block_q) - -(-sees_all // p.block_q)
    return int((visits - np.minimum(visits, unmasked)).sum())


def _whole_tiles(**bytes_: int) -> Cost:
    return Cost(sram_peak_bytes=None, **bytes_)


def _empty(p: Problem) -> bool:
    """No kernel is launched then."""
    return 0 in (p.B, p.Nq, p.Nk)


def _visits(p: Problem) -> int:
    """Tiles of S that the query tiles of one head visit."""
    _, keys = _query_tiles(p)
    return int((-(-keys // p.block_k)).sum())


def _tile_flops(p: Problem) -> int:
    """One product of whole tiles, their columns a power of two and 16 or more."""
    columns = max(16, 1 << (p.D - 1).bit_length())
    return 2 * p.block_q * p.block_k * columns


# which tiles are visited


def _query_tiles(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """For each query tile: its rows, and the rows of all the key tiles that it visits.

    A causal query i sees the keys up to i + Nk − Nq, and a key tile is loaded whole or not at all.
    """
    starts = np.arange(0, p.Nq, p.block_q)
    stops = np.minimum(starts + p.block_q, p.Nq)
    seen = np.clip(stops + (p.Nk - p.Nq), 0, p.Nk) if p.causal else np.full_like(starts, p.Nk)
    keys = np.minimum(-(-seen // p.block_k) * p.block_k, p.Nk)
    return stops - starts, keys


def _packed_tiles(p: Problem) -> np.ndarray:
    """For each tile of packed rows: the rows of all the key tiles that it visits, in all splits.

    A split ends where a tile ends, so splits change no tile. Row r belongs to query r // group.
    """
    stops = np.minimum(np.arange(0, p.group * p.Nq, p.block_q) + p.block_q, p.group * p.Nq)
    last_query = (stops - 1) // p.group
    everything = np.full_like(stops, p.Nk)
    seen = np.clip(last_query + 1 + p.Nk - p.Nq, 0, p.Nk) if p.causal else everything
    return np.minimum(-(-seen // p.block_k) * p.block_k, p.Nk)


def _key_tiles(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """For each key tile: its rows, and the rows of all the query tiles that visit it."""
    starts = np.arange(0, p.Nk, p.block_k)
    stops = np.minimum(starts + p.block_k, p.Nk)
    first_query = np.maximum(0, starts - (p.Nk - p.Nq)) if p.causal else np.zeros_like(starts)
    queries = np.maximum(0, p.Nq - first_query // p.block_q * p.block_q)
    return stops - starts, queries


KERNELS: dict[str, Callable[[Problem], Cost]] = {
    "naive scores": naive_scores,
    "naive softmax": naive_softmax,
    "naive output": naive_output,
    "naive dv": naive_dv,
    "naive dp": naive_dp,
    "naive ds": naive_ds,
    "naive dq": naive_dq,
    "naive dk": naive_dk,
    "tiled": tiled,
    "online": online,
    "online delta": online_delta,
    "online gradients": online_gradients,
    "online round": online_round,
    "flash1": flash1,
    "flash2": flash2,
    "flash2 delta": flash2_delta,
    "flash2 dkdv": flash2_dkdv,
    "flash2 dq": flash2_dq,
    "varlen": varlen,
    "varlen delta": flash2_delta,
    "varlen dkdv": varlen_dkdv,
    "varlen dq": varlen_dq,
    "decode": decode,
    "decode merge": decode_merge,
    "paged": paged,
}

FORWARD: dict[str, Callable[[Problem], Cost]] = {
    "naive": naive,
    "tiled": tiled,
    "online": online,
    "flash1": flash1,
    "flash2": flash2,
    "varlen": varlen,
    "decode": decode_forward,
    "paged": paged_forward,
}

BACKWARD: dict[str, Callable[[Problem], Cost]] = {
    "naive": naive_backward,
    "online": online_backward,
    "flash2": flash2_backward,
    "varlen": varlen_backward,
}


def suggest_tiles(kernel: str, p: Problem, capacity_bytes: int | None) -> str:
    """A sentence: the largest tiles, halving from `p`'s own, with which `kernel` fits."""
    closed_form = KERNELS[kernel]
    best: tuple[int, int, int, int] | None = None
    for block_q in _halvings(p.block_q):
        for block_k in _halvings(p.block_k):
            needs = closed_form(p.replace(block_q=block_q, block_k=block_k)).sram_peak_bytes
            if capacity_bytes is not None and needs is not None and needs <= capacity_bytes:
                best = max(best or (0, 0, 0, 0), (block_q * block_k, block_q, block_k, needs))
    if best is not None:
        _, block_q, block_k, needs = best
        return f"Try block_q={block_q}, block_k={block_k}, which needs {human_bytes(needs)}."
    if kernel.startswith("naive "):
        return "This kernel works on whole matrices: the stage 'tiled' cuts them to fit."
    return "No tile fits, not even one query with one key: give the SRAM more bytes."


def _halvings(block: int) -> list[int]:
    return [block >> s for s in range(block.bit_length())]
