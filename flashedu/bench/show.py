"""Tables of a record, for a terminal, and its figures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from flashedu.bench.cases import MASKS, MODEL_PASSES, PASSES, PEERS
from flashedu.bench.record import Record
from flashedu.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Case = dict[str, Any]
Run = dict[str, Any]


def tables(record: Record) -> Iterator[RenderableType]:
    """All of a record: where it is from, then a table for each section, size and pass."""
    data = record.data
    yield Text(record.label[:1].upper() + record.label[1:], "bold")
    yield Text("\n".join(_provenance(record)), "dim")
    if data["kind"] == "tiles":
        yield from _tiles(record)
        return
    if data["kind"] == "steps":
        yield from _steps(record)
        return
    if data["kind"] == "traffic":
        yield from _traffic(record)
        return
    if data["kind"] == "sanitizer":
        yield from _sanitizer(record)
        return
    if data["kind"] == "serving":
        yield from _planned(record)
        yield from _serving(record)
        yield from _tokens(record)
        return
    fwd_bwd = ("D", "causal", "pass")
    yield from _section(record, "speed", fwd_bwd, {"N": _n}, _rate, ("sdpa-flash", "sdpa-cudnn"))
    yield from _section(record, "flash1", ("causal", "N"), {"B·H": _heads}, _rate, ("flash1",))
    yield from _section(record, "memory", (), {"N": _n}, _memory, ("standard",))
    yield from _section(record, "standard", ("pass", "causal"), {"D": _d, "N": _n}, _rate,
                        ("standard", "sdpa-flash"))  # fmt: skip
    yield from _section(record, "short", fwd_bwd, {"N": _n, "by": _mode}, _time, ("sdpa-flash",))
    yield from _section(record, "decode", ("B",), {"Nk": _n}, _bandwidth,
                        ("sdpa-flash", "copy"), ours="decode")  # fmt: skip
    if record.cases("decode"):
        yield Text(
            "decode: one query a head, 16 heads on 2 key heads. GB/s of q, k, v and o, each once. "
            "copy reads k and writes it, as many bytes: 'to copy' is the share of its speed."
        )
    yield from _section(record, "flash-decoding", (), {"B": _b, "Nk": _n}, _time,
                        ("flash2", "standard"), ours="decode")  # fmt: skip
    yield from _section(record, "paged", ("B",), {"Nk": _n}, _bandwidth,
                        ("paged-16", "paged-64", "paged-256"), ours="decode")  # fmt: skip
    if record.cases("paged"):
        yield Text(
            "paged: the same caches in pages of 16, 64 and 256 keys, in any order. 'to paged 64' "
            "is decode's speed over it: how many times as long it takes."
        )
    others = ("padded", "padded-mask", "unmasked", "torch-varlen")
    yield from _section(record, "varlen", ("causal", "pass"), {"D": _d}, _rate, others,
                        ours="varlen")  # fmt: skip
    if varlen := record.cases("varlen"):
        yield Text(_about_varlen(varlen[0]))
    for cell in (_time, _memory):
        sizes: dict[str, Callable[[Case], str]] = {"B": _b, "N": _n, "q/kv": _groups}
        yield from _section(record, "model", ("pass",), sizes, cell, ("hf-sdpa", "hf-eager"),
                            ours="hf-flashedu")  # fmt: skip
    if model := record.cases("model"):
        yield Text("\n".join(_about_model(model)))
    used = [
        error / budget
        for case in data["cases"]
        for run in case["runs"]
        for error, budget in run["errors"].values()
        if run["why"] is None and budget
    ]
    if used:
        yield Text(
            f"\nBefore it was timed, each result was checked against float64: at most "
            f"{max(used):.0%} of its error budget was used. Speeds are medians. The last columns "
            f"are flash2's speed over the other's (flash3's, where it stands in the table), in the "
            f"later sections that of decode, varlen and FlashEdu, taken within each round: the "
            f"median ± half of what lies between the 10th and the 90th percentile. For memory, the "
            f"other's over ours."
        )


def figures(record: Record) -> dict[str, Figure]:
    """Name → figure, of the sections that the record has."""
    from flashedu import plots

    found = {}
    if record.data["kind"] == "steps":
        return _waterfalls(record)
    if record.data["kind"] == "traffic":
        found["kernels"] = plots.predicted_counted_measured(
            three_counts(record), "Bytes into the SMs: formula, interpreter and card"
        )
        shape = record.cases("tiles")[0]
        once = 4 * shape["B"] * shape["H"] * shape["N"] * shape["D"] * 2  # q, k, v, o; float16
        title = "What L2 delivers, and what DRAM sees"
        found["dram"] = plots.l2_and_dram(l2_and_dram(record), once, title)
        return found
    for d in sorted({case["D"] for case in record.cases("speed")}):
        (dtype,) = {case["dtype"] for case in record.cases("speed", D=d)}
        title = f"Attention at head size {d}, {dtype}"
        found[f"speed_d{d}"] = plots.speed(record, d, title)
    if record.cases("flash1"):
        title = "flash2 beside flash1, forward, D 64"
        found["flash1"] = plots.speedup_against_heads(record, title)
    if record.cases("memory"):
        title = "Memory of forward and backward, batch 16, 8 heads, D 64"
        found["memory"] = plots.memory(record, title)
    return found


def launches(
    record: Record, kernel: str, section: str = "tiles", *, causal: bool = False
) -> list[Run]:
    """What a record of traffic has of one of our kernels, a launch each."""
    cases = record.cases(section, causal=causal)
    return [run for case in cases for run in case["runs"] if run["kernel"] == kernel]


def three_counts(
    record: Record, *, causal: bool = False
) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Kernel → its tile → bytes into the SMs: by formula, by the interpreter, by the card."""
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    for case in record.cases("tiles", causal=causal):
        for run in case["runs"]:
            if run["tile"]:  # delta has tiles of its own
                found.setdefault(run["kernel"], {})["tiles of {} × {}".format(*run["tile"][:2])] = (
                    run["closed_form"]["read"], run["counted"]["read"], run["l2_to_sm_bytes"]
                )  # fmt: skip
    return dict(sorted(found.items()))


def l2_and_dram(record: Record, *, causal: bool = False) -> dict[str, dict[str, int]]:
    """flash2's tile → bytes in and out of the SMs, and of DRAM, by the card's counters."""
    return {
        f"{run['tile'][0]} queries in a tile": {
            "sm_read": run["l2_to_sm_bytes"],
            "sm_written": run["sm_to_l2_bytes"],
            "dram_read": run["dram_read_bytes"],
            "dram_written": run["dram_write_bytes"],
        }
        for case in record.cases("tiles", causal=causal, peer="flash2", **{"pass": "fwd"})
        for run in case["runs"]
    }


def beside_form(run: Run) -> dict[str, str]:
    """A launch of ours: its bytes by the card's counters over those of the closed form."""
    form = run["closed_form"]
    return {
        "kernel": run["kernel"],
        "tile": "{} × {}".format(*run["tile"][:2]),
        "in: card / formula": f"{run['l2_to_sm_bytes'] / form['read']:.4f}",
        "out: card / formula": f"{run['sm_to_l2_bytes'] / form['written']:.4f}",
    }


def save(figures: dict[str, Figure], path: Path) -> list[Path]:
    """Write them: one to `path`, several beside it with their names added."""
    written = []
    for name, figure in figures.items():
        target = path if len(figures) == 1 else path.with_stem(f"{path.stem}_{name}")
        figure.savefig(target, format="png")
        written.append(target)
    return written


def _provenance(record: Record) -> Iterator[str]:
    data = record.data
    dirty = ", with changes that were not committed" if data.get("uncommitted_changes") else ""
    yield f"{record.path.name}, commit {(data.get('commit') or 'unknown')[:12]}{dirty}"
    if data.get("flash-attn-4"):
        dsl = data.get("nvidia-cutlass-dsl") or "unknown"
        yield f"FA4: flash-attn-4 {data['flash-attn-4']}, nvidia-cutlass-dsl {dsl}"
    for when in ("before", "after"):
        if state := data.get(when):
            yield f"{when}: {', '.join(f'{name} {value}' for name, value in state.items())}"
    if data["quick"]:
        yield "A quick run: its numbers mean nothing."
    if len(data["cases"]) < data["planned"]:
        yield f"It ended early, after {len(data['cases'])} of {data['planned']} cases."


def _section(
    record: Record,
    section: str,
    apart: Sequence[str],
    heads: dict[str, Callable[[Case], str]],
    cell: Callable[[Run], str],
    beside: Sequence[str],
    ours: str = "flash2",
) -> Iterator[RenderableType]:
    """A table for each value of `apart`; a row for each case, a column for each peer.

    A peer that ran at no size has a line instead. The last columns set ours beside some of them:
    how many times as fast, or how much less.
    """
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in record.cases(section):
        groups.setdefault(tuple(case[name] for name in apart), []).append(case)
    for values, cases in groups.items():
        nowhere = _nowhere(cases)
        named = dict.fromkeys(run["peer"] for case in cases for run in case["runs"])
        peers = [peer for peer in named if peer not in nowhere]
        lead, others = ours, beside
        if section == "speed" and "flash3" in peers:  # there is room for one column more
            lead, others = "flash3", ("sdpa-cudnn",)
        compared = [peer for peer in others if peer in peers and lead in peers]
        words = _WORDS | ({"pass": MODEL_PASSES.__getitem__} if section == "model" else {})
        what = [words[name](value) for name, value in zip(apart, values, strict=True)]
        yield Text(f"\n{section}: {', '.join([_UNIT[cell], cases[0]['dtype'], *what])}", "bold")
        table = _table()
        names = [PEERS[peer] for peer in peers] + [f"to {PEERS[peer]}" for peer in compared]
        for head in (*heads, *names):
            table.add_column("\n".join(head.split()), justify="right", no_wrap=True)
        for case in cases:
            runs = {run["peer"]: run for run in case["runs"]}
            table.add_row(
                *(head(case) for head in heads.values()),
                *(cell(runs[peer]) if peer in runs else "" for peer in peers),
                *(_ratio(cell, runs[lead], runs[peer]) for peer in compared),
            )
        yield table
        for peer, why in nowhere.items():
            yield Text(f"{PEERS[peer]}: {why}")
        for case in cases:
            for run in case["runs"]:
                if run["why"] and run["peer"] not in nowhere:
                    where = ", ".join(f"{name} {head(case)}" for name, head in heads.items())
                    yield Text(f"{PEERS[run['peer']]} at {where}: {run['why']}")


def _nowhere(cases: Sequence[Case]) -> dict[str, str]:
    """The peers that ran at no size, for one reason: it is said once, and they get no column."""
    whys: dict[str, set[str | None]] = {}
    for case in cases:
        for run in case["runs"]:
            whys.setdefault(run["peer"], set()).add(run["why"])
    return {peer: why for peer, (why, *more) in whys.items() if why and not more}


def _about_varlen(case: Case) -> str:
    lengths = case["lengths"]
    share = sum(lengths) / (len(lengths) * max(lengths))
    return (
        f"varlen: {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(lengths)} in all, drawn from seed {case['lengths_seed']}: {share:.0%} of the padded "
        "batch. FLOPs are those of real tokens. padded and one by one: SDPA's flash backend, "
        "which takes no mask. unmasked: the same, attending to the padding, not checked."
    )


def _about_model(cases: Sequence[Case]) -> Iterator[str]:
    shape = cases[0]
    yield (
        f"model: a Llama of {shape['layers']} layers, hidden size {shape['H'] * shape['D']}, with "
        f"random weights, and q / kv heads."
    )
    for first, whole in itertools.product(cases, cases):
        same = all(first[name] == whole[name] for name in ("B", "N", "H_kv"))
        if same and (first["pass"], whole["pass"]) == ("prefill", "generate"):
            more = whole["new_tokens"] - first["new_tokens"]
            yield (
                f"{whole['B']} prompts of up to {whole['N']} tokens, padded on the left. After the "
                f"first token, each takes: {_per_token(first, whole, more)}."
            )


def _per_token(first: Case, whole: Case, more: int) -> str:
    until = {run["peer"]: run["median_s"] for run in first["runs"]}
    return ", ".join(
        f"{PEERS[run['peer']]} {human_seconds((run['median_s'] - until[run['peer']]) / more)}"
        for run in whole["runs"]
        if run["median_s"] and until.get(run["peer"])
    )


def _tiles(record: Record) -> Iterator[RenderableType]:
    table = _table()
    for head in ("kernel", "D", "N", "mask", "best tile", "time", "second best", "slower by"):
        table.add_column(head, justify="left" if head in ("kernel", "mask") else "right")
    for case in record.data["cases"]:
        timed = [run for run in case["runs"] if run["median_s"] is not None]
        order = sorted(timed, key=lambda run: run["median_s"])[:2]
        cells = [str(tuple(run["tile"])) for run in order]
        gap = f"{order[1]['median_s'] / order[0]['median_s'] - 1:.1%}" if len(order) > 1 else ""
        table.add_row(
            case["section"], str(case["D"]), str(case["N"]), MASKS[case["causal"]],
            cells[0] if cells else "none", _time(order[0]) if order else "",
            cells[1] if len(cells) > 1 else "", gap,
        )  # fmt: skip
    yield table
    yield Text(
        "dkdv and dq: the time of the whole backward. For flashedu/stages/flash2_tiles.py, by "
        "capability, columns of a tile, bytes of a value, causal and N:"
    )
    capability = tuple(record.data["compute_capability"])
    kernels: dict[tuple[Any, ...], list[Case]] = {}
    for case in record.data["cases"]:
        key = (capability, case["columns"], case["item_bytes"], case["causal"], case["N"])
        kernels.setdefault(key, []).append(case)
    for key, cases in kernels.items():
        if len(cases) == 3 and all(case["best"] for case in cases):
            tiles = ", ".join(f"Tile{tuple(case['best'])}" for case in cases)
            yield Text(f"{key}: Tiles({tiles}),")


def _steps(record: Record) -> Iterator[RenderableType]:
    """A table for each head size and mask; a row for each step."""
    labels = {step["name"]: step["label"] for step in record.data["steps"]}
    groups: dict[tuple[int, bool], list[Case]] = {}
    for case in record.data["cases"]:
        groups.setdefault((case["D"], case["causal"]), []).append(case)
    for (d, causal), cases in groups.items():
        what = f"TFLOP/s, {cases[0]['dtype']}, D {d}, {MASKS[causal]}, forward"
        yield Text(f"\nsteps: {what}", "bold")
        table = _table()
        table.add_column("step")
        for case in cases:
            table.add_column(f"N\n{case['N']}", justify="right", no_wrap=True)
            table.add_column("to\nthat", justify="right", no_wrap=True)
        table.add_column("that")
        of_case = [{run["peer"]: run for run in case["runs"]} for case in cases]
        for name, first in of_case[0].items():
            cells = []
            for runs in of_case:
                ratio = runs[name]["times_as_fast_as"].get(first["against"])
                cells += [_rate(runs[name]), f"{ratio[0]:.2f}" if ratio else ""]
            against = labels.get(first["against"], "")
            table.add_row(labels.get(name, PEERS.get(name, name)), *cells, against)
        yield table
        for case in cases:
            for run in case["runs"]:
                if run["why"]:
                    label = labels.get(run["peer"], run["peer"])
                    yield Text(f"{label} at N {case['N']}: {run['why']}")
    yield Text(
        "to that: how many times as fast as the step in the last column. Each step is checked "
        "against float64 before it is timed."
    )


def _waterfalls(record: Record) -> dict[str, Figure]:
    """One for each head size and mask, at the longest N."""
    from flashedu import plots
    from flashedu.bench.steps import waterfall_of

    found = {}
    for d, causal in sorted({(case["D"], case["causal"]) for case in record.cases("steps")}):
        N = max(case["N"] for case in record.cases("steps", D=d, causal=causal))
        mask = MASKS[causal]
        bars = waterfall_of(record, D=d, causal=causal, N=N)
        title = f"From flash2 to flash3, forward, {mask}, N = {N}, D = {d}"
        found[f"steps_d{d}_{mask}"] = plots.waterfall(bars, title)
    return found


_COUNTERS = ("l2_to_sm_bytes", "sm_to_l2_bytes", "dram_read_bytes", "dram_write_bytes")


def _traffic(record: Record) -> Iterator[RenderableType]:
    """Our kernels beside closed form and interpreter, then what others launched."""
    counters = ("L2 to\nSM", "SM to\nL2", "DRAM\nread", "DRAM\nwritten")
    columns = ("kernel", "tile", "N", "form", "same", "to\nform", *counters)
    for causal in (False, True):
        table = _table()
        for head in columns:
            table.add_column(head, justify="left" if head == "kernel" else "right", no_wrap=True)
        for case in record.data["cases"]:
            for run in case["runs"] if case["causal"] == causal else ():
                if form := run["closed_form"]:
                    same = {None: "-", True: "yes"}.get(run["counted"] and run["counted"] == form)
                    table.add_row(
                        run["kernel"], "×".join(map(str, run["tile"][:2])) if run["tile"] else "",
                        _n(case), _mib(form["read"]), same or "NO",
                        f"{run['l2_to_sm_bytes'] / form['read']:.4f}",
                        *(_mib(run[name]) for name in _COUNTERS),
                    )  # fmt: skip
        yield Text(f"\nOur kernels, {MASKS[causal]}, MiB", "bold")
        yield table
    yield Text(
        "form: bytes loaded, by the closed form. same: the interpreter counted these, and those "
        "stored, exactly. L2 to SM and on: what the card counted. to form: L2 to SM, over form."
    )
    table = _table()
    for head in ("peer", "pass", "mask", "kernel", *counters):
        table.add_column(head, justify="right" if head in counters else "left", no_wrap=True)
    for case in record.data["cases"]:
        for run in case["runs"]:
            if run["closed_form"] is None:
                name = run["launched"].removeprefix("void ").replace("<unnamed>", "")
                name = name.split("<")[0].split("::")[-1]
                table.add_row(
                    PEERS[case["peer"]], case["pass"], MASKS[case["causal"]], name[:24],
                    *(_mib(run[counter]) for counter in _COUNTERS),
                )  # fmt: skip
    yield Text("\nAll peers as users call them, kernel by kernel, MiB", "bold")
    yield table
    for case in record.data["cases"]:
        if case["why"]:
            yield Text(f"{PEERS[case['peer']]}, {case['pass']}, N {case['N']}: {case['why']}")


def _sanitizer(record: Record) -> Iterator[RenderableType]:
    """A row for each tool, what it said, and what did not run."""
    table = _table()
    for head in ("tool", "launches", "with wrong input", "errors", "warnings", "planted, found"):
        table.add_column(head, justify="left" if head == "tool" else "right")
    for case in record.data["cases"]:
        planted = case["planted"].values()
        table.add_row(
            case["section"], str(len(case["runs"])),
            str(sum(run["astray"] is not None for run in case["runs"])),
            str(case["errors"]), str(case["warnings"]),
            f"{sum(told['errors'] > 0 for told in planted)} of {len(planted)}",
        )  # fmt: skip
    yield table
    for case in record.data["cases"]:
        for line in case["first"]:
            yield Text(f"{case['section']}: {line}")
        for mistake, told in case["planted"].items():
            found = told["first"][0] if told["first"] else "not found"
            yield Text(f"{case['section']}, planted {mistake}: {found}")
        for run in case["runs"]:
            if run["why"]:
                astray = f", {run['astray']}" if run["astray"] else ""
                yield Text(f"{case['section']}, {run['peer']}{astray}: {run['why']}")


SERVING = {  # head of a column → what stands in it
    "requests/s": lambda run: f"{run['requests_per_s']:.2f}",
    "tokens/s": lambda run: f"{run['output_tokens_per_s']:,.0f}",
    "batch": lambda run: f"{run['mean_batch']:.1f}",
    "first token P50 P99": lambda run: _percentiles(run["first_token_s"]),
    "latency P50 P99": lambda run: _percentiles(run["latency_s"]),
    "memory": lambda run: human_bytes(run["peak_bytes"]) if run["peak_bytes"] else "",
}


def _serving(record: Record) -> Iterator[RenderableType]:
    """A table for each rate."""
    cases = record.cases("serving")
    for rate in dict.fromkeys(case["load"]["rate_per_s"] for case in cases):
        table = _table()
        how = "all at once" if rate is None else f"{rate:g} a second"
        table.title, table.title_justify = f"serving: requests, {how}", "left"
        table.add_column("")
        for head in ("number", *SERVING):
            table.add_column(head, justify="right")
        failed = []
        for case in cases:
            if case["load"]["rate_per_s"] != rate:
                continue
            for run in case["runs"]:
                if run["why"]:
                    failed.append(Text(f"{run['peer']}, {how}: {run['why']}"))
                    continue
                number = str(case["load"]["count"])
                table.add_row(run["peer"], number, *(cell(run) for cell in SERVING.values()))
        yield table
        yield from failed
    if cases:
        case = cases[0]
        prompt, output = (
            "{least} to {most} tokens, median {median:g}".format(**case["load"][name])
            for name in ("prompt", "output")
        )
        yield Text(
            f"serving: {case['shape']}, {case['dtype']}, random weights. Prompts of {prompt}; "
            f"answers of {output}. Latency counts from arrival. batch: the mean over time."
        )


TOKENS = {  # head of a column → what stands in it
    "the same": lambda run: f"{run['same']} of {run['of']}",
    "others": lambda run: _others(run),
    "gap": lambda run: f"{run['largest_gap']:.4f}",
    "tie": lambda run: _or_dash(run["tie_within"]),
    "noise": lambda run: f"{run['noise_max']:.4f}",
    "tokens": lambda run: f"{run['tokens_compared']:,}",
}


def _tokens(record: Record) -> Iterator[RenderableType]:
    """What vLLM's backends write, two by two."""
    for case in record.cases("tokens"):
        load = case["load"]
        table = _table()
        table.title = f"tokens: {load['prompts']} prompts, {load['new_tokens']} tokens each, greedy"
        table.title_justify = "left"
        table.add_column("")
        for head in TOKENS:
            table.add_column(head, justify="right")
        for variant, runs in itertools.groupby(case["runs"], lambda run: run["variant"]):
            table.add_row(variant)
            for run in runs:
                if not run["why"]:
                    names = f"  {run['peer']}, {run['attention']}"
                    table.add_row(names, *(cell(run) for cell in TOKENS.values()))
        yield table
        for run in case["runs"]:
            if run["why"]:
                yield Text(f"tokens, {run['variant']}: {run['why']}")
        yield Text(
            f"tokens: {case['dtype']}, random weights, seed {load['seed']}. The largest of each, "
            "in log-probability: gap, how far one prefers its own token where two answers part; "
            "noise, how far they are apart before that; tie, twice the noise between FLASH_ATTN "
            "and TRITON_ATTN, above which a gap is no tie."
        )


def _others(run: Run) -> str:
    if run["same"] == run["of"]:
        return "none"
    if run["all_ties"] is None:
        return "not judged"
    return "all ties" if run["all_ties"] else "NOT TIES"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _planned(record: Record) -> Iterator[RenderableType]:
    """The memory plan beside the allocator."""
    for case in record.cases("memory"):
        table = _table()
        table.title = "memory: the plan, and the allocator's peak"
        table.title_justify = "left"
        for head in ("attention", "B", "N", "prefill", "to the plan", "decode", "to the plan"):
            table.add_column(head, justify="left" if head == "attention" else "right")
        for run in case["runs"]:
            if run["why"]:
                yield Text(f"memory, {run['peer']}: {run['why']}")
                continue
            cells = [run["peer"], str(run["B"]), _n(run)]
            for step in ("prefill_bytes", "decode_bytes"):
                cells += [human_bytes(run[step]), f"{run[step] / run[f'planned_{step}']:.4f}"]
            table.add_row(*cells)
        yield table


def _percentiles(of: dict[str, float]) -> str:
    return f"{human_seconds(of['p50'])} {human_seconds(of['p99'])}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)


def _ratio(cell: Callable[[Run], str], ours: Run, theirs: Run) -> str:
    if cell is _memory:
        both = ours["extra_bytes"] and theirs["extra_bytes"]
        ratio = theirs["extra_bytes"] / ours["extra_bytes"] if both else 0
        return f"{ratio:.{1 if ratio >= 10 else 2}f}" if both else "-"
    if theirs["peer"] not in ours["times_as_fast_as"]:
        return "-"
    middle, low, high = ours["times_as_fast_as"][theirs["peer"]]
    return f"{middle:.2f} ±{(high - low) / 2:.2f}"


def _rate(run: Run) -> str:
    return "-" if run["tflops"] is None else f"{run['tflops']:.3g}"


def _bandwidth(run: Run) -> str:
    return "-" if run["gb_per_s"] is None else f"{run['gb_per_s']:.0f}"


def _time(run: Run) -> str:
    return "-" if run["median_s"] is None else human_seconds(run["median_s"])


def _memory(run: Run) -> str:
    return "-" if run["extra_bytes"] is None else human_bytes(run["extra_bytes"])


def _n(case: Case) -> str:
    return str(case["N"])


def _b(case: Case) -> str:
    return str(case["B"])


def _groups(case: Case) -> str:
    return f"{case['H']}/{case['H_kv']}"


def _d(case: Case) -> str:
    return str(case["D"])


def _heads(case: Case) -> str:
    return str(case["B"] * case["H"])


def _mode(case: Case) -> str:
    return "call" if case["mode"] == "direct" else str(case["mode"])


_UNIT: dict[Callable[[Run], str], str] = {
    _rate: "TFLOP/s",
    _bandwidth: "GB/s",
    _time: "time",
    _memory: "peak memory beyond inputs",
}
_WORDS: dict[str, Callable[[Any], str]] = {
    "B": lambda b: f"B {b}",
    "D": lambda d: f"D {d}",
    "N": lambda n: f"N {n}",
    "causal": lambda causal: MASKS[causal],
    "pass": lambda name: PASSES[name],
}
