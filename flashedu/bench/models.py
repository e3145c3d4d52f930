"""Timing a model of Transformers: the same Llama with one attention, and with another.

Its weights are random. A forward is held against the same model in float64, and generated tokens
are held against what that model would have chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from flashedu.bench.cases import ModelCase
from flashedu.bench.peers import Missing, ModelPeer
from flashedu.testing import ROUNDINGS, Error

PAD = 0


def set_up(case: ModelCase, device: Any, seed: int) -> tuple[Check, Callable[[Any], Attempt]]:
    """What results are held against, and how a peer is tried.

    Raises Missing, with a sentence, where Transformers is not installed.
    """
    model, inputs = llama(case, device.name, seed), prompts(case, device.name, seed)
    return Check(case, model, inputs), lambda peer: Attempt(peer, case, model, inputs, device)


def llama(case: ModelCase, device: str, seed: int) -> Any:
    """A Llama of these sizes, with random weights."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Missing("needs Transformers: pip install transformers") from None
    config = LlamaConfig(
        hidden_size=case.H * case.D, num_attention_heads=case.H, num_key_value_heads=case.H_kv,
        head_dim=case.D, num_hidden_layers=case.layers, intermediate_size=case.intermediate,
        vocab_size=case.vocabulary, max_position_embeddings=case.N + case.new_tokens,
        initializer_range=(case.H * case.D) ** -0.5,  # each product keeps the size of its rows
        pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(getattr(torch, case.dtype)).eval()


def prompts(case: ModelCase, device: str, seed: int) -> dict[str, Any]:
    """Tokens, any as likely as any other. Padded on the left, if lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(PAD + 1, case.vocabulary, (case.B, case.N), generator=generator)
    if not case.new_tokens:
        return {"input_ids": tokens.to(device)}
    padding = case.shorter * torch.arange(case.B)[:, None]
    seen = torch.arange(case.N) >= padding
    tokens = tokens.where(seen, PAD)
    return {"input_ids": tokens.to(device), "attention_mask": seen.long().to(device)}


class Attempt:
    """The model with one attention."""

    def __init__(
        self, peer: ModelPeer, case: ModelCase, model: Any, inputs: Mapping[str, Any], device: Any
    ) -> None:
        self._peer, self._case, self._device = peer, case, device
        self._model, self._inputs, self._result = model, inputs, None
        if self._is_ours:
            from flashedu.integrations.transformers import register

            register()

    @property
    def _is_ours(self) -> bool:
        return self._peer.implementation.startswith("FlashEdu")

    def results(self) -> dict[str, Any]:
        """The last hidden states, or the tokens that were generated.

        Raises NotCalled if the model was told FlashEdu and did not call it.
        """
        report: AbstractContextManager[Any] = nullcontext()
        self._choose()
        if self._is_ours:
            from flashedu.integrations.transformers import attention_report

            report = attention_report(self._model)
        with report:
            self._run()
        result, self._result = self._result, None
        return {"tokens" if self._case.new_tokens else "hidden": result}

    def extra_bytes(self) -> int:
        """Peak memory beyond weights and inputs."""
        self._choose()
        peak: int = self._device.peak_bytes(self._run)
        self._result = None
        return peak

    def seconds(self) -> float:
        """One timing."""
        self._choose()
        took: float = self._device.seconds(self._run, wait=self._case.mode != "queued")
        self._result = None
        return took

    def _choose(self) -> None:
        self._model.set_attn_implementation(self._peer.implementation)

    def _run(self) -> None:
        self._result = work(self._model, self._inputs, self._case.new_tokens)


@torch.no_grad()
def work(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> Any:
    """The last hidden states, without the head; or greedy tokens, (B, new_tokens)."""
    if not new_tokens:
        return model.model(**inputs, use_cache=False).last_hidden_state
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokens[:, inputs["input_ids"].shape[1] :]


class Check:
    """Results held against the same weights in float64, with eager attention.

    Not all is float64: Transformers' norms and softmax take float32 there too.

    Hidden states may be off by twice what eager attention in the dtype is, and some roundings. So
    may the logits that a token was chosen by: in float64 it is no further below the best one than
    twice that, as both may be off.
    """

    def __init__(self, case: ModelCase, model: Any, inputs: Mapping[str, Any]) -> None:
        self._case, self._inputs = case, inputs
        model.set_attn_implementation("eager")
        self._fine = copy.deepcopy(model).double()
        if case.new_tokens:
            tokens = work(model, inputs, case.new_tokens)
            exact = self._logits(self._fine, tokens)
            usual = self._logits(model, tokens)
        else:
            exact, usual = work(self._fine, inputs, 0), work(model, inputs, 0)
            self._fine = None  # its memory
            self._exact = exact
        floor = ROUNDINGS * torch.finfo(usual.dtype).eps * exact.abs().max().item()
        self._budget = 2 * _distance(usual, exact) + floor

    def errors(self, results: Mapping[str, Any]) -> dict[str, Error]:
        """The largest error, beside its budget."""
        if "hidden" in results:
            return {"hidden": Error(_distance(results["hidden"], self._exact), self._budget)}
        tokens = results["tokens"]
        if tokens.shape != (self._case.B, self._case.new_tokens):
            raise AssertionError(f"the shape is {tuple(tokens.shape)}")
        logits = self._logits(self._fine, tokens)
        chosen = logits.gather(-1, tokens[..., None])[..., 0]
        below = (logits.amax(-1) - chosen).max().item()
        return {"tokens": Error(below, 2 * self._budget)}

    @torch.no_grad()
    def _logits(self, model: Any, tokens: Any) -> Any:
        """For each of these tokens, the logits that it was chosen by: (B, new_tokens, vocabulary).

        Each prompt alone, without its padding, and with the tokens that followed.
        """
        found = []
        for prompt, seen, written in zip(*self._inputs.values(), tokens, strict=True):
            ids = torch.cat([prompt[seen.bool()], written[:-1]])[None]
            found.append(model(input_ids=ids, use_cache=False, logits_to_keep=len(written)).logits)
        return torch.cat(found)

    def __str__(self) -> str:
        if self._case.new_tokens:
            return "the logit of each token beside the best one, in float64"
        return "all hidden states, against the same model in float64 with eager attention"


def _distance(got: Any, want: Any) -> float:
    if got.shape != want.shape:
        raise AssertionError(f"the shape is {tuple(got.shape)}, not {tuple(want.shape)}")
    return (got.double() - want.double()).abs().max().item()
