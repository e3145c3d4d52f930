# %% [markdown]
# # 00 · Start here
#
# **Claim.** Your machine can run this course, and the rungs of the ladder move very different numbers of
# bytes for the same result.
#
# Next: [01 · The memory wall](01_the_memory_wall.ipynb).
#
# Attention is the part of a transformer that lets each token look at the others. Written as in the
# textbook, it is slow on a GPU, and it runs out of memory on long texts. FlashAttention computes the
# same result, several times faster, with hardly any extra memory. This course builds it, rung by rung. You
# need Python, matrix products and the softmax. You need no GPU.
#
# **How to use it.** Run a cell with Shift + Enter. Before each result there is a cell in which you write
# down a guess: guess first, as a wrong guess teaches more than a right one. Each chapter ends with
# exercises; their answers are folded. Change what you like: `git checkout notebooks` brings the chapters back
# as they were.

# %%
import numpy as np

from flashedu import doctor, ladder, plots
from flashedu.memory import Problem, gpu
from flashedu.notebook import table
from flashedu.player import play
from flashedu.stages import LADDER, naive
from flashedu.units import human_bytes, human_seconds

# %% [markdown]
# ## Can this machine run the course?
#
# `flashedu doctor`, in a terminal, says so in full. The same findings, here:

# %% tags=["nbval-ignore-output"]
# Not compared by the tests: versions and devices are those of your machine.
for finding in doctor.diagnose(doctor.look()):
    print(f"{finding.status:8} {finding.name:16} {finding.found}")

# %% [markdown]
# ## What attention computes
#
# A sequence has N tokens. For each, the model has made three vectors of D numbers: a **query** (what the
# token looks for), a **key** (what it offers), and a **value** (what it passes on). The output of a token
# is a weighted mean of all values. The weight is large where the token's query and the other's key point
# the same way:
#
# $$S = \tfrac{1}{\sqrt D}\, q k^\top \qquad P = \mathrm{softmax}(S) \qquad o = P v$$
#
# A **softmax** turns a row of scores into weights: exponentials, divided by their sum. Models compute this
# many times side by side, in **heads** (H of them) and for a **batch** of B sequences. So all arrays here
# have the shape (B, heads, N, D).
#
# Three tokens, D = 2, by hand. The third query is the sum of the first two, so it looks at both.

# %%
q = np.array([[4.0, 0.0], [0.0, 4.0], [4.0, 4.0]]).reshape(1, 1, 3, 2)
k = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]).reshape(1, 1, 3, 2)
v = np.array([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]]).reshape(1, 1, 3, 2)

o = naive.attention(q, k, v)
table({"token": i, "output": np.round(row, 2)} for i, row in enumerate(o[0, 0]))

# %% [markdown]
# Token 0 takes nearly all of value 0, token 1 nearly all of value 1, and token 2 half of each.
#
# ## Why it is slow
#
# S and P have N × N numbers. For N = 4096 that is 16 million each, for every head. A GPU's arithmetic
# units work on a small memory on the chip (**SRAM**). Matrices of that size do not fit, so they travel to
# the large memory beside the chip (**HBM**) and back. Most of the time goes into that travel.
#
# ## The ladder
#
# Each rung is one function of q, k and v with the same result. What changes is how it moves data. The first
# is the lowest. (A **tile** is a block of rows that fits the chip; chapter 02 explains the passes. **Triton**
# is a language for programs that run on a GPU. Without a GPU they are interpreted, slowly, on the CPU.)

# %%
for rung in LADDER:
    print(f"{rung.name:8} {rung.framework:6} {rung.idea}")

# %% [markdown]
# ## Predict first
#
# With one head, N = 1024 and D = 64, in float16: how many times fewer bytes does the highest rung move
# than the lowest?

# %%
my_prediction = 10

# %% [markdown]
# Now run all rungs on the same inputs. Each one counts, while it runs, the bytes that it moves between HBM
# and SRAM. `least time` is what those bytes and the arithmetic take at least on an H200, by its data
# sheet. This takes some seconds.

# %%
problem = Problem(Nq=1024, D=64)
rows = [row for row in ladder.run(problem, gpu("h200")) if row.skipped is None]
table(
    {
        "rung": row.rung,
        "HBM traffic": human_bytes(row.counted.hbm_bytes),
        "extra memory": human_bytes(row.counted.hbm_extra_bytes),
        "least time": human_seconds(row.bound.seconds),
        "right": row.within_budget,
        "counted = formula": row.counted_equals_closed_form,
    }
    for row in rows
)

# %%
ratio = rows[0].counted.hbm_bytes / rows[-1].counted.hbm_bytes
print(f"you said {my_prediction}; counted {ratio:.1f}")

# %% [markdown]
# *Right* means: the error against a float64 computation is within a budget that the precision allows.
# *Counted = formula* means: the bytes that were counted while the stage ran equal a closed formula,
# exactly. Both hold for every rung of this course.
#
# The bytes of each rung, by tensor:

# %%
runs = {row.rung: ladder.count(row.rung, problem) for row in rows}
fig = plots.traffic(
    {name: machine.bytes_by_tensor() for name, machine in runs.items()},
    "The same result, and up to five times the traffic",
)

# %% [markdown]
# *Figure 1. `naive` moves S and P to HBM and back. `tiled` and `online` read k and v more often instead.
# `flash1`, the first GPU program, moves its unfinished output back and forth. `flash2` moves what `online`
# moves, and keeps hundreds of programs busy at a time. The next chapters explain each bar.*
#
# ## Watch one run
#
# A run that was counted can be played, step by step. This is `online` on 32 tokens, in tiles of eight. Above is the
# large memory, below the small one on the chip. Press Play, drag the slider, or step with ← and →. Nothing needs to be
# understood yet: see that tiles go down, that only finished rows of o come up, and that S is never in HBM.

# %%
play("online", Problem(Nq=32, D=16, block_q=8, block_k=8))

# %% [markdown]
# *Figure 2. A player. (Where scripts are off, it is a picture of three moments.) It shows a recorded run of the stage's
# own code: the line that runs is marked, and the bytes are those that it counted.*
#
# ## The chapters
#
# | chapter | claim |
# | --- | --- |
# | [01 · The memory wall](01_the_memory_wall.ipynb) | standard attention is bound by the bytes of S and P |
# | [02 · Tiling](02_tiling.ipynb) | tiles of S fit on the chip, but the softmax takes three passes |
# | [03 · Online softmax](03_online_softmax.ipynb) | a rescale makes it one pass, exactly |
# | [04 · Backward](04_backward.ipynb) | the backward computes P again from q, k and one number a row |
# | [05 · Triton and FlashAttention-1](05_triton_flash1.ipynb) | as a GPU program, in FlashAttention's first loop order, it re-reads o and fills few processors |
# | [06 · FlashAttention-2](06_flash2.ipynb) | with the loops swapped, o stays on the chip and the sequence becomes parallel |
# | [07 · The backward kernels](07_flash2_backward.ipynb) | two kernels, in which each gradient has one owner |
# | [08 · How fast](08_how_fast.ipynb) | the bytes that we predict are those that a card counts, and what that says of speed |
# | [09 · Numerics](09_numerics.ipynb) | two right answers differ, and an error budget says by how much |
# | [10 · Decode](10_decode.ipynb) | with one query the keys are split, the parts merge by the online softmax, and pages hold the cache |
# | [11 · Transformers](11_transformers.ipynb) | one argument turns it on in a real model, and counted calls prove it |
# | [12 · Serving](12_serving.ipynb) | a server is fast when many requests share one read of the weights |
# | [13 · Hopper](13_hopper.ipynb) | warps that do different things keep the tensor cores at work |
#
# ## Takeaway
#
# **The same result can cost very different traffic, and traffic is what attention waits for.**
#
# ## Exercises
#
# **1.** Double N in the cell that begins with `problem =`, and run it and the next two again. What grows about
# four times? What happens to the extra memory?
#
# <details><summary>Answer</summary>
#
# The traffic grows about four times for all rungs, and the least time with it. The extra memory grows four
# times for `naive`, and two times for `online` and the two above it, which need some numbers a query. `tiled`
# needs none.
# </details>
#
# **2.** In a terminal, in the folder of this project, ask for the same on another card:
# `.venv/bin/flashedu ladder --n 2048 --gpu t4`. What is the limit of each rung there? What does the mark `!` say?
#
# <details><summary>Answer</summary>
#
# Memory, for every rung: the last column says so. The mark says that tiles of 128 queries and 64 keys take
# more SRAM than a T4 has for one program. Smaller ones fit: add `--block-q 64 --block-k 32`.
# </details>
