"""A server without a model: the same load, on a clock that its steps move by what they must cost.

A step is a row of kernels, and each takes as long as the roofline says and not less: the bytes that
it moves, at the card's bandwidth, or its FLOPs at the card's rate, whichever takes longer. Real
engines take longer; how much longer is what a measurement adds.

What a step of T tokens for R requests moves: the weights once, however many requests share them;
the keys and values of each request; in a contiguous cache that grows by concatenation, those twice
more; and for standard attention S and P, as `flashedu.memory.cost.naive` counts them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashedu.memory import cost
from flashedu.memory.cost import Cost
from flashedu.memory.gpus import GPU
from flashedu.memory.problem import ITEM_BYTES, Problem
from flashedu.serving.load import Request, SimulatedClock, Token
from flashedu.serving.plan import Model


@dataclass(frozen=True)
class Machine:
    """What decides how long a step takes: the model, the card, and how attention is done."""

    model: Model
    gpu: GPU
    attention: str = "flash"  # or "standard"
    cache: str = "pages"  # or "contiguous", grown by concatenation
    dtype: str = "float16"

    def prefill_s(self, prompts: Sequence[int]) -> float:
        """A step that computes whole prompts."""
        return self._seconds(sum(prompts), self._prefill(prompts))

    def decode_s(self, keys: Sequence[int]) -> float:
        """A step that computes a token for each request, given how many keys each has."""
        return self._seconds(len(keys), self._decode(keys))

    def mixed_s(self, prompts: Sequence[int], keys: Sequence[int]) -> float:
        """Both in one step: the weights are read once for all."""
        attention = [*self._prefill(prompts), *self._decode(keys)]
        return self._seconds(sum(prompts) + len(keys), attention)

    def _seconds(self, tokens: int, attention: Iterable[Cost]) -> float:
        """All but attention is taken for one kernel; attention's are those of one layer."""
        m = self.model
        weights = m.parameters_by_hand.n_bytes - m.vocabulary * m.hidden  # less the embeddings
        rest = Cost(hbm_read_bytes=weights * ITEM_BYTES[self.dtype], flops=2 * weights * tokens)
        layer = sum(self.gpu.bound(kernel, self.dtype).seconds for kernel in attention)
        return self.gpu.bound(rest, self.dtype).seconds + m.layers * layer

    def _prefill(self, prompts: Sequence[int]) -> list[Cost]:
        m = self.model
        found = []
        for n in prompts:
            p = Problem(H=m.H, H_kv=m.H_kv, D=m.D, Nq=n, dtype=self.dtype, causal=True)
            if self.attention == "standard":
                found += [cost.naive_scores(p), cost.naive_softmax(p), cost.naive_output(p)]
            else:
                found.append(cost.flash2(p))
        return found

    def _decode(self, keys: Sequence[int]) -> list[Cost]:
        m = self.model
        n_bytes = 2 * sum(keys) * m.H_kv * m.D * ITEM_BYTES[self.dtype]  # k and v, once
        found = [Cost(n_bytes, flops=4 * sum(keys) * m.H * m.D)]
        if self.cache == "contiguous":
            found.append(Cost(n_bytes, n_bytes))
        return found


class StaticServer:
    """Batches of `batch` requests at most, padded; answered when the longest answer is done."""

    def __init__(self, machine: Machine, clock: SimulatedClock, *, batch: int) -> None:
        self._machine, self._clock, self._batch = machine, clock, batch
        self._queue: deque[Request] = deque()
        self.running = self.cached_tokens = 0

    def add(self, request: Request) -> None:
        """Take a request into the queue."""
        self._queue.append(request)

    def step(self) -> list[Token]:
        """A whole batch."""
        batch = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
        if not batch:
            return []
        B, longest = len(batch), max(r.prompt_tokens for r in batch)
        new_tokens = max(r.new_tokens for r in batch)
        seconds = self._machine.prefill_s([longest] * B)
        for i in range(1, new_tokens):
            seconds += self._machine.decode_s([longest + i] * B)
        self._clock.sleep_until(self._clock.now() + seconds)
        self.running, self.cached_tokens = B, B * (longest + new_tokens)
        now = self._clock.now()
        return [Token(r.number, now) for r in batch for _ in range(r.new_tokens)]


class ContinuousServer:
    """A request joins when there is room for all its keys, and leaves when it is answered."""

    def __init__(
        self, machine: Machine, clock: SimulatedClock, *, batch: int, room: int,
        page_size: int = 16, prefill_tokens: int = 8192,
    ) -> None:  # fmt: skip
        """`room`: keys that the cache holds. `prefill_tokens`: of prompts, the most in a step."""
        self._machine, self._clock, self._batch = machine, clock, batch
        self._room, self._page, self._prefill = room, page_size, prefill_tokens
        self._queue: deque[Request] = deque()
        self._written: dict[Request, int] = {}
        self.running = self.cached_tokens = 0

    def add(self, request: Request) -> None:
        """Take a request into the queue."""
        self._queue.append(request)

    def step(self) -> list[Token]:
        """A token for each request in the batch; of those that join, the first."""
        old = [r.prompt_tokens + n for r, n in self._written.items()]
        joining = self._join()
        if not old and not joining:
            self._refuse_what_never_fits()
            return []
        seconds = self._machine.mixed_s([r.prompt_tokens for r in joining], old)
        self._clock.sleep_until(self._clock.now() + seconds)
        self.running = len(self._written)
        held = (r.prompt_tokens + n + 1 for r, n in self._written.items())
        self.cached_tokens = sum(self._pages(n) for n in held)
        now, tokens = self._clock.now(), []
        for request in list(self._written):
            self._written[request] += 1
            tokens.append(Token(request.number, now))
            if self._written[request] == request.new_tokens:
                del self._written[request]
        return tokens

    def _join(self) -> list[Request]:
        joining: list[Request] = []
        taken = sum(self._pages(r.prompt_tokens + r.new_tokens) for r in self._written)
        while self._queue and len(self._written) < self._batch:
            request = self._queue[0]
            taken += self._pages(request.prompt_tokens + request.new_tokens)
            prefill = sum(r.prompt_tokens for r in joining) + request.prompt_tokens
            if taken > self._room or (joining and prefill > self._prefill):
                break
            joining.append(self._queue.popleft())
            self._written[request] = 0
        return joining

    def _refuse_what_never_fits(self) -> None:
        if self._queue:
            raise ValueError(f"room must hold request {self._queue[0]}, got {self._room} keys")

    def _pages(self, n: int) -> int:
        return -(-n // self._page) * self._page
