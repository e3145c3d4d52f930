"""Who is timed: the stages with kernels, and what PyTorch has.

A peer is prepared for one size, outside the time: masks are made and code is compiled then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashedu.memory import Problem
from flashedu.stages import rung

Attention = Callable[[Any, Any, Any], Any]  # q, k, v → o


@dataclass(frozen=True)
class Peer:
    """One implementation. `around` holds while it runs."""

    name: str
    prepare: Callable[[Problem, str], Attention]
    backward: bool = True
    attends: bool = True  # False for a yardstick, whose result is not checked
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def _stage(name: str) -> Peer:
    def prepare(p: Problem, device: str) -> Attention:
        attention = rung(name).load().attention
        return lambda q, k, v: attention(q, k, v, causal=p.causal)

    return Peer(name, prepare, backward=rung(name).backward)


def _standard(p: Problem, device: str) -> Attention:
    """The formula in three lines, as users write it; its mask is made once."""
    hidden = torch.ones(p.Nq, p.Nk, dtype=torch.bool, device=device).triu(1) if p.causal else None

    def attention(q: Any, k: Any, v: Any) -> Any:
        s = p.D**-0.5 * q @ k.mT
        if hidden is not None:
            s = s.masked_fill(hidden, -torch.inf)
        return torch.softmax(s, -1) @ v

    return attention


def _sdpa(name: str, backend: Any) -> Peer:
    """PyTorch's own attention, with this backend and no other to fall back on."""

    def prepare(p: Problem, device: str) -> Attention:
        options = {"is_causal": p.causal, "enable_gqa": p.group > 1}
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, **options)

    return Peer(name, prepare, around=lambda: sdpa_kernel(backend))


class Uncompiled(RuntimeError):
    """torch.compile gave up: what would be timed is not FlexAttention's kernel."""


def _flex(p: Problem, device: str) -> Attention:
    """FlexAttention, compiled for this one size."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
        return query >= key

    mask = create_block_mask(seen, None, None, p.Nq, p.Nk, device=device) if p.causal else None

    def attention(q: Any, k: Any, v: Any, mask: Any) -> Any:
        if not torch.compiler.is_compiling():
            raise Uncompiled("torch.compile fell back to the uncompiled FlexAttention")
        return flex_attention(q, k, v, block_mask=mask)

    torch.compiler.reset()  # it keeps only a few sizes of one function
    compiled = torch.compile(attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, mask)


def _copy(p: Problem, device: str) -> Attention:
    """As many bytes as k and v hold cross the memory: k is read, and a copy of it is written."""
    return lambda q, k, v: k.clone()


PEERS = (
    _stage("flash2"),
    _stage("flash1"),
    Peer("standard", _standard),
    _sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    Peer("flex", _flex),
    _sdpa("sdpa-math", SDPBackend.MATH),
    _stage("decode"),
    Peer("copy", _copy, backward=False, attends=False),
)
