"""A record that nobody measured, for tests of tables and figures: every number is made up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from flashedu.bench.cases import SECTIONS, AnyCase, Choice, ModelCase, plan
from flashedu.bench.record import Record
from flashedu.bench.run import spread, summary

RATE = {"flash2": 520, "flash3": 640, "flash1": 230, "standard": 60, "sdpa-flash": 330,
        "sdpa-cudnn": 590, "sdpa-efficient": 170, "flex": 380, "fa4": 650,
        "sdpa-math": 40, "flash3-det": 520}  # fmt: skip
RATE |= {"varlen": 430, "padded": 150, "padded-flash2": 180, "padded-mask": 90, "unmasked": 150,
         "one-by-one": 280, "torch-varlen": 320, "hf-flashedu": 410, "hf-sdpa": 400,
         "hf-eager": 90}  # fmt: skip
TB_PER_S = {"decode": 3.6, "flash2": 0.1, "sdpa-flash": 2.9, "sdpa-cudnn": 3.1,
            "sdpa-efficient": 0.2, "sdpa-math": 0.4, "copy": 4.1, "standard": 0.1,
            "paged-16": 2.1, "paged-64": 3.3, "paged-256": 3.5}  # fmt: skip
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


def _case(case: AnyCase, rounds: int, rng: random.Random) -> dict[str, Any]:
    sizes = case.sizes
    rows = 2 * sizes["B"] * sizes["H"] * sizes["Nq"]
    values, scores = rows * sizes["D"], rows * sizes["N"]
    times, runs = {}, []
    for name in case.peers:
        extra = 5 * values + (2 * scores if name in ("standard", "hf-eager") else 0)
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
        "section": case.section, **sizes, "pass": case.pass_, "mode": case.mode,
        "flops": case.flops, "bytes": case.bytes, "seed": 0, "checked": "nothing", "runs": runs,
    }  # fmt: skip


def _seconds(case: AnyCase, name: str) -> float:
    if isinstance(case, ModelCase):
        return case.flops / (RATE[name] * 1e12) + 0.004 * case.new_tokens
    p = case.problem
    if case.section in ("decode", "flash-decoding", "paged"):
        return case.bytes / (TB_PER_S[name] * 1e12) + 5e-6
    rate = RATE[name] * p.Nq / (p.Nq + 700) * (0.9 if case.pass_ != "fwd" else 1)
    rate *= 0.85 if p.D == 64 else 1
    rate *= (0.4 if name == "standard" else 0.88) if p.causal else 1
    programs = p.B * p.H * (1 if name == "flash1" else -(-p.Nq // 128))
    busy = min(1.0, programs / 132)
    return case.flops / (rate * busy * 1e12) + (2e-5 if case.mode == "direct" else 5e-6)
