"""FlashEdu in Hugging Face Transformers: turn it on with two lines, and see that it is on.

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="FlashEdu")

"FlashEdu" takes the stage that is quick where the tensors are: `online` on a CPU; on a GPU
`flash2`, `varlen` where there is a mask, and `decode` for few queries. A Hopper card takes `flash3`
in place of `flash2` for float16 and bfloat16 and a D of at most 128; the last bits of its dq vary
from run to run unless torch.use_deterministic_algorithms is on. "FlashEdu:online" takes that stage,
or says why it cannot. For flash1, flash2 and flash3 write "FlashEdu:Flash1" and so on, with a
capital: Transformers takes any name with "flash" in it for a package of its own. `register` returns
the names.

Two functions go to Transformers under each name. One makes the mask, once for all layers: it says
which keys a query sees by two numbers (see `flashedu.stages.runs`) instead of a row of ones and
zeros. The other is the attention. What no stage does (dropout, biases, masks with holes, …) it does
by the formula, slower, and says so once.

A model can ignore attn_implementation without a word. `attention_report` counts calls:

    with attention_report(model) as report:
        model(**inputs)
    print(report)

Tried with Transformers 5.5.0, 5.17.0 and 5.24.0.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.nn import functional as F

from flashedu.stages import RUNGS, rung
from flashedu.stages.contract import MAX_D, dtype_name
from flashedu.stages.runs import Runs

if rung("flash2").missing() is None and "triton" not in sys.modules:
    import flashedu.stages.triton_mode  # noqa: F401  Transformers will import Triton, too

NAME = "FlashEdu"
OLDEST, TOO_NEW = (5, 5), (6, 0)
TRIED = ("5.5.0", "5.17.0", "5.24.0")

# Names to set as attn_implementation, and the stage of each; None chooses.
NAMES: dict[str, str | None] = {NAME: None} | {
    f"{NAME}:{r.name.replace('flash', 'Flash')}": r.name for r in RUNGS if r.framework == "torch"
}

FEW_ROWS = 64  # queries · heads of a group, up to which `decode` keeps a GPU busier than flash2
MASK_ELEMENTS = 2**24  # of a mask, at a time

HOLES = "attention_mask must have no holes under torch.compile: FlashEdu takes runs of keys there"

# What models pass to change the result, and no path here computes.
REFUSED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
# What models pass and Transformers' own "sdpa" ignores too. The window is in the mask; where
# sequences are packed by cu_seq_lens, models split them before the call.
IGNORED = (
    "sliding_window", "position_ids", "deterministic",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


class SlowerPath(UserWarning):
    """What was asked for is done by the formula, with a matrix of Nq × Nk: no stage does it."""


class NotCalled(RuntimeError):
    """A model was told to use FlashEdu and made no call of it."""


def register() -> tuple[str, ...]:
    """Make FlashEdu known to Transformers. Once is enough, twice does no harm.

    Returns the names that attn_implementation can be. Raises ImportError where Transformers is
    missing, or of a version that FlashEdu does not fit.
    """
    _check_version()
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    kernels_run = torch.cuda.is_available() or "flashedu.stages.triton_mode" in sys.modules
    for name, stage in NAMES.items():
        if stage and rung(stage).missing() is None and (kernels_run or not rung(stage).is_triton):
            _stage(stage)  # now, as torch.compile cannot
        AttentionInterface.register(name, _attention_function(name, stage))
        AttentionMaskInterface.register(name, runs_mask)
    _look_at_each_model(PreTrainedModel)
    return tuple(NAMES)


def _check_version() -> None:
    fits = 'pip install "transformers>=5.5,<6" (tried: ' + ", ".join(TRIED) + ")"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"FlashEdu needs Transformers, which is not installed: {fits}") from None
    if not OLDEST <= tuple(int(n) for n in version.split(".")[:2]) < TOO_NEW:
        raise ImportError(f"transformers must be from 5.5 on and before 6, got {version}: {fits}")


# Configs of models that have an attention of their own, whatever they are told.
_own_attention: set[type] = set()


def _look_at_each_model(models: Any) -> None:
    """Where Transformers checks a model's attn_implementation, check two things more.

    A name that is none of ours gets a sentence: Transformers' own lists all names but these. And a
    model that ignores the setting is remembered, as it needs masks that it can read.
    """
    check = models.get_correct_attn_implementation
    if hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def checked(model: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if str(requested_attention).startswith(f"{NAME}:") and requested_attention not in NAMES:
            raise ValueError(
                f"attn_implementation must be one of {', '.join(NAMES)}, got {requested_attention}"
            )
        correct: str = check(model, requested_attention, *args, **kwargs)
        if correct in NAMES and not model._can_set_attn_implementation():
            _own_attention.add(type(model.config))
        return correct

    models.get_correct_attn_implementation = checked


# the mask


def runs_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **how: Any,
) -> torch.Tensor | None:
    """What Transformers' `sdpa_mask` says of the same arguments, as runs.

    Returns None for plain causal or full attention, else first and stop, (B, 1, Nq, 2) in int32.
    Four dimensions pass through models as masks do. A mask with holes comes back as it is, bool;
    a model with an attention of its own gets the mask that eager attention gets.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    if type(how.get("config")) in _own_attention:
        own: torch.Tensor | None = eager_mask(
            batch_size, q_length, kv_length, q_offset,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip, **how,
        )  # fmt: skip
        return own

    def rows(start: int, stop: int, **changed: Any) -> torch.Tensor | None:
        skips = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return sdpa_mask(
            batch_size, stop - start, kv_length, q_offset + start, **how | skips | changed
        )

    # Its None for a causal mask counts from the first key. That is no other than from the last
    # one where there are as many queries as keys, or where one query sees all.
    counts_from_last = q_length in (1, kv_length)
    skips = dict(
        allow_is_causal_skip=allow_is_causal_skip and counts_from_last,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
    )
    if rows(0, q_length, **skips, mask_function=_no_pattern) is None:
        return None
    if kv_length <= 2:  # runs could be taken for a mask, and are seen at a glance in one
        return rows(0, q_length)
    step = max(1, MASK_ELEMENTS // max(1, batch_size * kv_length))
    if torch.compiler.is_compiling():
        step = q_length
    parts = []
    for start in range(0, q_length, step):
        runs = runs_of(rows(start, min(q_length, start + step)))
        if runs is None:
            return rows(0, q_length)
        parts.append(torch.stack(runs))
    return torch.cat(parts, 2).permute(1, 2, 0)[:, None]  # first and stop lie one behind the other


def _no_pattern(b: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """Whether a mask is skipped does not depend on its pattern: this one costs nothing."""
    return torch.ones_like(b, dtype=torch.bool)


def runs_of(mask: Any) -> Runs | None:
    """The runs of a mask, (B, 1, Nq, Nk), True where a query sees a key; None if it has holes."""
    if mask.shape[1] != 1 or mask.shape[3] == 0:
        return None
    seen = mask[:, 0].to(torch.uint8)
    n_seen = seen.sum(-1)
    first = seen.argmax(-1)  # the first of the ones
    stop = seen.shape[-1] - seen.flip(-1).argmax(-1)
    stop = torch.where(n_seen > 0, stop, first)
    if torch.compiler.is_compiling():  # reads no value: a mask with holes stops the program
        torch._assert_async((stop - first == n_seen).all(), HOLES)
    elif not torch.equal(stop - first, n_seen):
        return None
    return Runs(first.to(torch.int32), stop.to(torch.int32))


# the attention


@functools.cache
def _attention_function(name: str, stage: str | None) -> Callable[..., Any]:
    """The attention, as Transformers calls it, for one name."""

    def flashedu_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        position_bias: torch.Tensor | None = None,
        softcap: float | None = None,
        output_attentions: bool = False,
        **rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query: (B, H, Nq, D). key, value: (B, H_kv, Nk, D). Returns o: (B, Nq, H, D), weights."""
        for argument, what in REFUSED.items():
            if rest.get(argument) is not None:
                raise ValueError(
                    f"{argument} must be None for {name}, which has no {what}, got some from "
                    f'{type(module).__name__}: attn_implementation="eager" would do'
                )
        if type(rest.get("cache")).__name__ == "PagedAttentionCache":
            raise ValueError(
                f"cache must not be paged for {name}, got a PagedAttentionCache: continuous "
                'batching takes attn_implementation="paged|eager"'
            )
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        q, k, v = _as_autocast_would(query, key, value)
        (_, _, Nq, D), Nk = q.shape, k.shape[2]
        scale = D**-0.5 if scaling is None else scaling
        runs, seen, bias = _read(attention_mask, q, Nk)
        causal = attention_mask is None and is_causal and Nq > 1
        if causal and Nq != Nk:
            raise ValueError(
                f"attention_mask must say which of {Nk} keys each of {Nq} queries sees, got None: "
                "is_causal does not say which of them stand side by side"
            )

        no_stage = {  # what no stage does: its name in a report, and a sentence
            "dropout": dropout > 0 and f"dropout={dropout:g}: 0 in the config avoids it",
            "position_bias": position_bias is not None and "a position_bias",
            "bias": bias is not None and "an attention_mask of floats, which is added",
            "holes": seen is not None and "an attention_mask with holes, or one for each head",
            "softcap": softcap is not None and f"softcap={softcap}",
            "output_attentions": output_attentions and "output_attentions=True",
            "head size": max(D, v.shape[3]) > MAX_D and f"a head size of more than {MAX_D}",
        }
        reasons = {reason: what for reason, what in no_stage.items() if what}
        if stage is not None and reasons:
            raise ValueError(
                f"{name} cannot do {'; '.join(map(str, reasons.values()))}. "
                f'attn_implementation="{NAME}" does it by the formula'
            )
        with torch.autocast(q.device.type, enabled=False):
            if reasons:
                _say_once(reasons)
                seen = _seen(seen, runs, causal, Nk, like=q)
                biases = [x[..., :Nk] for x in (bias, position_bias) if x is not None]
                o, p = formula(q, k, v, seen, biases, scale, softcap, dropout)
            else:
                chosen = stage or stage_for(q, k, v, runs)
                o, p = _by_stage(name, chosen, q, k, v, causal, scale, runs), None
        if _open_reports:
            _count(module, None if reasons else chosen, reasons)
        return o.transpose(1, 2).contiguous(), p if output_attentions else None

    return flashedu_attention


def _as_autocast_would(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _read(
    mask: torch.Tensor | None, q: torch.Tensor, Nk: int
) -> tuple[Runs | None, torch.Tensor | None, torch.Tensor | None]:
    """The runs of a mask; or what it shows, if it has holes; or what it adds to the scores."""
    if mask is None:
        return None, None, None
    B, H, Nq, _ = q.shape
    fits = mask.ndim == 4 and all(
        n in (1, size) for n, size in zip(mask.shape[:3], (B, H, Nq), strict=True)
    )
    if not fits:
        raise ValueError(
            f"attention_mask must be (B, 1, Nq, Nk) = {(B, 1, Nq, Nk)}, got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.int32 and mask.shape[3] == 2:
        return Runs(*mask[:, 0].expand(B, Nq, 2).unbind(-1)), None, None
    if mask.shape[3] < Nk and mask.shape[3] != 1:
        raise ValueError(
            f"attention_mask must have a column for each of {Nk} keys, got {tuple(mask.shape)} of "
            f"{dtype_name(mask)}; the model may have changed what FlashEdu's mask function made"
        )
    mask = mask[..., :Nk]
    if mask.is_floating_point():
        return None, None, mask
    if mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be bool or of floats, got {dtype_name(mask)}")
    runs = runs_of(mask.expand(B, -1, Nq, Nk))
    return runs, mask if runs is None else None, None


def stage_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs | None) -> str:
    """The name of the stage that is quick where the tensors are."""
    if not q.is_cuda or "flash2" not in _loaded or dtype_name(q) not in rung("flash2").dtypes:
        return "online"
    major = torch.cuda.get_device_properties(q.device).major
    if q.dtype == torch.bfloat16 and major < 8:
        return "online"
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not gradients and q.shape[2] * (q.shape[1] // k.shape[1]) <= FEW_ROWS:
        return "decode"
    if runs is not None:
        return "varlen"
    flash3, longest = rung("flash3"), max(q.shape[3], v.shape[3])
    takes = dtype_name(q) in flash3.dtypes and longest <= flash3.largest_D
    return "flash3" if takes and major == 9 and "flash3" in _loaded else "flash2"


def _by_stage(
    name: str,
    stage: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    runs: Runs | None,
) -> torch.Tensor:
    """o (B, H, Nq, D of v). Zeros make q and k as long as v, or v as long as them."""
    how: dict[str, Any] = {} if runs is None else {"runs": runs}
    if how and not rung(stage).runs:
        with_runs = ", ".join(n for n, s in NAMES.items() if s and rung(s).runs)
        raise ValueError(
            f"attention_mask must be None for {name}, whose stage takes no mask but the causal "
            f"one, got a mask: {NAME}, {with_runs} take it"
        )
    D, Dv = q.shape[3], v.shape[3]
    longest = max(D, Dv)
    q, k, v = (
        x if x.shape[3] == longest else F.pad(x, (0, longest - x.shape[3])) for x in (q, k, v)
    )
    o: torch.Tensor = _stage(stage)(q, k, v, causal=causal, scale=scale, **how)[0]
    return o[..., :Dv]


_loaded: dict[str, Callable[..., Any]] = {}


def _stage(name: str) -> Callable[..., Any]:
    """A stage's function. Raises RuntimeError or ImportError if it cannot run here."""
    if name not in _loaded:
        missing = rung(name).missing()
        if missing is not None:
            raise RuntimeError(f"{missing}; {NAME}:online runs here")
        attention = rung(name).load().attention_with_lse
        if not rung(name).is_triton:  # no operator: torch.compile would look inside
            attention = torch.compiler.disable(attention, reason="a stage in PyTorch, for reading")
        _loaded[name] = attention
    return _loaded[name]


# the slower path


def formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    biases: list[torch.Tensor],
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard attention, its softmax in float32: o (B, H, Nq, D), p (B, H, Nq, Nk).

    seen: True where a query sees a key, or None. A query that sees none gives 0, as the stages say.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = scale * (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    for bias in biases:
        s = s + bias
    if seen is not None:
        s = s.masked_fill(~seen, torch.finfo(s.dtype).min)
    p = torch.softmax(s, -1)
    if seen is not None:
        p = p * seen.any(-1, keepdim=True)
    p = F.dropout(p.to(v.dtype), dropout)
    return p @ v, p


def _seen(
    seen: torch.Tensor | None, runs: Runs | None, causal: bool, Nk: int, like: torch.Tensor
) -> torch.Tensor | None:
    if runs is not None:
        return runs.mask(Nk)
    if causal:
        return torch.ones(Nk, Nk, dtype=torch.bool, device=like.device).tril()
    return seen


_said: set[str] = set()


@torch.compiler.disable(reason="FlashEdu says that it takes a slower path")
def _say_once(reasons: dict[str, Any]) -> None:
    for reason, what in reasons.items():
        if reason not in _said:
            _said.add(reason)
            warnings.warn(
                SlowerPath(
                    f"no stage of FlashEdu does this, so it takes the formula, slower and with a "
                    f"matrix of Nq × Nk: {what}"
                ),
                stacklevel=4,
            )


# the proof


class Report:
    """Which attention of a model ran FlashEdu, and which did not.

    calls: module's name → calls of FlashEdu. stages: name → stage → calls. slower: name → reason →
    calls that took the formula. other: name of an attention module without a call → what it did.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        self.stages: dict[str, Counter[str]] = {}
        self.slower: dict[str, Counter[str]] = {}
        self.model = model
        self._names = {id(m): n.removeprefix("_orig_mod.") for n, m in model.named_modules()}
        self._classes = {self._names[id(m)]: type(m).__name__ for m in model.modules()}
        self._entered: Counter[str] = Counter()  # calls of attention modules, whatever they did
        self._handles: list[Any] = []

    def __enter__(self) -> Report:
        for module in self.model.modules():
            name = self._names[id(module)]
            if module is self.model or name in self._attention_modules:
                hook = functools.partial(self._enter, name)
                self._handles.append(module.register_forward_pre_hook(hook))
        _open_reports.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _open_reports.remove(self)
        for handle in self._handles:
            handle.remove()
        if kind is None and not self.calls and self._told:
            raise NotCalled(self._why_not())

    @property
    def other(self) -> dict[str, str]:
        """Attention modules that made no call of FlashEdu, and what they did instead."""
        return {
            name: "ran something else" if self._entered[name] else "was not seen to run"
            for name in self._attention_modules
            if not any(_within(called, name) or _within(name, called) for called in self.calls)
        }

    def __str__(self) -> str:
        told = ", ".join(sorted(self._told)) or "no FlashEdu"
        rows = [("module", "class", "calls", "what ran")]
        for name, n_calls in self.calls.items():
            ran = [f"{stage} × {n}" for stage, n in self.stages.get(name, {}).items()]
            ran += [f"formula, {reason} × {n}" for reason, n in self.slower.get(name, {}).items()]
            rows.append((name, self._classes[name], str(n_calls), "; ".join(ran)))
        rows += [(name, self._classes[name], "0", what) for name, what in self.other.items()]
        a, b, c, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            [f"{self._class}, told {told}: {self.calls.total()} calls of FlashEdu"]
            + [f"{name:<{a}}  {kind:<{b}}  {n:>{c}}  {ran}" for name, kind, n, ran in rows]
        )

    @functools.cached_property
    def _attention_modules(self) -> list[str]:
        """By the names of their classes, the innermost ones."""
        named = [n for n, kind in self._classes.items() if re.search("Attention", kind)]
        return [n for n in named if not any(_within(m, n) and m != n for m in named)]

    @property
    def _class(self) -> str:
        return type(getattr(self.model, "_orig_mod", self.model)).__name__

    @property
    def _told(self) -> set[str]:
        """The names of FlashEdu that configs of the model have."""
        configs = (getattr(m, "config", None) for m in self.model.modules())
        names = (getattr(c, "_attn_implementation", None) for c in configs)
        return {n for n in names if n in NAMES}

    def _enter(self, name: str, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._entered[name] += 1

    def _count(self, module: torch.nn.Module, stage: str | None, reasons: dict[str, Any]) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        self.calls[name] += 1
        if stage is not None:
            self.stages.setdefault(name, Counter())[stage] += 1
        if reasons:
            self.slower.setdefault(name, Counter()).update(list(reasons))

    def _why_not(self) -> str:
        told = f'{self._class} was told attn_implementation="{min(self._told)}"'
        if not self._entered:
            return f"{told}, and did not run inside the block: call it, or generate, in there"
        return (
            f"{told} and made no call of it: its attention is its own, and ignores the setting. "
            "Take a model class that dispatches, or leave the setting out"
        )


def attention_report(model: torch.nn.Module) -> Report:
    """Count the calls that a model makes to FlashEdu while the block runs.

    Raises NotCalled at the end if the model was told FlashEdu and made none.
    """
    return Report(model)


_open_reports: list[Report] = []


@torch.compiler.disable(reason="FlashEdu counts its calls")
def _count(module: torch.nn.Module, stage: str | None, reasons: dict[str, Any]) -> None:
    for report in _open_reports:
        report._count(module, stage, reasons)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.") or outer == ""
