"""What the page player shows is what the allocator did: its pages, its tables, its free ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from flashedu.pages import OutOfPages, PageAllocator, idle_in_contiguous, table
from flashedu.player import PagePlayer, RecordedAllocator, play, play_pages
from flashedu.player.page import MAX_BYTES
from flashedu.player.pages import pack
from flashedu.player.pages_still import moments

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")

SIZE = 4


def story() -> RecordedAllocator:
    """A prompt that two answers share, a long sequence, one that finds no room, two that end."""
    cache = RecordedAllocator(12, SIZE)
    first = cache.new()
    cache.take(first, 6)
    second = cache.share(first)
    cache.take(second, 1)  # copies
    cache.take(first, 1)
    third = cache.new()
    cache.take(third, 17)
    with contextlib.suppress(OutOfPages):
        cache.take(second, 30)
    cache.free(first)
    cache.free(third)
    return cache


def at_random(seed: int, calls: int = 80) -> tuple[RecordedAllocator, list[tuple]]:
    """A recorded allocator, and after each call what a plain one says that was called alike."""
    rng = random.Random(seed)
    cache, plain = RecordedAllocator(10, SIZE), PageAllocator(10, SIZE)
    living: list[tuple] = []
    states = [([], [], 10)]
    for _ in range(calls):
        deed, n = rng.choice(["new", "take", "take", "take", "share", "free"]), rng.randrange(9)
        ours, theirs = rng.choice(living) if living else (None, None)
        if deed == "new" or ours is None:
            living.append((cache.new(), plain.new()))
        elif deed == "take":
            with contextlib.suppress(OutOfPages):
                assert cache.take(ours, n) == plain.take(theirs, n)
                assert ours.pages == theirs.pages
        elif deed == "share":
            n = min(n, ours.length)
            living.append((cache.share(ours, n), plain.share(theirs, n)))
        else:
            cache.free(ours)
            plain.free(theirs)
            living.remove((ours, theirs))
        sequences = [theirs for _, theirs in living]
        states.append(([tuple(s.pages) for s in sequences], [s.length for s in sequences],
                       plain.free_pages))  # fmt: skip
    return cache, states


@pytest.mark.parametrize("seed", range(5))
def test_every_step_is_the_state_of_the_allocator(seed: int) -> None:
    cache, states = at_random(seed)
    packed = json.loads(json.dumps(pack(cache, 40)))
    assert len(packed["moments"]) == len(states)
    for moment, (pages, lengths, free) in zip(packed["moments"], states, strict=True):
        assert [tuple(one[2]) for one in moment["sequences"]] == pages
        assert [one[1] for one in moment["sequences"]] == lengths
        held, idle, unused = moment["in_pages"]
        assert unused == free * SIZE
        assert held + idle == (10 - free) * SIZE
        slots = {(found[at // SIZE], at % SIZE)
                 for found, n in zip(pages, lengths, strict=True) for at in range(n)}  # fmt: skip
        assert held == len(slots)
        keys, room, _ = moment["contiguous"]
        assert keys == sum(lengths)
        assert idle_in_contiguous(lengths, 40) == pytest.approx(room / max(1, keys + room))


def test_recording_changes_nothing_of_what_it_records() -> None:
    cache = story()
    (sequence,) = cache._living
    assert table([sequence]) == ([[0, 2]], [7])
    assert cache.free_pages == 12 - 2


def test_each_call_is_told_in_a_sentence() -> None:
    assert [moment.text for moment in story().moments] == [
        "all 12 pages are free",
        "A begins, without a page",
        "A takes 6 keys; pages 0 and 1 are taken",
        "B begins with 6 keys of A in pages 0 and 1, and takes no page",
        "B takes 1 key; others have page 1 too, so it is copied to page 2",
        "A takes 1 key; page 1 has room",
        "C begins, without a page",
        "C takes 17 keys; pages 3, 4, 5, 6 and 7 are taken",
        "B wants 30 keys, gets none: too few pages are free",
        "A is freed; page 1 goes back; others have page 0, which stays",
        "C is freed; pages 3, 4, 5, 6 and 7 go back",
    ]


def test_the_pages_that_a_call_touches_are_those_that_change() -> None:
    recorded = story().moments
    assert [set(moment.touched) for moment in recorded] == [
        set(), set(), {0, 1}, {0, 1}, {1, 2}, {1}, set(), {3, 4, 5, 6, 7}, set(), {1},
        {3, 4, 5, 6, 7},
    ]  # fmt: skip
    assert [moment.copied for moment in recorded if moment.copied] == [(1, 2)]


def test_a_call_that_is_refused_is_kept_and_one_that_is_wrong_is_not() -> None:
    cache = RecordedAllocator(2, SIZE)
    sequence = cache.new()
    with pytest.raises(OutOfPages):
        cache.take(sequence, 9)
    assert len(cache.moments) == 3
    with pytest.raises(ValueError, match="n_keys must be 0 or more"):
        cache.take(sequence, -1)
    cache.free(sequence)
    with pytest.raises(ValueError, match="must be one of this allocator's"):
        cache.free(sequence)
    assert len(cache.moments) == 4


def test_without_pages_each_sequence_keeps_its_place_until_it_is_freed() -> None:
    cache = RecordedAllocator(12, SIZE)
    first, second = cache.new(), cache.new()
    cache.free(first)
    third, fourth = cache.new(), cache.new()
    cache.free(second)
    for sequence in (third, fourth):
        cache.take(sequence, 1)
    places = [
        {one[0]: one[3] for one in moment["sequences"]} for moment in pack(cache, 16)["moments"]
    ]
    assert places[2] == {"A": 0, "B": 1}
    assert places[4] == {"B": 1, "C": 0}
    assert places[-1] == {"C": 0, "D": 2}
    assert pack(cache, 16)["places"] == 3


def test_more_sequences_than_letters_still_have_names_of_their_own() -> None:
    cache = RecordedAllocator(1, SIZE)
    for _ in range(60):
        cache.new()
    names = [one[0] for one in pack(cache, 4)["moments"][-1]["sequences"]]
    assert len(set(names)) == 60
    assert names[25:27] == ["Z", "A2"]


# the page


def test_two_builds_are_the_same_bytes_also_in_another_process() -> None:
    program = (
        "import hashlib\nfrom tests.test_player_pages import story\n"
        "from flashedu.player import play_pages\n"
        "html = play_pages(story(), longest=24).html\n"
        "print(hashlib.sha256(html.encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           check=True, cwd=Path(__file__).parent.parent).stdout  # fmt: skip
    here = hashlib.sha256(play_pages(story(), longest=24).html.encode()).hexdigest()
    assert there.strip() == here


def test_a_cell_shows_the_still_and_then_the_player() -> None:
    player = play_pages(story(), longest=24)
    with mock.patch("IPython.display.display") as display:
        player._ipython_display_()
    (first, second) = (call.args[0] for call in display.call_args_list)
    assert first["image/png"].startswith(b"\x89PNG")
    assert second == {"text/html": player.html, "text/plain": repr(player)}
    assert repr(player) == "Page player: 12 pages of 4 keys, 10 steps"


def test_a_player_has_the_drawings_of_its_own_kind_only() -> None:
    from flashedu.memory import Problem

    pages = play_pages(story(), longest=24).html
    tiles = play("tiled", Problem(Nq=16, D=8, block_q=8, block_k=8)).html
    assert ("drawPages" in pages, "drawPages" in tiles) == (True, False)
    assert ("drawMemories" in pages, "drawMemories" in tiles) == (False, True)
    assert len(pages.encode()) < MAX_BYTES / 4


def test_a_page_holds_the_player_and_the_still(tmp_path: Path) -> None:
    player = play_pages(story(), longest=24)
    player.save(tmp_path / "pages.html")
    text = (tmp_path / "pages.html").read_text(encoding="utf-8")
    assert player.html in text
    assert "<noscript><img" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_the_still_tells_three_moments_and_their_keys() -> None:
    player = play_pages(story(), longest=24)
    (packed,) = player.packs
    assert moments(packed) == [4, 7, 10]  # the copy, the fullest, the last
    fig = player.storyboard()
    titles = [ax.get_title().replace("\n", " ") for ax in fig.axes[::2]]
    assert titles == [f"step {at}: {packed['moments'][at]['text']}" for at in (4, 7, 10)]
    for ax, at in zip(fig.axes[1::2], (4, 7, 10), strict=True):
        bars = [bar.get_width() for bar in ax.patches]
        moment = packed["moments"][at]
        assert bars == [*moment["in_pages"][:2], *moment["contiguous"][:2]]
    import matplotlib.pyplot as plt

    plt.close(fig)


# what cannot be played


def test_what_cannot_be_played_gets_a_sentence() -> None:
    with pytest.raises(TypeError, match="RecordedAllocator, got PageAllocator"):
        play_pages(PageAllocator(4, 4), longest=4)
    for longest in (16, 49):
        with pytest.raises(ValueError, match=f"longest must be 17, .* to 48, .* got {longest}"):
            play_pages(story(), longest=longest)
    cache = RecordedAllocator(64, 16)
    sequence = cache.new()
    for _ in range(1000):
        cache.take(sequence, 1)
    with pytest.raises(ValueError, match="allocator must have done less, for 150,000 bytes"):
        play_pages(cache, longest=1024)


def test_an_allocator_that_did_nothing_can_be_played() -> None:
    assert isinstance(play_pages(RecordedAllocator(3, 4), longest=1), PagePlayer)
