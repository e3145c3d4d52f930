"""`flashedu bench`: measure on a GPU, record it, and show what was recorded."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashedu.cli.options import (
    Group,
    Refused,
    Stopped,
    given,
    head_size,
    list_of,
    natural,
    number,
    one_of,
    rate,
    whole,
)
from flashedu.cli.output import print_parts, progress, write

bench = typer.Typer(cls=Group, add_completion=False)

# bench.cases, without its imports
BENCH_SECTIONS = (
    "speed, flash1, memory, standard, short, decode, flash-decoding, paged, varlen, model"
)
BENCH_PEERS = (
    "flash2, flash3, flash1, standard, sdpa-flash, sdpa-cudnn, sdpa-efficient, flex, fa4, "
    "sdpa-math, flash3-det, decode, copy, paged-16, paged-64, paged-256, varlen, padded, "
    "padded-flash2, padded-mask, unmasked, one-by-one, torch-varlen, hf-flashedu, hf-sdpa, "
    "hf-eager"
)
BENCH_PASSES = "fwd, bwd, both"
GPU_DTYPES = "bfloat16, float16, float32"
SANITIZERS = "memcheck, racecheck, initcheck, synccheck"  # bench.sanitize, without its imports
SERVERS = (  # bench.serving, without its imports
    "eager-4, sdpa-4, flashedu-4, flashedu-16, continuous-16, continuous-256, vllm-flash-4, "
    "vllm-flash-16, vllm-flash, vllm-triton, vllm-flashedu, tokens"
)


_DTYPE = typer.Option("--dtype", help=f"{GPU_DTYPES}.", parser=one_of(GPU_DTYPES), metavar="DTYPE")
_ROUNDS = typer.Option("--rounds", help="Timings of each.", parser=whole, metavar="INTEGER")
_CAUSAL = typer.Option("--causal", help="With the causal mask only.")
_FULL = typer.Option("--full", help="Without a mask only.")
_OUT = typer.Option("--out", help="The record's file, a new one.", metavar="FILE")
_COMMIT = typer.Option("--commit", help="The commit to record, where there is no git.")
_QUICK = typer.Option("--quick", help="Small sizes, 3 rounds: does it still run?")


@bench.callback(invoke_without_command=True)
def _bench(
    ctx: typer.Context,
    d: Annotated[Any, list_of("--d", "Head sizes of the speed section; 64,128.", head_size)] = None,
    n: Annotated[Any, list_of("--n", "Lengths there; 512,1024,4096,16384.")] = None,
    causal: Annotated[bool, _CAUSAL] = False,
    full: Annotated[bool, _FULL] = False,
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    passes: Annotated[
        Any, list_of("--passes", f"Of {BENCH_PASSES}; fwd,bwd.", one_of(BENCH_PASSES))
    ] = None,
    tokens: Annotated[int, number("--tokens", "Batches times length.")] = 16384,
    rounds: Annotated[int, _ROUNDS] = 20,
    peers: Annotated[
        Any, list_of("--peers", f"Of {BENCH_PEERS}; those of each section.", one_of(BENCH_PEERS))
    ] = None,
    sections: Annotated[
        Any, list_of("--sections", f"Of {BENCH_SECTIONS}; all.", one_of(BENCH_SECTIONS))
    ] = None,
    out: Annotated[str | None, _OUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
    quick: Annotated[bool, _QUICK] = False,
) -> None:
    """Time the kernels on a GPU beside PyTorch's, and record it; show what was recorded.

    Each result is checked against float64 before it is timed.
    """
    if ctx.invoked_subcommand is not None:
        return
    device = _measuring_device("bench")
    from flashedu.bench.cases import Choice, plan
    from flashedu.bench.peers import PEERS
    from flashedu.bench.run import run

    n = n or ((512, 1024) if quick else None)
    rounds = 3 if quick else rounds
    given = {"d": d, "n": n, "passes": passes, "peers": peers, "causal": _masks(causal, full)}
    choice = Choice(
        dtype=dtype, tokens=tokens, quick=quick,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    cases = plan(choice, sections or tuple(BENCH_SECTIONS.split(", ")))
    with progress() as on_case:
        steps = run(cases, {p.name: p for p in PEERS}, device, rounds=rounds, on_case=on_case)
        head = {"quick": quick, "rounds": rounds, "planned": len(cases)}
        path = _record_run("attention", device, steps, out, commit, head)
    _show_record(path)


@bench.command()
def tune(
    d: Annotated[Any, list_of("--d", "Head sizes; 64,128.", head_size)] = None,
    n: Annotated[Any, list_of("--n", "Lengths; 1024,4096,16384.")] = None,
    causal: Annotated[bool, _CAUSAL] = False,
    full: Annotated[bool, _FULL] = False,
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    tokens: Annotated[int, number("--tokens", "Batches times length.")] = 16384,
    rounds: Annotated[int, _ROUNDS] = 10,
    out: Annotated[str | None, _OUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Find the fastest tiles for flash2's kernels on this GPU, and record all timings."""
    device = _measuring_device("bench tune")
    from flashedu.bench.cases import Choice, shape
    from flashedu.bench.tune import CANDIDATES
    from flashedu.bench.tune import tune as try_all

    choice = Choice(dtype=dtype, tokens=tokens)
    problems = [
        shape(choice, length, size, mask)
        for size in d or (64, 128)
        for mask in _masks(causal, full)
        for length in n or (1024, 4096, 16384)
    ]
    with progress() as on_case:
        steps = try_all(problems, device, rounds=rounds, on_case=on_case)
        head = {"quick": False, "rounds": rounds, "planned": len(problems) * len(CANDIDATES)}
        path = _record_run("tiles", device, steps, out, commit, head)
    _show_record(path)


@bench.command()
def steps(
    d: Annotated[Any, list_of("--d", "Head sizes, of 64 and 128; both.", one_of("64, 128"))] = None,
    n: Annotated[Any, list_of("--n", "Lengths; 1024,4096,16384.")] = None,
    causal: Annotated[bool, _CAUSAL] = False,
    full: Annotated[bool, _FULL] = False,
    tokens: Annotated[int, number("--tokens", "Batches times length.")] = 16384,
    rounds: Annotated[int, _ROUNDS] = 10,
    out: Annotated[str | None, _OUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
    quick: Annotated[bool, _QUICK] = False,
) -> None:
    """Time the steps from flash2 to flash3 on a Hopper GPU, and what was tried, and record it.

    Each is flash3 with a few words of its source changed. Forward, in bfloat16, beside cuDNN.
    """
    device = _measuring_device("bench steps")
    card = device.facts()
    if list(card["compute_capability"]) != [9, 0]:
        raise Stopped(f"flashedu bench steps: needs a Hopper GPU, got {card['card']}")
    from flashedu.bench import steps as steps_
    from flashedu.bench.cases import Choice, shape

    choice = Choice(tokens=1024 if quick else tokens)
    problems = [
        shape(choice, length, int(size), mask)
        for size in d or (64, 128)
        for mask in _masks(causal, full)
        for length in n or ((1024,) if quick else (1024, 4096, 16384))
    ]
    rounds = 3 if quick else rounds
    with progress() as on_case:
        timed = steps_.run(problems, device, rounds=rounds, on_case=on_case)
        head = {"quick": quick, "rounds": rounds, "planned": len(problems), **steps_.provenance()}
        path = _record_run("steps", device, timed, out, commit, head)
    _show_record(path)


@bench.command()
def traffic(
    out: Annotated[str | None, _OUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few and small kernels: does it still run?")
    ] = False,
) -> None:
    """Read the GPU's own counters of traffic, with Nsight Compute, and record them.

    Where they cannot be read, show what was recorded.
    """
    reason = _why_no_gpu()
    if reason is None:
        from flashedu.bench import traffic as counters
        from flashedu.bench.device import Cuda

        reason = counters.why_not()
    if reason is None:
        device, wanted = Cuda(), counters.plan(quick)
        head = {"quick": quick, "planned": len(wanted), **counters.provenance()}
        try:
            with progress() as on_case:
                steps = counters.measure(wanted, device, on_case=on_case)
                path = _record_run("traffic", device, steps, out, commit, head)
        except counters.Unreadable as error:
            reason = str(error)
        else:
            _show_record(path)
            return
    print(f"flashedu bench traffic: {reason}", file=sys.stderr)
    _show_recorded_traffic()
    raise typer.Exit(1)


@bench.command()
def sanitize(
    tools: Annotated[
        Any, list_of("--tools", f"Of {SANITIZERS}; memcheck,racecheck.", one_of(SANITIZERS))
    ] = None,
    out: Annotated[str | None, _OUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few launches: does it still run?")
    ] = False,
) -> None:
    """Watch every access of the kernels, with NVIDIA's Compute Sanitizer, and record it.

    With odd sizes; with tables and runs that lead astray; and with planted mistakes, which must be
    found. The exit code is 1 if they are not, or if anything else is.
    """
    device = _measuring_device("bench sanitize")
    from flashedu.bench import record
    from flashedu.bench import sanitize as sanitizer

    if reason := sanitizer.why_not():
        raise Stopped(f"flashedu bench sanitize: {reason}")
    tools = tools or ("memcheck", "racecheck")
    head = {"quick": quick, "planned": len(tools), **sanitizer.provenance()}
    try:
        with progress() as on_case:
            steps = sanitizer.measure(tools, quick, device, on_case=on_case)
            path = _record_run("sanitizer", device, steps, out, commit, head)
    except sanitizer.Unreadable as error:
        raise Stopped(f"flashedu bench sanitize: {error}") from None
    _show_record(path)
    if not all(sanitizer.clean(case) for case in record.load(path).data["cases"]):
        raise typer.Exit(1)


@bench.command()
def serving(
    engines: Annotated[
        Any, list_of("--engines", f"Of {SERVERS}; the case study.", one_of(SERVERS))
    ] = None,
    rates: Annotated[
        Any, list_of("--rates", "Requests a second, or inf: all at once; inf.", rate)
    ] = None,
    count: Annotated[int, number("--count", "Requests of a run.")] = 64,
    seed: Annotated[int, number("--seed", "Of arrivals, lengths and tokens.", natural)] = 0,
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    out: Annotated[str | None, _OUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model, 8 requests: does it still run?")
    ] = False,
) -> None:
    """Send a load of requests to real engines, and record throughput, latency and memory.

    A model of Llama 2 7B's shape with random weights. Without --engines: the case study of chapter
    12, with rates and counts of its own. Its part tokens compares what vLLM's backends and
    ours write, in float16, with a small model and prompts of its own.
    """
    device = _measuring_device("bench serving")
    from flashedu.bench import serving as engines_
    from flashedu.bench import tokens

    compares = engines is None or tokens.TOKENS in engines
    wanted: Any = engines_.CASE_STUDY
    if engines:
        loaded = [engine for engine in engines if engine != tokens.TOKENS]
        wanted = [(engine, r, count) for engine in loaded for r in rates or (math.inf,)]
    if quick:
        wanted = [(engine, r, min(n, 8)) for engine, r, n in wanted]
    shape = "tiny" if quick else "llama2-7b"
    runs = engines_.plan(shape, wanted, seed)
    device.give_back()
    with progress() as on_case:
        steps = engines_.measure(runs, shape, dtype, device.name, on_case=on_case)
        if compares:  # first: it is soon done, and says whether vLLM runs at all
            prompts = 12 if quick else tokens.PROMPTS
            steps = itertools.chain(tokens.measure(prompts, seed, on_case=on_case), steps)
        kinds = {run.engine.kind for run in runs} - {"vllm"}
        more = compares + (bool(kinds) and engines_.plans(shape, device.name))
        head = {"quick": quick, "planned": len(runs) + more, **engines_.provenance()}
        path = _record_run("serving", device, steps, out, commit, head)
    _show_record(path)


@bench.command()
def show(
    file: Annotated[
        str | None, typer.Argument(help="A record; the newest if not given.", metavar="[FILE]")
    ] = None,
    png: Annotated[
        str | None, typer.Option("--png", help="Draw it into this file.", metavar="FILE")
    ] = None,
) -> None:
    """Print a record as tables; draw its figures."""
    _show_record(file, png)


def _measuring_device(command: str) -> Any:
    if reason := _why_no_gpu():
        raise Stopped(f"flashedu {command}: {reason}{_recorded()}")
    from flashedu.bench.device import Cuda

    return Cuda()


def _why_no_gpu() -> str | None:
    try:
        from flashedu.bench import device
    except ModuleNotFoundError as error:
        return f"needs {error.name}: pip install {error.name}"
    return device.why_not()


def _recorded() -> str:
    from flashedu.bench import record

    try:
        record.latest()
    except record.NoRecord:
        return ""
    return "; flashedu bench show prints what was recorded"


def _masks(causal: bool, full: bool) -> tuple[bool, ...]:
    return (False, True) if causal == full else (causal,)


def _record_run(
    kind: str, device: Any, steps: Iterable[Any], out: str | None, commit: str | None, head: Any
) -> str:
    """Write the steps into a new record as they come; the path of it."""
    import tempfile

    from flashedu.bench.device import provenance
    from flashedu.bench.record import Writer, new_path

    command = " ".join(["flashedu", *given]).replace(out or "\0", Path(out or "").name)
    facts = {"kind": kind, **provenance(device, command, commit), **head}
    path = Path(out) if out else new_path(kind, facts["card"], facts["date"])
    if head["quick"] and not out:
        path = Path(tempfile.mkdtemp()) / path.name
    try:
        writer = Writer(path, facts)
    except OSError as error:
        why = "is there already" if isinstance(error, FileExistsError) else error.strerror
        raise Refused(f"flashedu bench: --out {path}: {why}; a new file would do") from None
    try:
        for step in steps:
            writer.add(step)
    finally:
        if not writer.data["cases"]:  # it never began
            writer.path.unlink()
    writer.finish(after=device.state())
    return str(path)


def _show_recorded_traffic() -> None:
    from flashedu.bench import record, show

    try:
        print_parts(show.tables(record.latest(kind="traffic")))
    except record.NoRecord as error:
        print(f"flashedu bench traffic: {error}", file=sys.stderr)


def _show_record(file: str | None, png: str | None = None) -> None:
    from flashedu.bench import record, show

    try:
        found = record.load(file) if file else record.latest()
    except record.NoRecord as error:
        raise Stopped(f"flashedu bench show: {error}") from None
    print_parts(show.tables(found))
    if png:
        import matplotlib

        matplotlib.use("Agg")
        try:
            written = show.save(show.figures(found), Path(png))
        except OSError as error:
            raise Stopped(f"flashedu bench show: --png {png}: {error.strerror}") from None
        write("".join(f"{path}\n" for path in written) or "This record has no figure.\n")
