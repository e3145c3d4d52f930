# %% [markdown]
# # 05 · Triton and FlashAttention-1
#
# **Claim.** The online softmax fits into one program for the GPU. But in the loop order of the first
# FlashAttention the output travels to HBM and back again and again, and few programs run.
#
# Before: [04 · Backward](04_backward.ipynb). Next: [06 · FlashAttention-2](06_flash2.ipynb).

# %%
import math

import torch

from flashedu import first_kernels, ladder, plots
from flashedu.first_kernels import add, count, softmax
from flashedu.memory import Machine, Problem, cost, gpu
from flashedu.notebook import source, table
from flashedu.player import play
from flashedu.stages import flash1, online, reference, triton_mode
from flashedu.testing import assert_right, draw

# %% [markdown]
# ## The problem that the last rung left
#
# The stage `online` counts what a fast kernel moves, but it is a loop in Python. How often does the inner
# loop run, for one head at N = 4096? Each pass loads one tile of k, so the trace tells.

# %%
real = Problem(Nq=4096, D=64)
trace = ladder.count("online", real, trace=True).trace
passes = sum(event.tensor == "k" for event in trace)
print(f"{passes:,} passes")

# %% [markdown]
# In each pass PyTorch runs some sixteen operations: products, maxima, exponentials. On a GPU each of them is a
# kernel of its own, more than 30,000 in all, and every kernel leaves its result in HBM. The SRAM of our stage
# was bookkeeping. To keep a tile on the chip from one operation to the next, all of them must be in one
# kernel, and we must write it.
#
# ## What a GPU program is
#
# A GPU has many SMs (streaming multiprocessors, chapter 01): an H200 has 132. Each has its own SRAM, called
# **shared memory**, and its own **registers**, which are the places of the numbers that it computes with.
#
# - A kernel is started as a **grid** of programs: so many copies of the same code. Each copy has a number
#   of its own, its `tl.program_id`, and the number decides which part of the work is its own.
# - Each SM takes a program and runs it to its end. Then it takes the next. So 132 SMs run 132 programs
#   at once, or more if an SM has room for several. The order is not fixed, and programs do not wait for each
#   other.
# - A program works on whole **tiles**: a variable is a vector or a matrix, not one number. The tile lies in
#   the registers and the shared memory of its SM.
#
# We write kernels in **Triton**. It looks like Python, and it is compiled for the GPU. On a machine with no GPU
# it is **interpreted**: the programs run one after another, on the CPU. The results are right and every byte
# can be counted, but it is slow, and its times say nothing about a GPU. Triton chooses between the two when it
# is imported. So flashedu, which looks for a GPU and tells Triton, is always imported before it.

# %% tags=["nbval-ignore-output"]
# A machine with a GPU prints the other word.
device = "cpu" if triton_mode.INTERPRETED else "cuda"
print("interpreted" if triton_mode.INTERPRETED else "compiled")

# %% [markdown]
# ## A first kernel: add two vectors
#
# Cut the vectors into tiles of BLOCK numbers. Each program adds one tile.

# %%
fig = plots.masked_tiles(
    10, 4, "Ten numbers in tiles of four: three programs, the last one masked"
)

# %% [markdown]
# *Figure 1. The tiles cover more than there is, unless the tile divides the vector. What lies beyond belongs
# to somebody else, and must be neither read nor written.*

# %%
source(first_kernels.add_kernel.fn)

# %% [markdown]
# Line by line:
#
# - X, Y and Z are **pointers**: the address of the first number of an array in HBM. `here` holds **offsets**,
#   one for each number of the tile, so `X + here` is a tile of addresses.
# - `tl.load` copies the numbers at these addresses from HBM into the SM. `tl.store` copies them back. These are
#   the `load` and `store` of the last four chapters.
# - `mask` says which of the addresses to touch. Where it is False, nothing is read or written.
# - `tl.constexpr` marks a number that is known when the kernel is compiled. The size of a tile is one, because
#   the compiler deals its numbers out to the registers.
# - A tile's size is a power of two. An SM computes with threads in groups of 32, called **warps**, and powers of
#   two share out evenly. N is what the user has, hence the mask.
#
# A function on the **host**, the CPU's side, makes room for the result and starts the grid. The grid stands in
# brackets: `add_kernel[(programs,)](…)`. (`_launch` picks the GPU that x is on, and counts.)

# %%
source(first_kernels.add)

# %% [markdown]
# Forty numbers, in tiles of sixteen. The counter that followed the stages now follows the kernel's own loads
# and stores.

# %%
x, y = torch.arange(80.0).reshape(2, 40)
machine = count(add, x, y, block=16)
first = machine.trace[0].step
table(
    {
        "program": event.step - first,
        "": f"{event.op} {event.tensor}",
        "numbers": f"{event.start} to {event.stop - 1}",
        "bytes": event.hbm_bytes,
    }
    for event in machine.trace
)

# %% [markdown]
# The last program moves 8 numbers of 4 bytes in place of 16: the mask at work.
#
# Predict: how many bytes does the sum of two vectors of 100,000 numbers in float32 move, and how many programs
# of 1024 numbers does it take?

# %%
my_prediction_bytes, my_prediction_programs = 800_000, 100

# %%
x, y = torch.randn(2, 100_000)
machine = count(add, x, y)
(programs,) = machine.programs.values()
by_hand = 3 * 4 * 100_000
print(f"you said {my_prediction_bytes:,} bytes, {my_prediction_programs} programs")
print(f"counted  {machine.counted.hbm_bytes:,} bytes, {programs} programs")
print(f"by hand  {by_hand:,} bytes, {-(-100_000 // 1024)} programs")
assert machine.counted.hbm_bytes == by_hand
assert torch.equal(add(x.to(device), y.to(device)).cpu(), x + y)

# %% [markdown]
# ## A second kernel: softmax of each row
#
# Now each program takes one row of a matrix, which fits on the chip. The row is loaded once. The maximum, the
# exponentials, the sum and the division all work on the tile in the registers.

# %%
source(first_kernels.softmax_kernel.fn)

# %% [markdown]
# What the mask hides is not read, but the tile needs some number there: `other` gives it. Here it must be −∞,
# which is never the maximum, and whose exponential is 0.
#
# For each row, N numbers come in and N go out: 2 · 4 · N bytes in float32.

# %%
x = torch.randn(64, 1000)
machine = count(softmax, x)
by_hand = 64 * 2 * 4 * 1000
print(f"counted {machine.counted.hbm_bytes:,} bytes, {machine.programs}")
print(f"by hand {by_hand:,} bytes")
assert machine.counted.hbm_bytes == by_hand

p = softmax(x.to(device)).cpu()
print("as PyTorch's:", torch.allclose(p, torch.softmax(x, -1), rtol=1e-5, atol=0))

# %% [markdown]
# This is the middle one of the three kernels of standard attention. It makes the best of its own bytes, and
# still S came from HBM and P goes there.
#
# ## The idea of FlashAttention
#
# Now all of attention in one kernel. FlashAttention, as it was first published in 2022, has the update of
# chapter 03, in another loop order: key tiles outside, query tiles inside.

# %%
tiny = Problem(Nq=48, D=16, block_q=16, block_k=16)
fig = plots.loop_orders(
    {
        "online: a query tile meets all keys": ladder.count(
            "online", tiny, trace=True
        ).trace,
        "flash1: a key tile meets all queries": ladder.count(
            "flash1", tiny, trace=True
        ).trace,
    },
    16,
    16,
    "The same tiles of S, by rows or by columns",
)

# %% [markdown]
# *Figure 2. The turns at which the tiles of S are computed. By rows, a query tile is finished before the next one
# begins. By columns, each query tile is left unfinished until its next turn.*
#
# By columns, k and v are loaded once only. But a query tile has o, m and l, and there is no room on the
# chip for those of all query tiles. So they wait in HBM: each turn loads them, updates them and stores them. What
# waits is an output that is right for the keys seen so far, that is, divided by l:
#
# $$o' = \frac{\alpha\, l\, o + p\, v}{l'} \qquad\text{with } \alpha = e^{m - m'},\; p = e^{s - m'}
# \text{ and } l' = \alpha\, l + \text{rowsum}(p)$$
#
# Each program takes one head of one sequence of the batch.

# %%
source(flash1.forward_kernel.fn)

# %% [markdown]
# It is the longest function of the course so far. Its parts:
#
# - q, k, v and o come as **tensor descriptors**: address, shape and strides of a tensor, and the shape of a tile.
#   `K.load([b, h, j, 0])` loads the tile whose first row is j. What lies beyond the tensor reads as 0 and is not
#   written, so no mask is needed. O_F32, M, L and LSE are plain pointers, with masks.
# - `tiles_of` (on the host) or `in_tiles` (here, on cards before Hopper) makes the descriptors. A loaded tile has the
#   shape (1, 1, rows, COLUMNS), and `reshape` drops the ones. `COLUMNS` is D rounded up to a power of two.
# - `GROUP` query heads share a key head, so head h reads key head h // GROUP.
# - The first loop sets o, m and l to what they are before any key: 0, the lowest number, and 0.
# - The loops over j and i are those of Figure 2. `tl.dot` is the product of two tiles, which an SM does on its
#   tensor cores if they are float16; `"ieee"` asks for true float32 if they are float32 (chapter 09). `_elements` gives the offsets and the mask of the rows of a tile.
# - Keys beyond Nk read as 0, and so would have a score of 0. They get −∞ instead, as hidden keys do.
# - A program is run by many threads. `tl.debug_barrier` makes them wait for each other: what one
#   thread stored, another may load next.
# - The last loop rounds o to the inputs' dtype, and writes lse = m + log l.
#
# The host function makes room for o, m and l in float32, and starts B · H programs, on the card that q is on.
# `num_warps` says how many warps run a program, and `num_stages` how many loads are under way at a time.

# %%
source(flash1.forward)

# %% [markdown]
# ## By hand: the first turns
#
# 48 queries and 48 keys, D = 16, in tiles of 16: three turns for each key tile. Here is what the kernel loads
# and stores in the first two of them, after o, m and l were set.

# %%
trace = ladder.count("flash1", tiny, trace=True).trace
begin = [event.tensor for event in trace].index("k")
table(
    {
        "": f"{event.op} {event.tensor}",
        "rows": f"{event.start} to {event.stop - 1}",
        "bytes": event.hbm_bytes,
    }
    for event in trace[begin : begin + 16]
)

# %% [markdown]
# All of it to play. The kernel has one program here, as there is one head. What it keeps on chip is the compiler's
# choice, so the player shows what was loaded, without sizes.

# %%
play("flash1", tiny)

# %% [markdown]
# *Figure 3. For each key tile, o_f32, m and l come down and go up again, for all query tiles.*
#
# One tile of k, one of v, and then for each query tile: q in, o in, o out. `o_f32` is o while it waits, in float32.
# With 4 bytes a number and two ways, it moves four times as many bytes as q.
#
# The stage stops after the last key tile, so to see o after one, two and three key tiles, we give it 16, 32
# and 48 keys. Beside it, for the same query, what `online` has on the chip at these moments.

# %%
inputs = draw(tiny.replace(dtype="float32"), "rising", framework="torch")
q, k, v, _ = (x.to(device) for x in inputs)
tiles = {"block_q": 16, "block_k": 16}
watch = Machine(watch=["m_i", "l_i", "acc_i"])
online.attention(q, k, v, **tiles, machine=watch)
m, l, acc = (
    [tile[0, 0, 0, 0].item() for tile in watch.watched[name][1:4]]
    for name in ("m_i", "l_i", "acc_i")
)

keys = (16, 32, 48)
results = [
    flash1.attention_with_lse(q, k[:, :, :n], v[:, :, :n], **tiles) for n in keys
]
table(
    {
        "after keys": n,
        "online: m": f"{m[j]:.4f}",
        "l": f"{l[j]:.4f}",
        "acc / l": f"{acc[j] / l[j]:.4f}",
        "flash1: o": f"{results[j][0][0, 0, 0, 0]:.4f}",
        "m + log l": f"{m[j] + math.log(l[j]):.4f}",
        "flash1: lse": f"{results[j][1][0, 0, 0]:.4f}",
    }
    for j, n in enumerate(keys)
)

# %% [markdown]
# They agree. The algorithm is that of chapter 03; what changed is where o waits.
#
# ## Predict first
#
# One head, N = 512, D = 64, float16, tiles of 64 queries and 64 keys. The stage `online` moves 1.1 MiB. `flash1`
# loads k and v once only. But o takes 128 KiB in float32, and there are 8 key tiles. How many MiB?

# %%
my_prediction_mib = 1.0

# %%
problem = Problem(Nq=512, D=64, block_q=64, block_k=64)
machine = ladder.count("flash1", problem)
counted = machine.counted
print(f"you said {my_prediction_mib} MiB; counted {counted.hbm_bytes / 2**20:.2f} MiB")
waiting = sum(machine.bytes_by_tensor()["o_f32"])
print(f"of these, o as it waits: {waiting / 2**20:.2f} MiB")

# %% [markdown]
# The 128 KiB of o cross twice for each of the 8 key tiles, and twice more, when o is set and when it is rounded:
# 18 · 128 KiB = 2.25 MiB.
#
# ## Counted against predicted
#
# With $T = N / B_k$ key tiles, for one head and $w$ bytes a number:
#
# $$\text{traffic} = \underbrace{3 N D w}_{k,\,v,\,\text{result}} + \underbrace{T N D w}_{q}
# + \underbrace{2\,(T + 1)\, N\, (4 D + 8)}_{o,\,m,\,l\text{ in and out}} + \underbrace{4 N}_{\text{lse}}$$

# %%
N, D, w, T = 512, 64, 2, 512 // 64
by_hand = 3 * N * D * w + T * N * D * w + 2 * (T + 1) * N * (4 * D + 8) + 4 * N
closed_form = cost.flash1(problem)

print("counted    ", f"{counted.hbm_bytes:,} bytes")
print("closed form", f"{closed_form.hbm_bytes:,} bytes")
print("by hand    ", f"{by_hand:,} bytes")
assert counted == closed_form

# %%
runs = {name: ladder.count(name, problem) for name in ("naive", "online", "flash1")}
fig = plots.traffic(
    {name: run.bytes_by_tensor() for name, run in runs.items()},
    "Three quarters of flash1's traffic is o, waiting (N = 512, tiles of 64)",
)

# %% [markdown]
# *Figure 4. `flash1` reads k and v once. What that saves is little beside what o costs, and here it moves more than
# standard attention.*
#
# ## Larger key tiles
#
# So was FlashAttention no better than standard attention? It was, with larger tiles. In the formula the tile of
# queries does not appear at all. The tile of keys does: twice as many keys in a tile, half as many times o crosses.
# The paper therefore takes key tiles as large as the SRAM allows. It shows (Figure 2, middle) that traffic falls as
# they grow, and time with it, up to some 256 keys.
#
# The closed form equals the count, so for N = 4096 it may stand for it: an interpreted run would take minutes.

# %%
key_tiles = [16, 32, 64, 128, 256]
sweep = [Problem(Nq=4096, D=64, block_q=128, block_k=size) for size in key_tiles]
fig = plots.traffic_against_tile(
    key_tiles,
    {
        name: [cost.FORWARD[name](problem).hbm_bytes for problem in sweep]
        for name in ("naive", "flash1", "flash2")
    },
    "keys in a tile, block_k (128 queries in a tile)",
    "flash1 needs large key tiles; flash2 does not care (N = 4096, D = 64)",
)

# %% [markdown]
# *Figure 5. With fewer than some 80 keys in a tile, `flash1` moves more than standard attention. With 256, it moves a
# third of it. `flash2`, the next chapter, moves the bytes of `online`: its traffic depends on the tile of queries.*
#
# A caution. Our model has no L2 cache. On a real card part of this o may still be in L2 when it comes back, and costs
# less than a trip to HBM. Chapter 08 lets a card count.
#
# ## How many SMs work?
#
# A key tile belongs to all queries of its head, and all turns update the same o. Two programs for one head would
# overwrite each other's o. So there is one program for each head of each sequence in the batch, B · H in all.

# %%
for B, H in ((1, 1), (1, 8), (2, 4)):
    small = Problem(B=B, H=H, Nq=32, D=16, block_q=16, block_k=16)
    print(f"B = {B}, H = {H}:", ladder.count("flash1", small).programs)

# %% [markdown]
# Predict: a model with 8 heads, a batch of 1, N = 16,384, on an H200. How many of the 132 SMs are idle?

# %%
my_prediction_idle = 0

# %%
sms = gpu("h200").sm_count
print(f"you said {my_prediction_idle}; it is {sms - 1 * 8} of {sms}, whatever N is")

# %%
fig = plots.busy_sms(
    {
        "batch 1, 8 heads": 1 * 8,
        "batch 4, 16 heads": 4 * 16,
        "batch 16, 32 heads": 16 * 32,
    },
    sms,
    "One program a head: few heads leave most of an H200 idle",
)

# %% [markdown]
# *Figure 6. Each column is an SM, each row a **wave**: programs that run at the same time. The last wave is seldom full.
# (If two programs fit an SM, they share its arithmetic units, and a launch of 8 programs leaves 124 SMs
# idle all the same.)*
#
# A large batch of short texts fills the card. The paper's own example (Figure 2, left) has a batch of 64 and 16
# heads: 1,024 programs. Long texts do not, because memory then allows few at a time.
#
# ## Is it right?
#
# The oracle again, with tiles of 32 that divide neither N, and heads that share keys. All three dtypes take their
# turn. (NumPy has no bfloat16, so where kernels are interpreted, float32 stands in for it inside the kernel.)

# %%
check = Problem(Nq=67, Nk=53, D=40, H=4, H_kv=2, causal=True)
for family in ("normal", "peaked", "large", "rising"):
    for dtype in ("float32", "float16", "bfloat16"):
        inputs = draw(check.replace(dtype=dtype), family, framework="torch")[:3]
        on_device = (x.to(device) for x in inputs)
        results = flash1.attention_with_lse(
            *on_device, causal=True, block_q=32, block_k=32
        )
        o, lse = (x.cpu() for x in results)
        assert_right(reference.Reference(o, lse), *inputs, causal=True)
    print(f"{family}: o and lse within the budget, in three dtypes")

# %% [markdown]
# ## Takeaway
#
# **A kernel keeps a tile on the chip from its first operation to its last. FlashAttention-1 does so with S and
# P, but its loop order sends o to HBM for each key tile, and gives a head one SM.** What is still slow: both come
# from having the keys outside. The [next chapter](06_flash2.ipynb) turns the loops round.
#
# ## Exercises
#
# **1.** `add_kernel` runs on 10 numbers with BLOCK = 4. Write down `here` and the mask for program 2. What
# would happen without the masks?
#
# <details><summary>Answer</summary>
#
# `here` is 8, 9, 10, 11, and the mask True, True, False, False. Without it, the program would read and overwrite
# two numbers that lie behind the arrays in HBM. On a GPU that ends in an error, or in somebody else's wrong
# results. The tests of this course do it on purpose: the counter knows every address of the arrays, and stops with
# "a load at an address that no array has".
# </details>
#
# **2.** Eight query heads share one key and value head (`H_kv=1`). How much less does `flash1` move than with
# `H_kv=8`, at N = 4096?
#
# <details><summary>Answer</summary>
#
# Nothing. Each of the eight programs loads the same k and v for itself.
#
# ```python
# shared = Problem(Nq=4096, D=64, H=8, H_kv=1)
# cost.flash1(shared) == cost.flash1(shared.replace(H_kv=8))   # True
# ```
#
# The tensors k and v take an eighth of the memory, though, and on a card the L2 cache serves some of the loads.
# </details>
#
# **3.** Let o wait in the inputs' float16, in place of float32. How much traffic would that save at N = 4096, with 64
# keys in a tile? Why does the stage not do it?
#
# <details><summary>Answer</summary>
#
# o crosses 2 · (64 + 1) times, and each time 2 bytes for each of its 4096 · 64 numbers are saved: 65 MiB of
# 168 MiB. But each of the 64 turns would round o to 11 bits, and these errors add up. In float32 they stay far
# below the one rounding at the end.
# </details>
