"""From flash2 to flash3 in steps, each a kernel that runs, and what was tried besides.

A variant is flash3 with a few words of its source changed. Each step is tried in a process of its
own first, so that one that hangs costs no other its measurement; then all are checked and timed
beside one another, in turns.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flashedu.bench.record import Record
from flashedu.bench.run import OnCase, measure, sentence
from flashedu.memory import Problem, gpu
from flashedu.pipeline import FLASH2, FLASH3, Kernel, tflops_per_s

if TYPE_CHECKING:
    from flashedu.plots.pipeline import Step as Bar

FLASH3_MODULE = "flashedu.stages.flash3"
BENEATH = ("flashedu.stages.hopper",)
CUDNN = "sdpa-cudnn"
HOPPER = (9, 0)
LIMIT_S = 100  # of a step's trial: it compiles up to five kernels
LAUNCHES = 3  # of a trial, of each size

Changes = tuple[tuple[str, str], ...]

ONE_STAGE: Changes = (("STAGES = gl.constexpr(2)", "STAGES = gl.constexpr(1)"),)
EQUAL_REGISTERS: Changes = (
    ("[REGISTERS] * (CONSUMERS - 1) + [PRODUCER_REGISTERS],", "[REGISTERS] * CONSUMERS,"),
    ("    left = SM_REGISTERS // WARPGROUP - PRODUCER_REGISTERS.value\n"
     "    return left // consumers // 8 * 8",
     "    return SM_REGISTERS // WARPGROUP // (consumers + 1) // 8 * 8"),
)  # fmt: skip
APART: Changes = (
    ("acc_i = warpgroup_mma(p_ij, v_j, acc_i, is_async=True)\n                    k_j",
     "acc_i = warpgroup_mma(p_ij, v_j, acc_i, is_async=True)\n"
     "                    acc_i, p_ij = warpgroup_mma_wait(0, deps=[acc_i, p_ij])\n"
     "                    k_j"),
)  # fmt: skip
NO_PAIRS: Changes = (
    ("each = gl.cdiv(tiles, 2) if PAIRS else tiles", "each = tiles"),
    ("(triton.cdiv(tiles, 2) if pairs else tiles)", "tiles"),
)
_pair = "        stop, step = tiles - x, gl.maximum(1, tiles - 1 - 2 * x)\n"
LONGEST: Changes = (*NO_PAIRS, (_pair, "        start, stop = tiles - 1 - x, tiles - x\n"))
IN_ORDER: Changes = (*NO_PAIRS, (f"    if PAIRS:\n{_pair}", ""))
NOT_PERSISTENT: Changes = (
    ("(min(pieces, triton_mode.sm_count(q.device)),)", "(pieces,)"),
)  # fmt: skip
TWO_Q: Changes = (("Q_TILES = gl.constexpr(1)", "Q_TILES = gl.constexpr(2)"),)
KEYS_64: Changes = (("BLOCK_K = gl.constexpr(128)", "BLOCK_K = gl.constexpr(64)"),)
FOUR_STAGES: Changes = (("STAGES = gl.constexpr(2)", "STAGES = gl.constexpr(4)"),)
NO_SKIP: Changes = (
    ("seen_by_all, seen_by_any = _tiles_seen(i, Nq, Nk, ROWS, CAUSAL)",
     "seen_by_all, _ = _tiles_seen(i, Nq, Nk, ROWS, CAUSAL)\n            seen_by_any = seen"),
)  # fmt: skip
_step = """\
                    p_ij, m_i, l_i, acc_i = _softmax(
                        s_ij, m_i, l_i, acc_i, scale_log2, O.dtype
                    )  # fmt: skip
                    v_j, v_used = _full(v_tiles, t)
                    acc_i = warpgroup_mma(p_ij, v_j, acc_i, is_async=True)
                    k_j, k_used = _full(k_tiles, t + 1)
                    k_t = k_j.permute((1, 0))
                    s_ij = warpgroup_mma(q_i, k_t, zero, use_acc=False, is_async=True)
                    acc_i, s_ij, p_ij = warpgroup_mma_wait(0, deps=[acc_i, s_ij, p_ij])
                    mbarrier.arrive(v_used, count=1)
                    mbarrier.arrive(k_used, count=1)
                    t += 1
                    j -= BLOCK_K
                    if not WHOLE:
                        s_ij = _masked(s_ij, rows, j, Nq, Nk, CAUSAL)
"""
_step_beside = """\
                    k_j, k_used = _full(k_tiles, t + 1)
                    k_t = k_j.permute((1, 0))
                    s_ij = warpgroup_mma(q_i, k_t, zero, use_acc=False, is_async=True)
                    v_j, v_used = _full(v_tiles, t)
                    acc_i = warpgroup_mma(p_ij, v_j, acc_i, is_async=True)
                    s_ij, q_k, k_k = warpgroup_mma_wait(1, deps=[s_ij, q_i, k_t])
                    mbarrier.arrive(k_used, count=1)
                    t += 1
                    j -= BLOCK_K
                    if not WHOLE:
                        s_ij = _masked(s_ij, rows, j, Nq, Nk, CAUSAL)
                    m_j = m_i
                    p_next, m_i, l_i, _ = _softmax(s_ij, m_i, l_i, none, scale_log2, O.dtype)
                    acc_i, p_ij = warpgroup_mma_wait(0, deps=[acc_i, p_ij])
                    mbarrier.arrive(v_used, count=1)
                    alpha = gl.convert_layout(gl.exp2(m_j - m_i), gl.SliceLayout(1, ACC))
                    acc_i = acc_i * alpha[:, None]
                    p_ij = p_next
"""
_first = "p_ij, m_i, l_i, acc_i = _softmax(s_ij, m_i, l_i, acc_i, scale_log2, O.dtype)\n"
BESIDE: Changes = (
    (f"            {_first}", ""),  # after the loop; it comes before it, for the first tile
    (_step, _step_beside),
    ("            masked = seen_by_any - seen_by_all\n",
     f"            none = gl.zeros([ROWS, COLUMNS], gl.float32, ACC)\n            {_first}\n"
     "            masked = seen_by_any - seen_by_all\n"),
)  # fmt: skip


def _consumers(count: int) -> Changes:
    chosen = "return 2 if columns == 128 or (causal and N <= 2048) else 3"
    return ((chosen, f"return {count}"),)


@dataclass(frozen=True)
class Step:
    """One kernel on the way, or one that was tried.

    `changes`: to flash3's source, old words → new ones. `against`: the step that it is measured
    against, or the one before that where that is none; None for the first. `kept`: whether the way
    goes on from here. `D`, `causal`: the sizes where it differs. `kernel`: what the model of
    chapter 13 takes it for; D, flash2's own tiles and flash3's consumers follow from the size.
    """

    name: str
    label: str
    what: str
    against: str | None = "flash3"
    changes: Changes = ()
    kept: bool = False
    D: tuple[int, ...] = (64, 128)
    causal: tuple[bool, ...] = (False, True)
    kernel: Kernel = FLASH3

    def applies(self, p: Problem) -> bool:
        """Whether it is another kernel at this size."""
        return p.D in self.D and p.causal in self.causal


LAST_FIRST = FLASH2.replace(order="longest")
ROLES = Kernel(stages=1)
_roles = NOT_PERSISTENT
STEPS = (
    Step("flash2", "flash2, its own tiles",
         "Every warp loads, multiplies and takes exponentials in turn; the tiles that "
         "`flashedu bench tune` found.", None, kept=True, kernel=LAST_FIRST),
    Step("flash2-128", "flash2, 128 × 128",
         "flash2 with flash3's tile: 128 queries, 128 keys, 8 warps, 2 stages.", "flash2",
         kernel=LAST_FIRST),
    Step("roles", "producer, consumers",
         "One warp only loads, by TMA, and warpgroups only compute: one place for a tile of k and "
         "of v, as many registers for each, one product at a time.", "flash2",
         (*_roles, *ONE_STAGE, *EQUAL_REGISTERS, *APART, *IN_ORDER), kept=True, kernel=ROLES),
    Step("stages", "two stages",
         "Two places for tiles of k and of v: the next are loaded while these are used.", "roles",
         (*_roles, *EQUAL_REGISTERS, *APART, *IN_ORDER), kept=True, kernel=Kernel()),
    Step("registers", "registers reallocated",
         "A thread of the producer keeps 24 registers, and the consumers share the rest.",
         "stages", (*_roles, *APART, *IN_ORDER), kept=True, kernel=Kernel()),
    Step("products", "two products at once",
         "p v of one key tile and q kᵀ of the next are started together.", "registers",
         (*_roles, *IN_ORDER), kept=True, kernel=Kernel()),
    Step("longest", "longest first",
         "Of a head, the query tiles that see the most keys come first.", "products",
         (*_roles, *LONGEST), kept=True, causal=(True,), kernel=Kernel(order="longest")),
    Step("flash3", "flash3: programs stay",
         "One program for each SM takes query tiles until none is left; causal, in pairs that see "
         "about as many keys: flash3 as it stands.", "longest", kept=True),
    # what was tried: flash3 with one change
    Step("one-stage", "one stage", "One place for tiles of k, and one for v.", changes=ONE_STAGE,
         kernel=FLASH3.replace(stages=1)),
    Step("equal-registers", "equal registers",
         "As many registers for a thread that loads as for one that computes.",
         changes=EQUAL_REGISTERS),
    Step("apart", "one product at a time",
         "p v is waited for before q kᵀ of the next tile is started.", changes=APART),
    Step("beside", "softmax beside p v",
         "The softmax of a tile runs while p v of the tile before does: FA3, Algorithm 2.",
         changes=BESIDE, kernel=FLASH3.replace(overlap=True)),
    Step("keys-64", "64 keys", "Key tiles of 64.", changes=KEYS_64,
         kernel=FLASH3.replace(block_k=64)),
    Step("keys-64-stages-4", "64 keys, four stages", "Key tiles of 64, and twice the places.",
         changes=(*KEYS_64, *FOUR_STAGES), kernel=FLASH3.replace(block_k=64, stages=4)),
    Step("one-consumer", "one consumer", "64 queries a tile.", changes=_consumers(1),
         kernel=FLASH3.replace(consumers=1)),
    Step("two-consumers", "two consumers", "128 queries a tile.", changes=_consumers(2), D=(64,),
         kernel=FLASH3.replace(consumers=2)),
    Step("three-consumers", "three consumers", "192 queries a tile.", changes=_consumers(3),
         D=(64,), kernel=FLASH3.replace(consumers=3)),
    Step("two-q", "two places for q", "The next query tile is loaded while this one is computed.",
         changes=TWO_Q, kernel=FLASH3.replace(q_places=2)),
    Step("not-persistent", "a program a piece",
         "As many programs as pieces of work; each ends with its own.", changes=NOT_PERSISTENT,
         kernel=FLASH3.replace(persistent=False)),
    Step("no-pairs", "no pairs", "A piece is one query tile, the longest of a head first.",
         changes=LONGEST, causal=(True,), kernel=FLASH3.replace(order="longest")),
    Step("no-skip", "nothing skipped",
         "A consumer computes the key tiles too that only later queries see, masked.",
         changes=NO_SKIP, causal=(True,)),
)  # fmt: skip
BY_NAME = {step.name: step for step in STEPS}


def plan(p: Problem) -> list[Step]:
    """The steps that are timed at this size."""
    return [step for step in STEPS if step.applies(p)]


def against(step: Step, p: Problem) -> str | None:
    """The step that it is measured against at this size."""
    before = step.against
    while before and not BY_NAME[before].applies(p):
        before = BY_NAME[before].against
    return before


def run(
    problems: Sequence[Problem], device: Any, *, rounds: int, seed: int = 0, on_case: OnCase
) -> Iterator[dict[str, Any]]:
    """Time all steps on each problem, forward, beside SDPA's cuDNN, as they stand in a record."""
    from flashedu.bench.cases import Case
    from flashedu.bench.peers import PEERS, Peer
    from flashedu.stages import flash3

    on_case(0, len(problems) + 1, "each step in a process of its own")
    whys = trials(problems)
    (cudnn,) = (peer for peer in PEERS if peer.name == CUDNN)
    for number, p in enumerate(problems):
        steps = plan(p)
        peers = [cudnn, *(Peer(s.name, _prepare(s, whys.get((s.name, p)))) for s in steps)]
        case = Case("steps", p, "fwd", tuple(peer.name for peer in peers))
        on_case(number + 1, len(problems) + 1, str(case))
        found = measure(case, peers, device, rounds=rounds, seed=seed + number)
        for entry in found["runs"]:
            step = BY_NAME.get(entry["peer"])
            entry["against"] = against(step, p) if step else None
            kept = {CUDNN, "flash2", entry["against"]}
            ratios = entry["times_as_fast_as"].items()
            entry["times_as_fast_as"] = {name: x for name, x in ratios if name in kept}
        consumers = flash3.consumers_for(flash3.columns(p.D), p.causal, p.Nk)
        yield {**found, "consumers": consumers}
        device.free()


def provenance() -> dict[str, Any]:
    """The steps, as a record has them."""
    names = ("name", "label", "what", "against", "kept", "changes")
    return {"steps": [{name: asdict(step)[name] for name in names} for step in STEPS]}


class NotTried(RuntimeError):
    """A step that did not pass its trial. One sentence."""


def _prepare(step: Step, why: str | None) -> Callable[[Problem, str], Callable[..., Any]]:
    def prepare(p: Problem, device: str) -> Callable[..., Any]:
        if why:
            raise NotTried(why)
        return attention_of(step, p)

    return prepare


def attention_of(step: Step, p: Problem) -> Callable[..., Any]:
    """o from q, k and v, by this step's kernel."""
    if step.name == "flash2-128":
        from flashedu.memory.machine import UNCOUNTED
        from flashedu.stages import flash2
        from flashedu.stages.flash2_tiles import Tile

        tile = Tile(128, 128, 8, 2)
        return lambda q, k, v: flash2.forward(q, k, v, p, p.D**-0.5, UNCOUNTED, tile)[0]
    attention = module_of(step).attention
    return lambda q, k, v: attention(q, k, v, causal=p.causal)


@functools.cache
def module_of(step: Step) -> Any:
    """flash2, or flash3 with the step's changes. Raises ValueError if one finds no words."""
    from flashedu.bench.variants import mutated
    from flashedu.stages import rung

    if step.changes:
        return mutated(FLASH3_MODULE, step.changes, BENEATH)
    return rung("flash3" if step.name == "flash3" else "flash2").load()


# trials


def trials(problems: Sequence[Problem]) -> dict[tuple[str, Problem], str | None]:
    """Step and problem → why its kernel cannot be timed there; None if it can.

    A few launches of each size in a process for each step, with a time limit, one process a core.
    What they compile stays in Triton's cache.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        told = pool.map(lambda step: _trial(step, problems), STEPS)
    return {key: why for of_step in told for key, why in of_step.items()}


def _trial(step: Step, problems: Sequence[Problem]) -> dict[tuple[str, Problem], str | None]:
    from flashedu.bench.serving import program

    mine = [p for p in problems if step.applies(p)]
    if not mine:
        return {}
    job = {"step": step.name, "problems": [asdict(p) for p in mine]}
    lines, _, ended = program(__name__, [json.dumps(job)], limit_s=LIMIT_S)
    whys = [line["why"] for line in lines]
    whys += [f"in a process of its own, {ended}"] * (len(mine) - len(whys))
    return {(step.name, p): why for p, why in zip(mine, whys, strict=True)}


def main(out: Path, job: Mapping[str, Any], device: str = "cuda") -> None:
    """Launch one step at each size, and write a line for each as it ends."""
    import torch

    from flashedu.bench.device import draw

    step = BY_NAME[job["step"]]
    for sizes in job["problems"]:
        p, why = Problem(**sizes), None
        try:
            q, k, v, _ = draw(p, 0, device)
            attention = attention_of(step, p)
            for _ in range(LAUNCHES):
                attention(q, k, v)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # the other sizes are tried all the same
            why = sentence(error)
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"why": why}) + "\n")


# what a record says


def waterfall_of(
    record: Record, *, D: int = 128, causal: bool = False, N: int = 16384, tried: bool = False
) -> list[Bar]:
    """The steps of a record for `plots.waterfall`, in TFLOP/s: measured, and as the model predicts.

    From flash2 to flash3, and what was tried on the way; `tried`: and on flash3 too. Raises
    ValueError for a size that the record does not have.
    """
    from flashedu.plots.pipeline import Step as Bar

    p, consumers, runs = _found(record, D, causal, N)
    bars = []
    for step in plan(p):
        if step.name in runs and (tried or step.kept or step.against != "flash3"):
            predicted = tflops_per_s(_model(step, p, consumers), p)
            bars.append(Bar(step.label, predicted, runs[step.name]["tflops"], step.kept))
    return bars


class Ratio(NamedTuple):
    """How many times as fast a step is as the one that it is measured against."""

    step: Step
    against: Step
    predicted: float
    measured: float | None  # the median of the rounds' ratios
    why: str | None  # it was not measured


def ratios_of(
    record: Record, *, D: int = 128, causal: bool = False, N: int = 16384,
    names: Sequence[str] | None = None,
) -> list[Ratio]:  # fmt: skip
    """The steps of those names, all if None, each against another: by the model, and measured.

    Raises ValueError for a size that the record does not have.
    """
    p, consumers, runs = _found(record, D, causal, N)
    found = []
    for step in plan(p):
        before = against(step, p)
        if step.name not in runs or before is None or (names and step.name not in names):
            continue
        rates = [tflops_per_s(_model(BY_NAME[x], p, consumers), p) for x in (before, step.name)]
        run = runs[step.name]
        measured = run["times_as_fast_as"].get(before, [None])[0]
        found.append(Ratio(step, BY_NAME[before], rates[1] / rates[0], measured, run["why"]))
    return found


def _found(
    record: Record, D: int, causal: bool, N: int
) -> tuple[Problem, int, dict[str, dict[str, Any]]]:
    """The size, flash3's consumers there, and the runs by step."""
    cases = record.cases("steps", D=D, causal=causal, N=N)
    if not cases:
        sizes = f"D {D}, N {N}, {'causal' if causal else 'full'}"
        raise ValueError(f"record must have the steps at {sizes}, got {record.path.name}")
    case = cases[0]
    p = Problem(B=case["B"], H=case["H"], Nq=N, D=D, dtype=case["dtype"], causal=causal)
    return p, case["consumers"], {run["peer"]: run for run in case["runs"]}


def _model(step: Step, p: Problem, consumers: int) -> Kernel:
    """What the model takes the step for, where flash3 has so many consumers."""
    kernel = step.kernel.replace(D=p.D)
    if step.name == "flash2":
        return _with_own_tiles(kernel, p)
    if not kernel.specialised or step.name.endswith(("-consumer", "-consumers")):
        return kernel
    return kernel.replace(consumers=consumers)


def _with_own_tiles(kernel: Kernel, p: Problem) -> Kernel:
    """flash2 as it is tuned for a Hopper card, with as many programs as an SM holds."""
    from flashedu.stages.flash2_tiles import tiles_for

    tile = tiles_for(HOPPER, p.D, 2, causal=p.causal, N=p.Nk).forward
    warpgroups = tile.warps // 4
    kernel = kernel.replace(
        consumers=warpgroups, rows=tile.block_q // warpgroups, block_k=tile.block_k,
        stages=tile.stages,
    )  # fmt: skip
    return kernel.replace(programs=kernel.programs_per_sm(gpu("h100")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
