"""The still picture of a run: three of its moments, its tiles of S, and the bytes it moved.

It stands where scripts are off: on GitHub, in a notebook that is not trusted, on paper.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from flashedu.memory.trace import visits
from flashedu.player.film import Film, Pack, pack
from flashedu.plots.style import Look, styled


def storyboard(films: Sequence[Film], titles: Sequence[str] = ()) -> Figure:
    """A row of moments and a bar of bytes for each film. `titles`: if not the stages' ideas."""
    most = max(film.machine.counted.hbm_bytes for film in films)
    with styled() as look:
        fig = plt.figure(figsize=(9.2, 3.85 * len(films)), layout="none")
        parts = fig.subfigures(len(films), 1, squeeze=False)[:, 0]
        own = [f"{film.stage}: {pack(film)['idea']}" for film in films]
        for part, film, title in zip(parts, films, titles or own, strict=True):
            _board(part, film, most, look, title)
    return fig


def png(fig: Figure) -> bytes:
    """The picture as a file; it is closed."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)
    plt.close(fig)
    small = io.BytesIO()  # a quarter of the bytes, as a notebook keeps it
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(
            small, "png", optimize=True
        )
    return small.getvalue()


def moments(film: Film, packed: Pack) -> list[int]:
    """Three events to show: the first tile of S, a large move in the middle of the run while the
    chip is full, the last store."""
    trace, live = film.trace, [packed["lives"][number] for number in packed["live"]]
    moves = [at for at, event in enumerate(trace) if event.op != "hold"]
    size = {at: (trace[at].sram_bytes or len(live[at]), trace[at].hbm_bytes) for at in moves}
    large = [at for at in moves if size[at] == max(size.values())]
    return [visits(trace)[0].at, large[len(large) // 2], moves[-1]]


def _board(fig: Any, film: Film, most: int, look: Look, title: str) -> None:
    packed = pack(film)
    grid = fig.add_gridspec(
        2, 4, height_ratios=(5, 1.15), width_ratios=(1, 1, 1, 1.05), left=0.008, right=0.992,
        top=0.81, bottom=0.05, wspace=0.05, hspace=0.12,
    )  # fmt: skip
    fig.suptitle(title, fontsize=11.5, fontweight="bold", x=0.008, y=0.985, ha="left")
    for column, at in enumerate(moments(film, packed)):
        _moment(fig.add_subplot(grid[0, column]), film, packed, at, look)
    _scores(fig.add_subplot(grid[0, 3]), film, look)
    _totals(fig.add_subplot(grid[1, :]), film, packed, most, look)


def _moment(ax: Any, film: Film, packed: Pack, at: int, look: Look) -> None:
    """HBM above and SRAM below, just after one event."""
    event = film.trace[at]
    tensors, live = packed["tensors"], packed["lives"][packed["live"][at]]
    per_head, program = packed["n_programs"] // (film.problem.B * film.problem.H), packed["program"]
    first = program.index(program[at] // per_head * per_head) if per_head else 0
    before = film.trace[first : at + 1]  # of this head
    ax.add_artist(
        Rectangle((0, 46), 100, 54, facecolor=to_rgba(look.hbm, 0.13), edgecolor=look.hbm)
    )
    ax.text(3, 93, "HBM", fontweight="bold", fontsize=9)
    tall = max(tensor["rows"] for tensor in tensors)
    pitch = 96 / len(tensors)
    wide = max(tensor["cols"] for tensor in tensors)
    for n, tensor in enumerate(tensors):
        width = max(0.78 * pitch * tensor["cols"] / wide, 2.5)
        middle = 2 + (n + 0.5) * pitch
        ax.text(
            middle,
            85.5,
            tensor["name"],
            ha="center",
            fontweight="bold",
            fontsize=8.5 if len(tensors) < 7 else 7,
        )
        unit = 34 / tall
        for start in range(0, tensor["rows"], tensor["block"]):
            stop = min(start + tensor["block"], tensor["rows"])
            stored = any(e.op == "store" and e.tensor == tensor["name"] and e.start < stop
                         and e.stop > start for e in before)  # fmt: skip
            moves = event.tensor == tensor["name"] and event.start < stop and event.stop > start
            full = tensor["input"] or stored
            place = ((middle - width / 2, 83 - stop * unit), width, (stop - start) * unit)
            ax.add_artist(Rectangle(
                *place, facecolor=tensor["colour"] if full else look.paper, edgecolor="none",
                alpha=1 if moves else 0.35, hatch=None if tensor["input"] or not full else "////",
            ))  # fmt: skip
            ax.add_artist(Rectangle(*place, facecolor="none", edgecolor=look.ink,
                                   linewidth=1.8 if moves else 0.4, zorder=4 if moves else 3,
                                   linestyle="-" if full else (0, (2, 2))))  # fmt: skip
        if event.tensor == tensor["name"]:
            down = event.op == "load"
            ends = ((middle, 29), (middle, 46)) if down else ((middle, 47), (middle, 29))
            arrow = {"arrowstyle": "simple,head_width=0.9,head_length=0.6,tail_width=0.4",
                     "facecolor": tensor["colour"], "edgecolor": look.ink,
                     "linewidth": 0.6}  # fmt: skip
            ax.annotate("", *ends, arrowprops=arrow, zorder=5)
            left = middle > 50
            ax.text(middle + (-7 if left else 7), 37, f"{event.hbm_bytes:,} bytes", va="center",
                    ha="right" if left else "left", fontsize=8.5, fontweight="bold")  # fmt: skip
    _chip(ax, film, packed, live, look)
    rows = f"rows {event.start} to {event.stop - 1}"
    ax.set_title(f"step {at + 1:,}: {event.op} {event.tensor}\n{rows}", fontsize=9.5,
                 fontweight="normal", loc="center")  # fmt: skip
    ax.set_xlim(-0.5, 100.5)
    ax.set_ylim(-0.5, 100.5)
    ax.axis("off")


def _chip(ax: Any, film: Film, packed: Pack, live: Sequence[Sequence[Any]], look: Look) -> None:
    """What one program holds: to scale where that is counted, else by name."""
    ax.add_artist(
        Rectangle((0, 0), 100, 28, facecolor=to_rgba(look.sram, 0.1), edgecolor=look.sram)
    )
    peak = max(event.sram_bytes for event in film.trace)
    if peak:
        held = sum(tile[3] for tile in live)
        at = 3.0
        for name, _, _, size in live:
            width = 94 * size / peak
            ax.add_artist(Rectangle((at, 10), width, 8, facecolor=packed["tile_colours"][name],
                                   edgecolor=look.ink, linewidth=0.5))  # fmt: skip
            at += width
        ax.add_artist(Rectangle((3, 10), 94, 8, facecolor="none", edgecolor=look.ink,
                               linewidth=0.6, linestyle=(0, (2, 2))))  # fmt: skip
        # in the order of the bar; some of its parts are too narrow for a name below them
        ax.text(3, 4.5, "   ".join(tile[0] for tile in live), fontsize=8, va="center")
        ax.text(3, 21, f"SRAM: {held:,} bytes", fontweight="bold", fontsize=9)
        return
    ax.text(3, 21, "SRAM: what is loaded", fontweight="bold", fontsize=9)
    for n, (name, *_) in enumerate(live):
        left = 3 + n * 94 / len(live)
        ax.add_artist(Rectangle((left, 10), 90 / len(live), 8, edgecolor=look.ink, linewidth=0.5,
                               facecolor=packed["tile_colours"][name]))  # fmt: skip
        ax.text(left + 45 / len(live), 4.5, name, fontsize=7.5, va="center", ha="center")


def _scores(ax: Any, film: Film, look: Look) -> None:
    """S in tiles, each with the turn at which it was computed, or how often."""
    p = film.problem
    turns = visits(film.trace)
    heads = p.B * p.H if film.machine.programs else 1
    turns = turns[: len(turns) // heads]
    times = Counter((visit.query, visit.key) for visit in turns)
    order = {(visit.query, visit.key): n for n, visit in enumerate(turns, 1)}
    small = max(-(-p.Nq // p.block_q), -(-p.Nk // p.block_k))
    for i in range(0, p.Nq, p.block_q):
        for j in range(0, p.Nk, p.block_k):
            height, width = min(p.block_q, p.Nq - i), min(p.block_k, p.Nk - j)
            masked = p.causal and j + width - 1 > i + p.Nk - p.Nq
            done = (i, j) in times
            colour = (look.masked if masked else look.tensor["s"]) if done else look.paper
            ax.add_artist(Rectangle((j, i), width, height, facecolor=colour,
                                   edgecolor=look.ink if done else look.faint,
                                   linewidth=0.6))  # fmt: skip
            if not done:
                ax.plot([j, j + width], [i, i + height], color=look.faint, linewidth=0.8)
            elif 1 < small <= 10:
                n = times[i, j]
                ax.text(j + width / 2, i + height / 2, f"{n}×" if n > 1 else str(order[i, j]),
                        ha="center", va="center", fontsize=8 if small > 5 else 9.5,
                        color=look.text_on(colour), fontweight="bold")  # fmt: skip
    ax.set_xlim(-0.01 * p.Nk, 1.01 * p.Nk)
    ax.set_ylim(1.01 * p.Nq, -0.01 * p.Nq)
    ax.set_aspect("equal")
    ax.axis("off")
    stored = any(event.tensor == "s" for event in film.trace)
    place = "it and P are in HBM" if stored else "never in HBM"
    repeated = max(times.values()) > 1
    what = "how often each is computed" if repeated else "in the order computed"
    ax.set_title(f"tiles of S: {place}\n{what}" if len(times) > 1 else f"S is one piece\n{place}",
                 fontsize=9.5, fontweight="normal", loc="center")  # fmt: skip
    if p.causal:
        handles = [Patch(facecolor=look.masked, edgecolor=look.ink, label="partly masked"),
                   Patch(facecolor=look.paper, edgecolor=look.faint, label="skipped")]  # fmt: skip
        ax.legend(handles=handles[: 1 + (len(times) < _tiles(film))], fontsize=7.5, ncols=2,
                  loc="upper center", bbox_to_anchor=(0.5, 0.0), columnspacing=1)  # fmt: skip


def _tiles(film: Film) -> int:
    p = film.problem
    return -(-p.Nq // p.block_q) * -(-p.Nk // p.block_k)


def _totals(ax: Any, film: Film, packed: Pack, most: int, look: Look) -> None:
    """All bytes that crossed, by tensor, to the scale of the film that moves most."""
    counted, moved = film.machine.counted, film.machine.bytes_by_tensor()
    at = 0
    for written in (False, True):
        for tensor in packed["tensors"]:
            name, n = tensor["name"], moved[tensor["name"]][written]
            if not n:
                continue
            ax.barh(0, n, left=at, color=tensor["colour"], edgecolor=look.paper, linewidth=0.5,
                    hatch="////" if written else None, height=0.9)  # fmt: skip
            if n > 0.02 * most:
                ax.text(at + n / 2, 0, name, ha="center", va="center", fontsize=9.5,
                        fontweight="bold", bbox={"facecolor": look.paper, "edgecolor": "none",
                                                 "pad": 1, "alpha": 0.85})  # fmt: skip
            at += n
    ax.text(0, 0.62, f"moved in all: {counted.hbm_bytes:,} bytes, {counted.hbm_read_bytes:,} read "
            f"and {counted.hbm_write_bytes:,} written (hatched)", fontsize=9.5)  # fmt: skip
    ax.set_xlim(0, most)
    ax.set_ylim(-0.5, 1.3)
    ax.axis("off")
