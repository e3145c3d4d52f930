"""`flashedu plan`: the memory that serving a model takes, each term with its formula."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashedu.cli.ladder import GPU_KEYS
from flashedu.cli.options import Refused, Stopped, number, one_of, shown
from flashedu.cli.output import print_parts, rule, with_status, write, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flashedu.serving.plan import Plan

MODEL_KEYS = "llama2-7b, llama2-13b, llama2-70b, llama3-8b, mistral-7b"  # serving.plan.MODELS
ATTENTION = "standard, flash"
CACHES = "contiguous, pages"
PLAN_DTYPES = "float16, bfloat16, float32"
# What an argument of `plan` is called here.
OPTIONS = {"N": "--n", "B": "--batch", "page_size": "--page-size", "step_tokens": "--step-tokens"}


def share(value: str) -> float:
    """Parses a share of the card."""
    try:
        part = float(value)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise typer.BadParameter(f"must be above 0 and at most 1, got {shown(value)}")
    return part


def plan(
    model: Annotated[
        str,
        typer.Option(
            help=f"{MODEL_KEYS}, or as in flashedu doctor --model.", metavar="NAME_OR_PATH"
        ),
    ] = "llama2-7b",
    gpu: Annotated[
        str, typer.Option(help=f"The card: {GPU_KEYS}.", parser=one_of(GPU_KEYS), metavar="GPU")
    ] = "a100-80",
    n: Annotated[int, number("--n", "Keys that a sequence may have, prompt and answer.")] = 4096,
    batch: Annotated[int, number("--batch", "Sequences.")] = 4,
    attention: Annotated[
        str, typer.Option(help=f"{ATTENTION}.", parser=one_of(ATTENTION), metavar="NAME")
    ] = "standard",
    cache: Annotated[
        str, typer.Option(help=f"{CACHES}.", parser=one_of(CACHES), metavar="NAME")
    ] = "contiguous",
    page_size: Annotated[int, number("--page-size", "Keys in a page.")] = 16,
    used: Annotated[
        int | None, number("--used", "Keys that a sequence really has; --n if not given.")
    ] = None,
    step_tokens: Annotated[
        int | None,
        number("--step-tokens", "Tokens in a step of the prefill; the batch if not given."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"{PLAN_DTYPES}.", parser=one_of(PLAN_DTYPES), metavar="DTYPE")
    ] = "float16",
    memory: Annotated[
        float,
        typer.Option(help="Share of the card that may be used.", parser=share, metavar="SHARE"),
    ] = 1.0,
    png: Annotated[
        str | None, typer.Option("--png", help="Draw it into this file.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan the memory of a served model: weights, cache, attention, activations, largest batch.

    Each term stands beside its formula. Exit code 1 if the plan does not fit the card.
    """
    from flashedu.memory import gpu as card_of
    from flashedu.serving import plan as plans

    try:
        (sizes,) = with_status((plans.model_of(model) for _ in range(1)), "looking at the model")
    except ValueError as error:
        raise Refused(f"flashedu plan: --model: {error}") from None
    try:
        planned = plans.plan(
            sizes, card_of(gpu), N=n, B=batch, attention=attention, cache=cache,
            page_size=page_size, used=used, step_tokens=step_tokens, dtype=dtype, memory=memory,
        )  # fmt: skip
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise Refused(f"flashedu plan: {OPTIONS.get(name, f'--{name}')} {rest}") from None
    if as_json:
        write_json(planned.as_dict())
    else:
        print_parts(_report(planned))
    if png:
        _draw(planned, png)
        if not as_json:
            write(f"{png}\n")
    if not planned.fits:
        raise typer.Exit(1)


def _report(p: Plan) -> Iterable[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from flashedu.serving.plan import largest_batch
    from flashedu.units import human_bytes

    cache = f"pages of {p.page_size}" if p.cache == "pages" else "contiguous cache"
    yield Text(
        f"{p.model.name}, {p.dtype}, N {p.N}, batch {p.B}; {p.attention} attention, {cache}; "
        f"{p.gpu.name}"
    )
    table = Table(box=rule(), pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("by hand")
    parameters = p.model.parameters_by_hand
    table.add_row("parameters", f"{parameters.n_bytes / 1e9:,.3g} · 10⁹", parameters.by_hand)
    table.add_row("weights", human_bytes(p.weights_bytes), p.weights.by_hand)
    table.add_row("KV cache", human_bytes(p.kv_cache_bytes), p.kv_cache.by_hand)
    for moment in p.moments:
        style = "" if moment is p.largest_moment else "dim"
        for name, term in (("workspace", moment.attention), ("activations", moment.activations)):
            if term.n_bytes:
                what = f"{moment.name}, {name}" if moment.name != "logits" else "logits"
                table.add_row(
                    Text(what, style),
                    Text(human_bytes(term.n_bytes), style),
                    Text(term.by_hand, style),
                )
    table.add_row("decode step", human_bytes(p.decode.n_bytes), p.decode.by_hand)
    yield table
    yield Text(
        f"Peak of the prefill, weights + cache + {p.largest_moment.name}: "
        f"{human_bytes(p.prefill_bytes)}, {p.prefill_bytes / p.gpu.hbm_bytes:.1%} of the card. "
        f"Of a decode step: {human_bytes(p.decode_bytes)}."
    )
    yield Text(
        f"Idle in the cache with {p.used} of {p.N} keys used: "
        f"{human_bytes(p.idle_contiguous_bytes)} ({p.idle_contiguous:.1%}) if contiguous, "
        f"{human_bytes(p.idle_pages_bytes)} ({p.idle_pages:.1%}) in pages of {p.page_size}."
    )
    if p.model.note:
        yield Text(p.model.note, "yellow")
    batch, may = largest_batch(p), human_bytes(p.usable_bytes)
    yield Text(
        f"{'It fits' if p.fits else 'It does not fit'}: {may} may be used. "
        f"Largest batch: {batch or 'none'}.",
        "bold" if p.fits else "bold red",
    )


def _draw(p: Plan, path: str) -> None:
    """The plan, and the same with flash attention and with pages."""
    import matplotlib

    matplotlib.use("Agg")
    from flashedu import plots

    others = (p, p.replace(attention="flash"), p.replace(attention="flash", cache="pages"))
    drawn = {f"{o.attention},\n{o.cache}": o for o in others}
    fig = plots.card_memory(
        {label: o.parts for label, o in drawn.items()},
        p.gpu,
        f"{p.model.name}, {p.dtype}, N {p.N}, batch {p.B}",
        {label: o.memory for label, o in drawn.items()},
    )
    try:
        fig.savefig(Path(path), format="png")
    except OSError as error:
        raise Stopped(f"flashedu plan: --png {path}: {error.strerror}") from None
