# %% [markdown]
# # 03 · Online softmax
#
# **Claim.** A maximum and a sum for each row, and an output that is rescaled when the maximum rises, turn
# three passes into one. Nothing is approximated.
#
# Before: [02 · Tiling](02_tiling.ipynb). Next: [04 · Backward](04_backward.ipynb).

# %%
import numpy as np
import torch

from flashedu import ladder, plots
from flashedu.memory import Machine, Problem, cost, gpu
from flashedu.notebook import source, table
from flashedu.player import play
from flashedu.stages import online, reference
from flashedu.testing import assert_right, draw

# %% [markdown]
# From here on the stages are written in PyTorch, because the next chapter needs its gradients. All of this
# chapter runs on the CPU.
#
# ## The problem that the last rung left
#
# Tiling reads k three times and computes each score three times, as the softmax wants the maximum of its
# row before it starts. With the product p v that makes four matrix products where two would do.

# %%
real = Problem(Nq=4096, D=64)
three_passes = cost.tiled(real)
needed = cost.naive(real).flops
print(f"traffic of the three passes: {three_passes.hbm_bytes / 2**20:.0f} MiB")
print(
    f"matrix products computed, to those needed: {three_passes.flops / needed:.0f} to 1"
)

# %% [markdown]
# ## The idea: start with the maximum so far
#
# Suppose that we have seen some of the keys of a row. We know their maximum m, and the sum
# $l = \sum e^{s - m}$. Now a tile comes that holds a larger score. The new maximum is $m'$, and what we
# summed is wrong by one factor, the same for every term:
#
# $$e^{s - m'} = e^{s - m} \cdot e^{m - m'}$$
#
# So multiply the sum by $\alpha = e^{m - m'}$ and go on. The output that was summed so far, called acc,
# is wrong by the same factor. This gives the update for one tile, the **online softmax**:
#
# $$m' = \max(m, \text{rowmax}(s)) \qquad l' = \alpha\, l + \text{rowsum}(p) \qquad
# \text{acc}' = \alpha\, \text{acc} + p\, v \qquad\text{with } p = e^{s - m'}$$
#
# After the last tile, o = acc / l. Nothing was approximated.

# %%
source(online.forward)

# %% [markdown]
# The inner loop is the whole of FlashAttention's forward. Compare it with the three loops of the last
# chapter.
#
# ## By hand: six keys, tiles of two
#
# One query, six keys, and scores that we pick: 1, 3, 2, 5, 4, 0. With D = 1, q = 1 and scale 1, the key
# is its own score. The values are 1, 2, 3, 4, 5, 6. The machine can watch the tiles that a stage holds:
# here m, l and acc after each tile.

# %%
scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 0.0])
k = scores.reshape(1, 1, 6, 1)
v = torch.arange(1.0, 7.0).reshape(1, 1, 6, 1)
q = torch.ones(1, 1, 1, 1)

machine = Machine(watch=["m_i", "l_i", "acc_i"])
o = online.attention(q, k, v, scale=1.0, block_q=1, block_k=2, machine=machine)
m, l, acc = (
    [tile.item() for tile in machine.watched[name][1:]]
    for name in ("m_i", "l_i", "acc_i")
)
table(
    {
        "after keys": f"{2 * j + 1}, {2 * j + 2}",
        "m": f"{m[j]:.4f}",
        "l": f"{l[j]:.4f}",
        "acc": f"{acc[j]:.4f}",
    }
    for j in range(3)
)

# %% [markdown]
# Follow the second line with a pocket calculator. The maximum rises from 3 to 5, so α = e⁻² = 0.1353. The
# sum becomes 0.1353 · 1.1353 + e⁻³ + e⁰ = 1.2034. In the third tile nothing rises, so α = 1.

# %%
p = torch.softmax(scores, 0)
print(f"acc / l at the end:     {acc[-1] / l[-1]:.5f}")
print(f"o, as the stage says:   {o.item():.5f}")
print(f"softmax over all, at v: {(p @ v.flatten()).item():.5f}")

# %% [markdown]
# A longer row, as a picture: 24 keys whose scores tend to rise, in tiles of 4.

# %%
row = Problem(Nq=1, Nk=24, D=1, dtype="float32", block_q=1, block_k=4)
_, k, v, _ = draw(row, "rising", framework="torch", seed=3)
machine = Machine(watch=["m_i", "l_i", "acc_i"])
online.attention(q, k, v, scale=1.0, block_q=1, block_k=4, machine=machine)
m, l, acc = (
    [tile.item() for tile in machine.watched[name][1:]]
    for name in ("m_i", "l_i", "acc_i")
)
fig = plots.running_state(
    k.flatten().tolist(), m, l, acc, 4, "m never falls; l and acc follow it"
)

# %% [markdown]
# *Figure 1. While the maximum stands still, the sum l grows. Where it rises (shaded), what was summed before, l
# and acc alike, is scaled down by α, and the terms of the new tile are added. The terms of acc have the signs of
# the values v, so it can fall below zero.*
#
# Now both stages side by side, on the same 64 tokens. They step together. Which one is done first, and what does the
# other one load in the meantime? The numbers m, l and acc of the running tile stand below.

# %%
play("tiled", "online", Problem(Nq=64, D=16, block_q=8, block_k=8))

# %% [markdown]
# *Figure 2. `online` loads a key tile once for each query tile, and uses it while it is there. `tiled` loads it three times.
# (A step is a line in a notebook of bytes, not a time. Compare the bytes.)*
#
# ## The order does not matter
#
# Two parts of a row, each with its own m, l and acc, merge by the same rule. This operation is
# **associative**: any order, and any grouping, gives the same result. So parts of a row may go to
# different processors, and later chapters send them there. Here three parts merge from the left and
# from the right.


# %%
def merge(a, b):
    (m_a, l_a, acc_a), (m_b, l_b, acc_b) = a, b
    m = max(m_a, m_b)
    alpha, beta = np.exp(m_a - m), np.exp(m_b - m)
    return m, alpha * l_a + beta * l_b, alpha * acc_a + beta * acc_b


# %%
values = np.arange(1.0, 7.0)
parts = []
for tile in (slice(0, 2), slice(2, 4), slice(4, 6)):
    s = scores.numpy()[tile].astype(float)
    weights = np.exp(s - s.max())
    parts.append((s.max(), weights.sum(), weights @ values[tile]))

left = merge(merge(parts[0], parts[1]), parts[2])
right = merge(parts[0], merge(parts[1], parts[2]))
print("from the left:  m = {:.0f}, l = {:.6f}, acc = {:.6f}".format(*left))
print("from the right: m = {:.0f}, l = {:.6f}, acc = {:.6f}".format(*right))

# %% [markdown]
# ## Predict first
#
# The last chapter moved 65 MiB at N = 4096 with tiles of 128 queries: 32 query tiles, and for each k three
# times and v once, and q and o. Now k and v pass by once each. How many MiB?

# %%
my_prediction_mib = 50

# %%
q, k, v, _ = draw(real, framework="torch")
machine = Machine()
o, lse = online.attention_with_lse(q, k, v, machine=machine)
counted = machine.counted
print(f"you said {my_prediction_mib} MiB; counted {counted.hbm_bytes / 2**20:.1f} MiB")
print(f"extra memory: {counted.hbm_extra_bytes / 2**10:.0f} KiB")

# %% [markdown]
# 32 · 2 · 0.5 MiB = 32 MiB, and 1 MiB for q and o. The extra memory is one float32 for each query, the
# **log-sum-exp** lse = m + log l. It takes 4 N bytes, and the next chapter needs it.
#
# ## Counted against predicted

# %%
closed_form = cost.online(real)
by_hand = (2 * 4096 * 64 + 4096 // 128 * 2 * 4096 * 64) * 2 + 4 * 4096

print("counted    ", f"{counted.hbm_bytes:,} bytes")
print("closed form", f"{closed_form.hbm_bytes:,} bytes")
print("by hand    ", f"{by_hand:,} bytes")
assert counted == closed_form

# %%
runs = {name: ladder.count(name, real) for name in ("naive", "tiled", "online")}
fig = plots.traffic(
    {name: run.bytes_by_tensor() for name, run in runs.items()},
    "Each rung halves the traffic (N = 4096, D = 64)",
)

# %% [markdown]
# *Figure 3. From standard attention to one pass: a quarter of the traffic, at the same tile size on
# the same machine.*
#
# How the bytes add up while the stages run, at N = 1024:

# %%
shorter = real.replace(Nq=1024, Nk=1024)
fig = plots.cumulative_traffic(
    {
        name: ladder.count(name, shorter, trace=True).trace
        for name in ("naive", "tiled", "online")
    },
    "naive in four leaps, the others tile by tile (N = 1024, D = 64)",
)

# %% [markdown]
# *Figure 4. Solid: read and written. Dashed: read alone. Half of what `naive` moves is written; the other two write
# their result and little else.*
#
# ## Memory: where S no longer fits the card
#
# A 7B-sized model has 32 heads of D = 128. For one layer and a batch of 1, in float16, standard attention
# needs room for S and P. The online softmax needs room for lse.

# %%
lengths = [2**e for e in range(10, 18)]
layers = [Problem(Nq=n, D=128, H=32) for n in lengths]
extra = {
    "naive": [cost.naive(p).hbm_extra_bytes for p in layers],
    "online": [cost.online(p).hbm_extra_bytes for p in layers],
}
fig = plots.memory_against_n(
    lengths,
    extra,
    [gpu("rtx4090"), gpu("h200")],
    "S and P outgrow any card; lse stays small",
)

# %% [markdown]
# *Figure 5. Standard attention's extra memory grows with N², and passes the whole memory of an H200 soon
# after N = 32,768. The online softmax's grows with N.*
#
# The closed forms are exact, so the last length that fits is a number:

# %%
for key in ("rtx4090", "a100-80", "h200"):
    card = gpu(key)
    n = int((card.hbm_bytes / (32 * 2 * 2)) ** 0.5)  # 32 heads, S and P, 2 bytes each
    print(f"{card.name:10} S and P of one layer fit up to N = {n:,}")

# %% [markdown]
# ## Is it right?
#
# Four families of inputs: "normal" ones; "peaked", where a few keys take nearly all the weight; "large", whose
# scores overflow an exponential if the maximum is not subtracted; and "rising", whose scores grow along the
# keys, so that every tile raises the maximum. A stage that forgets to rescale is furthest off on the last.
# `H_kv=2` means that pairs of query heads share a key and value head, as in many models today.

# %%
check = Problem(Nq=257, Nk=131, D=40, H=4, H_kv=2, causal=True, dtype="float32")
for family in ("normal", "peaked", "large", "rising"):
    q, k, v, _ = draw(check, family, framework="torch")
    o, lse = online.attention_with_lse(q, k, v, causal=True, block_q=32, block_k=48)
    assert_right(reference.Reference(o, lse), q, k, v, causal=True)
    print(f"{family}: o and lse within the budget")

# %% [markdown]
# ## Takeaway
#
# **One pass is enough, exactly: keep m, l and acc, and rescale when m rises. Traffic falls to a quarter
# of standard attention's, and extra memory from N² to N.** What is missing: training needs gradients,
# and standard attention keeps P for them. The [next chapter](04_backward.ipynb) does without.
#
# ## Exercises
#
# **1.** What are m, l and acc before any key was seen, and what does `merge` do with them?
#
# <details><summary>Answer</summary>
#
# m = −∞, l = 0, acc = 0. Merging them with any part gives that part: they are the neutral element. With
# two such parts, −∞ − (−∞) is NaN, so the stage starts from the lowest finite float32 instead.
# </details>
#
# **2.** The stage divides by l once, at the end. What would it cost to keep o normalised after each tile?
#
# <details><summary>Answer</summary>
#
# One more division of the whole acc tile for each key tile: 128 · 64 divisions, 64 times for each query
# tile at N = 4096, in place of once. FlashAttention-1 did so. FlashAttention-2 removed it, because work
# outside matrix products is expensive on a GPU.
# </details>
#
# **3.** Break it. Copy the source of `online.forward` into a cell, with these two lines above it, and leave out
# `alpha *` in the line of acc_i. Put `online.forward = forward` below it, and run the check above again. (To
# undo it, restart the kernel.)
#
# ```python
# from flashedu.memory.hbm import acc_dtype
# from flashedu.stages.online import _hidden
# ```
#
# <details><summary>Answer</summary>
#
# The check raises an AssertionError on the first family already: o is off by nearly 1, and the budget is
# 10⁻⁵. The test suite holds this mistake and some seventy others, as **mutants**: changed copies of the stages
# that the tests must reject.
# </details>
