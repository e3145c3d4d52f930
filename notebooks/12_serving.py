# %% [markdown]
# # 12 · Serving
#
# **Claim.** A server is fast when many requests share one read of the weights. Attention decides how many fit. We take a well-known
# case study apart, factor by factor: predicted first, then measured.
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
from flashedu.bench import record as records
from flashedu.bench.serving import (
    ANSWERS,
    PROMPTS,
    TINY_ANSWERS,
    TINY_PROMPTS,
    runs_of,
)
from flashedu.memory import gpu
from flashedu.notebook import source, table
from flashedu.serving import engines
from flashedu.serving.load import (
    Load,
    Request,
    SimulatedClock,
    WallClock,
    serve,
    spread,
)
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
# So in the mean a request stayed *longer* in the batch after the move, 0.87 s in place of 0.50 s, and yet P99 fell. P99 holds what
# a mean hides: the queue, and batches that wait for one long answer. How much of each, the article does not say. We can find out.
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
# time: two thirds of what is not weights. And still the card is only half full. The plan counts tensors that live. 95% may be what a
# tool like `nvidia-smi` shows: PyTorch keeps freed memory for later, and a cache that grows by copying leaves many freed pieces
# behind. We come back to that.
#
# Now the changes, one at a time. **Pages** (chapter 10) hold the keys that there are; a contiguous cache is reserved for all
# 4096. Take texts that are half as long as they may be. (Attention's part is that at the moment of the peak, which with flash attention
# is in the MLP:)

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
# *Figure 1. The memory of the article's two servers. Flash attention frees what S and P took. Pages halve the cache, as texts are
# half as long as they may be. (`step_tokens`: a server with pages reads long prompts in pieces of so many tokens.)*
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


def simulated(server, requests, attention="flash", cache="pages", card=a100, **size):
    clock = SimulatedClock()
    machine = Machine(llama, card, attention, cache)
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
# each other's answers (an **open load**). Lengths are such as texts have, most short and a few long:

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
# *Figure 2. Two simulated servers on an A100, 2 requests a second. Static batches are slow, and soon full, and the queue grows behind
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
# This is what bytes and FLOPs allow, not yet what engines do.
#
# Standard or flash: no difference. A static batch of 16 is *slower* than one of 4, at these lengths: it pads all prompts to the
# longest of 16, waits for the longest of 16 answers, and copies its cache to make it grow. What buys most is the continuous
# batch, with room for 16: that is what pages are for.

# %% [markdown]
# ## Real engines, on your machine
#
# A simulated clock knows no Python, no launches, no memory allocator. So the same requests go to real **engines**, through the same
# function `serve`, on the wall clock. First here, with a tiny Llama: `generate` with eager attention and with FlashEdu, and Transformers' own
# continuous batching, which has a paged cache. All eight requests come at once. Do all three write the same tokens?

# %%
torch.set_num_threads(1)  # for so small a model, threads would wait for one another
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
# So small a model is all Python: these times say nothing of attention. Continuous batching admits attention by name, and ours is none of the names that it knows (`paged|eager`, `sdpa`, and the packages of
# flash attention, in Transformers 5.24). So it runs with `sdpa` here. vLLM has a door for others; we come to it.
#
# ## As recorded: memory
#
# Now a model of Llama 2's size on a GPU, with random weights: a server spends no less time on random words. `flashedu bench serving`
# measures all that follows. First the memory. A batch of prompts, all of N tokens, goes through Transformers. The plan says what is
# needed, and PyTorch's allocator says what was. Predict: by how many percent does the plan miss?

# %%
my_prediction_miss_percent = 5

# %%
in_memory = records.latest("memory", kind="serving")
print(in_memory.label)
cases = [r for x in in_memory.cases("memory") for r in x["runs"] if not r["why"]]
misses = [run["prefill_bytes"] / run["planned_prefill_bytes"] - 1 for run in cases]
print(f"you said {my_prediction_miss_percent}%; {max(map(abs, misses)):.1%} at most")

# %%
table(
    {
        "attention": run["attention"],
        "batch": run["B"],
        "N": run["N"],
        "planned": human_bytes(run["planned_prefill_bytes"]),
        "allocator's peak": human_bytes(run["prefill_bytes"]),
        "held by PyTorch": human_bytes(run["reserved_bytes"]),
    }
    for run in cases
)

# %%
card = gpu("h200" if "H200" in in_memory.data["card"] else "h100")
standard_4 = plan(llama, card, N=4096, B=4, attention="standard", dtype="bfloat16")
flash_4 = standard_4.replace(attention="flash")
plans = {("eager", 4): standard_4, ("FlashEdu", 4): flash_4}
plans["FlashEdu", 16] = flash_4.replace(B=16)
peaks = {(r["attention"], r["B"]): r["prefill_bytes"] for r in cases if r["N"] == 4096}
names = {key: "{}, batch {}".format(*key) for key in plans}
fig = plots.card_memory(
    {names[key]: p.parts for key, p in plans.items()},
    card,
    "The plan is what the allocator reports",
    peaks={names[key]: peaks[key] for key in plans if key in peaks},
)

# %% [markdown]
# *Figure 3. Prompts of 4096 tokens, before and after. Bars are planned, dots were measured.*
#
# The last column of the table is what PyTorch holds, tensors included. It does not give memory back: the cache of `generate` grows by copying, and leaves
# pieces of all sizes. A tool shows what PyTorch holds. For the server of before that is 45.9 GiB, 58% of this card's 79.2 GiB, not
# 95%; but look at the last row: tensors take 50.6 GiB, and a tool would show 75.3 GiB, 95% of the card. Pages end it, as all are of one size.
#
# (The server of before has 41.2 GiB here and 37.2 GiB in Figure 1. There numbers are float16, here bfloat16, of which the
# softmax makes a float32 copy of S first.)
#
# ## As recorded: factor by factor
#
# Now the loads, all requests at once, on real engines. Each step from the server of before to that of after changes as little as can be:
# the attention; then pages and a continuous batch, at the same size, which takes another engine; then the size. Slow engines got fewer
# requests. Beside each stands the simulation, of this card and the same requests. Predict: which server comes closest to what its bytes and FLOPs allow?

# %%
my_prediction_closest = "static, 4, standard"

# %%
measured = records.latest("serving", kind="serving")
card = gpu("h200" if "H200" in measured.data["card"] else "h100")
print(measured.label)
print("Transformers", measured.data["transformers"], "and vLLM", measured.data["vllm"])
eager = contiguous | {"attention": "standard"}
servers = {
    "static, 4, standard": ("eager-4", eager | {"batch": 4}),
    "static, 4, flash": ("flashedu-4", contiguous | {"batch": 4}),
    "vLLM, 4": ("vllm-flash-4", paged | {"batch": 4}),
    "vLLM, 16": ("vllm-flash-16", paged | {"batch": 16}),
    "vLLM, 256": ("vllm-flash", paged | {"batch": 256}),
}
other_ways = {
    "static, 16, flash": ("flashedu-16", contiguous | {"batch": 16}),
    "Transformers, continuous, 16": ("continuous-16", paged | {"batch": 16}),
}


# %%
def predicted_and_measured(peer, how):
    load, run = runs_of(measured, peer)[0]
    served = simulated(requests=load.requests(), card=card, **how)
    return served.summary()["requests_per_s"], run["requests_per_s"]


rates = {
    name: predicted_and_measured(*what)
    for name, what in (servers | other_ways).items()
    if runs_of(measured, what[0])  # an engine that failed has no such run
}
closest = max(rates, key=lambda name: rates[name][1] / rates[name][0])
print(f"you said: {my_prediction_closest}; it is: {closest}")
table(
    {
        "server": name,
        "requests": runs_of(measured, (servers | other_ways)[name][0])[0][0].count,
        "predicted, a second": f"{could:.2f}",
        "measured": f"{did:.2f}",
        "reached": f"{did / could:.0%}",
    }
    for name, (could, did) in rates.items()
)

# %%
fig = plots.factors(
    {name: rates[name] for name in servers if name in rates},
    "The engine and the size of the batch gain; attention gains nothing",
)

# %% [markdown]
# *Figure 4. Requests a second, all arriving at once. A prediction is what bytes and FLOPs allow on this card. Each bar has its ratio to
# the one above.*
#
# The last two ratios are nearly as predicted: the more requests share one read of the weights, the more are answered. The first two are not.
#
# - **Attention** was to change nothing, and the server with FlashEdu is *slower*, × 0.77. Look at the column "reached": `generate`
#   comes to a sixth of what bytes and FLOPs allow, with FlashEdu to an eighth. Each of its steps is hundreds of launches from Python, and the GPU waits for
#   them. FlashEdu has more to do in Python than eager has, in each of 32 layers (chapter 11).
# - **Pages, a continuous batch, another engine** were to give × 2.55, and gave × 11.7. So most of this factor is neither pages nor
#   batching: it is the engine. vLLM's steps are not launched one by one from Python: it records the launches of a step once, as a
#   CUDA graph, and replays them. (No run here has vLLM without its graphs, so how much they alone are worth is not told.)
#
# The two other servers say the same. Transformers' own continuous batch, of up to 16, goes step by step from Python: 0.87
# requests a second, with 5.4 in the batch in the mean, where vLLM answers 13.7, with 11.9. And a static batch of 16 was to be 1.1 times as fast as one of 4. It is 2.7 times as
# fast, as 16 requests share the launches, too.
#
# ## How long users wait
#
# Now requests that arrive at random. The server of before gets one every four seconds, less than it can answer; vLLM
# gets 18.4 a second, the article's rate after the move. Predict P99 of each:

# %%
my_prediction_before_s, my_prediction_after_s = 2.8, 1.2

# %%
_, calm = runs_of(measured, "eager-4", 0.25)[0]
_, busy = runs_of(measured, "vllm-flash", 18.4)[0]
before_and_after = {
    "before: static, 4, 0.25 a second": calm,
    "after: vLLM, 18.4 a second": busy,
}
said = iter((my_prediction_before_s, my_prediction_after_s))
table(
    {
        "": name,
        "requests": len(run["latencies_s"]),
        "answered a second": f"{run['requests_per_s']:.2f}",
        "mean batch": f"{run['mean_batch']:.1f}",
        "P50": human_seconds(run["latency_s"]["p50"]),
        "P99": human_seconds(run["latency_s"]["p99"]),
        "you said": human_seconds(next(said)),
    }
    for name, run in before_and_after.items()
)

# %%
fig = plots.waiting_times(
    {name: run["latencies_s"] for name, run in before_and_after.items()},
    "74 times the requests, and users wait less than half as long",
)

# %% [markdown]
# *Figure 5. Latency from arrival, queue included. The dots are P50, the median, and P99; of so few requests as before, P99 is the longest.*

# %%
fig = plots.batch_over_time(
    {name: run["samples"] for name, run in before_and_after.items()},
    "A request waits for a static batch, even where there is room",
)

# %% [markdown]
# *Figure 6. The same two runs. A request that comes while a static batch runs waits for its end, even if there is room. vLLM's
# rate in the table is below 18.4, as it counts the time until the last answer has ended.*
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
# 2 + 1 + 3 = 6. No tile holds queries of two sequences. Nothing is read back from the GPU, which would cost a wait.
#
# vLLM has one attention backend that is called `CUSTOM`, and a program can put its own there. That is all that
# `flashedu.integrations.vllm` does. What a server needs is an option:
#
# ```
# vllm serve MODEL --attention-backend CUSTOM
# ```
#
# Is it right? Prompts of mixed lengths, many with the same beginning, are answered greedily by a small model in float16, with two of
# vLLM's own backends and with ours. With **prefix caching**, the keys of a beginning that was seen before are not computed again. A step
# takes few tokens, so long prompts come in chunks. Two backends round differently. Where the two likeliest tokens are as good as equal,
# rounding then decides: a **tie**, which says nothing of right and wrong. We call it one within twice the largest distance between the
# log-probabilities of vLLM's own two backends. Predict: of 200 answers, how many does our kernel write as FLASH_ATTN does?

# %%
my_prediction_same = 200

# %%
compared = records.latest("tokens", kind="serving")
print(compared.label)
(case,) = compared.cases("tokens")
pairs = [run for run in case["runs"] if not run["why"]]
ours = [r for r in pairs if (r["peer"], r["attention"]) == ("FLASH_ATTN", "CUSTOM")]
same = ", ".join(f"{run['same']} of {run['of']}" for run in ours)
print(f"you said {my_prediction_same}; {same}")
judged = {True: "all ties", False: "NOT ALL TIES", None: "not judged"}
table(
    {
        "vLLM with": run["variant"],
        "backends": f"{run['peer']}, {run['attention']}",
        "the same": f"{run['same']} of {run['of']}",
        "others": "none" if run["same"] == run["of"] else judged[run["all_ties"]],
        "largest gap": f"{run['largest_gap']:.4f}",
        "tie, up to": "-" if run["tie_within"] is None else f"{run['tie_within']:.4f}",
    }
    for run in pairs
)

# %%
print("\n".join(sorted({line for run in ours for line in run["log"]})))
for run in ours:
    print(f"{run['variant']}: from the prefix cache {run['cached_tokens']} tokens")
    for parted in run["first_differences"]:
        gaps = ["-" if gap is None else f"{gap:.4f}" for gap in parted["gaps"]]
        where = "  prompt {prompt}, token {at}: {tokens[0]} or {tokens[1]}"
        print(where.format(**parted), *gaps, sep=", ")

# %% [markdown]
# The first lines are vLLM's log: each backend ran, and not something in its place. The others are the first prompts where the two
# part, and how far each prefers its own token, in log-probability.
#
# 197 of 200 answers are the same, without prefix caching, with it, and with CUDA graphs. The other three part at ties: the gap is
# 0.008, about a fourth of what counts as one. vLLM's own two backends part at three prompts, too, TRITON_ATTN and ours at two or six.
#
# And is it fast? The 7B model again, 256 requests all at once, twice for each backend. The spread is
# how far apart the two runs are:

# %%
backends = ("vllm-flash", "vllm-triton", "vllm-flashedu")
twice = {peer: [run for _, run in runs_of(measured, peer)] for peer in backends}
tokens_per_s = {
    peer: sum(run["output_tokens_per_s"] for run in runs) / len(runs)
    for peer, runs in twice.items()
    if runs
}
table(
    {
        "backend": peer,
        "tokens a second": ", ".join(
            f"{run['output_tokens_per_s']:.0f}" for run in twice[peer]
        ),
        "spread": f"{spread(twice[peer], 'output_tokens_per_s'):.1%}",
    }
    | {f"to {other}": f"{rate / tokens_per_s[other]:.2f}" for other in tokens_per_s}
    for peer, rate in tokens_per_s.items()
)

# %% [markdown]
# And at the case study's 18.4 requests a second:

# %%
arriving = {peer: runs_of(measured, peer, 18.4) for peer in backends}
table(
    {
        "backend": peer,
        "tokens a second": round(run["output_tokens_per_s"]),
        "mean batch": f"{run['mean_batch']:.1f}",
        "first token, P99": human_seconds(run["first_token_s"]["p99"]),
        "latency, P50": human_seconds(run["latency_s"]["p50"]),
        "P99": human_seconds(run["latency_s"]["p99"]),
    }
    for peer, runs in arriving.items()
    for _, run in runs
)

# %% [markdown]
# Ours writes 0.98 of FLASH_ATTN's tokens a second, and 1.10 times TRITON_ATTN's. Two runs of one backend differ by 1 to 2%: the first
# difference is hardly one, the second is. At 18.4 requests a second neither of the two that were asked is at its limit, so both write what is asked for.
# There latency tells: with ours a request takes 18% longer at the median.
#
# How much would another run differ? There is one, on another card of this kind, that ended early:

# %%
name = "serving_h100-80gb-hbm3_2026-11-25T221152Z.json"
earlier = records.load(records.RESULTS / name)
rows = []
for peer, rate in (
    ("vllm-flash", math.inf),
    ("vllm-flash", 18.4),
    ("vllm-flash-16", math.inf),
    ("vllm-flash-4", math.inf),
):
    runs = [runs_of(x, peer, rate)[0][1] for x in (measured, earlier)]
    here, there = (run["output_tokens_per_s"] for run in runs)
    waits = {
        f"latency, {what.upper()}, s": ", ".join(
            f"{run['latency_s'][what]:.2f}" for run in runs
        )
        for what in ("p50", "p99")
    }
    rows.append(
        {
            "engine": peer,
            "requests": "all at once" if rate == math.inf else f"{rate} a second",
            "tokens a second": f"{here:.0f}, {there:.0f}",
            "differ by": f"{abs(here / there - 1):.1%}",
        }
        | waits
    )
table(rows)

# %% [markdown]
# First here, then there. With up to 256 in a batch, tokens a second are the same within 0.5%. With 4 or 16 a step is more at the mercy of the
# host: there, differences below 10% mean nothing. At 18.4 a second P50 differs by 2% and P99 by 7%: so the 18% that ours is behind at
# the median mean something, and the 9% at P99 mean little.
#
# ## What the article's numbers are
#
# The same four numbers, of our servers: batches of 4 and of 16 as the article's, all requests at once. Latency is that of Figure 5, at
# 0.25 and at 18.4 requests a second; there vLLM may have up to 256 in its batch:

# %%
first, last = (runs_of(measured, f)[0][1] for f in ("eager-4", "vllm-flash-16"))
fits = plan(llama, card, N=4096, B=16, attention="flash", cache="pages", used=2048)
fits = fits.replace(dtype="bfloat16", step_tokens=8192)
rows = {
    "memory of the plan, GiB": [p.peak_bytes / 2**30 for p in (standard_4, fits)],
    "largest batch": [largest_batch(p) for p in (standard_4, fits)],
    "requests a second": [run["requests_per_s"] for run in (first, last)],
    "P99, s": [run["latency_s"]["p99"] for run in (calm, busy)],
}
table(
    {
        "": what,
        "before": f"{x:.3g}",
        "after": f"{y:.3g}",
        "after / before": f"{y / x:.2f}",
    }
    for what, (x, y) in rows.items()
)

# %% [markdown]
# And beside the article's:
#
# | what was reported | what we find |
# | --- | --- |
# | 95% → 40% of memory | before, half of the card lives in tensors, and PyTorch holds more: a tool shows 58%, or 95% after larger batches. vLLM takes what it is told to take, whatever it needs: 40% is a setting (`--gpu-memory-utilization 0.4`), and fits 16 texts of half the length |
# | batch 4 → 16 | flash attention and pages have room for 61 |
# | 8 → 18.4 requests a second | × 2.3 there, × 22 here, of which bytes and FLOPs explain × 6: the rest is the engine |
# | P99 2.8 → 1.2 s | the mean time in the batch grew, by Little's law from 0.5 to 0.9 s; what fell is the queue, and the wait for the longest answer |
# | thanks to flash attention | attention gives the room; the batch and the engine give the speed |
#
# Our load is not theirs, which is not known: how long their prompts and answers were, and how requests arrived. But Little's law says
# that a batch of theirs took 0.5 s. How many tokens are that at most, and how many do we ask for?

# %%
asked = [r.new_tokens for r in load.requests()]
longest = [max(asked[i : i + 4]) for i in range(0, len(asked), 4)]
step_s = machine.decode_s([1000] * 4)
print(f"theirs: 0.5 s / {human_seconds(step_s)} = {0.5 / step_s:.0f} tokens at most")
print(f"ours: the longest of four has {sum(longest) / len(longest):.0f} in the mean")

# %% [markdown]
# So their answers were shorter, or more alike in length. A static batch loses less to such answers: their server of before was a better
# one than ours, and had less to gain. And 8 requests a second from batches of 4 are not what `generate` does step by step from
# Python; what ran there is not told. Our card is not theirs either. Compare factors, not times, and ask of every factor what load it was
# measured with.
#
# ## In your own server
#
# **Turn it on.**
#
# - **vLLM** picks an attention backend by itself. On NVIDIA GPUs it is one that has flash attention, with nothing to set. For the kernel
#   of this course: `pip install -e ".[vllm]"` in a checkout of it, in vLLM's environment, then `vllm serve MODEL --attention-backend CUSTOM`.
# - **Room for a batch**: `--gpu-memory-utilization` is what vLLM may take, `--max-num-seqs` the most requests at a time.
#   `flashedu plan --model FOLDER --gpu h100 --n 4096 --batch 16 --attention flash --cache pages --step-tokens 8192` says what is needed. What is
#   left holds cache, and more cache means a larger batch.
# - **In Transformers**, `attn_implementation` (chapter 11) turns flash attention on, and `generate_batch` is its continuous
#   batching. With `generate`, requests wait for one another whatever the attention is.
#
# **Check that it is on.**
#
# - **Before**: `flashedu doctor --vllm` asks the vLLM that is installed there. It says whether vLLM finds FlashEdu and sees the GPU, which
#   backend it picks and which it passed over, and why. It ends like this: *By itself, vLLM picks FLASH_ATTN here. --attention-backend
#   CUSTOM makes it take FlashEdu.* Where something is in the way, that line names it. It asks for the heads of Llama 2 7B in bfloat16;
#   another model may get another backend.
# - **While it starts**: vLLM's log has a line for it. If it was asked for: `Using AttentionBackendEnum.CUSTOM backend.` If vLLM picked
#   by itself: `Using FLASH_ATTN attention backend out of potential backends: …` A line of the second kind says that the option did not
#   arrive. A backend that cannot do what the model wants stops vLLM, which then says why: no other takes its place.
# - **While it runs**: vLLM's log says every few seconds how many requests run, how many wait, and how much of the cache is in use. Many that
#   wait beside a cache that is not full: `--max-num-seqs` is the limit. A full cache: memory is.
# - **Measure with an open load**, from arrival, and look at P99. A client that asks again only when it has its answer shows no
#   queue.
#
# ## Takeaway
#
# **One read of the weights serves the whole batch, so throughput is batch. Flash attention and pages make room for a batch,
# continuous batching keeps it full, and an engine must not make the GPU wait. Attention's own speed has no part in the case study's
# factor.** What is still slow: the kernel itself. On this generation of GPUs it can be up to a third faster, with warps that do different
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
# A step reads 13.2 GB of weights (all but the embedding, of which it reads a few rows): 2039 / 13.2 = 154 a second. With 4 bits it reads a fourth, so about 600. This is why people
# quantize weights for a batch of one, and why it gains little for a batch of 256, where keys and values are most of what is read.
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
# ```python
# from flashedu.serving.load import Lengths
#
# alike = all_at_once.replace(output=Lengths(64, 0.0, 4, 512)).requests()
# for server, how in ((StaticServer, "contiguous"), (ContinuousServer, "pages")):
#     size = {"room": 100_000} if how == "pages" else {}
#     served = simulated(server, alike, cache=how, batch=4, **size)
#     print(f"{served.summary()['requests_per_s']:.2f}")
# ```
#
# 5.69 and 7.92: × 1.4 in place of × 2.7. A static batch then loses nothing to its longest answer. What is left is the padding of prompts, the copying of the cache, and that a
# place stays empty until the whole batch is done.
# </details>
