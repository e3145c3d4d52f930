"""What is measured: the sections of a run, and the cases of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from flashedu.memory import Problem
from flashedu.memory.problem import ITEM_BYTES
from flashedu.stages import RUNGS

PEERS = {  # name → as a reader knows it
    "flash2": "flash2",
    "flash3": "flash3",
    "flash1": "flash1",
    "standard": "standard",
    "sdpa-flash": "SDPA flash",
    "sdpa-cudnn": "SDPA cuDNN",
    "sdpa-efficient": "SDPA efficient",
    "flex": "Flex",
    "fa4": "FA4",
    "sdpa-math": "SDPA math",
    "flash3-det": "flash3 det.",  # deterministic
    "decode": "decode",
    "copy": "copy",
    "paged-16": "paged 16",
    "paged-64": "paged 64",
    "paged-256": "paged 256",
    "varlen": "varlen",
    "padded": "padded SDPA",
    "padded-flash2": "padded flash2",
    "padded-mask": "padded mask",
    "unmasked": "padded unmasked",
    "one-by-one": "one by one",
    "torch-varlen": "torch varlen",
    "hf-flashedu": "FlashEdu",
    "hf-sdpa": "sdpa",
    "hf-eager": "eager",
}
AT_SPEED = ("flash2", "flash3", "flash1", "standard", "sdpa-flash", "sdpa-cudnn",
            "sdpa-efficient", "flex", "fa4", "sdpa-math", "flash3-det")  # fmt: skip
FORWARD_ONLY = {r.name for r in RUNGS if not r.backward}
BACKWARD_ONLY = {"flash3-det"}  # its forward is flash3's
USUAL = tuple(name for name in AT_SPEED if name not in ("sdpa-math", "flash3-det"))
DRAWN = (*AT_SPEED, "decode", "copy")  # in figures
HIDDEN = 2048  # H · D
PASSES = {"fwd": "forward", "bwd": "backward", "both": "forward and backward"}
MODEL_PASSES = {"fwd": "forward", "prefill": "the first token", "generate": "all tokens"}
TIMES_FORWARD = {"fwd": 1.0, "bwd": 2.5, "both": 3.5}  # in FLOPs
MASKS = {False: "full", True: "causal"}


@dataclass(frozen=True)
class Case:
    """One size, one pass, and the peers to time on it.

    `mode`: "queued", the host runs ahead of the GPU; "direct", the GPU waits for the host's
    launches; "graph", a CUDA graph replays them. `timed` is False where only memory is measured.
    `lengths`: of sequences that lie one behind another, each of which attends to itself; () for one
    sequence a batch. `drawn_from`: their seed.
    """

    section: str
    problem: Problem
    pass_: str
    peers: tuple[str, ...]
    mode: str = "queued"
    timed: bool = True
    lengths: tuple[int, ...] = ()
    drawn_from: int | None = None

    @property
    def flops(self) -> float:
        """4·B·H·Nq·Nk·D forward, half of it if causal; backward 2.5 times the forward."""
        p = self.problem
        scores = sum(n * n for n in self.lengths) or p.Nq * p.Nk
        return TIMES_FORWARD[self.pass_] * 4 * p.B * p.H * scores * p.D / (2 if p.causal else 1)

    @property
    def bytes(self) -> int:
        """What a forward must move: q, k and v to the chip and o back, each once."""
        p = self.problem
        return 2 * p.B * (p.H * p.Nq + p.H_kv * p.Nk) * p.D * p.item_bytes

    @property
    def sizes(self) -> dict[str, Any]:
        """As a record has them."""
        names = ("B", "H", "H_kv", "Nq", "D", "dtype", "causal")
        sizes = {**{name: getattr(self.problem, name) for name in names}, "N": self.problem.Nk}
        if self.lengths:
            sizes |= {"lengths": list(self.lengths), "lengths_seed": self.drawn_from}
        return sizes

    def __str__(self) -> str:
        p = self.problem
        N = f"N {p.Nq}" if p.Nq == p.Nk else f"Nq {p.Nq} Nk {p.Nk}"
        sizes = f"B {p.B} H {p.H} {N} D {p.D} {p.dtype} {MASKS[p.causal]}"
        return f"{self.section}: {self.pass_} {sizes} {self.mode}"


@dataclass(frozen=True)
class ModelCase:
    """A Llama of these sizes with random weights, one pass, and the attentions to time in it.

    Its pass: "fwd" is a forward over N tokens, to the last hidden states. "prefill" generates one
    token after prompts of N, N − `shorter`, N − 2 · `shorter` …, padded on the left; "generate"
    generates `new_tokens`.
    """

    section: str
    pass_: str
    peers: tuple[str, ...]
    B: int
    N: int
    H: int
    H_kv: int
    D: int
    layers: int
    intermediate: int
    vocabulary: int
    dtype: str
    new_tokens: int = 0
    shorter: int = 0
    mode: str = "queued"
    timed: bool = True

    @property
    def flops(self) -> float:
        """Of a forward over the prompt: two for each weight and token, and causal attention."""
        hidden, tokens = self.H * self.D, self.B * self.N
        projections = hidden * self.D * (2 * self.H + 2 * self.H_kv)
        weights = self.layers * (projections + 3 * hidden * self.intermediate)
        return 2.0 * weights * tokens + self.layers * 2 * self.H * tokens * self.N * self.D

    @property
    def bytes(self) -> int:
        """What a token must bring to the chip: each layer's weights, and k and v of its prompt."""
        hidden = self.H * self.D
        weights = hidden * (self.D * (2 * self.H + 2 * self.H_kv) + 3 * self.intermediate)
        cache = 2 * self.B * self.N * self.H_kv * self.D
        return self.layers * (weights + cache) * ITEM_BYTES[self.dtype]

    @property
    def sizes(self) -> dict[str, Any]:
        """As a record has them."""
        own = ("section", "pass_", "peers", "mode", "timed")
        mine = {name: x for name, x in vars(self).items() if name not in own}
        return {**mine, "Nq": self.N, "causal": True}

    def __str__(self) -> str:
        new = f" and {self.new_tokens} more" if self.new_tokens else ""
        sizes = f"B {self.B} N {self.N}{new} heads {self.H}/{self.H_kv} {self.layers} layers"
        return f"{self.section}: {self.pass_} {sizes} {self.dtype} {self.mode}"


AnyCase = Case | ModelCase


@dataclass(frozen=True)
class Choice:
    """What the user asked for. `d`, `n`, `tokens` and `passes` are those of the speed section."""

    d: tuple[int, ...] = (64, 128)
    n: tuple[int, ...] = (512, 1024, 4096, 16384)
    causal: tuple[bool, ...] = (False, True)
    dtype: str = "bfloat16"
    passes: tuple[str, ...] = ("fwd", "bwd")
    tokens: int = 16384  # B · N
    peers: tuple[str, ...] | None = None  # None: those of each section
    quick: bool = False  # small sizes: does it still run?


def plan(choice: Choice, sections: tuple[str, ...]) -> list[AnyCase]:
    """The cases of these sections, in their order. A case without a peer is left out."""
    cases = (case for section in sections for case in SECTIONS[section](choice))
    if choice.peers is None:
        return list(cases)
    wanted = choice.peers
    chosen = (replace(case, peers=tuple(x for x in case.peers if x in wanted)) for case in cases)
    return [case for case in chosen if case.peers]


def shape(choice: Choice, n: int, d: int, causal: bool) -> Problem:
    """As many batches as make up the tokens, as many heads as make up the hidden size."""
    return Problem(B=max(1, choice.tokens // n), H=max(1, HIDDEN // d), Nq=n, D=d,
                   dtype=choice.dtype, causal=causal)  # fmt: skip


def _speed(choice: Choice) -> Iterator[Case]:
    """Every peer, forward and backward."""
    for d in choice.d:
        for causal in choice.causal:
            for n in choice.n:
                for pass_ in choice.passes:
                    peers = AT_SPEED if choice.peers else USUAL
                    other = BACKWARD_ONLY if pass_ == "fwd" else FORWARD_ONLY
                    peers = tuple(name for name in peers if name not in other)
                    yield Case("speed", shape(choice, n, d, causal), pass_, peers)


def _flash1(choice: Choice) -> Iterator[Case]:
    """flash2 beside flash1, forward, from few heads to many."""
    for causal in choice.causal:
        for n in (256,) if choice.quick else (2048, 16384):
            for heads in (1, 4) if choice.quick else (2**i for i in range(10)):
                problem = Problem(H=heads, Nq=n, D=64, dtype=choice.dtype, causal=causal)
                yield Case("flash1", problem, "fwd", ("flash2", "flash1"))


def _memory(choice: Choice) -> Iterator[Case]:
    """Peak memory at the shape of Table 21 of the FlashAttention paper (arXiv 2205.14135)."""
    for n in (512, 1024) if choice.quick else (2**i for i in range(9, 17)):
        problem = Problem(B=16, H=8, Nq=n, D=64, dtype="float16")
        yield Case("memory", problem, "both", ("flash2", "standard", "sdpa-flash"), timed=False)


def _standard(choice: Choice) -> Iterator[Case]:
    """A whole training step of attention beside the standard one."""
    for d in (64, 128):
        problem = shape(choice, 512 if choice.quick else 4096, d, causal=True)
        yield Case("standard", problem, "both", ("flash2", "standard", "sdpa-flash"))


def _short(choice: Choice) -> Iterator[Case]:
    """Short sequences, called directly and replayed as a CUDA graph: the host's share."""
    for d in (64,) if choice.quick else (64, 128):
        for causal in choice.causal:
            for n in (512,) if choice.quick else (512, 1024):
                for pass_ in ("fwd", "bwd"):
                    for mode in ("direct", "graph"):
                        problem = shape(choice, n, d, causal)
                        yield Case("short", problem, pass_, ("flash2", "sdpa-flash", "sdpa-cudnn"),
                                   mode)  # fmt: skip


def _decode(choice: Choice) -> Iterator[Case]:
    """One query a head, 16 heads on 2 key heads, and a long cache; `copy` moves as many bytes."""
    peers = ("decode", "flash2", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "copy")
    for B, n in _caches(choice):
        yield Case("decode", _decoding(choice, B, n), "fwd", peers)


def _flash_decoding(choice: Choice) -> Iterator[Case]:
    """What the article on Flash-Decoding timed (PyTorch blog, October 2023), in its dtype."""
    sizes = ((4, 256), (1, 1024)) if choice.quick else FLASH_DECODING
    for B, n in sizes:
        problem = _decoding(choice, B, n).replace(dtype="float16")
        yield Case("flash-decoding", problem, "fwd", ("decode", "flash2", "standard"))


def _paged(choice: Choice) -> Iterator[Case]:
    """The same caches in pages that lie in any order. Engines know their tables: no check."""
    for B, n in _caches(choice):
        peers = ("decode", "paged-16", "paged-64", "paged-256")
        yield Case("paged", _decoding(choice, B, n), "fwd", peers)


FLASH_DECODING = ((256, 256), (8, 8192), (1, 65536), (1, 131072))  # B, Nk


def _caches(choice: Choice) -> Iterator[tuple[int, int]]:
    for B in (1,) if choice.quick else (1, 8):
        for n in (512, 1024) if choice.quick else (2**i for i in range(13, 18)):
            yield B, n


def _decoding(choice: Choice, B: int, n: int) -> Problem:
    return Problem(B=B, H=16, H_kv=2, Nq=1, Nk=n, D=128, dtype=choice.dtype)


SHORTEST, LONGEST, SEQUENCES = 128, 4096, 32
LENGTHS_SEED = 5


def _varlen(choice: Choice) -> Iterator[Case]:
    """Sequences of different lengths: packed, padded to the longest, and one by one.

    SDPA's flash backend takes no mask. Causal, it needs none: padding lies behind. Otherwise
    another backend takes one, and "unmasked" is what flash would need if padding did no harm.
    """
    seed, longest, count = LENGTHS_SEED, LONGEST, SEQUENCES
    if choice.quick:
        longest, count = 512, 4
    lengths = draw_lengths(seed, SHORTEST, longest, count)
    for d in (128,) if choice.quick else (64, 128):
        for causal in choice.causal:
            padded = ("padded", "padded-flash2") if causal else ("padded-mask", "unmasked")
            problem = Problem(H=16, Nq=sum(lengths), D=d, dtype=choice.dtype, causal=causal)
            for pass_ in ("fwd", "both"):
                peers = ("varlen", *padded, "one-by-one", "torch-varlen")
                yield Case("varlen", problem, pass_, peers, lengths=lengths, drawn_from=seed)


def draw_lengths(seed: int, shortest: int, longest: int, count: int) -> tuple[int, ...]:
    """Lengths of sequences, any as likely as any other."""
    rng = random.Random(seed)
    return tuple(rng.randint(shortest, longest) for _ in range(count))


def _model(choice: Choice) -> Iterator[ModelCase]:
    """A small Llama: a forward over a long text, and tokens written after prompts."""
    peers = ("hf-flashedu", "hf-sdpa", "hf-eager")
    text = ModelCase("model", "fwd", peers, B=1, N=8192, H=16, H_kv=16, D=128, layers=8,
                     intermediate=5632, vocabulary=32000, dtype=choice.dtype)  # fmt: skip
    written = replace(text, B=4, N=2048, H_kv=4, new_tokens=128, shorter=64, mode="direct")
    if choice.quick:
        text, written = (
            replace(x, layers=2, intermediate=512, vocabulary=1000, N=N, new_tokens=n, shorter=16)
            for x, N, n in ((text, 512, 0), (written, 128, 8))
        )
    yield text
    yield replace(text, H_kv=4)
    yield replace(written, pass_="prefill", new_tokens=1)
    yield replace(written, pass_="generate")


SECTIONS: dict[str, Callable[[Choice], Iterator[AnyCase]]] = {
    "speed": _speed,
    "flash1": _flash1,
    "memory": _memory,
    "standard": _standard,
    "short": _short,
    "decode": _decode,
    "flash-decoding": _flash_decoding,
    "paged": _paged,
    "varlen": _varlen,
    "model": _model,
}
