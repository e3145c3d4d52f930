"""Is standard attention bound by bandwidth? Its three kernels, timed on a GPU, beside the roofline.

    python benchmarks/standard_attention.py            print
    python benchmarks/standard_attention.py --write    and save under benchmarks/results/

Each kernel is a PyTorch call, checked against float64 first. The shapes are far larger than the
L2 cache. Rounds are interleaved; the median and the spread are recorded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from flashedu.memory import Problem, cost, gpu
from flashedu.stages.reference import Reference
from flashedu.testing import assert_right, draw

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = [Problem(B=4, H=16, Nq=n, D=64) for n in (1024, 2048, 4096, 8192)]
ROUNDS, CALLS = 9, 5


def scores(q, k):
    return torch.matmul(q, k.mT)


def softmax(s):
    return torch.softmax(s, -1)


def output(p, v):
    return torch.matmul(p, v)


def seconds_per_call(function) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / CALLS


def check() -> None:
    small = Problem(B=1, H=2, Nq=256, D=64)
    q, k, v, _ = draw(small, "peaked", framework="torch")
    on_card = [x.cuda() for x in (q * small.D**-0.5, k, v)]  # 1/8: exact
    o = output(softmax(scores(*on_card[:2])), on_card[2])
    assert_right(Reference(o.cpu(), None), q, k, v)


def measure(problem: Problem) -> dict:
    """Seconds of each kernel, of the three in a row, and of PyTorch's FlashAttention-2."""
    q, k, v = (
        torch.randn(problem.B, problem.H, problem.Nq, problem.D, device="cuda", dtype=torch.float16)
        for _ in range(3)
    )
    q = q * problem.D**-0.5
    s = scores(q, k)
    p = softmax(s)

    def flash():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)

    torch.testing.assert_close(flash(), output(p, v), atol=4e-3, rtol=0)
    calls = {
        "naive scores": lambda: scores(q, k),
        "naive softmax": lambda: softmax(s),
        "naive output": lambda: output(p, v),
        "naive": lambda: output(softmax(scores(q, k)), v),
        "SDPA flash": flash,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        seconds_per_call(call)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds_per_call(call))
    return {
        name: {"median_s": statistics.median(t), "min_s": min(t), "max_s": max(t)}
        for name, t in times.items()
    }


def provenance() -> dict:
    properties = torch.cuda.get_device_properties(0)

    def output_of(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return {
        "date": datetime.date.today().isoformat(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "card": properties.name,
        "l2_bytes": properties.L2_cache_size,
        "sm_count": properties.multi_processor_count,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": output_of(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"
        ),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="save the record")
    parser.add_argument("--commit", help="of the code, where the checkout has no git")
    parser.add_argument("--gpu", default="h200", help="the card's key in flashedu.memory.GPUS")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("standard_attention.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 1
    check()
    card = gpu(options.gpu)
    rows = []
    for problem in SHAPES:
        measured = measure(problem)
        for name in ("naive scores", "naive softmax", "naive output", "naive"):
            closed_form = cost.naive(problem) if name == "naive" else cost.KERNELS[name](problem)
            bound = card.bound(closed_form, "float16")
            measured[name] |= {
                "hbm_bytes": closed_form.hbm_bytes,
                "flops": closed_form.flops,
                "memory_bound_s": bound.memory_s,
                "compute_bound_s": bound.compute_s,
            }
        rows.append({"B": problem.B, "H": problem.H, "N": problem.Nq, "D": problem.D,
                     "dtype": problem.dtype, "kernels": measured})  # fmt: skip
        print(f"N {problem.Nq}")
        for name, row in measured.items():
            least = f"  memory {row['memory_bound_s'] * 1e6:8.1f} µs  arithmetic " \
                    f"{row['compute_bound_s'] * 1e6:7.1f} µs" if "flops" in row else ""  # fmt: skip
            print(f"  {name:14} {row['median_s'] * 1e6:9.1f} µs{least}")
    record = {"what": "standard attention in three kernels, forward", **provenance(), "rows": rows}
    if options.commit:
        record["commit"] = options.commit
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        name = f"standard_attention_{card.key}_{record['date']}.json"
        with open(RESULTS / name, "x", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
