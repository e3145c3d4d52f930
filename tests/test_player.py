"""What the tile player shows is the run: its events, bytes, tiles, numbers and lines."""

from __future__ import annotations

import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from flashedu.memory import Problem
from flashedu.memory.trace import visits
from flashedu.player import MAX_BYTES, MAX_SCORES, Player, film, page, play
from flashedu.player.film import Film, pack, record
from flashedu.player.still import storyboard
from flashedu.plots.style import LIGHT
from flashedu.stages import LADDER, Rung, reference, rung
from flashedu.testing import draw

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")

SMALL = Problem(Nq=64, D=16, block_q=8, block_k=8)
PROBLEMS = {
    "square": Problem(Nq=32, D=16, block_q=16, block_k=16),
    "causal": Problem(Nq=48, D=16, block_q=16, block_k=16, causal=True),
    "ragged": Problem(Nq=20, Nk=37, D=13, block_q=16, block_k=16, causal=True),
    "more queries than keys": Problem(Nq=50, Nk=20, D=8, block_q=16, block_k=16, causal=True),
    "heads": Problem(B=2, H=4, H_kv=2, Nq=40, Nk=50, D=16, block_q=16, block_k=32),
}
RUNGS = [r for r in LADDER if r.missing() is None]
every_rung = pytest.mark.parametrize("stage", RUNGS, ids=[r.name for r in RUNGS])
every_problem = pytest.mark.parametrize("p", PROBLEMS.values(), ids=PROBLEMS)
with_numbers = pytest.mark.parametrize("name", ["tiled", "online"])


@functools.cache
def shoot(stage: str, p: Problem) -> Film:
    return record(stage, p)


def sent(found: Film) -> dict:
    """What the page gets: after the way through JSON."""
    return json.loads(json.dumps(pack(found)))


# the film


@every_rung
@every_problem
def test_the_film_is_the_trace(stage: Rung, p: Problem) -> None:
    shot = shoot(stage.name, p)
    packed = sent(shot)
    moves = [packed["moves"][number] for number in packed["events"]]
    assert [(*move[:6], packed["kernels"][move[6]]) for move in moves] == [
        (e.op, e.tensor, e.start, e.stop, e.hbm_bytes, e.line, e.kernel) for e in shot.trace
    ]
    by_op = Counter()
    for op, _, _, _, n_bytes, *_ in moves:
        by_op[op] += n_bytes
    counted = shot.machine.counted
    assert by_op["load"] == counted.hbm_read_bytes
    assert by_op["store"] == counted.hbm_write_bytes


@every_rung
@every_problem
def test_the_tiles_on_chip_are_those_of_the_machine(stage: Rung, p: Problem) -> None:
    shot = shoot(stage.name, p)
    packed = sent(shot)
    live = [packed["lives"][number] for number in packed["live"]]
    if not stage.is_triton:
        assert [sum(tile[3] for tile in tiles) for tiles in live] == [
            event.sram_bytes for event in shot.trace
        ]
        assert max(map(len, live)) > 1
        return
    rows: dict[tuple[int, str], tuple[int, int]] = {}  # that a program loaded last
    for event, tiles in zip(shot.trace, live, strict=True):
        if event.op == "load":
            rows[event.step, event.tensor] = event.start, event.stop
        shown = dict(tiles)  # a name and rows; no bytes are known
        assert all(stop - start == shown[name] for (at, name), (start, stop) in rows.items()
                   if at == event.step and name in shown)  # fmt: skip
        if event.op == "load":
            assert event.tensor in shown
        loaded = [{rows[event.step, name] for name in shown if (name in ("k", "v")) == keys}
                  for keys in (False, True)]  # fmt: skip
        assert max(map(len, loaded)) <= 1  # one tile of queries, one of keys
    assert max(map(len, live)) > (5 if stage.name == "flash1" else 2)


@every_rung
@every_problem
def test_each_array_in_hbm_is_as_large_as_what_moves(stage: Rung, p: Problem) -> None:
    shot = shoot(stage.name, p)
    packed = sent(shot)
    moved = shot.machine.bytes_by_tensor()
    assert {tensor["name"] for tensor in packed["tensors"]} == set(moved)
    for tensor in packed["tensors"]:
        name = tensor["name"]
        assert max(e.stop for e in shot.trace if e.tensor == name) == tensor["rows"] or (
            p.causal and name in ("k", "v")
        )
        row = {e.hbm_bytes / (e.stop - e.start) for e in shot.trace if e.tensor == name}
        heads = 1 if stage.is_triton else p.B * p.H
        item = 4 if name in ("o_f32", "m", "l", "lse") else 2
        assert row == {heads * tensor["cols"] * item}
        assert tensor["input"] == (name in ("q", "k", "v"))
        assert tensor["colour"] == LIGHT.colour_of(name)
        block = shot.problem.block_k if name in ("k", "v") else shot.problem.block_q
        assert tensor["block"] == block
    assert packed["s_colour"] == LIGHT.tensor["s"]


@every_rung
@every_problem
def test_the_line_that_is_shown_is_the_line_that_ran(stage: Rung, p: Problem) -> None:
    shot = shoot(stage.name, p)
    source = sent(shot)["source"]
    assert "\n".join(source["lines"]) in inspect.getsource(stage.load())
    for event in shot.trace:
        assert f".{event.op}(" in source["lines"][event.line - source["first"]]


@every_rung
@every_problem
def test_the_tiles_computed_are_those_that_a_query_sees(stage: Rung, p: Problem) -> None:
    shot = shoot(stage.name, p)
    q, packed = shot.problem, sent(shot)
    heads = q.B * q.H if stage.is_triton else 1
    times = 3 if stage.name == "tiled" else 1
    tiles = itertools.product(range(0, q.Nq, q.block_q), range(0, q.Nk, q.block_k))
    seen = {
        (i, j) for i, j in tiles
        if not q.causal or stage.name == "naive" or j <= min(i + q.block_q, q.Nq) - 1 + q.Nk - q.Nq
    }  # fmt: skip
    got = Counter(map(tuple, packed["visits"]))
    assert set(got) == seen
    assert set(got.values()) == {times * heads}


@every_rung
@every_problem
def test_a_tile_of_the_scores_is_computed_until_the_next_one_or_the_result(
    stage: Rung, p: Problem
) -> None:
    packed = sent(shoot(stage.name, p))
    begun, now = [0, *packed["visit"]], [0, *packed["now"]]
    moves = [packed["moves"][number] for number in packed["events"]]
    for before, at, computing, (op, tensor, start, *_) in zip(
        begun, begun[1:], now[1:], moves, strict=False
    ):
        assert at - before in (0, 1)
        if at > before:
            assert (op, computing) == ("load", 1)
        elsewhere = tensor not in ("k", "v", "s", "p") and op != "hold" and at and (
            start != packed["visits"][at - 1][0]
        )  # fmt: skip
        if tensor in ("o", "lse") or elsewhere:
            assert not computing
    assert begun[-1] == len(packed["visits"])


@every_problem
def test_the_program_that_is_shown_is_the_one_that_moves(p: Problem) -> None:
    if rung("flash2").missing():
        pytest.skip(rung("flash2").missing())
    packed = sent(shoot("flash2", p))
    moves = [packed["moves"][number] for number in packed["events"]]
    tiles = math.ceil(p.Nq / p.block_q)
    assert packed["n_programs"] == p.B * p.H * tiles == packed["program"][-1] + 1
    for (_, tensor, start, *_), program in zip(moves, packed["program"], strict=True):
        if tensor == "q":
            tile = tiles - 1 - start // p.block_q if p.causal else start // p.block_q
            assert program % tiles == tile


def shown(packed: dict, at: int) -> dict[str, np.ndarray]:
    """The numbers beside an event."""
    state = packed["states"][packed["state"][at]]
    return {
        name: np.array([
            [float(x.replace("−", "-").replace("∞", "inf").replace("lowest", "-inf")) for x in row]
            for row in (line.split(" ") for line in packed["numbers"][number].split("|"))
        ])
        for name, number in state.items()
    }  # fmt: skip


@with_numbers
@every_problem
def test_the_numbers_beside_a_stored_tile_are_exact_to_three_digits(name: str, p: Problem) -> None:
    shot = shoot(name, p)
    packed = sent(shot)
    q, k, v, _ = draw(p, framework="torch")
    exact = reference.attention(q, k, v, causal=p.causal, scale=p.D**-0.5)
    stores = [
        at for at, event in enumerate(shot.trace) if (event.op, event.tensor) == ("store", "o")
    ]
    assert stores
    for at in stores:
        start = shot.trace[at].start
        rows = slice(start, min(start + film.STATE_ROWS, shot.trace[at].stop))
        numbers = shown(packed, at)
        m, l = numbers["m_i"][:, 0], numbers["l_i"][:, 0]
        lse, o = exact.lse[0, 0, rows].numpy(), exact.o[0, 0, rows, : film.STATE_COLUMNS].numpy()
        some = np.isfinite(lse)
        assert np.isneginf(m[~some]).all()
        np.testing.assert_allclose(m[some] + np.log(l[some]), lse[some], atol=0.02)
        got = numbers["o_i"] if name == "tiled" else numbers["acc_i"] / np.where(l, l, 1)[:, None]
        np.testing.assert_allclose(got, o, rtol=0.011, atol=1e-9)


@with_numbers
def test_the_numbers_grow_with_the_tiles(name: str) -> None:
    """Of each query tile: m rises, and only tiles that are on chip have numbers."""
    shot = shoot(name, SMALL)
    packed = sent(shot)
    highest = np.full((8, 1), -np.inf)
    for at, event in enumerate(shot.trace):
        numbers = shown(packed, at)
        assert set(numbers) == {name for name, _ in event.live} & set(film.STATE)
        if event.tensor == "q":
            highest = np.full((8, 1), -np.inf)
        elif "m_i" in numbers:
            assert (numbers["m_i"] >= highest).all()
            highest = numbers["m_i"]


@with_numbers
def test_the_numbers_do_not_depend_on_the_dtype_that_is_counted(name: str) -> None:
    """They are of the same inputs: float16 ones, in float64."""
    half = record(name, SMALL.replace(Nq=16))
    double = record(name, SMALL.replace(Nq=16, dtype="float64"))
    assert half.machine.counted != double.machine.counted
    assert half.state != double.state  # whose inputs were not rounded
    for a, b in zip(half.state, double.state, strict=True):
        for tile in a:
            np.testing.assert_allclose(a[tile], b[tile], atol=0.02)


# the page


def test_a_player_is_small_and_quick() -> None:
    for stages in (("tiled",), ("online",), ("tiled", "online")):
        play(*stages, SMALL)
        start = time.perf_counter()
        html = play(*stages, SMALL).html
        assert time.perf_counter() - start < 1
        assert len(html.encode()) < MAX_BYTES


def test_two_builds_are_the_same_bytes_also_in_another_process() -> None:
    program = (
        "import hashlib\nfrom flashedu.memory import Problem\nfrom flashedu.player import play\n"
        f"html = play('tiled', 'online', {SMALL!r}).html\n"
        "print(hashlib.sha256(html.encode()).hexdigest())"
    )
    hashes = set()
    for seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent.parent, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        hashes.add(ran.stdout)
    assert len(hashes) == 1


def name_of(player: Player) -> str:
    (name,) = set(re.findall(r'data-flashedu-player="(\w+)"', player.html))
    return name


def test_the_name_of_a_player_follows_its_content() -> None:
    assert name_of(play("tiled", SMALL)) == name_of(play(["tiled"], SMALL))
    others = [play("tiled", SMALL, seed=1), play("online", SMALL), play("tiled", "online", SMALL),
              play("tiled", SMALL.replace(causal=True))]  # fmt: skip
    assert len({name_of(player) for player in (play("tiled", SMALL), *others)}) == 5


def test_without_its_script_the_page_is_one_sentence() -> None:
    html = play("tiled", SMALL).html
    assert html.count("<script>") == html.count("</script>") == 1
    rest = re.sub(r"<script>.*</script>", "", html, flags=re.DOTALL)
    assert re.fullmatch(
        r'<div data-flashedu-player="\w+"><p>Run this cell to step through it\.</p></div>\s*', rest
    )


def test_no_text_of_a_run_can_end_the_script() -> None:
    packed = pack(shoot("tiled", SMALL))
    html = page.fragment([{**packed, "idea": "</script><b>\u2028"}])
    assert html.count("</script>") == 1
    assert "\u2028" not in html


def test_a_cell_shows_the_still_and_then_the_player() -> None:
    player = play("tiled", SMALL)
    with mock.patch("IPython.display.display") as display:
        player._ipython_display_()
    (first, second) = (call.args[0] for call in display.call_args_list)
    assert list(first) == ["image/png", "text/plain"]
    assert second == {"text/html": player.html, "text/plain": repr(player)}
    assert repr(player) == "Tile player: tiled, 488 steps, 69,632 bytes"


@every_rung
@pytest.mark.parametrize("size", ["causal", "ragged", "heads"])
def test_the_still_tells_what_was_counted(stage: Rung, size: str) -> None:
    shot = shoot(stage.name, PROBLEMS[size])
    (board,) = storyboard([shot]).subfigs
    texts = [text.get_text() for ax in board.axes for text in ax.texts]
    counted = shot.machine.counted
    assert any(text.startswith(f"moved in all: {counted.hbm_bytes:,} bytes") for text in texts)
    scores, totals = board.axes[3], board.axes[4]
    assert sum(bar.get_width() for bar in totals.patches) == counted.hbm_bytes
    hatched = sum(bar.get_width() for bar in totals.patches if bar.get_hatch())
    assert hatched == counted.hbm_write_bytes
    computed = [tile for tile in scores.patches if to_rgb(tile.get_facecolor()) != (1, 1, 1)]
    assert len(computed) == len({visit[:2] for visit in visits(shot.trace)})


@every_rung
@pytest.mark.parametrize("size", ["causal", "ragged", "heads"])
def test_the_moments_of_the_still_are_of_one_head_and_as_the_trace_has_them(
    stage: Rung, size: str
) -> None:
    shot = shoot(stage.name, PROBLEMS[size])
    packed, trace, p = sent(shot), shot.trace, shot.problem
    (board,) = storyboard([shot]).subfigs
    titles = [ax.get_title().replace(",", "") for ax in board.axes[:3]]
    at = [int(re.match(r"step (\d+): ", title)[1]) - 1 for title in titles]
    moves = [n for n, event in enumerate(trace) if event.op != "hold"]
    assert (at[0], at[2]) == (visits(trace)[0].at, moves[-1])
    full = [(trace[n].sram_bytes or len(packed["lives"][packed["live"][n]]), trace[n].hbm_bytes)
            for n in moves]  # fmt: skip
    large = [n for n, size in zip(moves, full, strict=True) if size == max(full)]
    assert abs(sum(n < at[1] for n in large) - sum(n > at[1] for n in large)) <= 1
    programs = packed["program"] or [0] * len(trace)
    a_head = max(packed["n_programs"] // (p.B * p.H), 1)
    for ax, n in zip(board.axes, at, strict=False):
        before = zip(trace[: n + 1], programs, strict=False)
        stored = {
            (event.tensor, event.start) for event, program in before
            if event.op == "store" and program // a_head == programs[n] // a_head
        }  # fmt: skip
        assert sum(patch.get_hatch() == "////" for patch in ax.patches) == len(stored)


@every_rung
@pytest.mark.parametrize("size", ["causal", "ragged", "heads"])
def test_the_scores_of_the_still_are_those_of_one_head(stage: Rung, size: str) -> None:
    shot = shoot(stage.name, PROBLEMS[size])
    p = shot.problem
    scores = storyboard([shot]).subfigs[0].axes[3]
    tiles = {visit[:2] for visit in visits(shot.trace)}
    cut = [(i, j) for i, j in tiles if p.causal and min(j + p.block_k, p.Nk) - 1 > i + p.Nk - p.Nq]
    masked = [tile for tile in scores.patches
              if to_rgb(tile.get_facecolor()) == to_rgb(LIGHT.masked)]  # fmt: skip
    assert len(masked) == len(cut)
    texts = sorted(text.get_text() for text in scores.texts)
    if stage.name == "tiled":
        assert set(texts) == {"3×"}
    elif stage.name != "naive":
        assert texts == sorted(str(n) for n in range(1, len(tiles) + 1))


def test_a_row_that_has_seen_no_key_has_the_lowest_maximum() -> None:
    packed = sent(shoot("online", PROBLEMS["more queries than keys"]))
    first = packed["states"][packed["state"][-1]]
    assert any("lowest" in text for text in packed["numbers"])
    assert "lowest" not in packed["numbers"][first["m_i"]]


def test_the_still_is_a_wide_picture() -> None:
    picture = imread(io.BytesIO(play("tiled", "online", SMALL).still))
    assert picture.shape[1] > 900
    assert 0.5 < picture[..., :3].mean() < 0.99


def test_a_page_holds_the_player_and_the_still(tmp_path: Path) -> None:
    player = play("tiled", "online", SMALL)
    player.save(tmp_path / "player.html")
    text = (tmp_path / "player.html").read_text(encoding="utf-8")
    assert player.html in text
    assert "<noscript><img" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


# what cannot be played


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiled",), r"problem must be a flashedu\.memory\.Problem and come last, .* got 'tiled'"),
        ((), "problem must be a flashedu.memory.Problem"),
        ((3, SMALL), "stages must be names, as 'tiled', got 3"),
    ],
)
def test_an_argument_of_another_kind_gets_a_sentence(arguments: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        play(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flash9", SMALL), "stage must be one of naive, tiled, .*, got 'flash9'"),
        (("decode", SMALL), "stages must be of the ladder .*, got 'decode'"),
        ((SMALL,), "stages must be one or two, got 0"),
        ((["tiled"] * 3, SMALL), "stages must be one or two, got 3"),
        (("flash2", SMALL), "stage 'flash2' takes a block_q of 16, .*, got 8"),
        (("tiled", SMALL.replace(dtype="bfloat16")), "has no bfloat16"),
        (("tiled", SMALL.replace(Nk=0)), "problem must have a Nk of 1 or more to be played, got 0"),
        (("tiled", SMALL.replace(B=0)), "problem must have a B of 1 or more"),
        (
            ("flash2", Problem(B=64, H=16, Nq=16, D=16, block_q=16, block_k=16)),
            "got B=64, H=16: with one query and key, too; fewer heads would do",
        ),
    ],
)
def test_a_run_that_cannot_be_played_gets_a_sentence(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        play(*arguments)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", None])
def test_a_seed_that_draws_no_inputs_gets_a_sentence(seed: object) -> None:
    with pytest.raises(ValueError, match=f"seed must be an integer of 0 or more, got {seed!r}"):
        play("tiled", SMALL, seed=seed)


def test_a_stage_that_cannot_run_here_says_why() -> None:
    with (
        mock.patch.object(Rung, "missing", lambda self: f"stage '{self.name}' needs a moon"),
        pytest.raises(RuntimeError, match="stage 'tiled' needs a moon"),
    ):
        play("tiled", SMALL)


@pytest.mark.parametrize("n", [256, 100_000])
def test_a_run_that_is_too_long_gets_sizes_that_would_do(n: int) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="problem must be small enough for 150,000 bytes") as error:
        play("tiled", "online", SMALL.replace(Nq=n, Nk=2 * n))
    assert time.process_time() - start < 5
    Nq, Nk = map(int, re.findall(r"Nq=(\d+), Nk=(\d+) would do", str(error.value))[0])
    assert 1 < Nq < n
    assert len(play("tiled", "online", SMALL.replace(Nq=Nq, Nk=Nk)).html.encode()) <= MAX_BYTES


@pytest.mark.parametrize(
    ("stage", "p"),
    [
        ("naive", Problem(Nq=100_000, D=8)),
        ("tiled", Problem(Nq=30_000, D=8, block_q=30_000, block_k=30_000)),
        ("online", Problem(B=64, H=64, Nq=4096, D=8, block_q=1024, block_k=1024)),
    ],
)
def test_a_run_of_too_many_scores_is_not_begun(stage: str, p: Problem) -> None:
    with (
        mock.patch("flashedu.player.record", return_value=shoot("tiled", SMALL)),
        pytest.raises(ValueError, match="problem must be small enough") as error,
    ):
        play(stage, p)
    Nq, Nk = map(int, re.findall(r"Nq=(\d+), Nk=(\d+) would do", str(error.value))[0])
    assert MAX_SCORES / 4 < p.B * p.H * Nq * Nk <= MAX_SCORES


def test_heads_that_run_side_by_side_make_no_player_too_long() -> None:
    """A stage that traces all heads at once has as many events for 1024 as for one."""
    one, many = play("tiled", SMALL.replace(Nq=16)), play("tiled", SMALL.replace(B=64, H=16, Nq=16))
    assert len(one.films[0].trace) == len(many.films[0].trace)
