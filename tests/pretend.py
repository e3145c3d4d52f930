"""A record that nobody measured, for tests of tables and figures: every number is made up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from flashedu.bench.cases import SECTIONS, Case, Choice, plan
from flashedu.bench.record import Record
from flashedu.bench.run import spread, summary

RATE = {"flash2": 520, "flash1": 230, "standard": 60, "sdpa-flash": 330, "sdpa-cudnn": 590,
        "sdpa-efficient": 170, "flex": 380, "sdpa-math": 40}  # fmt: skip
TB_PER_S = {"decode": 3.6, "flash2": 0.1, "sdpa-flash": 2.9, "sdpa-cudnn": 3.1,
            "sdpa-efficient": 0.2, "sdpa-math": 0.4, "copy": 4.1}  # fmt: skip
MEMORY = 141 * 10**9
HEAD = {
    "kind": "attention", "date": "2026-01-02T03:04:05+00:00", "card": "NVIDIA H200",
    "compute_capability": [9, 0], "sm_count": 132, "memory_bytes": MEMORY, "driver": "1.2.3",
    "torch": "2.13.0", "triton": "3.7.1", "cuda": "13.0", "commit": "0" * 40,
    "uncommitted_changes": False,
    "before": {"clocks.sm": "345"}, "after": {"clocks.sm": "1980"}, "quick": False,
}  # fmt: skip


def record(sections: tuple[str, ...] = tuple(SECTIONS), rounds: int = 5) -> Record:
    cases = plan(Choice(), sections)
    made = [_case(case, rounds, random.Random(i)) for i, case in enumerate(cases)]
    return Record(Path("pretend.json"), {**HEAD, "planned": len(cases), "cases": made})


def _case(case: Case, rounds: int, rng: random.Random) -> dict[str, Any]:
    p = case.problem
    scores = 2 * p.B * p.H * p.Nq * p.Nk
    times, runs = {}, []
    for name in case.peers:
        extra = 5 * 2 * p.B * p.H * p.Nq * p.D + (2 * scores if name == "standard" else 0)
        why = "out of memory" if extra > MEMORY else None
        if case.timed and why is None:
            times[name] = [_seconds(case, name) * rng.uniform(0.97, 1.05) for _ in range(rounds)]
        entry = {"peer": name, "why": why, "errors": {} if why else {"o": [0.001, 0.004]}}
        entry["extra_bytes"] = None if why or case.mode == "graph" else extra
        runs.append(entry | summary(times.get(name, [])))
    for entry in runs:
        mine = times.get(entry["peer"], [])
        entry["tflops"] = case.flops / entry["median_s"] / 1e12 if mine else None
        entry["gb_per_s"] = case.bytes / entry["median_s"] / 1e9 if mine else None
        entry["times_as_fast_as"] = {
            other: spread([b / a for a, b in zip(mine, theirs, strict=True)])
            for other, theirs in times.items()
            if mine and other != entry["peer"]
        }
    return {
        "section": case.section, "B": p.B, "H": p.H, "H_kv": p.H_kv, "Nq": p.Nq, "D": p.D,
        "dtype": p.dtype, "causal": p.causal, "N": p.Nk, "pass": case.pass_, "mode": case.mode,
        "flops": case.flops, "bytes": case.bytes, "seed": 0, "checked": "nothing", "runs": runs,
    }  # fmt: skip


def _seconds(case: Case, name: str) -> float:
    p = case.problem
    if case.section == "decode":
        return case.bytes / (TB_PER_S[name] * 1e12) + 5e-6
    rate = RATE[name] * p.Nq / (p.Nq + 700) * (0.9 if case.pass_ != "fwd" else 1)
    rate *= 0.85 if p.D == 64 else 1
    rate *= (0.4 if name == "standard" else 0.88) if p.causal else 1
    programs = p.B * p.H * (1 if name == "flash1" else -(-p.Nq // 128))
    busy = min(1.0, programs / 132)
    return case.flops / (rate * busy * 1e12) + (2e-5 if case.mode == "direct" else 5e-6)
