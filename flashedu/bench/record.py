"""Records of what was measured: JSON in benchmarks/results/, written once, never edited.

A record says where, when and with what it was taken, and holds its cases under "cases".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "benchmarks" / "results"
TIMED = ("seconds", "median_s", "p10_s", "p90_s", "extra_bytes")
HEAD = ("date", "card", "torch", "triton", "cuda", "driver", "sm_count", "compute_capability",
        "quick", "planned", "cases")  # fmt: skip
CASE = ("section", "B", "H", "N", "D", "dtype", "causal", "runs")
KINDS = {  # kind of a record → what its cases have, and what their runs have
    "attention": ((*CASE, "pass", "mode"), (*TIMED, "why", "peer", "errors", "tflops",
                                            "times_as_fast_as")),
    "steps": ((*CASE, "pass", "mode", "consumers"), (*TIMED, "why", "peer", "against", "errors",
                                                      "tflops", "times_as_fast_as")),
    "tiles": ((*CASE, "columns", "item_bytes", "best"), (*TIMED, "why", "tile")),
    "traffic": ((*CASE, "pass", "peer", "why"), (
        "kernel", "launched", "tile", "closed_form", "counted", "l2_to_sm_bytes", "sm_to_l2_bytes",
        "dram_read_bytes", "dram_write_bytes")),
    "sanitizer": (("section", "errors", "warnings", "first", "planted", "runs"),
                  ("peer", "astray", "why")),
    "serving": (("section", "shape", "dtype", "load", "runs"),
                ("peer", "kind", "attention", "batch", "repeat", "why")),
}  # fmt: skip


class NoRecord(ValueError):
    """There is no such record, or the file is none. One sentence."""


@dataclass(frozen=True)
class Record:
    """A file and what stands in it."""

    path: Path
    data: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Where and when it was taken, in a line."""
        return label(self.data)

    def cases(self, section: str, **sizes: Any) -> list[dict[str, Any]]:
        """The cases of a section that have these values, as in `cases("speed", D=64)`."""
        wanted = {"section": section, **sizes}
        return [c for c in self.data["cases"] if all(c.get(k) == x for k, x in wanted.items())]


def label(recorded: Mapping[str, Any]) -> str:
    """Where and when a record was taken, in a line."""
    triton = f"triton {recorded['triton']}, " if recorded.get("triton") else ""
    return (
        f"recorded {recorded['date'][:10]} on an {recorded['card']}, torch {recorded['torch']}, "
        f"{triton}CUDA {recorded['cuda']}, driver {recorded['driver']}"
    )


def load(path: str | Path) -> Record:
    """The record of `flashedu bench` in that file. Raises NoRecord with a sentence."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        _check(data)
    except OSError as error:
        raise NoRecord(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NoRecord(f"{path} is no record of flashedu bench: it is not text") from None
    except json.JSONDecodeError as error:
        raise NoRecord(f"{path} is no record of flashedu bench: it is not JSON ({error})") from None
    except (AttributeError, KeyError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else "its parts have other types"
        raise NoRecord(f"{path} is no record of flashedu bench: {why}") from None
    return Record(Path(path), data)


def latest(
    section: str | None = None,
    *,
    kind: str | None = None,
    card: str = "",
    folder: Path | None = None,
) -> Record:
    """The newest record, of a full run, that has cases of that section; None takes any.

    `kind`: of the record, one of KINDS. `card`: a part of the card's name. `folder`: None for the
    checkout's. Raises NoRecord if there is none.
    """
    folder = folder or RESULTS
    found = [
        record
        for record in _all(folder)
        if card.lower() in record.data["card"].lower()
        and not record.data["quick"]
        and kind in (None, record.data["kind"])
        and (section is None or record.cases(section))
    ]
    if not found:
        what = " of ".join(filter(None, (f"section {section!r}" if section else kind, card)))
        raise NoRecord(
            f"no record of flashedu bench{f', {what},' if what else ''} in {folder}; "
            "`flashedu bench` makes one on a GPU"
        )
    return max(found, key=lambda record: record.data["date"])


def _all(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("*.json")):
        try:
            yield load(path)
        except NoRecord:  # other programs keep their records there too
            continue


def _check(data: Any) -> None:
    if data["kind"] not in KINDS:
        raise KeyError("kind")
    of_case, of_run = KINDS[data["kind"]]
    _has(data, HEAD)
    for case in data["cases"]:
        _has(case, of_case)
        for run in case["runs"]:
            _has(run, of_run)


def _has(part: Any, names: Iterable[str]) -> None:
    for name in names:
        part[name]


class Writer:
    """A new file, rewritten after each case: what a run has measured survives its end."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Raises FileExistsError: no record is overwritten."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("x").close()
        self.path, self.data = path, {**head, "cases": []}
        self._save()

    def add(self, case: Mapping[str, Any]) -> None:
        """Append a case."""
        self.data["cases"].append(case)
        self._save()

    def finish(self, **more: Any) -> None:
        """Add what is known only at the end."""
        self.data |= more
        self._save()

    def _save(self) -> None:
        whole = self.path.with_suffix(".part")
        text = json.dumps(self.data, indent=1, allow_nan=False) + "\n"
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, self.path)  # at no moment is the file half a record


def new_path(kind: str, card: str, date: str) -> Path:
    """Where a run of that date (ISO, UTC) goes: the checkout's records, or the current folder."""
    slug = "-".join(card.lower().removeprefix("nvidia ").split())
    stamp = date.replace("+00:00", "Z").replace(":", "")
    folder = RESULTS if (CHECKOUT / "pyproject.toml").exists() else Path.cwd()
    return folder / f"{kind}_{slug}_{stamp}.json"
