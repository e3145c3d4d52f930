"""A figure shows the data that it was given, and its colours can be told apart."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from flashedu import plots
from flashedu.bench.cases import DRAWN, PEERS
from flashedu.memory import GPUS, Machine, Problem, gpu
from flashedu.plots import style
from flashedu.stages import LADDER, RUNGS, naive, tiled
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


def test_occupancy_ends_at_the_peak_that_was_counted(machine):
    fig = plots.sram_occupancy(machine.trace, "title", capacity_bytes=10_000)
    (line, _) = fig.axes[0].lines
    assert max(line.get_ydata()) == machine.sram_peak_bytes


def test_a_point_of_the_roofline_lies_on_the_roof_of_the_last_card():
    card = gpu("h200")
    fig = plots.roofline([gpu("t4"), card], {"naive": 10.0, "online": 1e4}, "float16", "title")
    points = [line.get_xydata()[0] for line in fig.axes[0].lines if line.get_marker() == "."]
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
    fig = plots.running_state([1.0, 3.0, 2.0], [3.0, 3.0], [1.1, 1.5], [4.0, 5.0], 2, "title")
    assert [list(ax.lines[0].get_ydata()) for ax in fig.axes] == [
        [3.0, 3.0, 3.0], [1.1, 1.1, 1.5], [4.0, 4.0, 5.0],
    ]  # fmt: skip


def test_tiles_in_which_the_maximum_rose_have_their_factor():
    m = [1.0, 1.0, 3.0]
    fig = plots.running_state([1.0, 0.0, 1.0, 1.0, 2.0, 3.0], m, m, m, 2, "title")
    assert texts(fig) == ["α = 0.14"]
    assert fig.axes[1].texts[0].get_position()[0] == 5
    shaded = [p.get_x() for p in fig.axes[2].patches]
    assert shaded == [4]


def test_curves_against_the_tile_hold_the_bytes_given():
    stages = {"naive": [2**22, 2**22], "flash1": [2**24, 2**23]}
    fig = plots.traffic_against_tile([16, 32], stages, "block_k", "title")
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [[4, 4], [16, 8]]
    assert texts(fig) == ["naive: 4 MiB", "flash1: 8 MiB"]


def test_bytes_so_far_end_at_the_bytes_counted(machine):
    fig = plots.cumulative_traffic({"tiled": machine.trace, "online": machine.trace}, "title")
    read, moved = (line.get_ydata() for line in fig.axes[0].lines[:2])
    counted = machine.counted
    assert (read[0], read[-1]) == (0, pytest.approx(counted.hbm_read_bytes))
    assert (moved[0], moved[-1]) == (0, pytest.approx(counted.hbm_bytes))
    assert len(moved) == len(machine.trace) + 1
    assert all(later >= earlier for earlier, later in itertools.pairwise(moved))
    first, second = fig.axes[0].texts
    assert first.get_text() == "tiled 800 B, 96 B written"
    assert fig.axes[0].get_ylabel() == "HBM bytes so far (B)"
    assert first.xyann[1] != second.xyann[1]


def test_labels_of_rungs_with_one_intensity_stand_apart():
    names = [rung.name for rung in LADDER]
    fig = plots.roofline([gpu("h200")], dict.fromkeys(names, 100.0), "float16", "title")
    heights = sorted(t.xyann[1] for t in fig.axes[0].texts if t.get_text().endswith(": 100"))
    assert len(heights) == len(names)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 15.9


def test_a_figure_leaves_the_readers_style_as_it_was(machine):
    before = dict(matplotlib.rcParams)
    plots.sram_occupancy(machine.trace, "title")
    assert dict(matplotlib.rcParams) == before


def test_every_rung_has_a_grey_and_a_marker_of_its_own():
    names = [rung.name for rung in RUNGS]
    for table in (style.LIGHT.stage, style.DARK.stage, style.STAGE_MARKER):
        assert list(table) == names
        assert len(set(table.values())) == len(names)


def luminance(colour):
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("look", style.THEMES.values(), ids=style.THEMES)
def test_tensors_that_stand_side_by_side_differ_in_greyscale(look):
    beside = [("k", "v"), ("s", "p"), ("q", "k"), ("v", "o")]
    for a, b in beside:
        difference = abs(luminance(look.tensor[a]) - luminance(look.tensor[b]))
        assert difference > 0.08, f"{a} and {b} look alike without colour"
    drawn_together = [*itertools.combinations([r.name for r in LADDER], 2), ("flash2", "decode")]
    for a, b in drawn_together:
        assert abs(luminance(look.stage[a]) - luminance(look.stage[b])) > 0.15


@pytest.mark.parametrize(
    ("name", "tensor"), [("q", "q"), ("s_ij", "s"), ("dq", "q"), ("dq_sum", "q"), ("acc_i", "acc")]
)
def test_a_tile_and_a_gradient_have_the_colour_of_their_tensor(name, tensor):
    assert style.LIGHT.colour_of(name) == style.TENSOR[tensor]
    assert style.DARK.colour_of(name) == style.DARK.tensor[tensor]


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
            for peer in style.PEER_LINE
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


def test_the_times_of_decoding_are_those_of_the_record_a_panel_a_batch(recorded):
    fig = plots.decode_times(recorded, "title")
    assert [ax.get_title("left") for ax in fig.axes] == ["batch 1", "batch 8"]
    for ax, B in zip(fig.axes, (1, 8), strict=True):
        cases = recorded.cases("decode", B=B)
        drawn = {c.get_label(): c.lines[0] for c in ax.containers}
        assert set(drawn) == {"decode", "flash2", "SDPA cuDNN", "SDPA flash", "copy"}
        for peer in ("decode", "flash2", "copy"):
            line = drawn[PEERS[peer]]
            assert list(line.get_xdata()) == [case["N"] for case in cases]
            assert list(line.get_ydata()) == pytest.approx(
                [1e6 * run["median_s"] for case in cases for run in case["runs"]
                 if run["peer"] == peer])  # fmt: skip


def test_bars_of_packed_texts_and_of_a_model_are_as_long_as_recorded(recorded):
    fig = plots.packed_times(recorded, 128, "title")
    assert [ax.get_title("left") for ax in fig.axes] == ["forward", "forward and backward"]
    for ax, pass_ in zip(fig.axes, ("fwd", "both"), strict=True):
        (case,) = recorded.cases("varlen", D=128, causal=True, **{"pass": pass_})
        assert [bar.get_width() for bar in ax.patches] == [run["median_s"] for run in case["runs"]]
    (case,) = recorded.cases("model", H_kv=16, **{"pass": "fwd"})
    for ax, value in zip(
        plots.model_bars(recorded, 16, "title").axes, ("median_s", "extra_bytes"), strict=True
    ):
        assert [bar.get_width() for bar in ax.patches] == [run[value] for run in case["runs"]]


@pytest.mark.parametrize("look", style.THEMES.values(), ids=style.THEMES)
def test_every_peer_has_a_grey_a_marker_and_a_line_of_its_own(look):
    assert set(style.PEER_LINE) == set(look.peer) == set(DRAWN)
    assert len({marker for marker, _ in style.PEER_LINE.values()}) == len(DRAWN)
    lines = {(look.peer[peer], dashes) for peer, (_, dashes) in style.PEER_LINE.items()}
    assert len(lines) == len(DRAWN)
    greys = sorted({luminance(grey) for grey in look.peer.values()})
    assert all(b - a > 0.05 for a, b in itertools.pairwise(greys))
