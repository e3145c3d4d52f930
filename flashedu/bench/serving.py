"""The case study on real engines: one load, and each engine in a process of its own.

`measure` starts this module as a program, once for each group of engines that share a model, and
reads what it says, a line a run. So an engine that fails, or takes the card's memory with it, costs
no other its measurement.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flashedu.bench.record import Record
from flashedu.bench.run import OnCase, sentence
from flashedu.serving.load import Lengths, Load, Sample, WallClock, serve
from flashedu.serving.plan import MODELS

PROMPTS = Lengths(256, 1.0, 16, 3584)
ANSWERS = Lengths(64, 0.8, 4, 512)  # the article: at most 512
TINY_PROMPTS, TINY_ANSWERS = Lengths(32, 0.8, 4, 200), Lengths(8, 0.6, 2, 32)
SAMPLES = 240  # of a run, that a record keeps
LIMIT_S = 360  # of a group
SAID = 4000  # characters of the log of a program that fails, for stderr
PATIENCE_S = 0.2  # between two looks at what a program has written
PLANNED = "planned"  # the argument for `flashedu.bench.planned`


@dataclass(frozen=True)
class Engine:
    """An engine, its attention and its largest batch; `group`: those that share a process."""

    name: str
    kind: str  # "static", "continuous" or "vllm"
    attention: str
    batch: int

    @property
    def group(self) -> str:
        return self.attention if self.kind == "vllm" else "transformers"


# Of vLLM: a CUDA graph of each decode step, as it does by itself; nothing compiled, as that takes
# a minute and touches no attention.
GRAPHS: dict[str, Any] = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
ENGINES = {
    e.name: e
    for e in (
        Engine("eager-4", "static", "eager", 4),
        Engine("flashedu-4", "static", "FlashEdu", 4),
        Engine("flashedu-16", "static", "FlashEdu", 16),
        Engine("sdpa-4", "static", "sdpa", 4),
        Engine("continuous-16", "continuous", "sdpa", 16),
        Engine("continuous-256", "continuous", "sdpa", 256),
        Engine("vllm-flash-4", "vllm", "FLASH_ATTN", 4),
        Engine("vllm-flash-16", "vllm", "FLASH_ATTN", 16),
        Engine("vllm-flash", "vllm", "FLASH_ATTN", 256),
        Engine("vllm-triton", "vllm", "TRITON_ATTN", 256),
        Engine("vllm-flashedu", "vllm", "CUSTOM", 256),
    )
}


@dataclass(frozen=True)
class Run:
    """An engine under a load."""

    engine: Engine
    load: Load
    repeat: int = 0

    def __str__(self) -> str:
        rate = self.load.rate_per_s
        how = "all at once" if rate == math.inf else f"{rate:g} a second"
        return f"{self.engine.name}: {self.load.count} requests, {how}"


INF = math.inf
# Engine, requests a second, requests. Slow engines get few, and come last: what a card has no more
# time for is not vLLM. Static batches get the same 16 requests. 0.25 a second is about half of what
# eager-4 can answer.
CASE_STUDY = (
    *((engine, INF, 256) for engine in ("vllm-flash", "vllm-flashedu", "vllm-triton") * 2),
    ("vllm-flash", 18.4, 256), ("vllm-flashedu", 18.4, 256),
    ("vllm-flash-4", INF, 48), ("vllm-flash-16", INF, 96),
    ("eager-4", INF, 16), ("flashedu-4", INF, 16), ("flashedu-16", INF, 16), ("eager-4", 0.25, 12),
    ("continuous-16", INF, 32),
)  # fmt: skip


def plan(
    shape: str, wanted: Sequence[tuple[str, float, int]] = CASE_STUDY, seed: int = 0
) -> list[Run]:
    """The runs of these engines, rates and counts; one that is there twice is repeated."""
    prompts, answers = (TINY_PROMPTS, TINY_ANSWERS) if shape == "tiny" else (PROMPTS, ANSWERS)
    runs: list[Run] = []
    for name, rate, count in wanted:
        run = Run(ENGINES[name], Load(rate, count, prompts, answers, seed))
        before = sum((r.engine, r.load) == (run.engine, run.load) for r in runs)
        runs.append(replace(run, repeat=before))
    return runs


def measure(
    runs: Sequence[Run], shape: str, dtype: str, device: str, *, on_case: OnCase
) -> Iterator[dict[str, Any]]:
    """A case for each run as it ends, as it stands in a record; `on_case` is told what came out."""
    for group in dict.fromkeys(run.engine.group for run in runs):
        numbers = [i for i, run in enumerate(runs) if run.engine.group == group]
        on_case(numbers[0], len(runs), str(runs[numbers[0]]))
        of_group = [[i, runs[i].engine.name, runs[i].load.as_dict()] for i in numbers]
        job = {"shape": shape, "dtype": dtype, "device": device, "runs": of_group}
        with Program(__name__, [json.dumps(job)]) as child:
            for line in child.lines():
                number = line.pop("number")
                numbers.remove(number)
                log = backend_line(child.said)
                on_case(number, len(runs), f"{runs[number]}: {outcome(line)}")
                if line.get("why"):
                    print(child.said[-SAID:], file=sys.stderr, flush=True)
                yield _case(runs[number], shape, dtype, line | ({"log": log} if log else {}))
                if not numbers:  # an engine that does not stop is not waited for
                    break
                on_case(numbers[0], len(runs), str(runs[numbers[0]]))
        for number in numbers:
            on_case(number, len(runs), f"{runs[number]}: {child.why}")
            yield _case(runs[number], shape, dtype, {"why": child.why})
        if group == "transformers" and plans(shape, device):
            on_case(len(runs) - 1, len(runs), "memory, beside the plan")
            told, _, why = program(__name__, [PLANNED, shape, dtype])
            told += _unplanned(len(told), why)
            yield {"section": "memory", "shape": shape, "dtype": dtype, "load": None, "runs": told}


def _unplanned(done: int, why: str) -> list[dict[str, Any]]:
    """Runs of the memory section that its program did not come to."""
    from flashedu.bench import planned

    return [planned.head(case) | {"why": why} for case in planned.CASES[done:]]


def outcome(entry: dict[str, Any]) -> str:
    """What came of a run, in a line."""
    if entry.get("why"):
        return str(entry["why"])
    return (
        f"{entry['requests_per_s']:.2f} requests/s, {entry['output_tokens_per_s']:.0f} tokens/s, "
        f"{entry['seconds']:.1f} s; with start and warm-up {entry['took_s']:.1f} s"
    )


def plans(shape: str, device: str) -> bool:
    """Whether the memory plan is held against the allocator, beside engines of Transformers."""
    return device == "cuda" and shape in MODELS


def _case(run: Run, shape: str, dtype: str, result: dict[str, Any]) -> dict[str, Any]:
    return {"section": "serving", "shape": shape, "dtype": dtype, "load": run.load.as_dict(),
            "runs": [_head(run) | result]}  # fmt: skip


class Program:
    """A module as a program, in a process of its own: what it writes, as it is written.

    `limit_s`: when it is ended, LIMIT_S if None. `said`: its log so far. `why`: why it has not
    written more.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, limit_s: float | None = None
    ) -> None:
        self._module, self._arguments = module, arguments
        self._limit_s = LIMIT_S if limit_s is None else limit_s
        self.said, self.why = "", "it did not end"

    def __enter__(self) -> Program:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._log = (Path(self._folder.name) / name for name in ("out.jsonl", "log.txt"))
        self._out.touch()
        with self._log.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(self._out), *self._arguments],
                stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # if it runs still: after Ctrl-C, say
        self._process.wait()
        self._folder.cleanup()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Each line of JSON that it has written whole, soon after."""
        end = time.monotonic() + self._limit_s
        with self._out.open(encoding="utf-8") as out:
            running, rest = True, ""
            while running:
                running = self._process.poll() is None
                *whole, rest = (rest + out.read()).split("\n")
                self.said = self._log.read_text(encoding="utf-8", errors="replace")
                yield from map(json.loads, whole)
                if running and time.monotonic() > end:
                    self.why = f"it took more than {self._limit_s:g} s"
                    self._process.kill()
                time.sleep(PATIENCE_S * running)
        if self._process.returncode:
            print(self.said[-SAID:], file=sys.stderr, flush=True)


def program(
    module: str, arguments: Sequence[str], *, limit_s: float | None = None
) -> tuple[list[dict[str, Any]], str, str]:
    """All that a `Program` writes; what it said, and why it wrote no more."""
    with Program(module, arguments, limit_s=limit_s) as child:
        lines = list(child.lines())
    return lines, child.said, child.why


def backend_line(said: str) -> str | None:
    """What vLLM's log says of its attention backend."""
    found = (line for line in said.splitlines() if "AttentionBackendEnum" in line)
    line = next(found, "")
    return line[line.index("Using") :] if "Using" in line else None


def _head(run: Run) -> dict[str, Any]:
    engine = run.engine
    return {"peer": engine.name, "kind": engine.kind, "attention": engine.attention,
            "batch": engine.batch, "repeat": run.repeat, "why": None}  # fmt: skip


def runs_of(
    record: Record, peer: str, rate_per_s: float = INF
) -> list[tuple[Load, dict[str, Any]]]:
    """The runs of an engine at a rate, repeats and all, each with its load."""
    return [
        (load, run)
        for case in record.cases("serving")
        if (load := load_of(case["load"])).rate_per_s == rate_per_s
        for run in case["runs"]
        if run["peer"] == peer and run["why"] is None
    ]


def load_of(recorded: dict[str, Any]) -> Load:
    """The load of a case."""
    lengths = {name: Lengths(**recorded[name]) for name in ("prompt", "output")}
    rate = recorded["rate_per_s"]
    return Load(**recorded | lengths | {"rate_per_s": INF if rate is None else rate})


def provenance() -> dict[str, Any]:
    """Versions of the engines; None where one is not installed."""
    found: dict[str, Any] = {"transformers": None, "vllm": None}
    for name in found:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# the program


def main(out: Path, arguments: Sequence[str]) -> None:
    """Measure, and write a line for each run as it ends."""
    if arguments[0] == PLANNED:
        from flashedu.bench import planned
        from flashedu.memory.gpus import gpu
        from flashedu.serving import engines

        _, shape, dtype = arguments
        model = engines.llama(shape, dtype, "cuda")
        for entry in planned.measure(model, MODELS[shape], gpu("h100"), dtype):
            _write(out, entry)
        return
    run_all(json.loads(arguments[0]), out)


def _write(out: Path, entry: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")


def run_all(job: dict[str, Any], out: Path) -> None:
    """The runs of a group, one after the other. Each is written down before the next begins."""
    models: dict[str, Any] = {}
    loaded: dict[str, Any] = {}
    for number, name, of_load in job["runs"]:
        engine, start = ENGINES[name], time.monotonic()
        try:
            warm_up = 0  # it is warm
            if name not in loaded:
                _close(loaded)
                loaded[name] = _start(engine, job, models)
                warm_up = 64 if engine.batch > 64 else 4  # steps of all sizes, not of all loads
            entry = run_one(loaded[name], load_of(of_load), job["device"], warm_up)
        except Exception as error:
            traceback.print_exc()
            entry = {"why": sentence(error)}
        entry["took_s"] = time.monotonic() - start
        _write(out, {"number": number, **entry})
        if entry.get("why"):
            _close(loaded)
    _close(loaded)


def _close(loaded: dict[str, Any]) -> None:
    """Stop these engines; the next one finds their memory free."""
    import torch

    for engine in loaded.values():
        try:
            engine.close()
        except Exception:  # what it measured is written down
            traceback.print_exc()
    loaded.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start(engine: Engine, job: dict[str, Any], models: dict[str, Any]) -> Any:
    from flashedu.serving import engines

    clock = WallClock()
    if engine.kind == "vllm":
        how: dict[str, Any] = {"dtype": job["dtype"], **GRAPHS}
        made = _once(
            models, "vllm", lambda: engines.vllm_engine(job["shape"], engine.attention, **how)
        )
        return engines.VLLM(made, clock, batch=engine.batch)
    model = _once(models, "llama", lambda: engines.llama(job["shape"], job["dtype"], job["device"]))
    how = {"batch": engine.batch}
    if engine.kind == "static":
        return engines.StaticBatches(model, engine.attention, clock, **how)
    if job["device"] == "cpu":  # whose memory is not for the cache alone
        how["room"] = 8192
    return engines.ContinuousBatching(model, engine.attention, clock, **how)


def _once(models: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    """What the engines of a group share. What could not be made twice is not tried again."""
    if name not in models:
        failures = models.setdefault(f"no {name}", [])
        if len(failures) == 2:
            raise RuntimeError(failures[-1])
        try:
            models[name] = make()
        except Exception as error:
            failures.append(sentence(error))
            raise
    return models[name]


def run_one(engine: Any, load: Load, device: str, warm_up: int = 4) -> dict[str, Any]:
    """Warm up with other requests of the same kinds; then the load, and what became of it."""
    import torch

    if warm_up:
        few = min(load.count, warm_up)
        warm = load.replace(rate_per_s=math.inf, count=few, seed=load.seed + 1)
        serve(engine, warm.requests(), engine.clock)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    engine.forget()
    served = serve(engine, load.requests(), engine.clock)
    return {
        **served.summary(),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "latencies_s": [round(s, 4) for s in served.latency_s],
        "first_tokens_s": [round(s, 4) for s in served.first_token_s],
        "samples": [list(s) for s in thinned(served.samples)],
        "tokens": digest(engine.written),
    }


def thinned(samples: Sequence[Sample], most: int = SAMPLES) -> list[Sample]:
    """Some of them, evenly, the last among them."""
    step = math.ceil(len(samples) / most)
    kept = list(samples[::-1][::step][::-1])
    return [s._replace(at_s=round(s.at_s, 4)) for s in kept]


def digest(written: dict[int, list[int]]) -> str:
    """Equal for equal tokens."""
    import hashlib

    text = json.dumps(sorted(written.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
