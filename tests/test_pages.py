"""The page allocator: no page is lost, none is written by two, and sharing takes none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashedu.pages import (
    Cached,
    OutOfPages,
    PageAllocator,
    idle_in_contiguous,
    idle_in_pages,
    table,
)

exactly = settings(max_examples=200, deadline=None, derandomize=True, database=None)

# what is done: (which, on which of the living sequences, with how many keys)
DEEDS = st.lists(
    st.tuples(st.sampled_from(["new", "take", "share", "free"]), st.integers(0, 9),
              st.integers(0, 12)),
    max_size=60,
)  # fmt: skip


class Cache:
    """An allocator with the keys that it gives room to: each is written down in its page."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.allocator = PageAllocator(n_pages, page_size)
        self.slots: list[list[int | None]] = [[None] * page_size for _ in range(n_pages)]
        self.living: list[tuple[Cached, list[int]]] = []  # and the keys that each must have
        self.written = 0

    def do(self, deed: str, which: int, n_keys: int) -> None:
        if deed == "new":
            self.living.append((self.allocator.new(), []))
        if deed == "new" or not self.living:
            return
        sequence, keys = self.living[which % len(self.living)]
        if deed == "take":
            self.take(sequence, keys, n_keys)
        elif deed == "share":
            n = min(n_keys, len(keys))
            self.living.append((self.allocator.share(sequence, n), keys[:n]))
        else:
            self.allocator.free(sequence)
            self.living.remove((sequence, keys))

    def take(self, sequence: Cached, keys: list[int], n_keys: int) -> None:
        before = (list(sequence.pages), sequence.length, self.allocator.free_pages)
        try:
            copies = self.allocator.take(sequence, n_keys)
        except OutOfPages:
            assert (sequence.pages, sequence.length, self.allocator.free_pages) == before
            return
        for source, target in copies:
            self.slots[target] = list(self.slots[source])
        size = self.allocator.page_size
        for position in range(len(keys), len(keys) + n_keys):
            self.written += 1
            self.slots[sequence.pages[position // size]][position % size] = self.written
            keys.append(self.written)

    def read(self, sequence: Cached) -> list[int | None]:
        size = self.allocator.page_size
        return [self.slots[sequence.pages[i // size]][i % size] for i in range(sequence.length)]


@exactly
@given(st.integers(1, 12), st.integers(1, 5), DEEDS)
def test_every_sequence_keeps_its_keys_whatever_the_others_do(n_pages, page_size, deeds) -> None:
    cache = Cache(n_pages, page_size)
    for deed in deeds:
        cache.do(*deed)
        for sequence, keys in cache.living:
            assert cache.read(sequence) == keys


@exactly
@given(st.integers(1, 12), st.integers(1, 5), DEEDS)
def test_no_page_is_lost_and_none_is_kept_for_nobody(n_pages, page_size, deeds) -> None:
    cache = Cache(n_pages, page_size)
    for deed in deeds:
        cache.do(*deed)
        held = {page for sequence, _ in cache.living for page in sequence.pages}
        assert cache.allocator.used_pages == len(held)
        assert cache.allocator.free_pages + len(held) == n_pages
    for sequence, _ in cache.living:
        cache.allocator.free(sequence)
    assert cache.allocator.free_pages == n_pages


def test_a_prompt_that_many_share_takes_its_pages_once() -> None:
    allocator = PageAllocator(100, 16)
    prompt = allocator.new()
    allocator.take(prompt, 64)
    answers = [allocator.share(prompt) for _ in range(8)]
    assert allocator.used_pages == 4
    for answer in answers:
        assert allocator.take(answer, 1) == []  # the prompt fills its pages: nothing to copy
    assert allocator.used_pages == 4 + 8


def test_who_writes_to_a_shared_page_copies_it_and_the_last_one_need_not() -> None:
    allocator = PageAllocator(10, 16)
    first = allocator.new()
    allocator.take(first, 20)
    second = allocator.share(first)
    old = first.pages[1]
    ((source, target),) = allocator.take(second, 1)
    assert (source, target) == (old, second.pages[1])
    assert first.pages[0] == second.pages[0]
    assert allocator.take(first, 1) == []


def test_a_table_has_a_row_for_each_sequence() -> None:
    allocator = PageAllocator(10, 4)
    sequences = [allocator.new() for _ in range(3)]
    for sequence, n_keys in zip(sequences, (9, 0, 4), strict=True):
        allocator.take(sequence, n_keys)
    assert table(sequences) == ([[0, 1, 2], [0, 0, 0], [3, 0, 0]], [9, 0, 4])
    assert table([]) == ([], [])


def test_pages_leave_less_idle_than_room_for_the_longest() -> None:
    lengths = [100, 1000, 17, 512]
    assert idle_in_pages(lengths, 16) == pytest.approx(1 - 1629 / (112 + 1008 + 32 + 512))
    assert idle_in_contiguous(lengths, 2048) == pytest.approx(1 - 1629 / (4 * 2048))
    assert idle_in_pages([], 16) == idle_in_contiguous([], 16) == 0


def test_what_cannot_be_done_gets_a_sentence() -> None:
    allocator = PageAllocator(2, 16)
    sequence = allocator.new()
    with pytest.raises(OutOfPages, match=r"n_keys=33 more need 3 pages, and 2 of 2 are free"):
        allocator.take(sequence, 33)
    with pytest.raises(ValueError, match="n_keys must be 0 or more, got -1"):
        allocator.take(sequence, -1)
    with pytest.raises(ValueError, match="n_keys must be 0 to the sequence's length, 0, got 1"):
        allocator.share(sequence, 1)
    allocator.free(sequence)
    with pytest.raises(ValueError, match="must be one of this allocator's, which was not freed"):
        allocator.free(sequence)
    for sizes in ((0, 16), (2, 0)):
        with pytest.raises(ValueError, match="must be 1 or more, got 0"):
            PageAllocator(*sizes)
