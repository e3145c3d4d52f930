"""decode's kernels, interpreted on the CPU. On a GPU: see test_gpu.py."""

from __future__ import annotations

import math

import pytest
import torch

from flashedu import attention
from flashedu.memory import Machine, Problem
from flashedu.stages import rung
from flashedu.testing import assert_right, draw
from tests import contract
from tests.contract import GQA, Subject

if rung("decode").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here; see test_gpu.py", allow_module_level=True)

from flashedu.stages import decode, decode_tiles, flash2
from flashedu.stages.decode_tiles import splits_for, tile_for
from flashedu.stages.reference import Reference

CLAIMS = list(contract.claims(rung("decode")))
HALF = len(CLAIMS) // 2  # neighbours share results


class TestContract:
    @pytest.mark.parametrize("claim", CLAIMS[:HALF])
    def test_contract(self, claim: str) -> None:
        contract.claims(rung("decode"))[claim](Subject.of(rung("decode")))


class TestTheOtherHalfOfTheContract:  # a class of its own: another worker can take it
    @pytest.mark.parametrize("claim", CLAIMS[HALF:])
    def test_contract(self, claim: str) -> None:
        contract.claims(rung("decode"))[claim](Subject.of(rung("decode")))


LONG = Problem(B=2, H=6, H_kv=2, Nq=1, Nk=1000, D=40, dtype="float32")


@pytest.mark.parametrize("splits", [None, 1, 2, 7, 40])
def test_any_number_of_splits_gives_the_result(splits: int | None) -> None:
    """40 splits of 16 tiles: most have no key."""
    q, k, v, _ = draw(LONG, "rising", framework="torch")
    got = decode.attention_with_lse(q, k, v, splits=splits)
    assert_right(Reference(*got), q, k, v)


@pytest.mark.parametrize("Nq", [1, 5, 40])
def test_a_row_that_sees_keys_in_some_splits_only_is_right(Nq: int) -> None:
    p = LONG.replace(Nq=Nq, Nk=70, causal=True)
    q, k, v, _ = draw(p, "peaked", framework="torch")
    got = decode.attention_with_lse(q, k, v, causal=True, block_q=16, block_k=16, splits=4)
    assert_right(Reference(*got), q, k, v, causal=True)


def test_the_merge_is_attention_over_the_splits() -> None:
    """Their lse are the scores, their o the values."""
    q, k, v, _ = draw(LONG, framework="torch")
    cut = 448
    parts = [
        decode.attention_with_lse(q, k[:, :, keys], v[:, :, keys], splits=1)
        for keys in (slice(cut), slice(cut, None))
    ]
    o, lse = (torch.stack(x, -1).double() for x in zip(*parts, strict=True))
    merged = Reference((o * torch.softmax(lse, -1)[..., None, :]).sum(-1), lse.logsumexp(-1))
    assert_right(merged, q, k, v)


def test_one_program_for_each_key_head_and_split_where_flash2_has_one_a_head() -> None:
    q, k, v, _ = draw(LONG, framework="torch")
    ours, theirs = Machine(), Machine()
    decode.attention(q, k, v, splits=5, machine=ours)
    flash2.attention(q, k, v, machine=theirs)
    assert ours.programs["decode"] == 2 * 2 * 5
    assert theirs.programs == {"flash2": 2 * 6}


def test_keys_are_loaded_once_for_all_query_heads_of_a_group() -> None:
    q, k, v, _ = draw(LONG, framework="torch")
    ours, theirs = Machine(), Machine()
    decode.attention(q, k, v, splits=5, machine=ours)
    flash2.attention(q, k, v, machine=theirs)
    assert ours.bytes_by_tensor()["k"] == (k.nbytes, 0)
    assert theirs.bytes_by_tensor()["k"] == (3 * k.nbytes, 0)


def test_one_split_needs_no_merge_and_no_memory_but_lse() -> None:
    q, k, v, _ = draw(LONG, framework="torch")
    machine = Machine()
    decode.attention(q, k, v, splits=1, machine=machine)
    assert machine.launches == ["decode"]
    assert machine.counted.hbm_extra_bytes == 2 * 6 * 4


def test_one_query_a_head_is_packed_without_a_copy() -> None:
    q, *_ = draw(LONG, framework="torch")
    rows = decode.packed(q, 2)
    assert rows.shape == (2, 2, 3, 40)
    assert rows.data_ptr() == q.data_ptr()


def test_packed_rows_go_query_by_query_and_come_back() -> None:
    q, *_ = draw(LONG.replace(Nq=5), framework="torch")
    rows = decode.packed(q, 2)
    assert torch.equal(rows[:, 1, 4 * 3 + 2], q[:, 1 * 3 + 2, 4])  # query 4 of head 2 of group 1
    assert torch.equal(decode.unpacked(rows, 6), q)


def test_inputs_that_require_gradients_get_a_sentence() -> None:
    q, k, v, _ = draw(GQA.replace(dtype="float32"), framework="torch")
    with pytest.raises(ValueError, match="must not require gradients for stage 'decode'"):
        decode.attention(q, k.requires_grad_(), v)
    with torch.no_grad():
        decode.attention(q, k, v)


def test_it_is_taken_by_name_and_never_by_default() -> None:
    q, k, v, _ = draw(LONG, framework="torch")
    by_name = attention(q, k, v, stage="decode", splits=2)
    assert torch.equal(by_name, decode.attention(q, k, v, splits=2))
    machine = Machine()
    attention(q, k, v, machine=machine)
    assert "decode" not in machine.launches


# how it is cut

SLOTS = 2 * 132  # of an H200


def test_a_lone_head_is_cut_until_the_card_is_full() -> None:
    assert splits_for(SLOTS, 2, 2**17, 64) == 128  # 2048 tiles: 16 each
    assert splits_for(SLOTS, 1, 2**20, 64) == 261  # 63 tiles each, where 264 had 62.1


def test_no_split_is_shorter_than_some_keys() -> None:
    assert splits_for(SLOTS, 2, 8192, 64) == 8192 // decode_tiles.MIN_KEYS
    assert splits_for(SLOTS, 2, 255, 64) == splits_for(SLOTS, 2, 1, 64) == 1


def test_programs_fill_whole_waves() -> None:
    assert splits_for(100, 50, 2**20, 64) == 2
    assert splits_for(SLOTS, 100, 2**20, 64) == 5  # 500 of 528
    assert splits_for(SLOTS, 10_000, 2**20, 64) == 1


@pytest.mark.parametrize("Nk", [1, 63, 64, 65, 1000, 8191, 100_001])
@pytest.mark.parametrize("parts", [1, 2, 3, 16, 100, 300])
def test_every_split_has_a_key(parts: int, Nk: int) -> None:
    splits = splits_for(SLOTS, parts, Nk, 64)
    keys_per_split = math.ceil(math.ceil(Nk / 64) / splits) * 64
    assert (splits - 1) * keys_per_split < Nk <= splits * keys_per_split


def test_a_tile_holds_the_rows_of_a_group_and_at_least_what_a_matrix_unit_wants() -> None:
    found = [tile_for((9, 0), 128, 2, rows).block_q for rows in (1, 8, 16, 17, 64, 1000)]
    assert found == [16, 16, 16, 32, 64, 64]
    assert tile_for((9, 0), 128, 4, 1000).block_q == 16


def test_a_tile_of_keys_is_32_kib_or_128_keys_and_half_of_that_on_a_small_card() -> None:
    for columns, item_bytes, block_k in ((128, 2, 128), (64, 2, 128), (256, 2, 64), (256, 4, 32)):
        assert tile_for((9, 0), columns, item_bytes, 8).block_k == block_k
    for columns, item_bytes, block_k in ((128, 2, 64), (64, 2, 128), (256, 2, 32), (256, 4, 16)):
        assert tile_for((8, 6), columns, item_bytes, 8).block_k == block_k
