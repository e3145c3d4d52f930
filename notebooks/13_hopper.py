# %% [markdown]
# # 13 · Hopper
#
# **Claim.** Warps that do different things keep the tensor cores at work: copies and products that run by themselves, and barriers
# between them, close the gap to the best kernels there are. A model of one SM says in advance which step helps.
#
# Before: [12 · Serving](12_serving.ipynb). This is the last chapter.

# %%
from dataclasses import replace

from flashedu import plots
from flashedu.bench import compiled
from flashedu.bench import record as speed_record
from flashedu.memory import Problem, gpu
from flashedu.notebook import record, source, table
from flashedu.pipeline import FLASH2, FLASH3, Kernel, Program, simulate, tflops_per_s
from flashedu.plots.pipeline import Step
from flashedu.sm import (
    CUDA,
    EXP,
    H100,
    MEMORY,
    SM,
    TENSOR,
    Arrive,
    Ask,
    Barrier,
    Deadlock,
    Join,
    Load,
    Places,
    Race,
    Wait,
    fill,
    full,
    rates_of,
)
from flashedu.stages import flash3

h100 = gpu("h100")

# %% [markdown]
# ## The problem that the last rung left
#
# In chapter 06, `flash2` was compared with NVIDIA's own kernel, cuDNN. From that record, the forward at D = 128, in TFLOP/s:

# %%
measured = speed_record.latest("speed", card="H200")
(case,) = (
    c
    for c in measured.cases("speed", D=128, N=4096, causal=False)
    if c["pass"] == "fwd"
)
rates = {run["peer"]: run.get("tflops") for run in case["runs"]}
print(measured.label)
for peer in ("flash2", "sdpa-cudnn"):
    print(f"{peer}: {rates[peer]:.0f}")

# %% [markdown]
# Both move the same bytes and do the same arithmetic. So what does `flash2` lack? It is not a better algorithm. It is time in
# which the tensor cores have nothing to do.
#
# ## Four units
#
# An SM is not one machine. It has units that work side by side:
#
# | unit | what it does for attention | a clock |
# | --- | --- | ---: |
# | tensor cores | the products q kᵀ and p v | 4096 FLOPs |
# | exponential units | 2ˣ | 16 |
# | CUDA cores | all other arithmetic: additions, maxima, roundings | 128, 64, 64 |
# | memory | tiles come from L2 or HBM | 39 bytes |
#
# Registers and schedulers are cut into four quarters, each with a tensor core of its own. A warp, 32 threads, lives in one quarter.
# Four warps, one in each quarter, are a **warpgroup**: 128 threads that together can use all of the SM.
#
#     an SM    quarter 0      quarter 1      quarter 2      quarter 3
#              tensor core    tensor core    tensor core    tensor core
#              4 × 2ˣ         4 × 2ˣ         4 × 2ˣ         4 × 2ˣ           a clock
#              ──────────────────── shared memory, 228 KiB ────────────────────
#     group A  warp 0         warp 1         warp 2         warp 3
#     group B  warp 4         warp 5         warp 6         warp 7
#
# Take a tile of 64 queries and 128 keys at D = 128. The product q kᵀ has 2 · 64 · 128 · 128 FLOPs, and for each of its 64 · 128
# results one exponential is taken. Predict first: the exponentials take what share of the time of that product?

# %%
my_prediction_share = 0.1

# %%
product = 2 * 64 * 128 * 128 / H100.tensor_flops
exponentials = 64 * 128 / H100.exponentials
print(f"a product: {product:.0f} clocks; its exponentials: {exponentials:.0f} clocks")
print(f"you said {my_prediction_share:.0%}; it is {exponentials / product:.0%}")

# %% [markdown]
# As long as the product. An exponential is one operation where the product has 256, but there are 256 times as many units for
# products. The maximum, the sum, the rounding and the rescaling come on top: the softmax of a tile takes 896 clocks, the two products
# 1024. **If they come one after another, the tensor cores rest for half of the time.** That is what this chapter is about.
#
# ## A model of one SM
#
# We cannot watch an SM. So we model it: each unit does one thing at a time, at the rate of the data sheet, and warps are Python
# generators that read like a kernel. `yield` is where time passes. These are all the numbers that it knows:

# %%
H100

# %% [markdown]
# The rates are NVIDIA's; the two times at the end, from a copy's order to its first byte and until a program's warps run, are assumed,
# and round. Nothing was fitted to a kernel. A real SM is slower than its data sheet, so we ask the model for *comparisons*.
#
# First, one warpgroup that does everything in turn: it loads k, multiplies, takes the softmax, loads v, multiplies. This is the loop of
# chapter 06, if nothing is done in advance:

# %%
in_turn = FLASH2.replace(consumers=1, asynchronous=False)
timeline = simulate(in_turn, [4])
fig = plots.who_waits(
    {"one warpgroup, in turn": timeline},
    "Four units, and never two at work at the same time",
)

# %% [markdown]
# *Figure 1. Time runs to the right. Each unit, and each group of warps, has a row. The numbers are those of key tiles; on the tensor
# cores, that of the group for which they multiply. Pale: waiting.*
#
# ## Step 1: copies that run by themselves
#
# An ordinary load goes through a register: a warp asks, waits, and writes to shared memory. Hopper has a **TMA** (tensor memory
# accelerator) for that. One thread says: bring the tile that begins at row j. The unit computes the addresses, fills in zeros beyond
# the end, and writes into shared memory; the threads go on. It needs to know how the tensor lies in memory: that is what a
# **descriptor** says. `flash2` has used descriptors, and so the TMA, since chapter 05.
#
# A copy that runs by itself is worth something only if there is a *place* for it: with two places for tiles of k and two for v, the
# next tile comes while this one is in use. Places of that kind are called **stages**. Predict first: by how much does one
# warpgroup become faster?

# %%
my_prediction_times = 1.5

# %%
ahead = FLASH2.replace(consumers=1)
slow, fast = (simulate(kernel, [32]) for kernel in (in_turn, ahead))
print(f"you said {my_prediction_times}; {slow.seconds / fast.seconds:.2f} times")
print(f"tensor cores: {slow.busy(TENSOR):.0%} busy before, {fast.busy(TENSOR):.0%} now")

# %% [markdown]
# Now memory is out of the way, and half of the time is left. The other half is the softmax.
#
# ## Step 2: a second warpgroup
#
# While one group has its exponentials, another could multiply. `flash2` does that with 8 warps, two groups of 64 queries each, or with two
# programs on an SM. Who begins first? Nobody says. The tensor cores do one product at a time, so the second group is late by one
# product, and stays late:

# %%
eight_warps = simulate(FLASH2, [32])
fig = plots.who_waits(
    {"one group": fast, "two groups": eight_warps},
    "Two groups hide each other's softmax, but they meet at every tile",
    start_s=5e-6,
    stop_s=10e-6,
)

# %% [markdown]
# *Figure 2. With two groups the tensor cores are busy for most of the time. What is left: a group waits for the other, because the
# tile that they have done with is about to be overwritten, and all must agree that it may be.*

# %%
table(
    {
        "": name,
        "tensor cores": f"{t.busy(TENSOR):.0%}",
        "exponential units": f"{t.busy(EXP):.0%}",
        "CUDA cores": f"{t.busy(CUDA):.0%}",
        "memory": f"{t.busy(MEMORY):.0%}",
    }
    for name, t in (("in turn", slow), ("ahead", fast), ("two groups", eight_warps))
)

# %% [markdown]
# This is `flash2`, and this is what it lacks: its warps meet at each tile (CUDA calls that `__syncthreads`). The groups are tied to each other
# and to the loads. To untie them we need a better meeting point.
#
# ## A barrier with phases
#
# Hopper's is the **mbarrier**: a counter in shared memory. It is made for a number of arrivals. Whoever has done its part *arrives*,
# and goes on at once. Whoever needs the result *waits*. When all have arrived, one **phase** is complete, the counter starts anew, and
# the next phase begins. So one barrier serves the whole loop.
#
# There is one catch. A warp that comes late must know *which* phase it waits for, or it would take the last one's completion for this
# one's. The hardware keeps a single bit for that, the **parity** of the phase: 0, 1, 0, 1 … `wait(barrier, parity)` goes on if the phase of
# that parity is complete. Here is a barrier for one arrival, after each of four:

# %%
barrier, rows = Barrier("full", 1), []


def arrive(barrier):
    yield Arrive(barrier)


for n in range(4):
    passes = {f"wait for {x}": barrier.passed(x) for x in (0, 1)}
    rows.append({"arrivals": n, "open phase": barrier.completed, **passes})
    SM().run({"warp": arrive(barrier)})
table(rows)

# %% [markdown]
# Look at the first row. Before anything happened, a wait for parity 1 goes on: as if there had been a phase before the first one. That is
# handy: at first all places are empty, and nobody has said so.
#
# A **place** then needs two barriers. `full` opens when the tile has come (the producer says how many bytes to expect, and
# the barrier counts them as the TMA writes them). `empty` opens when all readers have done with it. Tile t goes to place t mod 2, and every second tile the parity flips. This is
# the kernel:

# %%
source(flash3._fill.fn)

# %% [markdown]
# And this is the model, with the same names. `Load` is a TMA copy, and its arrival at `full` comes with it:

# %%
source(fill)

# %%
source(full)

# %% [markdown]
# Now a producer and a consumer of our own. Four tiles, two places, and a product that takes 1 µs for each:


# %%
def produce(places):
    for t in range(4):
        yield from fill(places, t)


def consume(places):
    for t in range(4):
        used = yield from full(places, t)
        yield Join((yield Ask(TENSOR, 1e-6, "q k", t, places)))
        yield Arrive(used)


def warps(produce, consume):
    places = Places("k", 2, readers=1, n_bytes=32768)
    return {"producer": produce(places), "consumer 1": consume(places)}


timeline = SM().run(warps(produce, consume))
fig = plots.who_waits({"four tiles, two places": timeline}, "Two barriers a place")

# %% [markdown]
# *Figure 3. Two tiles come at once. The third comes when the first is used: the producer waits until its place is empty.*
#
# What if the phase is wrong? Predict first: the producer below waits for `phase` where `_fill` has `phase ^ 1`. What happens?

# %%
my_prediction = "a tile is overwritten"


# %%
def wrong_producer(places):
    for t in range(4):
        yield Wait(places.empty[t % 2], t // 2 & 1)
        yield Load(places, t)


try:
    SM().run(warps(wrong_producer, consume))
except Deadlock as error:
    print(f"you said: {my_prediction}\n{error}")

# %% [markdown]
# On a GPU that is a kernel that never returns, and no message. The other mistake is worse, as nothing stops. This consumer calls
# its place empty as soon as the tile has come, and multiplies then:


# %%
def hasty_consumer(places):
    for t in range(4):
        yield Arrive((yield from full(places, t)))
        yield Join((yield Ask(TENSOR, 9e-6, "q k", t, places)))


try:
    SM().run(warps(produce, hasty_consumer))
except Race as error:
    print(error)

# %% [markdown]
# On a GPU: wrong numbers, sometimes.
#
# ## Step 3: warps that do different things
#
# With such barriers the loads need not be done by the warps that compute. One warp, the **producer**, does nothing but `_fill`. It runs
# ahead as far as there are places, and nobody waits for it unless a tile is late. The others are **consumers**. This is called
# **warp specialisation**. In `flash3`:

# %%
source(flash3._produce.fn)

# %% [markdown]
# The warps part where the kernel begins:

# %%
source(flash3.forward_kernel.fn)

# %% [markdown]
# The list in `gl.warp_specialize` says which function each group of warps runs, then how many warps, then how many **registers** each of
# their threads may have.
#
# ### Registers go where they are needed
#
# An SM has 65,536 registers. With three groups of warps, each thread would get the same share. But a producer's thread holds a few
# numbers only, and a consumer's holds its part of acc, s and p. Hopper can **reallocate** them while a kernel runs (`setmaxnreg`): the
# producer gives back all but 24, the consumers take them. At D = 128, for a consumer of 64 queries and tiles of 128 keys:

# %%
table(
    {
        "consumers": n,
        "acc, s and p need": Kernel(consumers=n).registers_needed,
        "equal shares": 65536 // 128 // (n + 1) // 8 * 8,
        "reallocated": Kernel(consumers=n).registers_given,
        "fits": Kernel(consumers=n).fits(h100),
    }
    for n in (1, 2, 3)
)

# %% [markdown]
# Two consumers fit, and only with reallocation: 168 would leave 8 for everything else. A prototype with equal shares spilled, and reached
# 436 TFLOP/s where this one reached 655 (H200, 2026-11-22). Three do not fit at D = 128.
#
# ### What it is worth
#
# Predict first: from 8 warps in turn to a producer and two consumers, same tiles, same places. How many times as fast?

# %%
my_prediction_times = 1.5

# %%
two = simulate(Kernel(), [32])
print(f"you said {my_prediction_times}; {eight_warps.seconds / two.seconds:.2f} times")
fig = plots.who_waits(
    {"8 warps in turn": eight_warps, "a producer, two consumers": two},
    "Nobody meets: the tensor cores hardly rest",
    start_s=20e-6,
    stop_s=24e-6,
)

# %% [markdown]
# *Figure 4. The producer always waits for a place: that is how it should be. The consumers have fallen into step by themselves: one
# has its softmax while the other multiplies.*
#
# ## Step 4: products that run by themselves
#
# The consumer's loop has one more trick. **wgmma** is Hopper's product of a whole warpgroup: it takes its tiles from shared memory (p, which
# was just computed, from registers), and it is *asynchronous*. It is started, and waited for later. Look for `is_async` and
# `warpgroup_mma_wait`:

# %%
source(flash3._consume.fn)

# %% [markdown]
# p v of this tile and q kᵀ of the next are started together, and waited for together. So there is one wait a tile and not two, and
# between the two products there is no gap. In the model, `_product` starts one and `Join` waits:

# %%
source(Program.consume)

# %% [markdown]
# ## How many consumers, how many stages?
#
# One consumer shows its softmax. Two hide each other's. And three? Predict first, for D = 128 and D = 64: is a third consumer worth
# anything?

# %%
my_prediction_128, my_prediction_64 = "no", "no"


# %%
def a_key_tile(kernel, rates=H100):
    """Microseconds that it takes for 64 queries, beside all that comes once."""
    long, short = (simulate(kernel, [n], rates).seconds for n in (96, 32))
    return (long - short) / 64 * 1e6 / kernel.block_q * 64


print(f"you said {my_prediction_128} and {my_prediction_64}")
table(
    {
        "consumers": n,
        "D = 128": f"{a_key_tile(Kernel(consumers=n)):.2f} µs",
        "fits": Kernel(consumers=n).fits(h100),
        "D = 64": f"{a_key_tile(Kernel(D=64, consumers=n)):.2f} µs",
        "fits, D = 64": Kernel(D=64, consumers=n).fits(h100),
    }
    for n in (1, 2, 3)
)

# %% [markdown]
# At D = 128 two consumers keep the tensor cores busy, and a third has nothing to add. At D = 64 the products are half as long, and the
# exponentials are not: then three hide more than two, and they fit. `flash3` has two and three (`consumers_for`).
#
# And places? Each takes 32 KiB for k and 32 for v:

# %%
table(
    {
        "stages": n,
        "a key tile": f"{a_key_tile(Kernel(stages=n)):.2f} µs",
        "shared memory": f"{Kernel(stages=n).sram_bytes // 1024} KiB",
        "fits": Kernel(stages=n).fits(h100),
    }
    for n in (1, 2, 3)
)

# %% [markdown]
# With one stage, a tile comes only after the one before was used, and the consumers wait for its way. Two stages hide nearly all of that.
# Three would not fit, and would hardly help.
#
# ## Two ideas that do not help
#
# The paper of FlashAttention-3 has two more ideas. In **ping-pong**, consumers take turns with the tensor cores, with a barrier for
# each turn, so that one's softmax falls into the other's products. And within a consumer, products and softmax can **overlap**: q kᵀ of the
# next tile and p v of this one are started, and the softmax of the next begins when q kᵀ is done, while p v still runs. Predict
# first: which of them helps two consumers?

# %%
my_prediction = "both"

# %%
tried = {
    "flash3's loop": Kernel(),
    "ping-pong": Kernel(ping_pong=True),
    "overlap": Kernel(overlap=True),
    "overlap, three stages": Kernel(overlap=True, stages=3),
    "one consumer": Kernel(consumers=1),
    "one consumer, overlap": Kernel(consumers=1, overlap=True),
}
quick = replace(H100, latency_s=0, memory_bytes=1e6)
print("you said:", my_prediction)
table(
    {
        "": name,
        "a key tile": f"{a_key_tile(kernel):.2f} µs",
        "with a memory that never lets wait": f"{a_key_tile(kernel, quick):.2f} µs",
    }
    for name, kernel in tried.items()
)

# %% [markdown]
# Ping-pong gains nothing: the tensor cores do one product at a time, and so the consumers are in turn already. Overlap helps a consumer that is
# alone, if its tiles are there in time (the right column). For two, there is nothing left to hide. With two stages it even costs: a place of v is held during one more softmax, and the next
# tile comes late:

# %%
fig = plots.who_waits(
    {
        name: simulate(tried[name], [32])
        for name in ("flash3's loop", "overlap", "overlap, three stages")
    },
    "Overlap holds a place longer, and then waits for tiles",
    start_s=20e-6,
    stop_s=24e-6,
)

# %% [markdown]
# *Figure 5. The same two consumers. With a third stage, overlap does no harm, but that does not fit beside D = 128.*
#
# ## A whole card
#
# So far one query tile. What stands beside its key tiles, once for each query tile: a program starts, q comes, the first product has
# nothing to hide behind, the last softmax neither, o is stored. In the model:

# %%
once = simulate(Kernel(), [32]).seconds * 1e6 - 32 * 2 * a_key_tile(Kernel())
print(
    f"a key tile: {2 * a_key_tile(Kernel()):.2f} µs; once a query tile: {once:.1f} µs"
)

# %% [markdown]
# At N = 1024 a query tile has 8 key tiles or fewer, so that is about a third of its time. It can be hidden, too: a **persistent** kernel launches
# one program for each SM, which stays and takes query tiles until there are none. Then the producer can go on to the next q, k and v
# while the consumers finish this tile, if there is a second place for q.
#
# With a causal mask a third problem comes back, that of chapter 06: programs are not equally long. A program that stays cannot rely on the
# GPU to start the longest first. So `flash3` makes pieces of equal length: tile x, and tile x from the end.

# %%
source(flash3._piece.fn)

# %% [markdown]
# Predict first, for N = 1024, causal: what do pairs, persistence and the second place for q gain together?

# %%
my_prediction_times = 1.1

# %%
steps = {
    "8 warps in turn": FLASH2.replace(order="longest"),
    "a producer, two consumers": Kernel(order="longest"),
    "pairs of query tiles": Kernel(order="pairs"),
    "a program stays": Kernel(order="pairs", persistent=True),
    "two places for q": FLASH3,
}


def predict(N, causal, kernel, rates=H100):
    """TFLOP/s of 16384 tokens, H · D of 2048, on 132 SMs."""
    size = dict(B=16384 // N, H=2048 // kernel.D, Nq=N, D=kernel.D)
    return tflops_per_s(kernel, Problem(causal=causal, **size), rates)


short = {name: predict(1024, True, kernel) for name, kernel in steps.items()}
gain = short["two places for q"] / short["a producer, two consumers"]
print(f"you said {my_prediction_times}; the model says {gain:.2f}")

# %% [markdown]
# ## Held against a card
#
# GAP 1. *The measured column needs one recorded run of all steps on one H200. Until then these are medians of a first run on an H100
# (2026-11-25, 5 interleaved rounds), which did not have the first step and ping-pong.*

# %%
first_run = {  # TFLOP/s, D 128, bfloat16: GAP 1, to be read from a record
    (1024, True): (None, 372, 411, 448, 456),
    (4096, True): (None, 566, 610, 632, 631),
    (4096, False): (None, 590, 635, 689, 697),
}
rows = [
    Step(name, short[name], seen)
    for name, seen in zip(steps, first_run[1024, True], strict=True)
]
rows.insert(2, Step("ping-pong", short["a producer, two consumers"], None, kept=False))
fig = plots.waterfall(
    rows, "Causal, N = 1024, D = 128: each step, and what it is worth"
)

# %% [markdown]
# *Figure 6. Predicted by the model, and measured. The model's steps have the right order, and about the right size. Its level is too high:
# a card does not run at its data sheet's clock while it multiplies without pause.*
#
# How much too high? A plain product of two large matrices, which has no softmax and waits for nothing, reaches 705 to 798 TFLOP/s on such
# cards, not 989: they come to their power limit and lower their clock. At three quarters of the clock:

# %%
slower = rates_of(h100, 0.75 * H100.clock_hz)
table(
    {
        "N": N,
        "causal": causal,
        "data sheet's clock": round(predict(N, causal, FLASH3)),
        "three quarters": round(predict(N, causal, FLASH3, slower)),
        "measured": seen[-1],
    }
    for (N, causal), seen in first_run.items()
)

# %% [markdown]
# What else was measured, as ratios: after over before. A run differs from the next by up to 5%.

# %%
one_128 = Kernel(consumers=1, rows=128, overlap=True)
narrow = Kernel(D=64)
ratios = {  # before, after, N, measured: GAP 1 too
    "1 consumer of 128 queries → 2 of 64": (one_128, Kernel(), 16384, 679 / 480),
    "stages 2 → 1": (Kernel(), Kernel(stages=1), 16384, 534 / 655),
    "keys in a tile 128 → 64": (Kernel(), Kernel(block_k=64), 16384, 572 / 655),
    "overlap": (Kernel(), Kernel(overlap=True), 16384, 653 / 679),
    "D = 64: 2 → 3 consumers": (narrow, narrow.replace(consumers=3), 16384, 557 / 442),
}
table(
    {
        "change": name,
        "predicted": f"{predict(N, False, after) / predict(N, False, before):.2f}",
        "measured": f"{seen:.2f}",
    }
    for name, (before, after, N, seen) in ratios.items()
)

# %% [markdown]
# The model says right which change helps and which does not. It exaggerates one stage: it gives an SM a 132nd of the L2 cache's rate, also
# while the others load nothing. And there is much that it does not know: registers that spill, instructions for masks and loops,
# and what the compiler makes of it. `flash2` as it was tuned, two programs of 4 warps with tiles of 128 × 64, is an example:

# %%
tuned = FLASH2.replace(consumers=1, rows=128, block_k=64, programs=2)
print(f"{predict(4096, False, tuned):.0f} TFLOP/s, if it fits: {tuned.fits(h100)}")
(found,) = (
    found
    for found in compiled.from_record(record("compiled_triton3.7.1"))
    if (found.case.stage, found.kernel) == ("flash2", "forward_kernel")
    and (found.case.capability, found.case.D) == ((9, 0), 128)
    and (found.case.dtype, found.case.causal) == ("float16", False)
)
print(f"compiled: {found.registers} registers, {found.spilled_bytes} bytes spilled")

# %% [markdown]
# As far as the model can see, two programs that hide each other's softmax are as good as consumers. But all threads are equal there: each
# has at most 255 registers, holds 128 queries with three others' help, and spills. Registers are what warp specialisation
# is for, as much as time.
#
# ## What the compiler made of it
#
# `flash3` runs on Hopper only. It compiles anywhere. Its shared memory can be predicted, from `Kernel.sram_bytes`:

# %%
flash3_rows = [
    found
    for found in compiled.from_record(record("compiled_triton3.7.1"))
    if (found.case.stage, found.case.D) == ("flash3", 128) and not found.case.causal
]
print(f"predicted {FLASH3.sram_bytes / 1024:.0f} KiB")
columns = "D, tile, threads, registers, spilled, shared memory, matrix instruction"
table(
    {name: row[name] for name in columns.split(", ")}
    for row in compiled.table(flash3_rows, h100)
)

# %% [markdown]
# 168 registers are what each of 384 threads gets at the start: 65,536 / 384, by eights. Then they are reallocated.
#
# ## On a GPU
#
# GAP 2. *A recorded run of `flashedu bench` on an H200 with `flash3`: speed beside `flash2`, cuDNN and FlashAttention-4 (`plots.speed`), and
# the outputs held against float64.*
#
# ## Takeaway
#
# **The tensor cores are fast when everything else happens at the same time: tiles come by themselves, products run by themselves, and
# one group's softmax hides behind another's products. Barriers with phases let all of them run ahead as far as there is room.**
# It is the algorithm of chapter 03, to the last line. What changed is who waits for whom.
#
# ## Exercises
#
# **1.** Tile 5 of k, with three stages: in which place does it lie, and for which parity do its consumer and its producer wait?
#
# <details><summary>Answer</summary>
#
# Place 5 mod 3 = 2. 5 // 3 = 1, so the consumer waits at `full[2]` for parity 1, and the producer waits at `empty[2]` for parity 0: for
# the phase that was completed when tile 2 was used.
# </details>
#
# **2.** FP8 doubles the rate of the tensor cores and changes nothing else. What does the model say of two consumers? What would you change?
#
# <details><summary>Answer</summary>
#
# ```python
# fp8 = replace(H100, tensor_flops=8192)
# for n in (2, 3):
#     print(n, a_key_tile(Kernel(consumers=n), fp8))
# ```
#
# Products take half as long, and the softmax is as long as before: as at D = 64, two consumers no longer hide it. A third would hide more,
# but has no registers. So one would take fewer exponentials from the exponential units: FlashAttention-4 computes a part of them as polynomials, on
# the CUDA cores.
# </details>
#
# **3.** The consumers of a causal tile do not see equally many key tiles. What must a consumer do with a tile that only the other one needs?
# Try it: leave out the two `Arrive` in the first loop of `Program.consume`.
#
# <details><summary>Answer</summary>
#
# It must wait until the tile has come, and then call its place empty. Its `empty` barrier counts the arrivals of *all* consumers: without
# this one it never opens, and the producer waits for ever. If it arrived without waiting, it could be a phase ahead, and open the
# barrier for a tile that the other consumer has not read.
# </details>
#
# **4.** Which is worth more at N = 16,384: a copy that takes half as long to begin, or a program that starts at once? And at N = 1024?
# Change `latency_s` and `start_s` of `H100`.
#
# <details><summary>Answer</summary>
#
# ```python
# for change in ({}, {"latency_s": 0.25e-6}, {"start_s": 0.0}):
#     rates = replace(H100, **change)
#     print(change, [round(predict(N, False, Kernel(), rates)) for N in (1024, 16384)])
# ```
#
# At 16,384 neither is worth much more than a percent. At 1024 a program that starts at once is worth 9%, a quicker copy 5%. A
# persistent kernel pays for its start once.
# </details>
