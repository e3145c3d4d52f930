"""Draw every figure of flashedu.plots, light and dark, and a sheet of all of them for each theme.

python tools/figures.py [FOLDER]    into FOLDER, or into build/figures
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from flashedu import ladder, plots
from flashedu.bench import published, record, show
from flashedu.bench.steps import waterfall_of
from flashedu.integrations.transformers import runs_of
from flashedu.memory import Event, Machine, Problem, cost, gpu
from flashedu.numerics import FORMATS, round_to
from flashedu.pages import idle_in_contiguous, idle_in_pages
from flashedu.pipeline import FLASH2, Kernel, simulate
from flashedu.plots.hopper import Product, Share
from flashedu.plots.style import THEMES, Look
from flashedu.schedule import assign, finish_times
from flashedu.serving.load import Lengths, Load, Served, SimulatedClock, serve
from flashedu.serving.plan import MODELS, plan
from flashedu.serving.simulate import ContinuousServer, StaticServer
from flashedu.serving.simulate import Machine as ServingMachine
from flashedu.sm import SM, TENSOR, Arrive, Ask, Join, fill, full
from flashedu.sm import Places as SMPlaces
from flashedu.stages import LADDER, online, reference
from flashedu.stages.decode_tiles import splits_for
from flashedu.testing import Error, draw, errors

ROOT = Path(__file__).resolve().parent.parent
HEAD = Problem(Nq=1024, D=64)  # small enough to interpret
SMALL = Problem(Nq=512, D=64, causal=True, block_q=64, block_k=64)
LONG = Problem(Nq=4096, D=16, causal=True)
TINY = Problem(Nq=48, D=16, block_q=16, block_k=16)

EXAMPLES: dict[str, Callable[[], Figure]] = {}


def example(make: Callable[[], Figure]) -> Callable[[], Figure]:
    """Enter a figure with data: its name is that of the function in flashedu.plots."""
    EXAMPLES[make.__name__] = make
    return make


@cache
def counted(stage: str, problem: Problem, backward: bool = False) -> Machine:
    return ladder.count(stage, problem, trace=True, backward=backward)


def trace(stage: str, problem: Problem, backward: bool = False) -> list[Event]:
    found = counted(stage, problem, backward).trace
    assert found is not None
    return found


# machine


@example
def hierarchy() -> Figure:
    return plots.hierarchy(gpu("h200"), "The memories of an H200, areas to scale")


@example
def roofline() -> Figure:
    points = {rung.name: cost.FORWARD[rung.name](Problem(Nq=4096, D=64)) for rung in LADDER}
    return plots.roofline(
        [gpu("h200")],
        {name: found.intensity for name, found in points.items()},
        "float16",
        "The rungs on the roof of an H200",
    )


@example
def sram_occupancy() -> Figure:
    small = Problem(Nq=6, D=4, block_q=2, block_k=2)
    events = trace("tiled", small)
    first_store = [event.op for event in events].index("store")
    return plots.sram_occupancy(
        events[: first_store + 1], "SRAM fills and empties", capacity_bytes=256
    )


# traffic


@example
def traffic() -> Figure:
    runs = {rung.name: counted(rung.name, HEAD).bytes_by_tensor() for rung in LADDER}
    return plots.traffic(runs, "HBM traffic of one head, N = 1024, D = 64, float16")


@example
def cumulative_traffic() -> Figure:
    traces = {rung.name: trace(rung.name, HEAD) for rung in LADDER}
    return plots.cumulative_traffic(traces, "HBM bytes of one head, as each rung runs (N = 1024)")


@example
def traffic_against_sram() -> Figure:
    sweep = [Problem(Nq=4096, D=64, block_q=size, block_k=size) for size in (16, 32, 64, 128, 256)]
    tiles = [cost.tiled(problem) for problem in sweep]
    sram = [found.sram_peak_bytes or 0 for found in tiles]
    return plots.traffic_against_sram(
        sram,
        {
            "naive": [cost.naive(sweep[0]).hbm_bytes] * len(sweep),
            "tiled": [found.hbm_bytes for found in tiles],
        },
        [tiles[0].hbm_bytes * sram[0] / size for size in sram],
        [gpu(key) for key in ("t4", "rtx4090", "a100-80", "h200")],
        "Twice the SRAM, half the traffic",
    )


@example
def traffic_against_tile() -> Figure:
    key_tiles = [16, 32, 64, 128, 256]
    sweep = [Problem(Nq=4096, D=64, block_k=size) for size in key_tiles]
    stages = {
        name: [cost.FORWARD[name](problem).hbm_bytes for problem in sweep]
        for name in ("naive", "flash1", "flash2")
    }
    return plots.traffic_against_tile(
        key_tiles, stages, "keys in a tile, block_k", "flash1 needs large key tiles (N = 4096)"
    )


@example
def memory_against_n() -> Figure:
    lengths = [2**e for e in range(10, 18)]
    layers = [Problem(Nq=n, D=128, H=32) for n in lengths]
    extra = {
        name: [cost.FORWARD[name](p).hbm_extra_bytes for p in layers]
        for name in ("naive", "online")
    }
    cards = [gpu("rtx4090"), gpu("h200")]
    return plots.memory_against_n(lengths, extra, cards, "S and P outgrow any card")


@example
def bars() -> Figure:
    card = gpu("h200")
    least = {
        rung.name: 1e6 * card.bound(cost.FORWARD[rung.name](HEAD), "float16").seconds
        for rung in LADDER
    }
    return plots.bars(least, "least time on an H200 (µs)", "The least time of each rung")


# tiles of the scores


@example
def visits() -> Figure:
    small = Problem(Nq=6, D=4, block_q=2, block_k=2)
    return plots.visits(trace("tiled", small), small, "Each tile of S is computed three times")


@example
def visits_causal() -> Figure:
    return plots.visits(trace("flash1", SMALL), SMALL, "flash1, causal: column by column")


@example
def visits_long() -> Figure:
    return plots.visits(trace("tiled", LONG), LONG, "2048 tiles, causal (N = 4096)")


@example
def loop_orders() -> Figure:
    traces = {
        "online: a query tile meets all keys": trace("online", TINY),
        "flash1: a key tile meets all queries": trace("flash1", TINY),
    }
    return plots.loop_orders(traces, 16, 16, "The same tiles of S, by rows or by columns")


@example
def walks() -> Figure:
    kernels = {"flash2 dkdv": "dkdv: a column of tiles", "flash2 dq": "dq: a row of tiles"}
    return plots.walks(
        trace("flash2", SMALL, backward=True), SMALL, kernels, "Each program walks alone", mark=2
    )


# programs


@example
def masked_tiles() -> Figure:
    return plots.masked_tiles(10, 4, "Three programs and ten elements")


@example
def busy_sms() -> Figure:
    return plots.busy_sms(
        {"flash1": 16, "flash2": 512}, 132, "FlashAttention-2 has work for every SM"
    )


@example
def waiting() -> Figure:
    tiles = [2 * (i + 1) for i in range(128)]
    orders = {"shortest first": 4 * tiles, "longest first": 4 * tiles[::-1]}
    finish = {name: finish_times(assign(work, 132), 132) for name, work in orders.items()}
    return plots.waiting(finish, 4 * sum(tiles) / 132, "tiles computed", "Longest first")


@example
def sm_timeline() -> Figure:
    schedules = {"flash1": assign([32 * 64] * 16, 132), "flash2": assign([64] * 16 * 32, 132)}
    return plots.sm_timeline(
        schedules, 132, "tiles of S, one after the other",
        "16 heads, N = 4096: flash1 and flash2 on 132 SMs", programs_a_head={"flash2": 32},
    )  # fmt: skip


@example
def splits() -> Figure:
    places, tiles, cases = gpu("h200").sm_count, 131072 // 128, {}
    for B in (1, 8):
        rows = []
        for n in range(1, 2 * places // (2 * B) + 1):
            each = -(-tiles // n)
            work = [min(each, tiles - at) for at in range(0, tiles, each)] * 2 * B
            done = max(finish_times(assign(work, places), places))
            rows.append((n, sum(work) / (places * done), done))
        cases[f"batch {B}"] = rows
    chosen = {f"batch {B}": splits_for(places, 2 * B, 131072, 128) for B in (1, 8)}
    return plots.splits(cases, chosen, "tiles, one after the other", "Splits fill the card")


# flash3's pipeline


@example
def who_waits() -> Figure:
    kernels = {"flash2, 8 warps that meet": FLASH2, "a producer, two consumers": Kernel()}
    return plots.who_waits(
        {label: simulate(kernel, [8]) for label, kernel in kernels.items()},
        "A key tile after another, on one SM", start_s=3e-6, stop_s=9e-6,
    )  # fmt: skip


@example
def waterfall() -> Figure:
    recorded = record.latest(kind="steps", card="H100")
    steps = waterfall_of(recorded, D=128, causal=True, N=4096)
    return plots.waterfall(steps, "Causal, N = 4096, D = 128")


# the cache


@example
def idle_memory() -> Figure:
    lengths = np.random.default_rng(0).integers(1, 4097, 64).tolist()
    rooms = {f"pages of {n}": (sum(lengths), idle_in_pages(lengths, n)) for n in (16, 64, 256)}
    alone = {"room for 4096": (sum(lengths), idle_in_contiguous(lengths, 4096))}
    return plots.idle_memory(alone | rooms, "Memory of 64 sequences")


# serving


@example
def card_memory() -> Figure:
    before = plan(MODELS["llama2-7b"], gpu("a100-80"), N=4096, B=4)
    after = before.replace(
        attention="flash", cache="pages", B=16, used=2048, memory=0.4, step_tokens=8192
    )
    drawn = {"before": before, "after": after}
    return plots.card_memory(
        {label: p.parts for label, p in drawn.items()}, before.gpu, "A server, before and after",
        {label: p.memory for label, p in drawn.items()},
    )  # fmt: skip


@cache
def served(cache_: str, batch: int, rate: float) -> Served:
    """The case study's load on a simulated server of an A100."""
    clock = SimulatedClock()
    machine = ServingMachine(MODELS["llama2-7b"], gpu("a100-80"), cache=cache_)
    server: Any = StaticServer(machine, clock, batch=batch)
    if cache_ == "pages":
        server = ContinuousServer(machine, clock, batch=batch, room=100_000)
    load = Load(rate, 60, Lengths(256, 1.0, 16, 3584), Lengths(64, 0.8, 4, 512))
    return serve(server, load.requests(), clock)


@example
def batch_over_time() -> Figure:
    return plots.batch_over_time(
        {
            "static batches of 4": served("contiguous", 4, 2.0).samples,
            "continuous, 16": served("pages", 16, 2.0).samples,
        },
        "The same requests: a static batch waits for its longest answer",
    )


@example
def waiting_times() -> Figure:
    return plots.waiting_times(
        {
            "static batches of 4": served("contiguous", 4, 2.0).latency_s,
            "continuous, 16": served("pages", 16, 2.0).latency_s,
        },
        "How long users wait",
    )


@example
def factors() -> Figure:
    rates = {
        "static batches of 4": served("contiguous", 4, math.inf),
        "continuous, 4": served("pages", 4, math.inf),
        "continuous, 16": served("pages", 16, math.inf),
    }
    found = {label: s.summary()["requests_per_s"] for label, s in rates.items()}
    shown = dict(zip(found, (1.0, 2.2, None), strict=True))
    return plots.factors(
        {label: (x, shown[label]) for label, x in found.items()}, "What each change is worth"
    )


# masks


@example
def runs() -> Figure:
    query, key = torch.arange(7)[:, None], torch.arange(7)
    causal = (key <= query) & (key > query - 4)
    seen = torch.stack([causal & (key >= padding) for padding in (0, 2, 5)])
    found = runs_of(seen[:, None])
    assert found is not None
    panels = {f"{7 - (0, 2, 5)[b]} tokens": (found.first[b].tolist(), found.stop[b].tolist())
              for b in range(3)}  # fmt: skip
    return plots.runs(panels, 7, "A batch, padded on the left, with a window of 4 keys")


@example
def padded_and_packed() -> Figure:
    return plots.padded_and_packed([41, 23, 9, 32], "Four texts, padded and packed")


# training


@example
def losses() -> Figure:
    fall = np.exp(-np.arange(40) / 15)
    noise = 1e-6 * np.random.default_rng(0).standard_normal(40)
    curves = {"eager": (3 * fall + 0.5).tolist(), "FlashEdu": (3 * fall + 0.5 + noise).tolist()}
    return plots.losses(curves, 1e-3, "One curve")


# softmax and rounding


@example
def running_state() -> Figure:
    row = Problem(Nq=1, Nk=24, D=1, dtype="float32", block_q=1, block_k=4)
    _, k, v, _ = draw(row, "rising", framework="torch", seed=3)
    machine = Machine(watch=["m_i", "l_i", "acc_i"])
    online.attention(torch.ones(1, 1, 1, 1), k, v, scale=1.0, block_q=1, block_k=4, machine=machine)
    m, l, acc = ([tile.item() for tile in machine.watched[name][1:]]
                 for name in ("m_i", "l_i", "acc_i"))  # fmt: skip
    return plots.running_state(k.flatten().tolist(), m, l, acc, 4, "m never falls")


@example
def two_answers() -> Figure:
    q, k, v, _ = draw(Problem(Nq=1, Nk=512, D=64, dtype="float32"), framework="torch")
    exact = reference.attention(q, k, v).o
    found = {
        f"{size} keys in a tile": (
            online.attention(q, k, v, block_k=size).double() - exact
        ).flatten()[:40].tolist()
        for size in (64, 128)
    }  # fmt: skip
    return plots.two_answers(found, "Two tile sizes: other errors, not larger ones")


@example
def bit_layout() -> Figure:
    return plots.bit_layout(FORMATS, "TF32: float32's exponent and float16's mantissa")


@example
def error_against_n() -> Figure:
    lengths = [2**e for e in range(8, 15, 2)]
    found: dict[str, list[Error]] = {"bfloat16": [], "float16": [], "float32": []}
    wrong = []
    for n in lengths:
        inputs = draw(Problem(Nq=4, Nk=n, D=16, dtype="float32"), framework="torch")[:3]
        mean = inputs[2].mean(2, keepdim=True).expand_as(inputs[0])
        wrong.append(errors(reference.Reference(mean, None), *inputs)["o"].error)
        for name, column in found.items():
            rounded = [x.to(getattr(torch, name)) for x in inputs]
            o = online.attention(*rounded, block_k=4096)
            column.append(errors(reference.Reference(o, None), *rounded)["o"])
    return plots.error_against_n(lengths, found, wrong, 1e-2, "Budgets tell right from wrong")


@example
def against_budget() -> Figure:
    rows = {}
    for family in ("normal", "peaked", "large", "rising"):
        p = Problem(Nq=64, D=32, dtype="float32")
        inputs = draw(p, family, framework="torch")[:3]
        found = {}
        for name in ("float32", "tf32"):
            o = online.attention(*(round_to(x, name) for x in inputs))
            found[name] = errors(reference.Reference(o, None), *inputs)["o"]
        rows[f"{family}: o"] = found
    return plots.against_budget(rows, "TF32 is over the budget of float32")


@example
def running_sums() -> Figure:
    sums = {}
    for name in ("float32", "float16", "bfloat16"):
        one = torch.ones((), dtype=getattr(torch, name))
        total, found = 0 * one, []
        for _ in range(5000):
            total = total + one
            found.append(total.item())
        sums[name] = found
    return plots.running_sums(sums, "A sum of ones stops where a step is 2 wide")


@example
def orders() -> Figure:
    rng = np.random.default_rng(0)
    shares = rng.standard_normal(32).astype(np.float32)
    nearest = np.float32(shares.astype(float).sum())
    totals = np.stack([rng.permutation(shares) for _ in range(1000)]).cumsum(axis=1)[:, -1]
    steps = np.rint((totals - nearest) / np.spacing(np.abs(nearest))).astype(int)
    return plots.orders(steps, "The same 32 numbers, added in 1000 orders")


# Hopper


@example
def one_sm() -> Figure:
    warps = {"consumer 1": 4, "consumer 2": 4, "producer": 1}
    tiles = [("q", 2**15)] * 2 + [("k", 2**15)] * 2 + [("v", 2**15)] * 2 + [("o", 2**15)]
    sram = gpu("h100").sram_bytes_per_sm
    return plots.one_sm(warps, tiles, sram, "One SM of a Hopper GPU")


@example
def tile_copy() -> Figure:
    return plots.tile_copy(448, 128, 128, 2, "A copy needs the number of a row, and no address")


@example
def warpgroup_product() -> Figure:
    q_k = Product("s = q kᵀ", "q", "kᵀ", "s", 128, 64)
    p_v = Product("acc ← acc + p v", "p", "v", "acc", 64, 128, left_in_registers=True)
    return plots.warpgroup_product([q_k, p_v], "A warp has 16 rows of each product")


@example
def phases() -> Figure:
    places = SMPlaces("k", 2, 1, 2**15)

    def produce() -> Any:
        for t in range(4):
            yield from fill(places, t)

    def consume() -> Any:
        for t in range(4):
            used = yield from full(places, t)
            yield Join((yield Ask(TENSOR, 1e-6, "q k", t, places)))
            yield Arrive(used)

    timeline = SM().run({"producer": produce(), "consumer 1": consume()})
    barriers = {b.name: b.opened for b in (*places.full, *places.empty)}
    return plots.phases(barriers, timeline.seconds, "Phases of two barriers a place")


@example
def register_shares() -> Figure:
    splits = {}
    for label, producer, consumer in (("equal shares", 168, 168), ("reallocated", 24, 240)):
        shares = [Share(f"consumer {c}", consumer, 160) for c in (1, 2)]
        splits[label] = [Share("producer", producer), *shares]
    return plots.register_shares(splits, 65536, "A producer needs few registers")


# recorded


@example
def speed() -> Figure:
    found = record.latest("speed", card="H200")
    return plots.speed(found, 128, "flash2 beside PyTorch's own (D = 128)")


@example
def speedup_against_heads() -> Figure:
    found = record.latest("flash1", card="H200")
    return plots.speedup_against_heads(found, "flash2 against flash1")


@example
def memory() -> Figure:
    found = record.latest("memory", card="H200")
    return plots.memory(found, "Memory of forward and backward")


@example
def decode_times() -> Figure:
    found = record.latest("decode", card="H100")
    return plots.decode_times(found, "decode beside PyTorch's own")


@example
def packed_times() -> Figure:
    return plots.packed_times(record.latest("varlen", card="H100"), 128, "Packed, and padded")


@example
def model_bars() -> Figure:
    return plots.model_bars(record.latest("model", card="H100"), 16, "A forward of a model")


# held against a card, and against papers


@example
def against_published() -> Figure:
    return plots.against_published(published.claims(), "The papers' ratios, on an H200")


@example
def predicted_counted_measured() -> Figure:
    return show.figures(record.latest(kind="traffic", card="H200"))["kernels"]


@example
def l2_and_dram() -> Figure:
    return show.figures(record.latest(kind="traffic", card="H200"))["dram"]


# sheets


def write(folder: Path) -> list[Path]:
    """Every example in each theme, as FOLDER/theme/name.png, and FOLDER/theme.png with all."""
    written = []
    for name in THEMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        pictures = []
        for figure, make in EXAMPLES.items():
            with plots.theme(name):
                fig = make()
            pictures.append(folder / name / f"{figure}.png")
            fig.savefig(pictures[-1])
            plt.close(fig)
        sheet(pictures, THEMES[name]).save(folder / f"{name}.png")
        written += [*pictures, folder / f"{name}.png"]
    return written


def sheet(pictures: list[Path], look: Look, columns: int = 3, width: int = 900) -> Image.Image:
    """All pictures on one, each below the last of its column, into the column with most room."""
    thumbs = []
    for path in pictures:
        with Image.open(path) as picture:
            size = width, round(picture.height * width / picture.width)
            thumbs.append(picture.convert("RGB").resize(size))
    filled, gap, placed = [0] * columns, 24, []
    for thumb in thumbs:
        column = filled.index(min(filled))
        placed.append((gap + column * (width + gap), gap + filled[column]))
        filled[column] += thumb.height + gap
    whole = Image.new("RGB", (gap + columns * (width + gap), gap + max(filled)), look.faint)
    for thumb, place in zip(thumbs, placed, strict=True):
        whole.paste(thumb, place)
    return whole


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(f"tools/figures.py takes a folder or nothing, got {arguments}", file=sys.stderr)
        return 2
    written = write(Path(arguments[0]) if arguments else ROOT / "build" / "figures")
    print(f"{len(written)} pictures in {written[-1].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
