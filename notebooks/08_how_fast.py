# %% [markdown]
# # 08 · How fast
#
# **Claim.** The bytes that we predict are the bytes that a GPU moves, counted by the card itself. They
# explain where the speed comes from, and where it does not.
#
# Before: [07 · The backward kernels](07_flash2_backward.ipynb). Next: [09 · Numerics](09_numerics.ipynb).

# %%
import math
from functools import partial

from flashedu import ladder, plots
from flashedu.bench import published, show
from flashedu.bench import record as records
from flashedu.memory import Problem, cost, gpu
from flashedu.notebook import table
from flashedu.stages import LADDER
from flashedu.units import human_bytes, human_seconds

# %% [markdown]
# ## The problem that the last rungs left
#
# Every byte so far was counted by our own machine, or by Triton's interpreter. Both are programs on a CPU. A
# real card has hardware between its memory and its processors that neither knows: caches, a unit that copies
# tiles (the **TMA**, tensor memory accelerator), a compiler that may put a number in another place. Does the count hold
# there?
#
# ## The theorem
#
# The first FlashAttention paper proves how traffic depends on the size of the on-chip memory (Theorem 2). With
# SRAM for M numbers, and M between D and N · D:
#
# $$\text{standard: } \Theta(N D + N^2) \qquad \text{flash: } \Theta\!\left(\frac{N^2 D^2}{M}\right)$$
#
# Θ means: up to a constant factor. Where does it come from? A tile of $B_q$ queries and what goes with it take
# some multiple of $B_q \cdot D$ numbers, and that must fit M. So $B_q$ grows as $M / D$. There are $N / B_q$
# query tiles, and each reads all keys and values, $2 N D$ numbers:
#
# $$\frac{N}{B_q} \cdot 2 N D \;\sim\; \frac{N D}{M} \cdot 2 N D = \frac{2 N^2 D^2}{M}$$
#
# Twice as much SRAM, half as many bytes. The paper also proves that no exact algorithm does better for all M
# (Proposition 3). In practice the tile is what we choose, so we count against $B_q$.
#
# ## Where a card can count
#
# On its way from HBM to an SM, a byte passes the L2 cache, which all SMs share.
#
#     HBM (DRAM)  <── 1 ──>  L2 cache  <── 2 ──>  the SMs, each with its SRAM
#
# (Hardware manuals say DRAM, the kind of memory that HBM is.) A GPU has counters in hardware at both places. At 2 it counts what enters and leaves the SMs, wherever it came
# from. This is the traffic of our kernels' loads and stores, and of the theorem. At 1 it counts what L2 did
# not have, or could not keep.
#
# NVIDIA's profiler, Nsight Compute (`ncu`), reads them. The counter at 2 is called
# `l1tex__m_xbar2l1tex_read_bytes`, as the wires between L2 and the SMs are the *crossbar*. On a machine with a
# GPU, `flashedu bench traffic` runs our kernels under it, each with empty caches, and records what it says. This
# chapter shows such a record:

# %%
counters = records.latest(kind="traffic", card="H200")
print(f"{counters.label}, Nsight Compute {counters.data['ncu']}")

# %% [markdown]
# ## By hand: one shape of the paper
#
# The paper's own example (its Figure 2): 64 sequences, 16 heads, N = 1024, D = 64, in float16. S alone would
# take 2.1 GB. With 128 queries in a tile there are 8 query tiles for each head. q comes in once, k and v come
# in 8 times:
#
# $$64 \cdot 16 \cdot (N D + 8 \cdot 2 N D) \cdot 2 \text{ bytes}$$

# %%
by_hand = 64 * 16 * (1024 * 64 + 8 * 2 * 1024 * 64) * 2
print(f"into the SMs: {by_hand:,} bytes")

# %% [markdown]
# ## Predict first
#
# With 256 queries in a tile: how many GB will the card count? (A GB is 10⁹ bytes. Not quite half: q comes in
# once whatever the tile.) And with 1.0 for "exactly as predicted", how close will the card be?

# %%
my_prediction_gb, my_prediction_closeness = 1.5, 0.9

# %%
shape = Problem(B=64, H=16, Nq=1024, D=64)


measured = partial(show.launches, counters)
(run,) = (run for run in measured("flash2") if run["tile"][0] == 256)
form = cost.flash2(shape.replace(block_q=256))
counted_gb = run["l2_to_sm_bytes"] / 1e9
print(f"you said {my_prediction_gb} GB; the card counted {counted_gb:.3f} GB")
print(
    f"you said {my_prediction_closeness}; it is {run['l2_to_sm_bytes'] / form.hbm_read_bytes}"
)

# %% [markdown]
# ## Predicted, counted, measured
#
# Now the whole chain, for the forward of `flash2`, at each tile size. Four numbers, found in four ways:
#
# 1. the **closed form** of chapter 03;
# 2. counted by **the stage `online`**, in PyTorch, tile by tile;
# 3. counted from **the kernel `flash2`** as the interpreter runs it: its own loads;
# 4. counted by **the card**, as the compiled kernel ran.
#
# The second and third run here and now, for one head. All heads move alike, so we take them 1024 times.

# %%
head, heads = shape.replace(B=1, H=1, H_kv=1), 64 * 16
rows = []
for run in measured("flash2"):
    tile = {"block_q": run["tile"][0], "block_k": run["tile"][1]}
    here = {
        stage: heads * ladder.count(stage, head.replace(**tile)).hbm_read_bytes
        for stage in ("online", "flash2")
    }
    rows.append(
        {"queries in a tile": tile["block_q"]}
        | {"closed form": cost.flash2(shape.replace(**tile)).hbm_read_bytes}
        | {f"counted, {stage}": n_bytes for stage, n_bytes in here.items()}
        | {"measured": run["l2_to_sm_bytes"]}
    )
table(rows)

# %%
for row in rows:
    numbers = {value for name, value in row.items() if name != "queries in a tile"}
    print(f"{row['queries in a tile']:3} queries, all four equal: {len(numbers) == 1}")

# %% [markdown]
# To the byte: what we count is what the card's SMs take in.
#
# The same for all kernels, of which the record also has what the interpreter counted. Tiles are queries × keys:

# %%
fig = plots.predicted_counted_measured(
    show.three_counts(counters),
    "Bytes into the SMs: formula, interpreter and card agree",
)

# %% [markdown]
# *Figure 1. Four kernels at four tile sizes, three counts each. When the side of the tile that stays in a program doubles
# (queries for `flash2` and `dq`, keys for `flash1` and `dkdv`), the bytes nearly halve. The card is within 0.6% of
# the formula everywhere, and equal to it for `flash2` and `dq`.*
#
# Without a mask, what leaves the SMs is exact too: o and lse, and in the backward dq, dk and dv:

# %%
kernels = ("flash1", "flash2", "flash2 dkdv", "flash2 dq")
table(
    {
        "kernel": kernel,
        "tile": "{} × {}".format(*run["tile"][:2]),
        "closed form, written": run["closed_form"]["written"],
        "measured": run["sm_to_l2_bytes"],
    }
    for kernel in kernels
    for run in measured(kernel)
    if run["tile"][:2] in ([32, 64], [64, 64], [64, 32])
)

# %% [markdown]
# ## Where the card differs, and why
#
# The other side of the tile does not matter. A causal mask changes nothing for `flash2`'s forward and `dq`: kernel and
# formula skip the same whole tiles. There are three kinds of difference. Here are examples of each, as the card's
# count over the formula's:


# %%
def with_tile(runs, block_q, block_k):
    return next(run for run in runs if run["tile"][:2] == [block_q, block_k])


# %%
causal = {kernel: measured(kernel, causal=True) for kernel in kernels}
ragged = measured("flash2", "ragged")
table(
    {"case": what} | show.beside_form(run)
    for what, run in (
        ("causal", with_tile(causal["flash2"], 64, 64)),
        ("causal", with_tile(causal["flash2 dq"], 64, 32)),
        ("backward, full", with_tile(measured("flash2 dkdv"), 32, 32)),
        ("causal", with_tile(causal["flash1"], 32, 128)),
        ("N = 1000", ragged[0]),
        ("N = 1023", ragged[1]),
        ("spilled", measured("flash1", "spills")[0]),
        ("spilled", measured("flash2 dkdv", "spills")[0]),
    )
)

# %% [markdown]
# - **Something was loaded twice, and counted once.** An SM has a small cache of its own, **L1**. What comes from there does
#   not cross place 2. Loads by plain pointers go through it: lse and delta in `dkdv` (0.3% less at most), and o, m and l
#   in `flash1` (0.5% less, causal 2.5%). Tiles of q, k and v pass it by, as the TMA puts them into SRAM. (The record has no
#   counter of L1 itself. That L1 serves these loads is our explanation, not a measurement.)
# - **A ragged tail.** 1000 queries are 15 tiles of 64 and one of 40. The TMA delivers 64 rows all the same, the missing
#   ones filled with zeros, and the counter counts them: 1024 / 1000 = 1.024, and 1.042 in the causal `dkdv`, whose last
#   query tile is loaded most often. What is stored is cut exactly. (At N = 1023 a row of lse no longer begins at a multiple
#   of 32 bytes, the unit in which L2 is written, and 0.4% more leaves the SMs.)
# - **Spilled registers.** A thread has 255 registers. What finds no place is written to memory, through L1 and L2, and
#   read back. `flash1` at 64 × 256 takes in 2.2 times what its loads say. `dkdv` at 128 × 64 stores 3.5 times as much,
#   and reads most of it back from L1: only 1.5% more crosses place 2. Those tiles were still the fastest of nine for this
#   N (chapter 07). No formula from the source code can see a spill. The compiler reports it, and the counter shows it.
#
# ## What memory sees
#
# In `flash2`, k and v enter the SMs again and again. Do they come from HBM each time? The counters at 1 say no:

# %%
fig = plots.l2_and_dram(
    show.l2_and_dram(counters),
    4 * 64 * 16 * 1024 * 64 * 2,
    "The tile size decides what L2 delivers; DRAM sees each byte once",
)

# %% [markdown]
# *Figure 2. On the left the theorem at work: twice the tile, half the bytes. On the right, with a scale of its own, what
# reaches HBM: q, k, v and o once, whatever the tile (a little less, as part of o is still in L2 when the kernel ends). The
# programs of one head run at the same time (chapter 06), and their k and v, 256 KiB, wait in L2.*
#
# And `flash1`? Its o comes and goes for each key tile:

# %%
table(
    {
        "tile": "{} × {}".format(*run["tile"][:2]),
        "into the SMs": human_bytes(run["l2_to_sm_bytes"]),
        "from HBM": human_bytes(run["dram_read_bytes"]),
        "out of the SMs": human_bytes(run["sm_to_l2_bytes"]),
        "to HBM": human_bytes(run["dram_write_bytes"]),
    }
    for run in measured("flash1")
)

# %% [markdown]
# Here HBM sees nearly all of it. Hundreds of programs run at a time, and each keeps an o of 256 KiB waiting: more
# than L2 holds. So for the first FlashAttention the theorem describes HBM, as the paper says. For the second it
# describes the way from L2 to the SMs: queries outside is what lets a cache help.
#
# Until when? Until k and v of the heads at work outgrow L2, 60 MiB on an H200. Longer and longer sequences of one head,
# with tiles of 128 queries. Predict the last row: 264 of the 2048 programs run at a time, which makes 8 waves. If the
# programs of a wave walk over the keys in step, k and v come from HBM once for each wave:

# %%
waves, k_and_v, q = 2048 / 264, 2 * 262144 * 64 * 2, 262144 * 64 * 2
print(f"{math.ceil(waves)} waves: {human_bytes(math.ceil(waves) * k_and_v + q)}")

# %%
long = [case for case in counters.cases("long") if case["B"] == 1]
table(
    {
        "N": case["N"],
        "k and v of a head": human_bytes(2 * case["N"] * 64 * 2),
        "into the SMs": human_bytes(run["l2_to_sm_bytes"]),
        "from HBM": human_bytes(run["dram_read_bytes"]),
        "q, k, v once": human_bytes(3 * case["N"] * 64 * 2),
    }
    for case in long
    for run in case["runs"]
)

# %% [markdown]
# Up to N = 65,536, HBM delivers each tensor once. At 262,144, k and v of one head, 64 MiB, no longer fit L2, and they come
# 8 times, as predicted: in step. The SMs take in 128 GiB.
#
# ## Standard attention on the same card
#
# Its S and P are too large for any cache. For the same shape, forward and backward, by the card's counters at 1:


# %%
def moved(peer):
    cases = counters.cases("peers", peer=peer, causal=False)
    runs = [run for case in cases for run in case["runs"]]
    dram = sum(run["dram_read_bytes"] + run["dram_write_bytes"] for run in runs)
    return {"kernels": len(runs), "HBM, read and written": f"{dram / 1e9:.1f} GB"}


# %%
peers = {
    "standard": "standard",
    "flash2": "flash2",
    "sdpa-flash": "SDPA flash",
    "sdpa-cudnn": "SDPA cuDNN",
}
table({"attention": name} | moved(peer) for peer, name in peers.items())

# %% [markdown]
# The paper has 40.3 GB and 4.4 GB for this shape, on an A100. (SDPA flash adds dq in float32, and copies two tensors before
# its backward: that is its GB more.)
#
# Does our model of standard attention, the stage `naive`, hold here too? Forward, kernel by kernel:

# %%
(standard,) = counters.cases("peers", peer="standard", causal=False, **{"pass": "fwd"})
_, scores, softmax, output = standard["runs"]  # the first one only scales q
model = {"scores": scores, "softmax": softmax, "output": output}
table(
    {
        "kernel": name,
        "naive, read": cost.KERNELS[f"naive {name}"](shape).hbm_read_bytes,
        "into the SMs": run["l2_to_sm_bytes"],
        "naive, written": cost.KERNELS[f"naive {name}"](shape).hbm_write_bytes,
        "out of them": run["sm_to_l2_bytes"],
    }
    for name, run in model.items()
)

# %% [markdown]
# The softmax is exact: it reads S once and writes P once. The library's products tile as well, so they take q and k
# in several times, and L2 serves that: chapter 01 counts each tensor of a kernel once, the kindest case. What it said of S
# and P stands.
#
# And the production kernels? They tile too, so we can tell their tiles from their bytes. `SDPA flash` is
# FlashAttention-2 in CUDA:

# %%
for peer in ("sdpa-flash", "sdpa-cudnn"):
    (case,) = counters.cases("peers", peer=peer, causal=False, **{"pass": "fwd"})
    (run,) = case["runs"]
    of_128 = cost.flash2(shape.replace(block_q=128)).hbm_read_bytes
    print(
        f"{peers[peer]}: {run['l2_to_sm_bytes'] / of_128:.4f} of flash2 with 128 queries"
    )

# %% [markdown]
# In both, k and v come in 8 times for each head, as with 128 queries in a tile.
#
# ## So how fast?
#
# Chapter 01 drew the roofline: what a card can reach at most, if all our bytes come from HBM. All rungs on it, with
# tiles of 128 × 64:

# %%
rungs = {r.name: cost.FORWARD[r.name](Problem(Nq=4096, D=64)) for r in LADDER}
fig = plots.roofline(
    [gpu("h200")],
    {name: form.intensity for name, form in rungs.items()},
    "float16",
    "By the model without L2, all rungs are bound by memory",
)

# %% [markdown]
# *Figure 3. FLOPs for each byte that our model counts, which takes them all from HBM. On the slope, the speed of HBM is the
# limit.*
#
# Is that so? The record of `flashedu bench` has half of the paper's shape: batch 16, 32 heads. There `flash2` has 64
# queries and 128 keys in a tile, and its least time in this model is:

# %%
h200 = gpu("h200")
half = Problem(B=16, H=32, Nq=1024, D=64, dtype="bfloat16", block_q=64, block_k=128)
bound = h200.bound(cost.flash2(half), "bfloat16")
print(f"bytes at the speed of HBM:  {human_seconds(bound.memory_s)}")
print(f"arithmetic at its peak:     {human_seconds(bound.compute_s)}")

# %% [markdown]
# Predict the measured time, in µs:

# %%
my_prediction_us = 600

# %%
speed = records.latest("speed", card="H200")
(case,) = speed.cases("speed", D=64, N=1024, causal=False, **{"pass": "fwd"})
(flash2,) = (run for run in case["runs"] if run["peer"] == "flash2")
print(f"you said {my_prediction_us} µs; it took {human_seconds(flash2['median_s'])}")

# %% [markdown]
# The kernel is faster than the bound allows. The bound is right for a machine without L2; an H200 is none. Of the 2.3 GB
# that cross place 2, HBM delivers 0.27 GB, for which it needs a sixth of that time. So memory is not the limit.
#
# Is it place 2, then? With 128 queries in a tile, half as many bytes enter the SMs. The record of tiles says what that
# buys:

# %%
tiles = records.load(records.RESULTS / "tiles_h200_2026-11-23.json")
(case,) = tiles.cases("forward", D=64, N=1024, causal=False)
timed = sorted(case["runs"], key=lambda run: run["median_s"])
table(
    {
        "tile": "{} × {}".format(*run["tile"][:2]),
        "into the SMs": human_bytes(
            cost.flash2(half.replace(block_q=run["tile"][0])).hbm_read_bytes
        ),
        "time": human_seconds(run["median_s"]),
    }
    for run in timed[:5]
)

# %% [markdown]
# Nothing: the tiles with half the bytes take longer. For attention in one kernel, the wall of chapter 01 is gone, at
# HBM and behind it. What is left is inside the SM. These records do not say which part of it; chapter 06 named one
# candidate, the exponentials.
#
# For standard attention the wall stands. Its N × N matrices go through DRAM, and no cache helps.
#
# ## Beside PyTorch's kernels
#
# Chapters 06 and 07 showed forward and backward. Here is a whole step of training, at N = 4096 with a causal mask and batch
# 4 (32 heads at D = 64, 16 at D = 128), and what it needs of memory:

# %%
step = records.latest("standard", card="H200")
print(step.label)
table(
    {
        "D": case["D"],
        "attention": peers[run["peer"]],
        "forward + backward": human_seconds(run["median_s"]),
        "memory": human_bytes(run["extra_bytes"]),
        "TFLOP/s": f"{run['tflops']:.0f}",
    }
    for case in step.cases("standard")
    for run in case["runs"]
)

# %%
fig = plots.memory(
    records.latest("memory", card="H200"), "Memory grows with N, not with N²"
)

# %% [markdown]
# *Figure 4. Standard attention passes the memory of the card after N = 8192 in this shape (batch 16, 8 heads, D = 64). The
# memory of both flash kernels grows with N. `flash2` takes half of what SDPA flash does.*
#
# ## What the papers say, and what we found
#
# A time belongs to the card that it was taken on. A ratio may travel. What the papers claim, and what our records have of it:

# %%
claims = published.claims("H200")
table(
    {
        "claim": claim.what,
        "source": claim.source,
        "note": claim.why,
        "reproduced": claim.reproduced,
    }
    for claim in claims
)

# %%
fig = plots.against_published(
    claims, "Bytes and memory are passed; the highest speeds are not reached"
)

# %% [markdown]
# *Figure 5. The claims of the first paper are passed, by the later algorithm and on a later card. What depends on how well
# a chip is used is reached in part, or not.*
#
# - **Time, 5.7 times**: 3.2 without a mask, although our bytes fell more than theirs. From their A100 to this H200,
#   standard attention became 4.7 times as fast and flash 2.6 times (41.7 and 7.3 ms there, for the whole shape). With a
#   mask, PyTorch adds a slow kernel to each pass, and `flash2` skips tiles: 9.
# - **3 to 10 times standard**: reached with a mask. Without, standard attention reaches up to 27% of this card's peak, and
#   1.7 to 4.1 is left.
# - **flash2 to flash1**: not the same comparison. Our `flash1` has the first paper's loop order and nothing else; their
#   released code was tuned.
# - **73% of the peak**: 57% here, and PyTorch's FlashAttention-2 reaches less on this card. An H200 multiplies
#   matrices three times as fast as an A100, and all else in an SM did not keep pace. FlashAttention-3 was written for
#   that, and a later chapter follows it.
#
# ## Takeaway
#
# **Predict from tile sizes, count in the interpreter, measure on the card: for the bytes that `flash2`'s forward takes into
# the SMs, the three are one number. L2 keeps most of them from HBM, so it is no longer bound by memory. What is left of the
# distance to the fastest kernels is inside the SM.**
#
# ## Exercises
#
# **1.** N = 4096, D = 128, 16 heads and a batch of 4. Which tile of queries brings the bytes into the SMs under
# 2.5 GB? What would you check before you use it?
#
# <details><summary>Answer</summary>
#
# ```python
# for block_q in (32, 64, 128, 256):
#     print(block_q, cost.flash2(Problem(B=4, H=16, Nq=4096, D=128, block_q=block_q)).hbm_read_bytes / 1e9)
# ```
#
# 256 gives 2.2 GB. But with 256 queries, acc alone takes 256 · 128 numbers in float32: 128 KiB, half of the registers of
# an SM. Look for spilled bytes first, in what the compiler reports or with the counter.
# </details>
#
# **2.** A kernel should load 1.2 GB, and the counter says 2.6 GB; it stores too much as well. The result is right. What
# do you suspect, and what would settle it?
#
# <details><summary>Answer</summary>
#
# Spilled registers. A tile that is fetched twice would explain the loads, but not the stores. The compiler's report of
# spilled bytes settles it. Then take more warps for a program, or a smaller tile.
# </details>
#
# **3.** Eight query heads share a key head (H = 8, H_kv = 1). By how much does the traffic at place 2 fall, and
# at place 1?
#
# <details><summary>Answer</summary>
#
# At 2 not at all: each program loads k and v for itself, and the closed form says so (`cost.flash2` with `H_kv=1` and with
# `H_kv=8` are equal). At 1, k and v are an eighth as large, and each is read once.
# </details>
