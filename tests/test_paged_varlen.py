"""paged_varlen's kernel, interpreted: each sequence of a step is a problem of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from flashedu.bench.variants import mutated
from flashedu.memory import Machine, Problem
from flashedu.stages import rung
from flashedu.testing import assert_right, draw

if rung("decode").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here; see test_gpu.py", allow_module_level=True)

from flashedu.stages import paged_varlen
from flashedu.stages.paged_varlen import tiles_of_step
from flashedu.stages.reference import Reference

P = Problem(B=1, H=6, H_kv=2, Nq=1, D=13, dtype="float32")
N_PAGES = 40
MIXED = [(1, 97), (1, 16), (5, 150), (33, 33), (7, 3), (0, 20)]  # queries, keys
NAMES = ("q", "k", "v", "block_table", "lengths", "starts")


def step(sizes: list[tuple[int, int]], p: Problem = P, page_size: int = 16) -> dict[str, Any]:
    """Packed queries, and k and v in pages; what holds no key is NaN. rows: k and v in a row."""
    n_tokens = sum(Nq for Nq, _ in sizes)
    order = torch.randperm(N_PAGES, generator=torch.Generator().manual_seed(0)).tolist()
    most = max((-(-Nk // page_size) for _, Nk in sizes), default=0)
    table = torch.zeros(len(sizes), most, dtype=torch.int32)
    q = draw(p.replace(Nq=max(1, n_tokens), Nk=1), "peaked", framework="torch")[0][:, :, :n_tokens]
    made: dict[str, Any] = {"q": q, "rows": []}
    k, v = (torch.full((N_PAGES, p.H_kv, page_size, p.D), torch.nan, dtype=q.dtype) for _ in "kv")
    for b, (_, Nk) in enumerate(sizes):
        _, k_row, v_row, _ = draw(p.replace(Nq=1, Nk=max(1, Nk)), "peaked", framework="torch")
        k_row, v_row = k_row[:, :, :Nk].roll(b, -1), v_row[:, :, :Nk].roll(b, -1)
        made["rows"].append((k_row, v_row))
        for page in range(-(-Nk // page_size)):
            table[b, page] = order.pop()
            keys = slice(page * page_size, min(Nk, (page + 1) * page_size))
            for pages, row in ((k, k_row), (v, v_row)):
                pages[table[b, page], :, : keys.stop - keys.start] = row[0, :, keys]
    starts = torch.tensor([0, *(Nq for Nq, _ in sizes)]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([Nk for _, Nk in sizes], dtype=torch.int32)
    return made | {"k": k, "v": v, "block_table": table, "lengths": lengths, "starts": starts}


def call(made: dict[str, Any], module: Any = paged_varlen, **options: Any) -> Reference:
    return Reference(*module.attention_with_lse(*(made[name] for name in NAMES), **options))


def assert_each_right(made: dict[str, Any], got: Reference) -> None:
    for (begin, end), (k, v) in zip(pairwise(made["starts"].tolist()), made["rows"], strict=True):
        mine = slice(begin, end)
        one = Reference(got.o[:, :, mine], got.lse[:, :, mine])
        assert_right(one, made["q"][:, :, mine], k, v, causal=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_a_mixed_step_is_right(dtype: str, page_size: int) -> None:
    """Prompts, chunks of prompts, single tokens, one without any, and more queries than keys."""
    made = step(MIXED, P.replace(dtype=dtype), page_size)
    assert_each_right(made, call(made))


@pytest.mark.parametrize("splits", [None, 1, 2, 5])
def test_a_step_of_single_queries_is_right(splits: int | None) -> None:
    made = step([(1, Nk) for Nk in (150, 16, 1, 0, 97)])
    assert_each_right(made, call(made, splits=splits))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 1), (8, 2), (14, 2)])
def test_heads_may_share_keys_in_groups_of_any_number(heads: tuple[int, int]) -> None:
    made = step([(1, 40), (9, 9), (20, 65)], P.replace(H=heads[0], H_kv=heads[1]))
    assert_each_right(made, call(made))


@pytest.mark.parametrize("D", [1, 16, 40, 128])
def test_any_head_size_will_do(D: int) -> None:
    made = step([(1, 40), (9, 9), (20, 65)], P.replace(D=D, H=2))
    assert_each_right(made, call(made))


def test_splits_share_prompts_too() -> None:
    made = step([(1, 97), (5, 150), (7, 3)])
    assert_each_right(made, call(made, splits=3))


def test_a_negative_scale_is_a_scale() -> None:
    made = step(MIXED[:4])
    negative, positive = call(made, scale=-0.3), call({**made, "q": -made["q"]}, scale=0.3)
    assert torch.equal(negative.o, positive.o)


def test_rows_behind_the_last_sequence_give_zero() -> None:
    made = step([(1, 20), (6, 9)])
    made["q"] = torch.cat((made["q"], torch.full((1, 6, 5, 13), torch.nan)), 2)
    got = call(made)
    assert not got.o[:, :, 7:].any()
    assert (got.lse[:, :, 7:] == -torch.inf).all()
    assert_each_right(made, got)


@pytest.mark.parametrize("sizes", [[], [(0, 0)], [(0, 30), (0, 0)], [(3, 0)]])
def test_nothing_gives_nothing(sizes: list[tuple[int, int]]) -> None:
    made = step(sizes)
    got = call(made)
    assert got.o.shape == made["q"].shape
    assert not got.o.any()


def test_an_unchecked_step_gives_the_same() -> None:
    for made in (step(MIXED[2:4]), step([(1, 97), (1, 16)])):
        assert_each_right(made, call(made, check=False))


def test_tokens_may_lie_side_by_side_in_memory() -> None:
    """As in a server: the heads of a token, and its k and v beside them."""
    made = step(MIXED, P.replace(D=16, dtype="float16"))
    qkv = torch.full((made["q"].shape[2], 10, 16), torch.nan, dtype=torch.float16)
    qkv[:, :6] = made["q"][0].transpose(0, 1)
    pages = torch.stack((made["k"], made["v"]), 1).transpose(2, 3).contiguous().transpose(2, 3)
    beside = {**made, "q": qkv[:, :6].transpose(0, 1)[None], "k": pages[:, 0], "v": pages[:, 1]}
    assert torch.equal(call(beside).o, call(made).o)


def test_a_chunked_prompt_is_the_whole_prompt() -> None:
    """40 tokens at once, or 17, then 1, then the rest: the same rows, to rounding."""
    whole = step([(40, 40)])
    parts = []
    for begin, end in ((0, 17), (17, 18), (18, 40)):
        made = {**whole, "q": whole["q"][:, :, begin:end],
                "lengths": torch.tensor([end], dtype=torch.int32),
                "starts": torch.tensor([0, end - begin], dtype=torch.int32)}  # fmt: skip
        parts.append(call(made).o)
    torch.testing.assert_close(torch.cat(parts, 2), call(whole).o, rtol=1e-5, atol=1e-5)


# tiles


@pytest.mark.parametrize("lengths", [[5, 1, 0, 33, 16], [1], [0], [64, 64], [17] * 5])
def test_each_query_is_in_one_tile_of_its_own_sequence(lengths: list[int]) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found = set()
    for b, i in tiles_of_step(starts, sum(lengths), 16).tolist():
        if b >= 0:
            mine = {(b, query) for query in range(i, min(i + 16, lengths[b]))}
            assert mine
            assert not mine & found
            found |= mine
    assert found == {(b, query) for b, n in enumerate(lengths) for query in range(n)}


def test_the_number_of_tiles_follows_from_sizes_alone() -> None:
    for lengths in ([96, 0, 0], [32, 32, 32], [1, 94, 1]):
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        assert len(tiles_of_step(starts, 96, 16)) == 96 // 16 + 3


# what leads astray


def put(name: str, index: Any, value: int) -> Any:
    def change(made: dict[str, Any]) -> dict[str, Any]:
        x = made[name].clone()
        x[index] = value
        return {**made, name: x}

    return change


ASTRAY = {
    "more keys than pages": put("lengths", 2, 161),
    "far more keys than pages": put("lengths", 2, 2**31 - 1),
    "less than no keys": put("lengths", 2, -(2**31)),
    "a page that is not there": put("block_table", (2, 2), N_PAGES),
    "a page far away": put("block_table", (2, 0), 2**31 - 1),
    "a page below 0": put("block_table", (2, 0), -1),
    "more queries than there are": put("starts", -1, 10_000),
    "a start below 0": put("starts", 0, -5),
    "starts that fall": put("starts", 3, 0),
}


@pytest.mark.parametrize("change", ASTRAY.values(), ids=ASTRAY)
def test_a_wrong_step_unchecked_leads_to_no_address_outside_the_arrays(change: Any) -> None:
    """A `Machine` raises for an address that no array has; the first sequence stays right."""
    made = step([(1, 97), (9, 16), (5, 150), (33, 33)])
    got = call(change(made), check=False, machine=Machine())
    if "start" not in str(change):
        assert got.o.shape == made["q"].shape


def test_a_wrong_table_harms_no_other_sequence() -> None:
    made = step([(1, 97), (9, 16), (5, 150), (33, 33)])
    want, others = call(made), [0, *range(1, 10), *range(15, 48)]
    for name in ("more keys than pages", "a page that is not there", "a page far away"):
        got = call(ASTRAY[name](made), check=False)
        assert torch.equal(got.o[:, :, others], want.o[:, :, others])


def test_the_machine_sees_a_kernel_that_trusts_the_starts() -> None:
    old = "tl.minimum(tl.load(STARTS + b + 1), n_tokens) - begin"
    module = mutated("flashedu.stages.paged_varlen", ((old, "tl.load(STARTS + b + 1) - begin"),))
    made = ASTRAY["more queries than there are"](step([(1, 97), (9, 16)]))
    made["q"] = made["q"].clone()
    with pytest.raises(Exception, match="at an address that no array has"):
        call(made, module, check=False, machine=Machine())


def test_it_reads_the_tiles_that_its_queries_see() -> None:
    made, machine = step([(1, 97), (20, 40)], P.replace(H_kv=6)), Machine()
    call(made, machine=machine)
    tiles = 7 + 3  # of 16 keys
    read = machine.bytes_by_tensor()
    assert read["k"] == read["v"] == (tiles * 16 * P.H * P.D * 4, 0)
    assert read["o"] == (0, 21 * P.H * P.D * 4)
    assert machine.launches == ["paged_varlen"]


MISTAKES = [
    ("the table is left out", "K.load([page, h, j % PAGE, 0])",
     "K.load([j // PAGE, h, j % PAGE, 0])"),
    ("the table of the first sequence", "b.to(tl.int64) * table_row + j", "j"),
    ("the length of the first sequence", "tl.load(LENGTHS + b)", "tl.load(LENGTHS)"),
    ("queries from the first on", "token, head = (begin + queries)", "token, head = (queries)"),
    ("the first tile for all", "i = tl.load(TILES + 2 * tile + 1)", "i = 0"),
    ("0 · NaN behind the last key", "v_j = tl.where((keys < Nk)[:, None], v_j, 0.0)", "pass"),
    ("the mask is off by one", "queries[:, None] + Nk - Nq", "queries[:, None] + Nk - Nq + 1"),
    ("tiles that some see are not masked", "tl.maximum(0, i + 1 + Nk - Nq)",
     "tl.maximum(0, last + 1 + Nk - Nq)"),
    ("a split ends a tile too early", "tl.minimum(start + keys_per_split,",
     "tl.minimum(start + keys_per_split - BLOCK_K,"),
    ("a group's heads are mixed", "head = (begin + queries).to(tl.int64), h * GROUP + g",
     "head = (begin + queries).to(tl.int64), g * H_kv + h"),
    ("the sequence that follows is written", "exist = (queries < Nq)",
     "exist = (queries < n_tokens - begin)"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mutant may overflow
@pytest.mark.parametrize(("old", "new"), [pytest.param(o, n, id=m) for m, o, n in MISTAKES])
def test_a_mistake_is_caught(old: str, new: str) -> None:
    module = mutated("flashedu.stages.paged_varlen", ((old, new),))
    with pytest.raises(AssertionError):
        assert_right_with_few_and_with_many_queries(module)


def assert_right_with_few_and_with_many_queries(module: Any) -> None:
    for sizes in ([(1, 97), (1, 150), (1, 33)], [(3, 97), (1, 64), (40, 130)]):
        made = step(sizes, page_size=64)
        assert_each_right(made, call(made, module, splits=2))


def test_the_same_mechanism_passes_the_stage_itself() -> None:
    assert_right_with_few_and_with_many_queries(mutated("flashedu.stages.paged_varlen", ()))


# what does not fit


BAD = {
    "a page that is not there": (put("block_table", (0, 2), 40), ValueError,
                                 "block_table must hold pages 0 to 39, got 40 in sequence 0"),
    "more keys than pages": (put("lengths", 0, 161), ValueError, "lengths must be 0 to 160"),
    "starts that fall": (put("starts", 1, 30), ValueError,
                         "starts must grow from 0 to at most the 15 queries of q, got 0 and then"),
    "starts beyond q": (put("starts", 3, 16), ValueError, "got 10 and then 16 for sequence 2"),
    "starts without an end": (lambda m: {**m, "starts": m["starts"][:-1]}, ValueError,
                              r"starts must be \(B \+ 1,\) with B=3, got shape \(3,\)"),
    "starts of int64": (lambda m: {**m, "starts": m["starts"].long()}, TypeError, "got int64"),
    "queries in batches": (lambda m: {**m, "q": m["q"].repeat(2, 1, 1, 1)}, ValueError,
                           r"q must be \(1, H, N, D\), all queries in a row"),
    "lengths of other sequences": (lambda m: {**m, "lengths": m["lengths"][:2]}, ValueError,
                                   r"lengths must be \(B,\) with B=3"),
    "lengths in a list": (lambda m: {**m, "lengths": [1, 2, 3]}, TypeError, "tensor, got list"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_sentence(change: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call(change(step([(1, 97), (9, 16), (5, 150)])))


def test_inputs_that_require_gradients_get_a_sentence() -> None:
    made = step([(1, 20)])
    made["q"].requires_grad_()
    with pytest.raises(ValueError, match="must not require gradients for stage 'paged_varlen'"):
        call(made)
