"""Choosing a stage by name, or the best that runs here."""

from __future__ import annotations

import inspect
from typing import Any

from flashedu.stages import LADDER, RUNGS, Rung, rung
from flashedu.stages.contract import dtype_name, framework_of


def attention(q: Any, k: Any, v: Any, *, stage: str | None, **options: Any) -> Any:
    """See `flashedu.attention`."""
    chosen = _best_for(q, k, v, **options) if stage is None else rung(stage)
    reason = chosen.missing()
    if reason is not None:
        runnable = ", ".join(r.name for r in RUNGS if r.missing() is None)
        raise RuntimeError(f"{reason}. Stages that run here: {runnable}")
    function = chosen.load().attention
    for name in options:
        if name not in inspect.signature(function).parameters:
            takes = ", ".join(list(inspect.signature(function).parameters)[3:])
            raise TypeError(f"stage '{chosen.name}' takes no {name}; it takes {takes}")
    return function(q, k, v, **options)


def _best_for(
    q: Any, k: Any, v: Any, *, machine: Any = None, runs: Any = None, **options: Any
) -> Rung:
    """The highest rung that is quick on q: an interpreted kernel is not, and none is counted.

    A Hopper card takes flash3, which has no tile sizes: where an option is given, it is flash2.
    """
    framework = framework_of(q)
    if framework is None:
        kind = type(q).__name__
        raise TypeError(f"q must be a NumPy array or a torch tensor, got {kind}")
    plain = machine is None and runs is None and not set(options) - {"causal", "scale"}
    if plain and framework == "torch" and _hopper_takes(q):
        return rung("flash3")
    rungs = LADDER if runs is None else (*LADDER, rung("varlen"))
    runnable = [r for r in rungs if r.framework == framework and r.missing() is None]
    able = [r for r in runnable if r.runs or runs is None] or runnable
    return [r for r in able if not r.is_triton or (machine is None and _runs_on(r, q))][-1]


def _hopper_takes(q: Any) -> bool:
    """Whether flash3 runs here and takes q: on its card, by dtype and D."""
    import torch

    flash3 = rung("flash3")
    return (
        _runs_on(flash3, q)
        and (q.ndim == 4 and q.shape[3] <= flash3.largest_D)
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and flash3.missing() is None
    )


def _runs_on(rung: Rung, q: Any) -> bool:
    return q.is_cuda and dtype_name(q) in rung.dtypes
