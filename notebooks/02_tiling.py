# %% [markdown]
# # 02 · Tiling
#
# **Claim.** A tile of S fits on the chip, so S never needs HBM. But a softmax needs its whole row, so
# the keys must pass by three times.
#
# Before: [01 · The memory wall](01_the_memory_wall.ipynb). Next:
# [03 · Online softmax](03_online_softmax.ipynb).

# %%
from flashedu import ladder, plots
from flashedu.memory import Machine, Problem, SRAMOverflow, cost, gpu
from flashedu.notebook import source, table
from flashedu.player import play
from flashedu.stages import naive, reference, tiled
from flashedu.testing import assert_right, draw
from flashedu.units import human_bytes

# %% [markdown]
# ## The problem that the last rung left
#
# At N = 4096 and D = 64, standard attention moves 130 MiB, and 128 of them are S and P. Could a kernel
# keep S on the chip from start to end? A kernel runs as many **programs** at once, each on one SM, with its
# share of the work and of the SRAM: here, one head. Let us try the same stage on a machine whose SRAM has the
# size that one program may use on an H200.

# %%
real = Problem(Nq=4096, D=64)
q, k, v, _ = draw(real)
h200 = gpu("h200")

try:
    naive.attention(q, k, v, machine=Machine(h200.sram_bytes_per_program))
except SRAMOverflow as error:
    print(error)

# %% [markdown]
# Not even q fits. S would take 64 MiB, as the chip computes in float32. (A library's kernel cuts its matrices to fit, for each of
# the three steps apart. That is why S must wait in HBM in between.)
#
# ## The idea: cut the whole computation, not each step
#
# Cut q into **tiles** of `block_q` rows, and k and v into tiles of `block_k` rows. A tile of q and a
# tile of k give a tile of S, small enough to stay on the chip:
#
# $$s_{ij} = \tfrac{1}{\sqrt D}\, q_i k_j^\top$$
#
# Index i counts query tiles, and index j counts key tiles. One query tile stays while all key tiles
# pass by. The output tile of a query tile needs nothing from other query tiles.
#
# There is one obstacle. The softmax of a row is
#
# $$m = \max_n s_n \qquad l = \sum_n e^{s_n - m} \qquad p_n = e^{s_n - m} / l$$
#
# where n counts the keys of the row.
#
# The maximum m is subtracted so that no exponential overflows: this is called the **safe softmax**. It
# needs m before the first exponential, and l before the first weight. Both need the whole row, and
# the row is never on the chip as a whole. So the keys pass by three times: once for m, once for l, and
# once for the output.

# %%
source(tiled.forward)

# %% [markdown]
# Note three things.
#
# - `sram.tiles(…)` walks over the tiles. What is loaded in one pass of the loop is freed when the pass
#   ends.
# - `scores` is called in each of the three passes. The same scores are computed three times.
# - S does not appear as an HBM array any more. `sram.hold` gives a tile that was made on the chip a place
#   there.
#
# ## By hand: six queries, tiles of two
#
# This is the order in which the tiles of S are computed. Each is computed three times.

# %%
small = Problem(Nq=6, D=4, block_q=2, block_k=2)
q6, k6, v6, _ = draw(small)
machine = Machine()
tiled.attention(q6, k6, v6, block_q=2, block_k=2, machine=machine)
fig = plots.visits(machine.trace, small, "Each tile of S is computed three times")

# %% [markdown]
# *Figure 1. The numbers are the turns at which a tile is computed, and the colour is that of the first. In the
# first row of tiles, turns 1, 2, 3 are for the maximum, 4, 5, 6 for the sum, and 7, 8, 9 for the output.*
#
# What one program holds in SRAM, for the first query tile:

# %%
first_store = [event.op for event in machine.trace].index("store")
first = machine.trace[: first_store + 1]
fig = plots.sram_occupancy(first, "SRAM fills and empties with each key tile")

# %% [markdown]
# *Figure 2. The query tile and its m, l and o stay. Key, value and score tiles come and go.*
#
# All of it to play, with 64 tokens in tiles of eight. Watch k: it goes down three times for each query tile, and v once.

# %%
play("tiled", Problem(Nq=64, D=16, block_q=8, block_k=8))

# %% [markdown]
# *Figure 3. Nearly three quarters of the bytes that go down are k, read three times for each query tile.*
#
# ## A tile that is too large
#
# How large can a tile be? The machine knows its capacity. Ask for too much, and it says what is in the
# way and what would fit.

# %%
try:
    tiled.attention(
        q, k, v, block_q=512, block_k=256, machine=Machine(h200.sram_bytes_per_program)
    )
except SRAMOverflow as error:
    print(error)

# %% [markdown]
# ## Predict first
#
# With tiles of 128 queries there are 4096 / 128 = 32 query tiles. For each, all of k (0.5 MiB) passes by
# three times, and all of v once. How many MiB does the stage move, with q and o (0.5 MiB each)?

# %%
my_prediction_mib = 100

# %%
machine = Machine(h200.sram_bytes_per_program)
o = tiled.attention(q, k, v, block_q=128, block_k=64, machine=machine)
counted = machine.counted
print(f"you said {my_prediction_mib} MiB; counted {counted.hbm_bytes / 2**20:.0f} MiB")
print(f"extra memory: {counted.hbm_extra_bytes} bytes")

# %% [markdown]
# 32 · (3 + 1) · 0.5 MiB = 64 MiB, and 1 MiB for q and o. That is half of standard attention's, with no
# extra memory at all.
#
# ## Counted against predicted
#
# For one head, $w$ bytes a number and $B_q$ queries in a tile:
#
# $$\text{traffic} = \Big(\, 2 N D + \frac{N}{B_q} \cdot 4 N D \,\Big) \cdot w$$

# %%
closed_form = cost.tiled(real)
by_hand = (2 * 4096 * 64 + 4096 // 128 * 4 * 4096 * 64) * 2

print("counted    ", f"{counted.hbm_bytes:,} bytes")
print("closed form", f"{closed_form.hbm_bytes:,} bytes")
print("by hand    ", f"{by_hand:,} bytes")
assert counted == closed_form

# %%
standard = Machine()
naive.attention(q, k, v, machine=standard)
fig = plots.traffic(
    {"naive": standard.bytes_by_tensor(), "tiled": machine.bytes_by_tensor()},
    "S and P are gone; k is read again and again (N = 4096, D = 64)",
)

# %% [markdown]
# *Figure 4. Tiling trades traffic of S and P for repeated reads of k and v, and wins by half.*
#
# ## Larger tiles, less traffic
#
# A key that has been loaded serves all queries of the tile. With twice as many queries in a tile, k and v
# pass by half as often. So SRAM buys traffic.
#
# We run the stage with five tile sizes, at N = 2048, and note the SRAM that each takes. A theorem of the
# FlashAttention paper (which writes d for D) says what to expect of an SRAM of size M: traffic in proportion
# to N² D² / M.
# Twice the SRAM, half the traffic.

# %%
# queries and keys in a tile
sizes = [(16, 16), (32, 32), (64, 64), (128, 64), (256, 64)]
sweep = [
    Problem(Nq=2048, D=64, block_q=block_q, block_k=block_k)
    for block_q, block_k in sizes
]
counts = [ladder.count("tiled", problem).counted for problem in sweep]
table(
    {
        "tile": f"{block_q} × {block_k}",
        "SRAM used": human_bytes(counted.sram_peak_bytes),
        "HBM traffic": human_bytes(counted.hbm_bytes),
    }
    for (block_q, block_k), counted in zip(sizes, counts, strict=True)
)

# %%
fig = plots.traffic_against_sram(
    [c.sram_peak_bytes for c in counts],
    {
        "naive": [cost.naive(sweep[0]).hbm_bytes] * 5,
        "tiled": [c.hbm_bytes for c in counts],
    },
    [
        counts[0].hbm_bytes * counts[0].sram_peak_bytes / c.sram_peak_bytes
        for c in counts
    ],
    [gpu(key) for key in ("t4", "rtx4090", "a100-80", "h200")],
    "Twice the SRAM, half the traffic",
)

# %% [markdown]
# *Figure 5. Counted traffic follows the theorem's slope. The vertical lines are what one program may use
# on real cards. Where the curves cross, at 64 queries in a tile, three-pass tiling moves as much as
# standard attention: at D = 64 it pays only with larger tiles.*
#
# ## Is it right?
#
# Tiles must not show in the result. Sizes that no tile divides are the test: 257 queries, 131 keys.

# %%
check = Problem(Nq=257, Nk=131, D=40, H=4, H_kv=2, causal=True)
for family in ("normal", "peaked", "large"):
    q, k, v, _ = draw(check, family)
    for block_q, block_k in ((16, 16), (32, 48), (300, 300)):
        o = tiled.attention(q, k, v, causal=True, block_q=block_q, block_k=block_k)
        assert_right(reference.Reference(o, None), q, k, v, causal=True)
    print(f"{family}: within the budget, at three tile sizes")

# %% [markdown]
# ## Takeaway
#
# **Tiles keep S and P on the chip, and the traffic falls as the tiles grow.** What is still slow: the
# same scores are computed three times, and k is read three times, because the softmax wants its whole row
# first. The [next chapter](03_online_softmax.ipynb) does it in one pass.
#
# ## Exercises
#
# **1.** With a **causal mask**, as in a model that writes text from left to right, a query sees no keys that
# come after it. Draw `plots.visits` for the hand-sized run with
# `causal=True`. Which tiles are skipped? What does that do to the traffic at N = 4096?
#
# <details><summary>Answer</summary>
#
# Tiles above the diagonal are never loaded: here 3 of 9, and nearly half where there are many. Those with a
# stroke hold the diagonal: they are computed, and partly masked.
#
# ```python
# small = Problem(Nq=6, D=4, block_q=2, block_k=2, causal=True)
# machine = Machine()
# tiled.attention(q6, k6, v6, causal=True, block_q=2, block_k=2, machine=machine)
# plots.visits(machine.trace, small, "causal")
# cost.tiled(Problem(Nq=4096, D=64, causal=True)).hbm_bytes / 2**20   # 34, in place of 65
# ```
# </details>
#
# **2.** Keep 128 queries in a tile and change `block_k` from 64 to 16. What happens to the traffic? What
# happens to the SRAM that is used? Which of the two is worth the space?
#
# <details><summary>Answer</summary>
#
# The traffic stays as it is: for each query tile, k still passes by three times and v once. The SRAM falls
# from 97.0 to 61.0 KiB. Only `block_q` buys traffic, so a small `block_k` leaves room for more queries.
# (A real kernel has other reasons for a `block_k` of 32 or more: matrix units want such sizes.)
# </details>
#
# **3.** Could the second pass be saved by computing l in the first pass, without m? Try scores of 100.
#
# <details><summary>Answer</summary>
#
# `numpy.exp(numpy.float32(100))` overflows to infinity, and the result is NaN. Without the maximum, the sum
# is not safe. The next chapter finds a way to have both in one pass.
# </details>
