"""The page player: pages of a cache as they are taken, shared, copied and freed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from flashedu.pages import Cached, OutOfPages, PageAllocator
from flashedu.player.page import MAX_BYTES, Pack, Player
from flashedu.plots.style import SEQUENCES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Moment:
    """The allocator just after a call."""

    text: str  # what the call did
    living: dict[str, tuple[int, tuple[int, ...]]]  # name of a sequence → its keys, its pages
    touched: tuple[int, ...] = ()  # pages that the call took, shared, copied or gave back
    copied: tuple[int, int] | None = None  # from, to


class RecordedAllocator(PageAllocator):
    """A `PageAllocator` that keeps a moment for each call. Its sequences are A, B, C …"""

    def __init__(self, n_pages: int, page_size: int) -> None:
        super().__init__(n_pages, page_size)
        self._names: dict[Cached, str] = {}
        self._begun_so_far = 0
        self.moments: list[Moment] = []
        self._record(f"all {n_pages} pages are free")

    def new(self) -> Cached:
        """A sequence without keys."""
        sequence = super().new()
        self._record(f"{self._name(sequence)} begins, without a page")
        return sequence

    def take(self, sequence: Cached, n_keys: int) -> list[tuple[int, int]]:
        """Make room for n_keys more at the end of a sequence."""
        before, name = list(sequence.pages), self._names.get(sequence, "")
        try:
            copies = super().take(sequence, n_keys)
        except OutOfPages:
            self._record(f"{name} wants {_keys(n_keys)}, gets none: too few pages are free")
            raise
        new = sequence.pages[len(before) :]
        what = [f"{name} takes {_keys(n_keys)}"]
        for source, target in copies:
            what.append(f"others have page {source} too, so it is copied to page {target}")
        if new:
            what.append(f"{_pages(new)} {'is' if len(new) == 1 else 'are'} taken")
        elif n_keys and not copies:
            what.append(f"page {sequence.pages[-1]} has room")
        touched = new or sequence.pages[-1:]
        self._record("; ".join(what), [*sum(copies, ()), *touched], *copies)
        return copies

    def share(self, sequence: Cached, n_keys: int | None = None) -> Cached:
        """A new sequence with the first n_keys of another."""
        shared = super().share(sequence, n_keys)
        of = f"{_keys(shared.length)} of {self._names[sequence]}"
        where = f" in {_pages(shared.pages)}" if shared.pages else ""
        name = self._name(shared)
        self._record(f"{name} begins with {of}{where}, and takes no page", shared.pages)
        return shared

    def free(self, sequence: Cached) -> None:
        """Give a sequence's pages back; those that others have stay."""
        pages, name = list(sequence.pages), self._names.pop(sequence, "")
        super().free(sequence)
        kept = [page for page in pages if any(page in other.pages for other in self._names)]
        back = [page for page in pages if page not in kept]
        what = [f"{name} is freed"]
        if back:
            what.append(f"{_pages(back)} {'goes' if len(back) == 1 else 'go'} back")
        if kept:
            what.append(
                f"others have {_pages(kept)}, which {'stays' if len(kept) == 1 else 'stay'}"
            )
        self._record("; ".join(what), back)

    def _name(self, sequence: Cached) -> str:
        lap, letter = divmod(self._begun_so_far, 26)
        self._names[sequence] = chr(ord("A") + letter) + (str(lap + 1) if lap else "")
        self._begun_so_far += 1
        return self._names[sequence]

    def _record(
        self, text: str, touched: Sequence[int] = (), copied: tuple[int, int] | None = None
    ) -> None:
        living = {name: (s.length, tuple(s.pages)) for s, name in self._names.items()}
        self.moments.append(Moment(text, living, tuple(touched), copied))


class PagePlayer(Player):
    """A recorded allocator, beside room for `longest` keys for each of its sequences."""

    kind = "pages"

    def __init__(self, allocator: RecordedAllocator, longest: int) -> None:
        self.allocator, self.longest = allocator, longest

    @cached_property
    def packs(self) -> list[Pack]:
        """What the page gets: one panel."""
        return [pack(self.allocator, self.longest)]

    def storyboard(self) -> Figure:
        """Three moments of the pages, and below each the same sequences without pages."""
        from flashedu.player.pages_still import storyboard

        return storyboard(self.packs[0])

    def __repr__(self) -> str:
        a = self.allocator
        return (
            f"Page player: {a.n_pages} pages of {_keys(a.page_size)}, {len(a.moments) - 1:,} steps"
        )


def play_pages(allocator: RecordedAllocator, *, longest: int) -> PagePlayer:
    """The player of all that was done with the allocator so far.

    `longest`: keys that each sequence would have room for if it had no pages. Raises ValueError if
    a sequence was longer, if `longest` do not fit the memory once, and for a player of more than
    150,000 bytes.
    """
    if not isinstance(allocator, RecordedAllocator):
        raise TypeError(
            f"allocator must be a flashedu.player.RecordedAllocator, got {type(allocator).__name__}"
        )
    most = max((n for moment in allocator.moments for n, _ in moment.living.values()), default=0)
    room = allocator.n_pages * allocator.page_size
    if not max(1, most) <= longest <= room:
        raise ValueError(
            f"longest must be {max(1, most)}, the keys of the longest sequence, to {room}, the "
            f"keys of the memory, got {longest}"
        )
    player = PagePlayer(allocator, longest)
    if (size := len(player.html.encode())) > MAX_BYTES:
        raise ValueError(
            f"allocator must have done less, for {MAX_BYTES:,} bytes of HTML, got {size:,} bytes "
            f"for {len(allocator.moments) - 1:,} calls and {allocator.n_pages:,} pages"
        )
    return player


def pack(allocator: RecordedAllocator, longest: int) -> Pack:
    """Its moments in integers and names, for JSON, and the same sequences without pages."""
    page_size, total = allocator.page_size, allocator.n_pages * allocator.page_size
    places: dict[str, int] = {}  # sequence → its place in a memory without pages
    names: list[str] = []
    moments = []
    for moment in allocator.moments:
        places = {name: place for name, place in places.items() if name in moment.living}
        for name in moment.living:
            if name not in places:
                places[name] = min(set(range(len(places) + 1)) - set(places.values()))
        names += [name for name in moment.living if name not in names]
        held = len({(pages[at // page_size], at % page_size)
                    for n, pages in moment.living.values() for at in range(n)})  # fmt: skip
        taken = page_size * len({page for _, pages in moment.living.values() for page in pages})
        alone, room = sum(n for n, _ in moment.living.values()), longest * len(moment.living)
        moments.append({
            "text": moment.text,
            "sequences": [[name, n, list(pages), places[name]]
                          for name, (n, pages) in moment.living.items()],
            "touched": list(moment.touched),
            "copied": moment.copied and list(moment.copied),
            "in_pages": [held, taken - held, total - taken],  # with a key, idle, free
            "contiguous": [alone, room - alone, max(0, total - room)],
        })  # fmt: skip
    return {
        "n_pages": allocator.n_pages,
        "page_size": page_size,
        "longest": longest,
        "places": total // longest,
        "colours": {name: SEQUENCES[n % len(SEQUENCES)] for n, name in enumerate(names)},
        "moments": moments,
    }


def _keys(n: int) -> str:
    return f"{n:,} key{'' if n == 1 else 's'}"


def _pages(pages: Sequence[int]) -> str:
    """`page 3`, `pages 0 and 1`, `pages 0, 1 and 4`."""
    *others, last = pages
    return f"pages {', '.join(map(str, others))} and {last}" if others else f"page {last}"
