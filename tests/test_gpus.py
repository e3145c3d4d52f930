"""The datasheets are plausible, and the roofline does its sum."""

from __future__ import annotations

import re

import pytest

from flashedu.memory import GPU, GPUS, Cost, Problem, cost, gpu

every_card = pytest.mark.parametrize("card", GPUS, ids=[card.key for card in GPUS])


@every_card
def test_numbers_of_a_card_stand_in_the_relations_that_all_cards_keep(card: GPU) -> None:
    assert 48 * 2**10 < card.sram_bytes_per_program <= card.sram_bytes_per_sm <= 256 * 2**10
    # from compute capability 8.0 on, each thread block loses 1 KiB to the system
    reserved = 2**10 if card.compute_capability >= (8, 0) else 0
    assert card.sram_bytes_per_sm - card.sram_bytes_per_program == reserved
    all_sram = card.sm_count * card.sram_bytes_per_sm
    assert 2 * 2**20 < all_sram < card.hbm_bytes
    assert 2**20 < card.l2_bytes < card.hbm_bytes
    assert card.tensor_flops_per_s > card.float32_flops_per_s > card.float64_flops_per_s
    assert 30 < card.sm_count < 200
    assert 3e11 <= card.hbm_bytes_per_s < 1e13


@every_card
def test_every_card_says_where_its_numbers_are_from(card: GPU) -> None:
    assert re.search(r"NVIDIA .*\(.*20\d\d\)", card.source)


@every_card
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_ridge_is_where_memory_and_arithmetic_take_the_same_time(card: GPU, dtype: str) -> None:
    n_bytes = 10**9
    flops = int(card.ridge(dtype) * n_bytes)
    bound = card.bound(Cost(hbm_read_bytes=n_bytes, flops=flops), dtype)
    assert bound.memory_s == pytest.approx(bound.compute_s, rel=1e-6)
    assert card.ridge(dtype) > 0.5


def test_ridges_are_those_of_the_literature() -> None:
    assert gpu("a100-40").ridge("float16") == pytest.approx(201, abs=1)  # 312e12 / 1555e9
    assert gpu("h100").ridge("float16") == pytest.approx(295, abs=1)  # 989.4e12 / 3350e9
    assert gpu("t4").ridge("float16") == pytest.approx(203, abs=1)  # 65e12 / 320e9


def test_keys_are_unique_and_read_in_any_case() -> None:
    assert len({card.key for card in GPUS}) == len(GPUS)
    for card in GPUS:
        assert gpu(card.key) is gpu(card.key.upper()) is card


def test_an_unknown_card_gets_a_list_of_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"gpu must be one of t4, .*, got 'v100'") as caught:
        gpu("v100")
    assert all(card.key in str(caught.value) for card in GPUS)


def test_bfloat16_on_a_card_without_it_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="T4 has no bfloat16; float16 would do"):
        gpu("t4").flops_per_s("bfloat16")
    for card in GPUS:
        if card.key != "t4":
            assert card.flops_per_s("bfloat16") == card.flops_per_s("float16")


def test_the_roofline_of_standard_attention_by_hand() -> None:
    """N = 1024, D = 64, float16, one head, on an A100 of 40 GB.

    Bytes: 2 · (4 · 1024² + 4 · 1024 · 64) = 8,912,896. FLOPs: 4 · 1024² · 64 = 268,435,456.
    """
    c = cost.naive(Problem(Nq=1024, D=64))
    assert (c.hbm_bytes, c.flops) == (8_912_896, 268_435_456)
    bound = gpu("a100-40").bound(c, "float16")
    assert bound.memory_s == pytest.approx(8_912_896 / 1.555e12)  # 5.7 µs
    assert bound.compute_s == pytest.approx(268_435_456 / 312e12)  # 0.86 µs
    assert (bound.limit, bound.seconds) == ("memory", bound.memory_s)


def test_the_roofline_of_online_attention_turns_to_arithmetic_with_large_tiles() -> None:
    """A tile of b queries does 4 b D FLOPs for the 4 D bytes of a key and a value: b a byte."""
    p = Problem(Nq=16384, D=64, block_q=1024)
    bound = gpu("a100-40").bound(cost.online(p), "float16")
    assert (bound.limit, bound.seconds) == ("compute", bound.compute_s)
    small = gpu("a100-40").bound(cost.online(p.replace(block_q=128)), "float16")
    assert small.limit == "memory"
