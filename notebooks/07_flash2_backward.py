# %% [markdown]
# # 07 · The backward kernels
#
# **Claim.** Two kernels, no atomics: each gradient has one owner. P is computed twice for that.
#
# Before: [06 · FlashAttention-2](06_flash2.ipynb). Next: [08 · How fast](08_how_fast.ipynb).

# %%
import math
from collections import Counter, defaultdict

import torch

from flashedu import ladder, plots
from flashedu.bench import compiled
from flashedu.bench import record as speed_record
from flashedu.memory import Problem, cost, gpu
from flashedu.notebook import record, source, table
from flashedu.stages import flash2, reference
from flashedu.stages.descriptors import columns, tiles_of
from flashedu.testing import draw, errors
from flashedu.units import human_bytes

device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## The problem that the last rung left
#
# In chapter 04 a key tile stays, with its dk and dv, and query tiles pass by. That order suits dk and dv. But
# every key tile has a share of every dq, so dq was summed in HBM:

# %%
problem = Problem(Nq=512, D=64, block_q=64, block_k=64)
online = ladder.count("online", problem, trace=True, backward=True)
stores = Counter((e.tensor, e.start) for e in online.trace if e.op == "store")
for name in ("dk", "dv", "dq_sum"):
    print(f"online stores the rows from 0 of {name} {stores[name, 0]} times")

# %% [markdown]
# Once with zeros, and once for each of the eight key tiles. In a Python loop, one key tile comes after another.
# If each is a program of its own, and all run at once, then eight programs add to the same numbers. A GPU can
# do that with **atomic** additions, which do not get lost, but which come in any order. And the order of
# additions changes the result. The same eight shares of dq, added from the first and from the last:

# %%
single = Problem(Nq=512, D=64, dtype="float32")
q, k, v, do = (x.double() for x in draw(single, framework="torch"))
p = torch.softmax(q @ k.mT / 8, -1)
ds = p * (do @ v.mT - (do * (p @ v)).sum(-1, keepdim=True))

tiles = [slice(j, j + 64) for j in range(0, 512, 64)]
shares = [(ds[..., j] @ k[..., j, :] / 8).float() for j in tiles]
one, other = sum(shares), sum(shares[::-1])
print("equal to 6 digits:", torch.allclose(one, other, rtol=1e-6, atol=1e-6))
print("the same bits:    ", torch.equal(one, other))

# %% [markdown]
# So with atomics, two runs of one training step can differ. (Chapter 09 says how much that matters.)
#
# ## The idea: whoever owns it, walks
#
# A gradient is a sum along a row or a column of the score matrix: dq along the keys, dk and dv along the
# queries. A program that walks the whole row, or column, can keep the sum on the chip and store it once.
# Then it is the only **owner** of that sum. No single kernel can walk both ways. So there are two kernels,
# and before them a small one for delta:
#
# | kernel | a program for each | owns | walks over |
# | --- | --- | --- | --- |
# | delta | query tile | delta | nothing |
# | dkdv | key tile | dk_j, dv_j | the queries that see it |
# | dq | query tile | dq_i | the keys that it sees |
#
# This is what each program visits, from the trace of the kernels themselves:

# %%
run = ladder.count("flash2", problem, trace=True, backward=True)
fig = plots.walks(
    run.trace,
    problem,
    {"flash2 dkdv": "dkdv: a column of tiles", "flash2 dq": "dq: a row of tiles"},
    "Each program walks alone along what it owns",
    mark=2,
)

# %% [markdown]
# *Figure 1. Every tile of P is computed twice: once by the owner of its column, once by the owner of its row.
# No two programs store to the same place.*
#
# ## The kernels
#
# The formulas are the six of chapter 04. First delta = rowsum(do ∘ o):

# %%
source(flash2.delta_kernel.fn)

# %% [markdown]
# Then dk and dv:

# %%
source(flash2.dkdv_kernel.fn)

# %% [markdown]
# Note three things.
#
# - **The tiles stand on end.** dv needs pᵀ and dk needs dsᵀ. A tile that was computed lies in registers, as
#   the result of a product, and it can be the left factor of the next product as it is. To turn it there would
#   mean a way through SRAM. So the kernel computes k qᵀ in place of q kᵀ, and has pᵀ from the start. The
#   tiles that it does turn, q_i and do_i, lie in SRAM, where they can be read either way.
# - **The loop over `g`.** If query heads share a key head (`GROUP` of them), their shares of dk and dv are one
#   more loop of the same owner.
# - **The loop over `MASKED`**, as in the forward: first the tiles that need no mask, then those that the
#   diagonal crosses.
#
# At last dq, which is the forward's walk:

# %%
source(flash2.dq_kernel.fn)

# %% [markdown]
# ## Rows that see no key
#
# With more queries than keys and a causal mask, the first rows see no key. Their lse is −∞, as log 0 is. Then
# p = 2^(s − lse) would be 2^(−∞ + ∞), which is not a number. `load_lse` puts +∞ in its place.

# %%
source(flash2.load_lse.fn)

# %%
s = torch.tensor([-torch.inf])
print("lse = -inf gives p =", torch.exp2(s - -torch.inf).item())
print("lse = +inf gives p =", torch.exp2(s - torch.inf).item())

# %% [markdown]
# The same +∞ stands for rows that do not exist, at the end of the last query tile. Their p is 0 too, so the
# loop without a mask may run over them.
#
# ## By hand: what one program moves
#
# Three tiles of 16 queries and 16 keys; program 1 of each of the two kernels.

# %%
small = Problem(Nq=48, D=16, block_q=16, block_k=16)
trace = ladder.count("flash2", small, trace=True, backward=True).trace
for kernel in ("flash2 dkdv", "flash2 dq"):
    events = [event for event in trace if event.kernel == kernel]
    of_program = [e for e in events if e.step == events[0].step + 1]
    print(f"{kernel}:", ", ".join(f"{e.op} {e.tensor}" for e in of_program))

# %% [markdown]
# ## By hand: make the kernels show p and ds
#
# p and ds never leave the chip. But with the right inputs a gradient is one of them. If do is the identity
# matrix, then dv = pᵀ do = pᵀ. If k is, then dq = scale · ds k = scale · ds. And if q is, then dk = scale ·
# dsᵀ. So 64 queries, 64 keys and D = 64, in tiles of 32; beside them, autograd in float64:


# %%
def of_kernels(*inputs):
    q, k, v, do = (x.to(device) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    flash2.attention(*leaves, block_q=32, block_k=32).backward(do)
    return [x.grad.cpu() for x in leaves]


def of_autograd(*inputs):
    q, k, v, do = (x.double() for x in inputs)
    s = (q @ k.mT / 8).requires_grad_()
    (torch.softmax(s, -1) @ v).backward(do)
    return torch.softmax(s, -1).detach(), s.grad


# %%
square = Problem(Nq=64, D=64, dtype="float32")
q, k, v, do = draw(square, framework="torch")
eye = torch.eye(64).reshape(1, 1, 64, 64)
near = {"rtol": 1e-5, "atol": 1e-6}

_, _, dv = of_kernels(q, k, v, eye)
p, _ = of_autograd(q, k, v, eye)
print("p of dkdv is autograd's: ", torch.allclose(dv.mT.double(), p, **near))

_, dk, _ = of_kernels(eye, k, v, do)
_, ds = of_autograd(eye, k, v, do)
print("ds of dkdv is autograd's:", torch.allclose(8 * dk.mT.double(), ds, **near))

dq, _, _ = of_kernels(q, eye, v, do)
_, ds = of_autograd(q, eye, v, do)
print("ds of dq is autograd's:  ", torch.allclose(8 * dq.double(), ds, **near))

# %% [markdown]
# And one tile by hand, from lse in base 2, as the kernels do it: queries 0 to 31, keys 32 to 63.

# %%
i, j = slice(0, 32), slice(32, 64)
lse_log2 = torch.logsumexp(q @ k.mT / 8, -1) * math.log2(math.e)
s_ji = k[..., j, :] @ q[..., i, :].mT * (math.log2(math.e) / 8)
p_ji = torch.exp2(s_ji - lse_log2[..., None, i])
p, _ = of_autograd(q, k, v, do)
print(
    "p_ji is the tile of p, on end:",
    torch.allclose(p_ji.mT.double(), p[..., i, j], **near),
)

# %% [markdown]
# ## Predict first
#
# N = 512, D = 64, float16, tiles of 64 × 64. The backward of `online` moves 3.7 MiB, with five products for
# each tile. `flash2` computes p and dp twice: seven products. What share of `online`'s bytes does it move?

# %%
my_prediction = 1.4


# %%
def backward_bytes(machine):
    kernels = machine.bytes_by_kernel().items()
    return {
        name: sum(n) for name, n in kernels if " " in name
    }  # "flash2" is the forward


# %%
counted = {"online": backward_bytes(online), "flash2": backward_bytes(run)}
totals = {stage: sum(kernels.values()) for stage, kernels in counted.items()}
ratio = totals["flash2"] / totals["online"]
print(f"you said {my_prediction}; counted {ratio:.2f}")
table(
    {"kernel": name, "bytes": n}
    for kernels in counted.values()
    for name, n in kernels.items()
)

# %% [markdown]
# More products, and fewer bytes (in float16, with square tiles). In `online`, float32 sums of dq went both ways for each key tile, 8 bytes a
# number. In `flash2` the dq kernel loads k and v for each query tile, 4 bytes for both. And no kernel rounds
# dq_sum at the end. In float32, k and v take 8 bytes too, and the gain is gone.
#
# ## Counted against predicted

# %%
closed_forms = {
    "flash2 delta": cost.flash2_delta(problem),
    "flash2 dkdv": cost.flash2_dkdv(problem),
    "flash2 dq": cost.flash2_dq(problem),
}
for name, closed_form in closed_forms.items():
    print(f"{name:12} counted     {counted['flash2'][name]:9,} bytes")
    print(f"{name:12} closed form {closed_form.hbm_bytes:9,} bytes")
    assert counted["flash2"][name] == closed_form.hbm_bytes

# %% [markdown]
# By hand, for the two large ones. With tiles of $B_q$ queries and $B_k$ keys, a float32 each for lse and delta,
# and w bytes a number:
#
# $$\text{dkdv} = 4 N D w + \frac{N}{B_k} (2 N D w + 8 N) \qquad
# \text{dq} = 3 N D w + 8 N + \frac{N}{B_q}\, 2 N D w$$

# %%
print(f"dkdv: {4 * 512 * 64 * 2 + 8 * (2 * 512 * 64 * 2 + 8 * 512):,} bytes")
print(f"dq:   {3 * 512 * 64 * 2 + 8 * 512 + 8 * 2 * 512 * 64 * 2:,} bytes")

# %% [markdown]
# Where the bytes go, by tensor:


# %%
def by_tensor(machine, kernel):
    moved = defaultdict(lambda: [0, 0])  # bytes read, bytes written
    for event in (event for event in machine.trace if event.kernel == kernel):
        moved[event.tensor][event.op == "store"] += event.hbm_bytes
    return moved


# %%
kernels = {"online gradients": online, "flash2 dkdv": run, "flash2 dq": run}
fig = plots.traffic(
    {name: by_tensor(machine, name) for name, machine in kernels.items()},
    "dq is written once (N = 512, D = 64)",
)

# %% [markdown]
# *Figure 2. `online` reads and writes the sum of dq for each key tile, in float32. `flash2 dkdv` reads q and do as
# often as `online` does. In place of that sum, `flash2 dq` reads k and v for each query tile. Each gradient is
# written once.*
#
# Each kernel can have tiles of its own. dkdv moves less with more keys in a tile, and dq with more queries. By
# the closed forms, which hold at any size, at N = 4096 and D = 64:

# %%
real = Problem(Nq=4096, D=64)
sizes = [(64, 64), (128, 64), (64, 128), (128, 128)]
table(
    {"queries × keys": f"{block_q} × {block_k}"}
    | {
        name: human_bytes(
            cost.KERNELS[name](real.replace(block_q=block_q, block_k=block_k)).hbm_bytes
        )
        for name in ("online gradients", "flash2 dkdv", "flash2 dq")
    }
    for block_q, block_k in sizes
)

# %%
extra = {
    name: cost.BACKWARD[name](real).hbm_extra_bytes
    for name in ("naive", "online", "flash2")
}
for name, n_bytes in extra.items():
    print(f"extra memory of the backward, {name}: {human_bytes(n_bytes)}")

# %% [markdown]
# ## The price: two more products
#
# The products that were counted, in units of one product of all tiles, 2 N² D FLOPs:

# %%
product = 2 * 512 * 512 * 64
for name, machine in (("online", online), ("flash2", run)):
    flops = machine.flops - cost.FORWARD[name](problem).flops
    print(f"{name}: {flops / product:g} products")
for name in ("flash2 dkdv", "flash2 dq"):
    print(f"  {name}: {cost.KERNELS[name](problem).flops / product:g}")

# %% [markdown]
# dkdv needs s, dp, dv and dk. dq needs s and dp again, and dq. This is a choice. The CUDA kernels of
# FlashAttention-2 do five products in one kernel and add dq with atomics; whoever wants the same bits each time
# sets `deterministic=True` there, and pays with time and memory.
#
# ## One owner each: the same bits
#
# How often is each row of a gradient stored, and by how many programs? From the trace:

# %%
stored_by = Counter(
    (e.tensor, e.start)
    for e in run.trace
    if e.op == "store" and e.tensor in ("delta", "dk", "dv", "dq")
)
for name in ("delta", "dk", "dv", "dq"):
    starts = [start for tensor, start in stored_by if tensor == name]
    once = all(stored_by[name, start] == 1 for start in starts)
    print(f"{name:5} {len(starts)} tiles, each stored by one program: {once}")

# %% [markdown]
# A program adds its own terms in the order of its own loop. So it cannot matter which program comes first. Two
# runs, bit by bit (an interpreter runs programs one after another, so the trace above is the proof; on a GPU,
# this cell is):

# %%
q, k, v, do = draw(square, framework="torch", seed=1)
one, other = of_kernels(q, k, v, do), of_kernels(q, k, v, do)
print("same bits:", [torch.equal(a, b) for a, b in zip(one, other, strict=True)])

# %% [markdown]
# ## Heads that share keys
#
# Four query heads, one key head. dk is the sum over all four: more owners, or one with more to do?

# %%
shared = Problem(Nq=128, D=64, H=4, H_kv=1, block_q=64, block_k=64)
gqa = ladder.count("flash2", shared, trace=True, backward=True)
for name in ("flash2 dkdv", "flash2 dq"):
    loads = [e.tensor for e in gqa.trace if e.kernel == name and e.op == "load"]
    programs = gqa.programs[name]
    per_program = {x: loads.count(x) // programs for x in ("q", "k")}
    print(f"{name}: {programs} programs; tiles that each loads: {per_program}")

# %% [markdown]
# One owner with more to do. The two programs of dkdv walk over two query tiles of each of four heads, eight in
# all. So sharing keys makes fewer and longer programs here, and it needs no atomics either.
#
# ## Registers decide the tile sizes
#
# Sums and score tiles are float32, and a program keeps them in the registers of its threads. A thread has 255
# registers at most, 4 bytes each; what finds no place is **spilled** to slower memory. The forward keeps acc
# and s. dkdv keeps dk, dv, and two score tiles at a time; dq keeps dq and two score tiles. With 4 warps, which
# are 128 threads, the least that each thread must hold:


# %%
def registers(block_q, block_k, D, threads=128):
    score_tile = block_q * block_k
    forward = block_q * D + score_tile
    dkdv, dq = 2 * block_k * D + 2 * score_tile, block_q * D + 2 * score_tile
    return [n // threads for n in (forward, dkdv, dq)]


# %%
cases = [(64, 64, 64), (128, 64, 64), (128, 128, 64), (64, 64, 128), (128, 64, 128)]
table(
    {"queries × keys": f"{block_q} × {block_k}", "D": D}
    | dict(zip(("forward", "dkdv", "dq"), registers(block_q, block_k, D), strict=True))
    for block_q, block_k, D in cases
)

# %% [markdown]
# With square tiles, dkdv holds the most. What does the compiler make of that? These are the tiles that we
# use on an H200, compiled without one; the table is that of chapter 06.

# %%
recorded = record("compiled_triton3.7.1")
print("compiled {date} by Triton {triton}, without a GPU".format_map(recorded))
kernels = [
    found
    for found in compiled.from_record(recorded)
    if (found.case.stage, found.case.dtype, found.case.causal)
    == ("flash2", "float16", False)
    and found.case.D in (64, 128)
    and found.kernel != "delta_kernel"
]
shown = (
    "kernel",
    "D",
    "compiled at N",
    "tile",
    "threads",
    "registers",
    "spilled",
    "programs",
)
table(
    {name: row[name] for name in shown} for row in compiled.table(kernels, gpu("h200"))
)

# %% [markdown]
# Where a thread takes all 255 registers, a little is spilled. Fewer keys in dkdv's tile would cost traffic, more
# threads would leave one program on an SM in place of two, and fewer queries would cost nothing that we can count.
# Still these tiles were the fastest of some ten: such choices are made by trying. The tiles that move the fewest
# bytes are not always those that fit. (On a B200, sums of products have a memory of their
# own, and the tables look different.)
#
# ## On a GPU
#
# All three kernels together, recorded on an H200, beside PyTorch's attention (see the last chapter):

# %%
measured = speed_record.latest("speed", card="H200")
print(measured.label)
fig = plots.speed(measured, 64, "Two more products, and still ahead of SDPA flash")

# %% [markdown]
# *Figure 3. The lower row is the backward, at D = 64. SDPA flash is FlashAttention-2 in CUDA, with atomics and five products.
# `flash2` computes seven, without atomics, and is faster all the same; cuDNN stays ahead.*
#
# ## Is it right?
#
# First delta alone, with a launch by hand: the grid has two query tiles for each of four heads.

# %%
check = Problem(Nq=67, Nk=131, D=40, H=4, H_kv=2, causal=True, dtype="float32")
o, _, _, do = draw(check, framework="torch")
o, do = o.to(device), do.to(device)
delta = torch.empty(1, 4, 67, device=device)
O, DO = tiles_of(o, 64), tiles_of(do, 64)
flash2.delta_kernel[(2 * 4,)](O, DO, delta, 4, 67, COLUMNS=columns(40), BLOCK_Q=64)

exact = (do.double() * o.double()).sum(-1)
budget = 4 * torch.finfo(torch.float32).eps * (do * o).abs().sum(-1)
print("delta within four roundings:", ((delta - exact).abs() <= budget).all().item())

# %% [markdown]
# Then the gradients of whole calls, by the error budget, with heads that share keys, a causal mask and sizes
# that no tile divides:

# %%
options = {"causal": True, "block_q": 32, "block_k": 32}
for family in ("normal", "peaked", "large", "rising"):
    q, k, v, do = (x.to(device) for x in draw(check, family, framework="torch"))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    flash2.attention(*leaves, **options).backward(do)
    got = reference.Reference(None, None, *(x.grad for x in leaves))
    found = errors(got, q, k, v, do, causal=True)
    verdicts = {name: error.within for name, error in found.items()}
    print(f"{family:7} within the budget: {verdicts}")

# %% [markdown]
# And more queries than keys: the first 64 of 131 queries see no key.

# %%
blind = Problem(Nq=131, Nk=67, D=40, H=2, causal=True, dtype="float32")
q, k, v, do = (x.to(device) for x in draw(blind, framework="torch"))
leaves = [x.requires_grad_() for x in (q, k, v)]
flash2.attention(*leaves, **options).backward(do)
got = reference.Reference(None, None, *(x.grad for x in leaves))
found = errors(got, q, k, v, do, causal=True)
print("within the budget:", {name: error.within for name, error in found.items()})
print("dq is 0 for rows that see no key:", not q.grad[:, :, :64].any().item())
print("all gradients are finite:", all(x.grad.isfinite().all().item() for x in leaves))

# %% [markdown]
# ## Takeaway
#
# **A program owns what it stores. dk and dv belong to a key tile, dq to a query tile, and P is computed for
# each: seven products in place of five, no atomics, the same bits each time, and no float32 sum in HBM.** This is a
# complete FlashAttention-2, for training too. What is left of the distance to cuDNN is
# the subject of a later chapter.
#
# ## Exercises
#
# **1.** The gradient of lse itself (some losses use it) comes in as dlse. ∂lse/∂s = p. Where must dlse go in
# the six formulas of chapter 04, and in which one line does `flash2.backward` do it?
#
# <details><summary>Answer</summary>
#
# ds = p ∘ (dp − delta) + p ∘ dlse = p ∘ (dp − (delta − dlse)). So subtract it from delta, before the two
# kernels: `delta -= dlse`. They need not know.
# </details>
#
# **2.** Draw the walks with a causal mask. Which program of dkdv has most to do, and which of dq? Which
# numbers do they have, and why?
#
# ```python
# causal = problem.replace(causal=True)
# machine = ladder.count("flash2", causal, trace=True, backward=True)
# kernels = {"flash2 dkdv": "dkdv", "flash2 dq": "dq"}
# plots.walks(machine.trace, causal, kernels, "Causal", mark=0)
# ```
#
# <details><summary>Answer</summary>
#
# The first key tile is seen by all queries, and the last query tile sees all keys. Both have number 0, as the
# longest should start first (chapter 06). For dkdv the tiles are in that order anyhow; dq turns them round.
# </details>
#
# **3.** 64 query heads share one key head, B = 1, N = 1024, and dkdv has tiles of 64 keys. How many programs
# does it launch? How many does dq, with tiles of 64 queries? What would it take to have more for dkdv?
#
# <details><summary>Answer</summary>
#
# 16 · B · H_kv = 16 programs of dkdv, on 132 SMs, and 16 · 64 = 1024 of dq. With a program for each key tile of
# each query head there would be 1024 of dkdv too. But then 64 programs share a dk. They would need atomics, or
# 64 parts of dk in HBM and another kernel that adds them.
# </details>
