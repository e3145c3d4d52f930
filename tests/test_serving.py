"""Loads, the servers that answer them, and the clock that says when."""

from __future__ import annotations

import io
import json
import math
import time
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console

from flashedu.bench import record, serving, show
from flashedu.memory.gpus import gpu
from flashedu.serving import engines
from flashedu.serving.load import (
    Lengths,
    Load,
    Request,
    Sample,
    SimulatedClock,
    Token,
    Unanswered,
    WallClock,
    over_time,
    percentiles,
    serve,
    spread,
)
from flashedu.serving.plan import MODELS
from flashedu.serving.simulate import ContinuousServer, Machine, StaticServer

LOAD = Load(8.0, 100, Lengths(256, 1.0, 16, 3584), Lengths(64, 0.8, 4, 512))
SEVEN = MODELS["llama2-7b"]
A100 = gpu("a100-80")


def simulated(load: Load, *, attention="flash", cache="pages", **how):
    clock, machine = SimulatedClock(), Machine(SEVEN, A100, attention, cache)
    server = StaticServer if cache == "contiguous" else ContinuousServer
    return serve(server(machine, clock, **how), load.requests(), clock)


# the load


def test_the_same_seed_gives_the_same_requests_few_or_many_at_any_rate() -> None:
    few = LOAD.replace(count=10).requests()
    assert few == LOAD.requests()[:10]
    faster = LOAD.replace(rate_per_s=16.0).requests()
    assert [r[2:] for r in faster] == [r[2:] for r in LOAD.requests()]
    assert [2 * r.arrival_s for r in faster] == pytest.approx(
        [r.arrival_s for r in LOAD.requests()]
    )
    assert LOAD.replace(seed=1).requests() != LOAD.requests()


def test_gaps_are_those_of_a_poisson_process() -> None:
    gaps = np.diff([r.arrival_s for r in LOAD.replace(count=10_001).requests()])
    # exponential: mean and standard deviation are 1/rate; 5 of their own standard errors
    assert gaps.mean() == pytest.approx(1 / 8, rel=5 / 100)
    assert gaps.std() == pytest.approx(1 / 8, rel=5 * math.sqrt(2) / 100)


def test_an_infinite_rate_brings_all_at_once() -> None:
    assert {r.arrival_s for r in LOAD.replace(rate_per_s=math.inf).requests()} == {0.0}


def test_lengths_keep_their_bounds_and_their_median() -> None:
    drawn = LOAD.prompt.draw(10_001, np.random.default_rng(0))
    assert min(drawn) >= 16
    assert max(drawn) == 3584
    # the median of n normal values has a standard error of √(π/2n)
    assert math.log(np.median(drawn) / 256) == pytest.approx(0, abs=5 * math.sqrt(math.pi / 2e4))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Lengths(5, 1.0, 8, 16), "median must be from least to most, .*got 8, 5, 16"),
        (lambda: Lengths(5, 1.0, 0, 16), "least 1 or more"),
        (lambda: Lengths(5, -1.0, 1, 16), "sigma must be 0 or more, got -1"),
        (lambda: LOAD.replace(rate_per_s=0), "rate_per_s must be more than 0, got 0"),
        (lambda: LOAD.replace(rate_per_s=math.nan), "rate_per_s must be more than 0"),
        (lambda: LOAD.replace(count=0), "count must be 1 or more, got 0"),
    ],
)
def test_a_load_that_is_none_gets_a_sentence(make, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


# serving, against a clock that stands still


class OneByOne:
    """A token a second, for the oldest request."""

    def __init__(self, clock, extra: int = 0) -> None:
        self._clock, self._extra, self._left = clock, extra, {}
        self.running, self.cached_tokens = 1, 0

    def add(self, request) -> None:
        self._left[request.number] = request.new_tokens + self._extra

    def step(self) -> list[Token]:
        number = next(iter(self._left))
        self._clock.sleep_until(self._clock.now() + 1)
        self._left[number] -= 1
        if not self._left[number]:
            del self._left[number]
        return [Token(number, self._clock.now())]


def test_latency_counts_from_arrival_with_the_queue_in_it() -> None:
    requests = [Request(0, 0.5, 1, 3), Request(1, 1.0, 1, 2), Request(2, 20.0, 1, 1)]
    clock = SimulatedClock()
    served = serve(OneByOne(clock), requests, clock)
    assert served.latency_s == [3.0, 4.5, 1.0]  # ends at 3.5, 5.5, 21
    assert served.first_token_s == [1.0, 3.5, 1.0]
    assert served.seconds == 20.5
    assert served.summary()["output_tokens_per_s"] == 6 / 20.5
    assert [s.waiting for s in served.samples] == [0, 1, 1, 1, 0, 0, 0, 0]


def test_an_idle_engine_has_an_empty_batch() -> None:
    clock = SimulatedClock()
    served = serve(OneByOne(clock), [Request(0, 0, 1, 1), Request(1, 9.0, 1, 1)], clock)
    assert [(s.at_s, s.running) for s in served.samples] == [(1, 1), (9, 0), (10, 1)]
    assert served.summary()["mean_batch"] == 0.2


def test_a_token_too_many_is_no_answer() -> None:
    clock = SimulatedClock()
    requests = [Request(0, 0, 1, 1), Request(1, 0, 1, 1)]
    with pytest.raises(Unanswered, match="request 0 got a token that it did not ask for"):
        serve(OneByOne(clock, extra=1), requests, clock)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([7.0]) == {"p50": 7, "p90": 7, "p99": 7}


def test_the_mean_over_time_weighs_each_sample_by_how_long_it_lasted() -> None:
    samples = [Sample(1.0, 4, 0, 0), Sample(4.0, 2, 0, 0)]
    assert over_time(samples, "running") == (1 * 4 + 3 * 2) / 4


def test_the_spread_is_of_the_largest_to_the_smallest() -> None:
    assert spread([{"x": 8.0}, {"x": 10.0}], "x") == 0.25


# simulated servers


def test_a_step_takes_the_weights_over_the_bandwidth_however_many_share_it() -> None:
    machine = Machine(SEVEN, A100)
    parameters = SEVEN.parameters_by_hand.n_bytes - SEVEN.vocabulary * SEVEN.hidden
    least = 2 * parameters / A100.hbm_bytes_per_s
    keys = 2 * 32 * 32 * 128 * 2  # bytes of one token's k and v
    assert machine.decode_s([1000]) == pytest.approx(least + 1000 * keys / A100.hbm_bytes_per_s)
    assert machine.decode_s([1] * 16) < 1.01 * machine.decode_s([1])


def test_a_cache_that_grows_by_concatenation_moves_three_times_as_much() -> None:
    paged, grown = (Machine(SEVEN, A100, cache=c) for c in ("pages", "contiguous"))
    weights = paged.decode_s([0])
    assert grown.decode_s([4096] * 4) - weights == pytest.approx(
        3 * (paged.decode_s([4096] * 4) - weights)
    )


def test_standard_attention_makes_a_long_prefill_longer_and_a_short_one_hardly() -> None:
    standard, flash = (Machine(SEVEN, A100, attention=a) for a in ("standard", "flash"))
    ratios = [standard.prefill_s([n]) / flash.prefill_s([n]) for n in (256, 3584)]
    assert ratios[0] < 1.05
    assert ratios[1] > 1.2


def test_a_static_batch_is_answered_when_its_longest_answer_is_done() -> None:
    requests = [Request(i, 0.0, 10, n) for i, n in enumerate((3, 30, 5, 5))]
    clock = SimulatedClock()
    server = StaticServer(Machine(SEVEN, A100, cache="contiguous"), clock, batch=2)
    served = serve(server, requests, clock)
    assert served.latency_s[0] == served.latency_s[1] < served.latency_s[2] == served.latency_s[3]
    assert served.first_token_s == served.latency_s
    assert server.cached_tokens == 2 * (10 + 5)


def test_in_a_continuous_batch_short_answers_leave_and_others_join() -> None:
    requests = [Request(i, 0.0, 10, n) for i, n in enumerate((3, 30, 5, 5))]
    clock = SimulatedClock()
    machine = Machine(SEVEN, A100)
    served = serve(ContinuousServer(machine, clock, batch=2, room=1000), requests, clock)
    assert served.latency_s[0] < served.latency_s[2] < served.latency_s[3] < served.latency_s[1]
    # tokens written, each step giving one to each request in the batch
    assert sum(s.running for s in served.samples) == 43
    assert len(served.samples) == 30


def test_a_batch_has_room_for_all_its_keys() -> None:
    served = simulated(LOAD.replace(rate_per_s=math.inf), batch=64, room=8192)
    held = [s.cached_tokens for s in served.samples]
    assert max(held) <= 8192
    assert all(n % 16 == 0 for n in held)
    assert max(s.running for s in served.samples) < 64
    with pytest.raises(ValueError, match="room must hold request"):
        simulated(LOAD, batch=64, room=16)


def test_littles_law_holds() -> None:
    """The mean number in the system is the rate times the mean time there."""
    served = simulated(LOAD, batch=8, room=10**6)
    ends = [r.arrival_s + s for r, s in zip(served.requests, served.latency_s, strict=True)]
    edges = sorted([(r.arrival_s, 1) for r in served.requests] + [(end, -1) for end in ends])
    inside, area, before = 0, 0.0, edges[0][0]
    for at_s, step in edges:
        area += inside * (at_s - before)
        inside, before = inside + step, at_s
    rate = served.summary()["requests_per_s"]
    assert area / served.seconds == pytest.approx(rate * np.mean(served.latency_s))


def test_batching_buys_more_than_attention_does() -> None:
    """At the case study's lengths: chapter 12's claim."""
    load = LOAD.replace(rate_per_s=math.inf)
    before = simulated(load, attention="standard", cache="contiguous", batch=4).summary()
    attention = simulated(load, cache="contiguous", batch=4).summary()
    batching = simulated(load, batch=16, room=10**6).summary()
    rates = [x["requests_per_s"] for x in (before, attention, batching)]
    assert rates[1] < 1.1 * rates[0]
    assert rates[2] > 4 * rates[1]


# engines that run a model

TINY = Load(math.inf, 6, Lengths(12, 0.8, 2, 40), Lengths(4, 0.6, 2, 9))


@pytest.fixture(scope="module")
def tiny():
    return engines.llama("tiny", "float32", "cpu")


@pytest.fixture(scope="module")
def alone(tiny):
    """Each prompt by itself, with eager attention."""
    tiny.set_attn_implementation("eager")
    written = {}
    for r in TINY.requests():
        ids = torch.tensor([engines.prompt_of(r, tiny.config.vocab_size, 0)])
        with torch.no_grad():
            out = tiny.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=r.new_tokens, min_new_tokens=r.new_tokens,
            )  # fmt: skip
        written[r.number] = out[0, r.prompt_tokens :].tolist()
    return written


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("StaticBatches", "eager"), ("StaticBatches", "FlashEdu"), ("ContinuousBatching", "sdpa")],
)
def test_every_engine_writes_what_each_prompt_gets_alone(tiny, alone, kind, attention) -> None:
    how = {"room": 1024} if kind == "ContinuousBatching" else {}
    engine = getattr(engines, kind)(tiny, attention, WallClock(), batch=4, **how)
    try:
        served = serve(engine, TINY.requests(), engine.clock)
    finally:
        engine.close()
    assert engine.written == alone
    assert all(0 < first <= last for first, last in
               zip(served.first_token_s, served.latency_s, strict=True))  # fmt: skip


def test_static_batches_hold_their_padding(tiny) -> None:
    engine = engines.StaticBatches(tiny, "eager", WallClock(), batch=2)
    serve(engine, [Request(0, 0, 3, 2), Request(1, 0, 30, 4)], engine.clock)
    assert (engine.running, engine.cached_tokens) == (2, 2 * (30 + 4))


# the record


def test_a_run_that_is_there_twice_is_a_repeat() -> None:
    runs = serving.plan("tiny", [("eager-4", math.inf, 8)] * 2 + [("eager-4", 2.0, 8)])
    assert [run.repeat for run in runs] == [0, 1, 0]


def test_the_case_study_names_engines_that_there_are() -> None:
    assert {name for name, *_ in serving.CASE_STUDY} <= set(serving.ENGINES)
    assert len(serving.plan("llama2-7b")) == len(serving.CASE_STUDY)


def test_thinned_samples_are_few_and_end_with_the_last() -> None:
    samples = [Sample(float(i), i, 0, 0) for i in range(1001)]
    kept = serving.thinned(samples, 10)
    assert len(kept) <= 10
    assert kept[-1] == samples[-1]
    assert serving.thinned(samples[:3]) == samples[:3]


def test_equal_tokens_have_an_equal_digest() -> None:
    assert serving.digest({0: [1, 2], 1: [3]}) == serving.digest({1: [3], 0: [1, 2]})
    assert serving.digest({0: [1, 2]}) != serving.digest({0: [1, 3]})


def test_an_engine_that_fails_costs_no_other_its_measurement(tmp_path, monkeypatch) -> None:
    """In this process; `measure` starts one for each group."""

    def fails(*args, **kwargs):
        raise RuntimeError("no card")

    monkeypatch.setattr(engines, "vllm_engine", fails)
    monkeypatch.setitem(engines.SHAPES, "tiny", engines.SHAPES["tiny"] | {"num_hidden_layers": 1})
    runs = serving.plan("tiny", [("vllm-flash", math.inf, 3), ("eager-4", math.inf, 3)])
    job = {"shape": "tiny", "dtype": "float32", "device": "cpu",
           "runs": [[i, r.engine.name, r.load.as_dict()] for i, r in enumerate(runs)]}  # fmt: skip
    serving.run_all(job, tmp_path / "out.jsonl")
    failed, ran = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (failed["number"], failed["why"]) == (0, "RuntimeError: no card")
    assert ran["number"] == 1
    assert len(ran["latencies_s"]) == 3
    assert ran["requests_per_s"] > 0


def test_a_record_of_serving_reads_back(tmp_path) -> None:
    (run,) = serving.plan("tiny", [("eager-4", math.inf, 3)])
    case = {"section": "serving", "shape": "tiny", "dtype": "float32", "load": run.load.as_dict(),
            "runs": [serving._head(run)]}  # fmt: skip
    head = dict.fromkeys(record.HEAD, "") | {"kind": "serving", "quick": False}
    writer = record.Writer(tmp_path / "serving.json", head)
    writer.add(case)
    found = record.load(tmp_path / "serving.json")
    ((load, again),) = serving.runs_of(found, "eager-4")
    assert load == run.load
    assert again == case["runs"][0]
    assert serving.runs_of(found, "eager-4", 2.0) == serving.runs_of(found, "sdpa-4") == []


SLOW = """
import json, sys, time
print("what it said", flush=True)
done = {"requests_per_s": 1.0, "output_tokens_per_s": 20.0, "seconds": 3.0, "took_s": 9.0}
for number, told in enumerate((done, {"why": "no card"})):
    with open(sys.argv[1], "a") as out:
        out.write(json.dumps({"number": number, **told}) + "\\n")
    time.sleep(3600 if number else 0)
"""


def test_what_has_ended_is_recorded_before_the_rest_has(tmp_path, monkeypatch, capsys) -> None:
    """A run that is stopped, or whose time is over, keeps what it has measured."""
    (tmp_path / "slow_engine.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(serving, "__name__", "slow_engine")
    monkeypatch.setattr(serving, "LIMIT_S", 2)
    wanted = [("eager-4", math.inf, 3), ("sdpa-4", math.inf, 3), ("flashedu-4", math.inf, 3)]
    runs = serving.plan("tiny", wanted)
    told = []
    cases = serving.measure(runs, "tiny", "float32", "cpu", on_case=lambda *x: told.append(x[2]))
    assert next(cases)["runs"][0]["requests_per_s"] == 1.0
    assert next(cases)["runs"][0]["peer"] == "sdpa-4"
    (last,) = cases
    assert last["runs"][0]["why"] == "it took more than 2 s"
    first, second, third = map(str, runs)
    ended = "1.00 requests/s, 20 tokens/s, 3.0 s; with start and warm-up 9.0 s"
    assert told == [first, f"{first}: {ended}", second, f"{second}: no card", third,
                    f"{third}: it took more than 2 s"]  # fmt: skip
    assert "what it said" in capsys.readouterr().err


def test_an_engine_that_does_not_stop_is_not_waited_for(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_engine.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(serving, "__name__", "slow_engine")
    wanted = [("eager-4", math.inf, 3), ("sdpa-4", math.inf, 3)]
    start = time.monotonic()
    cases = serving.measure(
        serving.plan("tiny", wanted), "tiny", "float32", "cpu", on_case=lambda *x: None
    )
    assert len(list(cases)) == 2
    assert time.monotonic() - start < 60  # it sleeps for an hour


def test_what_engines_share_is_made_once_and_tried_twice() -> None:
    models, made, failed = {}, [], []

    def fails():
        failed.append(1)
        raise RuntimeError("no card")

    for _ in range(3):
        serving._once(models, "llama", lambda: made.append(1))
        with pytest.raises(RuntimeError, match="no card"):
            serving._once(models, "vllm", fails)
    assert (len(made), len(failed)) == (1, 2)


class Counting:
    """An engine that fails where it is told to, and remembers what was asked of it."""

    made: ClassVar[list[Counting]] = []

    def __init__(self, fails_at: int) -> None:
        self.clock, self.fails_at, self.served, self.closed = WallClock(), fails_at, [], False
        self.made.append(self)
        self.running = self.cached_tokens = 0
        self.forget()

    def forget(self) -> None:
        self.written = {}

    def add(self, request) -> None:
        self.served.append(request)
        if len(self.served) == self.fails_at:
            raise RuntimeError("no memory")

    def step(self) -> list[Token]:
        now = self.clock.now()
        return [Token(r.number, now) for r in self.served[-3:] for _ in range(r.new_tokens)]

    def close(self) -> None:
        self.closed = True


def test_an_engine_is_warmed_up_once_and_after_a_failure_is_a_new_one(
    tmp_path, monkeypatch
) -> None:
    Counting.made = []
    monkeypatch.setattr(serving, "_start", lambda engine, job, models: Counting(11))
    runs = serving.plan("tiny", [("vllm-flash", math.inf, 3)] * 4)
    job = {"shape": "tiny", "dtype": "float32", "device": "cpu",
           "runs": [[i, r.engine.name, r.load.as_dict()] for i, r in enumerate(runs)]}  # fmt: skip
    serving.run_all(job, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # warm-up, two runs; the third fails at its second request; the fourth has a warm-up again
    assert [line.get("why") for line in lines] == [None, None, "RuntimeError: no memory", None]
    assert [len(engine.served) for engine in Counting.made] == [11, 6]
    assert all(engine.closed for engine in Counting.made)
    assert all(line["took_s"] >= 0 for line in lines)


def test_vllm_forgets_what_it_has_not_answered() -> None:
    aborted = []
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: 64),
        cache_config=SimpleNamespace(block_size=16),
    )
    shared = SimpleNamespace(vllm_config=config, abort_request=aborted.extend)
    engine = engines.VLLM(shared, WallClock(), batch=4)
    engine._inside.update({3, 5})
    engine.close()
    assert sorted(aborted) == ["3", "5"]


def test_a_memory_case_that_was_not_come_to_says_why() -> None:
    runs = serving._unplanned(6, "it took more than 2 s")
    assert [(run["attention"], run["B"], run["N"]) for run in runs] == [
        ("FlashEdu", 16, 1024), ("FlashEdu", 16, 4096),
    ]  # fmt: skip
    assert {run["why"] for run in runs} == {"it took more than 2 s"}


def test_a_record_of_serving_prints_a_table_a_rate(tmp_path) -> None:
    done = {"requests_per_s": 2.5, "output_tokens_per_s": 200.0, "mean_batch": 3.5,
            "latency_s": {"p50": 1.0, "p99": 2.0}, "first_token_s": {"p50": 0.5, "p99": 0.75},
            "peak_bytes": None}  # fmt: skip
    cases = [
        {"section": "serving", "shape": "tiny", "dtype": "float32", "load": run.load.as_dict(),
         "runs": [serving._head(run) | (done if run.engine.batch == 4 else {"why": "no card"})]}
        for run in serving.plan("tiny", [("eager-4", math.inf, 3), ("vllm-flash", 2.0, 4)])
    ]  # fmt: skip
    head = dict.fromkeys(record.HEAD, "") | {"kind": "serving", "quick": False, "planned": 3}
    found = record.Record(tmp_path / "x.json", head | {"commit": "", "before": {}, "cases": cases})
    console = Console(width=100, record=True, file=io.StringIO())
    for part in show._serving(found):
        console.print(part)
    text = console.export_text()
    assert "all at once" in text
    (row,) = (line.split() for line in text.splitlines() if line.startswith("eager-4"))
    assert row[:5] == ["eager-4", "3", "2.50", "200", "3.5"]
    assert " ".join(row[5:]) == "500 ms 750 ms 1 s 2 s"
    assert "vllm-flash, 2 a second: no card" in text
