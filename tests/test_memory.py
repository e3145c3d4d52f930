"""The memory machine: what a load moves, what SRAM holds, and what the trace tells."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import defaultdict

import numpy as np
import pytest
import torch

from flashedu.memory import UNCOUNTED, Machine, Problem, SRAMOverflow, cost
from flashedu.memory.sram import SRAM
from flashedu.stages import LADDER, Rung, naive, online, tiled
from flashedu.testing import draw
from tests.contract import GQA, PRIMES, Subject

P = Problem(B=2, H=3, Nq=37, Nk=53, D=13, block_q=16, block_k=8, dtype="float32")
RUNGS = [r for r in LADDER if r.missing() is None]
ON_CHIP = [r for r in RUNGS if not r.is_triton]  # what a Triton kernel holds is not counted
every_rung = pytest.mark.parametrize("rung", RUNGS, ids=[r.name for r in RUNGS])
rungs_with_sram = pytest.mark.parametrize("rung", ON_CHIP, ids=[r.name for r in ON_CHIP])
tiled_rungs = pytest.mark.parametrize("rung", ON_CHIP[1:], ids=[r.name for r in ON_CHIP[1:]])


def zeros(framework: str, shape: tuple[int, ...], dtype: str):
    if framework == "numpy":
        return np.zeros(shape, dtype)
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def run(rung: Rung, p: Problem, machine: Machine, *, backward: bool = True) -> Machine:
    subject = Subject.of(rung)
    inputs = subject.draw(p)
    subject.run(p, *(inputs if backward else inputs[:3]), machine=machine)
    return machine


# HBM

DTYPES = [("numpy", "float16", 2), ("numpy", "float32", 4), ("numpy", "float64", 8),
          ("torch", "float16", 2), ("torch", "bfloat16", 2), ("torch", "float32", 4)]  # fmt: skip
every_dtype = pytest.mark.parametrize(("framework", "dtype", "size"), DTYPES)


@every_dtype
def test_load_and_store_count_the_bytes_that_hbm_holds(framework, dtype, size) -> None:
    machine, problem = Machine(), Problem(Nq=5, D=3)
    x = machine.hbm.array("x", zeros(framework, (2, 7, 5, 3), dtype))
    with machine.kernel("kernel", problem):
        tile = x.load(slice(1, 4))
        x.store(slice(0, 2), 1)
    assert machine.hbm_read_bytes == 2 * 7 * 3 * 3 * size
    assert machine.hbm_write_bytes == 2 * 7 * 2 * 3 * size
    assert machine.sram_peak_bytes == 3 * 3 * size
    assert tile.dtype.itemsize == max(4, size)


@every_dtype
def test_some_heads_count_as_some_heads(framework, dtype, size) -> None:
    machine = Machine()
    x = machine.hbm.array("x", zeros(framework, (2, 6, 5, 3), dtype))
    with machine.kernel("kernel", Problem(Nq=5, D=3)):
        assert x.load(slice(0, 5), slice(1, None, 2)).shape == (2, 3, 5, 3)
        x.store(slice(0, 5), 1, slice(0, 1))
    assert machine.bytes_by_tensor() == {"x": (2 * 3 * 5 * 3 * size, 2 * 1 * 5 * 3 * size)}


@every_dtype
@pytest.mark.parametrize("machine", [Machine(), UNCOUNTED], ids=["counted", "uncounted"])
@pytest.mark.parametrize("shared_by", [1, 2])
def test_a_loaded_tile_is_a_copy(machine, shared_by, framework, dtype, size) -> None:
    x = machine.hbm.array("x", zeros(framework, (1, 1, 4, 2), dtype), shared_by=shared_by)
    with machine.kernel("kernel", Problem(Nq=4, D=2)):
        tile = x.load(slice(0, 4))
        tile[...] = 1
    assert not x.data.any()


def test_a_shared_head_is_loaded_by_each_program_that_shares_it() -> None:
    machine = Machine()
    k = np.arange(2 * 3 * 2, dtype=np.float32).reshape(1, 2, 3, 2)
    with machine.kernel("kernel", Problem(Nq=3, D=2)):
        tile = machine.hbm.array("k", k, shared_by=3).load()
    assert (tile == k.repeat(3, axis=1)).all()
    assert machine.hbm_read_bytes == 3 * k.nbytes
    assert machine.sram_peak_bytes == k[0, 0].nbytes


@every_rung
def test_gqa_saves_memory_but_not_traffic(rung: Rung) -> None:
    """Each query head's program loads the shared head for itself."""
    p = GQA.replace(dtype="float32")
    shared = run(rung, p, Machine(), backward=False)
    alone = run(rung, p.replace(H_kv=p.H), Machine(), backward=False)
    assert shared.counted == alone.counted
    assert shared.bytes_by_tensor()["k"] == alone.bytes_by_tensor()["k"]


def test_numpy_and_torch_arrays_count_the_same() -> None:
    numpy, tensors = Machine(), Machine()
    naive.attention(*draw(P)[:3], causal=True, machine=numpy)
    q, k, v, _ = draw(P, framework="torch")
    for machine, arrays in ((numpy, draw(P)), (tensors, (q, k, v))):
        x = machine.hbm.array("x", arrays[0])
        y = machine.hbm.output("y", arrays[0].shape, like=arrays[0])
        z = machine.hbm.scratch("z", arrays[0].shape, like=arrays[0])
        with machine.kernel("copy", P):
            for i in machine.sram.tiles(P.Nq, P.block_q):
                tile = x.load(i)
                machine.sram.hold(tile=tile)
                product = machine.matmul(tile, tile.swapaxes(-1, -2))
                machine.sram.hold(product=product)
                y.store(i, tile)
                z.store(i, tile)
    assert numpy.bytes_by_kernel()["copy"] == tensors.bytes_by_kernel()["copy"]
    assert [e[2:8] for e in numpy.trace if e.kernel == "copy"] == [e[2:8] for e in tensors.trace]


@every_rung
def test_counters_add_up_over_calls(rung: Rung) -> None:
    once, twice = run(rung, P, Machine()), Machine()
    for _ in range(2):
        run(rung, P, twice)
    for name in ("hbm_read_bytes", "hbm_write_bytes", "hbm_extra_bytes", "flops"):
        assert getattr(twice, name) == 2 * getattr(once, name)
    assert twice.sram_peak_bytes == once.sram_peak_bytes
    assert (once.sram_peak_bytes is None) == rung.is_triton
    assert twice.launches == 2 * once.launches


def test_uncounted_counts_nothing() -> None:
    before = UNCOUNTED.counted
    for rung in RUNGS:
        run(rung, P, UNCOUNTED)
    assert UNCOUNTED.counted == before == cost.Cost()
    assert not UNCOUNTED.launches
    assert not UNCOUNTED.sram.live


@pytest.mark.parametrize("sram_bytes", [0, -1])
def test_a_machine_without_sram_gets_a_sentence(sram_bytes: int) -> None:
    with pytest.raises(
        ValueError, match=f"sram_bytes must be 1 or more, or None, got {sram_bytes}"
    ):
        Machine(sram_bytes)


# SRAM


@pytest.mark.parametrize("kind", [SRAM, type(UNCOUNTED.sram)])
@pytest.mark.parametrize(
    ("n", "block", "bounds", "want"),
    [
        (5, 2, {}, [(0, 2), (2, 4), (4, 5)]),
        (4, 2, {}, [(0, 2), (2, 4)]),
        (1, 128, {}, [(0, 1)]),
        (0, 2, {}, []),
        (9, 4, {"stop": 5}, [(0, 4), (4, 8)]),
        (9, 4, {"stop": 4}, [(0, 4)]),
        (9, 4, {"stop": 0}, []),
        (9, 4, {"start": 5}, [(4, 8), (8, 9)]),
        (9, 4, {"start": 4}, [(4, 8), (8, 9)]),
        (9, 4, {"start": 9}, [(8, 9)]),
        (8, 4, {"start": 8}, []),
    ],
)
def test_tiles_cover_the_rows_once_each_of_them_whole(kind, n, block, bounds, want) -> None:
    assert [(t.start, t.stop) for t in kind().tiles(n, block, **bounds)] == want


def test_a_pass_frees_its_tiles_and_no_others() -> None:
    machine = Machine()
    sram, tile = machine.sram, np.zeros((1, 1, 2, 4), np.float32)
    with machine.kernel("kernel", P):
        sram.hold(kernel_s=tile)
        for _ in sram.tiles(4, 2):
            sram.hold(outer=tile)
            for _ in sram.tiles(4, 2):
                sram.hold(inner=tile, kernel_s=tile)  # in the place of the old one
                assert list(sram.live) == ["kernel_s", "outer", "inner"]
                assert sram.used_bytes == 3 * 32
            assert list(sram.live) == ["kernel_s", "outer"]
        assert list(sram.live) == ["kernel_s"]
    assert not sram.live
    assert sram.used_bytes == 0
    assert sram.peak_bytes == 3 * 32


def test_a_smaller_tile_in_the_place_of_an_old_one_gives_bytes_back() -> None:
    machine = Machine(sram_bytes=64)
    with machine.kernel("kernel", P):
        machine.sram.hold(x=np.zeros((1, 1, 4, 4), np.float32))
        machine.sram.hold(x=np.zeros((1, 1, 2, 4), np.float32))
        assert machine.sram.used_bytes == 32
        machine.sram.hold(y=np.zeros((1, 1, 2, 4), np.float32))
    assert machine.sram.peak_bytes == 64


def test_leaving_a_loop_early_frees_its_tiles() -> None:
    machine = Machine()
    tile = np.zeros((1, 1, 2, 4), np.float32)
    with machine.kernel("kernel", P):
        for _ in machine.sram.tiles(4, 2):
            machine.sram.hold(x=tile)
            break
        assert not machine.sram.live
    assert machine.sram.used_bytes == 0


def test_an_error_leaves_the_sram_empty_even_while_the_error_is_kept() -> None:
    """A notebook keeps the last traceback, and with it the stage's loops."""
    machine = Machine(sram_bytes=3000)
    with pytest.raises(SRAMOverflow) as kept:
        tiled.attention(*draw(P)[:3], block_q=16, block_k=16, machine=machine)
    assert kept.tb is not None
    assert machine.sram.used_bytes == 0
    assert not machine.sram.live
    read, fresh = machine.hbm_read_bytes, Machine(sram_bytes=3000)
    for m in (machine, fresh):
        tiled.attention(*draw(P)[:3], block_q=4, block_k=4, machine=m)
    del kept
    assert machine.sram.used_bytes == 0
    assert machine.hbm_read_bytes - read == fresh.hbm_read_bytes


def suggestion(error: SRAMOverflow) -> dict[str, int]:
    found = re.search(r"Try block_q=(\d+), block_k=(\d+), which needs", str(error))
    assert found, str(error)
    return {"block_q": int(found[1]), "block_k": int(found[2])}


@tiled_rungs
@pytest.mark.parametrize("sram_bytes", [700, 1000, 2000, 4000, 9000])
@pytest.mark.parametrize("causal", [False, True])
def test_the_tiles_that_an_overflow_suggests_fit(rung: Rung, sram_bytes: int, causal: bool) -> None:
    p = P.replace(block_q=40, block_k=32, causal=causal)
    suggested = []
    while True:
        try:
            run(rung, p, Machine(sram_bytes))
            break
        except SRAMOverflow as error:
            suggested.append((error, p))
            p = p.replace(**suggestion(error))
    # at most one for the forward and one for the backward, which needs more
    assert 1 <= len(suggested) <= (2 if rung.backward else 1)


@tiled_rungs
def test_an_overflow_lists_what_is_live(rung: Rung) -> None:
    with pytest.raises(SRAMOverflow) as caught:
        run(rung, P, Machine(sram_bytes=3000))
    message = str(caught.value)
    assert re.match(r"SRAM overflow: \w+ \(\d+ × \d+, [\d.]+ K?i?B\) does not fit\. ", message)
    assert "of 2.93 KiB are in use. Live: q (16 × 13, 832 B); m_i (16 × 1, 64 B)" in message
    assert isinstance(caught.value, MemoryError)


@tiled_rungs
@pytest.mark.parametrize("blocks", [(1, 1), (16, 8)])
def test_an_sram_too_small_for_any_tile_gets_a_sentence(rung: Rung, blocks) -> None:
    p = P.replace(block_q=blocks[0], block_k=blocks[1])
    with pytest.raises(SRAMOverflow, match="No tile fits, not even one query with one key"):
        run(rung, p, Machine(sram_bytes=100))


@tiled_rungs
def test_an_sram_too_small_for_a_tiny_problem_gets_the_same_sentence(rung: Rung) -> None:
    with pytest.raises(SRAMOverflow, match="No tile fits, not even one query with one key"):
        run(rung, P.replace(Nq=1, Nk=1), Machine(sram_bytes=100))


def test_naive_on_a_finite_sram_says_what_to_do() -> None:
    with pytest.raises(SRAMOverflow, match="works on whole matrices: the stage 'tiled' cuts them"):
        naive.attention(*draw(P)[:3], machine=Machine(sram_bytes=8000))
    whole = cost.naive(P).sram_peak_bytes
    naive.attention(*draw(P)[:3], machine=Machine(sram_bytes=whole))


@rungs_with_sram
def test_sram_of_the_peak_is_enough_and_a_byte_less_is_not(rung: Rung) -> None:
    peak = run(rung, P, Machine()).sram_peak_bytes
    run(rung, P, Machine(peak))
    with pytest.raises(SRAMOverflow):
        run(rung, P, Machine(peak - 1))


# the trace


@every_rung
def test_the_trace_tells_what_the_counters_say(rung: Rung) -> None:
    machine = run(rung, P, Machine())
    moved: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for event in machine.trace:
        assert event.op in ("load", "store", "hold")
        assert event.hbm_bytes > 0 or event.op == "hold"
        assert 0 <= event.start < event.stop
        if event.op != "hold":
            moved[event.tensor][event.op == "store"] += event.hbm_bytes
    assert {name: tuple(n) for name, n in moved.items()} == machine.bytes_by_tensor()
    peak = max(event.sram_bytes for event in machine.trace)
    assert peak == (0 if rung.is_triton else machine.sram_peak_bytes)
    steps = [event.step for event in machine.trace]
    assert steps == sorted(steps)


@every_rung
def test_each_event_lists_what_is_on_chip(rung: Rung) -> None:
    for event in run(rung, P, Machine()).trace:
        assert sum(size for _, (_, _, size) in event.live) == event.sram_bytes
        if event.op == "hold" or (event.op == "load" and not rung.is_triton):
            rows, _, _ = dict(event.live)[event.tensor]
            assert rows == event.stop - event.start
    if rung.is_triton:
        assert not event.live


@every_rung
def test_the_trace_follows_the_launches(rung: Rung) -> None:
    machine = run(rung, P, Machine())
    kernels = [kernel for kernel, _ in itertools.groupby(event.kernel for event in machine.trace)]
    assert kernels == machine.launches == list(machine.bytes_by_kernel())


@every_rung
def test_each_event_points_at_its_line_in_the_stage(rung: Rung) -> None:
    lines = inspect.getsource(rung.load()).splitlines()
    for event in run(rung, P, Machine()).trace:
        line = lines[event.line - 1]
        assert f".{event.op}(" in line, f"{event}: {line}"
        if event.op == "hold":
            assert f"{event.tensor}=" in line


def test_the_trace_of_a_hand_sized_run_is_what_a_reader_expects() -> None:
    machine = Machine()
    q, k, v, _ = draw(Problem(Nq=2, Nk=3, D=1, dtype="float32"))
    tiled.attention(q, k, v, block_q=2, block_k=2, machine=machine)
    one_pass = [("load", "k", 0, 2), ("hold", "s_ij", 0, 2), ("load", "k", 2, 3),
                ("hold", "s_ij", 0, 2)]  # fmt: skip
    last_pass = [*one_pass[:2], ("load", "v", 0, 2), *one_pass[2:], ("load", "v", 2, 3)]
    assert [event[2:6] for event in machine.trace] == [
        ("load", "q", 0, 2), ("hold", "m_i", 0, 2), *one_pass,
        ("hold", "l_i", 0, 2), *one_pass,
        ("hold", "o_i", 0, 2), *last_pass, ("store", "o", 0, 2),
    ]  # fmt: skip


@every_rung
def test_without_a_trace_the_counters_are_the_same(rung: Rung) -> None:
    traced, counted = run(rung, P, Machine()), run(rung, P, Machine(trace=False))
    assert counted.trace is None
    assert counted.counted == traced.counted
    assert counted.bytes_by_kernel() == traced.bytes_by_kernel()
    assert counted.bytes_by_tensor() == traced.bytes_by_tensor()


@pytest.mark.parametrize("trace", [True, False])
def test_watched_tiles_are_kept_by_value(trace: bool) -> None:
    machine = Machine(trace=trace, watch=("m_i", "l_i"))
    p = Problem(Nq=2, Nk=6, D=1, dtype="float64", block_q=2, block_k=2)
    q, k, v, _ = draw(p, "rising", framework="torch")
    _, lse = online.attention_with_lse(q, k, v, block_q=2, block_k=2, machine=machine)
    assert set(machine.watched) == {"m_i", "l_i"}
    m, l = machine.watched["m_i"], machine.watched["l_i"]
    assert len(m) == len(l) == 4  # at first, and after each of three key tiles
    for j in range(1, 4):
        s = (q @ k.mT)[..., : 2 * j].numpy()
        np.testing.assert_allclose(m[j], s.max(-1, keepdims=True), rtol=1e-12)
        np.testing.assert_allclose(l[j], np.exp(s - m[j]).sum(-1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(m[3] + np.log(l[3]), lse[..., None], rtol=1e-12)


def test_watching_changes_no_counter() -> None:
    rung = next(r for r in RUNGS if r.name == "online")
    watched = run(rung, PRIMES, Machine(watch=["acc_i", "no such tile"]))
    assert watched.counted == run(rung, PRIMES, Machine()).counted
    assert watched.watched["acc_i"]
    assert not watched.watched["no such tile"]


def test_a_machine_that_is_none_gets_a_sentence() -> None:
    q = np.zeros((1, 1, 2, 2), "float32")
    for machine in (5, "h200", Machine):
        with pytest.raises(TypeError, match=r"machine must be a flashedu\.memory\.Machine"):
            naive.attention(q, q, q, machine=machine)
    for capacity in ("228k", 2.5):
        with pytest.raises(TypeError, match="sram_bytes must be an integer, or None, got"):
            Machine(capacity)
    with pytest.raises(ValueError, match="sram_bytes must be 1 or more"):
        Machine(0)


def test_a_size_that_is_no_integer_gets_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"Nq must be an integer, got 4\.5"):
        Problem(Nq=4.5, D=2)
