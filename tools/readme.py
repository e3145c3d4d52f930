"""Write what the README shows of the code: the ladder table, and pictures from its counts.

python tools/readme.py            write them
python tools/readme.py --check    exit 1, with a sentence, if one is stale
"""

from __future__ import annotations

import itertools
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from flashedu import ladder, plots
from flashedu.bench import show
from flashedu.bench.cases import MASKS, PASSES, PEERS
from flashedu.bench.record import latest
from flashedu.memory import Machine, Problem, cost, gpu
from flashedu.player.film import Film, record
from flashedu.player.still import storyboard
from flashedu.stages import LADDER

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
IMAGES = ROOT / "images"
BEGIN, END = "<!-- {}: made by tools/readme.py -->\n", "<!-- end of {} -->"

PROBLEM = Problem(Nq=4096, D=64)
SMALL = Problem(Nq=64, D=16, block_q=8, block_k=8)
CARD = gpu("h200")

THEMES = {"light": "", "dark": "_dark"}  # what its files' names end in


@cache
def run(problem: Problem) -> dict[str, Machine]:
    """Stage → the machine that counted it."""
    return {rung.name: ladder.count(rung.name, problem) for rung in LADDER}


def table() -> str:
    """The ladder in Markdown, from what was counted."""
    rows = []
    for rung in LADDER:
        counted = run(PROBLEM)[rung.name].counted
        closed_form = cost.FORWARD[rung.name](PROBLEM)
        assert counted == closed_form, f"{rung.name}: counted {counted}, closed form {closed_form}"
        bound = CARD.bound(counted, PROBLEM.dtype)
        rows.append(
            ladder.Row(
                rung.name, rung.framework, rung.idea, CARD.name, closed_form, bound, counted=counted
            )
        )
    return ladder.markdown_table(rows)


def traffic() -> Figure:
    counted = {name: machine.bytes_by_tensor() for name, machine in run(PROBLEM).items()}
    return plots.traffic(counted, "HBM traffic of one head, N = 4096, D = 64, float16")


def moments() -> Figure:
    title = "Attention in one pass: 64 tokens, in tiles of eight"
    return storyboard([film()], [title])


@cache
def film() -> Film:
    return record("online", SMALL)


def counts(name: str) -> Any:
    """What a picture was drawn from, as JSON reads it."""
    machines = run(PROBLEM) if name == "traffic" else {"online": film().machine}
    found = {stage: machine.bytes_by_tensor() for stage, machine in machines.items()}
    return json.loads(json.dumps(found))


PICTURES = {"moments": moments, "traffic": traffic}


def counters() -> str:
    """flash2's bytes into the SMs, three times over, from the record of an H200."""
    lines = ["| queries in a tile | closed formula | counted, interpreted | counted by the H200 |",
             "| ---: | ---: | ---: | ---: |"]  # fmt: skip
    three = show.three_counts(latest(kind="traffic", card="H200"))["flash2"]
    for tile, numbers in three.items():
        queries = tile.split()[2]
        lines.append(f"| {queries} | {' | '.join(f'{n:,}' for n in numbers)} |")
    return "\n".join(lines) + "\n"


def speed() -> str:
    """flash3 beside others, from the newest record of an H100, and when it was taken."""
    recorded = latest("speed", card="H100")
    peers = [name for name in PEERS if name in ("flash2", "flash3", "sdpa-cudnn", "fa4")]
    lines = [
        f"| TFLOP/s | {' | '.join(PEERS[name] for name in peers)} |",
        "| --- |" + 4 * " ---: |",
    ]
    for of, causal in itertools.product(("fwd", "bwd"), (False, True)):
        (case,) = recorded.cases("speed", D=128, N=16384, causal=causal, **{"pass": of})
        rates = {run["peer"]: f"{run['tflops']:.0f}" for run in case["runs"]}
        cells = [f"{PASSES[of]}, {MASKS[causal]}", *(rates[name] for name in peers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nD = 128, N = 16,384, bfloat16; {recorded.label}.\n"


TABLES = {"ladder": table, "counters": counters, "speed": speed}


def with_table(readme: str, name: str, new: str) -> str:
    """The README with `new` between the markers of that name."""
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = readme.split(begin)
    return before + begin + new + end + rest.split(end, 1)[1]


def stale() -> list[str]:
    """A sentence for each part of the README that the code has left behind."""
    readme = README.read_text(encoding="utf-8")
    found = []
    for name, make in TABLES.items():
        if with_table(readme, name, make()) != readme:
            found.append(f"README.md: the {name} table is stale; python tools/readme.py writes it")
    for name in PICTURES:
        for ending in THEMES.values():
            path = IMAGES / f"{name}{ending}.png"
            with Image.open(path) as picture:  # it carries its data
                if json.loads(picture.info["Description"]) != counts(name):
                    found.append(f"images/{path.name} is stale; python tools/readme.py draws it")
    return found


def write() -> None:
    readme = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        readme = with_table(readme, name, make())
    README.write_text(readme, encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        metadata = {"Description": json.dumps(counts(name)), "Software": None}
        for theme, ending in THEMES.items():
            with plots.theme(theme):
                fig = draw()
            fig.savefig(IMAGES / f"{name}{ending}.png", dpi=160, metadata=metadata)
            plt.close(fig)


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        for sentence in (sentences := stale()):
            print(sentence, file=sys.stderr)
        return 1 if sentences else 0
    if sys.argv[1:]:
        print(f"tools/readme.py takes --check or nothing, got {sys.argv[1:]}", file=sys.stderr)
        return 2
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
