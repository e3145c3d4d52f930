"""A model trained with FlashEdu: letter by letter, on ten of Shakespeare's sonnets."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from flashedu.integrations import transformers as ours
from flashedu.testing import ROUNDINGS

ours.register()

TEXT = (Path(__file__).parent / "data" / "sonnets.txt").read_text()
LETTERS = sorted(set(TEXT))
DATA = torch.tensor([LETTERS.index(letter) for letter in TEXT])
STEPS, BATCH, N = 200, 8, 64
ROUNDING = 2**-24  # half the distance between two float32 numbers, at most


@functools.cache
def trained(implementation: str, moved: float = 0.0, steps: int = STEPS) -> torch.Tensor:
    """The loss at each step. moved: by how much of itself each weight is changed before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(LETTERS), max_position_embeddings=N,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for weights in model.parameters():
            weights *= 1 + moved * torch.randn(weights.shape).sign()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-6)
    drawn = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(DATA) - N, (BATCH, 1), generator=drawn)
        batch = DATA[starts + torch.arange(N)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def assert_same_curve(losses: torch.Tensor) -> None:
    """Within twice what one rounding of each weight does to eager's own curve, and some roundings.

    Training makes any difference grow, and by the same factor whatever began it: so a fixed bound
    would say nothing.
    """
    eager, moved = (trained("eager", by)[: len(losses)] for by in (0.0, ROUNDING))
    own = float((eager - moved).abs().max())
    bound = 2 * own + ROUNDINGS * torch.finfo(torch.float32).eps * float(eager.max())
    assert bound < 1e-4, "eager's curve is too far from itself to compare another with"
    assert float((losses - eager).abs().max()) <= bound, "another curve"


def test_the_loss_curve_is_eagers() -> None:
    assert_same_curve(trained("FlashEdu"))


def test_it_learns_more_than_how_often_a_letter_comes() -> None:
    share = torch.bincount(DATA).double() / len(DATA)
    entropy = -float((share * share.log()).sum())
    losses = trained("FlashEdu")
    assert losses[0] > 3.9  # about log 55: nothing is known yet
    assert losses[-10:].mean() < entropy - 1


@pytest.mark.parametrize("mistake", ["scale", "causal"])
def test_a_mistake_leaves_the_curve(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ours._stage("online")

    def wrong(*qkv: torch.Tensor, causal: bool, scale: float, **rest: Any) -> Any:
        if mistake == "scale":
            scale *= 1.001
        return right(*qkv, causal=causal and mistake != "causal", scale=scale, **rest)

    monkeypatch.setitem(ours._loaded, "online", wrong)
    with pytest.raises(AssertionError, match="another curve"):
        assert_same_curve(trained.__wrapped__("FlashEdu", steps=50))
