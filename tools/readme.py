"""Write what the README shows of the code: the ladder table, and the picture of its traffic.

python tools/readme.py            write both
python tools/readme.py --check    exit 1, with a sentence, if either is stale
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from PIL import Image

from flashedu import ladder, plots
from flashedu.memory import Machine, Problem, cost, gpu
from flashedu.stages import LADDER

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "images" / "traffic.png"
BEGIN, END = "<!-- ladder: made by tools/readme.py -->\n", "<!-- end of ladder -->"

PROBLEM = Problem(Nq=4096, D=64)
CARD = gpu("h200")

Bytes = dict[str, dict[str, tuple[int, int]]]


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


def traffic() -> Bytes:
    """Stage → tensor → (bytes read, bytes written), counted."""
    return {name: machine.bytes_by_tensor() for name, machine in run(PROBLEM).items()}


def with_table(readme: str, new: str) -> str:
    """The README with `new` between the markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END, 1)[1]


def picture_bytes() -> Bytes:
    """What the stored picture was drawn from: it carries its data."""
    with Image.open(PICTURE) as picture:
        stored = json.loads(picture.info["Description"])
    return {stage: {t: tuple(b) for t, b in tensors.items()} for stage, tensors in stored.items()}


def stale() -> list[str]:
    """A sentence for each part of the README that the code has left behind."""
    readme = README.read_text(encoding="utf-8")
    found = []
    if with_table(readme, table()) != readme:
        found.append("README.md: the ladder table is stale; python tools/readme.py writes it")
    if picture_bytes() != traffic():
        found.append("images/traffic.png is stale; python tools/readme.py draws it")
    return found


def write() -> None:
    readme = README.read_text(encoding="utf-8")
    README.write_text(with_table(readme, table()), encoding="utf-8")
    counted = traffic()
    fig = plots.traffic(counted, "HBM traffic of one head, N = 4096, D = 64, float16")
    PICTURE.parent.mkdir(exist_ok=True)
    fig.savefig(PICTURE, dpi=160, metadata={"Description": json.dumps(counted), "Software": None})


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
