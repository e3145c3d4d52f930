"""Triton on this machine: compiled for its GPU or, where there is none, interpreted on the CPU.

Triton decides when it is imported: its own functions are kernels too. So the choice is made here,
before the first import, and every stage with kernels imports this module first.

TRITON_INTERPRET=0 on a machine without a GPU: kernels are compiled for another machine's card, and
cannot run (see flashedu.bench.compiled).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import torch

if (
    "triton" in sys.modules
    or torch.cuda.is_available()
    or os.environ.get("TRITON_INTERPRET") == "0"
):
    import triton.language as tl
else:
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import triton.language as tl
from flashedu.stages import interpreter

import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED = isinstance(tl.zeros, InterpretedFunction)
if INTERPRETED:
    numpy_version = tuple(map(int, np.__version__.split(".")[:2]))
    if triton.__version__.startswith("3.6.") and numpy_version >= (2, 4):
        raise ImportError(
            f"the interpreter of triton {triton.__version__} fails with NumPy {np.__version__}: "
            'pip install "numpy<2.4"'
        )
    with mock.patch.object(knobs, "propagate_env", False):  # this process alone
        knobs.runtime.interpret = True  # for the kernels that are defined from here on
    interpreter.quicken()

COMPILE_ONLY = (
    not INTERPRETED and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"
)
if not (INTERPRETED or torch.cuda.is_available() or COMPILE_ONLY):
    raise ImportError(
        "Triton was imported before flashedu could choose its interpreter, and there is no GPU to "
        "compile for: import flashedu first, or set TRITON_INTERPRET=1 before Python starts"
    )


def on_its_card(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch from the card of the first argument, which need not be the current one.

    Raises ValueError, with a sentence, where the tiles do not fit that card.
    """

    @functools.wraps(function)
    def wrapper(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        try:
            with torch.cuda.device_of(x):
                return function(x, *rest, **options)
        except OutOfResources as error:
            raise ValueError(f"block_q and block_k must be smaller on this card: {error}") from None

    return wrapper


def interpreting(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; where kernels are compiled, in a process that interprets them instead.

    `function` is one of a module, not of the user's script: that is not run again there.
    """
    if INTERPRETED:
        return function(*args)
    script, spawn = sys.modules["__main__"], multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.multiple(script, __spec__=None, __file__=None, create=True),
        ProcessPoolExecutor(1, mp_context=spawn) as interpreter,
    ):
        return interpreter.submit(function, *args).result()


def capability(x: torch.Tensor) -> tuple[int, int] | None:
    """The compute capability of x's card, or that to compile for; None if interpreted."""
    if INTERPRETED:
        return None
    if COMPILE_ONLY:
        major, minor = divmod(driver.active.get_current_target().arch, 10)
        return major, minor
    return _capability(x.device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a card; 1 where kernels are only compiled, and none runs."""
    if COMPILE_ONLY:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_tma(x: torch.Tensor) -> bool:
    """Whether descriptors are made by the host: for Hopper and later cards, and the interpreter."""
    return (capability(x) or (9, 0)) >= (9, 0)


def starts_early(x: torch.Tensor) -> bool:
    """Whether a kernel can start while the one before it ends, and wait there for its results: on
    Hopper and later cards (CUDA's programmatic dependent launch)."""
    return not INTERPRETED and (capability(x) or (0, 0)) >= (9, 0)


def check(stage: str, q: torch.Tensor, machine: Any) -> None:
    """Raise ValueError, with a sentence, if kernels cannot reach q, or `machine` cannot count.

    RuntimeError if they can only be compiled here.
    """
    if COMPILE_ONLY:
        raise RuntimeError(
            f"stage '{stage}' cannot run: TRITON_INTERPRET=0 only compiles kernels where there is "
            "no GPU; unset it to interpret them on the CPU"
        )
    wanted = "cpu" if INTERPRETED else "cuda"
    if q.device.type != wanted:
        how = (
            "kernels are interpreted here, on the CPU; unset TRITON_INTERPRET to compile them"
            if INTERPRETED
            else "kernels are compiled for the GPU here; TRITON_INTERPRET=1 runs them on the CPU"
        )
        raise ValueError(f"q must be on {wanted} for stage '{stage}', got {q.device}: {how}")
    if q.dtype == torch.bfloat16 and (capability(q) or (8, 0)) < (8, 0):
        raise TypeError(f"q must not be bfloat16 on {torch.cuda.get_device_name(q.device)}, which "
                        f"has none; float16 would do for stage '{stage}'")  # fmt: skip
    if machine is None:
        return
    if not INTERPRETED:
        raise ValueError(
            f"machine must be None for stage '{stage}' where kernels are compiled: only the "
            "interpreter can count; flashedu.ladder.count starts one"
        )
    if machine.sram.capacity_bytes is not None or machine.watched:
        raise ValueError(
            f"machine must have no sram_bytes and no watch for stage '{stage}': what a Triton "
            "kernel keeps on chip is the compiler's choice"
        )
