"""`flashedu ladder`: every rung on the same inputs, as a table."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from flashedu import __version__
from flashedu.cli.options import Refused, Stopped, head_size, number, one_of
from flashedu.cli.output import console, print_parts, rule, with_status, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flashedu.ladder import Row
    from flashedu.memory import GPU, Problem

GPU_KEYS = "t4, a100-40, a100-80, rtx4090, h100, h200, b200"  # memory.gpus, without its imports
DTYPES = "float16, bfloat16, float32, float64"
WIDE = 110  # columns from which there is room for the ideas


def ladder(
    n: Annotated[int, number("--n", "Queries, and keys.")] = 1024,
    d: Annotated[int, number("--d", "Head size.", head_size)] = 64,
    heads: Annotated[int, number("--heads", "Query heads.")] = 4,
    batch: Annotated[int, number("--batch", "Batches.")] = 1,
    kv_heads: Annotated[
        int | None, number("--kv-heads", "Key and value heads; as --heads if not given.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Hide the future keys.")] = False,
    dtype: Annotated[
        str, typer.Option(help=f"{DTYPES}.", parser=one_of(DTYPES), metavar="DTYPE")
    ] = "float16",
    gpu: Annotated[
        str,
        typer.Option(
            help=f"The card to bound the time on: {GPU_KEYS}.",
            parser=one_of(GPU_KEYS),
            metavar="GPU",
        ),
    ] = "h200",
    block_q: Annotated[int, number("--block-q", "Queries in a tile.")] = 128,
    block_k: Annotated[int, number("--block-k", "Keys in a tile.")] = 64,
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

    rows = with_status(steps, "running the rungs")
    ran = [row for row in rows if row.skipped is None]
    ok = bool(ran) and all(row.ok for row in rows)
    if as_json:
        write_json({
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
        print_parts(_ladder_report(problem, card, rows))
    if not ok:
        raise typer.Exit(1)


def _ladder_report(problem: Problem, card: GPU, rows: list[Row]) -> Iterable[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from flashedu.ladder import takeaway
    from flashedu.units import human_bytes, human_seconds

    p, wide = problem, console().width >= WIDE
    heads = f"H {p.H}" if p.H_kv == p.H else f"H {p.H}, H_kv {p.H_kv}"
    yield Text(
        f"B {p.B}, {heads}, N {p.Nq}, D {p.D}, {p.dtype}{', causal' if p.causal else ''}; "
        f"tiles {p.block_q} × {p.block_k}; {card.name}"
    )
    table = Table(box=rule(), pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
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
