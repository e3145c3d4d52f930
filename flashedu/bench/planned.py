"""The memory plan beside what PyTorch's allocator reports: a prefill and some decode steps."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flashedu.bench.run import sentence
from flashedu.memory.gpus import GPU
from flashedu.serving.plan import Model, plan

STEPS = 3  # of decoding


@dataclass(frozen=True)
class Case:
    """A batch of B prompts of N tokens, with one attention."""

    N: int
    B: int
    attention: str  # as Transformers names it

    def __str__(self) -> str:
        return f"memory: {self.attention}, batch {self.B}, N {self.N}"


CASES = (
    Case(4096, 4, "eager"), Case(2048, 4, "eager"), Case(512, 8, "eager"), Case(4096, 1, "sdpa"),
    Case(4096, 4, "sdpa"), Case(4096, 4, "FlashEdu"), Case(1024, 16, "FlashEdu"),
    Case(4096, 16, "FlashEdu"),
)  # fmt: skip


def head(case: Case) -> dict[str, Any]:
    """What a run of a case begins with, in a record."""
    return {"peer": case.attention, "kind": "plan", "repeat": 0, "batch": case.B, "why": None,
            **dataclasses.asdict(case)}  # fmt: skip


def measure(model: Any, sizes: Model, card: GPU, dtype: str) -> Iterator[dict[str, Any]]:
    """A run of each case, as it stands in a record; `card` is only to plan for."""
    from flashedu.integrations.transformers import register

    register()
    x = torch.ones(256, 256, device="cuda", dtype=getattr(torch, dtype))
    x @ x  # cuBLAS takes its workspace
    for case in CASES:
        entry = head(case)
        attention = "standard" if case.attention == "eager" else "flash"
        prefill = plan(sizes, card, N=case.N, B=case.B, attention=attention, dtype=dtype)
        decode = prefill.replace(N=case.N + STEPS, used=case.N + STEPS)
        try:
            entry |= _measured(model, case)
        except Exception as error:  # one that does not fit costs no other its measurement
            entry["why"] = sentence(error)
        yield entry | {
            "planned_weights_bytes": prefill.weights_bytes,
            "planned_prefill_bytes": prefill.prefill_bytes,
            "planned_decode_bytes": decode.decode_bytes,
        }


@torch.no_grad()
def _measured(model: Any, case: Case) -> dict[str, int]:
    gc.collect()
    torch.cuda.empty_cache()
    model.set_attn_implementation(case.attention)
    ids = torch.randint(3, model.config.vocab_size, (case.B, case.N), device="cuda")
    weights = torch.cuda.memory_allocated()
    tokens, cache, prefill = _step(model, ids, None)
    decode = 0
    for _ in range(STEPS):
        tokens, cache, took = _step(model, tokens, cache)
        decode = max(decode, took)
    return {"weights_bytes": weights, "prefill_bytes": prefill, "decode_bytes": decode,
            "reserved_bytes": torch.cuda.memory_reserved()}  # fmt: skip


def _step(model: Any, ids: Any, cache: Any) -> tuple[Any, Any, int]:
    torch.cuda.reset_peak_memory_stats()
    how = {} if cache is None else {"past_key_values": cache}
    out = model(ids, use_cache=True, logits_to_keep=1, **how)
    tokens, cache = out.logits[:, -1].float().argmax(-1, keepdim=True), out.past_key_values
    torch.cuda.synchronize()
    return tokens, cache, torch.cuda.max_memory_allocated()
