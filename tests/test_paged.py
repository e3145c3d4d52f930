"""paged's kernel, interpreted on the CPU: what decode gives, from pages in any order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from flashedu.bench.variants import mutated
from flashedu.memory import Machine, Problem, cost
from flashedu.stages import rung
from flashedu.testing import assert_right, draw

if rung("decode").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here; see test_gpu.py", allow_module_level=True)

from flashedu.pages import PageAllocator, table
from flashedu.stages import paged
from flashedu.stages.reference import Reference

P = Problem(B=4, H=6, H_kv=2, Nq=1, Nk=150, D=13, dtype="float32")
LENGTHS = [150, 16, 1, 97]


def cache(p: Problem, lengths: list[int], page_size: int = 16, n_pages: int = 40) -> dict[str, Any]:
    """q, and k and v in pages; what holds no key is NaN. k_rows and v_rows: the same in a row."""
    q, k, v, _ = draw(p, "peaked", framework="torch")
    allocator, rng = PageAllocator(n_pages, page_size), np.random.default_rng(0)
    sequences = [allocator.new() for _ in lengths]
    for _ in range(20):  # in turns, so that their pages mix
        for sequence, length in zip(sequences, lengths, strict=True):
            left = length - sequence.length
            allocator.take(sequence, min(left, int(rng.integers(0, 30))))
    for sequence, length in zip(sequences, lengths, strict=True):
        allocator.take(sequence, length - sequence.length)
    pages = {name: torch.full((n_pages, p.H_kv, page_size, p.D), torch.nan, dtype=q.dtype)
             for name in "kv"}  # fmt: skip
    for b, sequence in enumerate(sequences):
        for j in range(sequence.length):
            page = sequence.pages[j // page_size]
            for name, x in (("k", k), ("v", v)):
                pages[name][page, :, j % page_size] = x[b, :, j]
    rows, found = table(sequences)
    block_table = torch.tensor(rows, dtype=torch.int32)
    lengths_ = torch.tensor(found, dtype=torch.int32)
    return {"q": q, **pages, "block_table": block_table, "lengths": lengths_,
            "rows": (k, v)}  # fmt: skip


def call(made: dict[str, Any], module: Any = paged, **options: Any) -> Reference:
    inputs = {name: made[name] for name in ("q", "k", "v", "block_table", "lengths")}
    return Reference(*module.attention_with_lse(**inputs, **options))


def assert_each_right(made: dict[str, Any], got: Reference) -> None:
    """Each sequence as a problem of its own."""
    k, v = made["rows"]
    for b, n in enumerate(made["lengths"].tolist()):
        one = Reference(got.o[b : b + 1], got.lse[b : b + 1])
        assert_right(one, made["q"][b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n],
                     causal=True)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("page_size", "splits"), [(16, None), (16, 1), (32, 4), (64, 2), (256, 3)])
def test_decoding_from_pages_is_right(dtype: str, page_size: int, splits: int | None) -> None:
    made = cache(P.replace(dtype=dtype), LENGTHS, page_size)
    assert_each_right(made, call(made, splits=splits))


@pytest.mark.parametrize(("Nq", "splits"), [*itertools.product((2, 16, 33), (1, 3))])
def test_prefill_from_pages_is_right(Nq: int, splits: int) -> None:
    """33 queries of a sequence with 16 keys: some see none."""
    made = cache(P.replace(Nq=Nq), LENGTHS)
    assert_each_right(made, call(made, splits=splits))


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sequence_without_keys_gives_zero(splits: int) -> None:
    made = cache(P, [0, 20, 0, 3])
    got = call(made, splits=splits)
    assert not got.o[[0, 2]].any()
    assert (got.lse[[0, 2]] == -torch.inf).all()
    assert_each_right(made, got)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"Nq": 0}])
def test_nothing_gives_nothing(sizes: dict[str, int]) -> None:
    p = P.replace(**sizes)
    made = cache(p, [5] * p.B)
    made["block_table"] = made["block_table"].reshape(p.B, -1) if p.B else torch.zeros(
        (0, 3), dtype=torch.int32)  # fmt: skip
    assert call(made).o.shape == made["q"].shape


def test_the_order_of_pages_in_memory_does_not_change_a_bit() -> None:
    made = cache(P, LENGTHS)
    want = call(made)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    place = torch.argsort(order).to(torch.int32)
    moved = {**made, "k": made["k"][order], "v": made["v"][order],
             "block_table": place[made["block_table"].long()]}  # fmt: skip
    got = call(moved)
    assert torch.equal(got.o, want.o)
    assert torch.equal(got.lse, want.lse)


def test_a_shared_prefix_is_read_where_it_lies() -> None:
    made = cache(P.replace(B=1), [48])
    allocator = PageAllocator(40, 16)
    first = allocator.new()
    allocator.take(first, 48)
    both = [first, allocator.share(first, 40)]
    order = made["block_table"][0].long()
    made["k"][: len(order)], made["v"][: len(order)] = made["k"][order], made["v"][order]
    rows, lengths = table(both)
    twice = {**made, "q": made["q"].repeat(2, 1, 1, 1),
             "block_table": torch.tensor(rows, dtype=torch.int32),
             "lengths": torch.tensor(lengths, dtype=torch.int32),
             "rows": tuple(x.repeat(2, 1, 1, 1) for x in made["rows"])}  # fmt: skip
    assert_each_right(twice, call(twice))


def test_it_reads_the_tiles_that_hold_keys_and_a_page_number_for_each() -> None:
    made, machine = cache(P, LENGTHS), Machine()
    call(made, splits=2, machine=machine)
    tiles = sum(-(-n // 16) for n in LENGTHS)
    read = machine.bytes_by_tensor()
    assert read["k"] == read["v"] == (tiles * 16 * P.H_kv * P.D * 4, 0)
    assert read["block_table"] == (tiles * P.H_kv * 4, 0)
    assert machine.launches == ["paged", "decode merge"]


@pytest.mark.parametrize(("Nq", "splits"), [(1, 1), (1, 3), (16, 2)])
def test_counted_bytes_are_the_closed_form_of_each_sequence(Nq: int, splits: int) -> None:
    p = P.replace(Nq=Nq, dtype="float16", block_q=64 if Nq == 16 else 16, splits=splits)
    made, machine = cache(p, LENGTHS, page_size=32), Machine()
    call(made, splits=splits, machine=machine)
    each = [cost.paged_forward(p.replace(B=1, Nk=n, block_k=32)) for n in LENGTHS]
    assert machine.counted == sum(each[1:], each[0])


def test_an_unchecked_table_gives_the_same_bits() -> None:
    made = cache(P, LENGTHS)
    assert torch.equal(call(made, splits=3, check=False).o, call(made, splits=3).o)


def changed(made: dict[str, Any], name: str, change: Any) -> dict[str, Any]:
    x = made[name]
    return {**made, name: change(x)}


def put(index: Any, value: int) -> Any:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


ASTRAY = {
    "more keys than pages": ("lengths", put(3, 161)),
    "far more keys than pages": ("lengths", put(3, 2**31 - 1)),
    "less than no keys": ("lengths", put(1, -(2**31))),
    "a page that is not there": ("block_table", put((0, 2), 40)),
    "a page far away": ("block_table", put((0, 0), 2**31 - 1)),
    "a page below 0": ("block_table", put((3, 0), -1)),
}


@pytest.mark.parametrize(("name", "change"), ASTRAY.values(), ids=ASTRAY)
def test_a_wrong_table_unchecked_leads_to_no_address_outside_the_arrays(
    name: str, change: Any
) -> None:
    """A `Machine` raises for an address that no array has; the right sequences stay right."""
    made = cache(P, LENGTHS)
    astray = changed(made, name, change)
    got = call(astray, check=False, splits=2, machine=Machine())
    right = [b for b in range(4) if torch.equal(astray[name][b], made[name][b])]
    assert len(right) == 3
    assert torch.equal(got.o[right], call(made, splits=2).o[right])


def test_the_machine_sees_a_kernel_that_trusts_the_lengths() -> None:
    trusting = ("Nk = tl.minimum(tl.maximum(0, Nk), max_pages * PAGE)", "pass")
    module = mutated("flashedu.stages.paged", (trusting,))
    made = changed(cache(P, LENGTHS), "lengths", put(3, 161))
    with pytest.raises(Exception, match="a load at an address that no array has"):
        call(made, module, check=False, splits=1, machine=Machine())


MISTAKES = [
    ("the table is left out", "K.load([page, h, j % PAGE, 0])",
     "K.load([j // PAGE, h, j % PAGE, 0])"),
    ("the table of the first sequence", "b.to(tl.int64) * max_pages + j", "j"),
    ("the first rows of a page for all tiles", "V.load([page, h, j % PAGE, 0])",
     "V.load([page, h, 0, 0])"),
    ("the length of the first sequence", "tl.load(LENGTHS + b)", "tl.load(LENGTHS)"),
    ("0 · NaN behind the last key", "v_j = tl.where((cols < Nk)[:, None], v_j, 0.0)", "pass"),
    ("the mask is off by one", "queries[:, None] + Nk - Nq", "queries[:, None] + Nk - Nq + 1"),
    ("tiles that some see are not masked", "i // GROUP + 1 + Nk - Nq", "last + 1 + Nk - Nq"),
    ("a split ends a tile too early", "tl.minimum(start + keys_per_split,",
     "tl.minimum(start + keys_per_split - BLOCK_K,"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mutant may overflow
@pytest.mark.parametrize(("old", "new"), [pytest.param(o, n, id=m) for m, o, n in MISTAKES])
def test_a_mistake_is_caught(old: str, new: str) -> None:
    module = mutated("flashedu.stages.paged", ((old, new),))
    with pytest.raises(AssertionError):
        assert_right_with_few_and_with_many_queries(module)


def assert_right_with_few_and_with_many_queries(module: Any) -> None:
    for Nq in (1, 16):
        made = cache(P.replace(Nq=Nq), [97, 150, 33, 64], page_size=128)
        assert_each_right(made, call(made, module, splits=2))


def test_the_same_mechanism_passes_the_stage_itself() -> None:
    assert_right_with_few_and_with_many_queries(mutated("flashedu.stages.paged", ()))


# what does not fit


BAD = {
    "a page that is not there": ("block_table", put((0, 2), 40), ValueError,
                                 "block_table must hold pages 0 to 39, got 40 in sequence 0"),
    "a page below 0": ("block_table", put((3, 0), -1), ValueError, "got -1 in sequence 3"),
    "more keys than pages": ("lengths", put(0, 161), ValueError,
                             "lengths must be 0 to 160, .* got 161 for sequence 0"),
    "less than no keys": ("lengths", put(1, -1), ValueError, "got -1 for sequence 1"),
    "lengths of other sequences": ("lengths", lambda x: x[:3], ValueError,
                                   r"lengths must be \(B,\) with B=4, got shape \(3,\)"),
    "a table of one sequence": ("block_table", lambda x: x[0], ValueError,
                                r"block_table must be \(B, max_pages\) with B=4"),
    "a table of int64": ("block_table", torch.Tensor.long, TypeError, "int32, got int64"),
    "lengths in a list": ("lengths", torch.Tensor.tolist, TypeError, "tensor, got list"),
    "pages of 24": ("k", lambda x: x.repeat(1, 1, 2, 1)[:, :, :24], ValueError, "v must have"),
    "k in float16": ("k", torch.Tensor.half, TypeError, "k must have the dtype of q, float32"),
    "q of other heads": ("q", lambda x: x[:, :5], ValueError, r"\(H_kv=2\), got H=5"),
    "q of another D": ("q", lambda x: x[..., :5], ValueError, "D=5, got D=13"),
    "q without heads": ("q", lambda x: x[0], ValueError, "q must have 4 dimensions"),
    "a table elsewhere": ("block_table", lambda x: x.to("meta"), ValueError, "got meta"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_sentence(name: str, change: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call(changed(cache(P, LENGTHS), name, change))


def test_pages_of_another_size_get_a_sentence() -> None:
    made = cache(P, LENGTHS)
    for name in "kv":
        made[name] = made[name].repeat(1, 1, 2, 1)[:, :, :24]
    with pytest.raises(ValueError, match=r"k must have pages of 16, 32, 64 … .* page_size=24"):
        call(made)


def test_a_table_may_hold_anything_behind_the_last_page_of_a_sequence() -> None:
    made = cache(P, LENGTHS)
    made["block_table"][2, 1:] = 12345
    assert_each_right(made, call(made))


def test_inputs_that_require_gradients_get_a_sentence() -> None:
    made = cache(P, LENGTHS)
    made["q"].requires_grad_()
    with pytest.raises(ValueError, match="must not require gradients for stage 'paged'"):
        call(made)
