"""Traffic by the GPU's own counters: kernels under Nsight Compute, beside formula and interpreter.

`measure` starts this module once more as a program, under `ncu`, which reads the counters of every
kernel launched between `torch.cuda.profiler.start` and `stop`. Where they belong is told by a range
with the case's number, which the program opens around the launch.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from flashedu import testing
from flashedu.bench import cases, peers
from flashedu.bench.device import Cuda
from flashedu.bench.run import Attempt, Check, OnCase, sentence, wrong
from flashedu.memory import Machine, Problem, cost
from flashedu.memory.machine import UNCOUNTED
from flashedu.stages import rung, triton_mode
from flashedu.stages.flash2_tiles import Tile, Tiles

METRICS = {
    "l2_to_sm_bytes": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "sm_to_l2_bytes": "l1tex__m_l1tex2xbar_write_bytes.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
}
NCU = (
    "ncu", "--nvtx", "--profile-from-start", "off", "--cache-control", "all",
    "--clock-control", "none", "--replay-mode", "kernel", "--csv", "--page", "raw",
    "--print-units", "base", "--metrics", ",".join(METRICS.values()),
)  # fmt: skip
RANGE = re.compile(r"flashedu case (\d+) begins")
NUMBER = re.compile(r"(\d+|\d{1,3}(,\d{3})+)(\.\d*)?")
KERNELS = {  # launched → as its traffic is counted; flash1's is a forward_kernel too
    "delta_kernel": "flash2 delta",
    "dkdv_kernel": "flash2 dkdv",
    "dq_kernel": "flash2 dq",
}
FIGURE_2 = Problem(B=64, H=16, Nq=1024, D=64)  # of the FlashAttention paper (arXiv 2205.14135)


class Unreadable(RuntimeError):
    """The counters cannot be read. One sentence."""


@dataclass(frozen=True)
class Case:
    """One pass of one peer. `tiles`: of a stage's kernels; None for what is not ours to cut."""

    section: str
    problem: Problem
    pass_: str  # "fwd" or "bwd"
    peer: str
    tiles: Tiles | None = None

    @property
    def kernels(self) -> dict[str, Tile | None]:
        """A stage's kernels, as they are counted → their tiles; {} for what is not ours.

        None: tiles of its own, which change nothing.
        """
        if self.tiles is None:
            return {}
        if self.pass_ == "fwd":
            return {self.peer: self.tiles.forward}
        return {"flash2 delta": None, "flash2 dkdv": self.tiles.dkdv, "flash2 dq": self.tiles.dq}

    def __str__(self) -> str:
        mask = cases.MASKS[self.problem.causal]
        cut = [f"{tile.block_q} × {tile.block_k}" for tile in self.kernels.values() if tile]
        what = f"{self.section}: {self.peer} {self.pass_} N {self.problem.Nq} {mask}"
        return " ".join([what, *cut])


def plan(quick: bool = False) -> list[Case]:
    """Which kernels are measured. `quick`: few and small: does it still run?"""
    p = Problem(H=2, Nq=256, D=64) if quick else FIGURE_2
    sizes = (64,) if quick else (32, 64, 128, 256)
    found = []
    for causal, size in product((False, True), sizes):
        q, warps = p.replace(causal=causal), 8 if size == 256 else 4
        found += [
            Case("tiles", q, "fwd", "flash1", _all(32, size)),
            Case("tiles", q, "fwd", "flash2", _all(size, 64, warps)),
            Case("tiles", q, "bwd", "flash2", _backward(size, warps)),
        ]
    others = ("flash2", "standard", "sdpa-flash", "sdpa-cudnn")  # flash2 with its tuned tiles
    for causal, pass_, peer in product((False, True), ("fwd", "bwd"), others):
        found.append(Case("peers", p.replace(causal=causal), pass_, peer))
    return found if quick else [*found, *_beyond(p)]


def _beyond(p: Problem) -> Iterator[Case]:
    """The other side of the tile, tiles that spill, sizes that no tile divides, long sequences."""
    for block_q, warps, stages in ((64, 4, 2), (128, 8, 2), (256, 8, 1)):
        yield Case("other side", p, "fwd", "flash1", _all(block_q, 64, warps, stages))
    for block_k, warps in ((32, 4), (128, 4), (256, 8)):
        yield Case("other side", p, "fwd", "flash2", _all(64, block_k, warps))
    yield Case("spills", p, "fwd", "flash1", _all(64, 256, 8))
    yield Case("spills", p, "bwd", "flash2", _all(128, 64))
    for n, causal in product((1000, 1023), (False, True)):
        ragged = p.replace(Nq=n, Nk=n, causal=causal)
        for pass_, peer in (("fwd", "flash1"), ("fwd", "flash2"), ("bwd", "flash2")):
            yield Case("ragged", ragged, pass_, peer, _all(64, 64))
    for n in (1024, 4096, 16384, 65536, 262144):
        long = Problem(B=max(1, 16384 // n), Nq=n, D=64)
        yield Case("long", long, "fwd", "flash2", _all(128, 64))


def _all(block_q: int, block_k: int, warps: int = 4, stages: int = 2) -> Tiles:
    return Tiles(*[Tile(block_q, block_k, warps, stages)] * 3)


def _backward(size: int, warps: int) -> Tiles:
    """What stays in a program has `size` rows, what passes by has 32."""
    return Tiles(Tile(64, 64), dkdv=Tile(32, size, warps), dq=Tile(size, 32, warps))


# what the counters should say


def predicted(case: Case, kernel: str) -> dict[str, int]:
    """Bytes by the closed form."""
    problem, tile = case.problem, case.kernels[kernel]
    if tile is not None:
        problem = problem.replace(block_q=tile.block_q, block_k=tile.block_k)
    found = cost.KERNELS[kernel](problem)
    return {"read": found.hbm_read_bytes, "written": found.hbm_write_bytes}


def counted(wanted: Sequence[Case]) -> list[dict[str, dict[str, int]]]:
    """For each case, kernel → bytes by the interpreter: of one head, times the heads.

    Programs of different heads move alike. Nothing where a case has no kernel of ours, or is long.
    """
    found: list[dict[str, dict[str, int]]] = triton_mode.interpreting(_count, list(wanted))
    return found


LONGEST_COUNTED = 1024  # keys: an interpreted tile takes a millisecond


def _count(wanted: Sequence[Case]) -> list[dict[str, dict[str, int]]]:
    return [_of_one_head(case) if case.problem.Nq <= LONGEST_COUNTED else {} for case in wanted]


def _of_one_head(case: Case) -> dict[str, dict[str, int]]:
    if case.tiles is None:
        return {}
    p, heads = case.problem.replace(B=1, H=1, H_kv=1), case.problem.B * case.problem.H
    q, k, v, do = testing.draw(p, framework="torch")
    stage, scale, machine = rung(case.peer).load(), p.D**-0.5, Machine(trace=False)
    o, lse = stage.forward(q, k, v, p, scale, machine, case.tiles.forward)
    if case.pass_ == "bwd":
        stage.backward(do, None, q, k, v, o, lse, p, scale, machine, case.tiles)
    moved = machine.bytes_by_kernel()
    return {
        name: {"read": heads * moved[name][0], "written": heads * moved[name][1]}
        for name in case.kernels
    }


# reading the counters


def why_not() -> str | None:
    """Why the counters cannot be read here, in a sentence; None if they may be."""
    if shutil.which("ncu") is None:
        return (
            "needs Nsight Compute, and there is no ncu on the PATH: it comes with the CUDA toolkit"
        )
    return None


def provenance() -> dict[str, Any]:
    """What a record says about the counters."""
    printed = subprocess.run(["ncu", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"Version (\S+)", printed)
    return {"ncu": version[1] if version else None, "metrics": METRICS, "heads_interpreted": 1}


def measure(wanted: Sequence[Case], device: Any, *, on_case: OnCase) -> Iterator[dict[str, Any]]:
    """Each case, as it stands in a record. `device`: to give memory back to the other process.

    Raises Unreadable, with a sentence, where ncu fails.
    """
    on_case(0, len(wanted), "counting in the interpreter")
    from_interpreter = counted(wanted)
    device.free()
    launched, why = _profile(wanted, on_case)
    if not launched:
        raise Unreadable("ncu counted no launch of any kernel")
    for number, case in enumerate(wanted):
        yield _entry(case, launched.get(number, []), why.get(number), from_interpreter[number])


def _entry(
    case: Case,
    launched: Sequence[Mapping[str, Any]],
    why: str | None,
    interpreted: Mapping[str, Any],
) -> dict[str, Any]:
    p, runs = case.problem, []
    for launch in launched:
        name = KERNELS.get(launch["launched"], case.peer)
        ours = name in case.kernels and launch["launched"] in (*KERNELS, "forward_kernel")
        runs.append({
            "kernel": name if ours else None,
            **launch,
            "tile": list(tile) if (tile := case.kernels.get(name)) and ours else None,
            "closed_form": predicted(case, name) if ours else None,
            "counted": interpreted.get(name) if ours else None,
            "why": None,
        })  # fmt: skip
    lacks = [name for name in case.kernels if all(run["kernel"] != name for run in runs)]
    if why is None and (lacks or not runs):
        why = f"ncu counted no launch of {', '.join(lacks) if runs else 'it'}"
    return {
        "section": case.section,
        **{size: getattr(p, size) for size in ("B", "H", "D", "dtype", "causal")},
        "N": p.Nq,
        "pass": case.pass_,
        "peer": case.peer,
        "why": why,
        "runs": runs,
    }


def _profile(
    wanted: Sequence[Case], on_case: OnCase
) -> tuple[dict[int, list[dict[str, Any]]], dict[int, str]]:
    """Number of a case → its launches; number → why it did not run."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        quick = "quick" if list(wanted) == plan(quick=True) else "full"
        command = [*NCU, "--log-file", str(log), sys.executable, "-m", __name__, quick]
        why = {}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            errors="replace", env={**os.environ, "LC_ALL": "C"},  # numbers as 1,234 or 1234
        ) as ran:  # fmt: skip
            said = []
            try:
                for line in ran.stdout or ():
                    number, _, rest = line.rstrip("\n").partition("\t")
                    if number.isdigit() and rest:
                        on_case(int(number), len(wanted), str(wanted[int(number)]))
                        if rest != "ran":
                            why[int(number)] = rest
                    else:
                        said.append(line)
            except BaseException:  # such as Ctrl-C: ncu does not stay behind
                ran.terminate()
                raise
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if failed := failure(text, "".join(said), ran.returncode):
            raise Unreadable(failed)
        return parse(text), why


def failure(log: str, said: str, code: int) -> str | None:
    """Why ncu, or the program under it, failed, in a sentence; None if neither did."""
    if "ERR_NVGPUCTRPERM" in log + said:
        return (
            "this user may not read the GPU's counters: the driver keeps them for root, or for "
            "those whom an administrator lets (https://developer.nvidia.com/ERR_NVGPUCTRPERM)"
        )
    errors = re.findall(r"^==ERROR== (.*)$", log + said, re.MULTILINE)
    if errors:
        return f"ncu failed: {errors[0].rstrip('. ')}"
    if code:
        last = said.strip().splitlines()[-1:] or [f"exit code {code}"]
        return f"the program under ncu failed: {last[0]}"
    return None


def parse(log: str) -> dict[int, list[dict[str, Any]]]:
    """Number of a case → its launches in order, from what `ncu --csv --page raw` printed.

    Each launch has the kernel's name and grid, and its bytes by the names of METRICS. Raises
    Unreadable for a table that lacks a column, or has what is no number of bytes.
    """
    lines = [line for line in log.splitlines() if not line.startswith("==")]
    table = csv.DictReader(lines)
    units = next(table, {})
    for column in ("Kernel Name", "Grid Size", *METRICS.values()) if units else ():
        if column not in units:
            raise Unreadable(f"ncu gave no {column}")
    found: dict[int, list[dict[str, Any]]] = {}
    for row in table:
        number = next((m[1] for cell in row.values() if (m := RANGE.search(cell or ""))), None)
        if number is None:
            continue
        launch = {"launched": row["Kernel Name"].split("(")[0].strip(),
                  "grid": [int(x) for x in re.findall(r"\d+", row["Grid Size"])]}  # fmt: skip
        for name, metric in METRICS.items():
            if units[metric] != "byte":
                raise Unreadable(f"ncu gave {metric} in {units[metric]!r}, not in bytes")
            if not NUMBER.fullmatch(row[metric]):
                raise Unreadable(f"ncu gave {row[metric]!r} for {metric}, not a number as 1,234")
            launch[name] = int(float(row[metric].replace(",", "")))
        found.setdefault(int(number), []).append(launch)
    return found


# the program under ncu


class Profiled(Cuda):
    """Where others take the time of a call, its kernels are profiled."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def seconds(self, call: Callable[[], None], *, wait: bool) -> float:
        """Runs the call under the profiler; there is no time to tell."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        # not push and pop: a backward launches from a thread of its own
        opened = torch.cuda.nvtx.range_start(f"flashedu case {self._number} begins")
        try:
            call()
            torch.cuda.synchronize()
        finally:  # or what runs next is counted as this case's
            torch.cuda.nvtx.range_end(opened)
            torch.cuda.profiler.stop()
        return 0.0


def peer_of(case: Case) -> peers.Peer:
    """Who runs: a stage with these tiles, or a peer as it is."""
    if case.tiles is None:
        return next(peer for peer in peers.ATTENTIONS if peer.name == case.peer)
    tiles = case.tiles

    def prepare(p: Problem, device: str) -> peers.Attention:
        scale, stage = p.D**-0.5, rung(case.peer).load()
        if case.pass_ == "fwd":
            return lambda q, k, v: stage.forward(q, k, v, p, scale, UNCOUNTED, tiles.forward)[0]
        return lambda q, k, v: stage._Attention.apply(q, k, v, p, scale, UNCOUNTED, tiles)[0]

    return peers.Peer(case.peer, prepare)


def run_one(number: int, case: Case) -> str:
    """Run it, check its result, and run it again under the profiler; "ran", or why not."""
    device = Profiled(number)
    as_benchmark = cases.Case(case.section, case.problem, case.pass_, (case.peer,))
    try:
        inputs = device.draw(case.problem, number)
        attempt = Attempt(peer_of(case), as_benchmark, inputs, device)
        check = Check(inputs, case.problem, number, gradients=case.pass_ == "bwd")
        if reason := wrong(check.errors(attempt.results())):
            return reason
        attempt.seconds()
    except Exception as error:  # a kernel that does not fit this card: the others run all the same
        return sentence(error)
    finally:
        device.free()
    return "ran"


def main(args: Iterable[str]) -> None:
    """What ncu watches: one line for each case, its number and how it went."""
    for number, case in enumerate(plan(quick=list(args) == ["quick"])):
        print(number, run_one(number, case), sep="\t", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
