"""The papers' ratios beside ours: from the records, and called reproduced only where they are."""

from __future__ import annotations

import pytest

from flashedu.bench import published
from flashedu.bench.published import Claim
from flashedu.bench.record import latest


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
    extra = {run["peer"]: run["extra_bytes"] for run in case["runs"]}
    ratio = extra["standard"] / extra["flash2"]
    assert found["memory, standard / flash, N 2048"].ours == (ratio, ratio)

    moved = {"standard": 0, "flash2": 0}
    for case in latest(kind="traffic", card="H200").data["cases"]:
        if case["section"] == "peers" and not case["causal"] and case["peer"] in moved:
            for run in case["runs"]:
                moved[case["peer"]] += run["dram_read_bytes"] + run["dram_write_bytes"]
    ratio = moved["standard"] / moved["flash2"]
    assert found["bytes of GPU memory, standard / flash"].ours == (ratio, ratio)

    seconds = {
        (case["pass"], run["peer"]): run["median_s"]
        for case in latest("speed", card="H200").cases("speed", D=64, causal=True, N=1024)
        for run in case["runs"]
    }
    step = {peer: seconds["fwd", peer] + seconds["bwd", peer] for peer in moved}
    ratio = step["standard"] / step["flash2"]
    assert found["time, standard / flash, N 1024"].ours[1] == pytest.approx(ratio)
