"""A load on a server, and what becomes of it: requests that arrive, wait, run and end.

The load is open: a request comes when its time has come, whether or not the server is free. A slow
server builds a queue, and latency counts from arrival, so the queue is in it. (A closed load sends
the next request when one has ended; it cannot show a queue.)

`serve` drives any engine: one that runs a model, against the wall clock, or a simulated one,
against a clock that only its own steps move.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: log-normal around a median, cut off at both ends.

    Texts are like that: most are short, and a few are many times as long.
    """

    median: float
    sigma: float  # of the logarithm
    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.median <= self.most:
            raise ValueError(
                f"median must be from least to most, and least 1 or more, got "
                f"{self.least}, {self.median}, {self.most}"
            )
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma must be 0 or more, got {self.sigma}")

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """`count` of them."""
        drawn = self.median * np.exp(self.sigma * generator.standard_normal(count))
        return [int(n) for n in np.clip(np.rint(drawn), self.least, self.most)]

    def __str__(self) -> str:
        return f"{self.least} to {self.most}, median {self.median:g}, sigma {self.sigma:g}"


class Request(NamedTuple):
    """One request: when it arrives, and how many tokens come with it and are wanted of it."""

    number: int
    arrival_s: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Load:
    """`count` requests at `rate_per_s`, with gaps as in a Poisson process.

    A rate of infinity: all arrive at once, which asks for the most that an engine can do.
    """

    rate_per_s: float
    count: int
    prompt: Lengths
    output: Lengths
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate_per_s > 0:
            raise ValueError(f"rate_per_s must be more than 0, got {self.rate_per_s}")
        if self.count < 1:
            raise ValueError(f"count must be 1 or more, got {self.count}")

    def requests(self) -> list[Request]:
        """In order of arrival. The same seed gives the same ones at every rate, few or many."""
        prompts, outputs, gaps = (np.random.default_rng((self.seed, i)) for i in range(3))
        arrivals = np.cumsum(gaps.exponential(size=self.count)) / self.rate_per_s
        lengths = self.prompt.draw(self.count, prompts), self.output.draw(self.count, outputs)
        return [
            Request(i, float(arrival), prompt, new)
            for i, (arrival, prompt, new) in enumerate(zip(arrivals, *lengths, strict=True))
        ]

    def replace(self, **changes: Any) -> Load:
        """The same load with some fields changed."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """For a record: infinity is no JSON, and is None."""
        rate = self.rate_per_s if self.rate_per_s < math.inf else None
        return {**dataclasses.asdict(self), "rate_per_s": rate}


class Token(NamedTuple):
    """A token of a request, and when it was there."""

    request: int
    at_s: float


class Engine(Protocol):
    """What `serve` drives."""

    def add(self, request: Request) -> None:
        """Take a request into the queue."""

    def step(self) -> Iterable[Token]:
        """Work for a while, and say which tokens came out."""

    @property
    def running(self) -> int:
        """Requests in the batch, of the last step."""

    @property
    def cached_tokens(self) -> int:
        """Keys for which the cache has memory, used or not, of the last step."""


class Clock(Protocol):
    """Seconds since the start of a run."""

    def start(self) -> None: ...

    def now(self) -> float: ...

    def sleep_until(self, at_s: float) -> None: ...


class WallClock:
    """Real time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def sleep_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - self.now()))


class SimulatedClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep_until(self, at_s: float) -> None:
        self._now = max(self._now, at_s)


class Sample(NamedTuple):
    """What an engine held when a step had ended."""

    at_s: float
    running: int
    waiting: int  # have arrived, and have no token yet
    cached_tokens: int


@dataclass(frozen=True)
class Served:
    """What became of a load."""

    requests: Sequence[Request]
    first_token_s: Sequence[float]  # from arrival
    latency_s: Sequence[float]  # from arrival to the last token
    samples: Sequence[Sample]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        ends = (r.arrival_s + s for r, s in zip(self.requests, self.latency_s, strict=True))
        return max(ends) - self.requests[0].arrival_s

    def summary(self) -> dict[str, Any]:
        """Rates, percentiles and the mean batch."""
        new_tokens = sum(r.new_tokens for r in self.requests)
        return {
            "seconds": self.seconds,
            "requests_per_s": len(self.requests) / self.seconds,
            "output_tokens_per_s": new_tokens / self.seconds,
            "latency_s": percentiles(self.latency_s),
            "first_token_s": percentiles(self.first_token_s),
            "mean_batch": over_time(self.samples, "running"),
            "largest_batch": max(s.running for s in self.samples),
            "cached_tokens": max(s.cached_tokens for s in self.samples),
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """P50, P90 and P99: of 100 values, so many are no larger (no value in between is made up)."""
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)}


def over_time(samples: Sequence[Sample], field: str) -> float:
    """The mean over time: each sample stands for the time since the one before."""
    times = np.array([s.at_s for s in samples])
    lasted = np.diff(times, prepend=0.0)
    values = [getattr(s, field) for s in samples]
    return float(np.average(values, weights=lasted)) if lasted.sum() else float(values[-1])


class Unanswered(RuntimeError):
    """An engine has not given the tokens that were asked for."""


def serve(engine: Engine, requests: Sequence[Request], clock: Clock) -> Served:
    """Send each request at its time, and step the engine until all are answered.

    Raises Unanswered if it gives more tokens than were asked for.
    """
    arriving = deque(sorted(requests, key=lambda r: r.arrival_s))
    left: dict[int, int] = {}  # tokens still to come, of those that have arrived
    times: dict[int, list[float]] = {}
    samples = []
    clock.start()
    while arriving or left:
        while arriving and arriving[0].arrival_s <= clock.now():
            request = arriving.popleft()
            engine.add(request)
            left[request.number], times[request.number] = request.new_tokens, []
        if not left:
            clock.sleep_until(arriving[0].arrival_s)
            samples.append(Sample(clock.now(), 0, 0, 0))
            continue
        for token in engine.step():
            if token.request not in left:
                raise Unanswered(f"request {token.request} got a token that it did not ask for")
            times[token.request].append(token.at_s)
            left[token.request] -= 1
            if not left[token.request]:
                del left[token.request]
        now = clock.now()
        waiting = sum(not times[number] for number in left)
        waiting += sum(r.arrival_s <= now for r in arriving)
        samples.append(Sample(now, engine.running, waiting, engine.cached_tokens))
    return Served(
        requests,
        [times[r.number][0] - r.arrival_s for r in requests],
        [times[r.number][-1] - r.arrival_s for r in requests],
        samples,
    )


def spread(summaries: Sequence[Mapping[str, Any]], field: str) -> float:
    """How far apart repeated runs are: the largest of a field over the smallest, less 1."""
    values = [s[field] for s in summaries]
    return float(max(values) / min(values) - 1)
