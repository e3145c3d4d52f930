"""The one contract of every stage: what goes in, and one sentence when it does not fit."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import numpy as np

from flashedu.memory.problem import Problem

MAX_D = 256
MAX_SPLITS = 1024
FLOAT32_MAX = float(np.finfo(np.float32).max)


def check(
    stage: str,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool,
    scale: float | None,
    block_q: int | None = 128,
    block_k: int | None = 64,
    splits: int | None = None,
    runs: Any = None,
    machine: Any = None,
) -> tuple[Problem, float]:
    """Check the arguments of a stage; return their sizes and the scale.

    q is (B, H, Nq, D), k and v are (B, H_kv, Nk, D), all of one framework, dtype and device. Raises
    TypeError or ValueError with a sentence that names the argument, what came and what would do.
    """
    from flashedu.stages import rung

    framework, dtypes = rung(stage).framework, rung(stage).dtypes
    would_do = "; stage 'flash2' would do" if rung(stage).hopper_only else ""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_array(stage, framework, dtypes, name, x, would_do)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} must have the dtype of q, {dtype_name(q)}, got {dtype_name(x)}"
            )
        if getattr(x, "device", None) != getattr(q, "device", None):
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")

    B, H, Nq, D = q.shape
    _, H_kv, Nk, _ = k.shape
    most = min(MAX_D, rung(stage).largest_D)
    if not 1 <= D <= most:
        beyond = f" for stage '{stage}', got D={D}; stage 'flash2' takes up to {MAX_D}"
        raise ValueError(
            f"q must have a head size D of 1 to {most}"
            f"{beyond if most < D <= MAX_D else f', got D={D}'}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != B:
            raise ValueError(f"{name} must have the batch size of q, B={B}, got B={x.shape[0]}")
        if x.shape[3] != D:
            raise ValueError(f"{name} must have the head size of q, D={D}, got D={x.shape[3]}")
    if tuple(v.shape) != tuple(k.shape):
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if H < 1 or H_kv < 1 or H % H_kv:
        raise ValueError(
            f"q must have a multiple of the heads of k and v (H_kv={H_kv}), and at least one, "
            f"got H={H}"
        )

    if machine is not None and not hasattr(machine, "hbm"):
        raise TypeError(f"machine must be a flashedu.memory.Machine, or None, got {machine!r}")
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if runs is not None:
        _check_runs(runs, causal, q)
    if rung(stage).tile_sizes:
        _check_tile_size(rung(stage), "block_q", block_q)
        _check_tile_size(rung(stage), "block_k", block_k)
    if splits is not None:
        check_splits(splits)
    scale = check_scale(scale, D)

    problem = Problem(
        B=B, H=H, H_kv=H_kv, Nq=Nq, Nk=Nk, D=D, dtype=dtype_name(q), causal=bool(causal),
        block_q=int(block_q or 128), block_k=int(block_k or 64), splits=int(splits or 1),
    )  # fmt: skip
    return problem, scale


def _check_runs(runs: Any, causal: Any, q: Any) -> None:
    from flashedu.stages.runs import Runs

    if not isinstance(runs, Runs):
        kind = type(runs).__name__
        raise TypeError(f"runs must be flashedu.stages.runs.Runs, or None, got {kind}")
    wanted = (q.shape[0], q.shape[2])
    for name, x in zip(Runs._fields, runs, strict=True):
        if framework_of(x) != "torch" or dtype_name(x) != "int32":
            kind = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"runs.{name} must be an int32 tensor, got {kind}")
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"runs.{name} must be (B, Nq) = {wanted}, a number for each query, got shape "
                f"{tuple(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"runs.{name} must be on the device of q, {q.device}, got {x.device}")
    if causal:
        raise ValueError(
            "causal must be False where runs are given, which say all that a query sees, got True"
        )


def _check_tile_size(rung: Any, name: str, block: Any) -> None:
    if block is None and rung.is_triton:
        return
    is_integer = isinstance(block, numbers.Integral) and not isinstance(block, bool)
    if is_integer and block in rung.tile_sizes:
        return
    wanted = "an integer of 1 or more"
    if rung.is_triton:
        wanted = f"None, or one of {', '.join(map(str, rung.tile_sizes))}, for stage '{rung.name}'"
    raise (ValueError if is_integer else TypeError)(f"{name} must be {wanted}, got {block!r}")


def check_splits(splits: Any) -> None:
    """Raise TypeError or ValueError unless it is a number of splits."""
    is_integer = isinstance(splits, numbers.Integral) and not isinstance(splits, bool)
    if not (is_integer and 1 <= splits <= MAX_SPLITS):
        raise (ValueError if is_integer else TypeError)(
            f"splits must be None, or an integer of 1 to {MAX_SPLITS}, got {splits!r}"
        )


def refuse_gradients(stage: str, *inputs: Any) -> None:
    """Raise ValueError, with a sentence, if gradients of the inputs would be asked for."""
    if gradients_wanted(*inputs):
        raise ValueError(
            f"q, k and v must not require gradients for stage '{stage}', which has no backward: "
            "detach them, or take stage 'flash2'"
        )


def gradients_wanted(*inputs: Any) -> bool:
    """Whether PyTorch would ask for gradients of any of these tensors."""
    import torch

    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def check_scale(scale: Any, D: int) -> float:
    """The scale, 1/√D for None. Raises TypeError or ValueError unless it is a float32 number."""
    if scale is None:
        return 1 / math.sqrt(D)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number, or None for 1/√D, got {scale!r}")
    if not _finite(scale):
        raise ValueError(f"scale must be finite, or None for 1/√D, got {scale}")
    if abs(float(scale)) > FLOAT32_MAX:
        raise ValueError(f"scale must fit float32, or be None for 1/√D, got {scale}")
    return float(scale)


def _finite(x: Any) -> bool:
    try:
        return math.isfinite(x)
    except OverflowError:  # an integer beyond all floats
        return False


def dtype_name(x: Any) -> str:
    """The dtype's name without its framework: float16, not torch.float16."""
    return str(x.dtype).removeprefix("torch.")


def framework_of(x: Any) -> str | None:
    """ "numpy", "torch" or None. Does not import torch: without it, nothing is a tensor."""
    if isinstance(x, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    return "torch" if torch is not None and isinstance(x, torch.Tensor) else None


def check_array(
    stage: str, framework: str, dtypes: tuple[str, ...], name: str, x: Any, would_do: str = ""
) -> None:
    wanted, make = {
        "numpy": ("a NumPy array", f"np.asarray({name}) makes one"),
        "torch": ("a torch tensor", f"torch.as_tensor({name}) makes one"),
    }[framework]
    if framework == "numpy" and framework_of(x) == "torch":
        make = f"{name}.detach().cpu().numpy() makes one, or take a stage for torch"
    if framework_of(x) != framework:
        kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be {wanted} for stage '{stage}', got {kind}; {make}")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array, whose mask would be lost, got one")
    if framework == "torch" and str(x.layout) != "torch.strided":
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}; {name}.to_dense() is one")
    if x.ndim != 4:
        raise ValueError(
            f"{name} must have 4 dimensions, (B, heads, N, D), got shape {tuple(x.shape)}"
        )
    if dtype_name(x) not in dtypes:
        raise TypeError(
            f"{name} must have one of the dtypes {', '.join(dtypes)} for stage '{stage}', "
            f"got {dtype_name(x)}{would_do}"
        )
