"""The command line: `flashedu ladder`, `flashedu doctor` and `flashedu bench`.

A wrong option gets one line on stderr and exit code 2. Slow imports wait until they are needed.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flashedu import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flashedu.doctor import Finding
    from flashedu.ladder import Row
    from flashedu.memory import GPU, Problem

GPU_KEYS = "t4, a100-40, a100-80, rtx4090, h100, h200, b200"  # memory.gpus, without its imports
DTYPES = "float16, bfloat16, float32, float64"
LARGEST = 10**9
OUT_OF_MEMORY = "flashedu: out of memory; a smaller --n needs less"
WIDE = 110  # columns from which there is room for the ideas

_args: list[str] = []  # as given

UsageError: type[Any] = typer.BadParameter.__mro__[1]  # click's, or the copy that typer brings


class Refused(Exception):
    """One line for stderr, and exit code 2."""


class Stopped(Exception):
    """One line for stderr, and exit code 1: asked rightly, but not possible here."""


class ClosedPipe(Exception):
    """Nobody reads stdout any more."""


class Group(TyperGroup):
    """Commands, and the close one for a name that is none."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            commands = ", ".join(self.commands)
            close = _close(args[0], self.commands) or f"the commands are {commands}"
            raise Refused(f"{ctx.command_path}: no command {_shown(args[0])}; {close}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Group,
    name="flashedu",
    help="FlashAttention, rung by rung.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _args[:] = sys.argv[1:] if args is None else args
    _print_what_the_encoding_lacks_as_ascii()
    try:
        code = app(args=args, prog_name="flashedu", standalone_mode=False)
    except UsageError as error:
        return _complain(_one_line(error, _args), 2)
    except Refused as error:
        return _complain(str(error), 2)
    except Stopped as error:
        return _complain(str(error), 1)
    except MemoryError:
        return _complain(OUT_OF_MEMORY, 1)
    except ImportError as error:  # such as Triton's, whose sentence says what to do
        return _complain(f"flashedu: {error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch has no MemoryError on the CPU
            raise
        return _complain(OUT_OF_MEMORY, 1)
    except SystemExit:  # so rich and typer report a closed pipe while they print help
        return 141
    except ClosedPipe:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141  # 128 + SIGPIPE, as for other programs
    if code == 130:
        _complain("flashedu: stopped", 130)
    return code or 0


@app.callback(invoke_without_command=True)
def _flashedu(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        _write(f"flashedu {__version__}\n")
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        _write(ctx.get_help())  # typer has printed it already, if it uses rich


def _whole(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if not 1 <= number <= LARGEST:
        raise typer.BadParameter(f"must be an integer from 1 to {LARGEST}, got {_shown(value)}")
    return number


def _head_size(value: str) -> int:
    from flashedu.stages.contract import MAX_D

    try:
        number = int(value)
    except ValueError:
        number = 0
    if not 1 <= number <= MAX_D:
        raise typer.BadParameter(f"must be an integer from 1 to {MAX_D}, got {_shown(value)}")
    return number


def _one_of(known: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.lower() not in known.split(", "):
            raise typer.BadParameter(f"must be one of {known}, got {_shown(value)}")
        return value.lower()

    return parse


def _number(name: str, what: str, parser: Callable[[str], Any] = _whole) -> Any:
    return typer.Option(name, help=what, parser=parser, metavar="INTEGER")


@app.command()
def ladder(
    n: Annotated[int, _number("--n", "Queries, and keys.")] = 1024,
    d: Annotated[int, _number("--d", "Head size.", _head_size)] = 64,
    heads: Annotated[int, _number("--heads", "Query heads.")] = 4,
    batch: Annotated[int, _number("--batch", "Batches.")] = 1,
    kv_heads: Annotated[
        int | None, _number("--kv-heads", "Key and value heads; as --heads if not given.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Hide the future keys.")] = False,
    dtype: Annotated[
        str, typer.Option(help=f"{DTYPES}.", parser=_one_of(DTYPES), metavar="DTYPE")
    ] = "float16",
    gpu: Annotated[
        str,
        typer.Option(
            help=f"The card to bound the time on: {GPU_KEYS}.",
            parser=_one_of(GPU_KEYS),
            metavar="GPU",
        ),
    ] = "h200",
    block_q: Annotated[int, _number("--block-q", "Queries in a tile.")] = 128,
    block_k: Annotated[int, _number("--block-k", "Keys in a tile.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run every rung on the same inputs: its result checked, its bytes counted.

    Exit code 1 if a rung is wrong, or counts other bytes than its closed form.
    """
    if kv_heads is not None and heads % kv_heads:
        divisors = ", ".join(str(i) for i in range(1, min(heads, 1000) + 1) if heads % i == 0)
        raise Refused(
            f"flashedu ladder: --kv-heads must divide --heads {heads} ({divisors} would do), "
            f"got {kv_heads}"
        )
    _take_one_thread()
    for needed in ("numpy", "torch"):
        _need(needed)
    from flashedu import ladder as rungs
    from flashedu.memory import Problem
    from flashedu.memory import gpu as card_of

    card = card_of(gpu)
    problem = Problem(
        Nq=n, D=d, B=batch, H=heads, H_kv=kv_heads or heads, dtype=dtype, causal=causal,
        block_q=block_q, block_k=block_k,
    )  # fmt: skip
    try:
        steps = rungs.run(problem, card)
    except ValueError as error:  # a dtype that the card lacks
        raise Refused(f"flashedu ladder: --dtype {dtype} --gpu {gpu}: {error}") from None
    _refuse_what_does_not_fit(problem)

    rows = _with_status(steps, "running the rungs")
    ran = [row for row in rows if row.skipped is None]
    ok = bool(ran) and all(row.ok for row in rows)
    if as_json:
        _write_json({
            "problem": {
                **{name: getattr(problem, name) for name in ("B", "H", "H_kv", "Nq", "Nk", "D")},
                "dtype": dtype, "causal": causal, "block_q": block_q, "block_k": block_k,
            },
            "gpu": {
                "key": card.key,
                "name": card.name,
                "hbm_bytes_per_s": card.hbm_bytes_per_s,
                "flops_per_s": card.flops_per_s(dtype),
                "sram_bytes_per_program": card.sram_bytes_per_program,
            },
            "versions": _versions(),
            "ok": ok,
            "takeaway": rungs.takeaway(rows),
            "rows": [row.as_dict() for row in rows],
        })  # fmt: skip
    else:
        _print(_ladder_report(problem, card, rows))
    if not ok:
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine has, what is wrong with it, and what to do.

    Exit code 1 if the course cannot run here.
    """
    from flashedu import doctor as checks

    (facts,) = _with_status((checks.look() for _ in range(1)), "looking around")
    findings = checks.diagnose(facts)
    if as_json:
        _write_json(checks.as_dict(facts, findings))
    else:
        _print(_doctor_report(findings))
    if not checks.course_runs(findings):
        raise typer.Exit(1)


# bench

bench = typer.Typer(cls=Group, add_completion=False)
app.add_typer(bench, name="bench")

BENCH_SECTIONS = "speed, flash1, memory, standard, short"  # bench.cases, without its imports
BENCH_PEERS = "flash2, flash1, standard, sdpa-flash, sdpa-cudnn, sdpa-efficient, flex, sdpa-math"
BENCH_PASSES = "fwd, bwd, both"
GPU_DTYPES = "bfloat16, float16, float32"


def _each(one: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda value: tuple(one(part.strip()) for part in value.split(","))


def _list(name: str, what: str, one: Callable[[str], Any] = _whole) -> Any:
    return typer.Option(name, help=what, parser=_each(one), metavar="LIST")


_DTYPE = typer.Option("--dtype", help=f"{GPU_DTYPES}.", parser=_one_of(GPU_DTYPES), metavar="DTYPE")
_ROUNDS = typer.Option("--rounds", help="Timings of each.", parser=_whole, metavar="INTEGER")
_CAUSAL = typer.Option("--causal", help="With the causal mask only.")
_FULL = typer.Option("--full", help="Without a mask only.")
_OUT = typer.Option("--out", help="The record's file, a new one.", metavar="FILE")
_COMMIT = typer.Option("--commit", help="The commit to record, where there is no git.")


@bench.callback(invoke_without_command=True)
def _bench(
    ctx: typer.Context,
    d: Annotated[Any, _list("--d", "Head sizes of the speed section; 64,128.", _head_size)] = None,
    n: Annotated[Any, _list("--n", "Lengths there; 512,1024,4096,16384.")] = None,
    causal: Annotated[bool, _CAUSAL] = False,
    full: Annotated[bool, _FULL] = False,
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    passes: Annotated[
        Any, _list("--passes", f"Of {BENCH_PASSES}; fwd,bwd.", _one_of(BENCH_PASSES))
    ] = None,
    tokens: Annotated[int, _number("--tokens", "Batches times length.")] = 16384,
    rounds: Annotated[int, _ROUNDS] = 20,
    peers: Annotated[
        Any, _list("--peers", f"Of {BENCH_PEERS}; all but the last.", _one_of(BENCH_PEERS))
    ] = None,
    sections: Annotated[
        Any, _list("--sections", f"Of {BENCH_SECTIONS}; all.", _one_of(BENCH_SECTIONS))
    ] = None,
    out: Annotated[str | None, _OUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, 3 rounds: does it still run?")
    ] = False,
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
    with _progress() as on_case:
        steps = run(cases, {p.name: p for p in PEERS}, device, rounds=rounds, on_case=on_case)
        head = {"quick": quick, "rounds": rounds, "planned": len(cases)}
        path = _record_run("attention", device, steps, out, commit, head)
    _show_record(path)


@bench.command()
def tune(
    d: Annotated[Any, _list("--d", "Head sizes; 64,128.", _head_size)] = None,
    n: Annotated[Any, _list("--n", "Lengths; 1024,4096,16384.")] = None,
    causal: Annotated[bool, _CAUSAL] = False,
    full: Annotated[bool, _FULL] = False,
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    tokens: Annotated[int, _number("--tokens", "Batches times length.")] = 16384,
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
    with _progress() as on_case:
        steps = try_all(problems, device, rounds=rounds, on_case=on_case)
        head = {"quick": False, "rounds": rounds, "planned": len(problems) * len(CANDIDATES)}
        path = _record_run("tiles", device, steps, out, commit, head)
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
    try:
        from flashedu.bench import device
    except ModuleNotFoundError as error:
        raise Stopped(f"flashedu {command}: needs {error.name}: pip install {error.name}") from None
    if reason := device.why_not():
        raise Stopped(f"flashedu {command}: {reason}{_recorded()}")
    return device.Cuda()


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

    command = " ".join(["flashedu", *_args]).replace(out or "\0", Path(out or "").name)
    facts = {"kind": kind, **provenance(device, command, commit), **head}
    path = Path(out) if out else new_path(kind, facts["card"], facts["date"])
    if head["quick"] and not out:
        path = Path(tempfile.mkdtemp()) / path.name
    try:
        writer = Writer(path, facts)
    except OSError as error:
        why = "is there already" if isinstance(error, FileExistsError) else error.strerror
        raise Refused(f"flashedu bench: --out {path}: {why}; a new file would do") from None
    for step in steps:
        writer.add(step)
    writer.finish(after=device.state())
    return str(path)


def _show_record(file: str | None, png: str | None = None) -> None:
    from flashedu.bench import record, show

    try:
        found = record.load(file) if file else record.latest()
    except record.NoRecord as error:
        raise Stopped(f"flashedu bench show: {error}") from None
    _print(show.tables(found))
    if png:
        import matplotlib

        matplotlib.use("Agg")
        try:
            written = show.save(show.figures(found), Path(png))
        except OSError as error:
            raise Stopped(f"flashedu bench show: --png {png}: {error.strerror}") from None
        _write("".join(f"{path}\n" for path in written) or "This record has no figure.\n")


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr; a line for each case where nobody watches."""
    if not (sys.stderr is not None and sys.stderr.isatty()):
        yield lambda number, total, what: print(
            f"[{number + 1}/{total}] {what}", file=sys.stderr, flush=True
        )
        return
    from rich.progress import Progress

    with Progress(console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda number, total, what: bar.update(
            task, completed=number, total=total, description=what
        )


# the reports


def _ladder_report(problem: Problem, card: GPU, rows: list[Row]) -> Iterable[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from flashedu.ladder import takeaway
    from flashedu.units import human_bytes, human_seconds

    p, wide = problem, _console().width >= WIDE
    heads = f"H {p.H}" if p.H_kv == p.H else f"H {p.H}, H_kv {p.H_kv}"
    yield Text(
        f"B {p.B}, {heads}, N {p.Nq}, D {p.D}, {p.dtype}{', causal' if p.causal else ''}; "
        f"tiles {p.block_q} × {p.block_k}; {card.name}"
    )
    table = Table(box=_rule(), pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("rung", no_wrap=True)
    if wide:
        table.add_column("idea")
    for head in ("error", "traffic", "extra", "SRAM peak", "FLOPs/B", "least time"):
        table.add_column(head, justify="left" if head == "error" else "right")
    capacity, too_large = card.sram_bytes_per_program, False
    for row in rows:
        cells = [Text(row.rung), *([Text(row.idea)] if wide else [])]
        if row.counted is None or row.error is None:
            table.add_row(*cells, Text("skipped"))
            continue
        good = row.within_budget
        on_chip = row.counted.sram_peak_bytes
        fits = on_chip is None or on_chip <= capacity
        too_large |= not fits
        table.add_row(
            *cells,
            Text(f"{row.error:.1e} {'ok' if good else 'WRONG'}", "green" if good else "red"),
            human_bytes(row.counted.hbm_bytes),
            human_bytes(row.counted.hbm_extra_bytes),
            Text(_on_chip(on_chip) + ("" if fits else " !"), _mark(fits)),
            f"{row.counted.intensity:.0f}",
            f"{human_seconds(row.bound.seconds)} {row.bound.limit}",
        )
    yield table
    ran = [row for row in rows if row.skipped is None]
    budgets = ", ".join(dict.fromkeys(f"{row.budget:.1e}" for row in ran))
    lines = [f"error: largest difference from float64; budget {budgets}"]
    if too_large:
        lines.append(f"!: more SRAM than one program has, {human_bytes(capacity)} on {card.name}")
    if any(row.counted and row.counted.sram_peak_bytes is None for row in ran):
        lines.append("compiler: what a Triton kernel keeps on chip is the compiler's choice")
        if problem.D not in (16, 32, 64, 128, 256):
            lines.append("Triton kernels compute with D rounded up to a power of two, 16 or more")
    yield Text("\n".join(lines), "dim")
    for row in rows:
        if row.skipped:
            yield Text(f"{row.rung} skipped: {row.skipped}", "yellow")
        elif not row.counted_equals_closed_form:
            yield Text(f"{row.rung} counts {row.counted}; by formula {row.closed_form}", "red")
    yield Text(takeaway(rows), "bold")


def _doctor_report(findings: list[Finding]) -> Iterable[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=_rule(), pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for head in ("", "what", "found"):
        table.add_column(head)
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n{finding.advice}", "dim" if finding.status == "ok" else "bold")
        table.add_row(Text(finding.status, colours[finding.status]), finding.name, found)
    yield table
    blocking = [finding.name for finding in findings if finding.blocks]
    if blocking:
        yield Text(f"The course cannot run here. Put right: {', '.join(blocking)}.", "bold red")
        return
    runs = [f.name.removeprefix("stage ") for f in findings if f.found == "runs here"]
    yield Text(f"The course runs here. Stages that run: {', '.join(runs) or 'none'}.", "bold")


def _rule() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def _on_chip(n_bytes: int | None) -> str:
    from flashedu.units import human_bytes

    return "compiler" if n_bytes is None else human_bytes(n_bytes)


def _mark(good: bool) -> str:
    return "" if good else "yellow"


def _versions() -> dict[str, str]:
    import numpy
    import torch

    return {
        "flashedu": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
    }


# what cannot be done here


def _take_one_thread() -> None:
    """Threads gain little on tiles, and where other work runs they wait for one another: 5 s
    become 40. A variable that is set already stays."""
    if "numpy" not in sys.modules and "torch" not in sys.modules:
        for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ.setdefault(variable, "1")


def _need(module: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise Stopped(
            f"flashedu ladder: needs {module}: pip install {module} (flashedu doctor says more)"
        ) from None


def _refuse_what_does_not_fit(problem: Problem) -> None:
    from flashedu.ladder import largest_n, needed_bytes, physical_memory_bytes
    from flashedu.units import human_bytes

    memory, needed = physical_memory_bytes(), needed_bytes(problem)
    if memory is None or needed <= memory // 2:
        return
    fits = largest_n(problem, memory // 2)
    advice = f"--n {fits} would do" if fits else "fewer --heads or --batch are needed"
    raise Refused(
        f"flashedu ladder: --n {problem.Nq} needs about {human_bytes(needed)}, mostly for the "
        f"check in float64, more than half of this machine's {human_bytes(memory)}: {advice}"
    )


# output


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _print(parts: Iterable[RenderableType]) -> None:
    console = _console()
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    _write("\n".join(line.rstrip() for line in captured.get().split("\n")))


def _write_json(value: Any) -> None:
    _write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The same, with None where a float is NaN or infinite, as JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ClosedPipe from None


def _with_status(steps: Iterable[Any], doing: str) -> list[Any]:
    """All of `steps`; a person who waits at a terminal sees that something runs."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    with _console(stderr=True).status(doing) if terminal else nullcontext():
        return list(steps)


_ASCII = str.maketrans(
    {"×": "x", "→": "->", "·": "*", "µ": "u", "…": ".", "−": "-", "–": "-", "—": "-", "√": "v"}
    | dict.fromkeys("─━═╌┄╶╴╺╸", "-")
    | dict.fromkeys("│┃║", "|")
    | dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰", "+")
)


def _print_what_the_encoding_lacks_as_ascii() -> None:
    def replace(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end].translate(_ASCII)
        return "".join(c if c.isascii() else "?" for c in text), error.end

    codecs.register_error("flashedu-ascii", replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="flashedu-ascii")


# one line for a wrong option


def _complain(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code


def _one_line(error: Any, args: list[str]) -> str:
    """The message of click's exception, in the words of this course."""
    root = typer.main.get_command(app)
    ctx = error.ctx
    if ctx:
        command, params = ctx.command_path, ctx.command.params
    else:  # the parser found it, and does not say for which command
        command, sub = "flashedu", root
        for name in args:
            if name not in getattr(sub, "commands", {}):
                break
            command, sub = f"{command} {name}", sub.commands[name]  # type: ignore[attr-defined]
        params = sub.params
    kind = type(error).__name__
    if kind == "NoSuchOption":
        options = [name for param in params for name in (*param.opts, "--help")]
        close = _close(error.option_name, options) or f"{command} --help lists the options"
        return f"{command}: no option {error.option_name}; {close}"
    if kind == "BadOptionUsage":
        if "does not take a value" in error.message:
            return f"{command}: {error.option_name} takes no value"
        usual = [param.default for param in params if error.option_name in param.opts]
        example = usual[0] if usual and usual[0] is not None else 1
        return f"{command}: {error.option_name} needs a value, as in {error.option_name} {example}"
    if isinstance(error, typer.BadParameter) and error.param is not None:
        return f"{command}: {error.param.opts[0]} {error.message}"
    message = error.format_message().rstrip(".")
    return f"{command}: {message[:1].lower()}{message[1:]}"


def _close(name: str, known: Iterable[str]) -> str:
    bare = {candidate.lstrip("-"): candidate for candidate in known}
    found = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1, cutoff=0.6)
    return f"did you mean {bare[found[0]]}?" if found else ""


def _shown(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:37] + "...")
