"""Whether two backends of vLLM write the same tokens: the comparison, and what is compared."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from flashedu import cli
from flashedu.bench import record, serving, show, tokens
from flashedu.serving import engines

NOISE = 0.01


def answer(*texts: int, gap: float = 1.0) -> dict:
    """Each token before the next one of 64 by `gap`, before others by 3 more."""
    return {
        "tokens": list(texts),
        "top": [{str(t): -0.5, str((t + 1) % 64): -0.5 - gap, "63": -4.0} for t in texts],
    }


def shifted(answers: list[dict], by: float) -> list[dict]:
    """Other log-probabilities, the same tokens."""
    answers = copy.deepcopy(answers)
    for each in answers:
        for top in each["top"]:
            top.update({token: value + by for token, value in top.items()})
    return answers


ANSWERS = [answer(3, 4, 5), answer(7, 8, 9)]


def test_equal_answers_are_the_same_and_have_no_noise() -> None:
    told = tokens.differences(ANSWERS, ANSWERS, 0.0)
    assert (told["same"], told["of"], told["tokens_compared"]) == (2, 2, 6)
    assert told["all_ties"]
    assert told["noise_max"] == told["largest_gap"] == 0
    assert told["first_differences"] == []


def test_a_gap_within_the_noise_is_a_tie_and_what_follows_is_not_compared() -> None:
    a = [answer(3, 4, 5, gap=0.015)]
    b = shifted([answer(3, 5, 40)], -NOISE)
    b[0]["top"][1]["4"] = b[0]["top"][1]["5"]  # the other two are equal
    told = tokens.differences(a, b, 2 * NOISE)
    assert told["same"] == 0
    assert told["all_ties"]
    assert told["tokens_compared"] == 1
    assert told["noise_max"] == pytest.approx(NOISE)
    assert told["largest_gap"] == pytest.approx(0.015)
    (found,) = told["first_differences"]
    assert (found["prompt"], found["at"], found["tokens"]) == (0, 1, [4, 5])
    assert found["gaps"] == pytest.approx([0.015, 0.0])


def test_a_wrong_token_is_no_tie() -> None:
    b = copy.deepcopy(ANSWERS)
    b[1]["tokens"][2] = 10  # 1 below the likeliest
    b[1]["top"][2] = {"10": -0.5, "9": -0.51}
    told = tokens.differences(ANSWERS, b, 2 * NOISE)
    assert (told["same"], told["all_ties"], told["largest_gap"]) == (1, False, 1.0)


def test_a_token_that_is_not_among_the_likeliest_is_no_tie() -> None:
    b = copy.deepcopy(ANSWERS)
    b[1]["tokens"][0] = 50
    b[1]["top"][0] = {"50": -0.5, "7": -0.5}
    told = tokens.differences(ANSWERS, b, 10.0)
    assert (told["all_ties"], told["not_among_likeliest"]) == (False, 1)
    assert told["first_differences"][0]["gaps"] == [None, 0.0]


def test_a_record_keeps_the_first_differences_only() -> None:
    a, b = [answer(3)] * 9, [answer(4)] * 9
    told = tokens.differences(a, b, None)
    assert (told["same"], told["all_ties"]) == (0, None)
    assert [x["prompt"] for x in told["first_differences"]] == [0, 1, 2]


def found(custom: list[dict], **more) -> dict:
    """What three backends told of one variant: vLLM's two differ by the noise."""
    of = dict(zip(tokens.BACKENDS, (ANSWERS, shifted(ANSWERS, NOISE), custom), strict=True))
    return {
        backend: {
            variant: {"log": backend, "answers": answers, "cached_tokens": 0}
            for variant in tokens.VARIANTS
        }
        for backend, answers in of.items()
    } | more


def test_a_wrong_backend_may_not_excuse_itself_with_its_own_noise() -> None:
    wrong = shifted(ANSWERS, 2.0)
    wrong[0]["tokens"][2], wrong[0]["top"][2] = 6, {"6": -0.5, "5": -1.5}
    *ours, own = tokens.compare("prefix caching", found(wrong))
    assert [(run["peer"], run["attention"]) for run in ours] == [
        ("FLASH_ATTN", "CUSTOM"), ("TRITON_ATTN", "CUSTOM"),
    ]  # fmt: skip
    for run in ours:
        assert run["noise_max"] > 1
        assert run["tie_within"] == pytest.approx(2 * NOISE)
        assert (run["same"], run["all_ties"]) == (1, False)
    assert (own["same"], own["all_ties"]) == (2, True)


def test_a_backend_that_fails_costs_the_others_nothing() -> None:
    failed = {v: {"log": None, "why": "no card"} for v in tokens.VARIANTS}
    runs = list(tokens.compare("prefix caching", found(ANSWERS, CUSTOM=failed)))
    assert [run["why"] for run in runs] == ["CUSTOM: no card"] * 2 + [None]
    runs = list(tokens.compare("prefix caching", found(ANSWERS, TRITON_ATTN=failed)))
    assert [run["why"] for run in runs] == [None, *["TRITON_ATTN: no card"] * 2]
    assert runs[0]["tie_within"] is None
    assert runs[0]["same"] == 2


# what is compared


def test_prompts_are_those_of_their_seed_of_all_lengths_and_share_their_beginnings() -> None:
    made = tokens.prompts()
    assert made == tokens.prompts()
    assert made != tokens.prompts(seed=1)
    assert tokens.prompts(12) == made[:12]
    lengths = {len(p) for p in made}
    assert set(tokens.LENGTHS) <= lengths
    assert max(lengths) + tokens.NEW_TOKENS <= tokens.SIZES["max_position_embeddings"]
    assert max(lengths) > tokens.STEP_TOKENS  # prefilled in chunks
    vocabulary = tokens.SIZES["vocab_size"]
    assert all(engines.PAD < t < vocabulary for p in made for t in p)
    assert len({tuple(p[:40]) for p in made[1::2]}) == len(tokens.BEGINNINGS)


def test_the_weights_are_those_that_a_llama_of_these_sizes_has() -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        wanted = LlamaForCausalLM(LlamaConfig(**tokens.SIZES)).state_dict()
    made = tokens.weights()
    assert {name: x.shape for name, x in made.items()} == {
        name: x.shape for name, x in wanted.items()
    }
    assert {x.dtype for x in made.values()} == {getattr(torch, tokens.DTYPE)}
    assert torch.equal(made["lm_head.weight"], tokens.weights()["lm_head.weight"])
    assert not torch.equal(made["lm_head.weight"], tokens.weights(1)["lm_head.weight"])


def test_the_checkpoint_reads_back_with_its_config(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tokens.write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert tokens.SIZES.items() <= config.items()
    assert config["torch_dtype"] == tokens.DTYPE
    made, wanted = safetensors.load_file(tmp_path / "model.safetensors"), tokens.weights()
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], x) for name, x in wanted.items())


def test_a_variant_that_fails_costs_no_other_its_answers(tmp_path, monkeypatch) -> None:
    """In this process; `measure` starts one for each backend."""
    pytest.importorskip("safetensors")

    def fails_with_caching(folder, backend, asked, options):
        if options["enable_prefix_caching"]:
            raise RuntimeError("no card")
        return {"answers": ANSWERS, "cached_tokens": 0}

    monkeypatch.setattr(tokens, "NEW_TOKENS", 3)
    monkeypatch.setattr(tokens, "_answers", fails_with_caching)
    tokens.main(tmp_path / "out.jsonl", "CUSTOM", 2, 0)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == list(tokens.VARIANTS)
    assert [line.get("why") for line in lines] == [None, *["RuntimeError: no card"] * 2]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([answer(3, 4, 5), answer(7, 8)], "1 of 2 answers have 3 tokens"),
        ([answer(3, 4, 5)], "1 of 2 answers have 3 tokens"),
        ([answer(3, 4, 5), answer(7, 8, 9, gap=float("nan"))], "no finite numbers"),
    ],
)
def test_answers_that_cannot_be_compared_are_a_failure_of_their_backend(
    tmp_path, monkeypatch, answers, why
) -> None:
    """A record holds no NaN: it would end the whole run."""
    pytest.importorskip("safetensors")
    monkeypatch.setattr(tokens, "NEW_TOKENS", 3)
    monkeypatch.setattr(tokens, "_answers", lambda *how: {"answers": answers, "cached_tokens": 0})
    tokens.main(tmp_path / "out.jsonl", "CUSTOM", 2, 0)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(why in line["why"] and "answers" not in line for line in lines)


# the record


def measured(monkeypatch, *, fails: str = "") -> dict:
    """The case, of programs that write nothing but their answers."""

    def program(module, arguments):
        backend, count, seed = arguments
        assert (module, count, seed) == ("flashedu.bench.tokens", "2", "0")
        lines = [{"variant": v, **({"why": "no card"} if backend == fails else
                                   {"answers": ANSWERS, "cached_tokens": 0})}
                 for v in tokens.VARIANTS]  # fmt: skip
        return lines, f"INFO Using AttentionBackendEnum.{backend} backend.", ""

    monkeypatch.setattr(serving, "program", program)
    (case,) = tokens.measure(2, on_case=lambda *told: None)
    return case


def test_the_case_has_a_run_for_each_variant_and_pair_and_reads_back(tmp_path, monkeypatch) -> None:
    case = measured(monkeypatch)
    head = dict.fromkeys(record.HEAD, "") | {"kind": "serving", "quick": False, "planned": 1}
    record.Writer(tmp_path / "serving.json", head).add(case)
    again = record.load(tmp_path / "serving.json")
    (found,) = again.cases("tokens")
    assert found == json.loads(json.dumps(case))
    assert len(found["runs"]) == 3 * len(tokens.VARIANTS)
    assert {run["same"] for run in found["runs"]} == {2}
    assert found["runs"][0]["log"] == [
        f"Using AttentionBackendEnum.{x} backend." for x in ("FLASH_ATTN", "CUSTOM")
    ]
    assert "tokens: 2 prompts" in printed(again)
    assert "2 of 2" in printed(again)


def test_a_table_says_what_is_no_tie_and_what_failed(tmp_path, monkeypatch) -> None:
    case = measured(monkeypatch, fails="TRITON_ATTN")
    case["runs"][0] |= {"same": 1, "all_ties": False}
    head = dict.fromkeys(record.HEAD, "") | {"kind": "serving", "quick": False, "planned": 1}
    record.Writer(tmp_path / "serving.json", head).add(case)
    text = printed(record.load(tmp_path / "serving.json"))
    assert "NOT TIES" in text
    assert "TRITON_ATTN: no card" in text


def printed(of: record.Record) -> str:
    from rich.console import Console

    terminal = Console(width=200)
    with terminal.capture() as captured:
        for part in show.tables(of):
            terminal.print(part)
    return captured.get()


def test_the_command_names_every_engine_and_the_comparison() -> None:
    *engines_, last = cli.bench.SERVERS.split(", ")
    assert (set(engines_), last) == (set(serving.ENGINES), tokens.TOKENS)
