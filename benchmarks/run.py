"""What flashedu costs, measured: each number beside its target.

python benchmarks/run.py [--quick] [--write]

--quick: a smoke run of small sizes; its numbers mean nothing. --write: keep the results, with where
and when they were measured, as JSON under benchmarks/results/. Such files are never edited.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
}

Result = dict[str, Any]


def result(name: str, value: float, unit: str, target: float | None = None, **more: Any) -> Result:
    """One number. `target` is the most that it may be; None for a number that is only told."""
    met = None if target is None else value <= target
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, **more}


# start


def measure_import(quick: bool) -> Iterator[Result]:
    rounds = 3 if quick else 15
    bare, package = [], []
    for _ in range(rounds):
        bare.append(seconds(lambda: python("-c", "pass")))
        package.append(seconds(lambda: python("-c", "import flashedu")))
    yield result("import flashedu, beyond bare Python", min(package) - min(bare), "s", 0.15)
    helps = [seconds(lambda: python("-m", "flashedu", "--help")) for _ in range(rounds)]
    yield result("flashedu --help", min(helps), "s", 0.5)


def measure_ladder(quick: bool) -> Iterator[Result]:
    options = ("--n", "128") if quick else ()
    times = [seconds(lambda: python("-m", "flashedu", "ladder", *options)) for _ in range(3)]
    yield result("flashedu ladder", statistics.median(times), "s", 15, rounds=times)


# counting


def measure_counting(quick: bool) -> Iterator[Result]:
    from flashedu.memory import Machine, Problem
    from flashedu.stages import rung

    n, rounds = (256, 2) if quick else (4096, 7)
    problem = Problem(Nq=n, D=64)
    for name in ("tiled", "online"):
        attend = run_of(rung(name), problem)
        runs = interleaved(
            rounds,
            uncounted=attend,
            counters=lambda attend=attend: attend(machine=Machine(trace=False)),
            trace=lambda attend=attend: attend(machine=Machine()),
        )
        size = f"B1 H1 N{n} D64 float16"
        traced = statistics.median(runs["trace"])
        yield result(f"{name}, counted with trace, {size}", traced, "s", 3)
        ratios = [c / u for c, u in zip(runs["counters"], runs["uncounted"], strict=True)]
        ratio = statistics.median(ratios)
        yield result(f"{name}, counters only to uncounted, {size}", ratio, "×", 1.3, rounds=ratios)


def measure_closed_forms(quick: bool) -> Iterator[Result]:
    from flashedu.memory import Problem, cost

    problem = Problem(Nq=10**4 if quick else 10**6, D=64, causal=True)
    for name, closed_form in cost.FORWARD.items():
        time_s = min(seconds(lambda f=closed_form: f(problem)) for _ in range(5))
        yield result(f"closed form of {name}, N {problem.Nq}", time_s, "s", 0.1)


# memory


PEAK_OF_ONLINE = """
import sys
import torch
from flashedu.stages import online

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def attend(n):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 64, dtype=torch.float16) for _ in range(3))
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    online.attention(q, k, v)
    return status("VmHWM") - before

attend(128)  # what the first call loads is not the algorithm's
print(attend(int(sys.argv[1])))
"""


def measure_memory(quick: bool) -> Iterator[Result]:
    if not Path("/proc/self/clear_refs").exists():
        print("peak memory: skipped, as it is read from Linux's /proc", file=sys.stderr)
        return
    sizes = (512, 1024, 2048) if quick else (8192, 16384, 32768)
    peaks = []
    for n in sizes:
        peaks.append(int(python("-c", PEAK_OF_ONLINE, str(n))))
        scores = 2 * n * n
        yield result(f"online, peak extra memory, N {n}", peaks[-1] / 2**20, "MiB",
                     s_mib=scores / 2**20, share_of_s=peaks[-1] / scores)  # fmt: skip
    # 4 times the keys: 4 if linear, 16 if quadratic. Small runs cost less than the noise.
    growth = peaks[-1] / max(peaks[0], 1)
    target = None if quick else 6
    yield result(f"online, peak memory, N {sizes[-1]} to N {sizes[0]}", growth, "×", target)
    share = peaks[-1] / (2 * sizes[-1] ** 2)
    yield result(f"online, peak memory to S, N {sizes[-1]}", share, "×", None if quick else 0.02)


# peers


def measure_peers(quick: bool) -> Iterator[Result]:
    """The uncounted rungs beside PyTorch on this CPU, in float32: for scale, not a target."""
    import torch

    from flashedu.memory import Problem
    from flashedu.stages import LADDER
    from flashedu.stages.reference import Reference
    from flashedu.testing import assert_right, draw

    n, rounds = (128, 2) if quick else (1024, 9)
    problem = Problem(Nq=n, D=64, H=4, dtype="float32")
    q, k, v, _ = draw(problem, framework="torch")
    functions: dict[str, Callable[[], Any]] = {
        "torch SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "plain formula": lambda: torch.softmax(q @ k.mT / 8, -1) @ v,
    }
    for rung in LADDER:
        if rung.missing() is None and problem.dtype in rung.dtypes:
            functions[rung.name] = run_of(rung, problem)
    for function in functions.values():
        assert_right(Reference(function(), None), q, k, v)
    runs = interleaved(rounds, **functions)
    for name, times in runs.items():
        size = f"B1 H4 N{n} D64 float32"
        more = {}
        for peer in ("torch SDPA", "plain formula"):
            ratios = [a / b for a, b in zip(times, runs[peer], strict=True)]
            more[f"to {peer}"] = statistics.median(ratios)
        yield result(f"{name}, {size}", statistics.median(times), "s", **more)


# tools


def run_of(rung: Any, problem: Any) -> Callable[..., Any]:
    """The rung's attention on its own inputs."""
    from flashedu.testing import draw

    q, k, v, _ = draw(problem, framework=rung.framework)
    attention = rung.load().attention
    return lambda **options: attention(q, k, v, **options)


def interleaved(rounds: int, **functions: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each, in turn, so that a busy moment of the machine hits them alike."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def python(*args: str) -> str:
    command = [sys.executable, *args]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"python {args[0]} failed with {ran.returncode}:\n{ran.stderr}")
    return ran.stdout


def provenance() -> dict[str, Any]:
    import numpy
    import torch

    import flashedu

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "flashedu", "benchmarks")),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "thread_variables": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "flashedu": flashedu.__version__,
        "numpy": numpy.__version__,
        "torch": torch.__version__,
    }


def git(*args: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


GROUPS = (
    measure_import,
    measure_ladder,
    measure_counting,
    measure_closed_forms,
    measure_memory,
    measure_peers,
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure flashedu.")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it still run?")
    parser.add_argument("--write", action="store_true", help="keep the results as JSON")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--write keeps full runs only: leave out --quick")

    sys.path.insert(0, str(ROOT))
    source = provenance()
    print("  ".join(f"{name} {value}" for name, value in source.items()))
    if (source["load_before"] or 0) > 0.5:
        print("This machine is busy with other work: the times below are too long.")
    results: list[Result] = []
    for group in GROUPS:
        for found in group(options.quick):
            results.append(found)
            print(line(found), flush=True)
    missed = [found["name"] for found in results if found["met"] is False]
    print(f"Not met: {'; '.join(missed)}" if missed else "Every target is met.")
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        stamp = source["date"].replace("+00:00", "Z").replace(":", "")
        path = RESULTS / f"cpu_{stamp}.json"
        with path.open("x", encoding="utf-8") as file:
            json.dump({"provenance": source, "results": results}, file, indent=2)
            file.write("\n")
        print(f"Written to {path.relative_to(ROOT)}")
    return 1 if missed and not options.quick else 0


def line(found: Result) -> str:
    text = f"{found['name']:<62} {found['value']:>9.4g} {found['unit']}"
    if found["target"] is not None:
        verdict = "met" if found["met"] else "NOT MET"
        text += f"  (at most {found['target']:g}: {verdict})"
    hidden = ("name", "value", "unit", "target", "met", "rounds")
    more = [f"{k} {v:.3g}" for k, v in found.items() if k not in hidden]
    return f"{text}  {', '.join(more)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
