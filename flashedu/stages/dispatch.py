"""Choosing a stage by name, or the best that runs here."""

from __future__ import annotations

import inspect
from typing import Any

from flashedu.stages import LADDER, Rung, rung
from flashedu.stages.contract import framework_of


def attention(q: Any, k: Any, v: Any, *, stage: str | None, **options: Any) -> Any:
    """See `flashedu.attention`."""
    chosen = _best_for(q) if stage is None else rung(stage)
    reason = chosen.missing()
    if reason is not None:
        runnable = ", ".join(r.name for r in LADDER if r.missing() is None)
        raise RuntimeError(f"{reason}. Stages that run here: {runnable}")
    function = chosen.load().attention
    if options.get("machine") is None:
        options.pop("machine", None)  # not every stage can be counted
    for name in options:
        if name not in inspect.signature(function).parameters:
            takes = ", ".join(list(inspect.signature(function).parameters)[3:])
            raise TypeError(f"stage '{chosen.name}' takes no {name}; it takes {takes}")
    return function(q, k, v, **options)


def _best_for(q: Any) -> Rung:
    framework = framework_of(q)
    if framework is None:
        kind = type(q).__name__
        raise TypeError(f"q must be a NumPy array or a torch tensor, got {kind}")
    runnable = [r for r in LADDER if r.framework == framework and r.missing() is None]
    return runnable[-1]
