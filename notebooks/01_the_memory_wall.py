# %% [markdown]
# # 01 · The memory wall
#
# **Claim.** Standard attention spends its time moving two N × N matrices to memory and back. The
# arithmetic waits.
#
# Before: [00 · Start here](00_start_here.ipynb). Next: [02 · Tiling](02_tiling.ipynb).

# %%
from flashedu import plots
from flashedu.memory import GPUS, Machine, Problem, cost, gpu
from flashedu.notebook import label, record, source, table
from flashedu.player import play
from flashedu.stages import naive, reference
from flashedu.testing import assert_right, draw
from flashedu.units import human_seconds

# %% [markdown]
# ## Two memories
#
# A GPU has a large memory beside the chip and small ones on it.
#
# - **HBM** (high-bandwidth memory) is the large one: what a data sheet calls the GPU's memory. Every
#   tensor that you make lives there.
# - **SRAM** is on the chip, next to the arithmetic units. A GPU is made of some hundred processors,
#   called **SMs** (streaming multiprocessors), and each has its own SRAM. Arithmetic works on what is
#   in SRAM, and on nothing else.
# - A **kernel** is a program that the GPU runs. It loads from HBM, computes, and stores to HBM. When
#   it ends, what it had in SRAM is lost.
#
# So each kernel pays for its inputs and its outputs in bytes moved. We call these bytes **traffic**.

# %%
fig = plots.hierarchy(gpu("h200"), "The memories of an H200, areas to scale")

# %% [markdown]
# *Figure 1. HBM holds a tensor of any size that you will meet. All SRAM together holds one part in
# 4,600 of that. (The L2 cache lies between them, works by itself, and is left out of our model.)*
#
# ## Standard attention is three kernels
#
# For each head there are N queries, N keys and N values, vectors of D numbers each:
#
# $$S = \tfrac{1}{\sqrt D}\, q k^\top \qquad P = \mathrm{softmax}(S) \qquad O = P v$$
#
# A library runs one kernel for each equation. S and P have N × N numbers. The first kernel stores S in
# HBM, the second loads S and stores P, and the third loads P.
#
# This is the stage `naive`, in NumPy. `load` and `store` move data between HBM and SRAM. Read it from
# the top to the bottom once. `hbm.scratch` makes an array in HBM beside inputs and output, and `sram.hold`
# notes that a matrix was made on the chip. (`shared_by` is for models whose heads share keys and values.)

# %%
source(naive.forward)

# %% [markdown]
# Everything is computed as in any other NumPy code. But each `load` and `store` also counts its bytes,
# on the `machine` that we pass in. We do not estimate traffic: we run the code and count.
#
# ## By hand: four queries, four keys
#
# With N = 4, D = 2 and float16 (2 bytes a number), q, k, v and o take 4 · 2 · 2 = 16 bytes each. S and
# P take 4 · 4 · 2 = 32 bytes each, and each of the two is written once and read once.

# %%
small = Problem(Nq=4, D=2)
q, k, v, _ = draw(small)
machine = Machine()
naive.attention(q, k, v, machine=machine)

table(
    {"tensor": name, "bytes read": read, "bytes written": written}
    for name, (read, written) in machine.bytes_by_tensor().items()
)

# %% [markdown]
# The trace has each step in order; here are the loads and stores. Follow S: it is stored by the first kernel and loaded by the second.

# %%
for event in machine.trace:
    if event.op != "hold":
        print(
            f"{event.kernel:14} {event.op:5} {event.tensor}  {event.hbm_bytes:2} bytes"
        )

# %% [markdown]
# The same steps to play: S and P go up to HBM, and come down again.

# %%
play("naive", small)

# %% [markdown]
# *Figure 2. Each kernel starts with an empty SRAM, so what the next one needs must wait in HBM. (On the chip numbers
# have 4 bytes, in HBM 2: float16 inputs are computed with in float32.)*
#
# ## Predict first
#
# Now N = 4096, D = 64, one head, float16. How many MiB does standard attention move? (1 MiB is 2²⁰
# bytes, and 4096² is 16 · 2²⁰.) Write your number below before you run the next cells.

# %%
my_prediction_mib = 32

# %%
real = Problem(Nq=4096, D=64)
q, k, v, _ = draw(real)
machine = Machine()
o = naive.attention(q, k, v, machine=machine)

counted = machine.counted
print(f"you said {my_prediction_mib} MiB; counted {counted.hbm_bytes / 2**20:.0f} MiB")
inputs_and_output = q.nbytes + k.nbytes + v.nbytes + o.nbytes
print(f"inputs and output alone: {inputs_and_output / 2**20:.0f} MiB")

# %% [markdown]
# S and P have 16 Mi numbers of 2 bytes, 32 MiB each. Both are written and read: 128 MiB. The inputs and
# the output add 2 MiB. Of all the traffic, 98% is for two matrices that nobody asked for.
#
# ## Counted against predicted
#
# In general, for one head and $w$ bytes a number:
#
# $$\text{traffic} = (\,\underbrace{4 N D}_{q,\,k,\,v,\,o} + \underbrace{4 N^2}_{S,\,P\text{: out and in}}\,) \cdot w$$
#
# `flashedu.memory.cost` has such a closed form for every stage. It was written from the equations, not
# from the counters. The two must agree to the byte.

# %%
closed_form = cost.naive(real)
by_hand = (4 * 4096 * 64 + 4 * 4096**2) * 2

print("counted    ", f"{counted.hbm_bytes:,} bytes")
print("closed form", f"{closed_form.hbm_bytes:,} bytes")
print("by hand    ", f"{by_hand:,} bytes")
assert counted == closed_form

# %%
fig = plots.traffic(
    {"naive": machine.bytes_by_tensor()},
    "S and P are nearly all of the traffic (N = 4096, D = 64)",
)

# %% [markdown]
# *Figure 3. The inputs and the output are the slivers at the two ends. The rest is S and P, written
# (hatched) and read.*
#
# ## Why this is slow: the roofline
#
# A GPU has two speed limits: how many FLOPs it computes a second (a FLOP is one addition or
# multiplication of floating-point numbers), and how many bytes it moves a second. Which one a kernel
# hits depends on one ratio, its **arithmetic intensity**: the FLOPs that it does for each byte that
# it moves.
#
# The two matrix products take 4 N² D FLOPs. With 4 N² · 2 bytes of traffic that is about D / 2 FLOPs a
# byte, whatever N is.

# %%
fig = plots.roofline(
    [gpu(key) for key in ("t4", "a100-80", "h100", "h200")],
    {"naive": counted.intensity},
    "float16",
    "Standard attention sits on the slope: memory is its limit",
)

# %% [markdown]
# *Figure 4. On the slope, memory is the limit; on the flat part, arithmetic is. At 32 FLOPs a byte, standard
# attention is on the slope of every card. The point is on that of an H200.*
#
# The same as times. No kernel with this traffic can be faster than the larger of the two columns.

# %%
bounds = {card.name: card.bound(counted, "float16") for card in GPUS}
table(
    {
        "card": name,
        "moving bytes": human_seconds(bound.memory_s),
        "arithmetic": human_seconds(bound.compute_s),
        "arithmetic busy, at most": f"{bound.compute_s / bound.seconds:.0%}",
    }
    for name, bound in bounds.items()
)

# %% [markdown]
# An H200 would compute for at most 15% of the time, and wait for memory for the rest. More FLOPs a second
# would not help. Fewer bytes would.
#
# ## Measured on a card
#
# These are bounds. What does a real H200 do? The same three kernels, as calls of PyTorch, for 64 heads with
# D = 64, in float16. The times were recorded once, on the card that the first line names;
# `benchmarks/standard_attention.py` takes them again.

# %%
recorded = record("standard_attention_h200_2026-11-23")
print(label(recorded))
table(
    {
        "N": row["N"],
        "measured": human_seconds(row["kernels"]["naive"]["median_s"]),
        "bytes, at least": human_seconds(row["kernels"]["naive"]["memory_bound_s"]),
        "arithmetic, at least": human_seconds(
            row["kernels"]["naive"]["compute_bound_s"]
        ),
    }
    for row in recorded["rows"]
)

# %% [markdown]
# No time is below its bounds, and the arithmetic alone would take 5 to 9% of the measured time. Kernel by
# kernel, at N = 4096:

# %%
(row,) = (row for row in recorded["rows"] if row["N"] == 4096)
table(
    {
        "kernel": name,
        "measured": human_seconds(row["kernels"][name]["median_s"]),
        "bytes, at least": human_seconds(row["kernels"][name]["memory_bound_s"]),
        "GFLOPs in products": f"{row['kernels'][name]['flops'] / 1e9:,.0f}",
    }
    for name in ("naive scores", "naive softmax", "naive output")
)

# %% [markdown]
# The softmax multiplies no matrices and takes the longest. It is also the furthest from its bound. (A kernel
# that reads a long row more than once moves more than we count. We did not measure that here.) Our count is
# the kindest case for standard attention.
#
# ## Is it right?
#
# Each stage of the course is held against an **oracle**: the same formulas in float64, without any
# trick. The allowed error is not a number that we picked. It is twice the error that plain PyTorch
# makes in the same precision, plus a few roundings. "Peaked" inputs put nearly all weight on few keys, and "large"
# ones have scores that would overflow an exponential.

# %%
check = Problem(Nq=257, Nk=131, D=40, H=4, H_kv=2, causal=True)
for family in ("normal", "peaked", "large"):
    q, k, v, _ = draw(check, family)
    o = naive.attention(q, k, v, causal=True)
    assert_right(reference.Reference(o, None), q, k, v, causal=True)
    print(f"{family}: within the budget")

# %% [markdown]
# ## Takeaway
#
# **Standard attention moves 4 N² numbers beside the 4 N D of q, k, v and o. At D = 64 it leaves most of a
# modern GPU idle.** What is still slow: S and P go through HBM. The [next chapter](02_tiling.ipynb) keeps
# them on the chip.
#
# ## Exercises
#
# **1.** A model has 32 heads of D = 128 and a batch of 8, at N = 8192, in bfloat16. How much memory do S
# and P take together? Does it fit an H200?
#
# <details><summary>Answer</summary>
#
# 2 · 8 · 32 · 8192² · 2 bytes = 64 GiB. It fits into 141 GB, once, for one layer. At N = 16384 it
# is four times that, 256 GiB, and does not.
# `cost.naive(Problem(B=8, H=32, Nq=8192, D=128)).hbm_extra_bytes` says the same.
# </details>
#
# **2.** A **causal mask** hides from each query the keys that come after it. Does it make standard attention cheaper? Count it.
#
# <details><summary>Answer</summary>
#
# No. Half of S is masked, but it is stored and loaded all the same:
#
# ```python
# cost.naive(Problem(Nq=4096, D=64, causal=True)) == cost.naive(Problem(Nq=4096, D=64))   # True
# ```
# </details>
#
# **3.** In float32 every number takes 4 bytes. What happens to the arithmetic intensity? Is memory
# still the limit on an H200? Its peak in float32 is 66.9 TFLOP/s, as its **tensor cores**, the units for
# matrix products, do not serve float32.
#
# <details><summary>Answer</summary>
#
# It halves: about 16 FLOPs a byte. But the **ridge**, where slope and roof meet, moves further:
# 66.9 / 4.8 = 14 FLOPs a byte. So in float32 the arithmetic is the limit, barely.
# `gpu("h200").ridge("float32")` gives the number.
# </details>
