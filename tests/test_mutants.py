"""The suite can tell right from wrong: each classic mistake fails the check that is there for it.

A mutant is a stage with a few words of its source replaced. MUTANTS is a table to read: the
mistake, the words, and the claim that it breaks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch

from flashedu.bench.variants import mutated
from flashedu.memory import Problem, machine
from flashedu.stages import RUNGS, rung
from flashedu.stages.reference import Reference
from flashedu.testing import draw, errors
from tests import contract
from tests.contract import Array, Subject, claims


@dataclass(frozen=True)
class Mutant:
    stage: str
    mistake: str
    caught_by: str  # a claim of tests/contract.py
    old: str
    new: str
    and_also: tuple[tuple[str, str], ...] = ()  # further words to replace
    gpu_only: bool = False  # the interpreter computes right all the same
    cpu_only: bool = False  # a card takes all splits of these sizes in one step
    where: str = ""  # the words stand in a module that the stage imports

    def __str__(self) -> str:
        return f"{self.stage}: {self.mistake}"

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        return ((self.old, self.new), *self.and_also)


def stage_with(
    name: str, changes: tuple[tuple[str, str], ...] = (), device: str = "cpu", where: str = ""
) -> Subject:
    """The stage with its source changed, or that of the module `where` beneath it."""
    above = ("flash3_backward",) if where == "flash3_dq" else ()  # which imports it
    beneath = tuple(f"flashedu.stages.{module}" for module in (*above, where) if module)
    return Subject.of(rung(name), mutated(f"flashedu.stages.{name}", changes, beneath), device)


OUTPUTS, LSE, GRADIENTS = (
    "outputs_match_float64",
    "lse_matches_float64",
    "gradients_match_float64",
)
BLIND = "rows_that_see_no_key_give_zero"
LARGE = "large_logits_stay_finite"
MANY_KEYS = "all_of_many_keys_are_seen"
MANY_TILES = "many_tiles_are_right"
FUTURE = "future_keys_do_not_change_past_outputs"
HEADS = "each_head_reads_its_own_key_head"
LONG = "long_sums_keep_their_precision"
ANY_SCALE = "any_scale_is_right"
TILES = "tile_size_does_not_change_the_result"
WRITTEN = "every_value_is_written"
RUNS = "runs_match_float64"
COUNTED = "counted_bytes_are_the_closed_form"
COUNTED_BACKWARD = "counted_bytes_of_the_backward_are_the_closed_form"

_online_head = "return _Attention.apply(q, k, v, problem, scale, machine or UNCOUNTED, runs)"
_K, _V = (f'{n.upper()} = hbm.array("{n}", {n}, shared_by=problem.group)' for n in "kv")
_mixed = "hbm.array('{0}', np.tile({0}, (1, problem.group, 1, 1)))"
_mixed_torch = "hbm.array('{0}', {0}.repeat(1, problem.group, 1, 1))"

_scores = """k_j = K.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)
            s_ij = tl.dot(q_i, k_j.T, input_precision="ieee")  # scaled"""
_acc = 'tl.dot(p_ij.to(v_j.dtype), v_j, acc_i, input_precision="ieee")'
_dv = 'tl.dot(p_ji.to(do_i.dtype), do_i, dv_j, input_precision="ieee")'
_dq = 'tl.dot(ds_ij.to(k_j.dtype), k_j, dq_i, input_precision="ieee")'

MUTANTS = [
    # naive
    Mutant("naive", "the mask is off by one: a key too many", FUTURE,
           "np.tri(Nq, Nk, Nk - Nq,", "np.tri(Nq, Nk, Nk - Nq + 1,"),
    Mutant("naive", "the mask is off by one: a key too few", OUTPUTS,
           "np.tri(Nq, Nk, Nk - Nq,", "np.tri(Nq, Nk, Nk - Nq - 1,"),
    Mutant("naive", "the mask is aligned top-left", OUTPUTS,
           "np.tri(Nq, Nk, Nk - Nq,", "np.tri(Nq, Nk, 0,"),
    Mutant("naive", "no mask", FUTURE, "if problem.causal:", "if False:"),
    Mutant("naive", "no maximum subtracted", LARGE, "p = np.exp(s - m)", "p = np.exp(s)"),
    Mutant("naive", "softmax over the queries", OUTPUTS,
           "l = p.sum(axis=-1, keepdims=True)", "l = p.sum(axis=-2, keepdims=True)"),
    Mutant("naive", "scale is 1/D", OUTPUTS,
           "s = scale * matmul(Q", "s = 1 / problem.D * matmul(Q"),
    Mutant("naive", "the caller's scale is ignored", ANY_SCALE,
           "s = scale * matmul(Q", "s = problem.D**-0.5 * matmul(Q"),
    Mutant("naive", "-inf − -inf: a row with no key gives NaN", BLIND,
           "initial=lowest", "initial=-np.inf"),
    Mutant("naive", "query heads matched with the wrong key heads", HEADS,
           f'Q = hbm.array("q", q)\n    {_K}', f'Q = hbm.array("q", q); K = {_mixed.format("k")}',
           ((f"{_V}\n    S", f"V = {_mixed.format('v')}\n    S"),)),
    # tiled
    Mutant("tiled", "no maximum pass", LARGE,
           "m_i = np.maximum(m_i, s_ij.max(axis=-1, keepdims=True))", "m_i = np.zeros_like(m_i)"),
    Mutant("tiled", "the maximum of the last tile, not of the row", LARGE,
           "m_i = np.maximum(m_i, s_ij.max(axis=-1, keepdims=True))",
           "m_i = np.maximum(lowest, s_ij.max(axis=-1, keepdims=True))"),
    Mutant("tiled", "the sum of the last tile, not of the row", OUTPUTS,
           "l_i = l_i + np.exp(", "l_i = np.exp("),
    Mutant("tiled", "the output of the last tile, not of the row", OUTPUTS,
           "o_i = o_i + matmul", "o_i = matmul"),
    Mutant("tiled", "the last tile of keys is left out", OUTPUTS,
           "if causal else Nk\n", "if causal else Nk - problem.block_k\n"),
    Mutant("tiled", "keys that do not fill a tile are left out", OUTPUTS,
           "if causal else Nk\n", "if causal else Nk // problem.block_k * problem.block_k\n"),
    Mutant("tiled", "the mask is off by one: a key too many", FUTURE,
           "keys <= queries[:, None] + Nk - Nq", "keys <= queries[:, None] + Nk - Nq + 1"),
    Mutant("tiled", "the mask is off by one: a key too few", OUTPUTS,
           "keys <= queries[:, None] + Nk - Nq", "keys < queries[:, None] + Nk - Nq"),
    Mutant("tiled", "a diagonal tile is left out", OUTPUTS,
           "max(0, i.stop + Nk - Nq) if causal", "max(0, i.start + Nk - Nq) if causal"),
    Mutant("tiled", "scale is 1/D", OUTPUTS, "s_ij = scale *", "s_ij = 1 / problem.D *"),
    Mutant("tiled", "no scale", OUTPUTS, "s_ij = scale * matmul", "s_ij = matmul"),
    Mutant("tiled", "divided by a sum of 0", BLIND, "l_i = np.where(l_i == 0, 1, l_i)",
           "pass"),
    Mutant("tiled", "query heads matched with the wrong key heads", HEADS,
           _K, "K = " + _mixed.format("k"), ((_V, "V = " + _mixed.format("v")),)),
    Mutant("tiled", "the last query tile is not stored", WRITTEN,
           "            O.store(i, o_i)", "            if i.stop < Nq: O.store(i, o_i)"),
    # online, forward
    Mutant("online", "acc is not rescaled", OUTPUTS,
           "acc_i = alpha * acc_i + ", "acc_i = acc_i + "),
    Mutant("online", "l is not rescaled", OUTPUTS, "l_i = alpha * l_i + ", "l_i = l_i + "),
    Mutant("online", "acc is rescaled by the wrong sign", OUTPUTS,
           "alpha = torch.exp(m_i - m_new)", "alpha = torch.exp(m_new - m_i)"),
    Mutant("online", "no maximum subtracted", LARGE,
           "m_new = torch.maximum(m_i, s_ij.amax(-1, keepdim=True))",
           "m_new = torch.zeros_like(m_i)"),
    Mutant("online", "the maximum of the tile, not of the row so far", OUTPUTS,
           "m_new = torch.maximum(m_i, s_ij.amax(-1, keepdim=True))",
           "m_new = s_ij.amax(-1, keepdim=True).clamp(min=lowest)"),
    Mutant("online", "the last tile of keys is left out", OUTPUTS,
           "if causal else Nk\n", "if causal else Nk - problem.block_k\n"),
    Mutant("online", "keys that do not fill a tile are left out", TILES,
           "if causal else Nk\n", "if causal else Nk // problem.block_k * problem.block_k\n"),
    Mutant("online", "the mask is off by one: a key too many", FUTURE,
           "return keys > queries", "return keys > 1 + queries"),
    Mutant("online", "the mask is off by one: a key too few", OUTPUTS,
           "return keys > queries", "return keys >= queries"),
    Mutant("online", "the mask is aligned top-left", OUTPUTS,
           "queries + problem.Nk - problem.Nq", "queries"),
    Mutant("online", "scale is 1/D", OUTPUTS,
           _online_head, _online_head.replace("scale", "1 / problem.D")),
    Mutant("online", "the caller's scale is ignored", ANY_SCALE,
           _online_head, _online_head.replace("scale", "problem.D**-0.5")),
    Mutant("online", "divided by a sum of 0", BLIND,
           "acc_i / torch.where(l_i == 0, 1, l_i)", "acc_i / l_i"),
    Mutant("online", "not divided by the sum", OUTPUTS,
           "acc_i / torch.where(l_i == 0, 1, l_i)", "acc_i"),
    Mutant("online", "-inf − -inf: a row with no key gives NaN", BLIND,
           "m_i = torch.full_like(q_i[..., :1], lowest)",
           "m_i = torch.full_like(q_i[..., :1], -torch.inf)"),
    Mutant("online", "acc in the precision of the inputs", LONG,
           "acc_i = alpha * acc_i + matmul(p_ij, v_j)",
           "acc_i = (alpha * acc_i + matmul(p_ij, v_j)).to(q.dtype).to(acc_i.dtype)"),
    Mutant("online", "l in the precision of the inputs", LONG,
           "l_i = alpha * l_i + p_ij.sum(-1, keepdim=True)",
           "l_i = (alpha * l_i + p_ij.sum(-1, keepdim=True)).to(q.dtype).to(l_i.dtype)"),
    Mutant("online", "query heads matched with the wrong key heads", HEADS,
           _K, "K = " + _mixed_torch.format("k"), ((_V, "V = " + _mixed_torch.format("v")),)),
    Mutant("online", "lse in base 2", LSE, "m_i + torch.log(l_i)", "m_i + torch.log2(l_i)"),
    Mutant("online", "lse without the maximum", LSE, "m_i + torch.log(l_i)", "torch.log(l_i)"),
    # online, backward
    Mutant("online", "delta left out", GRADIENTS,
           "ds_ij = p_ij * (dp_ij - delta_i)", "ds_ij = p_ij * dp_ij"),
    Mutant("online", "the gradient of lse left out", "gradients_of_lse_match_float64",
           "if dlse is not None:", "if False:"),
    Mutant("online", "the gradient of lse added, not subtracted", "gradients_of_lse_match_float64",
           "delta_i - dlse", "delta_i + dlse"),
    Mutant("online", "dk is not scaled", GRADIENTS, "dk_j + scale * matmul", "dk_j + matmul"),
    Mutant("online", "dq is not scaled", GRADIENTS,
           "+ scale * matmul(ds_ij, k_j)", "+ matmul(ds_ij, k_j)"),
    Mutant("online", "dq of the last key tile, not of all", GRADIENTS,
           "dq_i = DQ_SUM.load(i, heads) + scale", "dq_i = scale"),
    Mutant("online", "dq summed in the precision of the inputs", LONG,
           "DQ_SUM.store(i, dq_i, heads)", "DQ_SUM.store(i, dq_i.to(q.dtype), heads)"),
    Mutant("online", "dv summed in the precision of the inputs", LONG,
           "dv_j = dv_j + matmul(p_ij.mT, do_i)",
           "dv_j = (dv_j + matmul(p_ij.mT, do_i)).to(q.dtype).to(dv_j.dtype)"),
    Mutant("online", "dk averaged over the heads of a group, not summed", GRADIENTS,
           "            DK.store(j, dk_j)", "            DK.store(j, dk_j / problem.group)"),
    Mutant("online", "the backward matches the wrong heads", GRADIENTS,
           "slice(g, None, problem.group)", "slice(g * problem.H_kv, (g + 1) * problem.H_kv)"),
    Mutant("online", "the backward has no mask", GRADIENTS,
           "if problem.causal or runs:\n", "if False:\n"),
    Mutant("online", "the backward leaves out the diagonal tile", GRADIENTS,
           "max(0, j.start - (Nk - Nq)) if problem.causal",
           "max(0, j.stop - (Nk - Nq)) if problem.causal"),
    Mutant("online", "a row with no key gives NaN gradients", BLIND,
           "torch.where(lse_i == -torch.inf, torch.inf, lse_i)", "lse_i"),
    Mutant("online", "dp from do and k", GRADIENTS, "matmul(do_i, v_j.mT)", "matmul(do_i, k_j.mT)"),
    Mutant("online", "the sum of dq does not start at 0", WRITTEN,
           "DQ_SUM.store(slice(0, Nq), 0)", "pass"),
    # flash1
    Mutant("flash1", "o is not rescaled", OUTPUTS,
           "o_i * (alpha * l_i)[:, None]", "o_i * l_i[:, None]"),
    Mutant("flash1", "o is not multiplied by its sum again", OUTPUTS,
           "o_i * (alpha * l_i)[:, None]", "o_i * alpha[:, None]"),
    Mutant("flash1", "l is not rescaled", OUTPUTS,
           "l_new = alpha * l_i + tl.sum(p_ij, 1)", "l_new = l_i + tl.sum(p_ij, 1)"),
    Mutant("flash1", "no maximum subtracted", LARGE,
           "m_new = tl.maximum(m_i, tl.max(s_ij, 1))", "m_new = m_i * 0"),
    Mutant("flash1", "m is not written back", OUTPUTS,
           "tl.store(M + head + rows, m_new,", "tl.store(M + head + rows, m_i,"),
    Mutant("flash1", "o does not start at 0", WRITTEN,
           "tl.store(O_F32 + here, tl.zeros([BLOCK_Q, COLUMNS], tl.float32), mask=exist)", "pass"),
    Mutant("flash1", "keys that do not exist are seen", OUTPUTS,
           "visible = (j + tl.arange(0, BLOCK_K) < Nk)[None, :]",
           "visible = (j + tl.arange(0, BLOCK_K) < Nk + BLOCK_K)[None, :]"),
    Mutant("flash1", "the last tile of keys is left out", OUTPUTS,
           "for j in tl.range(0, Nk, BLOCK_K):",
           "for j in tl.range(0, tl.maximum(1, Nk - BLOCK_K), BLOCK_K):"),
    Mutant("flash1", "the mask is off by one: a key too many", FUTURE,
           "keys[None, :] <= rows[:, None] + Nk - Nq",
           "keys[None, :] <= rows[:, None] + Nk - Nq + 1"),
    Mutant("flash1", "the mask is off by one: a key too few", OUTPUTS,
           "keys[None, :] <= rows[:, None] + Nk - Nq", "keys[None, :] < rows[:, None] + Nk - Nq"),
    Mutant("flash1", "the diagonal tile is left out", OUTPUTS,
           "first = tl.maximum(0, j - (Nk - Nq)) // BLOCK_Q * BLOCK_Q",
           "first = tl.cdiv(tl.maximum(0, j + 1 - (Nk - Nq)), BLOCK_Q) * BLOCK_Q"),
    Mutant("flash1", "the wrong key head", HEADS, "k_j = K.load([b, h // GROUP, j, 0])",
           "k_j = K.load([b, h % (H // GROUP), j, 0])"),
    Mutant("flash1", "divided by a sum of 0", BLIND,
           "divisor = tl.where(l_new > 0, l_new, 1)", "divisor = l_new"),
    Mutant("flash1", "-inf − -inf: a row with no key gives NaN", BLIND,
           "torch.finfo(torch.float32).min)", 'float("-inf"))'),
    Mutant("flash1", "the last query tile is not stored", WRITTEN,
           "        O.store([b, h, i, 0], o_i.to",
           "        if i + BLOCK_Q <= Nq:\n            O.store([b, h, i, 0], o_i.to"),
    Mutant("flash1", "tiles that no query of them sees are visited", COUNTED,
           "first = tl.maximum(0, j - (Nk - Nq)) // BLOCK_Q * BLOCK_Q", "first = 0"),
    Mutant("flash1", "k is read for each query tile", COUNTED,
           "            s_ij = scale * tl.dot(q_i",
           "            k_j = K.load([b, h // GROUP, j, 0]).reshape(BLOCK_K, COLUMNS)\n"
           "            s_ij = scale * tl.dot(q_i"),
    # flash2, forward
    Mutant("flash2", "acc is not rescaled", OUTPUTS,
           "acc_i = acc_i * alpha[:, None]", "pass"),
    Mutant("flash2", "l is not rescaled", OUTPUTS,
           "l_i = alpha * l_i + tl.sum(p_ij, 1)", "l_i = l_i + tl.sum(p_ij, 1)"),
    Mutant("flash2", "acc is rescaled by the wrong sign", OUTPUTS,
           "alpha = tl.exp2(m_i - m_new)", "alpha = tl.exp2(m_new - m_i)"),
    Mutant("flash2", "no maximum subtracted", LARGE,
           "m_new = tl.maximum(m_i, scale_log2 * tl.max(s_ij, 1))", "m_new = m_i * 0"),
    Mutant("flash2", "the maximum of the tile, not of the row so far", OUTPUTS,
           "tl.maximum(m_i, scale_log2 * tl.max(s_ij, 1))",
           "tl.maximum(LOWEST, scale_log2 * tl.max(s_ij, 1))"),
    Mutant("flash2", "the maximum is not scaled", OUTPUTS,
           "tl.maximum(m_i, scale_log2 * tl.max(s_ij, 1))", "tl.maximum(m_i, tl.max(s_ij, 1))"),
    Mutant("flash2", "e to the power of what is in base 2", OUTPUTS,
           "p_ij = tl.exp2(scale_log2 * s_ij", "p_ij = tl.exp(scale_log2 * s_ij"),
    Mutant("flash2", "scores not in base 2", OUTPUTS,
           "scale_log2 = scale * LOG2E", "scale_log2 = scale"),
    Mutant("flash2", "scale is 1/D", OUTPUTS,
           "scale_log2 = scale * LOG2E", "scale_log2 = LOG2E / COLUMNS"),
    Mutant("flash2", "a negative scale reaches the kernels", ANY_SCALE,
           "    if scale < TINY:", "    if False:"),
    Mutant("flash2", "keys that do not fill a tile are left out", OUTPUTS,
           "return by_all // BLOCK_K * BLOCK_K, by_any",
           "return by_all // BLOCK_K * BLOCK_K, by_any // BLOCK_K * BLOCK_K"),
    Mutant("flash2", "the last 64 of 4096 keys are left out", MANY_KEYS,
           "by_all, by_any = Nk, Nk",
           "by_all, by_any = Nk - 64 * (Nk >= 4096), Nk - 64 * (Nk >= 4096)"),
    Mutant("flash2", "the mask is off by one: a key too many", FUTURE,
           "cols[None, :] <= rows[:, None] + Nk - Nq",
           "cols[None, :] <= rows[:, None] + Nk - Nq + 1"),
    Mutant("flash2", "the mask is off by one: a key too few", OUTPUTS,
           "cols[None, :] <= rows[:, None] + Nk - Nq", "cols[None, :] < rows[:, None] + Nk - Nq"),
    Mutant("flash2", "the mask is aligned top-left", OUTPUTS,
           "cols[None, :] <= rows[:, None] + Nk - Nq", "cols[None, :] <= rows[:, None]"),
    Mutant("flash2", "the diagonal tile is left out", OUTPUTS,
           "tl.maximum(0, i + BLOCK_Q + Nk - Nq)", "tl.maximum(0, i + Nk - Nq)"),
    Mutant("flash2", "the tiles on the diagonal are not masked", FUTURE,
           "tl.maximum(0, i + 1 + Nk - Nq)", "tl.maximum(0, i + BLOCK_Q + Nk - Nq)"),
    Mutant("flash2", "keys that do not exist are seen", OUTPUTS,
           "visible = (cols < Nk)[None, :]", "visible = (cols < Nk + 256)[None, :]"),
    Mutant("flash2", "the wrong key head", HEADS, _scores,
           _scores.replace("h // GROUP", "h % (H // GROUP)")),
    Mutant("flash2", "not divided by the sum", OUTPUTS,
           "acc_i / tl.where(some, l_i, 1)[:, None]", "acc_i"),
    Mutant("flash2", "divided by a sum of 0", BLIND,
           "acc_i / tl.where(some, l_i, 1)[:, None]", "acc_i / l_i[:, None]"),
    Mutant("flash2", "-inf − -inf: a row with no key gives NaN", BLIND,
           "torch.finfo(torch.float32).min)", 'float("-inf"))'),
    Mutant("flash2", "acc in float16", LONG, _acc, f"{_acc}.to(tl.float16).to(tl.float32)"),
    Mutant("flash2", "lse in base 2", LSE, "LN2 * (m_i +", "(m_i +"),
    Mutant("flash2", "lse without the maximum", LSE, "LN2 * (m_i +", "LN2 * ("),
    Mutant("flash2", "TF32 in place of float32", OUTPUTS,
           _scores, _scores.replace("ieee", "tf32"), gpu_only=True),
    # flash2, backward
    Mutant("flash2", "delta left out of dk", GRADIENTS,
           "ds_ji = p_ji * (dp_ji - delta_i[None, :])", "ds_ji = p_ji * dp_ji"),
    Mutant("flash2", "delta left out of dq", GRADIENTS,
           "ds_ij = p_ij * (dp_ij - delta_i[:, None])", "ds_ij = p_ij * dp_ij"),
    Mutant("flash2", "the gradient of lse left out", "gradients_of_lse_match_float64",
           "if dlse is not None:", "if False:"),
    Mutant("flash2", "the gradient of lse added, not subtracted", "gradients_of_lse_match_float64",
           "delta -= dlse", "delta += dlse"),
    Mutant("flash2", "dk is not scaled", GRADIENTS, "dk_j = scale * dk_j", "pass"),
    Mutant("flash2", "dq is not scaled", GRADIENTS, "(scale * dq_i)", "dq_i"),
    Mutant("flash2", "dk and dv of one head of the group, not of all", GRADIENTS,
           "for g in range(GROUP):", "for g in range(1):"),
    Mutant("flash2", "the backward matches the wrong heads", GRADIENTS,
           "h = h_kv * GROUP + g", "h = g * H_kv + h_kv"),
    Mutant("flash2", "dk and dv have no mask", GRADIENTS,
           's_ji = tl.where(visible.T, s_ji, float("-inf"))', "pass"),
    Mutant("flash2", "dk and dv leave out the diagonal tile", GRADIENTS,
           "first = tl.maximum(0, j - (Nk - Nq)) // BLOCK_Q * BLOCK_Q",
           "first = tl.cdiv(tl.maximum(0, j + 1 - (Nk - Nq)), BLOCK_Q) * BLOCK_Q"),
    Mutant("flash2", "dk and dv mask the first query tile only", GRADIENTS,
           "tl.maximum(0, j + BLOCK_K - 1 - (Nk - Nq))", "tl.maximum(0, j - (Nk - Nq))"),
    Mutant("flash2", "a row with no key gives NaN gradients", BLIND,
           'tl.where(lse_i == float("-inf"), float("inf"), lse_i)', "lse_i"),
    Mutant("flash2", "lse taken for base 2", GRADIENTS,
           'float("inf"), lse_i) * LOG2E', 'float("inf"), lse_i)'),
    Mutant("flash2", "dp from do and k", GRADIENTS, "tl.dot(do_i, v_j.T,", "tl.dot(do_i, k_j.T,"),
    Mutant("flash2", "dv from ds", GRADIENTS, "tl.dot(p_ji.to(do_i.dtype), do_i, dv_j",
           "tl.dot((scale * p_ji).to(do_i.dtype), do_i, dv_j"),
    Mutant("flash2", "dv in float16", LONG, _dv, f"{_dv}.to(tl.float16).to(tl.float32)"),
    Mutant("flash2", "TF32 in place of float32 in dq", GRADIENTS,
           _dq, _dq.replace("ieee", "tf32"), gpu_only=True),
    Mutant("flash2", "tiles that all queries are too early for are read", COUNTED,
           "tl.maximum(0, i + BLOCK_Q + Nk - Nq)", "Nk"),
    Mutant("flash2", "k is read twice for each tile", COUNTED, _scores,
           _scores.replace("k_j =", "K.load([b, h // GROUP, j, 0]); k_j =")),
    Mutant("flash2", "lse is written twice", COUNTED, "    some = l_i > 0",
           "    tl.store(LSE + head.to(tl.int64) * Nq + rows, m_i, mask=rows < Nq)\n"
           "    some = l_i > 0"),
    Mutant("flash2", "queries that see no key of a tile are read", COUNTED_BACKWARD,
           "first = tl.maximum(0, j - (Nk - Nq)) // BLOCK_Q * BLOCK_Q", "first = 0"),
    # varlen, and runs elsewhere
    Mutant("varlen", "the first key of a run is left out", RUNS,
           "(cols[None, :] >= first_i[:, None])", "(cols[None, :] > first_i[:, None])"),
    Mutant("varlen", "the key behind a run is seen", RUNS,
           "(cols[None, :] < stop_i[:, None])", "(cols[None, :] <= stop_i[:, None])"),
    Mutant("varlen", "keys before a run are seen", RUNS,
           "(cols[None, :] >= first_i[:, None]) & ", ""),
    Mutant("varlen", "the runs of the first batch for all", RUNS,
           "here = b.to(tl.int64) * Nq + tl.minimum", "here = tl.minimum"),
    Mutant("varlen", "keys before the first are visited", RUNS,
           "tl.minimum(tl.maximum(tl.load(FIRST + here), 0), Nk)", "tl.load(FIRST + here)"),
    Mutant("varlen", "keys beyond the last are seen", RUNS,
           "tl.minimum(tl.maximum(tl.load(STOP + here), 0), Nk)", "tl.load(STOP + here)"),
    Mutant("varlen", "the tile where a run begins is left out", RUNS,
           "begin = tl.min(tl.where(some, first_i, Nk)) // BLOCK_K * BLOCK_K",
           "begin = tl.cdiv(tl.min(tl.where(some, first_i, Nk)), BLOCK_K) * BLOCK_K"),
    Mutant("varlen", "visits begin with the run of the first row", RUNS,
           "begin = tl.min(tl.where(some, first_i, Nk)) // BLOCK_K * BLOCK_K",
           "begin = tl.max(tl.where(some, first_i, 0)) // BLOCK_K * BLOCK_K"),
    Mutant("varlen", "a tile that some rows see is not masked", RUNS,
           "all_begin = tl.cdiv(tl.max(first_i), BLOCK_K) * BLOCK_K",
           "all_begin = tl.cdiv(tl.min(first_i), BLOCK_K) * BLOCK_K"),
    Mutant("varlen", "the masked tiles behind the middle are left out", RUNS,
           "    for MASKED in tl.static_range(2):  # first the tiles in the middle",
           "    end = all_end\n"
           "    for MASKED in tl.static_range(2):  # first the tiles in the middle"),
    Mutant("varlen", "backward, the first query that sees a tile is left out", RUNS,
           "torch.searchsorted(so_far(stop), start, right=True),",
           "torch.searchsorted(so_far(stop), start, right=True) + 16,"),
    Mutant("varlen", "backward, the last query that sees a tile is left out", RUNS,
           "torch.searchsorted(from_here_on(first), whole.clamp(max=Nk)),",
           "torch.searchsorted(from_here_on(first), start),"),
    Mutant("varlen", "backward, queries that see some of a tile are not masked", RUNS,
           "torch.searchsorted(from_here_on(stop), whole),",
           "torch.searchsorted(from_here_on(stop), start + 1),"),
    Mutant("varlen", "backward, queries whose run begins in a tile are not masked", RUNS,
           "torch.searchsorted(so_far(first), start, right=True),",
           "torch.searchsorted(so_far(first), whole, right=True),"),
    Mutant("varlen", "backward, the tiles of the first batch for all", RUNS,
           "4 * (b * tl.cdiv(Nk, BLOCK_K) + j // BLOCK_K)", "4 * (j // BLOCK_K + 1)"),
    Mutant("varlen", "backward, no mask", RUNS,
           's_ji = tl.where(_visible(first_i, stop_i, cols).T, s_ji, float("-inf"))', "pass"),
    Mutant("varlen", "runs are read twice", COUNTED,
           "first_i, stop_i = _load_runs(FIRST, STOP, b, rows, Nq, Nk)\n\n"
           "    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)\n    m_i",
           "_load_runs(FIRST, STOP, b, rows, Nq, Nk)\n"
           "    first_i, stop_i = _load_runs(FIRST, STOP, b, rows, Nq, Nk)\n"
           "    q_i = Q.load([b, h, i, 0]).reshape(BLOCK_Q, COLUMNS)\n    m_i"),
    Mutant("online", "runs are left out of the mask", RUNS, "if causal or runs:", "if causal:"),
    Mutant("online", "runs are left out of the backward", RUNS,
           "if problem.causal or runs:", "if problem.causal:"),
    Mutant("online", "the first key of a run is left out", RUNS,
           "(keys < first_i)", "(keys <= first_i)"),
    Mutant("decode", "runs are left out of the mask", RUNS,
           "        if FIRST is not None:\n            visible = cols",
           "        if False:\n            visible = cols"),
    Mutant("decode", "a split of a run begins where one of all keys does", RUNS,
           "begin = tl.min(first_i) // BLOCK_K * BLOCK_K",
           "begin = tl.max(first_i) // BLOCK_K * BLOCK_K"),
    # decode
    Mutant("decode", "splits are added up, not weighed by their lse", OUTPUTS,
           "p_j = tl.exp(lse_j - m_new[None, :])", "p_j = 1 + 0 * tl.exp(lse_j - m_new[None, :])"),
    Mutant("decode", "the merge does not rescale acc", OUTPUTS,
           "acc_i = alpha[:, None] * acc_i + ", "acc_i = acc_i + ", cpu_only=True),
    Mutant("decode", "the merge does not rescale l", LSE,
           "l_i = alpha * l_i + tl.sum(p_j, 0)", "l_i = l_i + tl.sum(p_j, 0)", cpu_only=True),
    Mutant("decode", "the merge subtracts no maximum", LARGE,
           "m_new = tl.maximum(m_i, tl.max(lse_j, 0))", "m_new = m_i * 0"),
    Mutant("decode", "the merge leaves out the last split", OUTPUTS,
           "exist = (split < splits)[:, None]", "exist = (split < splits - 1)[:, None]"),
    Mutant("decode", "the merge divides by a sum of 0", BLIND,
           "    some = l_i > 0  # False for a row that sees no key at all\n"
           "    o_i = acc_i / tl.where(some, l_i, 1)[:, None]",
           "    some = l_i > 0\n    o_i = acc_i / l_i[:, None]"),
    Mutant("decode", "the lse of a split without a key is 0", LSE,
           'float("-inf"))\n    o_i = o_i.to', '0.0)\n    o_i = o_i.to'),
    Mutant("decode", "the o of a split without a key is NaN", OUTPUTS,
           "# False for a row that sees no key of this split\n"
           "    o_i = acc_i / tl.where(some, l_i, 1)[:, None]",
           "\n    o_i = acc_i / l_i[:, None]"),
    Mutant("decode", "a split ends a tile too early", OUTPUTS,
           "tl.minimum(end, start + keys_per_split)",
           "tl.minimum(end, start + keys_per_split - BLOCK_K)"),
    Mutant("decode", "a split ends a key too late", OUTPUTS,
           "tl.minimum(end, start + keys_per_split)",
           "tl.minimum(end, start + keys_per_split + 1)"),
    Mutant("decode", "keys that do not fill a split are left out", OUTPUTS,
           "tl.cdiv(tl.cdiv(end - begin, BLOCK_K), splits) * BLOCK_K",
           "(end - begin) // BLOCK_K // splits * BLOCK_K"),
    Mutant("decode", "all splits write in the same place", OUTPUTS,
           "O.store([b, h * splits + split, i, 0]", "O.store([b, h * splits, i, 0]"),
    Mutant("decode", "queries of a tile are counted as rows are", OUTPUTS,
           "queries = rows // GROUP", "queries = rows"),
    Mutant("decode", "rows head by head, taken for query by query", OUTPUTS,
           "q.unflatten(1, (H_kv, -1)).transpose(2, 3).flatten(2, 3)",
           "q.unflatten(1, (H_kv, -1)).flatten(2, 3)"),
    Mutant("decode", "results unpacked in another order", OUTPUTS,
           "x.unflatten(2, (-1, group)).transpose(2, 3)", "x.unflatten(2, (group, -1))"),
    Mutant("decode", "the wrong key head", HEADS,
           "k_j = K.load([b, h, j, 0])", "k_j = K.load([b, (h + 1) % H_kv, j, 0])"),
    Mutant("decode", "queries of other groups are packed together", OUTPUTS,
           "q.unflatten(1, (H_kv, -1)).transpose(2, 3).flatten(2, 3)",
           "q.unflatten(1, (-1, H_kv)).permute(0, 2, 3, 1, 4).flatten(2, 3)"),
    Mutant("decode", "the mask is off by one: a key too many", FUTURE,
           "cols[None, :] <= queries[:, None] + Nk - Nq",
           "cols[None, :] <= queries[:, None] + Nk - Nq + 1"),
    Mutant("decode", "the mask is off by one: a key too few", OUTPUTS,
           "cols[None, :] <= queries[:, None] + Nk - Nq",
           "cols[None, :] < queries[:, None] + Nk - Nq"),
    Mutant("decode", "the last key of the last query of a tile is left out", OUTPUTS,
           "tl.minimum(stop, last + 1 + Nk - Nq)", "tl.minimum(stop, last + Nk - Nq)"),
    Mutant("decode", "keys that do not exist are seen", OUTPUTS,
           "visible = (cols < Nk)[None, :]", "visible = (cols < Nk + 256)[None, :]"),
    Mutant("decode", "acc is not rescaled", OUTPUTS,
           "acc_i = acc_i * alpha[:, None]", "pass"),
    Mutant("decode", "no maximum subtracted", LARGE,
           "m_new = tl.maximum(m_i, tl.max(s_ij, 1))", "m_new = m_i * 0"),
    Mutant("decode", "-inf − -inf: a row with no key gives NaN", BLIND,
           "torch.finfo(torch.float32).min)", 'float("-inf"))'),
    Mutant("decode", "keys that no query of a tile sees are read", COUNTED,
           "stop = tl.minimum(stop, last + 1 + Nk - Nq)", "pass"),
    Mutant("decode", "each split reads all keys of those before", COUNTED,
           "start = begin + split * keys_per_split", "start = begin + split * 0"),
    # what is counted
    Mutant("online", "k is read twice for each tile", COUNTED,
           "k_j, v_j = K.load(j), V.load(j)  # (B, H, block_k, D)",
           "k_j, v_j = K.load(j), V.load(j); K.load(j)"),
    Mutant("online", "a store past the counter", COUNTED, "O.store(i, acc_i /",
           "O.data.__setitem__((..., i, slice(None)), acc_i /"),
    Mutant("online", "a product past the counter", COUNTED,
           "acc_i + matmul(p_ij, v_j)", "acc_i + p_ij @ v_j"),
    Mutant("online", "lse in 2 bytes", COUNTED,
           'LSE = hbm.scratch("lse", (*q.shape[:3], 1), like=q, dtype=acc_dtype(q))',
           'LSE = hbm.scratch("lse", (*q.shape[:3], 1), like=q)'),
    Mutant("online", "tiles that all queries are too early for are read", COUNTED,
           "keys_seen = max(0, i.stop + Nk - Nq) if causal else Nk", "keys_seen = Nk"),
    Mutant("online", "a tile that has no place in SRAM", COUNTED,
           "                sram.hold(s_ij=s_ij)\n", ""),
    Mutant("online", "dq read and written for hidden tiles too", COUNTED_BACKWARD,
           "max(0, j.start - (Nk - Nq)) if problem.causal else 0", "0"),
    # flash3: on a Hopper card only. No mistake here makes a warp wait for what never comes.
    Mutant("flash3", "acc is not rescaled", MANY_KEYS,
           "acc_i = acc_i * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]", "pass"),
    Mutant("flash3", "l is not rescaled", MANY_KEYS,
           "l_i = alpha * l_i + gl.sum(p_ij, 1)", "l_i = l_i + gl.sum(p_ij, 1)"),
    Mutant("flash3", "no maximum subtracted", LARGE,
           "m_new = gl.maximum(m_i, scale_log2 * gl.max(s_ij, 1))", "m_new = m_i * 0"),
    Mutant("flash3", "the mask is off by one: a key too many", FUTURE,
           "rows[:, None] + (Nk - Nq)", "rows[:, None] + (Nk - Nq + 1)"),
    Mutant("flash3", "the mask is off by one: a key too few", OUTPUTS,
           "cols[None, :] <= rows[:, None]", "cols[None, :] < rows[:, None]"),
    Mutant("flash3", "keys that do not exist are seen", OUTPUTS,
           "visible = (cols < Nk)[None, :]", "visible = (cols < Nk + BLOCK_K)[None, :]"),
    Mutant("flash3", "only the last key tile is masked", MANY_TILES,
           "masked = seen_by_any - seen_by_all", "masked = 1"),
    Mutant("flash3", "the second query tile of a pair is left out", WRITTEN,
           "stop, step = tiles - x,", "stop, step = tiles - x - 1,", where="hopper"),
    Mutant("flash3", "a consumer takes the queries of its neighbour", MANY_TILES,
           "i = tile * BLOCK_Q + C * ROWS", "i = tile * BLOCK_Q + (C + 1) % CONSUMERS * ROWS"),
    Mutant("flash3", "the wrong key head", HEADS,
           "fill(K, b, h // group, j,", "fill(K, b, h % (H // group), j,"),
    Mutant("flash3", "divided by a sum of 0", BLIND,
           "l_some = gl.where(some, l_i, 1.0)", "l_some = l_i"),
    Mutant("flash3", "-inf − -inf: a row with no key gives NaN", BLIND,
           "torch.finfo(torch.float32).min)", 'float("-inf"))'),
    Mutant("flash3", "lse in base 2", LSE,
           "LN2 * (m_i + gl.log2(l_some))", "m_i + gl.log2(l_some)"),
    Mutant("flash3", "the caller's scale is ignored", ANY_SCALE,
           "q, scale = _scaled(q, scale)", "scale = problem.D**-0.5"),
    Mutant("flash3", "a negative scale is taken for 0", ANY_SCALE,
           "    if scale < 0:", "    if False:"),
    # flash3, backward: caught in one of its modes, at least
    *(
        Mutant("flash3", mistake, claim, old, new, where="flash3_backward")
        for mistake, claim, old, new in (
            ("delta left out", GRADIENTS, "-tl.sum(do_i * o_i, 1)", "0 * tl.sum(do_i * o_i, 1)"),
            ("the gradient of lse left out", "gradients_of_lse_match_float64",
             "if dlse is not None:", "if False:"),
            ("the gradient of lse subtracted, not added", "gradients_of_lse_match_float64",
             "[..., :Nq] += dlse", "[..., :Nq] -= dlse"),
            ("lse taken for base 2", GRADIENTS, "-lse_i / scale", "-0.6931 * lse_i / scale"),
            ("rows that do not exist are seen", GRADIENTS,
             'tl.where(lse_i == float("-inf"), float("inf"), lse_i)', "lse_i"),
            ("dq begins where memory was", WRITTEN, "    if SUM:\n        DQ_SUM.store",
             "    if False:\n        DQ_SUM.store"),
            ("dk is not scaled", GRADIENTS, "_store(scale * dk_j,", "_store(dk_j,"),
            ("dq is not scaled", GRADIENTS, "scale * DQ_SUM.load", "DQ_SUM.load"),
            ("dq of one key tile, not of all", MANY_TILES,
             "    add_tile(X, at, place)", "    store_tile(X, at, place)"),
            ("the mask is off by one: a key too few", GRADIENTS,
             "cols[:, None] <= rows[None, :]", "cols[:, None] < rows[None, :]"),
            ("only the first query tile is masked", MANY_TILES,
             "gl.maximum(0, gl.cdiv(j + BLOCK_K - 1 - (Nk - Nq), BLOCK_Q) - first)", "1"),
            ("the wrong heads of a group", GRADIENTS,
             "h, head = h_kv * GROUP + g,", "h, head = g * H_kv + h_kv,"),
            ("dp of the first query tile from do and k", GRADIENTS,
             "_scores(v_j, do_places, dp_start, do_full, t,",
             "_scores(k_j, do_places, dp_start, do_full, t,"),
            ("dp of the others from do and k", MANY_TILES,
             "_scores(v_j, do_places, dp_start, do_full, t + 1,",
             "_scores(k_j, do_places, dp_start, do_full, t + 1,"),
        )
    ),
    *(
        Mutant("flash3", mistake, GRADIENTS, old, new, where="flash3_dq")
        for mistake, old, new in (
            ("dq alone is not scaled", "(scale * dq_i).to(dtype)", "dq_i.to(dtype)"),
            ("the mask of dq alone is off by one: a key too few",
             "cols[None, :] <= rows[:, None]", "cols[None, :] < rows[:, None]"),
            ("the wrong key head for dq alone",
             "fill(K, b, h // group, j,", "fill(K, b, h % (H // group), j,"),
        )
    ),
    Mutant("naive", "S read once more", COUNTED, "s = S.load()", "s = S.load(); S.load()"),
    Mutant("tiled", "four passes over k", COUNTED,
           "            l_i = np.where(l_i == 0, 1, l_i)",
           "            l_i = np.where(l_i == 0, 1, l_i); "
           "[K.load(j) for j in sram.tiles(Nk, problem.block_k)]"),
]  # fmt: skip


RUNS_HERE = {r.name for r in RUNGS if r.missing() is None}
KERNELS = {r.name for r in RUNGS if r.is_triton and r.name in RUNS_HERE}
COMPILED = KERNELS if torch.cuda.is_available() else set()  # see test_gpu.py
ON_THE_CPU = [m for m in MUTANTS if m.stage in RUNS_HERE - COMPILED and not m.gpu_only]


# Mistakes in the counters themselves: module of flashedu.memory, the class to swap, the words.
COUNTERS = [
    ("hbm", "HBM", "float16 counted as 4 bytes", "self._d * data.dtype.itemsize", "self._d * 4"),
    ("hbm", "HBM", "stores are not counted",
     'self._machine.count("store", self, rows, self._bytes_of(rows, heads))', "pass"),
    ("hbm", "HBM", "one program counted for all that share a head",
     "self._heads = heads * shared_by", "self._heads = heads"),
    ("hbm", "HBM", "scratch memory is not counted",
     "self.extra_bytes += x._n * x._all_row_bytes", "pass"),
    ("sram", "SRAM", "tiles are never freed",
     "self.used_bytes -= self.live.pop(name)[2]", "self.live.pop(name)"),
    ("sram", "SRAM", "a tile in the place of an old one counts twice",
     "(old[2] if old else 0)", "0"),
    ("machine", "Machine", "a multiply-add counted as 1", "self.flops += 2 *", "self.flops += 1 *"),
]  # fmt: skip


def assert_caught(subject: Subject, claim: str) -> None:
    """Under the check of that claim the subject fails, and by an assertion."""
    check = claims(subject)[claim]
    with pytest.raises(AssertionError):
        check(subject)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mutant may overflow or divide by 0
@pytest.mark.parametrize("mutant", [m for m in ON_THE_CPU if m.stage not in KERNELS], ids=str)
def test_mutant_is_caught(mutant: Mutant) -> None:
    assert_caught(stage_with(mutant.stage, mutant.changes), mutant.caught_by)


class TestMutantsOfKernels:  # a class of its own: another worker can take it
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as above
    @pytest.mark.parametrize("mutant", [m for m in ON_THE_CPU if m.stage in KERNELS], ids=str)
    def test_mutant_is_caught(self, mutant: Mutant) -> None:
        assert_caught(stage_with(mutant.stage, mutant.changes), mutant.caught_by)


def test_the_words_of_mutants_that_need_a_card_stand_in_the_source() -> None:
    if rung("flash2").missing():
        pytest.skip("needs Triton, which exists for Linux only")
    for mutant in MUTANTS:
        if rung(mutant.stage).hopper_only:
            subject = stage_with(mutant.stage, mutant.changes, where=mutant.where)
            assert subject.attention is not rung(mutant.stage).load().attention


@pytest.mark.parametrize("stage", sorted({m.stage for m in ON_THE_CPU}))
def test_the_same_mechanism_passes_the_stage_itself(stage: str) -> None:
    subject = stage_with(stage)
    for claim in (BLIND, COUNTED) if subject.slow else (OUTPUTS, HEADS, COUNTED):
        claims(subject)[claim](subject)


@pytest.mark.parametrize(
    ("module", "name", "old", "new"),
    [pytest.param(m, n, old, new, id=f"{m}: {mistake}") for m, n, mistake, old, new in COUNTERS],
)
def test_a_wrong_counter_is_caught(module: str, name: str, old: str, new: str) -> None:
    wrong = getattr(mutated(f"flashedu.memory.{module}", ((old, new),)), name)
    where = contract if name == "Machine" else machine
    with mock.patch.object(where, name, wrong):
        assert_caught(Subject.of(rung("online")), COUNTED)


def test_the_same_mechanism_passes_the_counters_themselves() -> None:
    for module, name in {(m, n) for m, n, *_ in COUNTERS}:
        where = contract if name == "Machine" else machine
        same = getattr(mutated(f"flashedu.memory.{module}", ()), name)
        with mock.patch.object(where, name, same):
            subject = Subject.of(rung("online"))
            claims(subject)[COUNTED](subject)


# mistakes that need no source: whole functions


def ignores_q_and_k(q: Array, k: Array, v: Array, **options: object) -> Array:
    """The mean of v."""
    group = q.shape[1] // k.shape[1]
    mean = v.mean(axis=2, keepdims=True).repeat(group, axis=1)
    return np.broadcast_to(mean, q.shape).astype(q.dtype)


def skips_the_last_64_keys(q: Array, k: Array, v: Array, **options: object) -> Array:
    return rung("tiled").load().attention(q, k[:, :, :-64], v[:, :, :-64], **options)


IMPOSTORS = [ignores_q_and_k, skips_the_last_64_keys]
every_impostor = pytest.mark.parametrize("impostor", IMPOSTORS, ids=lambda f: f.__name__)


@every_impostor
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the mean of no values
def test_impostor_is_caught(impostor) -> None:
    subject = dataclasses.replace(Subject.of(rung("tiled")), attention=impostor)
    assert_caught(subject, OUTPUTS)


@every_impostor
def test_a_loose_tolerance_on_many_normal_inputs_passes_an_impostor(impostor) -> None:
    """With N keys an output is about 1/√N, and so is its error: 1e-2 says nothing."""
    p = Problem(Nq=4, Nk=2**18, D=4, dtype="float32", block_k=2**14)
    q, k, v, _ = draw(p)
    wrong = impostor(q, k, v)
    right = rung("tiled").load().attention(q, k, v, block_k=p.block_k)
    np.testing.assert_allclose(wrong, right, atol=1e-2, rtol=1e-2)
    assert not errors(Reference(wrong, None), q, k, v)["o"].within
    assert errors(Reference(right, None), q, k, v)["o"].within


def test_small_inputs_pass_who_ignores_q_and_k_even_at_1e_4() -> None:
    """Uniform in ±1/√D, as serving engines draw them: all the scores are nearly 0."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.uniform(-1, 1, (1, 4, 512, 64)).astype("float32") / 8 for _ in range(3))
    wrong = ignores_q_and_k(q, k, v)
    right = rung("tiled").load().attention(q, k, v)
    np.testing.assert_allclose(wrong, right, atol=1e-4, rtol=0)
    assert not errors(Reference(wrong, None), q, k, v)["o"].within
    assert errors(Reference(right, None), q, k, v)["o"].within
