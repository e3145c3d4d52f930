# %% [markdown]
# # 12 · Serving
#
# **Claim.** A server is fast when many requests share one read of the weights. Attention decides how many fit. We take a well-known
# case study apart, factor by factor.
#
# Before: [11 · Transformers](11_transformers.ipynb). Next: [13 · Hopper](13_hopper.ipynb).

# %%
import math
import warnings

# Before Transformers, which imports Triton, too: flashedu chooses its mode.
from flashedu.integrations.transformers import register

# Of Transformers' progress bars, which want a widget. Nothing here needs one.
warnings.filterwarnings("ignore", "IProgress not found")

# %%
import torch

from flashedu import plots
from flashedu.bench.serving import ANSWERS, PROMPTS, TINY_ANSWERS, TINY_PROMPTS
from flashedu.memory import gpu
from flashedu.notebook import source, table
from flashedu.serving import engines
from flashedu.serving.load import Load, Request, SimulatedClock, WallClock, serve
from flashedu.serving.plan import MODELS, largest_batch, plan
from flashedu.serving.simulate import ContinuousServer, Machine, StaticServer
from flashedu.stages import rung
from flashedu.units import human_bytes, human_seconds

register()
llama, a100 = MODELS["llama2-7b"], gpu("a100-80")

# %% [markdown]
# ## The case study
#
# An article that many have read ends with a server: Llama 2 with 7 billion parameters on one A100 with 80 GB, texts of up to
# N = 4096 tokens, answers of at most 512. It was moved from Transformers to **vLLM**, a program made for serving. What was
# reported:
#
# | | before | after |
# | --- | ---: | ---: |
# | memory of the card in use | 95% | 40% |
# | batch | 4 | 16 |
# | requests a second | 8 | 18.4 |
# | P99 latency | 2.8 s | 1.2 s |
#
# **Latency** is the time from a request's arrival to the last token of its answer. **P99** is the latency that 99 of 100 requests
# do not exceed. A **batch** is the set of requests that the model works on at a time.
#
# The article says what was changed: flash attention and continuous batching. It does not say which of them bought what. 2.3 times
# the requests: is that attention, is it the cache, is it batching?
#
# One law needs no measurement. If `r` requests a second come and go, and each stays `t` seconds, then `r · t` are there at a time
# (**Little's law**). Predict first: how long does a request stay in the batch, before and after?

# %%
my_prediction_before_s, my_prediction_after_s = 2.8, 1.2

# %%
for name, batch, rate in (("before", 4, 8), ("after", 16, 18.4)):
    print(f"{name}: {batch} / {rate} = {batch / rate:.2f} s in the batch")

# %% [markdown]
# So a request stayed *longer* in the batch after the move, 0.87 s in place of 0.50 s, and yet P99 fell. The rest of the
# 2.8 s was spent in the queue. A latency without the queue says nothing about a server, and here most of it was queue.
#
# ## What fits
#
# Four things share the card: the weights; the **KV cache**, keys and values of all tokens so far; what attention needs while it
# runs; and what the other layers need. `flashedu plan` computes each, and prints how. The article's server, before. Predict: how much
# of the card is in use?

# %%
my_prediction_share = 0.95

# %%
before = plan(llama, a100, N=4096, B=4, attention="standard", cache="contiguous")
table({"what": name, "bytes": human_bytes(n)} for name, n in before.parts.items())

# %%
share = before.peak_bytes / a100.hbm_bytes
print(f"you said {my_prediction_share:.0%}; it is {share:.0%}")
print("the cache:", before.kv_cache.by_hand)
print("attention:", before.moments[0].attention.by_hand)

# %% [markdown]
# Each term can be recomputed by hand. Standard attention holds S, a copy of it in float32 for the softmax, and P, of one layer at a
# time: two thirds of what is not weights. And still the card is only half full. The plan counts tensors that live. 95% is what a
# tool like `nvidia-smi` shows: PyTorch keeps freed memory for later, and a cache that grows by copying leaves many freed pieces
# behind.
#
# Now the changes, one at a time. **Pages** (chapter 10) hold the keys that there are; a contiguous cache is reserved for all
# 4096. Take texts that are half as long as they may be:

# %%
flash = before.replace(attention="flash", used=2048)
pages = flash.replace(cache="pages", step_tokens=8192)
steps = {"before": before, "flash attention": flash, "and pages": pages}
table(
    {
        "": name,
        "KV cache": human_bytes(p.kv_cache_bytes),
        "attention": human_bytes(p.attention_bytes),
        "peak": human_bytes(p.peak_bytes),
        "largest batch": largest_batch(p),
    }
    for name, p in steps.items()
)

# %%
after = pages.replace(B=16)
fig = plots.card_memory(
    {"before, batch 4": before.parts, "after, batch 4": pages.parts}
    | {"after, batch 16": after.parts},
    a100,
    "With flash attention and pages, four times the batch takes less",
)

# %% [markdown]
# *Figure 1. The memory of the article's two servers. Flash attention takes what S and P took. Pages halve the cache, as texts are
# half as long as they may be.*
#
# So attention and pages buy *room*: a larger batch. Is a larger batch faster?
#
# ## Why batches pay
#
# To write one token, the model reads all its weights once, 13 GB, and the keys and values of the text. The arithmetic is
# small. So a step takes as long as the reading takes. But the weights are read once for *all* requests of the batch. Predict: a step
# for 16 requests of 1000 keys each takes how many times as long as one for 1 request?

# %%
my_prediction_times = 16

# %%
machine = Machine(llama, a100)
one = machine.decode_s([1000])
print(f"you said {my_prediction_times}")
table(
    {
        "batch": B,
        "a step": human_seconds(machine.decode_s([1000] * B)),
        "times one": f"{machine.decode_s([1000] * B) / one:.2f}",
        "tokens a second": round(B / machine.decode_s([1000] * B)),
    }
    for B in (1, 4, 16, 64)
)

# %% [markdown]
# 16 requests take 1.6 times as long as one, and write 10 times as many tokens. This is the roofline of chapter 01 (bytes over
# bandwidth, or FLOPs over rate, whichever takes longer), and nothing was run. A real engine takes longer than that, never less.
#
# And attention? It has its part in the **prefill**, the step that reads the prompt. Predict: how much longer is a prefill with
# standard attention, at a prompt of 256 tokens, and of 3584?

# %%
my_prediction_short, my_prediction_long = 1.5, 5.0

# %%
standard = Machine(llama, a100, attention="standard")
for n, said in ((256, my_prediction_short), (3584, my_prediction_long)):
    times = standard.prefill_s([n]) / machine.prefill_s([n])
    print(f"{n} tokens: you said {said} times; {times:.2f} times")

# %% [markdown]
# Little, until texts are long. The layers of a 7B model are so large that attention is a small part of a prefill. What flash
# attention buys *this* server is room more than speed.
#
# ## Static and continuous
#
# `generate` of Transformers takes a batch, pads it, and returns when the longest answer is done. That is a **static batch**. In a
# **continuous batch**, a request leaves when it is answered, and the next one takes its place at the next step. Four requests, a
# batch of 2, answers of 3, 30, 5 and 5 tokens. Predict: how many steps does each take?

# %%
my_prediction_static, my_prediction_continuous = 43, 22

# %%
four = [Request(i, 0.0, 10, n) for i, n in enumerate((3, 30, 5, 5))]
slots = 2


def simulated(server, requests, attention="flash", cache="pages", **size):
    clock = SimulatedClock()
    machine = Machine(llama, a100, attention, cache)
    return serve(server(machine, clock, **size), requests, clock)


static = simulated(StaticServer, four, cache="contiguous", batch=slots)
continuous = simulated(ContinuousServer, four, batch=slots, room=1000)
print(f"static: you said {my_prediction_static}; 30 + 5 = {30 + 5}")
print(f"continuous: you said {my_prediction_continuous}; {len(continuous.samples)}")

# %% [markdown]
# The static batch waits for the 30, and then for the 5. In the continuous one, three short answers pass through one place while
# the long one keeps the other. This is all of it:

# %%
source(ContinuousServer.step)

# %% [markdown]
# ## The load
#
# Both servers get the same requests: they arrive at random, at a mean rate (a **Poisson process**), and do not wait for
# each other. Lengths are such as texts have, most short and a few long:

# %%
load = Load(2.0, 200, PROMPTS, ANSWERS)
print("prompts:", PROMPTS)
print("answers:", ANSWERS)
table(r._asdict() | {"arrival_s": f"{r.arrival_s:.2f}"} for r in load.requests()[:4])

# %%
few = load.replace(count=60).requests()
slow = simulated(StaticServer, few, cache="contiguous", batch=4)
quick = simulated(ContinuousServer, few, batch=16, room=100_000)
fig = plots.batch_over_time(
    {"static batches of 4": slow.samples, "continuous, up to 16": quick.samples},
    "The same requests: one server builds a queue, the other never does",
)

# %% [markdown]
# *Figure 2. Two simulated servers on an A100, 2 requests a second. Static batches are full and slow, and the queue grows behind
# them. The continuous server never has 16 requests at a time: it is done with them too soon.*
#
# ## Factor by factor
#
# Now the changes of the case study, in their order. How many requests a second can each server answer at most, if all arrive at
# once? Predict which change buys most.

# %%
my_prediction = "flash attention"

# %%
all_at_once = load.replace(rate_per_s=math.inf)


def at_most(server, count=200, **how):
    requests = all_at_once.replace(count=count).requests()
    return simulated(server, requests, **how).summary()["requests_per_s"]


contiguous = dict(server=StaticServer, cache="contiguous")
paged = dict(server=ContinuousServer, room=100_000)
predicted = {
    "static, 4, standard": at_most(batch=4, attention="standard", **contiguous),
    "static, 4, flash": at_most(batch=4, **contiguous),
    "static, 16, flash": at_most(batch=16, **contiguous),
    "continuous, 4": at_most(batch=4, **paged),
    "continuous, 16": at_most(batch=16, **paged),
    "continuous, 256": at_most(batch=256, **paged),
}
print("you said:", my_prediction)
table(
    {"server": name, "requests a second": f"{rate:.2f}"}
    for name, rate in predicted.items()
)

# %% [markdown]
# This is what bytes and FLOPs allow, not yet what engines do: `flashedu bench serving` sends the same load to real ones, on a GPU.
#
# Standard or flash: no difference. A static batch of 16 is *slower* than one of 4, at these lengths: it pads all prompts to the
# longest of 16, waits for the longest of 16 answers, and copies its cache to make it grow. What buys most is the continuous
# batch, with room for 16: that is what pages are for.

# %% [markdown]
# ## Real engines, on your machine
#
# A simulated clock knows no Python, no launches, no memory allocator. So the same requests go to real **engines**, through the same
# function `serve`, on the wall clock. First here, with a tiny Llama: `generate` with eager attention and with FlashEdu, and Transformers' own
# continuous batching, which has a paged cache. Random arrivals, an open load. Do all three write the same tokens?

# %%
tiny_load = Load(math.inf, 8, TINY_PROMPTS, TINY_ANSWERS)
model = engines.llama("tiny", "float32", "cpu")
made = {
    "static, eager": engines.StaticBatches(model, "eager", WallClock(), batch=4),
    "static, FlashEdu": engines.StaticBatches(model, "FlashEdu", WallClock(), batch=4),
}
served, written = {}, {}
for name, engine in made.items():
    served[name] = serve(engine, tiny_load.requests(), engine.clock)
    written[name] = engine.written

# %%
engine = engines.ContinuousBatching(model, "sdpa", WallClock(), batch=8, room=2048)
served["continuous"] = serve(engine, tiny_load.requests(), engine.clock)
written["continuous"] = engine.written
engine.close()
print("the same tokens:", all(x == written["continuous"] for x in written.values()))

# %% tags=["nbval-ignore-output"]
# Times of this machine.
table(
    {"engine": name, "seconds": f"{s.seconds:.2f}", "batch": s.samples[0].running}
    for name, s in served.items()
)

# %% [markdown]
# Continuous batching admits attention by name, and ours is none of the names that it knows (`paged|eager`, `sdpa`, and the packages of
# flash attention, in Transformers 5.24). So it runs with `sdpa` here. vLLM has a door for others.
#
# ## Your kernel in vLLM
#
# vLLM reads keys from pages, through a block table, as chapter 10 did. Its steps mix prompts and single tokens. So our kernel for
# it, `paged_varlen`, is chapter 10's `paged` with chapter 11's queries, packed one behind another. Which tile belongs to which
# sequence is worked out once a step, for all layers:

# %%
# Triton exists on Linux only.
has_triton = rung("flash2").missing() is None
if has_triton:
    from flashedu.stages import paged_varlen
source(paged_varlen.tiles_of_step) if has_triton else None

# %% [markdown]
# Predict: three sequences bring 5, 1 and 9 new tokens, and a tile has 4. How many tiles?

# %%
my_prediction_tiles = 4

# %%
starts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
if has_triton:
    tiles = paged_varlen.tiles_of_step(starts, 15, 4)
    used = tiles[tiles[:, 0] >= 0].tolist()
    print(f"you said {my_prediction_tiles}; {len(used)}")
    print("sequence and first query, last tiles first:", used)

# %% [markdown]
# 2 + 1 + 3 = 6. No tile holds queries of two sequences, and no number was read back from a GPU, where that would cost a wait.
#
# vLLM has one attention backend that is called `CUSTOM`, and a program can put its own there. That is all that
# `flashedu.integrations.vllm` does. What a server needs is an option:
#
# ```
# vllm serve MODEL --attention-backend CUSTOM
# ```
#
# ## What the article's numbers are
#
# | what was reported | what we find |
# | --- | --- |
# | 95% → 40% of memory | 50% of the card lives in tensors before; the rest is memory that PyTorch keeps. vLLM takes what it is told to take, whatever it needs: 40% is a setting (`--gpu-memory-utilization 0.4`), and fits 16 texts of half the length |
# | batch 4 → 16 | flash attention and pages have room for 61 |
# | 8 → 18.4 requests a second | 2.3 times. A continuous batch of 16 can answer 7 times as many as static batches of 4, at our lengths |
# | P99 2.8 → 1.2 s | most of 2.8 s was queue: Little's law leaves 0.5 s in the batch |
# | thanks to flash attention | attention gives the room; the batch gives the speed |
#
# Our load is not theirs, which is not known: how long their prompts and answers were, and how requests arrived. Our card is not
# theirs either. So compare factors, not times.
#
# ## In your own server
#
# - **vLLM** picks a backend by itself, and its log says which: `Using AttentionBackendEnum.FLASH_ATTN backend.` Look for that line.
#   `flashedu doctor --vllm` says what it would be on your machine, and why the others are not.
# - **How much memory**: `flashedu plan --model FOLDER --gpu h100 --n 4096 --batch 16 --attention flash --cache pages`. What is left
#   is cache, and cache is batch.
# - **In Transformers**, `attn_implementation` (chapter 11) turns flash attention on, and `generate_batch` is its continuous
#   batching. With `generate`, requests wait for one another whatever the attention is.
# - **Measure with an open load**, from arrival, and look at P99. A closed loop of one client shows no queue.
#
# ## Takeaway
#
# **One read of the weights serves the whole batch, so throughput is batch. Flash attention and pages make room for a batch, and
# continuous batching keeps it full. Of the case study's factor, attention's own speed is the smallest part.**
# What is still slow: the kernel itself. On this generation of GPUs it can be half as fast again, with warps that do different
# things. That is [chapter 13](13_hopper.ipynb).
#
# ## Exercises
#
# **1.** A server answers 20 requests a second, and each stays 1.5 s from arrival to the end. How many are there at a time? It runs 16 at
# a time: how long does a request wait in the queue?
#
# <details><summary>Answer</summary>
#
# 20 · 1.5 = 30 requests, of which 14 wait. By the same law they wait 14 / 20 = 0.7 s.
# </details>
#
# **2.** How many tokens a second can an A100 write at most with this model, for one request, however good its kernels are? And how many
# with 16-bit weights turned into 4-bit ones?
#
# <details><summary>Answer</summary>
#
# A step reads 13.2 GB of weights: 2039 / 13.2 = 154 a second. With 4 bits it reads a fourth, so about 600. This is why people
# quantize weights for a batch of one, and why it gains little for a batch of 256, where arithmetic is the limit.
# </details>
#
# **3.** With GQA, Llama 3 8B has 8 key heads in place of 32. How many times as many texts of 4096 keys fit beside its weights? Use
# `plan` with `MODELS["llama3-8b"]`.
#
# <details><summary>Answer</summary>
#
# ```python
# for name in ("llama2-7b", "llama3-8b"):
#     p = plan(MODELS[name], a100, N=4096, B=1, attention="flash", cache="pages", step_tokens=8192)
#     print(name, largest_batch(p))
# ```
#
# 30 and 117. A key takes a fourth of the bytes; the weights are somewhat larger.
# </details>
#
# **4.** Make the answers all of one length (`Lengths(64, 0.0, 4, 512)`), and let both simulated servers run again. What is left of the
# continuous server's advantage, and why?
#
# <details><summary>Answer</summary>
#
# A static batch then loses nothing to its longest answer. What is left is the padding of prompts, the copying of the cache, and that a
# place stays empty until the whole batch is done.
# </details>
