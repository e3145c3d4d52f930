"""Two GPU programs to begin with: the sum of two vectors, and the softmax of a matrix's rows.

They are no stage of the ladder: chapter 05 reads them before attention. Compiled for a GPU or,
where there is none, interpreted on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flashedu.memory.kernels import counted
from flashedu.memory.machine import UNCOUNTED, Machine
from flashedu.memory.problem import Problem
from flashedu.stages import triton_mode

import triton
import triton.language as tl

DTYPES = {torch.float32: "float32", torch.float16: "float16"}
BLOCKS = tuple(2**e for e in range(4, 15))  # 16 to 16,384
LONGEST_ROW = BLOCKS[-1]  # 64 KiB in float32: a quarter of the registers of an SM
MOST_NUMBERS = 2**30  # an offset is a 32-bit integer


@triton.jit
def add_kernel(X, Y, Z, N, BLOCK: tl.constexpr):
    """z = x + y, vectors of N numbers: each program adds BLOCK of them."""
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + here, mask=here < N)
    y = tl.load(Y + here, mask=here < N)
    tl.store(Z + here, x + y, mask=here < N)


@triton.jit
def softmax_kernel(X, P, N, BLOCK: tl.constexpr):
    """p = softmax(x), a row a program. A row has N numbers, BLOCK or fewer."""
    cols = tl.arange(0, BLOCK)
    here = tl.program_id(0) * N + cols
    x = tl.load(X + here, mask=cols < N, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, 0))
    tl.store(P + here, p / tl.sum(p, 0), mask=cols < N)


def add(x, y, *, block=1024, machine=None):
    """x + y. Both (N,), float32 or float16, where kernels run; no gradients.

    block: numbers a program, a power of two. machine: a `Machine` that counts, or None.
    Raises TypeError or ValueError for inputs outside this contract.
    """
    x, y = _checked(1, machine, x=x, y=y)
    _check_block(block)
    z = torch.empty_like(x)
    programs = triton.cdiv(len(x), block)  # rounded up
    with _launch(machine, "add", x=x, y=y, z=z):
        add_kernel[(programs,)](x, y, z, len(x), BLOCK=block)
    return z


def softmax(x, *, machine=None):
    """The softmax of each row of x: (rows, N), N up to 16,384. The rest as for `add`.

    Exponentials and sums are float32. A row of −∞ alone gives NaN, as in PyTorch.
    """
    (x,) = _checked(2, machine, x=x)
    rows, N = x.shape
    _check_row(N)
    p = torch.empty_like(x)
    block = max(16, triton.next_power_of_2(N))
    with _launch(machine, "softmax", x=x, p=p):
        softmax_kernel[(rows,)](x, p, N, BLOCK=block)
    return p


def count(kernel: Callable[..., Any], *inputs: Any, **options: Any) -> Machine:
    """The machine that counted `kernel(*inputs, **options)`, interpreted, on inputs on the CPU.

    kernel: `add` or `softmax`.
    """
    return triton_mode.interpreting(_count, kernel, inputs, options)


def _count(kernel: Callable[..., Any], inputs: Any, options: Any) -> Machine:
    machine = Machine()
    kernel(*inputs, **options, machine=machine)
    return machine


@contextmanager
def _launch(machine: Machine | None, name: str, **arrays: Any) -> Iterator[None]:
    """On the arrays' card, counted on `machine`, which knows arrays as (B, heads, N, …)."""
    with_heads = {array: x[None, None] for array, x in arrays.items()}
    sizes = Problem(Nq=1, D=1)  # no attention
    with (
        torch.cuda.device_of(next(iter(arrays.values()))),
        counted(machine or UNCOUNTED, name, sizes, **with_heads),
    ):
        yield


def _checked(dims: int, machine: Machine | None, **arrays: Any) -> list[Any]:
    """The arrays, contiguous. Raises TypeError or ValueError unless they are alike and fit."""
    first = next(iter(arrays))
    device = "cpu" if triton_mode.INTERPRETED else "cuda"
    for name, x in arrays.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32 or float16, got {x.dtype}")
        if x.ndim != dims:
            wanted = "(N,)" if dims == 1 else "(rows, N)"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
        if x.numel() > MOST_NUMBERS:
            raise ValueError(f"{name} must have at most 2**30 numbers, got {x.numel():,}")
        if x.device.type != device:
            raise ValueError(f"{name} must be on {device}, where kernels run, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require gradients: {name}.detach() does not")
        if (x.shape, x.dtype) != (arrays[first].shape, arrays[first].dtype):
            raise ValueError(
                f"{name} must have the shape and dtype of {first}, {_kind(arrays[first])}, "
                f"got {_kind(x)}"
            )
    if machine is not None and not triton_mode.INTERPRETED:
        raise ValueError("machine must be None where kernels are compiled; count() interprets them")
    return [x.contiguous() for x in arrays.values()]


def _check_block(block: Any) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block must be a power of two from 16 to {BLOCKS[-1]:,}, got {block!r}")


def _check_row(N: int) -> None:
    if not 1 <= N <= LONGEST_ROW:
        raise ValueError(
            f"x must have rows of 1 to {LONGEST_ROW:,} numbers, which one program can hold on "
            f"chip, got {N:,}"
        )


def _kind(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {DTYPES[x.dtype]}"
