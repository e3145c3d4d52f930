"""Engines that run a model, as `flashedu.serving.load.serve` drives them.

- `StaticBatches`: `generate` of Transformers on a batch of requests, padded on the left. The batch
  ends with its longest answer, and is answered then; the next one starts behind it.
- `ContinuousBatching`: Transformers' own, over a paged cache (`generate_batch`). A request joins
  when there is room and leaves when it is done.
- `VLLM`: vLLM's, with one of its attention backends, FlashEdu's among them.

All write exactly the tokens that a request asks for, greedily: models here have random weights, so
that their answers would end nowhere in particular.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashedu.serving.load import Clock, Request, Token

PAD = 0  # a token that no prompt has
SHAPES: dict[str, dict[str, Any]] = {  # configs of Llama
    "llama2-7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, vocab_size=32000, max_position_embeddings=4096,
        initializer_range=4096**-0.5,  # each product keeps the size of its rows
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=512, max_position_embeddings=512,
        initializer_range=64**-0.5,
    ),
}  # fmt: skip


def prompt_of(request: Request, vocabulary: int, seed: int) -> list[int]:
    """Random tokens; those of a request are the same in every engine."""
    generator = np.random.default_rng((seed, request.number))
    return [int(t) for t in generator.integers(PAD + 1, vocabulary, request.prompt_tokens)]


def llama(shape: str, dtype: str, device: str, seed: int = 0) -> Any:
    """A Llama of one of SHAPES, its weights random, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape], pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, dtype))  # a second copy may not fit
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(usual)


class StaticBatches:
    """`generate`, batch by batch."""

    def __init__(
        self, model: Any, attention: str, clock: Clock, *, batch: int, seed: int = 0
    ) -> None:
        if attention.startswith("FlashEdu"):
            from flashedu.integrations.transformers import register

            register()
        self.clock = clock
        self._model, self._attention = model, attention  # other engines may share the model
        self._batch, self._seed = batch, seed
        self._queue: deque[Request] = deque()
        self.forget()

    def forget(self) -> None:
        """Begin anew: numbers of requests may come again."""
        self.written: dict[int, list[int]] = {}
        self.running = self.cached_tokens = 0

    def add(self, request: Request) -> None:
        """Take a request into the queue."""
        self._queue.append(request)

    @torch.no_grad()
    def step(self) -> Iterable[Token]:
        """A whole batch, from its prompts to its longest answer."""
        batch = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
        if not batch:
            return []
        longest = max(r.prompt_tokens for r in batch)
        new_tokens = max(r.new_tokens for r in batch)
        vocabulary = self._model.config.vocab_size
        ids = torch.full((len(batch), longest), PAD)
        for row, request in zip(ids, batch, strict=True):
            prompt = prompt_of(request, vocabulary, self._seed)
            row[-request.prompt_tokens :] = torch.tensor(prompt)
        ids = ids.to(self._model.device)
        self._model.set_attn_implementation(self._attention)
        written = self._model.generate(
            input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, do_sample=False,
        )  # fmt: skip
        written = written[:, longest:].tolist()  # waits for the GPU
        for request, row in zip(batch, written, strict=True):
            self.written[request.number] = row[: request.new_tokens]
        self.running, self.cached_tokens = len(batch), len(batch) * (longest + new_tokens)
        now = self.clock.now()
        return [Token(r.number, now) for r in batch for _ in range(r.new_tokens)]

    def close(self) -> None:
        """Nothing to stop."""


class _Continuous:
    """What engines have in common whose requests come and go one by one."""

    page_size = 1

    def __init__(self, clock: Clock, vocabulary: int, seed: int) -> None:
        self.clock = clock
        self._vocabulary, self._seed = vocabulary, seed
        self.forget()

    def forget(self) -> None:
        """Begin anew: numbers of requests may come again."""
        self._prompts: dict[int, int] = {}
        self.written: dict[int, list[int]] = {}
        self.running = self.cached_tokens = 0

    def _prompt(self, request: Request) -> list[int]:
        self._prompts[request.number] = request.prompt_tokens
        self.written[request.number] = []
        return prompt_of(request, self._vocabulary, self._seed)

    def _came(self, number: int, written: Sequence[int]) -> list[Token]:
        """The tokens of a request that were not there at the last step."""
        new = len(written) - len(self.written[number])
        self.written[number] = list(written)
        return [Token(number, self.clock.now())] * new

    def _hold(self, numbers: Iterable[int]) -> None:
        """Note what is in the batch: pages are taken whole."""
        numbers, page = list(numbers), self.page_size
        tokens = (self._prompts[n] + len(self.written[n]) for n in numbers)
        self.running = len(numbers)
        self.cached_tokens = sum(-(-n // page) * page for n in tokens)


class ContinuousBatching(_Continuous):
    """Transformers' manager, which runs the model in a thread of its own.

    It admits attention by name, and FlashEdu is none of its names ("paged|eager", "sdpa" and the
    packages of flash attention, in 5.24).
    """

    PATIENCE_S = 120.0  # a step without a token, after which it is given up
    page_size = 256

    def __init__(
        self, model: Any, attention: str, clock: Clock, *, batch: int, room: int | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """`room`: keys that the cache holds; None lets the manager take what memory is free."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        super().__init__(clock, model.config.vocab_size, seed)
        model.set_attn_implementation(attention)
        blocks = None if room is None else -(-room // self.page_size)
        options = ContinuousBatchingConfig(
            max_requests_per_batch=batch, num_blocks=blocks, allow_block_sharing=False
        )
        options.auto_switch_to_flash = False  # an option since 5.18
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=PAD),
            continuous_batching_config=options,
        )
        self._manager.start()

    def add(self, request: Request) -> None:
        """Hand a request to the manager."""
        self._manager.add_request(
            self._prompt(request), str(request.number),
            max_new_tokens=request.new_tokens, streaming=True,
        )  # fmt: skip

    def step(self) -> Iterable[Token]:
        """What has come out since the last step; waits for something to come."""
        result = self._manager.get_result(timeout=self.PATIENCE_S)
        if result is None:
            raise RuntimeError(f"continuous batching gave no token for {self.PATIENCE_S:g} s")
        tokens = []
        while result is not None:
            if result.error:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            tokens += self._came(int(result.request_id), result.generated_tokens)
            waits = not self._manager.output_router.output_queue.empty()
            result = self._manager.get_result(timeout=0.1) if waits else None
        self._hold(int(n) for n in list(self._manager.batch_processor.scheduler.active_requests))
        return tokens

    def close(self) -> None:
        """Stop the thread."""
        self._manager.stop(block=True)


class VLLM(_Continuous):
    """vLLM in this process, with random weights that it makes itself."""

    def __init__(self, engine: Any, clock: Clock, *, batch: int, seed: int = 0) -> None:
        """`engine`: what `vllm_engine` made; several may share it. `batch`: the most at a time."""
        vocabulary = engine.vllm_config.model_config.get_vocab_size()
        super().__init__(clock, vocabulary, seed)
        self._engine, self._batch = engine, batch
        self.page_size = engine.vllm_config.cache_config.block_size
        self._queue: deque[Request] = deque()
        self._inside: set[int] = set()

    def add(self, request: Request) -> None:
        """Take a request into the queue."""
        self._queue.append(request)

    def step(self) -> Iterable[Token]:
        """One step of the engine: a token for each request in the batch, or a part of a prompt."""
        while self._queue and len(self._inside) < self._batch:
            self._submit(self._queue.popleft())
        tokens, ended = [], []
        for output in self._engine.step():
            number = int(output.request_id)
            tokens += self._came(number, output.outputs[0].token_ids)
            ended += [number] * output.finished
        self._hold(n for n in self._inside if self.written[n])
        self._inside.difference_update(ended)
        return tokens

    def _submit(self, request: Request) -> None:
        from vllm import SamplingParams

        new = request.new_tokens
        how = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
        prompt = {"prompt_token_ids": self._prompt(request)}
        self._engine.add_request(str(request.number), prompt, how)
        self._inside.add(request.number)

    def close(self) -> None:
        """Forget what it has not answered: others may share vLLM's engine."""
        self._engine.abort_request([str(number) for number in self._inside])
        self._inside.clear()


def vllm_engine(
    shape: str, attention: str, *, batch: int = 256, dtype: str = "bfloat16", memory: float = 0.9,
    seed: int = 0, **options: Any,
) -> Any:  # fmt: skip
    """vLLM's engine for a Llama of one of SHAPES, with random weights.

    attention: the name of a backend. memory: the part of the card that it may take. options: of
    `vllm.LLM`; prefix caching is off if they do not say otherwise.
    """
    folder = Path(tempfile.mkdtemp())
    write_config(folder, SHAPES[shape], dtype)
    return vllm(
        folder, attention, load_format="dummy", dtype=dtype, max_num_seqs=batch,
        gpu_memory_utilization=memory, seed=seed,
        **{"enable_prefix_caching": False, **options},
    ).llm_engine  # fmt: skip


def vllm(folder: str | Path, attention: str, **options: Any) -> Any:
    """vLLM's `LLM` of the model in that folder, in this process. options: of `vllm.LLM`."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_FLASHINFER_SAMPLER="0", HF_HUB_OFFLINE="1"
    )
    from vllm import LLM

    from flashedu.integrations.vllm import NAME, register

    if attention == NAME:  # vLLM finds it by itself only where FlashEdu is installed
        register()
    return LLM(model=str(folder), skip_tokenizer_init=True, attention_backend=attention, **options)


def write_config(folder: Path, sizes: Mapping[str, Any], dtype: str) -> None:
    """The config.json of a Llama of these sizes."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": dtype,
        "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None, **sizes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
