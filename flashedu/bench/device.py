"""The GPU as a measuring instrument: clock, memory meter, and what it is."""

from __future__ import annotations

import datetime
import gc
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

import flashedu
from flashedu.bench.record import CHECKOUT
from flashedu.memory import Problem

FLUSH_BYTES = 512 * 2**20  # far more than any L2
AHEAD_CYCLES = 6_000_000  # 3 ms at 2 GHz: longer than any peer's launches
STATE = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"


def why_not() -> str | None:
    """Why nothing can be timed here, in a sentence; None if it can."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and torch sees none"
    if find_spec("triton") is None:
        return "needs Triton: pip install triton"
    from flashedu.stages import triton_mode

    if triton_mode.INTERPRETED:
        return "needs compiled kernels, and TRITON_INTERPRET is set: unset it"
    return None


class Cuda:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def draw(self, p: Problem, seed: int) -> tuple[Any, ...]:
        """q, k, v and do of standard normal values."""
        return draw(p, seed, "cuda")

    def seconds(self, call: Callable[[], None], *, wait: bool) -> float:
        """Seconds of one call, with a cold L2.

        `wait`: let the GPU go idle first, so that the host's launches count. Without, the GPU is
        kept busy until the host has run ahead, as it does in a model of many layers.
        """
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if wait:
            torch.cuda.synchronize()
        else:
            torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def peak_bytes(self, call: Callable[[], None]) -> int:
        """The most memory that tensors took during a call, beyond those that were there."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def capture(self, *calls: Callable[[], None]) -> list[Callable[[], None]]:
        """The same calls as CUDA graphs, to be replayed in their order."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls * 2:  # what is made at a first call is no part of the graph
                call()
        torch.cuda.current_stream().wait_stream(side)
        pool, replays = torch.cuda.graph_pool_handle(), []
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call()
            replays.append(graph.replay)
        return replays

    def free(self) -> None:
        """Give unused memory back, also after an allocation failed."""
        gc.collect()
        torch.cuda.empty_cache()

    def give_back(self) -> None:
        """Leave the card's memory to other processes. Nothing can be timed after it."""
        del self._flush
        self.free()

    def facts(self) -> dict[str, Any]:
        """What the card is."""
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "card": p.name,
            "compute_capability": [p.major, p.minor],
            "sm_count": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "driver": self._ask("driver_version").get("driver_version"),
        }

    def state(self) -> dict[str, str]:
        """Clocks (MHz), temperature (°C) and power (W), as the driver tells; {} if it does not."""
        return self._ask(STATE)

    def _ask(self, query: str) -> dict[str, str]:
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        said = _said([*command, f"--id=GPU-{uuid}"])
        if said is None and torch.cuda.device_count() == 1:
            said = _said(command)
        return dict(zip(query.split(","), said.split(", "), strict=False)) if said else {}


def draw(p: Problem, seed: int, device: str) -> tuple[Any, ...]:
    """q, k, v and do of standard normal values, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(generator=generator, device=device, dtype=getattr(torch, p.dtype))
    shapes = [(p.B, heads, n, p.D) for heads, n in
              ((p.H, p.Nq), (p.H_kv, p.Nk), (p.H_kv, p.Nk), (p.H, p.Nq))]  # fmt: skip
    return tuple(torch.randn(shape, **options) for shape in shapes)


def provenance(device: Any, command: str, commit: str | None = None) -> dict[str, Any]:
    """Where, when and with what: the head of a record. `commit`: for a tree without git."""
    dirty = None if commit else _git("status", "--porcelain", "--", "flashedu")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **device.facts(),
        "before": device.state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": version("triton") if find_spec("triton") else None,
        **{name: _version(name) for name in ("flash-attn-4", "nvidia-cutlass-dsl")},
        "flashedu": flashedu.__version__,
        "commit": commit or _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if dirty is None else bool(dirty),
        "command": command,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    return _said(["git", "-C", str(CHECKOUT), *args]) if (CHECKOUT / ".git").exists() else None


def _said(command: list[str]) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return ran.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
