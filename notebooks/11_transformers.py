# %% [markdown]
# # 11 · Transformers
#
# **Claim.** One argument turns our kernels on in a real model, and the same tokens come out. A model can ignore that
# argument without a word. So we count calls.
#
# Before: [10 · Decode](10_decode.ipynb). Next: [12 · Serving](12_serving.ipynb).

# %%
import warnings

# Before Transformers, which imports Triton, too: flashedu chooses its mode.
from flashedu.integrations.transformers import (
    NotCalled,
    attention_report,
    register,
    runs_of,
)

# Of Transformers' progress bars, which want a widget. Nothing here needs one.
warnings.filterwarnings("ignore", "IProgress not found")

# %%
import random

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
)

from flashedu import doctor_model, ladder, plots
from flashedu.bench import record as records
from flashedu.bench.cases import PEERS
from flashedu.memory import Problem, cost, gpu
from flashedu.notebook import source, table
from flashedu.stages import online, rung
from flashedu.stages.runs import Runs, everywhere, packed
from flashedu.units import human_bytes, human_seconds

device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# This chapter needs Hugging Face's **Transformers** (`make` installs it; elsewhere `pip install -e ".[triton,transformers]"`). Nothing
# is downloaded: all models here are small, and have random weights. Without Triton, on macOS or Windows, the cells of the
# section *Packed* are empty, and all others run.
#
# ## The problem that the last rungs left
#
# Our stages know one mask, `causal=True`. Real prompts come in a **batch**, and have different lengths. To be one tensor,
# they are **padded** to the longest: on the left, where a model is to write on at the right. No token may see padding, so each
# text of the batch has a mask of its own. As a matrix of Nq × Nk for each text, and 4 texts of 8192 tokens:

# %%
B, N = 4, 8192
print(f"a mask of bool, a byte each: {human_bytes(B * N * N)}")

# %% [markdown]
# Standard attention does not mind: it has S of that size anyway. For a kernel that keeps S on the chip, reading such a mask
# would be most of its traffic. PyTorch's flash kernel takes no mask at all.
#
# ## The idea: a run of keys
#
# Look at what the queries of such a batch see. Three texts of 7, 5 and 2 tokens, padded to 7. The model has a **sliding
# window** too: a query sees itself and the 3 tokens before it, no more.

# %%
query, key = torch.arange(7)[:, None], torch.arange(7)
padding = torch.tensor([0, 2, 5])[:, None, None]
seen = (key <= query) & (key > query - 4) & (key >= padding)
found = runs_of(seen[:, None])
fig = plots.runs(
    {
        f"{7 - n} tokens": (found.first[b].tolist(), found.stop[b].tolist())
        for b, n in enumerate(padding.flatten().tolist())
    },
    7,
    "In each row, what a query sees lies side by side",
)

# %% [markdown]
# *Figure 1. Three masks of one batch, rows are queries. What a query sees is a **run** of keys. So two numbers say all of a row: the
# first key, and the one behind the last. A padded query sees none.*
#
# Nothing is lost. From the two numbers the mask is found again:

# %%
source(Runs.mask)

# %%
print("the same mask again:", torch.equal(found.mask(7), seen[:, None]))

# %% [markdown]
# Predict first: for 4 texts of 8192 tokens the matrix took 256 MiB. How many KiB do the runs take? They are two int32 a query.

# %%
my_prediction_kib = 1024

# %%
long = everywhere(B, N, N, causal=True)
n_bytes = sum(x.nbytes for x in long)
print(f"you said {my_prediction_kib} KiB; it is {n_bytes / 2**10:.0f} KiB")

# %% [markdown]
# Which masks are runs? All usual ones. In a **static cache** memory is reserved for the longest text, and its end holds no key
# yet: here 5 of 8 places are filled, and 3 queries are new.

# %%
new = torch.arange(3, 6, dtype=torch.int32)[None]
usual = {
    "causal": packed([8], causal=True),
    "window of 3": packed([8], causal=True, window=3),
    "both sides": packed([8]),
    "packed, 3 and 5": packed([3, 5], causal=True),
    "static cache": Runs(torch.zeros_like(new), new),
}
fig = plots.runs(
    {name: (r.first[0].tolist(), r.stop[0].tolist()) for name, r in usual.items()},
    8,
    "The usual masks are runs",
    numbers=False,
)

# %% [markdown]
# *Figure 2. Five usual masks. A mask with holes, such as every second key, is no run. We come to that.*
#
# ## Packed
#
# Padding is not only masked, it is computed. The rows of padding go through the whole model, and through attention. But if a
# query's run can begin anywhere, no padding is needed: put the texts **one behind another**, as one long sequence, and let each
# query see its own text. This is how models are trained on texts of different lengths (**variable length**, varlen).
#
# The stage `varlen` is `flash2` with runs. A tile of queries visits the tiles of keys from the smallest `first` of its rows to
# the largest `stop`:

# %%
# Triton exists on Linux only.
has_triton = rung("varlen").missing() is None
source(rung("varlen").load()._keys_seen.fn) if has_triton else None

# %% [markdown]
# It finds two more places. Between `all_begin` and `all_end` every row sees every key, so these tiles need no mask. In
# `flash2` the masked tiles were at the end of a row; here they are at both ends.
#
# Four texts, drawn to one scale:

# %%
fig = plots.padded_and_packed(
    [41, 23, 9, 32], "Padding makes small triangles as large as the largest"
)

# %% [markdown]
# *Figure 3. What is computed, with a causal mask. Padded, each text costs as much as the longest. Packed, a text costs what
# it costs alone.*
#
# Predict first: three texts of 48, 16 and 32 tokens, in tiles of 16 × 16. Under a causal mask a text of 3 tiles has
# 1 + 2 + 3 = 6 tiles of S. How many are computed for the padded batch, and how many packed?

# %%
my_prediction_padded, my_prediction_packed = 27, 14

# %%
lengths = [48, 16, 32]
tiny = Problem(D=16, Nq=48, causal=True, dtype="float32", block_q=16, block_k=16)
one_tile = 2 * 2 * 16 * 16 * 16  # FLOPs of its two products
if has_triton:
    padded = ladder.count("flash2", tiny.replace(B=3)).counted
    row = tiny.replace(Nq=sum(lengths), Nk=sum(lengths))
    in_a_row = ladder.count("varlen", row, lengths=lengths).counted
    print(f"padded: you said {my_prediction_padded}; {padded.flops // one_tile} tiles")
    print(
        f"packed: you said {my_prediction_packed}; {in_a_row.flops // one_tile} tiles"
    )

# %% [markdown]
# 3 · 6 = 18, and 6 + 1 + 3 = 10. Does the count equal what `flash2` takes for each text alone, and two numbers a query?

# %%
if has_triton:
    alone = [cost.flash2(tiny.replace(Nq=n, Nk=n)) for n in lengths]
    by_hand = sum(c.hbm_bytes for c in alone) + 2 * 4 * sum(lengths)
    print("packed, counted:", f"{in_a_row.hbm_bytes:,} bytes")
    print("by hand:        ", f"{by_hand:,} bytes")
    print("padded, counted:", f"{padded.hbm_bytes:,} bytes")
    assert in_a_row.flops == sum(c.flops for c in alone)
    assert in_a_row.hbm_bytes == by_hand

# %% [markdown]
# These lengths are whole tiles. Otherwise one tile of queries may hold the end of a text and the beginning of the next, and visits
# the keys of both. With long texts such tiles are few.
#
# Now a larger case, as it was recorded on a GPU: 32 texts, of 128 to 4096 tokens, any length as likely as any other. Predict
# how many times as many scores padding computes:

# %%
my_prediction_times = 1.5

# %%
measured = records.latest("varlen", card="H100")
(forward,) = measured.cases("varlen", D=128, causal=True, **{"pass": "fwd"})
drawn = forward["lengths"]
tokens = len(drawn) * max(drawn) / sum(drawn)
scores = len(drawn) * max(drawn) ** 2 / sum(n**2 for n in drawn)
print(f"tokens: {tokens:.1f} times as many; scores: {scores:.1f} times")
print(f"you said {my_prediction_times}")

# %% [markdown]
# If lengths are spread evenly from 0 to the longest, the mean of n is a half of it, and the mean of n² a third. So padding
# makes 2 times the tokens and 3 times the scores; a little less here, as the draw has many long texts. What is left of that
# in time?

# %%
fig = plots.packed_times(
    measured, 128, "The same texts: packed, padded, and one after the other"
)

# %% [markdown]
# *Figure 4. Attention alone, 16 heads, D = 128, causal. "padded SDPA" is PyTorch's flash kernel on the padded batch; it needs
# no mask, as padding on the right lies behind what a causal query sees. "one by one" calls that kernel once for each text. "torch
# varlen" is PyTorch's own kernel for packed texts.*


# %%
def time_over(case, peer):
    (ours,) = (run for run in case["runs"] if run["peer"] == "varlen")
    ratio = ours["times_as_fast_as"].get(peer)
    return f"{ratio[0]:.2f}" if ratio else "-"


others = ("padded", "padded-mask", "padded-flash2", "one-by-one", "torch-varlen")
table(
    {
        "D": case["D"],
        "mask": "causal" if case["causal"] else "none",
        "pass": case["pass"],
    }
    | {PEERS[peer]: time_over(case, peer) for peer in others}
    for case in measured.cases("varlen")
)

# %% [markdown]
# The table has the time of each other way over that of `varlen`: 2 means that it takes twice as long. "fwd" is the forward,
# "both" is forward and backward. Without a causal mask, a padded batch needs a mask, and PyTorch takes another kernel for it
# ("padded mask").
#
# ## A model, and a first try
#
# A Llama from a config, with GQA, two layers and random weights. They are large, so that a key too many would change
# what the model says:

# %%
sizes = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def llama(attention, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(device)


eager = llama("eager").eval()

# %% [markdown]
# Three prompts of 12, 8 and 5 tokens, padded on the left. The model writes 8 tokens.

# %%
mask = torch.arange(12) >= torch.tensor([0, 4, 7])[:, None]
prompts = torch.randint(1, 100, mask.shape, generator=torch.Generator().manual_seed(0))
inputs = dict(
    input_ids=(prompts * mask).to(device), attention_mask=mask.long().to(device)
)


def write(model, inputs, **how):
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **how)
    return tokens[:, 12:]


print(write(eager, inputs).tolist())

# %% [markdown]
# Transformers has a table of attention functions. A model looks up what `attn_implementation` names, so any function can be
# entered there. A first try, with the stage of chapter 03:


# %%
def first_try(module, q, k, v, mask, scaling=None, **rest):
    o = online.attention(q, k, v, causal=True, scale=scaling)
    return o.transpose(1, 2), None  # the second would be the weights


AttentionInterface.register("first_try", first_try)
tried = llama("first_try").eval()

# %% [markdown]
# Predict: which of these have the tokens of eager? One prompt; the three of the batch; one prompt with a static cache. Answer with
# yes or no.

# %%
my_prediction_one, my_prediction_batch, my_prediction_static = "yes", "yes", "yes"

# %%
one = {name: x[:1] for name, x in inputs.items()}
static = {"cache_implementation": "static"}
cases = {
    "one prompt": (one, {}, my_prediction_one),
    "a padded batch": (inputs, {}, my_prediction_batch),
    "one prompt, static cache": (one, static, my_prediction_static),
}
table(
    {
        "case": case,
        "you said": said,
        "same tokens": torch.equal(write(tried, x, **how), write(eager, x, **how)),
    }
    for case, (x, how, said) in cases.items()
)

# %% [markdown]
# No error and no warning, and two of three are wrong. To a name without a **mask function** Transformers gives no mask at all, so
# the padding was seen. And in a static cache the last key is an empty place, while our causal mask ends at the last key.
#
# ## Turn it on
#
# `register` enters two functions for each name. One is the attention. The other makes the mask, once for all layers, and returns
# runs in place of a matrix.

# %%
names = register()
print(names)

# %%
ours = llama("FlashEdu").eval()

# %% [markdown]
# For a model with real weights it is the same argument:
#
# ```python
# register()
# model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="FlashEdu")
# ```
#
# `"FlashEdu"` takes the stage that fits: on a CPU `online`, on a GPU `flash2` (`flash3` on a Hopper card), `varlen` where
# there is a mask, and `decode` where queries are few. Each other name is one stage, which does it or says why it cannot.
#
# Predict first: how often does our model call FlashEdu, to write the same 8 tokens? It has two layers. Then the same with a
# static cache, and with **prefill in chunks**: long prompts are read in parts, here of 5 tokens, to save memory.

# %%
my_prediction_dynamic, my_prediction_static, my_prediction_chunks = 2, 2, 6

# %%
ways = {
    "dynamic cache": ({}, my_prediction_dynamic),
    "static cache": (static, my_prediction_static),
    "prefill in chunks of 5": ({"prefill_chunk_size": 5}, my_prediction_chunks),
}
rows = []
for way, (how, said) in ways.items():
    with attention_report(ours) as report:
        same = torch.equal(write(ours, inputs, **how), write(eager, inputs, **how))
    rows.append(
        {
            "way": way,
            "you said": said,
            "calls": report.calls.total(),
            "the tokens of eager": same,
        }
    )
table(rows)

# %% [markdown]
# A forward calls each layer once. The first forward reads the prompt and gives the first token, and each other token
# takes one more: 8 forwards, 2 layers, 16 calls. In chunks the prompt takes 3 forwards in place of 1: 10 forwards.
#
# All rows have eager's tokens. This is what `attention_report` says of the last one, layer by layer:

# %% tags=["nbval-ignore-output"]
# On a GPU other stages run.
print(report)

# %% [markdown]
# `online` is our loop in Python, as the models of this chapter are on the CPU if there is no GPU. The kernels themselves run
# in the model as well, interpreted there. The first token only, as that is slow:

# %%
if has_triton:
    ours.set_attn_implementation("FlashEdu:varlen")
    with attention_report(ours) as report, torch.no_grad():
        logits = ours(**inputs).logits
    print({name: dict(stages) for name, stages in report.stages.items()})
    same = torch.equal(logits[:, -1].argmax(-1), write(eager, inputs)[:, 0])
    print("the first tokens of eager:", same)
    ours.set_attn_implementation("FlashEdu")

# %% [markdown]
# Are the logits right, too? They differ in some bits, and chapter 09 said why. The budget is the same idea: twice the error of
# eager against the same model in float64, and some roundings. The package's tests hold seven kinds of model to it, in
# float32 and in bfloat16, with their gradients.
#
# ## What it costs
#
# Predict first, for a model of real size: 8 layers, 16 heads of D = 128, one text of 8192 tokens in bfloat16. S of a layer
# has 16 · 8192² numbers: 2 GiB, which no cache holds. How many times as many bytes must cross HBM for eager attention as
# for a flash kernel, for which q, k, v and o cross once?

# %%
my_prediction_hbm_times = 10

# %%
layer = Problem(H=16, Nq=8192, D=128, dtype="bfloat16", causal=True)
once = 4 * layer.H * layer.Nq * layer.D * layer.item_bytes
of_eager = cost.naive(layer)
print(
    f"you said {my_prediction_hbm_times}; it is {of_eager.hbm_bytes / once:.0f} times"
)

# %%
attentions = {
    "eager": (of_eager, of_eager.hbm_bytes),
    "sdpa": (cost.flash2(layer.replace(block_q=128)), once),
    "FlashEdu": (cost.flash2(layer.replace(block_q=64)), once),
}
table(
    {
        "attention": name,
        "HBM, at least": human_bytes(least),
        "into and out of the SMs": human_bytes(c.hbm_bytes),
        "extra memory": human_bytes(c.hbm_extra_bytes),
    }
    for name, (c, least) in attentions.items()
)

# %% [markdown]
# All by closed forms, for one layer. `sdpa` is PyTorch's flash kernel, whose tiles have 128 queries (chapter 08); ours have
# 64 in this case. Eager is the stage `naive`, and that is kind: Transformers' eager attention also adds a mask to S, and computes the
# softmax in float32.
#
# What is left of this in a whole model? Its other products, of the weights, are the same for all three:

# %%
in_model = records.latest("model", card="H100")
(whole,) = in_model.cases("model", H_kv=16, **{"pass": "fwd"})
in_attention = whole["layers"] * 2 * whole["H"] * whole["N"] ** 2 * whole["D"]
print(f"attention has {in_attention / whole['flops']:.0%} of the model's FLOPs")

# %%
fig = plots.model_bars(
    in_model, 16, "In a model, eager pays for S and P in time and in memory"
)

# %% [markdown]
# *Figure 5. A forward of that model over 8192 tokens. Memory is the peak beyond weights and inputs. With no mask but a causal one,
# `sdpa` is a flash kernel too.*

# %%
table(
    {
        "key heads": case["H_kv"],
        "attention": PEERS[run["peer"]],
        "forward": human_seconds(run["median_s"]) if run["median_s"] else run["why"],
        "peak memory": human_bytes(run["extra_bytes"]) if run["extra_bytes"] else "-",
    }
    for case in in_model.cases("model", **{"pass": "fwd"})
    for run in case["runs"]
)

# %% [markdown]
# And writing? Four prompts of up to 2048 tokens, padded on the left, and 128 tokens written. The first token is the prefill;
# the time of each other one is the rest, shared by 127. First, what a step of writing must bring to the chip:

# %%
(first,) = in_model.cases("model", **{"pass": "prefill"})
(every,) = in_model.cases("model", **{"pass": "generate"})
least = every["bytes"] / gpu("h100").hbm_bytes_per_s
print(f"weights and cache cross HBM in {human_seconds(least)} at least")
table(
    {
        "attention": PEERS[a["peer"]],
        "first token": human_seconds(a["median_s"]),
        "each other": human_seconds(
            (b["median_s"] - a["median_s"]) / (every["new_tokens"] - 1)
        ),
    }
    for a, b in zip(first["runs"], every["runs"], strict=True)
    if a["median_s"] and b["median_s"]
)

# %% [markdown]
# What is beyond the least time is mostly Python and the launches of some hundred kernels a step. FlashEdu adds most of both:
# two kernels a layer, each with Python around it that you can read. While the GPU waits for the host, a quicker kernel gains
# nothing. A serving engine removes that wait, with CUDA graphs and large batches.
#
# ## A model that ignores the setting
#
# BLOOM adds a bias to its scores (ALiBi), in code of its own. We tell it FlashEdu:

# %%
config = BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=100)
bloom = AutoModelForCausalLM.from_config(config, attn_implementation="FlashEdu").to(
    device
)
print("its config says:", bloom.config._attn_implementation)

# %% [markdown]
# Again no error and no warning, and the config says what we asked for. Who looks there believes that it is on. Count the calls:

# %%
try:
    with attention_report(bloom):
        bloom(inputs["input_ids"][:1])  # the longest, which has no padding
except NotCalled as error:
    print(error)

# %% [markdown]
# How can that be? In Transformers each model is a file of its own. The setting works where that file looks it up. Most do. Some
# of the older ones do not, or know a few names only. The config takes any registered name and asks nobody. (For
# `"flash_attention_2"` there is a check: a class that does not declare support raises.)
#
# It can be worse than no effect. BLOOM ignores the name for its attention, but not for its mask. Told `"first_try"`, it gets no mask,
# and sees the future. `register` looks at each model, and gives one that ignores FlashEdu a mask that it can read: its results are
# those of eager.
#
# `flashedu doctor --model` tells before you load anything. It builds the model from its config, without memory for weights (on
# PyTorch's *meta* device), registers a function that does nothing, and sees who calls it:

# %%
machine, found = doctor_model.look("bloom")
findings = doctor_model.diagnose(machine, found)
table({"what": f.name, "found": f.found, "advice": f.advice} for f in findings[:3])

# %% [markdown]
# (The other findings are about this machine.) In the same way, some kinds of models:

# %%
kinds = ("llama", "t5", "bloom", "mpt", "falcon")
rows = [(kind, doctor_model.look(kind)[1]) for kind in kinds]
table(
    {
        "kind": kind,
        "a registered name": doctor_model.SUMMARY[doctor_model.effect(found)],
        "declares flash_attention_2": found.supports_flash,
    }
    for kind, found in rows
)

# %% [markdown]
# This is so in the version of Transformers that is installed here. Look again in yours.
#
# ## What takes a slower path, and says so
#
# Many models have **dropout** in attention: in training, some weights of P are set to 0 at random. No stage does that. Then the
# formula of chapter 01 does, with S in memory, and says so, once:

# %%
model = llama("FlashEdu", attention_dropout=0.1).train()
with warnings.catch_warnings(record=True) as said, attention_report(model) as report:
    warnings.simplefilter("always")
    model(**inputs)
print(f"said {len(said)} time: {said[0].message}")
print({name: dict(reasons) for name, reasons in report.slower.items()})

# %% [markdown]
# Biases that are added to the scores (T5 has one), masks with holes and `output_attentions=True` go the same way. What would
# change the result and is not known here, such as attention sinks, raises. Nothing is left out in silence.
#
# ## Training
#
# Gradients go through the kernels as well. Two Llamas with the same weights learn a poem by heart, letter by letter, one
# with eager attention and one with FlashEdu. Predict: by how much do their losses differ after 30 steps?

# %%
my_prediction_difference = 0.1

# %%
poem = """Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?

In what distant deeps or skies,
Burnt the fire of thine eyes?
On what wings dare he aspire?
What the hand, dare seize the fire?

And what shoulder, & what art,
Could twist the sinews of thy heart?
And when thy heart began to beat,
What dread hand? & what dread feet?
"""  # William Blake, 1794
letters = sorted(set(poem))
text = torch.tensor([letters.index(letter) for letter in poem], device=device)
rng = random.Random(0)
starts = [[rng.randrange(len(text) - 64) for _ in range(8)] for _ in range(30)]
batches = [torch.stack([text[i : i + 64] for i in batch]) for batch in starts]

# %%
curves = {}
for attention in ("eager", "FlashEdu"):
    model = llama(attention, vocab_size=len(letters), initializer_range=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curves[attention] = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curves[attention].append(loss.item())

# %%
bound = 1e-4
apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
start, *_, end = curves["FlashEdu"]
print(f"the loss falls from {start:.1f} to {end:.1f}")
print(f"you said {my_prediction_difference}; never more than {bound}: {apart <= bound}")

# %%
fig = plots.losses(curves, bound, "Trained with FlashEdu or with eager: one curve")

# %% [markdown]
# *Figure 6. The loss of both, and below how far they are apart. Roundings differ in each step, and training carries them on. Where the
# lower line is at the bottom, they are equal.*
#
# ## The production kernel
#
# Our stages are for reading. In a program of your own, two lines turn on FlashAttention-2 itself, in CUDA:
#
# ```python
# model = AutoModelForCausalLM.from_pretrained(
#     path, dtype=torch.bfloat16, attn_implementation="flash_attention_2").to("cuda")
# ```
#
# | it needs | where to look |
# | --- | --- |
# | an NVIDIA GPU, Ampere or later: compute capability 8.0 (A100, RTX 30, H100; not V100 or T4) | `torch.cuda.get_device_capability()` |
# | PyTorch built for CUDA, and a driver that is new enough for that CUDA | `torch.version.cuda`, `torch.cuda.is_available()` |
# | the package flash-attn, 2.3.3 or later, built for this PyTorch: `pip install flash-attn --no-build-isolation`. Where no built one fits, this compiles it, which takes `nvcc` and long. Or the package `kernels`: with it, Transformers downloads a built one | `import flash_attn` |
# | weights in float16 or bfloat16. With float32 Transformers only warns, and the first call raises | `model.dtype` |
# | heads of 256 at most | the config |
# | a class that declares support for it. Others raise when the model is made | `flashedu doctor --model` |
#
# `flashedu doctor --model NAME_OR_PATH` checks all of these on your machine, and says what to do.
#
# When to use which?
#
# - **`sdpa`** is the default, and needs no package. Without padding it runs a flash kernel already. With padding it has a mask of N × N,
#   which that kernel does not take, and PyTorch chooses another.
# - **`flash_attention_2`** pays where batches are padded, as it takes the padding out before attention; for packed texts in training
#   (`DataCollatorWithFlattening`); and for sliding windows. It knows no other masks, and no biases.
# - **`FlashEdu`** is the one whose code you know: to learn, to measure, to try a change.
# - **`eager`** gives the attention weights, and runs where nothing else does.
#
# And how do you know that it is on? `model.config._attn_implementation` says what was asked for. A profile says what ran:
#
# ```python
# with torch.profiler.profile() as profile:
#     model(**inputs)
# print([e.key for e in profile.key_averages() if "flash" in e.key])
# ```
#
# The kernels of flash-attn have names such as `flash_fwd_kernel` in the namespace `flash`. PyTorch's own, under `sdpa`, are in
# `pytorch_flash`.
#
# ## Takeaway
#
# **Every usual mask is two numbers a query. With them one argument turns the kernels of this course on in a real model, padded,
# packed, cached or in chunks, and the tokens are those of eager. Whether it is on is not what the config says. Count the calls.**
# What is still slow: one request at a time, on a server that many want to use. That is [chapter 12](12_serving.ipynb).
#
# ## Exercises
#
# **1.** A Llama of 32 layers reads a prompt of 1000 tokens in chunks of 256, and writes 100 tokens. How many calls of FlashEdu does
# `attention_report` count?
#
# <details><summary>Answer</summary>
#
# 1000 tokens are 4 chunks, and the last gives the first token. 99 more forwards: 103 · 32 = 3296 calls.
# </details>
#
# **2.** Which of these masks are runs? (a) Each query of a prompt sees the whole prompt, each later one all before it
# (*prefix LM*). (b) A window of 64 keys, and also the first token. (c) Padding on the right. (d) Each token is masked with
# probability 0.1.
#
# <details><summary>Answer</summary>
#
# (a) and (c). In (b) there is a hole between the first token and the window, in (d) there are holes anywhere. `runs_of` returns None
# for them, and FlashEdu takes the formula, and says so.
#
# ```python
# key, query = torch.arange(8), torch.arange(8)[:, None]
# runs_of(((key <= query) | (key < 3))[None, None])
# ```
# </details>
#
# **3.** A batch has one text of 4096 tokens and seven of 128. How many times as many scores does padding compute? And how many times
# as many tokens go through the other layers of the model?
#
# <details><summary>Answer</summary>
#
# 8 · 4096² / (4096² + 7 · 128²) = 7.9 and 8 · 4096 / (4096 + 7 · 128) = 6.6. If all eight have 4096 tokens, 1 and 1.
# </details>
#
# **4.** Put `first_try` right, with the mask function of FlashEdu. It gives None where the causal mask is enough, and otherwise a
# tensor of (B, 1, Nq, 2): first and stop of each query.
#
# <details><summary>Answer</summary>
#
# ```python
# from transformers import AttentionMaskInterface
# from flashedu.integrations.transformers import runs_mask
#
# def second_try(module, q, k, v, mask, scaling=None, **rest):
#     runs = None if mask is None else Runs(*mask[:, 0].unbind(-1))
#     o = online.attention(q, k, v, causal=runs is None, runs=runs, scale=scaling)
#     return o.transpose(1, 2), None
#
# AttentionInterface.register("second_try", second_try)
# AttentionMaskInterface.register("second_try", runs_mask)
# tried = llama("second_try").eval()
# ```
#
# All three have the tokens of eager now. FlashEdu does a little more: it looks at everything else that a model may pass.
# </details>
