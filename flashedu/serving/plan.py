"""How a card's memory is spent when a model is served: each term with the formula that gives it.

Four things share the card. Weights and the cache of keys and values stay; attention's workspace and
the activations come and go. Three moments of a prefill are candidates for the peak:

- attention: the hidden states three times (the embeddings, which the model keeps; the layer's
  input; its norm), q, and the workspace. Keys and values are in the cache by then.
- MLP: the hidden states four times (a new residual, and the layer's input is still there), gate, up
  and their product. Standard attention's P is still there too: the layer keeps what attention
  returned until it ends.
- logits: of the last token of each sequence, and their float32 copy.

Standard attention is `eager_attention_forward` of Transformers, which holds S, a float32 softmax
and P. On CUDA the softmax reads float16 as it is, but bfloat16 only by way of a float32 copy, so
that bfloat16 takes 10 bytes a score and float16 8. Flash attention holds o and lse.

A contiguous cache has room for N keys of each sequence. Transformers' DynamicCache grows it by
concatenation: in each decode step one layer's keys are there twice. Pages hold what is used, and
are written in place.

These are bytes that PyTorch's allocator hands out. CUDA's context, the libraries' workspaces and
what the allocator keeps for later come on top. `test_plan.py` holds the terms against the live
tensors of a Llama.

Source: transformers 5.24.0, models/llama/modeling_llama.py and cache_utils.py; PyTorch 2.13,
aten/src/ATen/native/SoftMax.cpp; PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from flashedu.memory.gpus import GPU
from flashedu.memory.problem import ITEM_BYTES
from flashedu.pages import idle_in_contiguous, idle_in_pages

ATTENTION = ("standard", "flash")
CACHES = ("contiguous", "pages")
DTYPES = ("float16", "bfloat16", "float32")
# Standard attention's bytes a score at its peak. float16: S, the softmax in float32, P.
# bfloat16: S, its float32 copy, the softmax. float32: S, the softmax.
SCORE_BYTES = {"float16": "2 + 4 + 2", "bfloat16": "2 + 4 + 4", "float32": "4 + 4"}


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder that is built as Llama is.

    `parameters` is None for a Llama, whose parameters follow from the sizes; `window` is the most
    keys that a layer with a sliding window sees; `note` says what else is not as in Llama.
    """

    name: str
    layers: int
    hidden: int
    H: int
    H_kv: int
    D: int
    intermediate: int
    vocabulary: int
    parameters: int | None = None
    window: int | None = None
    note: str = ""

    @property
    def parameters_by_hand(self) -> Term:
        """Embeddings and head; in each layer q, o, k, v, gate, up, down and two norms; a norm."""
        if self.parameters is not None:
            return Term(self.parameters, f"{self.parameters:,} counted in its modules")
        C, layer = f"{self.hidden:,}", f"2 × {self.H} × {self.D}"
        if self.H_kv != self.H:
            layer += f" + 2 × {self.H_kv} × {self.D}"
        else:
            layer = f"4 × {self.H} × {self.D}"
        return _term(
            f"2 × {self.vocabulary:,} × {C} + {self.layers} layers × "
            f"({C} × ({layer} + 3 × {self.intermediate:,}) + 2 × {C}) + {C}"
        )


# Sizes: the config.json of each model.
MODELS = {
    "llama2-7b": Model("Llama 2 7B", 32, 4096, 32, 32, 128, 11008, 32000),
    "llama2-13b": Model("Llama 2 13B", 40, 5120, 40, 40, 128, 13824, 32000),
    "llama2-70b": Model("Llama 2 70B", 80, 8192, 64, 8, 128, 28672, 32000),
    "llama3-8b": Model("Llama 3 8B", 32, 4096, 32, 8, 128, 14336, 128256),
    "mistral-7b": Model("Mistral 7B v0.3", 32, 4096, 32, 8, 128, 14336, 32768),
}


def model_of(name: str) -> Model:
    """The model of a key of MODELS, or of a config of Transformers.

    A config is a folder with a config.json, that file, a name in the local Hub cache, or a type or
    class of Transformers. Nothing is downloaded. Raises ValueError for one that is none, or whose
    cache is not keys and values of every head and layer; ImportError if Transformers is missing.
    """
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    from flashedu.serving.sizes import sizes_of

    return sizes_of(name)


@dataclass(frozen=True)
class Term:
    """Bytes (or, once, parameters), and the formula with its numbers."""

    n_bytes: int
    by_hand: str


def _term(by_hand: str) -> Term:
    """The value of what is printed: numbers, +, × and brackets; words only explain."""
    return Term(evaluate(by_hand), by_hand)


def evaluate(by_hand: str) -> int:
    """Recompute a formula as a reader would: words and units left out, commas in numbers too."""
    kept = [c for c in by_hand.replace(",", "").replace("×", "*") if c in "0123456789+*()"]
    value = eval("".join(kept), {"__builtins__": {}})  # of digits and +*() only
    return int(value)


@dataclass(frozen=True)
class Moment:
    """What a moment of a prefill holds beside weights and cache."""

    name: str
    attention: Term
    activations: Term

    @property
    def n_bytes(self) -> int:
        return self.attention.n_bytes + self.activations.n_bytes


@dataclass(frozen=True)
class Plan:
    """Where the memory of a card goes. `attention_bytes` and `activations_bytes` are those of the
    largest moment of the prefill."""

    model: Model
    gpu: GPU
    N: int
    B: int
    attention: str
    cache: str
    page_size: int
    dtype: str
    memory: float
    used: int
    step_tokens: int | None  # the most of a step of the prefill; None: all of the batch
    weights: Term
    kv_cache: Term
    moments: tuple[Moment, ...]
    decode: Term  # beside weights and cache

    @property
    def largest_moment(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.n_bytes)

    @property
    def weights_bytes(self) -> int:
        return self.weights.n_bytes

    @property
    def kv_cache_bytes(self) -> int:
        return self.kv_cache.n_bytes

    @property
    def attention_bytes(self) -> int:
        return self.largest_moment.attention.n_bytes

    @property
    def activations_bytes(self) -> int:
        return self.largest_moment.activations.n_bytes

    @property
    def prefill_bytes(self) -> int:
        """The peak of a prefill of N tokens for each sequence."""
        return self.weights_bytes + self.kv_cache_bytes + self.largest_moment.n_bytes

    @property
    def decode_bytes(self) -> int:
        """The peak of the decode step that writes the last key."""
        return self.weights_bytes + self.kv_cache_bytes + self.decode.n_bytes

    @property
    def peak_bytes(self) -> int:
        return max(self.prefill_bytes, self.decode_bytes)

    @property
    def usable_bytes(self) -> int:
        """The part of the card that may be used; a card's bytes are those of its data sheet."""
        return int(self.memory * self.gpu.hbm_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def idle_contiguous_bytes(self) -> int:
        """Of a contiguous cache, what holds no key once each sequence has `used` of N."""
        return self.B * (self.N - self.used) * self._key_bytes

    @property
    def idle_pages_bytes(self) -> int:
        """The same of pages: the end of each last one."""
        return self.B * (-self.used % self.page_size) * self._key_bytes

    @property
    def idle_contiguous(self) -> float:
        """As a share of the cache."""
        return idle_in_contiguous([self.used], self.N)

    @property
    def idle_pages(self) -> float:
        return idle_in_pages([self.used], self.page_size)

    @property
    def _key_bytes(self) -> int:
        """Of one token's keys and values in all layers."""
        m = self.model
        return 2 * m.layers * m.H_kv * m.D * ITEM_BYTES[self.dtype]

    @property
    def parts(self) -> dict[str, int]:
        """What stands on the card at the peak of the prefill, from the bottom up."""
        return {
            "weights": self.weights_bytes,
            "KV cache": self.kv_cache_bytes,
            "attention": self.attention_bytes,
            "activations": self.activations_bytes,
        }

    def replace(self, **changes: Any) -> Plan:
        """The plan with some arguments changed."""
        names = ("model", "gpu", "N", "B", "attention", "cache", "page_size", "dtype", "memory",
                 "used", "step_tokens")  # fmt: skip
        return plan(**({name: getattr(self, name) for name in names} | changes))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": {**dataclasses.asdict(self.model),
                      "parameters": self.model.parameters_by_hand.n_bytes},
            "gpu": {"key": self.gpu.key, "name": self.gpu.name, "hbm_bytes": self.gpu.hbm_bytes},
            **{name: getattr(self, name) for name in (
                "N", "B", "attention", "cache", "page_size", "dtype", "memory", "used",
                "step_tokens", "weights_bytes", "kv_cache_bytes", "attention_bytes",
                "activations_bytes", "prefill_bytes", "decode_bytes", "peak_bytes", "usable_bytes",
                "fits", "idle_contiguous_bytes", "idle_contiguous", "idle_pages_bytes",
                "idle_pages")},
            "peak_share_of_card": self.peak_bytes / self.gpu.hbm_bytes,
            "largest_batch": largest_batch(self),
            "largest_moment": self.largest_moment.name,
            "by_hand": {
                "parameters": self.model.parameters_by_hand.by_hand,
                "weights": self.weights.by_hand,
                "kv_cache": self.kv_cache.by_hand,
                "moments": [
                    {"moment": m.name,
                     "attention_bytes": m.attention.n_bytes, "attention": m.attention.by_hand,
                     "activations_bytes": m.activations.n_bytes,
                     "activations": m.activations.by_hand}
                    for m in self.moments
                ],
                "decode": self.decode.by_hand,
            },
        }  # fmt: skip


def plan(
    model: Model,
    gpu: GPU,
    *,
    N: int,
    B: int,
    attention: str = "standard",
    cache: str = "contiguous",
    page_size: int = 16,
    dtype: str = "float16",
    memory: float = 1.0,
    used: int | None = None,
    step_tokens: int | None = None,
) -> Plan:
    """The memory that B sequences of up to N keys take.

    attention: "standard" or "flash". cache: "contiguous" or "pages" of page_size keys, which only
    flash attention reads. memory: the share of the card that may be used. used: keys that a
    sequence really has, N if None; pages hold those only. step_tokens: the most tokens that a step
    of the prefill computes, all B · N if None: servers split a prefill. Raises ValueError.
    """
    for name, n in (("N", N), ("B", B), ("page_size", page_size)):
        if n < 1:
            raise ValueError(f"{name} must be 1 or more, got {n}")
    for name, value, known in (
        ("attention", attention, ATTENTION),
        ("cache", cache, CACHES),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not 0 < memory <= 1:
        raise ValueError(f"memory must be above 0 and at most 1, got {memory:g}")
    if dtype == "bfloat16" and gpu.compute_capability < (8, 0):
        raise ValueError(f"dtype must not be bfloat16 for {gpu.name}, which has none")
    if cache == "pages" and attention == "standard":
        raise ValueError("cache must be contiguous for standard attention, which reads no pages")
    if model.window is not None and model.window < N:
        raise ValueError(
            f"N must be at most {model.window} for {model.name}, got {N}: some of its layers keep "
            "a window of that many keys, and a plan counts all"
        )
    used = N if used is None else used
    if not 1 <= used <= N:
        raise ValueError(f"used must be from 1 to N, {N}, got {used}")
    tokens = B * N if step_tokens is None else step_tokens
    if tokens < 1:
        raise ValueError(f"step_tokens must be 1 or more, got {step_tokens}")
    tokens = min(tokens, B * N)

    m, b = model, ITEM_BYTES[dtype]
    keys = f"{N:,} keys"
    if cache == "pages":
        keys = f"{math.ceil(used / page_size):,} pages × {page_size:,} keys"
    return Plan(
        model, gpu, N, B, attention, cache, page_size, dtype, memory, used, step_tokens,
        weights=_term(f"{m.parameters_by_hand.n_bytes:,} parameters × {b} B"),
        kv_cache=_term(
            f"2 × {m.layers} layers × {B:,} sequences × {keys} × {m.H_kv} heads × {m.D} × {b} B"
        ),
        moments=_moments(m, N, B, attention, tokens, dtype),
        decode=_decode(m, N, B, attention, cache, dtype),
    )  # fmt: skip


def _moments(
    m: Model, N: int, B: int, attention: str, tokens: int, dtype: str
) -> tuple[Moment, ...]:
    b, T = ITEM_BYTES[dtype], f"{tokens:,} tokens"
    scores, mask = f"{T} × {m.H} heads × {N:,} keys", f" + {T} × {N:,} keys × {b} B of mask"
    if attention == "standard":
        inside = f"{scores} × ({SCORE_BYTES[dtype]}) B{mask}{_repeated(m, N, B, b)}"
        after = f"{scores} × {b} B{mask}"
    else:
        inside, after = f"{T} × {m.H} heads × ({m.D} × {b} B of o + 4 B of lse)", "0"
    C = f"{m.hidden:,} hidden"
    return (
        Moment("attention", _term(inside), _term(f"{T} × (3 × {C} + {m.H} × {m.D} of q) × {b} B")),
        Moment("MLP", _term(after), _term(f"{T} × (4 × {C} + 3 × {m.intermediate:,}) × {b} B")),
        Moment("logits", _term("0"), _term(_logits(m, B, b))),
    )


def _decode(m: Model, N: int, B: int, attention: str, cache: str, dtype: str) -> Term:
    """The largest of what a step with one new token holds beside weights and cache."""
    b = ITEM_BYTES[dtype]
    held = [_term(_logits(m, B, b))]
    if cache == "contiguous":
        grown = f"{B:,} sequences × {N:,} keys × {m.H_kv} heads × {m.D} × {b} B"
        held.append(_term(f"{grown}, one layer's keys as they grow"))
    if attention == "standard":
        scores = f"{B:,} queries × {m.H} heads × {N:,} keys × ({SCORE_BYTES[dtype]}) B"
        held.append(_term(scores + _repeated(m, N, B, b)))
    return max(held, key=lambda term: term.n_bytes)


def _logits(m: Model, B: int, b: int) -> str:
    return f"{B:,} sequences × {m.vocabulary:,} logits × ({b} + 4) B"


def _repeated(m: Model, N: int, B: int, b: int) -> str:
    """Standard attention copies the keys and values of a group for each of its query heads."""
    if m.H_kv == m.H:
        return ""
    return f" + 2 × {B:,} sequences × {N:,} keys × {m.H} heads × {m.D} × {b} B repeated k, v"


def largest_batch(of: Plan) -> int:
    """The most sequences for which the plan still fits; 0 if not even one does."""
    low, high = 0, 1
    while high <= 2**30 and of.replace(B=high).fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of.replace(B=middle).fits else (low, middle)
    return low
