"""The players in a real browser: in a live JupyterLab, on an exported page, and on their own."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from flashedu.memory import Problem
from flashedu.memory.trace import visits
from flashedu.player import play, play_pages
from flashedu.player.film import Film, Pack
from flashedu.stages import rung
from tests.test_player_pages import SIZE, story

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tiled", "online")
P = Problem(Nq=16, D=8, block_q=8, block_k=8)
CELL = f"""\
from flashedu.memory import Problem
from flashedu.player import play, play_pages

play({", ".join(map(repr, STAGES))}, Problem(Nq=16, D=8, block_q=8, block_k=8))
"""
SENTENCE = "Run this cell to step through it."

SLIDER = "document.querySelector('[data-flashedu-player]').shadowRoot.querySelector('input')"

Page = Any  # of Playwright, which is imported where it is there


# a browser, a notebook, a server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install it")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    quiet = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
             "disable-background-networking", "disable-component-update")  # fmt: skip
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=[f"--{flag}" for flag in quiet]
        )
        yield started
        started.close()


def environment(folder: Path) -> dict[str, str]:
    """Jupyter's settings, and the notebook's own files, in a folder of the test."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "PYTEST_"))}
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
             "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")  # fmt: skip
    return {**kept, **{name: str(folder / name.lower()) for name in names}, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has `player.ipynb`, which was never run."""
    found = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL, id="player")])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "name": "python3"}
    nbformat.write(notebook, found / "player.ipynb")
    return found


@pytest.fixture(scope="module")
def exported(browser: Any, folder: Path) -> str:
    """The address of the same notebook, run and exported as a page."""
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--execute", "--log-level=ERROR"]
    ran = subprocess.run(
        [*command, "--output", "exported.html", "player.ipynb"],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return (folder / "exported.html").as_uri()


@pytest.fixture(scope="module")
def lab(browser: Any, folder: Path) -> Iterator[str]:
    """The address of the notebook in a JupyterLab of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), folder / "lab.log"
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False, "ServerApp.root_dir": folder, "ServerApp.allow_root": True,
        "IdentityProvider.token": token, "KernelManager.transport_encryption": "auto",
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(
        command, env=environment(folder), stdout=out, stderr=out
    ) as server:  # fmt: skip
        try:
            if not answers(f"{address}/api/status?token={token}", server):
                pytest.skip(f"JupyterLab did not start here: {log.read_text()[-400:]}")
            yield f"{address}/lab/tree/player.ipynb?token={token}&reset"
        finally:
            server.terminate()


def answers(address: str, server: subprocess.Popen[bytes], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(address, timeout=5) as response,
        ):
            return bool(response.status == 200)
        time.sleep(0.2)
    return False


@pytest.fixture
def new_page(browser: Any) -> Iterator[Any]:
    """Makes a page that may not reach any network; what its console says is in `page.errors`."""
    contexts = []

    def make(address: str, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on(
            "console",
            lambda m: page.errors.append(m.text)
            if m.type == "error" and "net::ERR_FAILED" not in m.text else None,
        )  # fmt: skip
        own = address.partition("/lab")[0]
        page.route(
            "**/*",
            lambda route: route.continue_()
            if route.request.url.startswith(own) else route.abort(),
        )  # fmt: skip
        page.goto(address)
        return page

    yield make
    for context in contexts:
        context.close()


# what a reader does


def at(page: Page) -> int:
    return int(page.get_by_role("slider", name="Step").input_value())


def totals(page: Page) -> list[str]:
    return list(page.locator(".total").all_inner_texts())


@functools.cache
def counted() -> list[str]:
    return [f"{film.machine.counted.hbm_bytes:,} bytes" for film in play(*STAGES, P).films]


@functools.cache
def steps() -> int:
    return max(len(film.trace) for film in play(*STAGES, P).films)


def use(page: Page) -> None:
    """Steps, drags, plays and presses keys; the bytes at the end are those that were counted."""
    slider = page.get_by_role("slider", name="Step")
    slider.wait_for()
    assert at(page) == 0
    assert totals(page) == ["0 bytes", "0 bytes"]

    page.get_by_role("button", name="One step forward").click()
    assert at(page) == 1
    assert page.locator(".now").all_inner_texts() == ["Load q, rows 0 to 7, 128 bytes."] * 2
    assert totals(page) == ["128 bytes"] * 2
    page.get_by_role("button", name="One step back").click()
    assert at(page) == 0

    box = slider.bounding_box()
    page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert abs(at(page) - steps() / 2) <= 2

    page.keyboard.press("Home")
    assert at(page) == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert at(page) == 1
    assert slider.get_attribute("aria-valuetext").startswith(f"Step 1 of {steps()}: tiled: load q")

    page.get_by_role("combobox", name="Speed").select_option("64")
    slider.focus()
    page.keyboard.press("Space")  # plays
    page.get_by_role("button", name="Pause").wait_for()
    page.wait_for_function(f"() => {SLIDER}.ariaValueText === 'playing'")  # no sentence a step
    page.wait_for_function(f"() => {SLIDER}.value > 5")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Play").wait_for()
    rests = at(page)
    page.wait_for_timeout(100)
    assert at(page) == rests > 1

    page.get_by_role("button", name="Last step").click()
    assert at(page) == steps()
    assert totals(page) == counted()
    assert "it waits, and its total stands" in page.locator(".now").last.inner_text()
    status = page.get_by_role("status").filter(has_text=f"Step {steps()} of {steps()}")
    status.wait_for(state="attached")
    assert not page.errors, page.errors


LIGHT, DARK = "rgb(255, 255, 255)", "rgb(22, 23, 26)"


def wait_for_background(page: Page, colour: str) -> None:
    """A theme is followed a moment after it changes."""
    page.wait_for_function(
        "colour => getComputedStyle(document.querySelector('[data-flashedu-player]')"
        ".shadowRoot.querySelector('.player')).backgroundColor === colour",
        arg=colour, timeout=5000,
    )  # fmt: skip


def the_still(page: Page) -> Any:
    return page.locator(".jp-OutputArea-child img")


# claims


def test_an_exported_page_plays_without_a_network(exported, new_page) -> None:
    page = new_page(exported)
    use(page)
    assert the_still(page).count() == 1
    assert not the_still(page).is_visible()
    assert page.get_by_text(SENTENCE).count() == 0 or not page.get_by_text(SENTENCE).is_visible()


def test_without_scripts_the_still_and_a_sentence_are_what_is_seen(exported, new_page) -> None:
    page = new_page(exported, java_script_enabled=False)
    still = the_still(page)
    assert still.is_visible()
    assert still.bounding_box()["width"] > 500
    assert page.get_by_text(SENTENCE).is_visible()
    output = page.locator(".jp-OutputArea").first.inner_text()
    assert "shadow" not in output
    assert "{" not in output


def test_the_page_of_a_player_is_whole_and_follows_the_readers_scheme(tmp_path, new_page) -> None:
    play(*STAGES, P).save(tmp_path / "own.html")
    page = new_page((tmp_path / "own.html").as_uri(), color_scheme="dark")
    use(page)
    wait_for_background(page, DARK)
    page.emulate_media(color_scheme="light")
    wait_for_background(page, LIGHT)


def test_a_player_that_stands_twice_on_a_page_is_built_twice(tmp_path, new_page) -> None:
    html = play("tiled", P).html
    (tmp_path / "twice.html").write_text(f"<body>{html}{html}</body>", encoding="utf-8")
    page = new_page((tmp_path / "twice.html").as_uri())
    page.get_by_role("button", name="Last step").last.click()
    assert totals(page) == ["0 bytes", counted()[0]]


def test_a_script_that_does_not_know_its_place_finds_a_player_that_is_not_built(
    tmp_path, new_page
) -> None:
    """As a page may run a copy of the scripts, later, with no current script."""
    html = play("tiled", P).html
    (tmp_path / "late.html").write_text("<body></body>", encoding="utf-8")
    page = new_page((tmp_path / "late.html").as_uri())
    page.evaluate(
        """html => {
          document.body.innerHTML = html;
          for (const script of document.scripts) new Function(script.textContent)();
        }""",
        html + html,
    )
    assert page.locator(".player").count() == 2
    assert not page.errors, page.errors


def test_keys_reach_the_player_only_while_the_focus_is_in_it(tmp_path, new_page) -> None:
    html = f"<body><input id=other>{play('tiled', P).html}</body>"
    (tmp_path / "keys.html").write_text(html, encoding="utf-8")
    page = new_page((tmp_path / "keys.html").as_uri())
    page.locator("#other").fill("ab")
    page.keyboard.press("End")
    page.keyboard.press("Space")
    assert page.locator("#other").input_value() == "ab "
    assert at(page) == 0
    page.get_by_role("button", name="One step forward").focus()
    page.keyboard.press("Space")  # what a button does with it
    assert at(page) == 1
    page.keyboard.press("Enter")
    assert at(page) == 2
    page.keyboard.press("Control+End")
    assert at(page) == 2


# what is drawn at each step, as one reads it off the trace


DRAWN = """step => {
  const root = document.querySelector('[data-flashedu-player]').shadowRoot;
  const slider = root.querySelector('input');
  slider.value = step;
  slider.dispatchEvent(new Event('input'));
  const all = (selector) => [...root.querySelectorAll(selector)];
  const memories = root.querySelector('.column svg');
  const texts = [...memories.querySelectorAll('text')].map((e) => e.textContent);
  return {
    moved: texts.filter((text) => /^[↓↑] /.test(text)),
    tiles: [...memories.querySelectorAll('rect[data-moves]:not(.moves)')].map((e) =>
      e.matches('.empty') ? 'empty' : e.matches('.rest') ? 'rest' : 'bright'),
    moving: memories.querySelectorAll('.moves').length,
    holds: texts.find((text) => text.startsWith('holds')) || '',
    chip: texts,
    computed: all('.grid .beside > svg > .cell').map((e) => e.matches('.computed')).slice(0, -1),
    hatched: all('.grid [fill="url(#hatch-grid)"]').map((e) =>
      e.getAttribute('visibility') === 'visible'),
    outline: all('.grid .computing').filter((e) =>
      e.getAttribute('visibility') === 'visible' && e.closest('.beside > svg')).length,
    numbers: all('.numbers tbody tr').map((row) => [...row.children].map((e) => e.textContent)),
    line: all('pre .on i').map((e) => e.textContent),
  };
}"""


def drawn(film: Film, packed: Pack, step: int) -> dict[str, Any]:
    """What a page must show just after that event; a head's tiles, and all heads' bytes."""
    trace, p, event = film.trace[: step + 1], film.problem, film.trace[step]
    programs, tensors = packed["program"] or [0] * len(film.trace), packed["tensors"]
    a_head = max(packed["n_programs"] // (p.B * p.H), 1)
    of_head = [e for e, n in zip(trace, programs, strict=False)
               if n // a_head == programs[step] // a_head]  # fmt: skip
    live = packed["lives"][packed["live"][step]]
    moved, tiles, moving = [], [], 0
    for tensor in tensors:
        name = tensor["name"]
        for op, sign in (("load", "↓"), ("store", "↑")):
            n = sum(e.hbm_bytes for e in trace if (e.op, e.tensor) == (op, name))
            moved += [f"{sign} {n:,}"] if n else []
        n, block = (p.Nk, p.block_k) if name in ("k", "v") else (p.Nq, p.block_q)
        for start in range(0, n, block):
            stop = min(start + block, n)
            here = [e for e in of_head if e.tensor == name and e.start < stop and e.stop > start]
            moves = event.op != "hold" and bool(here) and here[-1] is event
            moving += moves
            loads = [e for e in of_head if (e.op, e.tensor) == ("load", name)]
            held = any(tile[0] == name for tile in live) and bool(loads) and loads[-1] in here
            full = tensor["input"] or any(e.op == "store" for e in here)
            tiles.append(("bright" if held or moves else "rest") if full else "empty")
    found = visits(of_head)
    grid = [(i, j) for i in range(0, p.Nq, p.block_q) for j in range(0, p.Nk, p.block_k)]
    ever = {visit[:2] for visit in visits(film.trace)}
    cut = [(i, j) for i, j in grid
           if p.causal and min(j + p.block_k, p.Nk) - 1 > i + p.Nk - p.Nq]  # fmt: skip
    now = {visit[:2] for visit in found}
    return {
        "moved": moved,
        "tiles": tiles,
        "moving": moving,
        "computed": [tile in now for tile in grid],
        "hatched": [tile in now for tile in cut if tile in ever],
        "outline": packed["now"][step],
        "line": [str(event.line)],
    }


@pytest.mark.parametrize(
    ("stage", "p"),
    [
        ("naive", Problem(B=2, Nq=5, Nk=9, D=8)),
        ("tiled", Problem(Nq=20, Nk=13, D=8, block_q=8, block_k=4, causal=True)),
        ("online", Problem(B=2, H=2, H_kv=1, Nq=17, Nk=24, D=8, block_q=8, block_k=8, causal=True)),
        ("flash1", Problem(H=2, Nq=33, Nk=20, D=8, block_q=16, block_k=16, causal=True)),
        ("flash2", Problem(B=2, H=2, H_kv=1, Nq=33, Nk=40, D=8, block_q=16, block_k=16,
                           causal=True)),
    ],
)  # fmt: skip
def test_each_step_is_drawn_as_the_trace_has_it(stage, p, tmp_path, new_page) -> None:
    if rung(stage).missing():
        pytest.skip(rung(stage).missing())
    player = play(stage, p)
    (film,), (packed,) = player.films, player.packs
    player.save(tmp_path / "steps.html")
    page = new_page((tmp_path / "steps.html").as_uri())
    for step, event in enumerate(film.trace):
        got = page.evaluate(DRAWN, step + 1)
        expected = drawn(film, packed, step)
        assert {name: got[name] for name in expected} == expected, f"step {step + 1}: {event}"
        if not rung(stage).is_triton:
            assert got["holds"].startswith(f"holds {event.sram_bytes:,} byte")
        for name, n, *cols in packed["lives"][packed["live"][step]]:
            at = got["chip"].index(name, got["chip"].index("SRAM of one program (small, fast)"))
            size = f"{n} × {cols[0]}" if cols else f"{n} row{'s' if n > 1 else ''}"
            assert size in got["chip"][at:], f"step {step + 1}: {name}"
        if film.state and film.state[step]:
            q = [e for e in film.trace[: step + 1] if (e.op, e.tensor) == ("load", "q")][-1]
            values = packed["states"][packed["state"][step]]
            columns = [packed["numbers"][n].split("|") for n in values.values()]
            for row in range(min(q.stop - q.start, 8)):
                cells = [cell for column in columns for cell in column[row].split(" ")]
                assert got["numbers"][row][0] == str(q.start + row)
                assert [x for x in got["numbers"][row][1:] if x != "·"] == cells
    assert not page.errors, page.errors


@pytest.mark.parametrize("p", [Problem(Nq=1, Nk=99, D=8), Problem(Nq=99, Nk=1, D=8)])
def test_no_tile_of_the_scores_is_a_mere_line(p, tmp_path, new_page) -> None:
    play("online", p.replace(block_q=16, block_k=16)).save(tmp_path / "thin.html")
    page = new_page((tmp_path / "thin.html").as_uri())
    for cell in page.locator(".grid .beside > svg > .cell").all()[:-2]:  # the last tile is a rest
        assert min(float(cell.get_attribute(side)) for side in ("width", "height")) > 8


def test_a_player_that_is_taken_away_while_it_plays_stops(tmp_path, new_page) -> None:
    (tmp_path / "stops.html").write_text(f"<body>{play('tiled', P).html}", encoding="utf-8")
    page = new_page((tmp_path / "stops.html").as_uri())
    page.evaluate(
        """() => {
          const set = window.setInterval;
          window.ticks = 0;
          window.setInterval = (f, ms) => set(() => { window.ticks += 1; f(); }, ms);
        }"""
    )
    page.get_by_role("combobox", name="Speed").select_option("16")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("window.ticks > 1")
    page.evaluate("document.querySelector('[data-flashedu-player]').remove()")
    page.wait_for_timeout(200)
    ticks = page.evaluate("window.ticks")
    page.wait_for_timeout(300)
    assert page.evaluate("window.ticks") == ticks < steps()


def test_it_speaks_when_it_was_stepped_and_rests(tmp_path, new_page) -> None:
    """Not as the page is read, which may have ten players, and not while it plays."""
    play("tiled", P).save(tmp_path / "speaks.html")
    page = new_page((tmp_path / "speaks.html").as_uri())
    page.wait_for_timeout(400)
    page.get_by_role("combobox", name="Speed").select_option("1")
    page.get_by_role("slider", name="Step").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.wait_for_timeout(400)
    assert page.locator("[role=status]").text_content() == ""
    page.keyboard.press("Space")
    page.wait_for_function(
        "document.querySelector('[data-flashedu-player]').shadowRoot"
        ".querySelector('[role=status]').textContent.startsWith('Step 1 of')"
    )


def test_what_the_list_and_the_source_do_with_a_key_is_kept_from_the_page(
    tmp_path, new_page
) -> None:
    """In JupyterLab, 6 makes a heading of the cell, and ArrowDown goes to the next one."""
    (tmp_path / "kept.html").write_text(f"<body>{play('tiled', P).html}", encoding="utf-8")
    page = new_page((tmp_path / "kept.html").as_uri())
    page.evaluate("document.addEventListener('keydown', e => document.title += e.key, true)")
    page.get_by_role("combobox", name="Speed").focus()
    page.keyboard.press("6")
    assert page.get_by_role("combobox", name="Speed").input_value() == "64"
    page.get_by_role("region", name="source of forward").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("PageDown")
    assert page.title() == ""
    assert at(page) == 0
    page.wait_for_function(
        "document.querySelector('[data-flashedu-player]').shadowRoot.querySelector('pre').scrollTop"
    )


def test_a_player_that_is_taken_away_with_the_focus_in_it_takes_no_more_keys(
    tmp_path, new_page
) -> None:
    """Its cell ran again. Not all browsers tell that the focus left what is gone."""
    html = f"<body><input id=other>{play('tiled', P).html}</body>"
    (tmp_path / "gone.html").write_text(html, encoding="utf-8")
    page = new_page((tmp_path / "gone.html").as_uri())
    page.evaluate("window.addEventListener('focusout', e => e.stopImmediatePropagation(), true)")
    page.get_by_role("slider", name="Step").focus()
    page.keyboard.press("ArrowRight")
    assert at(page) == 1
    page.evaluate("document.querySelector('[data-flashedu-player]').remove()")
    page.locator("#other").focus()
    page.keyboard.type("a b")
    page.keyboard.press("Home")
    page.keyboard.type("c")
    assert page.locator("#other").input_value() == "ca b"
    assert not page.errors, page.errors


# the page player


DRAWN_PAGES = """step => {
  const root = document.querySelector('[data-flashedu-player]').shadowRoot;
  const slider = root.querySelector('input');
  slider.value = step;
  slider.dispatchEvent(new Event('input'));
  const all = (from, selector) => [...from.querySelectorAll(selector)];
  return {
    pages: all(root, '[data-page]').map((page) => ({
      users: page.querySelector('.users').textContent,
      keys: all(page, '.key').length, idle: all(page, '.idle').length,
      free: page.querySelector('.page').matches('.free'),
      touched: page.querySelector('.page').matches('.touched'),
    })),
    copies: all(root, '.arrow').length,
    places: all(root, '[data-place]').map((row) => row.querySelector('text').textContent),
    table: all(root, '.table tr').map((row) => [...row.children].map((e) => e.textContent)),
    counts: all(root, '.counts tbody tr').map((row) =>
      [...row.querySelectorAll('td')].map((e) => Number(e.textContent))),
    now: root.querySelector('.now').textContent,
  };
}"""


def test_each_step_of_the_pages_is_drawn_as_the_allocator_had_it(tmp_path, new_page) -> None:
    cache, longest = story(), 24
    play_pages(cache, longest=longest).save(tmp_path / "pages.html")
    page = new_page((tmp_path / "pages.html").as_uri())
    for step, moment in enumerate(cache.moments):
        got = page.evaluate(DRAWN_PAGES, step)
        for number, drawn in enumerate(got["pages"]):
            users = [name for name, (_, pages) in moment.living.items() if number in pages]
            seen = [min(SIZE, n - SIZE * pages.index(number))
                    for n, pages in moment.living.values() if number in pages]  # fmt: skip
            assert drawn == {
                "users": " ".join(users), "keys": sum(seen),
                "idle": SIZE - max(seen) if users else 0, "free": not users,
                "touched": number in moment.touched,
            }, f"step {step}, page {number}"  # fmt: skip
        assert got["copies"] == (moment.copied is not None)
        assert sorted(got["places"]) == sorted(moment.living)
        assert got["table"] == [
            [f"{name}, {n} key{'s' if n != 1 else ''}", *map(str, pages)]
            for name, (n, pages) in moment.living.items()
        ]
        taken = {page for _, pages in moment.living.values() for page in pages}
        (held, idle, free, over), (keys, room, rest, beyond) = got["counts"]
        assert held + idle == SIZE * len(taken)
        assert (free, over) == (SIZE * (12 - len(taken)), 0)
        assert keys == sum(n for n, _ in moment.living.values())
        assert keys + room == longest * len(moment.living)
        assert rest - beyond == 12 * SIZE - keys - room
        assert got["now"] == f"{moment.text[0].upper()}{moment.text[1:]}."
    assert not page.errors, page.errors


def test_the_page_player_has_the_controls_and_themes_of_the_tile_player(tmp_path, new_page) -> None:
    cache = story()
    play_pages(cache, longest=24).save(tmp_path / "pages.html")
    page = new_page((tmp_path / "pages.html").as_uri(), color_scheme="dark")
    wait_for_background(page, DARK)
    page.get_by_role("button", name="One step forward").click()
    assert at(page) == 1
    page.keyboard.press("End")
    assert at(page) == len(cache.moments) - 1
    said = page.get_by_role("status").filter(has_text="Step 10 of 10: C is freed; pages 3, 4")
    said.wait_for(state="attached")
    assert not page.errors, page.errors


def test_a_live_jupyterlab_plays_it(lab, new_page) -> None:
    page = new_page(lab)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=40_000)
    page.get_by_text("| Idle").first.wait_for(timeout=40_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.get_by_role("slider", name="Step").wait_for(timeout=40_000)
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    page.get_by_role("button", name="One step forward").focus()
    page.keyboard.press("Enter")  # in JupyterLab: edit the cell
    assert at(page) == 1
    page.get_by_role("slider", name="Step").focus()
    page.keyboard.press("ArrowDown")  # in JupyterLab: go to the next cell
    assert at(page) == 0
    assert page.evaluate("document.activeElement.matches('[data-flashedu-player]')")
    use(page)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells  # no shortcut of JupyterLab's ran
    page.wait_for_timeout(200)
    assert not the_still(page).is_visible()
    wait_for_background(page, LIGHT)
    page.evaluate("document.body.setAttribute('data-jp-theme-light', 'false')")
    wait_for_background(page, DARK)
