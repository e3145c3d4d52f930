"""`flashedu plan`: its terms are those that a reader computes, and those that a Llama keeps alive.

A model is run where a tensor has a size and no numbers (the meta device), or on the CPU, while
every storage that is created and not yet freed is counted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashedu import cli
from flashedu.cli import plan as command
from flashedu.memory import gpu
from flashedu.memory.problem import ITEM_BYTES
from flashedu.serving.plan import (
    ATTENTION,
    CACHES,
    DTYPES,
    MODELS,
    SCORE_BYTES,
    Model,
    evaluate,
    largest_batch,
    model_of,
    plan,
)

A100 = gpu("a100-80")
LLAMA = MODELS["llama2-7b"]
TINY = Model("tiny", layers=3, hidden=64, H=4, H_kv=4, D=16, intermediate=160, vocabulary=96)
GQA = dataclasses.replace(TINY, name="grouped", H_kv=2)


def before(**changes: Any) -> Any:
    """The article's server."""
    return plan(LLAMA, A100, **{"N": 4096, "B": 4, **changes})


def after(**changes: Any) -> Any:
    return before(**{"B": 16, "attention": "flash", "cache": "pages", "memory": 0.4, "used": 2048,
                     "step_tokens": 8192, **changes})  # fmt: skip


def run_main(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["plan", *args])
    out, err = capsys.readouterr()
    return code, out, err


# by hand


@pytest.mark.parametrize(
    ("key", "parameters"),
    [("llama2-7b", 6_738_415_616), ("llama2-13b", 13_015_864_320), ("llama2-70b", 68_976_648_192),
     ("llama3-8b", 8_030_261_248), ("mistral-7b", 7_248_023_552)],
)  # fmt: skip
def test_parameters_are_those_of_the_published_weights(key: str, parameters: int) -> None:
    assert model_of(key).parameters_by_hand.n_bytes == parameters


def test_the_article_before_and_after_by_hand() -> None:
    p = before()
    assert p.weights_bytes == 2 * 6_738_415_616
    assert p.kv_cache_bytes == 2 * 32 * 4 * 4096 * 4096 * 2 == 8 * 2**30
    assert p.attention_bytes == 4 * 32 * 4096**2 * 8 + 4 * 4096**2 * 2
    assert p.activations_bytes == 4 * 4096 * 4 * 4096 * 2
    assert p.prefill_bytes == sum(p.parts.values())
    assert p.decode_bytes == p.weights_bytes + p.kv_cache_bytes * 65 // 64
    p = after()
    assert p.kv_cache_bytes == 16 * 2048 * 2**19
    assert (p.largest_moment.name, p.attention_bytes) == ("MLP", 0)
    assert p.activations_bytes == 8192 * (4 * 4096 + 3 * 11008) * 2
    assert p.usable_bytes == 32 * 10**9


@pytest.mark.parametrize("m", [LLAMA, GQA, MODELS["llama2-70b"]], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_what_is_printed_gives_the_number_beside_it(m: Model, dtype: str, attention: str) -> None:
    p = plan(m, A100, N=77, B=3, dtype=dtype, attention=attention, used=50, step_tokens=100)
    terms = [p.weights, p.kv_cache, p.decode, m.parameters_by_hand]
    terms += [term for moment in p.moments for term in (moment.attention, moment.activations)]
    for term in terms:
        formula = re.sub(r"[^\d+*()]", "", term.by_hand.replace("×", "*"))
        assert eval(formula) == term.n_bytes


def test_pages_are_whole_and_a_contiguous_cache_has_room_for_all() -> None:
    p = before(attention="flash", cache="pages", page_size=16, used=1001)
    assert p.kv_cache_bytes == 4 * 63 * 16 * 2**19
    assert p.idle_pages_bytes == 4 * (63 * 16 - 1001) * 2**19
    assert p.idle_contiguous_bytes == 4 * (4096 - 1001) * 2**19
    assert p.idle_contiguous == pytest.approx(1 - 1001 / 4096)
    assert p.idle_pages == pytest.approx(1 - 1001 / 1008)
    whole = before(used=1001)
    assert whole.kv_cache_bytes == whole.replace(used=4096).kv_cache_bytes
    assert whole.kv_cache_bytes - whole.idle_contiguous_bytes == 4 * 1001 * 2**19


@pytest.mark.parametrize(
    "p", [before(), after(), after(memory=1.0)], ids=["before", "after", "all"]
)
def test_the_largest_batch_fits_and_one_more_does_not(p: Any) -> None:
    batch = largest_batch(p)
    assert p.replace(B=batch).fits
    assert not p.replace(B=batch + 1).fits


def test_a_model_larger_than_the_card_has_no_batch() -> None:
    p = plan(MODELS["llama2-70b"], A100, N=16, B=1)
    assert not p.fits
    assert largest_batch(p) == 0


# against live tensors


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most that were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes, self.peak, self._known = 0, 0, set[int]()

    def add(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.n_bytes += size
                weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.n_bytes)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.n_bytes -= size

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.add(*(x for x in tree_leaves(out) if isinstance(x, torch.Tensor)))
        return out


def llama(m: Model, implementation: str, dtype: str, device: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=m.hidden, num_attention_heads=m.H, num_key_value_heads=m.H_kv, head_dim=m.D,
        num_hidden_layers=m.layers, intermediate_size=m.intermediate, vocab_size=m.vocabulary,
        attn_implementation=implementation,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


@torch.no_grad()
def counted(model: Any, B: int, N: int) -> tuple[int, int, int]:
    """Live bytes: weights, and the peaks of a prefill of N − 1 tokens and of a step after it."""
    weights, device = list(model.parameters()), next(model.parameters()).device
    buffers = list(model.buffers())
    ids = torch.ones(B, N, dtype=torch.long, device=device)
    with Live() as live:
        live.add(*weights)
        n_weights = live.n_bytes
        live.add(*buffers)
        out = model(ids[:, :-1], use_cache=True, logits_to_keep=1)
        prefill = live.peak
        name = "cache" if out.get("cache") is not None else "past_key_values"  # since 5.24
        cache = {name: out[name]}
        del out
        live.peak = live.n_bytes
        model(ids[:, -1:], use_cache=True, logits_to_keep=1, **cache)
        return n_weights, prefill, live.peak


def small_things(m: Model, B: int, N: int, b: int) -> int:
    """What a plan leaves out of a prefill: cos and sin and their frequencies, positions, tokens."""
    return 2 * N * m.D * b + 2 * m.D // 2 * b + 8 * N + 8 * B * (N + 1)


def vectors(m: Model, B: int, b: int) -> int:
    """What a plan leaves out of a decode step: hidden states and q, k, v of one token."""
    return 10 * B * m.hidden * b + 1000


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # float16 differs on CUDA, see below
@pytest.mark.parametrize("m", [TINY, GQA], ids=lambda m: m.name)
def test_the_plan_of_standard_attention_is_what_is_alive(m: Model, dtype: str) -> None:
    B, N, b = 3, 65, ITEM_BYTES[dtype]
    weights, prefill, decode = counted(llama(m, "eager", dtype, "cpu"), B, N)
    p = plan(m, A100, N=N - 1, B=B, dtype=dtype)
    assert p.weights_bytes == weights
    assert p.largest_moment.name == ("attention" if dtype == "bfloat16" else "MLP")
    assert prefill == p.prefill_bytes + small_things(m, B, N - 1, b)
    step = plan(m, A100, N=N, B=B, dtype=dtype).decode_bytes
    assert abs(decode - step) < vectors(m, B, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [TINY, GQA], ids=lambda m: m.name)
def test_the_plan_of_flash_attention_is_what_is_alive(m: Model, dtype: str) -> None:
    B, N, b = 3, 65, ITEM_BYTES[dtype]
    _, prefill, decode = counted(llama(m, "sdpa", dtype, "cpu"), B, N)
    p = plan(m, A100, N=N - 1, B=B, dtype=dtype, attention="flash")
    assert p.largest_moment.name == "MLP"
    assert prefill == p.prefill_bytes + small_things(m, B, N - 1, b)
    step = plan(m, A100, N=N, B=B, dtype=dtype, attention="flash").decode_bytes
    assert abs(decode - step) < vectors(m, B, b)


def test_the_article_s_prefill_is_what_is_alive_at_full_size() -> None:
    """On the meta device: 22 GiB beside the weights, of which none is there."""
    m = dataclasses.replace(LLAMA, layers=4)
    weights, prefill, decode = counted(llama(m, "eager", "bfloat16", "meta"), 4, 4097)
    p = plan(m, A100, N=4096, B=4, dtype="bfloat16")
    assert p.weights_bytes == weights
    assert prefill == p.prefill_bytes + small_things(m, 4, 4096, 2)
    step = plan(m, A100, N=4097, B=4, dtype="bfloat16")
    assert decode == pytest.approx(step.decode_bytes, rel=1e-3)
    assert decode - step.weights_bytes - step.kv_cache_bytes == pytest.approx(
        step.decode.n_bytes, rel=0.01
    )


def test_short_prompts_peak_in_the_mlp_where_p_is_still_held() -> None:
    _, prefill, _ = counted(llama(TINY, "eager", "bfloat16", "cpu"), 2, 9)
    p = plan(TINY, A100, N=8, B=2, dtype="bfloat16")
    assert p.largest_moment.name == "MLP"
    assert prefill == p.prefill_bytes + small_things(TINY, 2, 8, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_takes_as_many_bytes_as_on_a_card(dtype: str) -> None:
    """A tensor that pretends to be on CUDA takes CUDA's way through the softmax of eager."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Live() as live:
        s = torch.empty(2, 4, 256, 256, dtype=getattr(torch, dtype), device="cuda")
        live.add(s)
        torch.nn.functional.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype)
    assert live.peak == evaluate(SCORE_BYTES[dtype]) * 2 * 4 * 256 * 256


# models of Transformers


CONFIG = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96,
          "intermediate_size": 160, "head_dim": 16}  # fmt: skip


def folder(path: Path, kind: str, **values: object) -> str:
    (path / "config.json").write_text(json.dumps({"model_type": kind, **values}), "utf-8")
    return str(path)


def test_a_llama_s_config_gives_the_sizes_and_the_parameters_of_the_formula(tmp_path) -> None:
    pytest.importorskip("transformers")
    m = model_of(folder(tmp_path, "llama", num_key_value_heads=2, **CONFIG))
    by_formula = Model("", 2, 64, 4, 2, 16, 160, 96)
    assert m.parameters == by_formula.parameters_by_hand.n_bytes
    for name in ("layers", "hidden", "H", "H_kv", "D", "intermediate", "vocabulary", "note"):
        assert getattr(m, name) == getattr(by_formula, name)


def test_another_mlp_than_llama_s_is_noted(tmp_path) -> None:
    pytest.importorskip("transformers")
    m = model_of(folder(tmp_path, "gpt2", n_embd=64, n_head=4, n_layer=2, vocab_size=96))
    assert (m.H, m.D, m.intermediate) == (4, 16, 256)
    assert "another MLP" in m.note


def test_a_window_that_is_shorter_than_n_is_refused(tmp_path) -> None:
    pytest.importorskip("transformers")
    m = model_of(folder(tmp_path, "mistral", num_key_value_heads=2, sliding_window=32, **CONFIG))
    assert plan(m, A100, N=32, B=1).fits
    with pytest.raises(ValueError, match=r"N must be at most 32 .*, got 33"):
        plan(m, A100, N=33, B=1)


REFUSED = {
    "t5": "has an encoder",
    "mamba": "no heads of attention",
    "bert": "keeps 0 numbers of a token in its cache",
    "nothing-of-this-name": "is not here, and nothing is downloaded",
    "llama2-7": "did you mean llama2-7b?",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_a_plan_does_not_know_gets_one_line(capsys, name: str) -> None:
    pytest.importorskip("transformers")
    code, out, err = run_main(capsys, "--model", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("flashedu plan: --model: ")
    assert REFUSED[name] in err


def test_without_transformers_the_built_in_models_are_named(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for loaded in [n for n in sys.modules if n.startswith("flashedu.integrations.")]:
        monkeypatch.delitem(sys.modules, loaded)
    code, out, err = run_main(capsys, "--model", "gpt2")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "pip install" in err
    assert "llama2-7b" in err


# the command


def test_the_plan_is_printed_with_its_formulas(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run_main(capsys)
    assert (code, err) == (0, "")
    p = before()
    for term in (p.weights, p.kv_cache, p.decode, *(m.activations for m in p.moments)):
        assert term.by_hand in out
    assert "37.2 GiB, 49.9% of the card" in out
    assert "Largest batch: 10." in out
    assert "\x1b" not in out


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(capsys, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = run_main(capsys, "--batch", "1000000000")[1]
    assert max(map(len, out.splitlines())) <= columns


def test_json_has_each_term_and_how_it_is_computed(capsys) -> None:
    code, out, _ = run_main(capsys, "--json", "--attention", "flash", "--cache", "pages",
                            "--batch", "16", "--memory", "0.4", "--used", "2048",
                            "--step-tokens", "8192")  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert report["largest_batch"] == 16
    assert report["peak_bytes"] == after().peak_bytes
    assert evaluate(report["by_hand"]["kv_cache"]) == report["kv_cache_bytes"]
    assert report["peak_share_of_card"] < report["memory"]


def test_a_plan_that_does_not_fit_says_so_and_exits_with_1(capsys) -> None:
    code, out, err = run_main(capsys, "--batch", "11")
    assert (code, err) == (1, "")
    assert "It does not fit: 74.5 GiB may be used. Largest batch: 10." in " ".join(out.split())


BAD = {
    "--batch 0": "--batch must be an integer from 1 to 1000000000, got '0'",
    "--batch -4": "--batch must be an integer from 1 to 1000000000, got '-4'",
    "--n 0": "--n must be an integer from 1 to 1000000000, got '0'",
    "--page-size 0": "--page-size must be an integer from 1 to 1000000000, got '0'",
    "--memory 1.5": "--memory must be above 0 and at most 1, got '1.5'",
    "--memory 0": "--memory must be above 0 and at most 1, got '0'",
    "--memory nan": "--memory must be above 0 and at most 1, got 'nan'",
    "--gpu a100": "--gpu must be one of t4, a100-40, a100-80, rtx4090, h100, h200, b200, "
    "got 'a100'",
    "--attention eager": "--attention must be one of standard, flash, got 'eager'",
    "--dtype int8": "--dtype must be one of float16, bfloat16, float32, got 'int8'",
    "--used 5000": "--used must be from 1 to N, 4096, got 5000",
    "--cache pages": "--cache must be contiguous for standard attention, which reads no pages",
    "--gpu t4 --dtype bfloat16": "--dtype must not be bfloat16 for T4, which has none",
}


@pytest.mark.parametrize("args", BAD)
def test_a_wrong_option_gets_one_line_and_exit_code_2(capsys, args: str) -> None:
    assert run_main(capsys, *args.split()) == (2, "", f"flashedu plan: {BAD[args]}\n")


@pytest.mark.parametrize(
    "wrong", [{"N": 0}, {"B": -1}, {"page_size": 0}, {"memory": 0.0}, {"memory": 1.1},
              {"attention": "eager"}, {"cache": "paged"}, {"dtype": "int8"}, {"used": 0},
              {"step_tokens": 0}],
    ids=str,
)  # fmt: skip
def test_a_wrong_argument_gets_a_sentence_that_names_it(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be "):
        before(**wrong)


def test_the_known_names_are_those_of_the_package() -> None:
    assert command.MODEL_KEYS.split(", ") == list(MODELS)
    assert command.ATTENTION.split(", ") == list(ATTENTION)
    assert command.CACHES.split(", ") == list(CACHES)
    assert command.PLAN_DTYPES.split(", ") == list(DTYPES)


def test_the_figure_is_written_or_one_line_says_why_not(capsys, tmp_path) -> None:
    code, out, _ = run_main(capsys, "--png", str(tmp_path / "a.png"))
    assert code == 0
    assert out.endswith("a.png\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run_main(capsys, "--json", "--png", str(tmp_path / "no" / "a.png"))
    assert (code, err.count("\n")) == (1, 1)


def test_bars_of_the_figure_are_as_long_as_the_bytes(no_figure_stays_open) -> None:
    from flashedu import plots

    drawn = {"before": before(), "after": after()}
    parts = {label: p.parts for label, p in drawn.items()}
    fig = plots.card_memory(parts, A100, "title", {"before": 1.0, "after": 0.4})
    widths = [bar.get_width() * 2**30 for bar in fig.axes[0].patches]
    assert widths == pytest.approx([n for p in drawn.values() for n in p.parts.values()])
    marks = [line.get_xdata()[0] for line in fig.axes[0].lines]
    assert marks == pytest.approx([32e9 / 2**30, 80e9 / 2**30])


def test_dots_of_the_figure_are_the_allocators_peaks(no_figure_stays_open) -> None:
    from flashedu import plots

    peaks = {"after": 34 * 2**30}
    parts = {"before": before().parts, "after": after().parts}
    fig = plots.card_memory(parts, A100, "title", peaks=peaks)
    (dot,) = (line for line in fig.axes[0].lines if line.get_marker() == "o")
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([34.0], [1])
    assert "allocator's peak" in [text.get_text() for text in fig.legends[0].get_texts()]


def test_a_built_in_plan_needs_no_torch() -> None:
    code = (
        "import sys; from flashedu import cli; cli.main(['plan', '--json']); "
        "sys.exit(' '.join(m for m in ('torch', 'transformers') if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_cap_on_a_step_stays_when_the_batch_grows() -> None:
    """Also where the batch that it was stated for is smaller than the cap."""
    small, large = (
        plan(MODELS["llama3-8b"], A100, N=4096, B=B, attention="flash", cache="pages",
             step_tokens=8192) for B in (1, 16)
    )  # fmt: skip
    assert small.replace(B=16) == large
    assert largest_batch(small) == largest_batch(large) > 100
