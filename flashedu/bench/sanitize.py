"""Kernels under NVIDIA's Compute Sanitizer: whether any reaches outside its arrays, or races.

`measure` starts this module once more as a program, under `compute-sanitizer`, which watches every
access of every kernel. The program launches our stages at odd sizes; and, with the checks of the
host turned off, with tables and runs that lead astray. Then it starts programs with a planted
mistake each: a tool that does not find those has said nothing about the others.

PyTorch keeps freed memory and cuts tensors out of large blocks, in which an address next to a
tensor is a right one. So here each tensor is an allocation of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashedu.bench import cases, peers
from flashedu.bench.device import draw
from flashedu.bench.run import Attempt, Check, OnCase, sentence, wrong
from flashedu.memory import Problem
from flashedu.stages import rung, triton_mode
from flashedu.stages.runs import Runs, everywhere

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

TOOL = "compute-sanitizer"
OPTIONS = {  # of each tool
    "memcheck": ("--report-api-errors", "no", "--padding", "1024"),
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}
COMMON = (
    "--target-processes", "application-only", "--launch-timeout", "300",
    "--show-backtrace", "no", "--print-limit", "20",
)  # fmt: skip
TENSOR_OPS = "--check-tensor-ops"  # also what a descriptor moves; older tools do not know it
FAR = 2**31 - 1
LENGTHS = (5, 67, 1, 58)
STEP = "paged_varlen"


class Unreadable(RuntimeError):
    """The tool has told nothing. One sentence."""


class Astray(NamedTuple):
    """A wrong input, and what makes it of right ones."""

    what: str
    change: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One peer on one case; `astray`: with wrong tables or runs that nothing checks."""

    peer: str
    of: cases.Case
    astray: Astray | None = None

    def __str__(self) -> str:
        p = self.of.problem
        mask = cases.MASKS[p.causal]
        sizes = f"Nq {p.Nq} Nk {p.Nk} D {p.D} {p.dtype} {mask}"
        return f"{self.peer} {sizes}" + (f": {self.astray.what}" if self.astray else "")


def plan(quick: bool = False) -> list[Case]:
    """What is launched. `quick`: small, and one of each: does it still run?"""
    found = [*_right(), *_astray()]
    return found[::5] if quick else found


SIZES = (("float16", 24, False), ("float16", 24, True), ("bfloat16", 128, True),
         ("float32", 13, False), ("float16", 64, True))  # dtype, D, causal # fmt: skip


def _right() -> Iterator[Case]:
    """No size is a multiple of a tile; D 24 is padded to 32, D 13 has no rows of 16 bytes."""
    for dtype, D, causal in SIZES:
        p = Problem(B=2, H=4, H_kv=2, Nq=67, Nk=131, D=D, dtype=dtype, causal=causal)
        yield Case("flash1", cases.Case("", p, "fwd", ("flash1",)))
        yield Case("flash2", cases.Case("", p, "both", ("flash2",)))
        if rung("flash3").missing() is None and rung("flash3").refuses(p) is None:
            for one in (p, p.replace(Nq=268, Nk=524)):  # and more tiles than there is room for
                yield Case("flash3", cases.Case("", one, "both", ("flash3",)))
        packed = p.replace(B=1, Nq=sum(LENGTHS), Nk=sum(LENGTHS))
        yield Case("varlen", cases.Case("", packed, "both", ("varlen",), lengths=LENGTHS))
        for peer, Nq in (("decode", 1), ("decode", 3), ("decode, runs", 3)):
            yield Case(peer, cases.Case("", p.replace(Nq=Nq), "fwd", (peer,)))
        for peer, Nq in (("paged-16", 1), ("paged-64", 3), ("paged-256", 67)) if causal else ():
            yield Case(peer, cases.Case("", p.replace(Nq=Nq), "fwd", (peer,)))
        for Nq in (1, 67) if causal else ():
            yield Case(STEP, cases.Case("", p.replace(Nq=Nq), "fwd", (STEP,)))


def _put(x: Any, index: Any, value: int) -> Any:
    x = x.clone()
    x[index] = value
    return x


TABLES = (
    Astray("a length beyond the table", lambda t, n: (t, _put(n, -1, t.shape[1] * 256 + 1))),
    Astray("a length far beyond the table", lambda t, n: (t, _put(n, -1, FAR))),
    Astray("a length below 0", lambda t, n: (t, _put(n, 0, -FAR))),
    Astray("a page that is not there", lambda t, n: (_put(t, (-1, -1), t.numel()), n)),
    Astray("a page far away", lambda t, n: (_put(t, (0, 0), FAR), n)),
    Astray("a page below 0", lambda t, n: (_put(t, (0, 0), -1), n)),
    Astray("pages far below 0", lambda t, n: (_put(t, slice(None), -FAR), n)),
)
RUNS = (
    Astray("runs beyond the keys", lambda r: (Runs(r.first, r.stop + 200),)),
    Astray("runs far beyond the keys", lambda r: (Runs(r.first, _put(r.stop, slice(None), FAR)),)),
    Astray("runs from below 0", lambda r: (Runs(r.first - 200, r.stop),)),
    Astray("runs from far below 0", lambda r: (Runs(_put(r.first, slice(None), -FAR), r.stop),)),
    Astray("runs that end before they begin", lambda r: (Runs(r.stop, r.first),)),
    Astray("runs that begin behind the keys", lambda r: (Runs(r.first + 500, r.stop + 500),)),
)


def _decode_with_runs() -> peers.Peer:
    def prepare(p: Problem, device: str) -> peers.Attention:
        from flashedu.stages import decode

        return lambda q, k, v, runs: decode.attention(q, k, v, runs=runs)

    def layout(case: cases.Case, inputs: Sequence[Any]) -> peers.Layout:
        p, device = case.problem, inputs[0].device
        runs = everywhere(p.B, p.Nq, p.Nk, causal=p.causal, device=device)
        return peers.Layout(p, inputs, (runs,))

    return peers.Peer("decode, runs", prepare, backward=False, layout=layout)


def _step() -> peers.Peer:
    """paged_varlen, on the queries of all sequences in a row."""

    def prepare(p: Problem, device: str) -> peers.Attention:
        import torch

        from flashedu.memory import UNCOUNTED
        from flashedu.stages import paged_varlen

        starts = p.Nq * torch.arange(p.B + 1, dtype=torch.int32, device=device)

        def attention(q: Any, k: Any, v: Any, table: Any, lengths: Any) -> Any:
            q = q.transpose(0, 1).flatten(1, 2)[None]
            sizes = q.shape, k.shape, q.dtype
            few, room = p.Nq == 1, table.shape[1] * k.shape[2]
            step = paged_varlen.plan(table, lengths, starts, *sizes, few=few, longest=room)
            o = paged_varlen.forward(q, k, v, step, p.D**-0.5, UNCOUNTED)[0]
            return o[0].unflatten(1, (p.B, p.Nq)).transpose(0, 1)

        return attention

    return peers.Peer(STEP, prepare, backward=False, layout=peers.in_pages(64))


LAUNCHED = {peer.name: peer for peer in (*peers.ATTENTIONS, _decode_with_runs(), _step())}


def _astray() -> Iterator[Case]:
    p = Problem(B=2, H=4, H_kv=2, Nq=1, Nk=131, D=24, dtype="float16", causal=True)
    for astray in TABLES:
        for peer, Nq in (("paged-16", 1), ("paged-64", 67), (STEP, 1), (STEP, 67)):
            yield Case(peer, cases.Case("", p.replace(Nq=Nq), "fwd", (peer,)), astray)
    packed = p.replace(B=1, Nq=sum(LENGTHS), Nk=sum(LENGTHS))
    for astray in RUNS:
        yield Case("varlen", cases.Case("", packed, "both", ("varlen",), lengths=LENGTHS), astray)
        yield Case("decode, runs", cases.Case("", p, "fwd", ("decode, runs",)), astray)


# what the tool says


class Told(NamedTuple):
    """How many errors and warnings a tool found, and the first of them, in its words."""

    errors: int
    warnings: int
    first: list[str]


SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: ([\d,]+) errors?\s*$"  # and no line on errors that were not printed
    r"|RACECHECK SUMMARY: [\d,]+ hazards? displayed \(([\d,]+) errors?, ([\d,]+) warnings?\))",
    re.MULTILINE,
)


def parse(log: str, *, ended: bool = True) -> Told:
    """What stands in the tool's log. Raises Unreadable, with a sentence, if it has no summary.

    `ended`: the program came to its end. One that did not may have left errors and no summary.
    """
    found = SUMMARY.findall(log)
    lines = [line.lstrip("=")[1:].rstrip() for line in log.splitlines() if line.startswith("==")]
    heads = [
        ", ".join([line, *(x.strip() for x in rest[:1])])
        for line, *rest in (lines[i:] for i in range(len(lines)))
        if re.match(r"(Invalid|Uninitialized|Error|Warning|Barrier|Misaligned|Unused)", line)
    ]
    if len(found) == 1:
        n_errors, hazards, n_warnings = (int(n.replace(",", "") or 0) for n in found[0])
        return Told(n_errors + hazards, n_warnings, heads[:5])
    accesses = [head for head in heads if not head.startswith("Error: ")]
    if accesses and not ended:
        return Told(len(accesses), 0, accesses[:5])
    errors = [line for line in lines if line.startswith("Error: ")]
    why = errors[-1].removeprefix("Error: ") if errors else "it has printed no summary"
    raise Unreadable(f"{TOOL} failed: {why}")


def why_not() -> str | None:
    """Why nothing can be watched here, in a sentence; None if it can."""
    if shutil.which(TOOL) is None:
        return (
            f"needs NVIDIA's Compute Sanitizer, and there is no {TOOL} on the PATH: it comes with "
            "the CUDA toolkit, and in the package nvidia-cuda-sanitizer-api"
        )
    return None


def provenance() -> dict[str, Any]:
    """What a record says about the tool."""
    version = re.search(r"Version (\S+)", _said("--version"))
    return {TOOL: version[1] if version else None, "memory": "each tensor its own allocation"}


def measure(
    tools: Sequence[str], quick: bool, device: Any, *, on_case: OnCase
) -> Iterator[dict[str, Any]]:
    """What each tool finds, as it stands in a record. `device`: to give memory back to others.

    Raises Unreadable, with a sentence, where the tool fails.
    """
    device.free()
    wanted = plan(quick)
    for number, tool in enumerate(tools):

        def begins(case: int, what: str, tool: str = tool, before: int = number) -> None:
            on_case(before * len(wanted) + case, len(tools) * len(wanted), f"{tool}: {what}")

        options = _options(tool)
        told, why = _watch(options, ["quick" if quick else "full"], wanted, begins)
        planted = {}
        for mistake in PLANTED[tool]:
            begins(len(wanted) - 1, f"the planted mistake, {mistake}")
            planted[mistake] = _watch(options, ["planted", mistake], [], begins)[0]._asdict()
        yield {
            "section": tool,
            "options": list(options),
            **told._asdict(),
            "planted": planted,
            "runs": [_entry(case, why.get(i, "it did not end")) for i, case in enumerate(wanted)],
        }


def _entry(case: Case, why: str) -> dict[str, Any]:
    return {
        "peer": case.peer,
        "pass": case.of.pass_,
        **case.of.sizes,
        "astray": case.astray and case.astray.what,
        "why": None if why == "ran" else why,
    }


def clean(recorded: dict[str, Any]) -> bool:
    """Whether a tool found nothing in what ran, all of which ran, and found what was planted."""
    return (
        recorded["errors"] == 0
        and all(run["why"] is None for run in recorded["runs"])
        and all(told["errors"] for told in recorded["planted"].values())
    )


def _options(tool: str) -> tuple[str, ...]:
    tensors = (TENSOR_OPS, "yes") if TENSOR_OPS in _said("--help") else ()
    return ("--tool", tool, *OPTIONS[tool], *COMMON, *tensors)


def _said(option: str) -> str:
    return subprocess.run([TOOL, option], capture_output=True, text=True, check=False).stdout


def _watch(
    options: Sequence[str], arguments: list[str], wanted: Sequence[Case],
    begins: Callable[[int, str], None],
) -> tuple[Told, dict[int, str]]:  # fmt: skip
    """What the tool told of this module as a program; number of a case → how it went."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        program = [sys.executable, "-m", __name__, *arguments]
        command = [TOOL, *options, "--log-file", str(log), *program]
        went, said = {}, []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            errors="replace", env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ) as ran:  # fmt: skip
            try:
                for line in ran.stdout or ():
                    number, _, rest = line.rstrip("\n").partition("\t")
                    if number.isdigit() and int(number) < len(wanted):
                        went[int(number)] = rest
                        begins(int(number), str(wanted[int(number)]))
                    else:
                        said.append(line)
            except BaseException:  # such as Ctrl-C: the tool does not stay behind
                ran.terminate()
                raise
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    try:
        return parse(text, ended=bool(wanted)), went
    except Unreadable as error:
        last = "".join(said).strip().splitlines()[-1:]
        raise Unreadable("; the program said: ".join([str(error), *last])) from None


# the program under the tool


class Watched:
    """The device for an `Attempt` that nobody times."""

    name = "cpu" if triton_mode.INTERPRETED else "cuda"


def run_one(case: Case) -> str:
    """Launch it. "ran", or why not; a right input must give a right result too."""
    p = case.of.problem
    inputs = draw(p, 0, Watched.name)
    peer = LAUNCHED[case.peer]
    if case.astray is not None:
        peer = replace(peer, layout=_led_astray(peer.layout, case.astray))
    try:
        results = Attempt(peer, case.of, inputs, Watched()).results()
        results = {name: x.cpu() for name, x in results.items()}
        if case.astray is not None:
            return "ran"
        host, backward = [x.cpu() for x in inputs], case.of.pass_ != "fwd"
        check = Check(host, p, 0, gradients=backward, lengths=case.of.lengths)
        return wrong(check.errors(results)) or "ran"
    except Exception as error:  # the tool has ended the kernel, or it does not fit this card
        return sentence(error)


def _led_astray(layout: Callable[..., peers.Layout], astray: Astray) -> Callable[..., peers.Layout]:
    def changed(case: cases.Case, inputs: Sequence[Any]) -> peers.Layout:
        laid = layout(case, inputs)
        return replace(laid, more=astray.change(*laid.more))

    return changed


# planted mistakes: one kernel each


@triton.jit
def store_behind_kernel(X, N):  # type: ignore[no-untyped-def]
    tl.store(X + N + tl.arange(0, 32), 1.0)


@triton.jit
def copy_from_kernel(X, Y, start):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, 32)
    tl.store(Y + rows, tl.load(X + start + rows))


@triton.jit
def descriptor_kernel(X, Y):  # type: ignore[no-untyped-def]
    x = X.load([0, 0, 64, 0]).reshape(16, 32)
    at = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(Y + at, x)


@triton.jit
def race_kernel(Y):  # type: ignore[no-untyped-def]
    """Each thread writes the same word of shared memory, and reads whoever was last."""
    mine = tl.arange(0, 128)
    last = tl.inline_asm_elementwise(
        "{ .shared .b32 word; st.volatile.shared.b32 [word], $1; "
        "ld.volatile.shared.b32 $0, [word]; }",
        "=r,r", [mine], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(Y + mine, last)


@triton.jit
def barrier_kernel(Y):  # type: ignore[no-untyped-def]
    """Each thread comes to a barrier that names the first of its warp alone."""
    mine = tl.arange(0, 32)
    came = tl.inline_asm_elementwise(
        "{ bar.warp.sync 1; mov.b32 $0, $1; }",
        "=r,r", [mine], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(Y + mine, came)


def _plant(mistake: str) -> None:
    x, y = torch.zeros(64, device="cuda"), torch.zeros(512, device="cuda")
    if mistake == "a store behind an array":
        store_behind_kernel[(1,)](x, 64)
    elif mistake == "a load behind an array":
        copy_from_kernel[(1,)](x, y, 64)
    elif mistake == "a load by a descriptor that is longer than its array":
        rows = torch.zeros(64, 32, device="cuda")
        block = TensorDescriptor(rows, [1, 1, 80, 32], [2560, 2560, 32, 1], [1, 1, 16, 32])
        descriptor_kernel[(1,)](block, y)
    elif mistake == "a race in shared memory":
        race_kernel[(1,)](y.to(torch.int32))
    elif mistake == "a barrier for other threads":
        barrier_kernel[(1,)](y.to(torch.int32))
    else:
        copy_from_kernel[(1,)](torch.empty(64, device="cuda"), y, 0)
    torch.cuda.synchronize()


PLANTED = {  # tool → mistakes that it should find
    "memcheck": ("a store behind an array", "a load behind an array",
                 "a load by a descriptor that is longer than its array"),
    "racecheck": ("a race in shared memory",),
    "initcheck": ("a load of what nobody wrote",),
    "synccheck": ("a barrier for other threads",),
}  # fmt: skip


def main(arguments: Iterable[str]) -> None:
    """What the tool watches: a line for each case, its number and how it went."""
    what, *mistake = arguments
    if what == "planted":
        try:
            _plant(*mistake)
        except RuntimeError as error:  # as it should: the tool has ended the kernel
            print(sentence(error), flush=True)
            os._exit(0)  # at once: to free a tensor of this card would end the program worse
        return
    for number, case in enumerate(plan(quick=what == "quick")):
        print(number, run_one(case), sep="\t", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
