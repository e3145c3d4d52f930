"""The PyTorch rungs on a card: the whole contract on CUDA tensors, and what only a card can show.

`pytest -m gpu`; kernels are compiled for each size, so `-n 8` is several times faster, where the
card has 141 GB: with 80 GB there is room for `-n 4`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from importlib.metadata import version
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from packaging.version import Version

import flashedu
from flashedu import ladder
from flashedu.memory import UNCOUNTED, Machine, Problem, cost
from flashedu.stages import RUNGS, Rung, online, rung, triton_mode
from flashedu.stages.reference import Reference
from flashedu.stages.runs import Runs, everywhere, packed
from flashedu.testing import assert_right, draw
from tests.contract import Subject, claims
from tests.test_mutants import KERNELS, MUTANTS, Mutant, stage_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none"
    ),
    # Of the first product in a fresh process: harmless.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

ON_A_CARD = [r for r in RUNGS if r.framework == "torch" and r.missing() is None]
WITHOUT = {r.name: reason for r in RUNGS if (reason := r.missing()) is not None}
on_hopper = pytest.mark.skipif("flash3" in WITHOUT, reason=WITHOUT.get("flash3", ""))
every_rung = pytest.mark.parametrize("stage", ON_A_CARD, ids=[r.name for r in ON_A_CARD])
P = Problem(B=2, H=4, H_kv=2, Nq=67, Nk=131, D=40, block_q=32, block_k=48)


def run(stage: str, q, k, v, do, **options) -> Reference:
    """o, lse and the gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = rung(stage).load().attention_with_lse(*leaves, **options)
    return Reference(o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do))


def drawn(p: Problem, family: str = "normal") -> tuple[torch.Tensor, ...]:
    return tuple(x.cuda() for x in draw(p, family, framework="torch"))


def random(count: int, *shape: int) -> list[torch.Tensor]:
    """Different ones, in bfloat16, drawn on the card: too large to be drawn elsewhere."""
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    return [torch.randn(shape, **options) for _ in range(count)]


# flash3 has two backwards, one quicker and one deterministic; the other stages have no modes.
MODES: dict[str, dict[str, Any]] = {
    "": {},
    "any_order": {"deterministic": False},
    "deterministic": {"deterministic": True},
}
IN_ANY_ORDER, DETERMINISTIC = list(MODES)[1:]
TO_THE_BIT = {  # promised of dq in deterministic mode only
    "two_runs_give_the_same_bits", "scale_defaults_to_one_over_root_d", "batches_do_not_mix",
    "future_keys_do_not_change_past_outputs", "each_head_reads_its_own_key_head",
}  # fmt: skip
NO_GRADIENTS = {  # the same in both
    "outputs_match_float64", "lse_matches_float64",
    "attention_is_the_first_result_of_attention_with_lse",
}  # fmt: skip


def modes(stage: str, claim: str) -> list[str]:
    """Those of MODES in which the stage is to keep the claim."""
    if stage != "flash3":
        return [""]
    once = claim in TO_THE_BIT | NO_GRADIENTS
    return [DETERMINISTIC] if once else [IN_ANY_ORDER, DETERMINISTIC]


def in_mode(subject: Subject, mode: str) -> Subject:
    """The subject with the mode's options."""
    how, with_lse = MODES[mode], subject.attention_with_lse
    return dataclasses.replace(
        subject,
        attention=functools.partial(subject.attention, **how),
        attention_with_lse=with_lse and functools.partial(with_lse, **how),
    )


@functools.cache  # one subject, for whose inputs results are kept
def on_the_card(stage: str, mode: str = "") -> Subject:
    return in_mode(Subject.of(rung(stage), device="cuda"), mode)


def for_a_card(r: Rung) -> list[str]:
    """Claims that hold for compiled kernels: those cannot be counted."""
    counted = {"counted_bytes", "counting"}
    return [c for c in claims(r) if not (r.is_triton and c.startswith(tuple(counted)))]


CLAIMS = [
    pytest.param(r.name, claim, mode, id="-".join(filter(None, (r.name, claim, mode))))
    for r in ON_A_CARD
    for claim in for_a_card(r)
    for mode in modes(r.name, claim)
]


@pytest.mark.parametrize(("stage", "claim", "mode"), CLAIMS)
def test_contract_on_the_card(stage: str, claim: str, mode: str) -> None:
    subject = on_the_card(stage, mode)
    claims(subject)[claim](subject)


COMPILED_MUTANTS = [
    m
    for m in MUTANTS
    if m.stage in KERNELS and not m.cpu_only and not m.caught_by.startswith("count")
]


@pytest.mark.parametrize("mutant", COMPILED_MUTANTS, ids=str)
def test_compiled_mutant_is_caught(mutant: Mutant) -> None:
    """flash3's in one of its modes, at least."""
    subject = stage_with(mutant.stage, mutant.changes, "cuda", mutant.where)
    check = claims(subject)[mutant.caught_by]
    subjects = [in_mode(subject, mode) for mode in modes(mutant.stage, mutant.caught_by)]
    with pytest.raises(AssertionError):
        list(map(check, subjects))


@pytest.mark.parametrize("stage", sorted(KERNELS))
def test_the_same_mechanism_passes_the_compiled_kernels(stage: str) -> None:
    claim = "each_head_reads_its_own_key_head"
    (mode,) = modes(stage, claim)
    subject = in_mode(stage_with(stage, device="cuda"), mode)
    claims(subject)[claim](subject)


@every_rung
def test_results_stay_on_the_card(stage: Rung) -> None:
    q, k, v, _ = drawn(P.replace(dtype=stage.dtypes[0]))
    o, lse = stage.load().attention_with_lse(q, k, v)
    assert o.device == lse.device == q.device


def test_the_default_stage_on_a_card_is_flash2_or_on_hopper_flash3() -> None:
    q, k, v, _ = drawn(P)
    best = "flash2" if "flash3" in WITHOUT else "flash3"
    wanted = ((q, best), (q.detach().requires_grad_(), best),
              (q.float(), "flash2"), (q.repeat(1, 1, 1, 4), "flash2"))  # fmt: skip
    for x, want in wanted:
        o = flashedu.attention(x, x, x)
        assert torch.equal(o, flashedu.attention(x, x, x, stage=want))
        assert o.requires_grad == x.requires_grad
    machine = Machine()
    flashedu.attention(q, k, v, machine=machine)  # which compiled kernels cannot count
    assert machine.launches == ["online"]


def test_the_ladder_counts_kernels_where_they_are_compiled() -> None:
    if version("triton").startswith("3.6.") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"triton 3.6's interpreter fails with NumPy {np.__version__}")
    p = P.replace(block_k=32)
    assert ladder.count("flash2", p).counted == cost.flash2(p)


def test_counted_bytes_are_those_of_the_cpu() -> None:
    machine = Machine()
    q, k, v, _ = drawn(P)
    online.attention(q, k, v, block_q=P.block_q, block_k=P.block_k, machine=machine)
    assert machine.counted == cost.online(P)


def test_tensors_on_two_devices_get_a_sentence() -> None:
    q, k, v, _ = draw(P, framework="torch")
    with pytest.raises(ValueError, match="k must be on the device of q, cuda:0, got cpu"):
        online.attention(q.cuda(), k, v.cuda())


def test_kernels_on_the_cpu_get_a_sentence_where_they_are_compiled() -> None:
    q, k, v, _ = draw(P, framework="torch")
    with pytest.raises(ValueError, match="q must be on cuda for stage 'flash2', got cpu"):
        rung("flash2").load().attention(q, k, v)


def test_a_watched_tile_comes_to_the_host() -> None:
    machine = Machine(watch=["m_i"])
    q, k, v, _ = drawn(P)
    online.attention(q, k, v, block_q=P.block_q, block_k=P.block_k, machine=machine)
    assert machine.watched["m_i"][-1].shape == (P.B, P.H, 3, 1)  # the last tile: 67 = 2 · 32 + 3


# long, large, and many at a time


@pytest.mark.parametrize("N", [4096, 16384, 65536])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_are_right(N: int, D: int, causal: bool) -> None:
    """The last 32 queries, as a problem of their own: do is 0 for all others, so that they alone
    make dk and dv."""
    q, k, v, do = random(4, 1, 2, N, D)
    q = 3 * q  # a peaked softmax
    do[:, :, :-32] = 0
    got = run("flash2", q, k, v, do, causal=causal)
    few = Reference(got.o[:, :, -32:], got.lse[:, :, -32:], got.dq[:, :, -32:], got.dk, got.dv)
    assert_right(few, q[:, :, -32:], k, v, do[:, :, -32:], causal=causal)
    assert not got.dq[:, :, :-32].any()


@pytest.mark.parametrize(
    "stage", ["flash1", "flash2", "decode", pytest.param("flash3", marks=on_hopper)]
)
def test_tensors_of_more_than_2_to_the_31_elements_are_right(stage: str) -> None:
    """The last head lies beyond what 32 bits can address, in each tensor."""
    B, H, N, D = 17, 128, 8192, 128
    q, k, v, do = random(4, B, H, N, D)
    assert q.numel() > 2**31
    do = do if rung(stage).backward else None
    if do is None:
        got = Reference(*rung(stage).load().attention_with_lse(q, k, v, causal=True))
    else:
        got = run(stage, q, k, v, do, causal=True)
    last = [None if x is None else x[-1:, -1:] for x in (*got, q, k, v, do)]
    assert_right(Reference(*last[:5]), *last[5:], causal=True)


def test_more_heads_than_a_grid_is_high_are_right() -> None:
    p = Problem(B=700, H=100, Nq=16, D=16, dtype="float16")
    q, k, v, do = drawn(p)
    got = run("flash2", q, k, v, do)
    assert_right(Reference(*(x[-1:] for x in got)), *(x[-1:] for x in (q, k, v, do)))


# flash3


@on_hopper
@pytest.mark.parametrize("N", [4096, 16384, 65537])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_by_flash3_are_right(N: int, D: int, causal: bool) -> None:
    """The first queries and the last."""
    q, k, v = random(3, 1, 2, N, D)
    q = 3 * q  # a peaked softmax
    o, lse = rung("flash3").load().attention_with_lse(q, k, v, causal=causal)
    assert_right(Reference(o[:, :, -32:], lse[:, :, -32:]), q[:, :, -32:], k, v, causal=causal)
    if causal:
        k, v = k[:, :, :200], v[:, :, :200]
        few = Reference(o[:, :, :200], lse[:, :, :200])
        assert_right(few, q[:, :, :200], k, v, causal=True)


@on_hopper
@pytest.mark.parametrize("D", [7, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_flash3_gives_the_same_bits_each_time(D: int, causal: bool) -> None:
    q, k, v, _ = drawn(P.replace(B=4, H=32, D=D, Nq=700, Nk=900))
    flash3 = rung("flash3").load()
    first = flash3.attention_with_lse(q, k, v, causal=causal)
    for _ in range(50):
        assert all(map(torch.equal, flash3.attention_with_lse(q, k, v, causal=causal), first))


@on_hopper
def test_ten_thousand_launches_of_flash3_on_any_shape_come_to_an_end() -> None:
    """Its warps wait for one another: a miscount would stop them for good. Each hundredth launch
    is held against float64."""
    rng, flash3 = np.random.default_rng(0), rung("flash3").load()
    for launch in range(10_000):
        B, H_kv, group = (int(n) for n in rng.integers(1, 4, 3))
        (Nq, Nk), D = (int(n) for n in 2 ** rng.uniform(0, 10, 2)), int(rng.choice([64, 128]))
        shapes = (B, H_kv * group, Nq, D), (B, H_kv, Nk, D), (B, H_kv, Nk, D)
        q, k, v = (torch.randn(x, device="cuda", dtype=torch.bfloat16) for x in shapes)
        causal = bool(launch % 2)
        o, lse = flash3.attention_with_lse(q, k, v, causal=causal)
        if launch % 100 == 0 or launch % 100 == 51:
            assert_right(Reference(o, lse), q, k, v, causal=causal)
    torch.cuda.synchronize()


@on_hopper
@pytest.mark.filterwarnings("default")  # torch.compile warns, by version
@pytest.mark.parametrize("D", [40, 128])
def test_torch_compile_gives_the_bits_of_flash3(D: int) -> None:
    q, k, v, _ = drawn(P.replace(D=D))
    flash3 = rung("flash3").load()

    def attend(q, k, v):
        return flash3.attention_with_lse(q, k, v, causal=True)

    compiled = torch.compile(attend, fullgraph=True)
    assert all(map(torch.equal, compiled(q, k, v), attend(q, k, v)))


@on_hopper
def test_the_operator_of_flash3_passes_opcheck() -> None:
    q, k, v, _ = drawn(P)
    found = torch.library.opcheck(rung("flash3").load().flash3_op, (q, k, v, True, 0.25, False))
    assert set(found.values()) == {"SUCCESS"}


@on_hopper
def test_flash3_says_what_it_does_not_take() -> None:
    q, k, v, _ = drawn(P)
    flash3 = rung("flash3").load()
    with pytest.raises(ValueError, match="machine must be None for stage 'flash3'"):
        flash3.attention(q, k, v, machine=Machine())
    with pytest.raises(ValueError, match="q must be on cuda for stage 'flash3', got cpu"):
        flash3.attention(q.cpu(), k.cpu(), v.cpu())


# flash3, backward

in_both_modes = pytest.mark.parametrize(
    "deterministic", [False, True], ids=[IN_ANY_ORDER, DETERMINISTIC]
)


@on_hopper
@in_both_modes
@pytest.mark.parametrize("N", [4096, 16384, 65537])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_long_sequences_by_flash3_are_right(
    N: int, D: int, causal: bool, deterministic: bool
) -> None:
    """As for flash2: the last 32 queries alone make dk and dv."""
    q, k, v, do = random(4, 1, 2, N, D)
    q = 3 * q
    do[:, :, :-32] = 0
    got = run("flash3", q, k, v, do, causal=causal, deterministic=deterministic)
    few = Reference(got.o[:, :, -32:], got.lse[:, :, -32:], got.dq[:, :, -32:], got.dk, got.dv)
    assert_right(few, q[:, :, -32:], k, v, do[:, :, -32:], causal=causal)
    assert not got.dq[:, :, :-32].any()


@on_hopper
@in_both_modes
@pytest.mark.parametrize("D", [7, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_flash3_are_the_same_bits_each_time(
    D: int, causal: bool, deterministic: bool
) -> None:
    """dk and dv always, and dq in deterministic mode."""
    inputs = drawn(P.replace(B=4, H=32, D=D, Nq=700, Nk=900))
    options = {"causal": causal, "deterministic": deterministic}
    first = run("flash3", *inputs, **options)
    for _ in range(50):
        got = run("flash3", *inputs, **options)
        assert torch.equal(got.dk, first.dk)
        assert torch.equal(got.dv, first.dv)
        assert not deterministic or torch.equal(got.dq, first.dq)


@on_hopper
def test_where_pytorch_wants_deterministic_algorithms_flash3_is_deterministic() -> None:
    inputs = drawn(P.replace(H=32, D=128, Nq=700, Nk=900))
    want = run("flash3", *inputs, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, run("flash3", *inputs), want))
    finally:
        torch.use_deterministic_algorithms(False)


@on_hopper
@pytest.mark.parametrize("Nq", [1, 64, 129, 515])
@pytest.mark.parametrize("Nk", [1, 128, 191, 1030])
@in_both_modes
def test_gradients_of_flash3_are_right_where_no_tile_is_full(
    Nq: int, Nk: int, deterministic: bool
) -> None:
    """More queries than keys and fewer, heads that share keys, and a program for each 5 SMs."""
    subject = on_the_card("flash3", DETERMINISTIC if deterministic else IN_ANY_ORDER)
    for D, causal in itertools.product((40, 128), (False, True)):
        p = Problem(B=2, H=6, H_kv=2, Nq=Nq, Nk=Nk, D=D, causal=causal, dtype="bfloat16")
        with mock.patch.object(triton_mode, "sm_count", return_value=5):
            subject.assert_right(p, subject.draw(p), "o lse dq dk dv")


@on_hopper
@pytest.mark.parametrize("scale", [1e-33, -1e-36, 1e-6, 30.0])
def test_gradients_of_flash3_are_right_at_any_scale(scale: float) -> None:
    """Below 1e-30 a factor moves from the scale to q: the backward divides by the scale."""
    subject, p = on_the_card("flash3"), P.replace(dtype="bfloat16", Nk=300)
    subject.assert_right(p, subject.draw(p), "o lse dq dk dv", scale=scale)


@on_hopper
@pytest.mark.filterwarnings("default")  # torch.compile warns, by version
@pytest.mark.parametrize("D", [40, 128])
def test_torch_compile_gives_the_gradients_of_flash3(D: int) -> None:
    q, k, v, do = drawn(P.replace(D=D))
    flash3 = rung("flash3").load()

    def attend(q, k, v):
        o, lse = flash3.attention_with_lse(q, k, v, causal=True, deterministic=True)
        return o, lse.exp()  # which has a gradient where lse is -inf: 0

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        outputs = function(*leaves)
        more = torch.autograd.grad(outputs, leaves, (do, do[..., 0].float()))
        results.append([*outputs, *more])
    assert all(map(torch.equal, *results))


@on_hopper
@in_both_modes
def test_the_operator_of_flash3_passes_opcheck_with_gradients(deterministic: bool) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(P)[:3])
    arguments = (q, k, v, True, 0.25, deterministic)
    found = torch.library.opcheck(rung("flash3").load().flash3_op, arguments)
    assert set(found.values()) == {"SUCCESS"}


@on_hopper
def test_two_thousand_backwards_of_flash3_on_any_shape_come_to_an_end() -> None:
    """As for the forward; each hundredth is held against float64."""
    rng = np.random.default_rng(0)
    for launch in range(2000):
        B, H_kv, group = (int(n) for n in rng.integers(1, 4, 3))
        (Nq, Nk), D = (int(n) for n in 2 ** rng.uniform(0, 10, 2)), int(rng.choice([64, 128]))
        shapes = (B, H_kv * group, Nq, D), (B, H_kv, Nk, D)
        q, k, v, do = (
            torch.randn(shapes[x], device="cuda", dtype=torch.bfloat16) for x in (0, 1, 1, 0)
        )
        options = {"causal": bool(launch % 2), "deterministic": bool(launch // 2 % 2)}
        got = run("flash3", q, k, v, do, **options)
        if launch % 100 in (0, 51):
            assert_right(got, q, k, v, do, causal=options["causal"])
    torch.cuda.synchronize()


# texts of different lengths, packed


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_texts_are_right_each_by_itself(D: int, causal: bool) -> None:
    lengths = [3000, 1, 127, 0, 4096, 129, 640]
    N = sum(lengths)
    q, k, v, do = random(4, 1, 4, N, D)
    q, k, v = 3 * q, k[:, ::2].contiguous(), v[:, ::2].contiguous()
    got = run("varlen", q, k, v, do, runs=packed(lengths, causal=causal, device="cuda"))
    texts = zip(*(x.split(lengths, 2) for x in (*got, q, k, v, do)), strict=True)
    for *results, q_t, k_t, v_t, do_t in texts:
        if q_t.shape[2]:
            assert_right(Reference(*results), q_t, k_t, v_t, do_t, causal=causal)


def test_a_window_over_a_long_text_is_right() -> None:
    q, k, v, do = random(4, 1, 2, 9000, 128)
    runs = packed([9000], causal=True, window=1000, device="cuda")
    do[:, :, :-64] = 0
    got = run("varlen", q, k, v, do, runs=runs)
    last = Runs(*(x[:, -64:] for x in runs))
    few = Reference(got.o[:, :, -64:], got.lse[:, :, -64:], got.dq[:, :, -64:], got.dk, got.dv)
    assert_right(few, q[:, :, -64:], k, v, do[:, :, -64:], runs=last)


@pytest.mark.filterwarnings("default")  # torch.compile warns, by version
@pytest.mark.parametrize("stage", ["varlen", "decode"])
def test_torch_compile_gives_the_same_bits_with_runs(stage: str) -> None:
    q, k, v, do = drawn(P.replace(Nq=67, Nk=67))
    runs = packed([67], causal=True, window=20, device="cuda")
    runs = Runs(*(x.expand(P.B, -1).contiguous() for x in runs))
    module = rung(stage).load()

    def attend(q, k, v, first, stop):
        return module.attention(q, k, v, runs=Runs(first, stop))

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [x.detach().requires_grad_(rung(stage).backward) for x in (q, k, v)]
        o = function(*leaves, *runs)
        more = torch.autograd.grad(o, leaves, do) if rung(stage).backward else ()
        results.append([o.detach(), *more])
    assert all(map(torch.equal, *results))


def test_the_operators_for_runs_pass_opcheck() -> None:
    q, k, v, _ = drawn(P.replace(dtype="float32", Nk=67))
    first, stop = everywhere(P.B, 67, 67, causal=True, device="cuda")
    varlen, decode = rung("varlen").load(), rung("decode").load()
    inputs = (q.requires_grad_(), k, v, first, stop)
    for operator, arguments in (
        (varlen.varlen_op, (*inputs, 0.25, 0, 0)),
        (decode.decode_op, (q.detach(), *inputs[1:], False, 0.25, 0, 0, 0)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("Nk", [5, 4096, 100_003])
@pytest.mark.parametrize("Nq", [1, 3])
def test_decoding_a_run_of_a_cache_is_right(Nq: int, Nk: int) -> None:
    """As in a batch that is padded on the left, and a cache with room for more."""
    q, k, v = cache(3, Nq, Nk + 100)
    first = torch.tensor([0, 3, Nk // 2], dtype=torch.int32, device="cuda")[:, None].expand(3, Nq)
    stop = torch.arange(Nk - Nq + 1, Nk + 1, dtype=torch.int32, device="cuda").expand(3, Nq)
    runs = Runs(first.contiguous(), stop.contiguous())
    got = decoded(q, k, v, runs=runs)
    for b in range(3):
        one = slice(b, b + 1)
        part = Runs(*(x[one] for x in runs))
        assert_right(Reference(got.o[one], got.lse[one]), q[one], k[one], v[one], runs=part)


# few queries, a long cache


def cache(B: int, Nq: int, Nk: int) -> tuple[torch.Tensor, ...]:
    """16 heads on 2 key heads, D 128; a peaked softmax."""
    (q,), (k, v) = random(1, B, 16, Nq, 128), random(2, B, 2, Nk, 128)
    return 3 * q.flip(-1), k, v  # flipped: both are drawn from one seed


def decoded(q, k, v, **options) -> Reference:
    return Reference(*rung("decode").load().attention_with_lse(q, k, v, **options))


@pytest.mark.parametrize("Nk", [1, 63, 8192, 8193, 100_003, 131_072])
@pytest.mark.parametrize("Nq", [1, 3, 20])
@pytest.mark.parametrize("B", [1, 8])
def test_decoding_from_a_long_cache_is_right(B: int, Nq: int, Nk: int) -> None:
    inputs = cache(B, Nq, Nk)
    o, lse, *_ = decoded(*inputs, causal=True)
    assert_right(Reference(o[-1:], lse[-1:]), *(x[-1:] for x in inputs), causal=True)


@pytest.mark.parametrize("splits", [1, 2, 64, 65, 200, 1024])
def test_the_merge_is_right_in_one_step_and_in_many(splits: int) -> None:
    """At D 128 a step takes 64 splits."""
    inputs = cache(2, 1, 30_000)
    assert_right(decoded(*inputs, splits=splits), *inputs)


def test_decode_gives_the_same_bits_each_time() -> None:
    inputs = cache(1, 1, 50_000)
    first = decoded(*inputs)
    for _ in range(5):
        again = decoded(*inputs)
        assert torch.equal(again.o, first.o)
        assert torch.equal(again.lse, first.lse)


def test_a_cuda_graph_replays_decode() -> None:
    inputs = cache(1, 1, 20_000)
    want = decoded(*inputs).o  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decoded(*inputs).o
    o.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, want)


def test_decode_on_a_card_makes_as_many_programs_as_it_can_run() -> None:
    from flashedu.stages import triton_mode
    from flashedu.stages.decode_tiles import PROGRAMS_PER_SM, splits_for_call, tile_for_call

    q, k, _ = cache(1, 1, 2**17)
    p = Problem(H=16, H_kv=2, Nq=1, Nk=k.shape[2], D=128, dtype="bfloat16")
    programs = 2 * splits_for_call(q, p, tile_for_call(q, p, None, None))
    slots = PROGRAMS_PER_SM * triton_mode.sm_count(q.device)
    assert 0.9 * slots <= programs <= 2 * slots


# a paged cache


def pages_of(x: torch.Tensor, lengths: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x, (B, heads, N, D), in pages in a drawn order, and the block table; NaN behind each end."""
    B, heads, N, D = x.shape
    most = -(-N // size)
    order = torch.randperm(B * most, generator=torch.Generator().manual_seed(1)).to(x.device)
    rows = x.new_full((B, heads, most * size, D), torch.nan)
    for b, n in enumerate(lengths):
        rows[b, :, :n] = x[b, :, :n]
    pages = torch.empty_like(rows).reshape(B * most, heads, size, D)
    pages[order] = rows.reshape(B, heads, most, size, D).transpose(1, 2).flatten(0, 1)
    return pages, order.to(torch.int32).reshape(B, most)


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("Nq", [1, 3, 20])
@pytest.mark.parametrize("check", [True, False])
def test_decoding_from_pages_is_right(size: int, Nq: int, check: bool) -> None:
    from flashedu.stages import paged

    lengths = [20_000, 1, 0, 4097]
    q, k, v = cache(4, Nq, 20_000)
    (k_pages, table), (v_pages, _) = (pages_of(x, lengths, size) for x in (k, v))
    on_card = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    o, lse = paged.attention_with_lse(q, k_pages, v_pages, table, on_card, check=check)
    for b, n in enumerate(lengths):
        one = (slice(b, b + 1),)
        inputs = q[one], k[one][:, :, :n], v[one][:, :, :n]
        assert_right(Reference(o[one], lse[one]), *inputs, causal=True)


STEPS = {  # queries and keys of each sequence
    "prompts and tokens": [(1, 4097), (1, 16), (300, 300), (77, 1000), (0, 20), (1, 1), (130, 129)],
    "tokens": [(1, 20_000), (1, 1), (1, 0), (1, 4097)],
    "one token": [(1, 20_000)],
    "a prompt": [(2000, 2000)],
}


@pytest.mark.parametrize("sizes", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("heads", [(32, 32), (16, 2), (28, 4)])
@pytest.mark.parametrize(("size", "D"), [(16, 128), (64, 128), (64, 80), (256, 64)])
def test_a_step_of_a_server_is_right(
    sizes: list[tuple[int, int]], heads: tuple[int, int], size: int, D: int
) -> None:
    from flashedu.stages import paged_varlen

    queries, keys = [n for n, _ in sizes], [n for _, n in sizes]
    p = Problem(B=len(sizes), H=heads[0], H_kv=heads[1], Nq=1, Nk=max(keys), D=D, dtype="bfloat16")
    _, k, v, _ = (x.cuda() for x in draw(p, "peaked", framework="torch"))
    q = draw(p.replace(B=1, Nq=sum(queries), Nk=1), "peaked", framework="torch")[0].cuda()
    (k_pages, table), (v_pages, _) = (pages_of(x, keys, size) for x in (k, v))
    starts = [sum(queries[:b]) for b in range(len(sizes) + 1)]
    tables = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (keys, starts))
    o, lse = paged_varlen.attention_with_lse(q, k_pages, v_pages, table, *tables)
    for b, n in enumerate(keys):
        mine = slice(starts[b], starts[b + 1])
        inputs = q[:, :, mine], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        assert_right(Reference(o[:, :, mine], lse[:, :, mine]), *inputs, causal=True)


def test_a_cuda_graph_replays_a_step_of_other_tables() -> None:
    """As vLLM does: the tables are changed in place, and sequences without a key fill a step up."""
    from flashedu.stages import paged_varlen

    q, k, v = cache(3, 1, 5000)
    (k_pages, table), (v_pages, _) = (pages_of(x, [5000] * 3, 64) for x in (k, v))
    lengths = torch.ones(3, dtype=torch.int32, device="cuda")
    q = q.transpose(0, 2).contiguous()
    starts = torch.arange(4, dtype=torch.int32, device="cuda")
    sizes = q.shape, k_pages.shape, q.dtype
    step = paged_varlen.plan(table, lengths, starts, *sizes, few=True, longest=5000)
    call = (q, k_pages, v_pages, step, 0.1, UNCOUNTED)
    paged_varlen.forward(*call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = paged_varlen.forward(*call)
    lengths.copy_(torch.tensor([4999, 70, 0]))
    table.copy_(table.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, paged_varlen.forward(*call)[0])
    assert not o[:, :, 2].any()
    assert o[:, :, 0].any()


def test_a_cuda_graph_replays_paged_decoding_of_other_lengths() -> None:
    from flashedu.stages import paged

    q, k, v = cache(2, 1, 5000)
    (k_pages, table), (v_pages, _) = (pages_of(x, [5000, 5000], 64) for x in (k, v))
    lengths = torch.tensor([5000, 4000], dtype=torch.int32, device="cuda")
    call = (q, k_pages, v_pages, table, lengths)
    paged.attention(*call, check=False)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = paged.attention(*call, check=False)
    lengths.copy_(torch.tensor([7, 4999]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, paged.attention(*call, check=False))


@pytest.mark.parametrize("D", [7, 64, 128, 256])
def test_flash2_gives_the_same_bits_each_time(D: int) -> None:
    inputs = drawn(P.replace(D=D, Nq=300, Nk=500))
    first = run("flash2", *inputs, causal=True)
    for _ in range(5):
        assert all(map(torch.equal, run("flash2", *inputs, causal=True), first))


def test_two_streams_do_not_disturb_one_another() -> None:
    shapes = (Problem(B=2, H=8, Nq=1000, D=64), Problem(B=2, H=8, Nq=700, Nk=1300, D=128))
    inputs = [drawn(p) for p in shapes]
    alone = [run("flash2", *x, causal=True) for x in inputs]
    streams = [torch.cuda.Stream() for _ in shapes]
    torch.cuda.synchronize()
    for _ in range(10):
        together = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                together.append(run("flash2", *x, causal=True))
        torch.cuda.synchronize()
        for got, want in zip(together, alone, strict=True):
            assert all(map(torch.equal, got, want))


def test_a_tensor_on_another_card_is_taken_there() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; torch sees one")
    inputs = drawn(P)
    there = run("flash2", *(x.to("cuda:1") for x in inputs))
    assert there.o.device.index == 1
    assert all(
        torch.equal(x.cpu(), y.cpu()) for x, y in zip(there, run("flash2", *inputs), strict=True)
    )


@pytest.mark.filterwarnings("default")  # torch.compile warns, by version
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_compile_gives_the_same_bits(dtype: str) -> None:
    inputs = drawn(P.replace(dtype=dtype))
    flash2 = rung("flash2").load()

    def attend(q, k, v):
        return flash2.attention(q, k, v, causal=True)

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        o = function(*leaves)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, inputs[3])])
    assert all(map(torch.equal, *results))


def test_the_operator_passes_opcheck() -> None:
    q, k, v, _ = drawn(P.replace(dtype="float32"))
    found = torch.library.opcheck(
        rung("flash2").load().flash2_op, (q.requires_grad_(), k, v, True, 0.25, 0, 0)
    )
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["flash2", pytest.param("flash3", marks=on_hopper)])
def test_a_cuda_graph_replays_it(name: str) -> None:
    q, k, v, _ = drawn(P)
    stage = rung(name).load()
    want = stage.attention(q, k, v)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = stage.attention(q, k, v)
    o.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, want)


def test_tiles_that_do_not_fit_the_card_get_a_sentence() -> None:
    q, k, v, _ = drawn(P.replace(D=256, dtype="float32"))
    with pytest.raises(ValueError, match="block_q and block_k must be smaller on this card"):
        rung("flash2").load().attention(q, k, v, block_q=256, block_k=16)  # q alone: 256 KiB


# memory


def peak_bytes(N: int) -> int:
    """Beside the inputs, forward and backward."""
    q, k, v, do = random(4, 1, 16, N, 64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run("flash2", q, k, v, do, causal=True)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_extra_memory_grows_with_n_and_is_no_more_than_its_parts() -> None:
    peak_bytes(1024)  # what the first call loads is not the algorithm's
    measured = {N: peak_bytes(N) for N in (4096, 8192, 16384)}
    for N, n_bytes in measured.items():
        results = 16 * N * (4 * 64 * 2 + 2 * 4)  # o, dq, dk, dv; lse, delta
        assert n_bytes <= 1.05 * results + 2**20
    for a, b in itertools.pairwise(measured.values()):
        assert b / a == pytest.approx(2, rel=0.05)
