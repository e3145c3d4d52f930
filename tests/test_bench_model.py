"""The section `model` of `flashedu bench`: a small Llama, the same with each attention."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from flashedu.bench import cases, record
from flashedu.bench.cases import Choice, ModelCase, plan
from flashedu.bench.run import measure
from flashedu.stages import rung

if rung("flash2").missing():
    pytest.skip("needs Triton, which exists for Linux only", allow_module_level=True)
pytest.importorskip("transformers")

from flashedu.bench import models
from flashedu.bench.peers import MODELS, ModelPeer
from tests import pretend
from tests.test_bench import BY_NAME, Toy, cli_run, one, shown, toy  # noqa: F401

PEERS = tuple(peer.name for peer in MODELS)
TEXT = ModelCase("model", "fwd", PEERS, B=1, N=96, H=4, H_kv=2, D=16, layers=2, intermediate=64,
                 vocabulary=100, dtype="bfloat16")  # fmt: skip
WRITTEN = replace(TEXT, pass_="generate", B=3, N=24, new_tokens=5, shorter=4, mode="direct")


def measured(case, peers):
    return measure(case, peers, Toy(), rounds=1, seed=0)


def test_the_plan_has_the_model_of_the_issue():
    first, grouped, prefill, generate = plan(Choice(), ("model",))
    assert (first.layers, first.H * first.D, first.N, first.B) == (8, 2048, 8192, 1)
    assert (first.H_kv, grouped.H_kv) == (16, 4)
    assert (prefill.pass_, prefill.new_tokens) == ("prefill", 1)
    assert (generate.pass_, generate.new_tokens, generate.N, generate.B) == (
        "generate",
        128,
        2048,
        4,
    )
    assert {case.peers for case in (first, grouped, prefill, generate)} == {PEERS}
    assert {case.mode for case in (prefill, generate)} == {"direct"}


def test_flops_are_those_of_the_weights_and_of_causal_attention():
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 64)
    assert TEXT.flops == 2 * weights * 96 + 2 * 4 * 4 * 96 * 96 * 16 / 2
    model = models.llama(TEXT, "cpu", 0)
    assert weights == sum(x.numel() for name, x in model.model.layers.named_parameters()
                          if "norm" not in name)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [TEXT, WRITTEN], ids=["forward", "generate"])
def test_each_attention_passes_the_check_and_is_timed(case, dtype):
    found = measured(replace(case, dtype=dtype), MODELS)
    assert (found["layers"], found["N"], found["causal"]) == (2, case.N, True)
    for entry in found["runs"]:
        assert entry["why"] is None
        assert len(entry["seconds"]) == 1
        assert set(entry["errors"]) == ({"tokens"} if case.new_tokens else {"hidden"})
        assert entry["extra_bytes"] == 12345


def mistaken(name, change):
    """A peer whose attention is eager's with a mistake."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attention(module, query, key, value, attention_mask, **rest):
        return eager_attention_forward(module, *change(query, key, value, attention_mask), **rest)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    return ModelPeer(name, name)


def test_a_forward_that_sees_the_future_is_refused():
    peer = mistaken("future", lambda q, k, v, mask: (q, k, v, None))
    assert one(measured(TEXT, [peer]), "future")["why"].startswith("wrong: hidden differs")


def test_a_forward_that_mixes_the_key_heads_is_refused():
    peer = mistaken("mixed", lambda q, k, v, mask: (q, k.flip(1), v.flip(1), mask))
    assert one(measured(TEXT, [peer]), "mixed")["why"].startswith("wrong: hidden differs")


def test_tokens_chosen_with_the_padding_in_sight_are_refused():
    def change(q, k, v, mask):  # causal still, but for the padding
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(
            k.shape[2] - q.shape[2] + 1
        )
        return q, k, v, torch.zeros_like(mask).masked_fill(future, torch.finfo(mask.dtype).min)

    entry = one(measured(replace(WRITTEN, shorter=10), [mistaken("padding", change)]), "padding")
    assert entry["why"].startswith("wrong: tokens differs")
    assert entry["seconds"] == []


def test_prompts_are_padded_on_the_left():
    made = models.prompts(WRITTEN, "cpu", 0)
    assert made["attention_mask"].sum(1).tolist() == [24, 20, 16]
    assert made["attention_mask"][:, -1].all()
    assert (made["input_ids"] == models.PAD).equal(made["attention_mask"] == 0)
    assert set(models.prompts(TEXT, "cpu", 0)) == {"input_ids"}


def test_a_model_that_does_not_call_flashedu_is_not_timed(monkeypatch):
    """As if a release had dropped the setting: the model says FlashEdu and does eager."""
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    from flashedu.integrations.transformers import register

    register()
    monkeypatch.setattr("flashedu.integrations.transformers.register", lambda: ())
    ours = AttentionInterface()["FlashEdu"]
    AttentionInterface.register("FlashEdu", eager_attention_forward)
    try:
        entry = one(measured(TEXT, [BY_NAME["hf-flashedu"]]), "hf-flashedu")
    finally:
        AttentionInterface.register("FlashEdu", ours)
    assert entry["why"].startswith("NotCalled: ")
    assert entry["seconds"] == []


def test_without_transformers_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = measured(TEXT, MODELS)
    assert {entry["why"] for entry in found["runs"]} == {
        "Missing: needs Transformers: pip install transformers"
    }


@pytest.mark.usefixtures("toy")
def test_a_run_is_a_record_that_show_prints(capsys, monkeypatch, tmp_path):
    written = [replace(WRITTEN, pass_="prefill", new_tokens=1), WRITTEN]
    monkeypatch.setitem(cases.SECTIONS, "model", lambda choice: [TEXT, *written])
    options = ("--sections", "model", "--rounds", "1", "--peers", "hf-sdpa,hf-eager")
    code, out, err = cli_run(capsys, *options, "--out", tmp_path / "x.json")
    assert code == 0, err
    assert "[3/3] model: generate B 3 N 24 and 5 more heads 4/2 2 layers bfloat16 direct" in err
    found = record.load(tmp_path / "x.json")
    assert [case["new_tokens"] for case in found.cases("model")] == [0, 1, 5]
    assert "model: time, bfloat16, forward" in out
    assert "model: peak memory beyond inputs, bfloat16, all tokens" in out
    assert cli_run(capsys, "show", tmp_path / "x.json") == (0, out, "")


def test_the_time_of_a_token_is_what_all_take_beyond_the_first():
    made = pretend.record(("model",))
    text = " ".join(shown(made, 80).split())
    prefill, generate = made.cases("model", **{"pass": "prefill"}) + made.cases(
        "model", **{"pass": "generate"}
    )
    first, all_ = (case["runs"][0]["median_s"] for case in (prefill, generate))
    assert f"each takes: FlashEdu {(all_ - first) / 127 * 1e3:.3g} ms, sdpa" in text
