# %% [markdown]
# # 06 · FlashAttention-2
#
# **Claim.** Swap the two loops, and the output stays on the chip. The outer loop can then run in parallel,
# along the sequence.
#
# Before: [05 · Triton and FlashAttention-1](05_triton_flash1.ipynb). Next:
# [07 · The backward kernels](07_flash2_backward.ipynb).

# %%
import math
from collections import Counter

import torch

from flashedu import ladder, plots
from flashedu.bench import compiled
from flashedu.bench import record as speed_record
from flashedu.memory import Problem, cost, gpu
from flashedu.notebook import record, source, table
from flashedu.player import play
from flashedu.schedule import assign, finish_times
from flashedu.stages import flash2, reference
from flashedu.testing import assert_right, draw
from flashedu.units import human_bytes

# %% [markdown]
# ## The problem that the last rung left
#
# `flash1` has the keys in its outer loop. A query tile meets its keys one tile at a time, far apart, so its
# output waits in HBM in between. And as all key tiles update the same output, one program must do a whole
# head alone. For 16 heads, N = 4096 and D = 64:

# %%
real = Problem(Nq=4096, D=64, H=16)
flash1_bytes = cost.flash1(real).hbm_bytes
online_bytes = cost.online(real).hbm_bytes
print(f"flash1 moves {flash1_bytes / online_bytes:.1f} times as much as online")
print(f"flash1 runs {real.H} programs on the {gpu('h200').sm_count} SMs of an H200")

# %% [markdown]
# ## The idea: queries outside, keys inside
#
# Chapter 03 had its loops the other way round: a query tile stays, and all key tiles pass by. That is one of
# the two changes. Here is the other. Look at what one pass of its outer loop needs: q_i, all of k and v, and
# m_i, l_i and acc_i, which begin anew. No pass needs a result of another pass. So the outer loop need not be
# a loop. Each pass becomes a program of its own:
#
#     flash1: a program for each head             flash2: a program for each query tile of each head
#         for each key tile j:                        for each key tile j:
#             for each query tile i:                      update m, l, acc, on the chip
#                 update m, l, o, in HBM              store o
#
# A reminder of terms. The **grid** says how many programs there are, here query tiles · heads · batches, and
# `tl.program_id` tells a program which one it is. Q, K, V and O are **descriptors** (made by
# the host, or by `in_tiles` on cards before Hopper): `K.load([b, h, j, 0])` loads the tile that begins at row j.
# A `tl.constexpr` is known when the kernel is compiled. `tl.static_range(2)` is a loop that the compiler writes
# out twice, so that MASKED is a constant in each copy.

# %%
source(flash2.forward_kernel.fn)

# %% [markdown]
# Note three things.
#
# - `O.store` stands after the loop, once. Nothing but q, k and v is loaded.
# - Exponentials are powers of 2. The loop over `MASKED` runs twice, and only the second time with a mask. We
#   come to both below.
# - The inner loop is that of `online`, line by line.
#
# The host launches it, with a program for each query tile of each head of each batch.

# %%
source(flash2.forward)

# %% [markdown]
# ## By hand: what one query tile moves
#
# Three tiles of 16 queries and 16 keys. This is all that moves for the queries 16 to 31. (The trace of a
# kernel is taken by running it in Triton's interpreter, on the CPU, and noting its own loads and stores.)

# %%
small = Problem(Nq=48, D=16, block_q=16, block_k=16)
first, second = (ladder.count(name, small, trace=True) for name in ("flash1", "flash2"))

of_tile = [
    event for event in first.trace if event.start == 16 and event.tensor not in "kv"
]
print("flash1:", ", ".join(f"{event.op} {event.tensor}" for event in of_tile))

program = next(event.step for event in second.trace if event.start == 16)
of_program = [event for event in second.trace if event.step == program]
print("flash2:", ", ".join(f"{event.op} {event.tensor}" for event in of_program))

# %% [markdown]
# In `flash1` the tile's o, m and l cross HBM for each of the three key tiles (k and v, which it shares with
# the other query tiles, are left out of its line). In `flash2`, q is loaded once, and o is stored once.
#
# Both to play, side by side and in step. The interpreter runs programs one after another; a GPU would run the three of
# `flash2` at the same time.

# %%
play("flash1", "flash2", small)

# %% [markdown]
# *Figure 1. `flash1` goes down the columns of S and moves o each time. `flash2` goes along a row and moves it once.*
#
# ## By hand: base 2
#
# A GPU has an instruction for 2ˣ and none for eˣ. It computes eˣ as $2^{x \log_2 e}$. So the kernel puts
# $\log_2 e$ into the scale, once, and keeps the maximum in base 2. Here is the row of chapter 03 again: scores
# 1, 3, 2, 5, 4, 0, in tiles of two.

# %%
scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 0.0])
scale_log2 = 1 * math.log2(math.e)
m, l, rows = torch.tensor(-100.0), torch.tensor(0.0), []
for tile in scores.split(2):
    m_new = torch.maximum(m, scale_log2 * tile.max())
    alpha = torch.exp2(m - m_new)
    l = alpha * l + torch.exp2(scale_log2 * tile - m_new).sum()
    m = m_new
    rows.append({"m in base 2": f"{m:.4f}", "α": f"{alpha:.4f}", "l": f"{l:.4f}"})
table({"after keys": f"{2 * j + 1}, {2 * j + 2}", **row} for j, row in enumerate(rows))

# %% [markdown]
# α and l are those of chapter 03: in the second tile α = 0.1353 = e⁻², and l = 1.2034. Only m has another
# unit, 5 · log₂ e = 7.2135. At the end, lse = ln 2 · (m + log₂ l) is a natural logarithm again.

# %%
lse = math.log(2) * (m + torch.log2(l))
print(f"lse from base 2: {lse:.5f}")
print(f"torch.logsumexp: {torch.logsumexp(scores, 0):.5f}")

# %% [markdown]
# ## Predict first: bytes
#
# N = 512 and D = 64, in float16, with tiles of 64 queries and 64 keys. So there are 8 query tiles, and q, k, v
# and o take 64 KiB each. `flash1` moves 3 MiB. How many KiB does `flash2` move?

# %%
my_prediction_kib = 512

# %%
problem = Problem(Nq=512, D=64, block_q=64, block_k=64)
runs = {name: ladder.count(name, problem) for name in ("flash1", "flash2", "online")}
counted = runs["flash2"].counted
print(f"you said {my_prediction_kib} KiB; counted {counted.hbm_bytes / 2**10:.0f} KiB")

# %% [markdown]
# Eight programs load k and v: 8 · 128 = 1024 KiB. q and o add 128 KiB, and lse, one float32 a query, 2 KiB.
#
# ## Counted against predicted
#
# For one head, $w$ bytes a number and $B_q$ queries in a tile:
#
# $$\text{traffic} = \Big(\, 2 N D + \frac{N}{B_q} \cdot 2 N D \,\Big) \cdot w + 4 N$$

# %%
by_hand = (2 * 512 * 64 + 512 // 64 * 2 * 512 * 64) * 2 + 4 * 512
print("counted    ", f"{counted.hbm_bytes:,} bytes")
print("closed form", f"{cost.flash2(problem).hbm_bytes:,} bytes")
print("by hand    ", f"{by_hand:,} bytes")
assert counted == cost.flash2(problem)

# %% [markdown]
# This is the formula of `online`. Is the kernel equal to that Python loop for each tensor, in each direction?

# %%
by_tensor = {name: run.bytes_by_tensor() for name, run in runs.items()}
names = list(by_tensor["flash1"])
table(
    {"KiB read + written": name}
    | {
        stage: "{:g} + {:g}".format(*(n / 2**10 for n in moved.get(name, (0, 0))))
        for stage, moved in by_tensor.items()
    }
    for name in names
)

# %%
print("flash2 equals online, by tensor:", by_tensor["flash2"] == by_tensor["online"])

# %% [markdown]
# To the byte. One was counted in PyTorch, as its tiles were loaded and stored; the other from the addresses
# that a GPU kernel reads and writes.

# %%
fig = plots.traffic(
    {name: by_tensor[name] for name in ("flash1", "flash2")},
    "o is written once, not again and again (N = 512, D = 64)",
)

# %% [markdown]
# *Figure 2. In `flash1`, k and v pass by once, and o (in float32) comes and goes with every key tile. In
# `flash2`, k and v come again for each query tile, and o is written once. The trade pays: o is wider, and
# moves both ways.*
#
# The counts equal the closed forms, so these may stand for longer sequences, which would take long to interpret.
# Large key tiles help `flash1`, as chapter 05 showed, so both sizes, for one head:

# %%
forms = {"flash1": cost.flash1, "flash2": cost.flash2}
table(
    {"N": n}
    | {
        f"{name}, 128 × {block_k}": human_bytes(
            form(Problem(Nq=n, D=64, block_q=128, block_k=block_k)).hbm_bytes
        )
        for name, form in forms.items()
        for block_k in (64, 256)
    }
    for n in (1024, 4096, 16384)
)

# %%
for name, form in forms.items():
    extra = form(Problem(Nq=4096, D=64)).hbm_extra_bytes
    print(f"extra memory of {name} at N = 4096: {human_bytes(extra)}")

# %% [markdown]
# ## Predict first: programs
#
# A model with 16 heads reads one text of 4096 tokens. With 128 queries in a tile, how many programs does
# `flash2` launch, where `flash1` launches 16?

# %%
my_prediction_programs = 32

# %%
tiles_of_a_head = real.Nq // real.block_q
programs = {"flash1": real.B * real.H, "flash2": real.B * real.H * tiles_of_a_head}
print(f"you said {my_prediction_programs}; there are {programs['flash2']}")
for name in ("flash1", "flash2"):
    print(f"{name}, counted at N = 512 with 8 query tiles: {runs[name].programs[name]}")

# %% [markdown]
# The query tiles are 4096 / 128 = 32, for each of 16 heads. If each SM runs one program at a time, then 132 run
# together, in one wave.

# %%
fig = plots.busy_sms(
    programs,
    gpu("h200").sm_count,
    "FlashAttention-2 has work for every SM (16 heads, N = 4096)",
)

# %% [markdown]
# *Figure 3. `flash1` leaves 116 of 132 SMs idle. `flash2` fills nearly four waves. With fewer heads or longer
# texts the difference grows: the number of heads is given, and the number of query tiles grows with N.*
#
# What is that worth in time? A model, not a measurement: each SM runs one program at a time, a GPU starts them in
# the order of their numbers, and an SM that is done takes the next. A program's work is the number of tiles of S
# that it visits, and each takes one unit of time.

# %%
source(assign)

# %%
sms = gpu("h200").sm_count
tiles_of_a_row = real.Nk // real.block_k
schedules = {
    "flash1": assign([tiles_of_a_head * tiles_of_a_row] * real.H, sms),
    "flash2": assign([tiles_of_a_row] * real.H * tiles_of_a_head, sms),
}
fig = plots.sm_timeline(
    schedules,
    sms,
    "tiles of S, one after the other",
    "The same work, spread over all SMs (16 heads, N = 4096)",
    programs_a_head={"flash2": tiles_of_a_head},
)

# %% [markdown]
# *Figure 4. Each bar is a program. Both compute 32,768 tiles of 128 × 64. Sixteen programs take 2048 units; 512
# shorter ones take 256, an eighth, and the fourth wave leaves 16 SMs idle. In this model o costs nothing; on a
# card, `flash1` is further behind.*
#
# ## Causal: tiles that are skipped
#
# With a causal mask, query n sees the keys 0 to n. A tile of S is then one of three kinds: all of it is
# visible, none of it is, or the diagonal crosses it. The kernel does not load a tile of the second kind. And
# it computes a mask for the third kind only (and for a last tile that reaches beyond the keys): that is why its
# loop over `MASKED` runs twice. `MASKED` is known at compile time, so the first of the two loops holds no mask at
# all.

# %%
source(flash2._keys_seen.fn)

# %% [markdown]
# Predict first: at N = 512, with tiles of 64 × 64, there are 64 tiles of S. How many are visited, and how many
# of these need the mask?

# %%
my_prediction_visited, my_prediction_masked = 32, 16

# %%
causal = problem.replace(causal=True)
trace = ladder.count("flash2", causal, trace=True).trace
first_query = {event.step: event.start for event in trace if event.tensor == "q"}
visited = Counter(event.step for event in trace if event.tensor == "k")
without_mask = {step: (i + 1) // 64 for step, i in first_query.items()}

total, masked = visited.total(), (visited - Counter(without_mask)).total()
print(f"you said {my_prediction_visited} visited and {my_prediction_masked} masked")
print(f"counted {total} visited; {masked} of them need the mask")
share = cost.flash2(causal).flops / cost.flash2(problem).flops
print(f"closed form: {share * 64:.0f} of 64")

# %%
fig = plots.walks(
    trace, causal, {"flash2": "causal forward"}, "Program 0 has the last query tile"
)

# %% [markdown]
# *Figure 5. Each number is the program that visits the tile. A row of tiles is a program, and only the tile on
# the diagonal needs a mask. Programs count from the bottom, so that the longest row comes first.*
#
# For long sequences the share of the visited tiles comes close to a half, and that of the masked ones to none.
# At N = 4096, with tiles of 128 × 64, each row of tiles has two that need the mask:

# %%
long = Problem(Nq=4096, D=64, causal=True)
share = cost.flash2(long).flops / cost.flash2(long.replace(causal=False)).flops
all_tiles, masked = 32 * 64, 32 * 2
print(f"visited: {share * all_tiles:.0f} of {all_tiles} tiles, {share:.0%}")
print(f"masked:  {masked} of these, {masked / (share * all_tiles):.0%}")

# %%
trace = ladder.count("online", long, trace=True).trace
fig = plots.visits(
    trace, long, "Nearly half of the tiles are skipped (N = 4096, causal)"
)

# %% [markdown]
# *Figure 6. All tiles of one head, in the order in which `online` computes them; `flash2` computes the same ones, the rows
# side by side. A stroke marks those that need the mask: a thin band.*

# %% [markdown]
# ## Longest first
#
# The programs of a causal kernel are not equally long. A GPU starts them in the order of their numbers, and
# an SM that is done takes the next. If the longest came last, most SMs would wait for them at the end. So
# program 0 gets the last query tile:

# %%
source(flash2.tile_and_head.fn)

# %% [markdown]
# What does that buy, in the model of Figure 4? N = 16,384, four heads, tiles of 128 × 64: 512 programs, head after
# head, and within a head from the shortest on, or from the longest.

# %%
tiles_of_program = [2 * (i + 1) for i in range(16384 // 128)]
orders = {"shortest first": tiles_of_program, "longest first": tiles_of_program[::-1]}
fig = plots.waiting(
    {order: finish_times(assign(4 * work, sms), sms) for order, work in orders.items()},
    4 * sum(tiles_of_program) / sms,
    "tiles computed",
    "Longest first, and no SM waits for long (causal, 512 programs on 132 SMs)",
)

# %% [markdown]
# *Figure 7. The work is the same. In the wrong order it takes 652 units in place of 510, and 500 would be
# ideal. With many heads the end is a small part of the whole:*

# %%
for heads in (4, 16, 64):
    slow, fast = (
        max(finish_times(assign(heads * work, sms), sms)) for work in orders.values()
    )
    print(f"{heads:2} heads: shortest first takes {slow / fast:.2f} times as long")

# %% [markdown]
# ## Less work beside the products
#
# An H200 computes matrix products on its tensor cores. All else, exponentials, divisions, rescaling, runs on
# units that are far slower:

# %%
h200 = gpu("h200")
ratio = h200.tensor_flops_per_s / h200.float32_flops_per_s
print(f"products in float16 to other float32 arithmetic: {ratio:.0f} to 1")

# %% [markdown]
# So FlashAttention-2 also saves work there. The output is divided by l once, at the end; `flash1` keeps it
# normalised, and divides the whole tile at every step. From a product q k to its exponential, `flash1` takes
# three steps: times scale, minus m, times log₂ e. `flash2` takes one, as scale · log₂ e is one number, and a GPU
# multiplies and subtracts in one instruction. And for the backward it keeps one number a row, lse, where the
# first paper kept m and l. By formula, for one head at N = 4096, with tiles of 128 × 64:

# %%
N, D, key_tiles = 4096, 64, 4096 // 64
operations = {
    "divisions of o by l": (N * D * key_tiles, N * D),
    "steps from q k to 2ˣ": (3 * N * N, N * N),
    "exponentials of scores": (N * N, N * N),
    "exponentials, for α": (N * key_tiles, N * key_tiles),
}
table(
    {"operation": name, "flash1": in_flash1, "flash2": in_flash2}
    for name, (in_flash1, in_flash2) in operations.items()
)

# %% [markdown]
# The divisions fall to one in 64, and the steps to one in three. The exponentials remain. They are why
# the next generation of kernels computes them while the tensor cores work on another tile. (The paper also says
# which warps, groups of 32 threads, compute which part of a tile. In Triton that is the compiler's choice.)
#
# ## Neighbours in the grid
#
# Our model has no L2 cache. The bytes that we count enter an SM; where they come from, HBM or L2, is another
# question. The programs of one head all load the same k and v. If they run at the same time, then the first to
# load a tile brings it into L2, and the others find it there.
#
# `tile_and_head` numbers the programs so that the tiles of one head are neighbours, and neighbours run at the
# same time. With 64 heads, N = 4096, and 132 programs at a time:

# %%
k_and_v = 2 * 4096 * 64 * 2
query_tiles = 4096 // 128
heads_at_work = {
    "head by head, as here": len({n // query_tiles for n in range(sms)}),
    "tile by tile": len({n % 64 for n in range(sms)}),
}
table(
    {
        "order": order,
        "heads at work": heads,
        "their k and v": human_bytes(heads * k_and_v),
    }
    for order, heads in heads_at_work.items()
)

# %%
print(f"the L2 cache of an H200 holds {human_bytes(h200.l2_bytes)}")

# %% [markdown]
# In the other order, k and v of all 64 heads would be in use at once, more than the cache holds.
#
# ## The SRAM budget
#
# In chapter 02 the machine counted the SRAM that a tile takes. For a Triton kernel the compiler decides what lies
# in SRAM, which NVIDIA calls shared memory, and what in registers. So we compile the kernel for several cards, which
# needs no card, and read what the compiler reports. Registers and spilled bytes (what found no register) are
# those of one thread:

# %%
recorded = record("compiled_triton3.7.1")
print("compiled {date} by Triton {triton}, without a GPU".format_map(recorded))
forwards = [
    found
    for found in compiled.from_record(recorded)
    if (found.case.stage, found.kernel) == ("flash2", "forward_kernel")
    and (found.case.dtype, found.case.causal) == ("float16", False)
    and found.case.D in (64, 128)
]
columns = "D, compiled at N, tile, threads, registers, spilled, shared memory, programs"
table(
    {"card": card.name} | {name: row[name] for name in columns.split(", ")}
    for card in (gpu("a100-80"), h200, gpu("b200"))
    for row in compiled.table(forwards, card)
)

# %% [markdown]
# The last column is how many programs an SM can hold at a time. (The tiles of the H200 were the fastest of some
# ten. Those of the other cards were never timed.)
#
# Take the row of the H200 with D = 64. Its SRAM can be predicted: q_i takes 64 · 64 · 2 bytes, and k_j and v_j
# take 128 · 64 · 2 each. The loads run ahead of the arithmetic, so that two pairs of them are there at a time
# (`num_stages`):

# %%
(found,) = (
    found
    for found in forwards
    if found.case.capability == h200.compute_capability and found.case.D == 64
)
predicted = 64 * 64 * 2 + found.stages * 2 * 128 * 64 * 2
print(f"predicted {human_bytes(predicted)}; compiled {human_bytes(found.sram_bytes)}")
reserved = 1024  # of each program's SRAM; and registers are given by eights
sram = h200.sram_bytes_per_sm // (found.sram_bytes + reserved)
registers = 65536 // (-(-found.registers // 8) * 8 * found.threads)
print(f"programs on an SM: {sram} by shared memory, {registers} by registers")

# %% [markdown]
# The rest is the compiler's own.
#
# Larger tiles move fewer bytes, but fewer programs fit an SM, and an SM with one program has nothing else to do
# while that waits for a load. With two programs on each SM, 264 run at a time on an H200. Then there are half as
# many waves, and 512 programs are hardly two for each place: even in the right order some SMs wait at the end.
#
# ## On a GPU
#
# The same kernel, compiled for an H200 and timed beside PyTorch's own attention, SDPA, which has several
# implementations: *flash* is FlashAttention-2 in CUDA, *cuDNN* is NVIDIA's. Flex is PyTorch's compiler of attention
# variants, *standard* is the formula in three lines. Before it was timed, each result was held against float64.
# These figures are not from your machine: they were recorded.

# %%
measured = speed_record.latest("speed", card="H200")
print(measured.label)
fig = plots.speed(measured, 128, "flash2 is faster than SDPA flash (D = 128)")

# %% [markdown]
# *Figure 8. TFLOP/s in the forward, and in the backward of the next chapter. Higher is better. `flash2` passes SDPA
# flash at every length; cuDNN, which uses what only Hopper has, stays ahead.*
#
# And `flash1`, whose loops are the other way round:

# %%
heads = speed_record.latest("flash1", card="H200")
fig = plots.speedup_against_heads(
    heads, "flash2 against flash1: most where heads are few"
)

# %% [markdown]
# *Figure 9. With few heads `flash1` leaves most SMs idle, and `flash2` is tens to hundreds of times as fast. With 512
# heads both fill the card, and what remains, some four to five times, is o crossing memory, and the work on it.*
#
# ## Is it right?
#
# The forward against float64, in four families. 257 queries and 131 keys: no tile divides either. With a causal
# mask, the first 126 queries see no key. Pairs of heads share keys and values.

# %%
check = Problem(Nq=257, Nk=131, D=40, H=4, H_kv=2, causal=True, dtype="float32")
device = "cuda" if torch.cuda.is_available() else "cpu"
for family in ("normal", "peaked", "large", "rising"):
    q, k, v = (x.to(device) for x in draw(check, family, framework="torch")[:3])
    o, lse = flash2.attention_with_lse(q, k, v, causal=True, block_q=64, block_k=64)
    assert_right(reference.Reference(o, lse), q, k, v, causal=True)
    print(f"{family}: o and lse within the budget")

# %%
print("rows that see no key give 0:", not o[:, :, :126].any().item())
print("and their lse is -inf:      ", (lse[:, :, :126] == -torch.inf).all().item())

# %% [markdown]
# Tile sizes must not show, and both loops must agree where they meet. Sizes around one tile:

# %%
for n in (1, 63, 64, 65, 127, 129):
    q, k, v, _ = draw(Problem(Nq=n, D=64, dtype="float32"), framework="torch")
    q, k, v = (x.to(device) for x in (q, k, v))
    for causal_mask in (False, True):
        o = flash2.attention(q, k, v, causal=causal_mask, block_q=64, block_k=32)
        assert_right(reference.Reference(o, None), q, k, v, causal=causal_mask)
    print(f"N = {n}: within the budget")

# %% [markdown]
# ## Takeaway
#
# **With the queries outside, a program owns its rows of o from start to end. Nothing is written but the
# result, and the GPU gets a program for each query tile of each head.** What is missing: the backward. There
# keys have gradients as well as queries, so no single loop order serves all. The
# [next chapter](07_flash2_backward.ipynb) takes two.
#
# ## Exercises
#
# **1.** A model writes text: one new query, 65,536 keys, 32 heads. How many programs does `flash2` launch? How
# many SMs of an H200 have nothing to do?
#
# <details><summary>Answer</summary>
#
# One query tile for each head: 32 programs, so 100 of 132 SMs are idle. With a single query there is nothing
# to cut along the sequence but the keys. As parts of a row merge in any order (chapter 03), a later chapter
# gives parts of the keys to different programs.
# </details>
#
# **2.** Four heads, N = 2048, D = 64. With 128 queries in a tile, how many programs are there, and how much do they
# move? And with 64? Which would you try on an H200, which on a T4 with its 40 SMs?
#
# <details><summary>Answer</summary>
#
# 128 queries: 64 programs and 34 MiB. 64 queries: 128 programs and 66 MiB. On an H200 the small tiles keep 128 of
# 132 SMs at work instead of 64, for twice the traffic (and L2 serves much of that). On a T4, 64 programs are more
# than enough. The tile sizes of `flash2` depend on the card and on N for such reasons.
#
# ```python
# cost.flash2(Problem(Nq=2048, D=64, H=4, block_q=64)).hbm_bytes / 2**20
# ```
# </details>
#
# **3.** At tiles of 64 queries and 128 keys, how many tiles of each row need the mask? And at 128 × 64? What
# about N = 512 queries and 544 keys, with tiles of 64 × 64?
#
# <details><summary>Answer</summary>
#
# One; the diagonal crosses a width of 64 keys, which never spans two tiles of 128. At 128 × 64 it crosses
# two. With 32 more keys than queries, the diagonal is moved by half a tile, and crosses two tiles in each row:
# see it with
#
# ```python
# moved = Problem(Nq=512, Nk=544, D=64, causal=True, block_q=64, block_k=64)
# machine = ladder.count("flash2", moved, trace=True)
# plots.walks(machine.trace, moved, {"flash2": "causal"}, "Two masked tiles in a row")
# ```
# </details>
