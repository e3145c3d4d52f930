"""Who is timed: the stages with kernels, what PyTorch has, and FlashAttention-4.

A peer is prepared for one size, outside the time: masks are made, code is compiled, and keys are
put into pages then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from flashedu.bench.cases import Case
from flashedu.memory import Problem
from flashedu.stages import rung

Attention = Callable[..., Any]  # q, k, v and what its layout adds → o


@dataclass(frozen=True)
class Layout:
    """A case as one peer takes it: the inputs, and the way back to the case's own layout."""

    problem: Problem
    inputs: Sequence[Any]  # q, k, v, do
    more: tuple[Any, ...] = ()  # what its attention takes beside them
    back: Callable[[Any], Any] = lambda x: x  # of o and of each gradient


def as_drawn(case: Case, inputs: Sequence[Any]) -> Layout:
    """(B, heads, N, D)."""
    return Layout(case.problem, inputs)


@dataclass(frozen=True)
class Peer:
    """One implementation. `around` holds while it runs."""

    name: str
    prepare: Callable[[Problem, str], Attention]
    backward: bool = True
    attends: bool = True  # False for a yardstick, whose result is not checked
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    layout: Callable[[Case, Sequence[Any]], Layout] = as_drawn


@dataclass(frozen=True)
class ModelPeer:
    """One attention in a model of Transformers, by its `attn_implementation`."""

    name: str
    implementation: str
    attends: bool = True


AnyPeer = Peer | ModelPeer


def _stage(name: str, called: str | None = None, **options: Any) -> Peer:
    """A stage with these options, as a peer of the same name unless it is `called` otherwise."""

    def prepare(p: Problem, device: str) -> Attention:
        attention = rung(name).load().attention
        return lambda q, k, v: attention(q, k, v, causal=p.causal, **options)

    return Peer(called or name, prepare, backward=rung(name).backward)


def _standard(p: Problem, device: str) -> Attention:
    """The formula in three lines, as users write it; its mask is made once."""
    hidden = torch.ones(p.Nq, p.Nk, dtype=torch.bool, device=device).triu(1) if p.causal else None

    def attention(q: Any, k: Any, v: Any) -> Any:
        if p.group > 1:
            k, v = (x.repeat_interleave(p.group, 1) for x in (k, v))
        s = p.D**-0.5 * q @ k.mT
        if hidden is not None:
            s = s.masked_fill(hidden, -torch.inf)
        return torch.softmax(s, -1) @ v

    return attention


def _sdpa(p: Problem, device: str) -> Attention:
    options: dict[str, Any] = {"is_causal": p.causal, "enable_gqa": p.group > 1}
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, **options)


def _by(backend: Any) -> Callable[[], AbstractContextManager[Any]]:
    """This backend of SDPA, and no other to fall back on."""
    return lambda: sdpa_kernel(backend)


class Missing(RuntimeError):
    """What a case or a peer needs is not here. One sentence."""


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


def _fa4(p: Problem, device: str) -> Attention:
    """FlashAttention-4 in CuTe DSL, by its authors (https://github.com/Dao-AILab/flash-attention).

    It compiles its kernels at the first call for a head size, dtype and mask, which is the check's.
    Its causal mask is aligned bottom-right, as ours.
    """
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        card = torch.cuda.get_device_name()
        raise Missing(f"FlashAttention-4 needs a Hopper GPU or a later one, got {card}")
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise Missing(f"needs FlashAttention-4 ({error}): pip install flash-attn-4") from None

    def attention(q: Any, k: Any, v: Any) -> Any:
        o, _ = flash_attn_func(q, k, v, causal=p.causal)
        return o

    return attention


def _heads_third(case: Case, inputs: Sequence[Any]) -> Layout:
    """(B, N, heads, D), as views: FlashAttention-4 takes their strides, and nothing is copied."""
    turned = [x.transpose(1, 2) for x in inputs]
    return Layout(case.problem, turned, back=lambda x: x.transpose(1, 2))


def _copy(p: Problem, device: str) -> Attention:
    """As many bytes as k and v hold cross the memory: k is read, and a copy of it is written."""
    return lambda q, k, v: k.clone()


# keys in pages


def _paged(page_size: int) -> Peer:
    def prepare(p: Problem, device: str) -> Attention:
        from flashedu.stages import paged

        return lambda q, k, v, table, lengths: paged.attention(
            q,
            k,
            v,
            table,
            lengths,
            check=False,  # as an engine, which made the table itself
        )

    return Peer(f"paged-{page_size}", prepare, backward=False, layout=in_pages(page_size))


def in_pages(page_size: int) -> Callable[[Case, Sequence[Any]], Layout]:
    def layout(case: Case, inputs: Sequence[Any]) -> Layout:
        """k and v in pages, (n_pages, H_kv, page_size, D), which lie in any order."""
        p, (q, k, v, do) = case.problem, inputs
        each = -(-p.Nk // page_size)  # pages of a sequence
        order = torch.randperm(p.B * each, generator=torch.Generator().manual_seed(0)).to(q.device)

        def paged(x: Any) -> Any:
            x = pad(x, (0, 0, 0, each * page_size - p.Nk)).unflatten(2, (each, page_size))
            pages = x.new_empty(p.B * each, p.H_kv, page_size, p.D)
            pages[order] = x.transpose(1, 2).flatten(0, 1)
            return pages

        table = order.to(torch.int32).reshape(p.B, each)
        lengths = torch.full((p.B,), p.Nk, dtype=torch.int32, device=q.device)
        return Layout(p, (q, paged(k), paged(v), do), (table, lengths))

    return layout


# sequences of different lengths; a case has them one behind another, (1, heads, total, D)


def _varlen(p: Problem, device: str) -> Attention:
    attention = rung("varlen").load().attention
    return lambda q, k, v, runs: attention(q, k, v, runs=runs)


def _with_runs(case: Case, inputs: Sequence[Any]) -> Layout:
    from flashedu.stages import runs

    p = case.problem
    return Layout(p, inputs, (runs.packed(case.lengths, causal=p.causal, device=inputs[0].device),))


def _padded(case: Case, inputs: Sequence[Any]) -> Layout:
    """(sequences, heads, longest, D), zeros behind each."""
    lengths, longest = case.lengths, max(case.lengths)

    def padded(x: Any) -> Any:
        each = x[0].split(lengths, 1)
        return torch.stack([pad(one, (0, 0, 0, longest - one.shape[1])) for one in each])

    def back(x: Any) -> Any:
        return torch.cat([x[b, :, :n] for b, n in enumerate(lengths)], 1)[None]

    p = case.problem.replace(B=len(lengths), Nq=longest, Nk=longest)
    return Layout(p, [padded(x) for x in inputs], back=back)


def _padded_with_mask(case: Case, inputs: Sequence[Any]) -> Layout:
    laid, keys = _padded(case, inputs), torch.arange(max(case.lengths))
    mask = keys < torch.tensor(case.lengths)[:, None]
    return Layout(laid.problem, laid.inputs, (mask[:, None, None].to(inputs[0].device),), laid.back)


def _masked(p: Problem, device: str) -> Attention:
    """SDPA, by the best backend that takes a mask."""
    return lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _one_by_one(p: Problem, device: str) -> Attention:
    def attention(q: Any, k: Any, v: Any, lengths: Sequence[int]) -> Any:
        each = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        done = [
            scaled_dot_product_attention(q_b, k_b, v_b, is_causal=p.causal)
            for q_b, k_b, v_b in each
        ]
        return torch.cat(done, 2)

    return attention


def _with_lengths(case: Case, inputs: Sequence[Any]) -> Layout:
    return Layout(case.problem, inputs, (case.lengths,))


def _torch_varlen(p: Problem, device: str) -> Attention:
    """PyTorch's own attention over packed sequences, which is new and has changed its arguments."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {}
    if p.causal:
        causal = {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
    return lambda q, k, v, ends, longest: varlen_attn(
        q, k, v, ends, ends, longest, longest, **causal
    )


def _tokens_first(case: Case, inputs: Sequence[Any]) -> Layout:
    """(total, heads, D), and where each sequence ends."""
    ends = torch.tensor([0, *case.lengths]).cumsum(0).to(inputs[0].device, torch.int32)
    tokens = [x[0].transpose(0, 1).contiguous() for x in inputs]
    return Layout(
        case.problem, tokens, (ends, max(case.lengths)), lambda x: x.transpose(0, 1)[None]
    )


_FLASH = _by(SDPBackend.FLASH_ATTENTION)

ATTENTIONS = (
    _stage("flash2"),
    _stage("flash3"),
    _stage("flash1"),
    Peer("standard", _standard),
    Peer("sdpa-flash", _sdpa, around=_by(SDPBackend.FLASH_ATTENTION)),
    Peer("sdpa-cudnn", _sdpa, around=_by(SDPBackend.CUDNN_ATTENTION)),
    Peer("sdpa-efficient", _sdpa, around=_by(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("flex", _flex),
    Peer("fa4", _fa4, layout=_heads_third),
    Peer("sdpa-math", _sdpa, around=_by(SDPBackend.MATH)),
    _stage("flash3", "flash3-det", deterministic=True),
    _stage("decode"),
    Peer("copy", _copy, backward=False, attends=False),
    *(_paged(page_size) for page_size in (16, 64, 256)),
    Peer("varlen", _varlen, layout=_with_runs),
    Peer("padded", _sdpa, around=_FLASH, layout=_padded),
    Peer("padded-flash2", _stage("flash2").prepare, layout=_padded),
    Peer("padded-mask", _masked, layout=_padded_with_mask),
    Peer("unmasked", _sdpa, around=_FLASH, layout=_padded, attends=False),
    Peer("one-by-one", _one_by_one, around=_FLASH, layout=_with_lengths),
    Peer("torch-varlen", _torch_varlen, layout=_tokens_first),
)
MODELS = (
    ModelPeer("hf-flashedu", "FlashEdu"),
    ModelPeer("hf-sdpa", "sdpa"),
    ModelPeer("hf-eager", "eager"),
)
PEERS: tuple[AnyPeer, ...] = (*ATTENTIONS, *MODELS)
