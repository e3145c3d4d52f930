"""The papers' ratios beside ours: from the records, and called reproduced only where they are."""

from __future__ import annotations

import copy
import json

import pytest

from flashedu.bench import cases, published
from flashedu.bench.published import Claim
from flashedu.bench.record import NoRecord, Record, latest
from tests import pretend


def claim(low, high, ours, comparable=True):
    return Claim("what", "source", (low, high), ours, comparable, "why").reproduced


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [((3.0, 4.0), "yes"), ((2.9, 10.4), "yes"), ((2.8, 2.8), "less"), ((1.0, 9.0), "in part"),
     ((4.0, 12.0), "in part"), ((1.0, 99.0), "in part"), ((10.6, 99.0), "more"),
     ((0.1, 2.0), "less")],
)  # fmt: skip
def test_reproduced_means_that_ours_lie_in_the_published_range(ours, verdict):
    assert claim(3, 10, ours) == verdict
    assert claim(3, 10, ours, comparable=False) == "another thing"


def test_ratios_are_those_of_the_records():
    found = {c.what: c for c in published.claims()}
    (case,) = latest("memory", card="H200").cases("memory", N=2048)
    inputs = 4 * 16 * 8 * 2048 * 64 * 2  # q, k, v, do
    total = {run["peer"]: run["extra_bytes"] + inputs for run in case["runs"]}
    ratio = total["standard"] / total["flash2"]
    assert found["memory, standard / flash2, N 2048"].ours == (ratio, ratio)

    moved = {"standard": 0, "flash2": 0}
    for case in latest(kind="traffic", card="H200").data["cases"]:
        if case["section"] == "peers" and not case["causal"] and case["peer"] in moved:
            for run in case["runs"]:
                moved[case["peer"]] += run["dram_read_bytes"] + run["dram_write_bytes"]
    ratio = moved["standard"] / moved["flash2"]
    assert found["bytes of HBM, standard / flash2"].ours == (ratio, ratio)

    seconds = {
        (case["pass"], run["peer"]): run["median_s"]
        for case in latest("speed", card="H200").cases("speed", D=64, causal=True, N=1024)
        for run in case["runs"]
    }
    step = {peer: seconds["fwd", peer] + seconds["bwd", peer] for peer in moved}
    ratio = step["standard"] / step["flash2"]
    assert found["time, standard / flash2, N 1024"].ours[1] == pytest.approx(ratio)

    rates = [run["tflops"] for case in latest("speed", card="H200").cases("speed")
             for run in case["runs"] if run["peer"] == "flash2"]  # fmt: skip
    share = max(rates) * 1e12 / 989e12  # of an H200, dense, float16
    assert found["share of the card's peak, flash2"].ours[0] == pytest.approx(share, rel=1e-3)


def test_the_article_on_flash_decoding_is_beside_a_run_of_its_sizes(tmp_path):
    assert list(published.FLASH_DECODING) == list(cases.FLASH_DECODING)
    made = pretend.record(("flash-decoding",))
    (tmp_path / "x.json").write_text(json.dumps(made.data))
    found = {c.what: c for c in published.decoding("H200", folder=tmp_path)}
    assert len(found) == 2 * 4
    seconds = {run["peer"]: run["median_s"]
               for run in made.cases("flash-decoding", B=1, N=65536)[0]["runs"]}  # fmt: skip
    beside_flash2 = found["time, flash2 / decode, B 1, 65,536 keys"]
    assert beside_flash2.ours[0] == seconds["flash2"] / seconds["decode"]
    assert beside_flash2.published[0] == pytest.approx(35.7, abs=0.05)
    beside_standard = found["time, standard / decode, B 8, 8,192 keys"]
    assert beside_standard.published[0] == pytest.approx(56.3, abs=0.05)


def test_without_a_run_of_its_sizes_there_is_no_ratio(tmp_path):
    with pytest.raises(NoRecord, match="section 'flash-decoding' of H100"):
        published.decoding(folder=tmp_path)


def without(record, keep):
    """A copy that has only the cases that `keep`, which may also change them."""
    data = copy.deepcopy(record.data)
    return Record(record.path, {**data, "cases": [case for case in data["cases"] if keep(case)]})


def out_of_memory(case):
    for run in case["runs"]:
        run |= {"why": "out of memory"} | dict.fromkeys(("median_s", "tflops", "extra_bytes"))
    return True


def uncounted(case):
    case |= {"why": "out of memory", "runs": []}
    return True


@pytest.mark.parametrize(
    ("which", "keep", "why"),
    [
        ("speed", lambda case: case["N"] != 16384, "has no case of speed with D 128, causal False"),
        ("speed", lambda case: case["N"] != 1024, "has no case of speed with D 64, causal False"),
        ("memory", lambda case: case["N"] != 65536, "has no case of memory with N 65536"),
        ("speed", out_of_memory, "out of memory"),
        ("memory", out_of_memory, "out of memory"),
        ("traffic", lambda case: case["pass"] == "fwd", "has no case of peers with .*pass bwd"),
        ("traffic", uncounted, "out of memory"),
    ],
)
def test_a_record_that_lacks_what_a_ratio_needs_gives_no_ratio(monkeypatch, which, keep, why):
    def newest(section, *, kind, card, folder):
        found = latest(section, kind=kind, card=card)
        return without(found, keep) if which in (section, kind) else found

    monkeypatch.setattr(published, "latest", newest)
    with pytest.raises(NoRecord, match=why):
        published.claims()


def test_the_note_says_where_the_least_ratio_is(monkeypatch):
    def note(slow):
        def newest(section, *, kind, card, folder):
            found = latest(section, kind=kind, card=card)
            return without(found, slower) if section == "speed" else found

        def slower(case):
            for run in case["runs"]:
                if run["peer"] == "flash2" and case["N"] == slow:
                    run["median_s"] *= 100
            return True

        monkeypatch.setattr(published, "latest", newest)
        return next(
            c.why for c in published.claims() if c.what == "speed, flash2 / standard, causal"
        )

    assert note(None).endswith("N 512 to 16,384; the least is at D 128 and N 512")
    assert note(4096).endswith("and N 4,096")
