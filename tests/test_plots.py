"""A figure shows the data that it was given, and its colours can be told apart."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from flashedu import plots
from flashedu.bench.cases import PEERS
from flashedu.memory import GPUS, Machine, Problem, gpu
from flashedu.plots import style
from flashedu.stages import LADDER, naive, tiled
from flashedu.testing import draw
from tests import pretend

P = Problem(Nq=12, Nk=10, D=4, causal=True, block_q=4, block_k=3)


pytestmark = pytest.mark.usefixtures("no_figure_stays_open")


@pytest.fixture(scope="module")
def machine():
    counted = Machine()
    q, k, v, _ = draw(P)
    tiled.attention(q, k, v, causal=True, block_q=4, block_k=3, machine=counted)
    return counted


def texts(fig):
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def test_the_bars_of_traffic_are_as_long_as_the_bytes(machine):
    standard = Machine()
    q, k, v, _ = draw(P)
    naive.attention(q, k, v, causal=True, machine=standard)
    runs = {"naive": standard.bytes_by_tensor(), "tiled": machine.bytes_by_tensor()}
    fig = plots.traffic(runs, "title", unit_bytes=1024)
    bars = fig.axes[0].patches
    for row, run in enumerate((standard, machine)):
        widths = [
            bar.get_width() for bar in bars if round(bar.get_y() + bar.get_height() / 2) == row
        ]
        assert sum(widths) * 1024 == pytest.approx(run.counted.hbm_bytes)


def test_what_is_written_is_hatched(machine):
    fig = plots.traffic({"tiled": machine.bytes_by_tensor()}, "title", unit_bytes=1)
    hatched = [bar.get_width() for bar in fig.axes[0].patches if bar.get_hatch()]
    assert sum(hatched) == pytest.approx(machine.counted.hbm_write_bytes)


def test_every_tile_that_was_computed_shows_its_turns_and_no_other_does(machine):
    fig = plots.visits(machine.trace, P, "title")
    loads = [event for event in machine.trace if event.tensor == "k"]
    turns = sorted(int(turn) for text in texts(fig) for turn in text.split(","))
    assert turns == list(range(1, len(loads) + 1))
    blank = [p for p in fig.axes[0].patches if to_rgb(p.get_facecolor()) == (1, 1, 1)]
    assert len(fig.axes[0].patches) - len(blank) == len(texts(fig))


def test_occupancy_ends_at_the_peak_that_was_counted(machine):
    fig = plots.sram_occupancy(machine.trace, "title", capacity_bytes=10_000)
    (line, _) = fig.axes[0].lines
    assert max(line.get_ydata()) == machine.sram_peak_bytes


def test_a_point_of_the_roofline_lies_on_the_roof_of_the_last_card():
    card = gpu("h200")
    fig = plots.roofline([gpu("t4"), card], {"naive": 10.0, "online": 1e4}, "float16", "title")
    points = [line.get_xydata()[0] for line in fig.axes[0].lines if line.get_marker() != "None"]
    assert points[0] == pytest.approx([10, 10 * card.hbm_bytes_per_s / 1e12])
    assert points[1] == pytest.approx([1e4, card.tensor_flops_per_s / 1e12])


def test_the_areas_of_the_hierarchy_are_to_scale():
    card = gpu("a100-80")
    hbm, l2, sram = plots.hierarchy(card, "title").axes[0].patches
    area = [patch.get_width() * patch.get_height() for patch in (hbm, l2, sram)]
    assert area[1] / area[0] == pytest.approx(card.l2_bytes / card.hbm_bytes)
    on_chip = card.sm_count * card.sram_bytes_per_sm
    assert area[2] / area[0] == pytest.approx(on_chip / card.hbm_bytes)


def test_curves_hold_the_numbers_given():
    n = [1024, 2048, 4096]
    fig = plots.memory_against_n(n, {"naive": [2**20, 2**22, 2**24]}, GPUS[:1], "title")
    assert list(fig.axes[0].lines[0].get_ydata()) == [2**20, 2**22, 2**24]
    fig = plots.traffic_against_sram(
        [2**14, 2**15], {"tiled": [2**22, 2**21]}, [2**22, 2**21], GPUS[:1], "title"
    )
    assert [list(line.get_ydata()) for line in fig.axes[0].lines[:2]] == [[4, 2], [4, 2]]
    fig = plots.running_state([1.0, 3.0, 2.0], [3.0, 3.0], [1.1, 1.5], 2, "title")
    assert list(fig.axes[1].lines[0].get_ydata()) == [1.1, 1.1, 1.5]


def test_a_figure_leaves_the_readers_style_as_it_was(machine):
    before = dict(matplotlib.rcParams)
    plots.sram_occupancy(machine.trace, "title")
    assert dict(matplotlib.rcParams) == before


def test_every_rung_has_a_grey_and_a_marker_of_its_own():
    names = [rung.name for rung in LADDER]
    for table in (style.STAGE, style.STAGE_MARKER):
        assert list(table) == names
        assert len(set(table.values())) == len(names)


def luminance(colour):
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def test_tensors_that_stand_side_by_side_differ_in_greyscale():
    beside = [("k", "v"), ("s", "p"), ("q", "k"), ("v", "o")]
    for a, b in beside:
        difference = abs(luminance(style.TENSOR[a]) - luminance(style.TENSOR[b]))
        assert difference > 0.08, f"{a} and {b} look alike without colour"
    for a, b in itertools.combinations(style.STAGE.values(), 2):
        assert abs(luminance(a) - luminance(b)) > 0.15


@pytest.mark.parametrize(
    ("name", "tensor"), [("q", "q"), ("s_ij", "s"), ("dq", "q"), ("dq_sum", "q"), ("acc_i", "acc")]
)
def test_a_tile_and_a_gradient_have_the_colour_of_their_tensor(name, tensor):
    assert style.colour_of(name) == style.TENSOR[tensor]


# recorded speed


@pytest.fixture(scope="module")
def recorded():
    return pretend.record()


def test_the_speed_figure_has_a_line_for_each_peer_and_its_numbers(recorded):
    fig = plots.speed(recorded, 128, "title")
    assert len(fig.axes) == 4  # forward and backward, full and causal
    for ax, (name, causal) in zip(
        fig.axes, itertools.product(("fwd", "bwd"), (False, True)), strict=True
    ):
        want = {
            tuple(
                run["tflops"]
                for case in recorded.cases("speed", D=128, causal=causal, **{"pass": name})
                for run in case["runs"]
                if run["peer"] == peer and run["tflops"] is not None
            )
            for peer in style.PEER
        } - {()}
        assert {tuple(c.lines[0].get_ydata()) for c in ax.containers} == want


def test_bars_on_the_speed_figure_reach_over_the_spread(recorded):
    fig = plots.speed(recorded, 64, "title")
    (case,) = recorded.cases("speed", D=64, causal=False, N=512, **{"pass": "fwd"})
    (run,) = (run for run in case["runs"] if run["peer"] == "flash2")
    (drawn,) = (c for c in fig.axes[0].containers if c.get_label() == "flash2")
    low, high = drawn.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx(
        [case["flops"] / run[end] / 1e12 for end in ("p90_s", "p10_s")]
    )


def test_the_speedup_over_flash1_is_drawn_against_heads_beside_the_sms(recorded):
    (ax,) = plots.speedup_against_heads(recorded, "title").axes
    assert [c.get_label() for c in ax.containers] == [
        "N 2,048, full", "N 16,384, full", "N 2,048, causal", "N 16,384, causal",
    ]  # fmt: skip
    ratios = [
        case["runs"][0]["times_as_fast_as"]["flash1"][0]
        for case in recorded.cases("flash1", N=2048, causal=False)
    ]
    drawn = ax.containers[0].lines[0]
    assert list(drawn.get_xdata()) == [2**i for i in range(10)]
    assert list(drawn.get_ydata()) == ratios
    assert "132 SMs " in texts(ax.figure)


def test_a_line_of_memory_ends_where_memory_did(recorded):
    (ax,) = plots.memory(recorded, "title").axes
    lines = {c.get_label(): c.lines[0] for c in ax.containers}
    assert list(lines) == ["flash2", "SDPA flash", "standard"]
    fits = [
        run["extra_bytes"]
        for case in recorded.cases("memory")
        for run in case["runs"]
        if run["peer"] == "standard" and run["why"] is None
    ]
    assert 2 < len(fits) < 8
    assert list(lines["standard"].get_ydata()) == fits
    assert len(lines["flash2"].get_ydata()) == 8


def test_every_peer_has_a_grey_a_marker_and_a_line_of_its_own():
    assert set(style.PEER) == set(PEERS)
    assert len(set(style.PEER.values())) == len({m for _, m, _ in style.PEER.values()})
    assert len({(grey, dashes) for grey, _, dashes in style.PEER.values()}) == len(PEERS)
    greys = sorted({luminance(grey) for grey, _, _ in style.PEER.values()})
    assert all(b - a > 0.05 for a, b in itertools.pairwise(greys))
