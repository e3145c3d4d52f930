"""The sections `paged` and `varlen`: the same values in other layouts, and wrong ones seen.

And FlashAttention-4, whose layout is another too, with a module in its place.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from flashedu.bench import device as devices
from flashedu.bench.cases import Case, Choice, draw_lengths, plan
from flashedu.bench.run import Check, measure
from flashedu.memory import Problem
from flashedu.stages import rung

if rung("varlen").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)

from flashedu.bench.peers import Layout, Missing, Peer, as_drawn
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


# FlashAttention-4

GROUPED = Problem(B=2, H=6, H_kv=3, Nq=5, Nk=7, D=16, dtype="float16", causal=True)
FA4_MISSING = (
    "Missing: needs FlashAttention-4 (No module named 'flash_attn'): pip install flash-attn-4"
)


@pytest.fixture
def fa4(monkeypatch):
    """In its place: the formula, in its layout (B, N, heads, D), which logs its calls."""

    def flash_attn_func(q, k, v, *, causal=False):
        p = GROUPED
        assert q.shape == (p.B, p.Nq, p.H, p.D)
        assert k.shape == v.shape == (p.B, p.Nk, p.H_kv, p.D)
        stand_in.calls.append((q, k, v))
        k, v = (x.repeat_interleave(p.group, 2) for x in (k, v))
        s = p.D**-0.5 * torch.einsum("bihd,bjhd->bhij", q, k)
        if causal and stand_in.masks:
            hidden = torch.ones(p.Nq, p.Nk, dtype=torch.bool).triu(1 + p.Nk - p.Nq)
            s = s.masked_fill(hidden, -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", torch.softmax(s, -1), v), None

    stand_in = ModuleType("flash_attn.cute")
    stand_in.flash_attn_func, stand_in.calls, stand_in.masks = flash_attn_func, [], True
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", stand_in)
    return stand_in


def fa4_entry(pass_="fwd", problem=GROUPED, device=None):
    case = Case("speed", problem, pass_, ("fa4",))
    return one(measure(case, [BY_NAME["fa4"]], device or Toy(), rounds=2, seed=0), "fa4")


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("fa4")
def test_fa4_in_its_layout_gives_the_oracles_results_in_ours(pass_, causal):
    entry = fa4_entry(pass_, GROUPED.replace(causal=causal))
    assert entry["why"] is None
    assert len(entry["seconds"]) == 2
    assert set(entry["errors"]) == ({"o"} if pass_ == "fwd" else {"o", "dq", "dk", "dv"})


def test_fa4_is_told_of_the_mask(fa4):
    fa4.masks = False
    assert fa4_entry()["why"].startswith("wrong: o differs")


def test_fa4_is_given_views_and_not_copies(fa4):
    device, drawn = Toy(), []

    def draw(p, seed):
        drawn.extend(devices.draw(p, seed, "cpu"))
        return tuple(drawn)

    device.draw = draw
    assert fa4_entry("bwd", device=device)["why"] is None
    for call in fa4.calls:
        assert [x.data_ptr() for x in call] == [x.data_ptr() for x in drawn[:3]]


def test_the_first_call_to_fa4_which_compiles_is_not_timed(fa4):
    device, before = Toy(), []

    def seconds(call, *, wait):
        before.append(len(fa4.calls))
        call()
        return 1.0

    device.seconds = seconds
    fa4_entry("bwd", device=device)
    assert before[0] > 0


def test_without_fa4_a_sentence_says_so_and_the_others_are_timed(monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_attn.cute", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    problem = GROUPED.replace(Nq=7)
    case = Case("speed", problem, "fwd", ("standard", "fa4"))
    found = measure(case, [BY_NAME[name] for name in case.peers], Toy(), rounds=2, seed=0)
    assert one(found, "fa4")["why"] == FA4_MISSING
    assert one(found, "fa4")["seconds"] == []
    assert len(one(found, "standard")["seconds"]) == 2


class Absent:
    """Finds no module `flash_attn`, wherever the tests run."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flash_attn":
            raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")


def test_fa4_on_a_card_before_hopper_is_refused_by_the_cards_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(Missing, match="needs a Hopper GPU or a later one, got NVIDIA A100"):
        BY_NAME["fa4"].prepare(GROUPED, "cuda")
