"""Figures of recorded speed and memory: our kernels beside PyTorch's, alone and in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashedu.bench.cases import MASKS, PASSES, PEERS
from flashedu.plots.style import PEER_LINE, Look, headline, styled
from flashedu.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from flashedu.bench.record import Record


def speed(record: Record, D: int, title: str) -> Figure:
    """TFLOP/s against N at one head size: a panel for each pass and mask, a line for each peer.

    Bars on the points reach from the 10th to the 90th percentile of the rounds.
    """
    cases = record.cases("speed", D=D)
    passes = [name for name in PASSES if any(case["pass"] == name for case in cases)]
    masks = sorted({case["causal"] for case in cases})
    with styled() as look:
        fig, axes = plt.subplots(
            len(passes), len(masks), figsize=(9.2, 0.9 + 2.8 * len(passes)),
            sharex=True, sharey="row", squeeze=False,
        )  # fmt: skip
        for row, name in zip(axes, passes, strict=True):
            for ax, causal in zip(row, masks, strict=True):
                panel = [c for c in cases if c["pass"] == name and c["causal"] == causal]
                for peer, points in _by_peer(panel, "tflops").items():
                    middle = [run["tflops"] for _, run in points]
                    off = [[abs(run["tflops"] * (run["median_s"] / run[end] - 1))
                            for _, run in points] for end in ("p90_s", "p10_s")]  # fmt: skip
                    ns = [case["N"] for case, _ in points]
                    _line(ax, look, peer, ns, middle, yerr=off)
                ax.set_title(f"{PASSES[name]}, {MASKS[causal]}", fontsize=10.5, fontweight="normal")
                ax.set_ylim(bottom=0)
            row[0].set_ylabel("TFLOP/s")
        _n_axis(axes[-1], {case["N"] for case in cases})
        _legend(fig, axes.flat)
        headline(fig, title)
        _source(fig, record)
    return fig


def speedup_against_heads(record: Record, title: str) -> Figure:
    """How many times as fast as flash1 flash2 is, forward, against B·H: a line for each N and mask.

    The number of SMs is marked: from there on flash1 has a program for each.
    """
    cases = record.cases("flash1")
    kinds = sorted({(case["causal"], case["N"]) for case in cases})
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4))
        lines = zip(kinds, (look.peer["flex"], look.ink) * 2, ("o", "D", "^", "s"), strict=False)
        for (causal, n), grey, marker in lines:
            points = [
                (case["B"] * case["H"], run["times_as_fast_as"]["flash1"])
                for case in cases
                if (case["causal"], case["N"]) == (causal, n)
                for run in case["runs"]
                if run["peer"] == "flash2" and "flash1" in run["times_as_fast_as"]
            ]
            heads, ratios = [h for h, _ in points], [ratio for _, ratio in points]
            off = [[m - low for m, low, _ in ratios], [high - m for m, _, high in ratios]]
            ax.errorbar(heads, [ratio[0] for ratio in ratios], yerr=off, color=grey, marker=marker,
                        linestyle="--" if causal else "-", capsize=2,
                        label=f"N {n:,}, {MASKS[causal]}")  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        heads = sorted({case["B"] * case["H"] for case in cases})
        ax.set_xticks(heads, [str(h) for h in heads])
        ticks = [2.0**e for e in range(-2, 10) if ax.get_ylim()[0] / 2 < 2.0**e < ax.get_ylim()[1]]
        ax.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        ax.minorticks_off()
        ax.axhline(1, color=look.faint, zorder=0)
        sms = record.data["sm_count"]
        ax.axvline(sms, color=look.ink, linewidth=0.9, linestyle=":")
        ax.text(sms, 1, f"{sms} SMs ", rotation=90, va="top", ha="right", fontsize=9,
                transform=ax.get_xaxis_transform())  # fmt: skip
        ax.set_xlabel("heads in all, B·H: as many programs as flash1 has")
        ax.set_ylabel("speed of flash2 over flash1")
        ax.legend()
        ax.set_title(title)
        _source(fig, record)
    return fig


def memory(record: Record, title: str) -> Figure:
    """Peak memory of forward and backward beyond the inputs against N, log-log.

    A line that ends early ran out of memory.
    """
    cases = record.cases("memory")
    with styled() as look:
        fig, ax = plt.subplots(figsize=(8, 4))
        for peer, points in _by_peer(cases, "extra_bytes").items():
            ns = [case["N"] for case, _ in points]
            _line(ax, look, peer, ns, [run["extra_bytes"] for _, run in points])
        ax.set_yscale("log", base=2)
        if total := record.data.get("memory_bytes"):
            ax.axhline(total, color=look.ink, linewidth=0.9, linestyle=":")
            text = f"all the memory of the {record.data['card']}"
            ax.text(1, total, text, va="bottom", ha="right", fontsize=9,
                    transform=ax.get_yaxis_transform())  # fmt: skip
        low, high = ax.get_ylim()
        ticks = [2.0**e for e in range(20, 60, 2) if low <= 2.0**e <= high]
        ax.set_yticks(ticks, [human_bytes(tick) for tick in ticks])
        _n_axis([ax], {case["N"] for case in cases})
        ax.set_ylabel("peak memory beyond inputs")
        ax.legend(loc="lower right")
        ax.set_title(title)
        _source(fig, record)
    return fig


def decode_times(record: Record, title: str) -> Figure:
    """Time of one decoding step against the keys in the cache, log-log, a panel for each batch.

    Bars on the points as in `speed`.
    """
    cases = record.cases("decode")
    batches = sorted({case["B"] for case in cases})
    shown = ("decode", "flash2", "sdpa-cudnn", "sdpa-flash", "copy")
    with styled() as look:
        fig, axes = plt.subplots(
            1, len(batches), figsize=(9.2, 3.9), sharex=True, sharey=True, squeeze=False
        )
        for ax, B in zip(axes[0], batches, strict=True):
            panel = [case for case in cases if case["B"] == B]
            for peer, points in _by_peer(panel, "median_s").items():
                if peer in shown:
                    ns = [case["N"] for case, _ in points]
                    middle = [1e6 * run["median_s"] for _, run in points]
                    off = [[1e6 * abs(run["median_s"] - run[end]) for _, run in points]
                           for end in ("p10_s", "p90_s")]  # fmt: skip
                    _line(ax, look, peer, ns, middle, yerr=off)
            ax.set_title(f"batch {B}", fontsize=10.5, fontweight="normal")
            ax.set_yscale("log")
        _n_axis(axes[0], {case["N"] for case in cases})
        for ax in axes[0]:
            ax.set_xlabel("keys in the cache")
            ax.set_xticks(ax.get_xticks(), [f"{n // 1024:.0f}k" for n in ax.get_xticks()])
        low, high = axes[0][0].get_ylim()
        ticks = [tick for e in range(8) for tick in (10**e, 3 * 10**e) if low <= tick <= high]
        axes[0][0].set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes[0][0].minorticks_off()
        axes[0][0].set_ylabel("time of a step (µs)")
        _legend(fig, axes.flat)
        headline(fig, title)
        _source(fig, record)
    return fig


def packed_times(record: Record, D: int, title: str) -> Figure:
    """Time of attention over texts of different lengths, causal: a panel a pass, a bar a peer."""
    panels = {
        PASSES[case["pass"]]: {run["peer"]: run["median_s"] for run in case["runs"]}
        for case in record.cases("varlen", D=D, causal=True)
    }
    return _bars(record, panels, dict.fromkeys(panels, human_seconds), "varlen", title)


def model_bars(record: Record, H_kv: int, title: str) -> Figure:
    """A forward of a model with each attention: its time, and its peak memory beyond the inputs."""
    (case,) = record.cases("model", H_kv=H_kv, **{"pass": "fwd"})
    shown = {"time": ("median_s", human_seconds), "peak memory": ("extra_bytes", human_bytes)}
    panels = {
        label: {run["peer"]: run[value] for run in case["runs"]}
        for label, (value, _) in shown.items()
    }
    units = {label: unit for label, (_, unit) in shown.items()}
    return _bars(record, panels, units, "hf-flashedu", title)


def _bars(
    record: Record,
    panels: Mapping[str, Mapping[str, float | None]],
    units: Mapping[str, Callable[[float], str]],
    ours: str,
    title: str,
) -> Figure:
    """A panel for each label, with a scale of its own. A peer without a value did not run."""
    count = max(map(len, panels.values()))
    with styled() as look:
        fig, axes = plt.subplots(
            1, len(panels), figsize=(8.8, 1.1 + 0.42 * count), sharey=True, squeeze=False
        )
        for ax, (label, values) in zip(axes[0], panels.items(), strict=True):
            widest = max(value or 0 for value in values.values())
            for row, (peer, value) in enumerate(values.items()):
                colour = look.peer["flash2"] if peer == ours else look.peer["flex"]
                ax.barh(row, value or 0, color=colour, height=0.66)
                text = units[label](value) if value else "did not run"
                ax.text((value or 0) + 0.02 * widest, row, text, va="center")
            ax.set_yticks(range(len(values)), [PEERS[peer] for peer in values])
            ax.tick_params(length=0)
            ax.set_xlim(0, 1.3 * widest)
            ax.set_xticks([])
            ax.spines[["left", "bottom"]].set_visible(False)
            ax.set_title(label, fontsize=10.5, fontweight="normal")
        axes[0][0].invert_yaxis()
        headline(fig, title)
        _source(fig, record)
    return fig


def _source(fig: Figure, record: Record) -> None:
    fig.supxlabel(record.label, x=0.01, ha="left", fontsize=9.0 * max(1.0, fig.get_figwidth() / 8))


def _by_peer(
    cases: Iterable[Mapping[str, Any]], value: str
) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """peer → its (case, run) that have the value, by N, in the order of the styles."""
    found: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {p: [] for p in PEER_LINE}
    for case in sorted(cases, key=lambda case: case["N"]):
        for run in case["runs"]:
            if run[value] is not None:
                found[run["peer"]].append((case, run))
    return {peer: points for peer, points in found.items() if points}


def _line(ax: Axes, look: Look, peer: str, x: list[int], y: list[float], yerr: Any = None) -> None:
    marker, dashes = PEER_LINE[peer]
    ax.errorbar(x, y, yerr=yerr, color=look.peer[peer], marker=marker, linestyle=dashes, capsize=2,
                label=PEERS[peer])  # fmt: skip


def _n_axis(axes: Iterable[Axes], sizes: Iterable[int]) -> None:
    ns = sorted(sizes)
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(ns, [f"{n:,}" for n in ns])
        ax.minorticks_off()
        ax.set_xlabel("sequence length N")


def _legend(fig: Figure, axes: Iterable[Axes]) -> None:
    """One for all panels, at the side."""
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(handles.values(), handles.keys(), loc="outside right center")
