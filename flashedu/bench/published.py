"""What the papers say, beside what was recorded here: ratios, as times belong to a card.

Sources: FlashAttention (arXiv 2205.14135), FlashAttention-2 (arXiv 2307.08691), FlashAttention-3
(arXiv 2407.08608).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashedu.bench.record import NoRecord, Record, latest
from flashedu.memory import gpu

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


def _claims(
    speed: Record, memory: Record, flash1: Record, traffic: Record, peak: float
) -> Iterator[Claim]:
    dram = {peer: _dram_bytes(traffic, peer) for peer in ("standard", "flash2")}
    yield Claim(
        "bytes of GPU memory, standard / flash", "FlashAttention, Figure 2", (9.2, 9.2),
        _range([dram["standard"] / dram["flash2"]]), True,
        "forward and backward, batch 64, 16 heads, N 1024, D 64; theirs on an A100",
    )  # fmt: skip
    yield Claim(
        "time, standard / flash, N 1024", "FlashAttention, Figure 2", (5.7, 5.7),
        _range(_step(speed, "standard", 64, causal, 1024) / _step(speed, "flash2", 64, causal, 1024)
               for causal in (False, True)), True,
        "forward and backward, D 64; ours without and with a causal mask",
    )  # fmt: skip
    yield Claim(
        "memory, standard / flash, N 2048", "FlashAttention, Table 21", (10.6, 10.6),
        _range([_extra(memory, "standard", 2048) / _extra(memory, "flash2", 2048)]), True,
        "batch 16, 8 heads, D 64; ours is what comes on top of the inputs",
    )  # fmt: skip
    yield Claim(
        "memory, standard / flash, N 4096", "FlashAttention, Table 21", (20.4, 20.4),
        _range([_extra(memory, "standard", 4096) / _extra(memory, "flash2", 4096)]), True,
        "as above",
    )  # fmt: skip
    yield Claim(
        "memory of flash, N 65,536 / 1024", "FlashAttention, Table 21", (64.0, 64.0),
        _range([_extra(memory, "flash2", 65536) / _extra(memory, "flash2", 1024)]), True,
        "64 times the length: linear in N",
    )  # fmt: skip
    sizes = sorted({(c["D"], c["causal"], c["N"]) for c in speed.cases("speed")})
    ratios = {size: _step(speed, "standard", *size) / _step(speed, "flash2", *size)
              for size in sizes}  # fmt: skip
    head_sizes = " and ".join(str(size) for size in sorted({size[0] for size in sizes}))
    lengths, least = sorted({size[2] for size in sizes}), min(ratios, key=lambda size: ratios[size])
    yield Claim(
        "speed, flash2 / standard", "FlashAttention-2", (3.0, 10.0), _range(ratios.values()), True,
        f"forward and backward, N {lengths[0]:,} to {lengths[-1]:,}, D {head_sizes}; "
        f"the least is at N {least[2]:,}",
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
        "TFLOP/s / 648, forward, N 16,384, D 128", "FlashAttention-3", (1.0, 1.0),
        _range([_run(long, "flash2")["tflops"] / 648]), True,
        "theirs is FlashAttention-3 on an H100, whose processor is that of an H200",
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


def _extra(memory: Record, peer: str, N: int) -> int:
    return int(_run(_case(memory, "memory", N=N), peer)["extra_bytes"])


def _dram_bytes(traffic: Record, peer: str) -> int:
    """Read and written, forward and backward, without a mask."""
    sizes = {"peer": peer, "causal": False, "B": 64, "H": 16, "N": 1024, "D": 64}
    return sum(
        run["dram_read_bytes"] + run["dram_write_bytes"]
        for pass_ in ("fwd", "bwd")
        for run in _case(traffic, "peers", **sizes, **{"pass": pass_})["runs"]
    )
