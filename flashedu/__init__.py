"""FlashAttention, built rung by rung from standard attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashedu.memory import Machine

__version__ = "0.1.0"
__all__ = ["__version__", "attention"]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    stage: str | None = None,
    machine: Machine | None = None,
    **options: Any,
) -> Any:
    """softmax(scale · q kᵀ) v, by the stage of that name.

    q: (B, H, Nq, D). k, v: (B, H_kv, Nk, D). `stage` is a name in `flashedu.stages.RUNGS`; None
    takes the highest of LADDER for q's framework that is quick here: a Triton kernel on a GPU only.
    A Hopper GPU takes flash3 instead for float16 and bfloat16, a D of at most 128, and neither
    `machine` nor `options`. The last bits of its dq then vary from run to run, unless
    torch.use_deterministic_algorithms is on, or `deterministic=True` goes to stage="flash3".
    `options` go to the stage: block_q, block_k, splits. Returns o: (B, H, Nq, D).

    Raises ValueError for an unknown stage, RuntimeError for one that cannot run here, and what the
    stage raises for bad inputs.
    """
    from flashedu.stages import dispatch

    return dispatch.attention(
        q, k, v, causal=causal, scale=scale, stage=stage, machine=machine, **options
    )
