"""The closed forms: equal to the counters to the byte, and as the theory says."""

from __future__ import annotations

import itertools
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashedu.memory import Cost, Machine, Problem, cost
from flashedu.stages import GPU_TILES, naive, online, rung, tiled
from flashedu.units import human_bytes
from tests.contract import EMPTY

exactly = settings(max_examples=60, deadline=None, derandomize=True, database=None)


ANY_BLOCK = st.integers(1, 48)


def problems(
    dtypes: tuple[str, ...], blocks: st.SearchStrategy[int] = ANY_BLOCK
) -> st.SearchStrategy[Problem]:
    sizes = st.integers(0, 40)
    heads = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return st.builds(
        lambda heads, **rest: Problem(H=heads[0] * heads[1], H_kv=heads[0], **rest),
        heads,
        B=st.integers(0, 2),
        Nq=sizes,
        Nk=sizes,
        D=st.integers(1, 9),
        dtype=st.sampled_from(dtypes),
        causal=st.booleans(),
        block_q=blocks,
        block_k=blocks,
    )


seldom = settings(exactly, max_examples=12)  # interpreting a kernel takes its time
kernels = pytest.mark.skipif(rung("flash2").missing() is not None, reason="needs Triton")

NUMPY = problems(("float16", "float32", "float64"))
TORCH = problems(("float16", "bfloat16", "float32", "float64"))
KERNELS = problems(("float16", "bfloat16", "float32"), st.sampled_from((16, 32)))


def zeros(p: Problem, framework: str):
    """q, k, v, do: traffic does not depend on values."""
    shapes = [
        (p.B, h, n, p.D) for h, n in ((p.H, p.Nq), (p.H_kv, p.Nk), (p.H_kv, p.Nk), (p.H, p.Nq))
    ]
    if framework == "numpy":
        return [np.zeros(shape, p.dtype) for shape in shapes]
    return [torch.zeros(shape, dtype=getattr(torch, p.dtype)) for shape in shapes]


def assert_equal(machine: Machine, p: Problem, stage: Cost) -> None:
    """In total, and kernel by kernel."""
    assert machine.counted == stage
    moved = {name: cost.KERNELS[name](p) for name in machine.launches}
    assert machine.bytes_by_kernel() == {
        name: (c.hbm_read_bytes, c.hbm_write_bytes)
        for name, c in moved.items()
        if name in machine.bytes_by_kernel()
    }
    assert all(
        moved[name].hbm_bytes == 0 for name in moved.keys() - machine.bytes_by_kernel().keys()
    )


@exactly
@given(NUMPY)
def test_naive_counts_its_closed_form(p: Problem) -> None:
    q, k, v, do = zeros(p, "numpy")
    machine = Machine(trace=False)
    _, stored = naive.forward(q, k, v, p, 1.0, machine)
    assert_equal(machine, p, cost.naive(p))
    machine = Machine(trace=False)
    naive.backward(do, q, k, v, stored, p, 1.0, machine)
    assert_equal(machine, p, cost.naive_backward(p))


@exactly
@given(NUMPY)
def test_tiled_counts_its_closed_form(p: Problem) -> None:
    machine = Machine(trace=False)
    tiled.attention(*zeros(p, "numpy")[:3], causal=p.causal, block_q=p.block_q,
                    block_k=p.block_k, machine=machine)  # fmt: skip
    assert_equal(machine, p, cost.tiled(p))


@exactly
@given(TORCH)
def test_online_counts_its_closed_form(p: Problem) -> None:
    q, k, v, do = zeros(p, "torch")
    machine = Machine(trace=False)
    o, lse = online.forward(q, k, v, p, 1.0, machine)
    assert_equal(machine, p, cost.online(p))
    machine = Machine(trace=False)
    online.backward(do, None, q, k, v, o, lse, p, 1.0, machine)
    assert_equal(machine, p, cost.online_backward(p))


@kernels
@seldom
@given(KERNELS)
def test_flash1_counts_its_closed_form(p: Problem) -> None:
    machine = Machine(trace=False)
    q, k, v, _ = zeros(p, "torch")
    rung("flash1").load().attention(q, k, v, causal=p.causal, **tiles(p), machine=machine)
    assert_equal(machine, p, cost.flash1(p))


@kernels
@seldom
@given(KERNELS)
def test_flash2_counts_its_closed_forms_and_the_bytes_of_online(p: Problem) -> None:
    q, k, v, _do = (x.requires_grad_() for x in zeros(p, "torch"))
    flash2, machine = rung("flash2").load(), Machine(trace=False)
    o, lse = flash2.attention_with_lse(q, k, v, causal=p.causal, **tiles(p), machine=machine)
    assert_equal(machine, p, cost.flash2(p))
    tiled_in_torch = Machine(trace=False)
    online.attention(q, k, v, causal=p.causal, **tiles(p), machine=tiled_in_torch)
    if 0 not in (p.B, p.Nq, p.Nk):  # then no kernel runs
        assert machine.bytes_by_tensor() == {
            name: moved for name, moved in tiled_in_torch.bytes_by_tensor().items() if any(moved)
        }
    (o.sum() + lse.sum()).backward()
    assert_equal(machine, p, cost.flash2(p) + cost.flash2_backward(p))


@kernels
@seldom
@given(KERNELS, st.integers(1, 5))
def test_decode_counts_its_closed_forms(p: Problem, splits: int) -> None:
    p, machine = p.replace(splits=splits), Machine(trace=False)
    q, k, v, _ = zeros(p, "torch")
    decode = rung("decode").load()
    decode.attention(q, k, v, causal=p.causal, **tiles(p), splits=splits, machine=machine)
    assert_equal(machine, p, cost.decode_forward(p))


def test_decode_reads_k_and_v_once_for_all_heads_of_a_group_and_flash2_once_for_each() -> None:
    p = Problem(H=16, H_kv=2, Nq=1, Nk=8192, D=128, block_q=16, splits=32)
    kv_bytes = 2 * p.H_kv * p.Nk * p.D * p.item_bytes
    q_bytes = p.H * p.D * p.item_bytes
    assert cost.flash2(p).hbm_read_bytes == p.group * kv_bytes + q_bytes
    assert cost.decode(p).hbm_read_bytes == kv_bytes + p.splits * q_bytes
    assert cost.decode_forward(p).hbm_bytes < 1.15 * kv_bytes  # the splits' o and lse, too


def test_splits_change_what_is_written_and_not_which_keys_are_read() -> None:
    p = Problem(H=4, H_kv=2, Nq=3, Nk=1000, D=64, causal=True, block_q=16)
    q_bytes = p.H * p.Nq * p.D * p.item_bytes
    for splits in (2, 3, 50):
        more = cost.decode(p.replace(splits=splits)).hbm_read_bytes - cost.decode(p).hbm_read_bytes
        assert more == (splits - 1) * q_bytes


def test_with_many_queries_and_one_split_decode_moves_what_flash2_moves() -> None:
    p = Problem(Nq=500, Nk=700, D=64, causal=True)
    assert cost.decode_forward(p) == cost.flash2(p)


def tiles(p: Problem) -> dict[str, int]:
    return {"block_q": p.block_q, "block_k": p.block_k}


def test_flash1_moves_less_the_larger_its_key_tiles_and_flash2_less_the_larger_its_query_tiles():
    p = Problem(Nq=4096, D=64, block_q=64, block_k=64)
    for stage, block in ((cost.flash1, "block_k"), (cost.flash2, "block_q")):
        moved = [stage(p.replace(**{block: size})).hbm_bytes for size in GPU_TILES]
        assert all(x > y for x, y in itertools.pairwise(moved))


@pytest.mark.parametrize("p", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("name", cost.KERNELS)
def test_closed_forms_take_empty_problems(name: str, p: Problem) -> None:
    c = cost.KERNELS[name](p)
    assert all(type(n) is int and n >= 0 for n in vars(c).values() if n is not None)


def test_costs_add_up_and_share_the_sram() -> None:
    a, b = Cost(1, 2, 3, 4, 5), Cost(10, 20, 30, 2, 50)
    assert a + b == Cost(11, 22, 33, 4, 55)
    assert (a + b).hbm_bytes == 33
    assert (a + b).intensity == pytest.approx(5 / 3)
    assert Cost().intensity == 0


# the theory

N, D = 4096, 64
SQUARE = Problem(Nq=N, D=D)  # float16: w = 2, a = 4


def largest_tiles(sram_bytes: int) -> Problem:
    """block_k = D, block_q the largest power of two that fits, as in the paper's theorem."""
    for block_q in (512, 256, 128, 64):
        p = SQUARE.replace(block_q=block_q, block_k=D)
        if cost.online(p).sram_peak_bytes <= sram_bytes:
            return p
    raise AssertionError(f"no tile fits {sram_bytes} bytes")


SWEEP = [KIB * 2**10 for KIB in (64, 80, 96, 128, 160, 192, 256, 320, 400)]


@pytest.mark.parametrize("sram_bytes", SWEEP)
def test_traffic_is_n_squared_d_squared_over_m(sram_bytes: int) -> None:
    """Θ(N² D² / M), the constant between bounds that follow from the tiles.

    With b = block_q and block_k = D, the traffic is 2wND + aN + 2wN²D / b bytes. The SRAM holds
    b D (w + 2a) + 2ab + 2wD², at least (w + 2a) b D and, with b ≥ D, at most
    (3w + 2a + 2a / D) b D; and the largest power of two leaves less than half of it unused.
    Multiply: traffic · M / (N² D²) lies in 2w (w + 2a) … 4w (3w + 2a + 2a / D) (1 + small),
    where small = (2wND + aN) / (2wN²D / b) = b / N · (1 + a / (2wD)).
    """
    p = largest_tiles(sram_bytes)
    w, a, b = p.item_bytes, p.acc_bytes, p.block_q
    small = b / N * (1 + a / (2 * w * D))
    constant = cost.online(p).hbm_bytes * sram_bytes / (N * D) ** 2
    assert 2 * w * (w + 2 * a) <= constant
    assert constant <= 4 * w * (3 * w + 2 * a + 2 * a / D) * (1 + small)


def test_a_larger_sram_buys_less_traffic_for_online_and_nothing_for_naive() -> None:
    traffic = [cost.online(largest_tiles(m)).hbm_bytes for m in SWEEP]
    assert traffic == sorted(traffic, reverse=True)
    assert traffic[0] > 3 * traffic[-1]
    assert len({cost.naive(largest_tiles(m)).hbm_bytes for m in SWEEP}) == 1


@pytest.mark.parametrize("stage", [cost.tiled, cost.online])
def test_larger_query_tiles_never_move_more(stage) -> None:
    p = Problem(Nq=997, Nk=997, D=16, block_k=32)
    every = [stage(p.replace(block_q=b)).hbm_bytes for b in range(1, 1001)]
    assert all(x >= y for x, y in itertools.pairwise(every))
    doubled = [stage(p.replace(block_q=2**s, causal=True)).hbm_bytes for s in range(11)]
    assert all(x > y for x, y in itertools.pairwise(doubled))


def test_key_tiles_do_not_change_the_traffic_without_a_mask() -> None:
    assert len({cost.online(SQUARE.replace(block_k=b)).hbm_bytes for b in range(1, 200)}) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_tiled_reads_k_three_times_as_often_as_online_and_v_as_often(causal: bool) -> None:
    p = Problem(B=2, H=3, Nq=37, Nk=53, D=5, dtype="float32", causal=causal, block_q=8, block_k=8)
    three, one = Machine(), Machine()
    options = {"causal": causal, "block_q": p.block_q, "block_k": p.block_k}
    tiled.attention(*zeros(p, "numpy")[:3], **options, machine=three)
    online.attention(*zeros(p, "torch")[:3], **options, machine=one)
    three_passes, one_pass = three.bytes_by_tensor(), one.bytes_by_tensor()
    assert three_passes["k"][0] == 3 * one_pass["k"][0]
    for name in "qvo":
        assert three_passes[name] == one_pass[name]
    assert three.flops == 2 * one.flops  # 3 + 1 products against 1 + 1


def test_naive_moves_four_n_squared_values_forward_and_seven_backward() -> None:
    inputs_and_result = 4 * N * D
    assert cost.naive(SQUARE).hbm_bytes == 2 * (4 * N * N + inputs_and_result)
    assert cost.naive_backward(SQUARE).hbm_bytes == 2 * (7 * N * N + 8 * N * D)
    assert cost.naive(SQUARE).hbm_extra_bytes == 2 * 2 * N * N


def test_extra_memory_of_online_grows_as_n_and_of_naive_as_n_squared() -> None:
    twice = SQUARE.replace(Nq=2 * N, Nk=2 * N)
    for stage, factor in ((cost.naive, 4), (cost.online, 2), (cost.online_backward, 2)):
        assert stage(twice).hbm_extra_bytes == factor * stage(SQUARE).hbm_extra_bytes
    assert cost.tiled(SQUARE).hbm_extra_bytes == 0


def test_a_causal_mask_halves_the_work_of_long_sequences() -> None:
    for stage in (cost.tiled, cost.online, cost.online_gradients):
        full, half = stage(SQUARE), stage(SQUARE.replace(causal=True))
        # the tiles on the diagonal are done whole: at most block_q + block_k of N more
        extra = (SQUARE.block_q + SQUARE.block_k) / N
        assert 0.5 <= half.flops / full.flops <= 0.5 + extra


def test_a_million_keys_are_no_work_for_a_formula() -> None:
    n = 10**6
    start = time.process_time()
    for closed_form in cost.KERNELS.values():
        for causal in (False, True):
            c = closed_form(Problem(B=64, H=128, Nq=n, D=256, causal=causal))
            assert all(m >= 0 for m in vars(c).values() if m is not None)  # no overflow
    assert time.process_time() - start < 1
    assert cost.online(Problem(B=64, H=128, Nq=n, D=256)).flops == 4 * 64 * 128 * n * n * 256


# what to do about too small an SRAM


@pytest.mark.parametrize("kernel", ["tiled", "online", "online delta", "online gradients"])
@pytest.mark.parametrize("sram_bytes", [2_000, 20_000, 48_000, 100_000])
@pytest.mark.parametrize("causal", [False, True])
def test_suggested_tiles_fit_and_none_larger_does(
    kernel: str, sram_bytes: int, causal: bool
) -> None:
    p = Problem(Nq=500, Nk=700, D=64, block_q=100, block_k=96, causal=causal)

    def needs(block_q: int, block_k: int) -> int:
        return cost.KERNELS[kernel](p.replace(block_q=block_q, block_k=block_k)).sram_peak_bytes

    found = re.fullmatch(
        r"Try block_q=(\d+), block_k=(\d+), which needs (.+)\.",
        cost.suggest_tiles(kernel, p, sram_bytes),
    )
    assert found
    block_q, block_k = int(found[1]), int(found[2])
    assert needs(block_q, block_k) <= sram_bytes
    assert found[3] == human_bytes(needs(block_q, block_k))
    halvings = itertools.product((100, 50, 25, 12, 6, 3, 1), (96, 48, 24, 12, 6, 3, 1))
    assert block_q * block_k == max(x * y for x, y in halvings if needs(x, y) <= sram_bytes)


@pytest.mark.parametrize("kernel", cost.KERNELS)
def test_where_no_tile_fits_the_sentence_says_what_would_help(kernel: str) -> None:
    for p in (
        Problem(Nq=1, D=64),
        Problem(Nq=500, D=64),
        Problem(Nq=500, D=64, block_q=1, block_k=1),
    ):
        sentence = cost.suggest_tiles(kernel, p, 1)
        if kernel.startswith("naive"):
            assert (
                sentence
                == "This kernel works on whole matrices: the stage 'tiled' cuts them to fit."
            )
        else:
            assert sentence.startswith("No tile fits, not even one query with one key")


# the problem itself


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"Nq": -2}, "Nq must be 0 or more, got -2"),
        ({"B": -1}, "B must be 0 or more, got -1"),
        ({"D": 0}, "D must be 1 or more, got 0"),
        ({"block_q": 0}, "block_q must be 1 or more, got 0"),
        ({"splits": 0}, "splits must be 1 or more, got 0"),
        ({"H": 6, "H_kv": 4}, "H must be a multiple of H_kv, got H=6, H_kv=4"),
        ({"dtype": "int8"}, "dtype must be one of float16, .*, got 'int8'"),
    ],
)
def test_an_impossible_problem_gets_a_sentence(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(**{"Nq": 4, "D": 4, **sizes})


def test_keys_and_key_heads_default_to_queries_and_heads() -> None:
    p = Problem(Nq=5, D=2, H=3)
    assert (p.Nk, p.H_kv, p.group) == (5, 3, 1)
    assert Problem(Nq=5, D=2, Nk=0).Nk == 0
