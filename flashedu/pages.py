"""Pages of a key and value cache: who has which, who shares one, and which are free.

A sequence that is being written grows by a key at a time, to a length that nobody knows. Room for
the longest that it may become is mostly empty. Pages are taken as they are needed, from anywhere: a
table says which page holds keys 0 to page_size − 1, which the next ones, and so on. What is lost is
the end of each last page.

Sequences with the same beginning share its pages. A page knows how many have it; who writes to one
that others have too takes a copy first.

Source: PagedAttention (arXiv 2309.06180), Section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class OutOfPages(RuntimeError):
    """More pages are needed than are free. Nothing has changed."""


@dataclass(eq=False)
class Cached:
    """A sequence in the cache: its pages, in order, and how many keys they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PageAllocator:
    """Hands out pages by their numbers, 0 to n_pages − 1. It moves no keys itself."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        for name, n in (("n_pages", n_pages), ("page_size", page_size)):
            if n < 1:
                raise ValueError(f"{name} must be 1 or more, got {n}")
        self.page_size = page_size
        self.n_pages = n_pages
        self._free = list(reversed(range(n_pages)))  # the last one goes first
        self._users = [0] * n_pages
        self._living: set[Cached] = set()

    def new(self) -> Cached:
        """A sequence without keys."""
        return self._begun(Cached())

    def take(self, sequence: Cached, n_keys: int) -> list[tuple[int, int]]:
        """Make room for n_keys more at the end of a sequence.

        Returns the pages to copy before they are written, as (from, to): at most the
        last one, if others have it too. Raises OutOfPages, and changes nothing, if there
        are too few.
        """
        self._check(sequence)
        if n_keys < 0:
            raise ValueError(f"n_keys must be 0 or more, got {n_keys}")
        end, pages = sequence.length + n_keys, sequence.pages
        more = -(-end // self.page_size) - len(pages)
        writes_the_last = n_keys > 0 and sequence.length % self.page_size > 0
        shared = writes_the_last and self._users[pages[-1]] > 1
        if more + shared > len(self._free):
            raise OutOfPages(
                f"n_keys={n_keys} more need {more + shared} pages, and "
                f"{len(self._free)} of {self.n_pages} are free"
            )
        copies = []
        if shared:
            copies.append((pages[-1], self._taken()))
            self._give_back(pages[-1])
            pages[-1] = copies[0][1]
        pages += [self._taken() for _ in range(more)]
        sequence.length = end
        return copies

    def share(self, sequence: Cached, n_keys: int | None = None) -> Cached:
        """A new sequence with the first n_keys of another, None for all; takes no page."""
        self._check(sequence)
        n_keys = sequence.length if n_keys is None else n_keys
        if not 0 <= n_keys <= sequence.length:
            wanted = f"0 to the sequence's length, {sequence.length}"
            raise ValueError(f"n_keys must be {wanted}, got {n_keys}")
        pages = sequence.pages[: -(-n_keys // self.page_size)]
        for page in pages:
            self._users[page] += 1
        return self._begun(Cached(pages, n_keys))

    def free(self, sequence: Cached) -> None:
        """Give a sequence's pages back; those that others have stay."""
        self._check(sequence)
        self._living.remove(sequence)
        for page in sequence.pages:
            self._give_back(page)
        sequence.pages, sequence.length = [], 0

    @property
    def free_pages(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Pages that somebody has; a shared one counts once."""
        return self.n_pages - len(self._free)

    def _begun(self, sequence: Cached) -> Cached:
        self._living.add(sequence)
        return sequence

    def _taken(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _give_back(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _check(self, sequence: Cached) -> None:
        if sequence not in self._living:
            raise ValueError("sequence must be one of this allocator's, which was not freed")


def table(sequences: Sequence[Cached]) -> tuple[list[list[int]], list[int]]:
    """The block table and the lengths, as `stages.paged` takes them: shorter rows end in zeros."""
    most = max((len(s.pages) for s in sequences), default=0)
    rows = [s.pages + [0] * (most - len(s.pages)) for s in sequences]
    return rows, [s.length for s in sequences]


def idle_in_pages(lengths: Sequence[int], page_size: int) -> float:
    """The share of the memory that holds no key, where each sequence has pages of its own."""
    return _idle(lengths, sum(-(-n // page_size) * page_size for n in lengths))


def idle_in_contiguous(lengths: Sequence[int], longest: int) -> float:
    """The same where each sequence has room for the longest that it may become."""
    return _idle(lengths, longest * len(lengths))


def _idle(lengths: Sequence[int], room: int) -> float:
    return 1 - sum(lengths) / room if room else 0.0
