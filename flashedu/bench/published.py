"""What the papers say, beside what was recorded here: ratios, as times belong to a card.

Sources: FlashAttention (arXiv 2205.14135), FlashAttention-2 (arXiv 2307.08691), FlashAttention-3
(arXiv 2407.08608), Flash-Decoding (PyTorch blog, October 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashedu.bench.record import NoRecord, Record, latest
from flashedu.memory import gpu
from flashedu.memory.problem import ITEM_BYTES

Range = tuple[float, float]
NEAR = 0.05  # a ratio within 5% of the published one is the same


@dataclass(frozen=True)
class Claim:
    """A published ratio and ours, each from the lowest to the highest. Higher is better."""

    what: str
    source: str
    published: Range
    ours: Range
    comparable: bool
    why: str  # what to know before comparing

    @property
    def reproduced(self) -> str:
        """ "yes" if all of ours lie in the published range, "more" or "less" if all lie beyond.

        "in part" for anything between, and "another thing" if the two are not of one kind.
        """
        lowest, highest = (1 - NEAR) * self.published[0], (1 + NEAR) * self.published[1]
        low, high = self.ours
        if not self.comparable:
            return "another thing"
        if low > highest or high < lowest:
            return "more" if low > highest else "less"
        return "yes" if lowest <= low and high <= highest else "in part"


def claims(card: str = "H200", *, folder: Path | None = None) -> list[Claim]:
    """The papers' claims beside the newest records of that card. Raises NoRecord if one lacks."""

    def newest(section: str | None = None, kind: str | None = None) -> Record:
        return latest(section, kind=kind, card=card, folder=folder)

    return list(_claims(newest("speed"), newest("memory"), newest("flash1"),
                        newest(kind="traffic"), gpu(card.lower()).tensor_flops_per_s))  # fmt: skip


# B, Nk → µs on an A100: PyTorch's eager formula, FlashAttention 2.0.9, Flash-Decoding. float16, one
# query, 16 heads on 2 key heads, D 128.
FLASH_DECODING = {
    (256, 256): (3058.6, 390.5, 63.4),
    (8, 8192): (3173.1, 529.2, 56.4),
    (1, 65536): (1335.6, 2300.6, 64.4),
    (1, 131072): (2664.0, 4592.2, 106.6),
}


def decoding(card: str = "H100", *, folder: Path | None = None) -> list[Claim]:
    """The article on Flash-Decoding beside the newest record of that card.

    Raises NoRecord if there is none.
    """
    return list(_decoding_claims(latest("flash-decoding", card=card, folder=folder)))


def _decoding_claims(record: Record) -> Iterator[Claim]:
    for (B, N), (eager, flash2, decode) in FLASH_DECODING.items():
        case = _case(record, "flash-decoding", B=B, N=N)
        seconds = {name: _run(case, name)["median_s"] for name in ("standard", "flash2", "decode")}
        for peer, published, whose in (
            ("standard", eager, "the formula in PyTorch"),
            ("flash2", flash2, "theirs is FlashAttention 2.0.9, ours its loops in Triton"),
        ):
            ratio = published / decode
            yield Claim(
                f"time, {peer} / decode, B {B}, {N:,} keys", "Flash-Decoding", (ratio, ratio),
                _range([seconds[peer] / seconds["decode"]]), True,
                f"one query, 16 heads on 2 key heads, D 128; {whose}; theirs on an A100",
            )  # fmt: skip


def _claims(
    speed: Record, memory: Record, flash1: Record, traffic: Record, peak: float
) -> Iterator[Claim]:
    dram = {peer: _dram_bytes(traffic, peer) for peer in ("standard", "flash2")}
    yield Claim(
        "bytes of HBM, standard / flash2", "FlashAttention, Figure 2", (9.2, 9.2),
        _range([dram["standard"] / dram["flash2"]]), True,
        "forward and backward, batch 64, 16 heads, N 1024, D 64; theirs is the first "
        "FlashAttention on an A100",
    )  # fmt: skip
    yield Claim(
        "time, standard / flash2, N 1024", "FlashAttention, Figure 2", (5.7, 5.7),
        _range(_step(speed, "standard", 64, causal, 1024) / _step(speed, "flash2", 64, causal, 1024)
               for causal in (False, True)), True,
        "forward and backward, D 64; ours without and with a causal mask; theirs as above",
    )  # fmt: skip
    for n, published in ((2048, 10.6), (4096, 20.4)):
        yield Claim(
            f"memory, standard / flash2, N {n}", "FlashAttention, Table 21",
            (published, published),
            _range([_memory(memory, "standard", n) / _memory(memory, "flash2", n)]), True,
            "batch 16, 8 heads, D 64; q, k, v and do included",
        )  # fmt: skip
    yield Claim(
        "memory of flash2, N 65,536 / 1024", "FlashAttention, Table 21", (64.0, 64.0),
        _range([_memory(memory, "flash2", 65536) / _memory(memory, "flash2", 1024)]), True,
        "64 times the length: linear in N",
    )  # fmt: skip
    for causal, mask in ((False, "no mask"), (True, "causal")):
        sizes = sorted({(c["D"], c["N"]) for c in speed.cases("speed", causal=causal)})
        steps = {peer: [_step(speed, peer, D, causal, n) for D, n in sizes]
                 for peer in ("standard", "flash2")}  # fmt: skip
        ratios = {size: slow / fast
                  for size, slow, fast in zip(sizes, *steps.values(), strict=True)}  # fmt: skip
        lengths = sorted({n for _, n in sizes})
        least = min(ratios, key=lambda size: ratios[size])
        yield Claim(
            f"speed, flash2 / standard, {mask}", "FlashAttention-2", (3.0, 10.0),
            _range(ratios.values()), True,
            f"forward and backward, N {lengths[0]:,} to {lengths[-1]:,}; the least is at "
            f"D {least[0]} and N {least[1]:,}",
        )  # fmt: skip
    yield Claim(
        "speed, flash2 / flash1", "FlashAttention-2", (1.7, 3.0),
        _range(run["times_as_fast_as"]["flash1"][0] for case in flash1.cases("flash1")
               for run in case["runs"] if run["peer"] == "flash2"), False,
        "forward; ours beside a kernel with the first paper's loops, theirs beside its tuned code",
    )  # fmt: skip
    best = max(run["tflops"] for case in speed.cases("speed") for run in case["runs"]
               if run["peer"] == "flash2")  # fmt: skip
    yield Claim(
        "share of the card's peak, flash2", "FlashAttention-2", (0.73, 0.73),
        _range([best * 1e12 / peak]), True,
        "at best; theirs 230 of an A100's 312 TFLOP/s, ours on a card three times as fast",
    )  # fmt: skip
    long = _case(speed, "speed", D=128, causal=False, N=16384, **{"pass": "fwd"})
    yield Claim(
        "TFLOP/s, flash2 / FlashAttention-3", "FlashAttention-3", (1.0, 1.0),
        _range([_run(long, "flash2")["tflops"] / 648]), True,
        "forward, N 16,384, D 128; theirs 648 on an H100, whose processor is that of an H200",
    )  # fmt: skip


def _range(values: Any) -> Range:
    found = list(values)
    return min(found), max(found)


def _case(record: Record, section: str, **sizes: Any) -> dict[str, Any]:
    """The only case of these sizes. Raises NoRecord if there is none, or if it did not run."""
    found = record.cases(section, **sizes)
    if len(found) != 1:
        text = ", ".join(f"{name} {size}" for name, size in sizes.items())
        many = "more than one" if found else "no"
        raise NoRecord(f"{record.path.name} has {many} case of {section} with {text}")
    _ran(found[0])
    return found[0]


def _run(case: dict[str, Any], peer: str) -> dict[str, Any]:
    found: dict[str, Any] = next(run for run in case["runs"] if run["peer"] == peer)
    _ran(found, f"{peer}, N {case['N']}: ")
    return found


def _ran(recorded: dict[str, Any], what: str = "") -> None:
    if recorded.get("why"):
        raise NoRecord(f"there is no ratio without a number: {what}{recorded['why']}")


def _step(speed: Record, peer: str, D: int, causal: bool, N: int) -> float:
    """Seconds of forward and backward."""
    passes = [_case(speed, "speed", D=D, causal=causal, N=N, **{"pass": x}) for x in ("fwd", "bwd")]
    return sum(_run(case, peer)["median_s"] for case in passes)


def _memory(memory: Record, peer: str, N: int) -> int:
    """Peak bytes of forward and backward, with q, k, v and do, which were there before."""
    case = _case(memory, "memory", N=N)
    inputs = 4 * case["B"] * case["H"] * N * case["D"] * ITEM_BYTES[case["dtype"]]
    return int(_run(case, peer)["extra_bytes"]) + inputs


def _dram_bytes(traffic: Record, peer: str) -> int:
    """Read and written, forward and backward, without a mask."""
    sizes = {"peer": peer, "causal": False, "B": 64, "H": 16, "N": 1024, "D": 64}
    return sum(
        run["dram_read_bytes"] + run["dram_write_bytes"]
        for pass_ in ("fwd", "bwd")
        for run in _case(traffic, "peers", **sizes, **{"pass": pass_})["runs"]
    )
