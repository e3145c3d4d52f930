"""varlen's kernels, interpreted on the CPU: texts of different lengths, packed. On a GPU: see
test_gpu.py, which runs the whole contract."""

from __future__ import annotations

import pytest
import torch

from flashedu import attention, ladder
from flashedu.memory import Machine, Problem, cost
from flashedu.stages import rung
from flashedu.testing import assert_right, draw
from tests import contract
from tests.contract import Subject

if rung("varlen").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here; see test_gpu.py", allow_module_level=True)

from flashedu.stages import flash2, online, varlen
from flashedu.stages.reference import Reference
from flashedu.stages.runs import Runs, everywhere, packed

# What differs from flash2: the mask, and what is loaded for it. A card runs the whole contract.
CLAIMS = [
    "runs_match_float64",
    "texts_do_not_mix",
    "rows_that_see_no_key_give_zero",
    "empty_inputs_work",
    "counted_bytes_are_the_closed_form",
    "counted_bytes_of_the_backward_are_the_closed_form",
]


@pytest.mark.parametrize("claim", CLAIMS)
def test_contract(claim: str) -> None:
    contract.claims(rung("varlen"))[claim](Subject.of(rung("varlen")))


TEXTS = [40, 7, 0, 33]
P = Problem(H=2, Nq=80, Nk=80, D=16, dtype="float32", block_q=16, block_k=16)
TILES = {"block_q": 16, "block_k": 16}


def cut(lengths: list[int], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Each text by itself."""
    return list(zip(*(x.split(lengths, 2) for x in tensors), strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_each_text_is_attended_as_if_it_were_alone(causal: bool) -> None:
    q, k, v, do = draw(P, "peaked", framework="torch")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = varlen.attention_with_lse(*leaves, runs=packed(TEXTS, causal=causal), **TILES)
    results = [o, lse, *torch.autograd.grad(o, leaves, do)]
    texts = cut(TEXTS, *(x.detach() for x in (*results, q, k, v, do)))
    for *got, q_t, k_t, v_t, do_t in texts:
        if len(q_t[0, 0]):
            assert_right(Reference(*got), q_t, k_t, v_t, do_t, causal=causal)


def test_the_gradient_of_lse_is_that_of_flash2() -> None:
    q, k, v, do = draw(P, framework="torch")
    results = []
    for stage in (flash2, varlen):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        _, lse = stage.attention_with_lse(*leaves, causal=True, **TILES)
        results.append(torch.autograd.grad(lse, leaves, do[..., 0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=64 * 2**-24 * theirs.abs().max())


def test_packed_texts_move_fewer_bytes_and_flops_than_padded_ones() -> None:
    lengths = [16, 48, 32, 16]  # 112 tokens; padded to the longest, 192
    rows = Problem(H=1, Nq=sum(lengths), D=16, dtype="float32")
    q, k, v, _ = draw(rows, framework="torch")
    ours, padded = Machine(), Machine()
    varlen.attention(q, k, v, runs=packed(lengths), machine=ours, **TILES)
    batch = draw(rows.replace(B=4, Nq=48, Nk=48), framework="torch")[:3]
    flash2.attention(*batch, machine=padded, **TILES)
    visits = sum((n // 16) ** 2 for n in lengths)  # of tiles of S: each text ends with a tile
    assert ours.flops == visits * 2 * 2 * 16 * 16 * 16
    assert ours.flops < padded.flops / 2
    assert ours.bytes_by_tensor()["k"] == (visits * 16 * 16 * 4, 0)


def test_texts_of_whole_tiles_cost_what_each_costs_alone_and_their_runs() -> None:
    p = Problem(H=2, Nq=96, D=16, dtype="float32", causal=True, block_q=16, block_k=16)
    lengths = [48, 16, 32]
    counted = ladder.count("varlen", p, lengths=lengths).counted
    alone = [cost.flash2(p.replace(Nq=n, Nk=n)) for n in lengths]
    assert counted.hbm_bytes == sum(c.hbm_bytes for c in alone) + p.H * 2 * 4 * 96
    assert counted.flops == sum(c.flops for c in alone)


def test_a_window_is_visited_and_not_what_lies_before_it() -> None:
    q, k, v, _ = draw(P, framework="torch")
    machine = Machine()
    varlen.attention(q, k, v, runs=packed([80], causal=True, window=16), machine=machine, **TILES)
    visits = 1 + 4 * 2  # five query tiles; each but the first sees its own keys and those before
    assert machine.bytes_by_tensor()["k"] == (P.H * visits * 16 * P.D * 4, 0)


def test_tiles_that_all_rows_see_are_not_masked() -> None:
    """The runs that a masked tile needs are read once a program, not once a tile: but backward,
    once a masked tile. Of 5 query tiles of a causal text, each key tile has one that is masked."""
    q, k, v, do = draw(P, framework="torch")
    leaves, machine = [x.requires_grad_() for x in (q, k, v)], Machine()
    o = varlen.attention(*leaves, runs=packed([80], causal=True), machine=machine, **TILES)
    torch.autograd.grad(o, leaves, do)
    program = 16 * 4  # first, or stop, of 16 queries
    forward, dkdv, dq = 5 * P.H, 5 * P.H, 5 * P.H
    assert machine.bytes_by_tensor()["first"] == (program * (forward + dkdv + dq), 0)


def test_flash2_is_the_case_of_one_run_for_all() -> None:
    q, k, v, do = draw(P, "peaked", framework="torch")
    results = []
    for stage, options in ((flash2, {}), (varlen, {"runs": everywhere(1, 80, 80, causal=True)})):
        options = options or {"causal": True}
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = stage.attention(*leaves, **options, **TILES)
        results.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=64 * 2**-24 * theirs.abs().max())


def test_runs_may_be_chosen_by_the_stage_that_is_quick_here() -> None:
    q, k, v, _ = draw(P, framework="torch")
    runs = packed(TEXTS)
    assert torch.equal(attention(q, k, v, runs=runs), online.attention(q, k, v, runs=runs))
    by_name = attention(q, k, v, runs=runs, stage="varlen")
    assert torch.equal(by_name, varlen.attention(q, k, v, runs=runs))


# runs


def test_packed_runs_are_the_blocks_of_a_mask() -> None:
    want = torch.block_diag(torch.ones(2, 3).tril(1), torch.ones(0, 2), torch.ones(2, 1).tril(-1))
    got = packed([2, 0, 2], [3, 2, 1], causal=True).mask(6)[0, 0]
    assert torch.equal(got, want.bool())


def test_a_window_keeps_the_last_keys_of_a_run() -> None:
    got = packed([4, 3], causal=True, window=2)
    assert got.first.tolist() == [[0, 0, 1, 2, 4, 4, 5]]
    assert got.stop.tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def test_everywhere_is_all_or_the_causal_mask() -> None:
    assert everywhere(2, 3, 5, causal=False).mask(5).all()
    want = torch.ones(3, 5, dtype=torch.bool).tril(2)
    assert torch.equal(everywhere(1, 3, 5, causal=True).mask(5)[0, 0], want)
    assert everywhere(1, 5, 2, causal=True).stop.tolist() == [[0, 0, 0, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([3, -1],), ValueError, "lengths must be 0 or more, got -1"),
        (([3, 2.5],), TypeError, "lengths must be a sequence of integers, got 2.5 in it"),
        ((7,), TypeError, "lengths must be a sequence of integers, got int"),
        (([3, True],), TypeError, "got True in it"),
        (([3, 4], [7]), ValueError, "lengths_k must have a length for each of the 2 sequences"),
    ],
)
def test_lengths_that_are_none_get_a_sentence(arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        packed(*arguments)


@pytest.mark.parametrize("window", [0, -3, 2.0, True])
def test_a_window_that_is_none_gets_a_sentence(window) -> None:
    with pytest.raises(ValueError, match="window must be None, or an integer of 1 or more"):
        packed([3], window=window)


def test_lengths_that_do_not_add_up_get_a_sentence() -> None:
    q, k, v, _ = draw(P, framework="torch")
    with pytest.raises(ValueError, match=r"runs.first must be \(B, Nq\) = \(1, 80\), .* \(1, 79\)"):
        varlen.attention(q, k, v, runs=packed([40, 39]))


@pytest.mark.parametrize("stage", ["naive", "flash1", "flash2"])
def test_a_stage_without_runs_says_so(stage: str) -> None:
    q, k, v, _ = draw(P, framework="numpy" if stage == "naive" else "torch")
    with pytest.raises(TypeError, match=f"stage '{stage}' takes no runs; it takes"):
        attention(q, k, v, runs=packed(TEXTS), stage=stage)


@pytest.mark.parametrize("stage", ["varlen", "decode"])
def test_runs_that_lead_nowhere_are_read_as_no_keys(stage: str) -> None:
    """No address beyond the arrays is touched: a counted load there would raise."""
    q, k, v, _ = draw(P, framework="torch")
    wild = torch.tensor([-(2**31), 2**31 - 1, 0, 79] * 20, dtype=torch.int32)[None]
    runs, machine = Runs(wild, wild.flip(1).contiguous()), Machine()
    with torch.no_grad():
        got = rung(stage).load().attention_with_lse(q, k, v, runs=runs, machine=machine, **TILES)
    assert_right(Reference(*got), q, k, v, runs=runs)


def test_runs_that_lead_nowhere_have_no_gradients() -> None:
    q, k, v, do = draw(P, framework="torch")
    wild = torch.tensor([-(2**31), 2**31 - 1, 0, 79] * 20, dtype=torch.int32)[None]
    runs, leaves = Runs(wild, wild.flip(1).contiguous()), [x.requires_grad_() for x in (q, k, v)]
    o = varlen.attention(*leaves, runs=runs, machine=Machine(), **TILES)
    got = Reference(None, None, *torch.autograd.grad(o, leaves, do))
    assert_right(got, *(x.detach() for x in leaves), do, runs=runs)
