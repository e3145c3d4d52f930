"""What is measured: the sections of a run, and the cases of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flashedu.memory import Problem

PEERS = {  # name → as a reader knows it
    "flash2": "flash2",
    "flash1": "flash1",
    "standard": "standard",
    "sdpa-flash": "SDPA flash",
    "sdpa-cudnn": "SDPA cuDNN",
    "sdpa-efficient": "SDPA efficient",
    "flex": "Flex",
    "sdpa-math": "SDPA math",
    "decode": "decode",
    "copy": "copy",
}
AT_SPEED = tuple(name for name in PEERS if name not in ("decode", "copy"))
USUAL = tuple(name for name in AT_SPEED if name != "sdpa-math")
HIDDEN = 2048  # H · D
PASSES = {"fwd": "forward", "bwd": "backward", "both": "forward and backward"}
TIMES_FORWARD = {"fwd": 1.0, "bwd": 2.5, "both": 3.5}  # in FLOPs
MASKS = {False: "full", True: "causal"}


@dataclass(frozen=True)
class Case:
    """One size, one pass, and the peers to time on it.

    `mode`: "queued", the host runs ahead of the GPU; "direct", the GPU waits for the host's
    launches; "graph", a CUDA graph replays them. `timed` is False where only memory is measured.
    """

    section: str
    problem: Problem
    pass_: str
    peers: tuple[str, ...]
    mode: str = "queued"
    timed: bool = True

    @property
    def flops(self) -> float:
        """4·B·H·Nq·Nk·D forward, half of it if causal; backward 2.5 times the forward."""
        p = self.problem
        return (
            TIMES_FORWARD[self.pass_] * 4 * p.B * p.H * p.Nq * p.Nk * p.D / (2 if p.causal else 1)
        )

    @property
    def bytes(self) -> int:
        """What a forward must move: q, k and v to the chip and o back, each once."""
        p = self.problem
        return 2 * p.B * (p.H * p.Nq + p.H_kv * p.Nk) * p.D * p.item_bytes

    def __str__(self) -> str:
        p = self.problem
        N = f"N {p.Nq}" if p.Nq == p.Nk else f"Nq {p.Nq} Nk {p.Nk}"
        sizes = f"B {p.B} H {p.H} {N} D {p.D} {p.dtype} {MASKS[p.causal]}"
        return f"{self.section}: {self.pass_} {sizes} {self.mode}"


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


def plan(choice: Choice, sections: tuple[str, ...]) -> list[Case]:
    """The cases of these sections, in their order. A case without a peer is left out."""
    cases = (case for section in sections for case in SECTIONS[section](choice))
    if choice.peers is None:
        return list(cases)
    chosen = (
        Case(**{**vars(case), "peers": tuple(x for x in case.peers if x in choice.peers)})
        for case in cases
    )
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
                    peers = tuple(x for x in peers if x != "flash1" or pass_ == "fwd")
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
    for B in (1,) if choice.quick else (1, 8):
        for n in (512, 1024) if choice.quick else (2**i for i in range(13, 18)):
            problem = Problem(B=B, H=16, H_kv=2, Nq=1, Nk=n, D=128, dtype=choice.dtype)
            yield Case("decode", problem, "fwd", peers)


SECTIONS: dict[str, Callable[[Choice], Iterator[Case]]] = {
    "speed": _speed,
    "flash1": _flash1,
    "memory": _memory,
    "standard": _standard,
    "short": _short,
    "decode": _decode,
}
