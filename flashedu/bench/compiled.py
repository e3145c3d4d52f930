"""What each kernel takes of a card, found by compiling it, on a machine that may have no GPU.

    python -m flashedu.bench.compiled [--gpu h200]    the kernels for this card, as a table
    python -m flashedu.bench.compiled --write         for all cards, as JSON in benchmarks/results/:
                                                      some ten minutes
    … --write --stage flash3 flash3-det               these; the record keeps the other rows

A stage launches its kernels as ever, on arrays without memory (torch's "meta" device). Triton's
hook takes each launch before it happens, with its arguments, alignments and tile, and the kernel is
compiled for the card in question. flash3-det is flash3's backward with deterministic=True.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from flashedu.memory import GPU, UNCOUNTED, Problem, gpu
from flashedu.memory.problem import ITEM_BYTES
from flashedu.units import human_bytes

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

Capability = tuple[int, int]
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
HEAD_SIZES = (16, 32, 64, 128, 256)
DTYPES = ("float16", "float32")  # bfloat16 takes what float16 takes
LENGTHS = (1024, 4096, 16384)

# Of an SM. CUDA C++ Programming Guide, Technical Specifications per Compute Capability.
REGISTERS = 64 * 2**10
THREADS = {(7, 5): 1024, (8, 0): 2048, (8, 9): 1536, (9, 0): 2048, (10, 0): 2048}

MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # the newest first
COPY_INSTRUCTIONS = ("cp.async.bulk.tensor", "cp.async.cg")


@dataclass(frozen=True)
class Case:
    """All kernels of one stage, on a card of this compute capability."""

    stage: str
    capability: Capability
    D: int
    dtype: str
    causal: bool
    N: int  # queries, and keys


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes."""

    case: Case
    kernel: str
    block_q: int
    block_k: int | None  # None: the kernel knows no keys
    warps: int
    stages: int
    registers: int  # of each thread, at most 255
    spilled_bytes: int  # of each thread: what found no register
    sram_bytes: int  # shared memory of a program
    matrix_instruction: str | None  # None: no matrix unit is used
    copy_instruction: str | None  # that brings tiles while others are used; None: none does

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return 32 * self.warps

    def programs_per_sm(self, card: GPU) -> int:
        """How many run on an SM at a time: by registers, shared memory and threads."""
        registers = -(-self.registers // 8) * 8  # the card gives them by eights
        reserved = card.sram_bytes_per_sm - card.sram_bytes_per_program  # for each program
        return min(
            REGISTERS // (registers * self.threads),
            card.sram_bytes_per_sm // max(1, self.sram_bytes + reserved),
            THREADS[card.compute_capability] // self.threads,
        )


def cases(
    capabilities: Iterable[Capability] = CAPABILITIES,
    head_sizes: Iterable[int] = HEAD_SIZES,
    dtypes: Iterable[str] = DTYPES,
    masks: Iterable[bool] = (False, True),
) -> Iterator[Case]:
    """One case for each stage and combination; a longer N only if it has tiles of its own."""
    for stage, capability, D, dtype, causal in itertools.product(
        LAUNCHES, tuple(capabilities), tuple(head_sizes), tuple(dtypes), tuple(masks)
    ):
        for_hopper = capability == (9, 0) and dtype == "float16" and D <= 128
        if stage.startswith("flash3") and not for_hopper:
            continue
        every = [Case(stage, capability, D, dtype, causal, N) for N in LENGTHS]
        shortest = {_tiles(case): case.N for case in reversed(every)}
        yield from (case for case in every if case.N in shortest.values())


def _tiles(case: Case) -> Any:
    if case.stage.startswith("flash3"):
        from flashedu.stages import flash3, flash3_backward, hopper

        columns = hopper.columns(case.D)
        if case.stage == "flash3-det":
            return flash3_backward.TILES[columns]
        return flash3.consumers_for(columns, case.causal, case.N)
    from flashedu.stages.flash2_tiles import tiles_for

    item = ITEM_BYTES[case.dtype]
    return tiles_for(case.capability, case.D, item, causal=case.causal, N=case.N)


def recorded_cases() -> list[Case]:
    """Those of `--write`. float32 with a mask only: it compiles slowly, and has both loops."""
    return [*cases(dtypes=("float16",)), *cases(dtypes=("float32",), masks=(True,))]


def compile_all(wanted: Sequence[Case], *, threads: int = 2) -> list[Compiled]:
    """Compile every kernel of the cases, in a process of its own, which does not interpret.

    Raises RuntimeError, with the compiler's last line, if a kernel does not compile.
    """
    done = subprocess.run(
        [sys.executable, "-m", "flashedu.bench.compiled", "--worker", str(threads)],
        input=json.dumps([asdict(case) for case in wanted]),
        capture_output=True, text=True, check=False,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )  # fmt: skip
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the kernels did not compile: {why}")
    return [_from_row(row) for row in json.loads(done.stdout)]


def from_record(record: Mapping[str, Any]) -> list[Compiled]:
    """The kernels of a record, as `flashedu.notebook.record("compiled_triton3.7.1")` reads it."""
    return [_from_row(row) for row in record["rows"]]


def table(kernels: Iterable[Compiled], card: GPU) -> list[dict[str, Any]]:
    """The SRAM budget: a row for each kernel that was compiled for `card`.

    Registers and spilled bytes are those of a thread, shared memory that of a program; programs is
    how many run on an SM at a time. Tiles may depend on N: each has a row, for one N that takes it.
    """
    rows: list[dict[str, Any]] = []
    for found in kernels:
        if found.case.capability != card.compute_capability:
            continue
        row = {
            "kernel": f"{found.case.stage} {found.kernel.removesuffix('_kernel')}",
            "D": found.case.D,
            "dtype": found.case.dtype,
            "causal": found.case.causal,
            "compiled at N": found.case.N,
            "tile": f"{found.block_q} × {found.block_k}" if found.block_k else f"{found.block_q}",
            "threads": found.threads,
            "registers": found.registers,
            "spilled": human_bytes(found.spilled_bytes),
            "shared memory": human_bytes(found.sram_bytes),
            "programs": found.programs_per_sm(card),
            "matrix instruction": found.matrix_instruction or "none",
        }
        if all({**row, "compiled at N": other["compiled at N"]} != other for other in rows):
            rows.append(row)
    return rows


def _row(found: Compiled) -> dict[str, Any]:
    row = asdict(found)
    return {**row.pop("case"), **row}


def _from_row(row: Mapping[str, Any]) -> Compiled:
    rest = {name: value for name, value in row.items() if name not in Case.__dataclass_fields__}
    return Compiled(_case(row), **rest)


def _case(row: Mapping[str, Any]) -> Case:
    found = {field.name: row[field.name] for field in fields(Case)}
    return Case(**{**found, "capability": tuple(found["capability"])})


# in the process that compiles


def _launch_flash1(q: Any, problem: Problem, tiles: Any) -> None:
    from flashedu.stages import flash1

    flash1.forward(q, q, q, problem, 1.0, UNCOUNTED, tiles.forward)


def _launch_flash2(q: Any, problem: Problem, tiles: Any) -> None:
    from flashedu.stages import flash2

    o, lse = flash2.forward(q, q, q, problem, 1.0, UNCOUNTED, tiles.forward)
    flash2.backward(o, None, q, q, q, o, lse, problem, 1.0, UNCOUNTED, tiles)


def _launch_varlen(q: Any, problem: Problem, tiles: Any) -> None:
    import torch

    from flashedu.stages import varlen

    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    first = stop = q.new_empty(problem.B, problem.Nq, dtype=torch.int32)
    varlen.forward(q, q, q, first, stop, problem, 1.0, UNCOUNTED, tiles.forward)
    runs = first, stop
    varlen.backward(o, None, q, q, q, o, lse, *runs, problem, 1.0, UNCOUNTED, tiles)


def _launch_decode(q: Any, problem: Problem, tiles: Any) -> None:
    """The last query of 8 heads a key head."""
    from flashedu.stages import decode, triton_mode
    from flashedu.stages.decode_tiles import tile_for
    from flashedu.stages.descriptors import columns

    p = problem.replace(Nq=1, H_kv=problem.H // 8)
    tile = tile_for(triton_mode.capability(q), columns(p.D), p.item_bytes, p.group)
    kv = q[:, : p.H_kv]
    decode.forward(q[:, :, -1:], kv, kv, p, 1.0, UNCOUNTED, tile, 64)


def _launch_paged(q: Any, problem: Problem, tiles: Any) -> None:
    """The same, from pages of 64 keys."""
    import torch

    from flashedu.stages import paged, triton_mode
    from flashedu.stages.decode_tiles import in_pages, tile_for
    from flashedu.stages.descriptors import columns

    p, page = problem.replace(Nq=1, H_kv=problem.H // 8), 64
    tile = tile_for(triton_mode.capability(q), columns(p.D), p.item_bytes, p.group)
    tile = in_pages(tile, page, triton_mode.capability(q))
    kv = q.new_empty(p.Nk // page, p.H_kv, page, p.D)
    table = q.new_empty(p.B, p.Nk // page, dtype=torch.int32)
    lengths = q.new_empty(p.B, dtype=torch.int32)
    paged.forward(q[:, :, -1:], kv, kv, table, lengths, p, 1.0, UNCOUNTED, tile, 64)


def _launch_paged_varlen(q: Any, problem: Problem, tiles: Any) -> None:
    """Prompts, and then one query a sequence, from pages of 64 keys: four heads a key head."""
    import torch

    from flashedu.stages import paged_varlen

    (B, H, N, D), page = q.shape, 64
    kv = q.new_empty(N // page, H // 4, page, D)
    for few, rows in ((False, q[:1]), (True, q[:1, :, :B])):
        table = q.new_empty(B, N // page, dtype=torch.int32)
        lengths, starts = (q.new_empty(n, dtype=torch.int32) for n in (B, B + 1))
        step = paged_varlen.plan(
            table, lengths, starts, rows.shape, kv.shape, q.dtype,
            few=few, longest=N, splits=8 if few else 1,
        )  # fmt: skip
        paged_varlen.forward(rows, kv, kv, step, 1.0, UNCOUNTED)


def _launch_flash3(q: Any, problem: Problem, tiles: Any) -> None:
    from flashedu.stages import flash3

    o, lse = flash3.forward(q, q, q, problem, 1.0)
    flash3.backward(q, q, q, o, lse, o, problem, 1.0)


def _launch_flash3_deterministic(q: Any, problem: Problem, tiles: Any) -> None:
    import torch

    from flashedu.stages import flash3

    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    flash3.backward(q, q, q, o, lse, o, problem, 1.0, deterministic=True)


# stage → what launches all its kernels; q is also k and v
LAUNCHES: dict[str, Callable[[Any, Problem, Any], None]] = {
    "flash1": _launch_flash1,
    "flash2": _launch_flash2,
    "varlen": _launch_varlen,
    "decode": _launch_decode,
    "paged": _launch_paged,
    "paged_varlen": _launch_paged_varlen,
    "flash3": _launch_flash3,
    "flash3-det": _launch_flash3_deterministic,
}


class _NoCard:
    """A driver without a card: Triton asks it what to compile for."""

    def __init__(self, capability: Capability) -> None:
        self.architecture = 10 * capability[0] + capability[1]

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps one target for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@dataclass(frozen=True)
class _Launch:
    """A launch that did not happen: what Triton would have compiled for it."""

    case: Case
    kernel: Any  # a JITFunction
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    def constant(self, name: str) -> Any:
        """The value of a constexpr of the kernel or its module; None if there is none."""
        names = self.kernel.arg_names
        if name in names:
            return self.constants[(names.index(name),)]
        return getattr(self.kernel.fn.__globals__.get(name), "value", None)


def _launches(case: Case) -> list[_Launch]:
    """Every launch of the case."""
    import torch

    from flashedu.stages.flash2_tiles import tiles_for

    from triton import knobs
    from triton.runtime import driver

    taken = []

    def take(*, fn: Any, compile: Mapping[str, Any], **rest: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        kept = {name: options[name] for name in ("num_warps", "num_stages", "num_ctas", "maxnreg")}
        arguments = (compile["signature"], compile["constants"], compile["configs"][0])
        taken.append(_Launch(case, fn.jit_function, *arguments, kept))
        return True  # so Triton neither compiles nor launches it

    driver.set_active(_NoCard(case.capability))
    knobs.runtime.jit_cache_hook = take
    p = Problem(Nq=case.N, D=case.D, H=16, dtype=case.dtype, causal=case.causal)
    q = torch.empty(p.B, p.H, p.Nq, p.D, dtype=getattr(torch, p.dtype), device="meta")
    tiles = tiles_for(case.capability, p.D, p.item_bytes, causal=p.causal, N=p.Nk)
    LAUNCHES[case.stage](q, p, tiles)
    return taken


def _made(launch: _Launch) -> Any:
    """What Triton makes of it: `asm` and `metadata`."""
    import triton

    arguments = launch.kernel, launch.signature, launch.constants, launch.attributes
    source = launch.kernel.ASTSource(*arguments)  # Gluon's own for a kernel in Gluon
    target = _NoCard(launch.case.capability).get_current_target()
    return triton.compile(source, target=target, options=dict(launch.options))


def _compile(launch: _Launch) -> Compiled:
    made = _made(launch)
    registers, stack = _registers_and_stack(made.asm["cubin"])
    return Compiled(
        case=launch.case,
        kernel=launch.kernel.fn.__name__,
        block_q=launch.constant("BLOCK_Q"),
        block_k=launch.constant("BLOCK_K"),
        warps=made.metadata.num_warps,
        stages=launch.constant("STAGES") or made.metadata.num_stages,
        registers=registers,
        spilled_bytes=stack,  # the kernels keep nothing else there
        sram_bytes=made.metadata.shared,
        matrix_instruction=_first(MATRIX_INSTRUCTIONS, made.asm["ptx"]),
        copy_instruction=_first(COPY_INSTRUCTIONS, made.asm["ptx"]),
    )


def _first(instructions: Iterable[str], ptx: str) -> str | None:
    return next((i for i in instructions if i in ptx), None)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack that a thread takes."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(registers), int(stack)


def _work(threads: int) -> None:
    """Cases come on stdin and kernels go to stdout, as JSON."""
    launches = [launch for row in json.load(sys.stdin) for launch in _launches(_case(row))]
    with ThreadPoolExecutor(threads) as pool:  # the compiler leaves Python's lock
        json.dump([_row(found) for found in pool.map(_compile, launches)], sys.stdout)


# the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _write(stages: Sequence[str] | None) -> Path:
    path = RESULTS / f"compiled_triton{version('triton')}.json"
    wanted = [case for case in recorded_cases() if stages is None or case.stage in stages]
    found = compile_all(wanted)
    if stages is not None:
        others = from_record(json.loads(path.read_text(encoding="utf-8")))
        found = [one for one in others if one.case.stage not in stages] + found
    record = {
        "what": "kernels, compiled without a GPU",
        "date": datetime.date.today().isoformat(),
        **{name: version(name) for name in ("triton", "torch")},
        "python": platform.python_version(),
        "rows": [_row(one) for one in found],
    }
    rows = ",\n  ".join(json.dumps(row) for row in record.pop("rows"))
    head = json.dumps(record, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
    return path


def _show(card: GPU) -> None:
    rows = table(compile_all(list(cases([card.compute_capability], (64, 128), ("float16",)))), card)
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for a wrong option, 1 if a kernel does not compile."""
    parser = _Parser("python -m flashedu.bench.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200", help="the card, as `flashedu ladder --gpu`")
    parser.add_argument("--write", action="store_true", help="record all cards")
    only = "with --write: the rows of these only"
    parser.add_argument("--stage", choices=LAUNCHES, nargs="+", help=only)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(options.worker)
        return 0
    try:
        card = gpu(options.gpu)
    except ValueError as error:
        parser.error(str(error))
    try:
        if options.write:
            print(_write(options.stage).relative_to(RESULTS.parents[1]))
        else:
            _show(card)
    except RuntimeError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
