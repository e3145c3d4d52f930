"""Whether vLLM writes the same tokens with our backend as with its own.

Greedy answers to prompts of mixed lengths, from FLASH_ATTN, TRITON_ATTN and CUSTOM: without prefix
caching, with it, and with it and CUDA graphs. A step takes few tokens, so that long prompts are
prefilled in chunks, beside others that decode. Each backend is a process; all share the card.

With random weights the two likeliest tokens are sometimes as good as equal, and rounding decides:
a tie. Such ties say nothing, so they should be rare; and a wrong kernel should still be seen. With
4 layers, a vocabulary of 2048 and answers of 32, 20 of 200 answers differed on an H100, between
FLASH_ATTN and TRITON_ATTN too. A layer amplifies the noise of the one before it, and the best two
of many tokens are closer together: hence 2 layers, a vocabulary of 64 and answers of 16. More gain
of the last layer would not help, as the noise grows with it. Simulated on a CPU, with Transformers'
Llama, these weights and the first of these prompts, so many answers change:

    float16, p rounded in another way                      2 of 120, both ties
    float16 for float32                                    2 of 120, both ties
    queries do not see their own key                      42 of 50
    the last, incomplete tile of 64 keys is not seen      36 of 50
    the second page of 16 keys is not seen                40 of 50
    scores 10% too large                                  45 of 50
    K/V heads mixed                                       50 of 50

Some of the 50 prompts are too short to have such a tile or page.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from flashedu.bench import serving
from flashedu.bench.run import OnCase, sentence
from flashedu.serving import engines

TOKENS = "tokens"
DTYPE = "float16"  # bfloat16 rounds eight times as coarsely: it would tie more often
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CUSTOM")
SIZES: dict[str, int] = dict(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, vocab_size=64, max_position_embeddings=2048,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {  # options of vllm.LLM
    "no prefix caching": {"enable_prefix_caching": False, "enforce_eager": True},
    "prefix caching": {"enable_prefix_caching": True, "enforce_eager": True},
    "prefix caching, CUDA graphs": {"enable_prefix_caching": True, **serving.GRAPHS},
}
BATCH, STEP_TOKENS, CACHE_BYTES = 64, 512, 1 << 30
PROMPTS, NEW_TOKENS, LONGEST = 200, 16, 1500
LENGTHS = (1, 2, 15, 16, 17, 31, 64, 100, 257, 511, 513, 900, LONGEST)
BEGINNINGS = (40, 129, 300, 512)  # tokens; every other prompt begins with one of them
KEPT = 3  # differences of a pair, in a record
Answer = Mapping[str, Any]  # "tokens"; "top": of each, token → log-probability of the likeliest


def prompts(count: int = PROMPTS, seed: int = 0) -> list[list[int]]:
    """Random tokens, of LENGTHS; every other prompt shares its beginning with others."""
    generator, vocabulary = random.Random(seed), SIZES["vocab_size"]

    def tokens(n: int) -> list[int]:
        return [generator.randrange(engines.PAD + 1, vocabulary) for _ in range(n)]

    beginnings = [tokens(n) for n in BEGINNINGS]
    made = []
    for i in range(count):
        text = tokens(generator.choice(LENGTHS))
        made.append((generator.choice(beginnings) + text)[:LONGEST] if i % 2 else text)
    return made


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a Llama of SIZES, by their names in a checkpoint.

    Scores have a standard deviation of 2.6, so that a query sees few of its keys.
    """
    generator = torch.Generator().manual_seed(seed)
    C, F, D = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    H, H_kv = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    dtype = getattr(torch, DTYPE)

    def normal(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        x = torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)
        return x.to(dtype)

    made = {
        "model.embed_tokens.weight": normal(SIZES["vocab_size"], C, C**0.5),
        "model.norm.weight": torch.ones(C, dtype=dtype),
        "lm_head.weight": normal(SIZES["vocab_size"], C, 6.0),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": normal(H * D, C, 1.6),
            "self_attn.k_proj": normal(H_kv * D, C, 1.6),
            "self_attn.v_proj": normal(H_kv * D, C, 1.5),
            "self_attn.o_proj": normal(C, H * D, 1.5),
            "mlp.gate_proj": normal(F, C),
            "mlp.up_proj": normal(F, C),
            "mlp.down_proj": normal(C, F),
            "input_layernorm": torch.ones(C, dtype=dtype),
            "post_attention_layernorm": torch.ones(C, dtype=dtype),
        }
        made |= {f"model.layers.{layer}.{name}.weight": x for name, x in of_layer.items()}
    return made


def measure(count: int = PROMPTS, seed: int = 0, *, on_case: OnCase) -> Iterator[dict[str, Any]]:
    """One case, as it stands in a record: a run for each variant and each two backends."""
    what, start = f"tokens of {', '.join(BACKENDS)}: {count} prompts", time.monotonic()
    on_case(0, 1, what)
    with ThreadPoolExecutor(len(BACKENDS)) as pool:
        jobs = [(__name__, [backend, str(count), str(seed)]) for backend in BACKENDS]
        told = pool.map(lambda job: serving.program(*job), jobs)
    found = dict(zip(BACKENDS, map(_by_variant, told), strict=True))
    runs = [run for variant in VARIANTS for run in compare(variant, found)]
    least = min((run["same"] for run in runs if not run["why"]), default=None)
    failed = sum(bool(run["why"]) for run in runs)
    on_case(0, 1, f"{what}: {least} or more the same, {failed} of {len(runs)} pairs failed; "
                  f"took {time.monotonic() - start:.1f} s")  # fmt: skip
    yield {
        "section": TOKENS, "shape": TOKENS, "dtype": DTYPE,
        "load": {
            "prompts": count, "new_tokens": NEW_TOKENS, "seed": seed, "lengths": LENGTHS,
            "beginnings": BEGINNINGS, "step_tokens": STEP_TOKENS, "sizes": SIZES,
            "variants": VARIANTS,
        },
        "runs": runs,
    }  # fmt: skip


def _by_variant(told: tuple[list[dict[str, Any]], str, str]) -> dict[str, dict[str, Any]]:
    lines, said, why = told
    log, ended = serving.backend_line(said), {line["variant"]: line for line in lines}
    if any(line.get("why") for line in lines):
        print(said[-serving.SAID :], file=sys.stderr, flush=True)
    return {name: {"log": log, **ended.get(name, {"why": why})} for name in VARIANTS}


def compare(
    variant: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """A run for each two backends, CUSTOM's first. `found`: backend → variant → its answers.

    What counts as a tie between two is judged by the noise between vLLM's own: a backend that is
    wrong would be noisy too, and may not excuse itself.
    """
    of = {backend: found[backend][variant] for backend in BACKENDS}
    flash, triton = (of[backend].get("answers") for backend in BACKENDS[:2])
    within = 2 * max(noise(flash, triton), default=0.0) if flash and triton else None
    for peer, backend in sorted(itertools.combinations(BACKENDS, 2), key=lambda x: x[1]):
        run = {"peer": peer, "kind": TOKENS, "attention": backend, "batch": BATCH, "repeat": 0,
               "variant": variant, "log": [of[x]["log"] for x in (peer, backend)]}  # fmt: skip
        why = [f"{x}: {of[x]['why']}" for x in (peer, backend) if of[x].get("why")]
        if why:
            yield {**run, "why": "; ".join(why)}
            continue
        cached = [of[x]["cached_tokens"] for x in (peer, backend)]
        told = differences(of[peer]["answers"], of[backend]["answers"], within)
        yield {**run, "why": None, "cached_tokens": cached, **told}


def noise(a: Sequence[Answer], b: Sequence[Answer]) -> list[float]:
    """How far log-probabilities of the same token, after the same text, are apart; sorted."""
    return sorted(
        abs(s[str(token)] - u[str(token)])
        for x, y in zip(a, b, strict=True)
        for token, s, u in _until(_first(x, y), x["tokens"], x["top"], y["top"])
    )


def differences(a: Sequence[Answer], b: Sequence[Answer], within: float | None) -> dict[str, Any]:
    """Where b first leaves a, for each prompt.

    A gap is how far one of the two, where they part, prefers its own token to the other's, in
    log-probability; None if the other's is not among its likeliest. It is a tie if neither gap is
    more than `within`. With None for that, there is nothing to judge by, and `all_ties` is None.
    """
    found: list[dict[str, Any]] = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if (at := _first(x, y)) is None:
            continue
        p, q = str(x["tokens"][at]), str(y["tokens"][at])
        gaps = [
            top[own] - top[other] if other in top else None
            for top, own, other in ((x["top"][at], p, q), (y["top"][at], q, p))
        ]
        found.append({"prompt": i, "at": at, "tokens": [int(p), int(q)], "gaps": gaps})
    between = noise(a, b)
    gaps = [gap for each in found for gap in each["gaps"]]
    largest = max((gap for gap in gaps if gap is not None), default=0.0)
    ties = None if within is None else None not in gaps and largest <= within
    return {
        "same": len(a) - len(found), "of": len(a), "tokens_compared": len(between),
        "noise_median": between[len(between) // 2] if between else 0.0,
        "noise_max": between[-1] if between else 0.0, "tie_within": within,
        "largest_gap": largest, "not_among_likeliest": sum(None in x["gaps"] for x in found),
        "all_ties": ties if found else True, "first_differences": found[:KEPT],
    }  # fmt: skip


def _first(x: Answer, y: Answer) -> int | None:
    """Where two answers part; None if they do not."""
    pairs = zip(x["tokens"], y["tokens"], strict=True)
    return next((at for at, (p, q) in enumerate(pairs) if p != q), None)


def _until(end: int | None, *columns: Sequence[Any]) -> Iterable[Any]:
    return itertools.islice(zip(*columns, strict=True), end)


def write_model(folder: Path, seed: int = 0) -> None:
    """A checkpoint, as vLLM reads it. Its own dummy weights, all within ±0.001, attend to nothing.

    Needs safetensors, which vLLM brings.
    """
    from safetensors.torch import save_file

    engines.write_config(folder, SIZES, DTYPE)
    save_file(weights(seed), folder / "model.safetensors", metadata={"format": "pt"})


# the program: one backend


def main(out: Path, backend: str, count: int, seed: int) -> None:
    """A line for each variant, as it ends."""
    for name, options in VARIANTS.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_model(Path(folder), seed)
                asked = prompts(count, seed)
                entry = _answers(folder, backend, asked, options)
            _check(entry["answers"], len(asked))
        except Exception as error:
            traceback.print_exc()
            entry = {"why": sentence(error)}
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"variant": name, **entry}) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


def _check(answers: Sequence[Answer], count: int) -> None:
    """Raises ValueError for answers that cannot be compared."""
    whole = [len(a["tokens"]) == len(a["top"]) == NEW_TOKENS for a in answers]
    if len(answers) != count or not all(whole):
        raise ValueError(f"{sum(whole)} of {count} answers have {NEW_TOKENS} tokens")
    if not all(math.isfinite(x) for a in answers for top in a["top"] for x in top.values()):
        raise ValueError("some log-probabilities are no finite numbers")


def _answers(
    folder: str, backend: str, asked: list[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    llm = engines.vllm(
        folder, backend, dtype=DTYPE, max_num_seqs=BATCH, max_num_batched_tokens=STEP_TOKENS,
        max_model_len=SIZES["max_position_embeddings"], enable_chunked_prefill=True,
        gpu_memory_utilization=0.2, kv_cache_memory_bytes=CACHE_BYTES, seed=0, **options,
    )  # fmt: skip
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5)
    told = llm.generate([{"prompt_token_ids": p} for p in asked], how, use_tqdm=False)
    answers = [
        {
            "tokens": list(out.outputs[0].token_ids),
            "top": [
                {str(token): of.logprob for token, of in at.items()}
                for at in out.outputs[0].logprobs
            ],
        }
        for out in told
    ]
    cached = sum(out.num_cached_tokens or 0 for out in told)
    llm.llm_engine.engine_core.shutdown()  # the next variant needs the memory
    return {"answers": answers, "cached_tokens": cached}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
