"""The sections `paged` and `varlen`: the same values in other layouts, and wrong ones seen."""

from __future__ import annotations

import pytest
import torch

from flashedu.bench import device as devices
from flashedu.bench.cases import Case, Choice, draw_lengths, plan
from flashedu.bench.run import Check, measure
from flashedu.memory import Problem
from flashedu.stages import rung

if rung("varlen").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench.peers import Layout, Peer, as_drawn
from tests.test_bench import BY_NAME, Toy, one

CACHE = Problem(B=2, H=4, H_kv=2, Nq=1, Nk=75, D=16, dtype="float16")
LENGTHS = (5, 40, 17)
TEXTS = Problem(H=2, Nq=sum(LENGTHS), D=16, dtype="float16")
PADDED = ("padded", "padded-flash2", "padded-mask", "unmasked", "one-by-one")


def texts(pass_="fwd", peers=PADDED, *, causal=False):
    problem = TEXTS.replace(causal=causal)
    return Case("varlen", problem, pass_, peers, lengths=LENGTHS, drawn_from=7)


# pages


def test_decoding_is_timed_from_pages_of_each_size_at_the_sizes_of_decode():
    paged, decode = plan(Choice(), ("paged",)), plan(Choice(), ("decode",))
    assert [case.problem for case in paged] == [case.problem for case in decode]
    assert {case.peers for case in paged} == {("decode", "paged-16", "paged-64", "paged-256")}


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_hold_each_key_where_the_table_says_and_lie_in_no_order(page_size):
    inputs = devices.draw(CACHE, 0, "cpu")
    laid = BY_NAME[f"paged-{page_size}"].layout(Case("paged", CACHE, "fwd", ()), inputs)
    (_, k, v, _), (table, lengths) = laid.inputs, laid.more
    assert k.shape == (table.numel(), 2, page_size, 16)
    assert lengths.tolist() == [75, 75]
    for drawn, pages in ((inputs[1], k), (inputs[2], v)):
        for b in range(2):
            rows = pages[table[b].long()].transpose(0, 1).flatten(1, 2)
            assert torch.equal(rows[:, :75], drawn[b])
    assert (
        sorted(table.flatten().tolist()) == list(range(table.numel())) != table.flatten().tolist()
    )


def test_decode_from_pages_passes_the_check_and_is_timed():
    names = ("decode", "paged-64")
    case = Case("paged", CACHE, "fwd", names)
    found = measure(case, [BY_NAME[name] for name in names], Toy(), rounds=2, seed=0)
    for entry in found["runs"]:
        assert entry["why"] is None
        assert len(entry["seconds"]) == 2


def test_pages_of_another_order_than_the_table_says_are_seen():
    right = BY_NAME["paged-16"]

    def shuffled(case, inputs):
        laid = right.layout(case, inputs)
        table, lengths = laid.more
        return Layout(laid.problem, laid.inputs, (table.flip(1).contiguous(), lengths))

    wrong = Peer("paged-16", right.prepare, layout=shuffled)
    found = measure(Case("paged", CACHE, "fwd", ("paged-16",)), [wrong], Toy(), rounds=1, seed=0)
    assert one(found, "paged-16")["why"].startswith("wrong: o differs")


# sequences of different lengths


def test_the_lengths_are_drawn_from_a_seed_that_the_record_has():
    cases = plan(Choice(), ("varlen",))
    (lengths,) = {case.lengths for case in cases}
    assert len(lengths) == 32
    assert 128 <= min(lengths) < 512
    assert 3584 < max(lengths) <= 4096
    for case in cases:
        sizes = case.sizes
        assert draw_lengths(sizes["lengths_seed"], 128, 4096, 32) == lengths
        assert (sizes["lengths"], sizes["N"], sizes["H"]) == (list(lengths), sum(lengths), 16)
    assert {(c.problem.D, c.problem.causal, c.pass_) for c in cases} == {
        (D, causal, pass_)
        for D in (64, 128)
        for causal in (False, True)
        for pass_ in ("fwd", "both")
    }


def test_only_the_flops_of_real_tokens_count():
    scores = 5 * 5 + 40 * 40 + 17 * 17
    assert texts().flops == 4 * 2 * scores * 16
    assert texts("both", causal=True).flops == 3.5 * texts().flops / 2


@pytest.mark.parametrize("name", [*PADDED, "varlen", "torch-varlen"])
def test_a_layout_and_the_way_back_is_the_identity(name):
    inputs = devices.draw(TEXTS, 0, "cpu")
    laid = BY_NAME[name].layout(texts(), inputs)
    for drawn, x in zip(inputs, laid.inputs, strict=True):
        assert torch.equal(laid.back(x), drawn)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_in_every_layout_pass_the_check_with_gradients(causal):
    """Where SDPA's flash backend takes no mask, padding is wrong unless it lies in the future."""
    names = (*PADDED, "varlen")
    case = texts("both", names, causal=causal)
    found = measure(case, [BY_NAME[name] for name in names], Toy(), rounds=1, seed=0)
    refused = {"padded-mask"} if causal else {"padded", "padded-flash2"}
    planned = {name for c in plan(Choice(causal=(causal,)), ("varlen",)) for name in c.peers}
    assert not refused & planned
    for entry in found["runs"]:
        if entry["peer"] in refused:
            assert entry["why"].startswith("wrong: o differs")
        else:
            assert entry["why"] is None
            assert set(entry["errors"]) == (
                set() if entry["peer"] == "unmasked" else {"o", "dq", "dk", "dv"}
            )


def test_a_peer_that_mixes_neighbouring_sequences_is_seen():
    """As one long sequence: right for the first one only, if causal."""
    mixed = Peer("mixed", BY_NAME["sdpa-math"].prepare, layout=as_drawn)
    found = measure(texts(peers=("mixed",), causal=True), [mixed], Toy(), rounds=1, seed=0)
    assert one(found, "mixed")["why"].startswith("wrong: o differs")


def test_an_error_in_the_last_row_of_any_sequence_is_seen():
    inputs, right = devices.draw(TEXTS, 0, "cpu"), BY_NAME["one-by-one"]
    check = Check(inputs, TEXTS, 0, gradients=False, lengths=LENGTHS)
    o = right.prepare(TEXTS, "cpu")(*inputs[:3], LENGTHS)
    assert check.errors({"o": o})["o"].within
    for row in (4, 44, 61):
        off = o.clone()
        off[:, :, row] += 0.1
        assert not check.errors({"o": off})["o"].within
    with pytest.raises(AssertionError, match="the shape is"):
        check.errors({"o": torch.cat([o, o[:, :, :1]], 2)})


def test_the_gradients_of_a_key_head_are_those_of_its_whole_group():
    p = Problem(H=4, H_kv=2, Nq=20, D=16, dtype="float32")
    *qkv, do = devices.draw(p, 0, "cpu")
    leaves = [x.requires_grad_() for x in qkv]
    o = BY_NAME["sdpa-math"].prepare(p, "cpu")(*leaves)
    results = {"o": o, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do),
                                  strict=True))}  # fmt: skip
    check = Check([x.detach() for x in (*qkv, do)], p, 0, gradients=True)
    assert all(error.within for error in check.errors(results).values())
    results["dk"] = results["dk"].flip(1)
    assert not check.errors(results)["dk"].within


def test_pytorchs_own_varlen_is_missing_with_a_sentence_where_it_cannot_run():
    found = measure(texts(peers=("torch-varlen",)), [BY_NAME["torch-varlen"]], Toy(), rounds=1,
                    seed=0)  # fmt: skip
    assert one(found, "torch-varlen")["why"]
    assert "\n" not in one(found, "torch-varlen")["why"]


def test_the_formula_takes_key_heads_that_are_shared():
    q, k, v, _ = devices.draw(CACHE, 0, "cpu")
    check = Check((q, k, v, q), CACHE, 0, gradients=False)
    o = BY_NAME["standard"].prepare(CACHE, "cpu")(q, k, v)
    assert check.errors({"o": o})["o"].within
