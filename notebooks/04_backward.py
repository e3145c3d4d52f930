# %% [markdown]
# # 04 · Backward
#
# **Claim.** The backward needs P, but need not store it: q, k and one number a row give P back.
#
# Before: [03 · Online softmax](03_online_softmax.ipynb). Next:
# [05 · Triton and FlashAttention-1](05_triton_flash1.ipynb).

# %%
import torch

from flashedu import plots
from flashedu.memory import Machine, Problem, cost, gpu
from flashedu.notebook import source, table
from flashedu.stages import naive, online, reference
from flashedu.testing import draw, errors, saved_bytes
from flashedu.units import human_bytes, human_seconds

# %% [markdown]
# ## The problem that the last rung left
#
# To train a model we need gradients: how a loss changes with q, k and v. We write do for the gradient of
# the loss with respect to the output o, and look for dq, dk and dv.
#
# PyTorch's automatic differentiation (autograd) keeps what the backward will need. For standard attention
# that is P, among others. Let us measure what it keeps, for one head at N = 1024.

# %%
problem = Problem(Nq=1024, D=64, dtype="float32")
q, k, v, do = draw(problem, framework="torch")
standard_bytes = saved_bytes(
    lambda q, k, v: torch.softmax(q @ k.mT / 8, -1) @ v, q, k, v
)
online_bytes = saved_bytes(online.attention, q, k, v)
print(f"P alone:                 {1024**2 * 4 / 2**10:,.0f} KiB")
print(f"standard attention keeps {standard_bytes / 2**10:,.0f} KiB: q, k, v and P")
print(f"the stage online keeps   {online_bytes / 2**10:,.0f} KiB: q, k, v, o and lse")

# %% [markdown]
# ## The formulas
#
# Six formulas, in this order. They are the chain rule, applied to O = P v, then to the softmax, then to
# S = scale · q kᵀ: a line for each.
#
# $$dv = p^\top do \qquad dp = do\, v^\top$$
#
# $$\text{delta} = \text{rowsum}(do \circ o) \qquad ds = p \circ (dp - \text{delta})$$
#
# $$dq = \text{scale} \cdot ds\, k \qquad dk = \text{scale} \cdot ds^\top q$$
#
# The second line is the softmax. Raising one score takes weight away from all others in its row,
# since a row of P sums to 1. The term delta is that loss, one number a row.
#
# Each formula against autograd, in float64, on a small case:

# %%
tiny = Problem(Nq=6, Nk=5, D=4, dtype="float64")
q, k, v, do = (x[0, 0] for x in draw(tiny, framework="torch"))
scale = 4**-0.5

q_, k_, v_ = (x.clone().requires_grad_() for x in (q, k, v))
s_ = scale * q_ @ k_.T
p_ = torch.softmax(s_, -1)
o_ = p_ @ v_
for x in (s_, p_):
    x.retain_grad()
o_.backward(do)
with torch.no_grad():
    p, o = p_.clone(), o_.clone()

# %%
delta = (do * o).sum(-1, keepdim=True)
dv = p.T @ do
dp = do @ v.T
ds = p * (dp - delta)
dq = scale * ds @ k
dk = scale * ds.T @ q

pairs = {
    "dv": (dv, v_.grad),
    "dp": (dp, p_.grad),
    "delta": (delta, (p_.grad * p).sum(-1, keepdim=True)),
    "ds": (ds, s_.grad),
    "dq": (dq, q_.grad),
    "dk": (dk, k_.grad),
}
for name, (ours, autograds) in pairs.items():
    equal = torch.allclose(ours, autograds, rtol=1e-12, atol=1e-14)
    print(f"{name:5} equal to autograd's: {equal}")

# %% [markdown]
# Delta can be had in two ways: rowsum(do ∘ o) and rowsum(p ∘ dp) are equal, as o = p v. The first needs
# no N × N matrix. That is why the output o is kept.
#
# ## The idea: compute P again
#
# The forward left lse = log Σ eˢ for each row. So each probability is one exponential away:
#
# $$p = e^{s - \text{lse}}$$
#
# No maximum, no sum, no second pass: lse has both. The backward computes a tile of S again from q and k,
# turns it into p, uses it, and forgets it. This is called **recomputation**.

# %%
source(online.backward)

# %% [markdown]
# The loops are turned round. In the forward, a query tile stays and key tiles pass by. Here a key tile
# stays, with its dk and dv, and query tiles pass by. A query tile's dq gets a share from every key tile,
# so it is summed in HBM, in float32.
#
# ## By hand: one row
#
# For the first row of the small case: the probabilities from lse, and those of the softmax.

# %%
lse = torch.logsumexp(s_.detach(), -1)
again = torch.exp(scale * q @ k.T - lse[:, None])
print("softmax:     ", "  ".join(f"{x:.6f}" for x in p[0].tolist()))
print("exp(s - lse):", "  ".join(f"{x:.6f}" for x in again[0].tolist()))

# %% [markdown]
# ## Predict first
#
# At N = 4096 and D = 64, in float16, the standard backward moves seven N × N matrices: it reads P twice,
# writes dp and ds, reads dp once, and ds twice. That is 224 MiB. The online backward does five matrix
# products where the standard one does four, as it computes S again. What share of the standard's bytes does
# it move?
#
# Here the key tile stays, so `block_k` is the size that buys traffic. We take tiles of 64 queries and
# 128 keys.

# %%
my_prediction = 1.25  # online's bytes to the standard's

# %%
real = Problem(Nq=4096, D=64, block_q=64, block_k=128)
arrays = draw(real)
q, k, v, do = arrays
_, p = naive.forward(q, k, v, real, 64**-0.5, Machine(trace=False))
standard = Machine()
naive.backward(do, q, k, v, p, real, 64**-0.5, standard)

q, k, v, do = (torch.from_numpy(x) for x in arrays)
o, lse = online.forward(q, k, v, real, 64**-0.5, Machine(trace=False))
recomputed = Machine()
online.backward(do, None, q, k, v, o, lse, real, 64**-0.5, recomputed)

table(
    {
        "backward": name,
        "traffic": human_bytes(counted.hbm_bytes),
        "extra memory": human_bytes(counted.hbm_extra_bytes),
        "GFLOPs": f"{counted.flops / 1e9:.2f}",
    }
    for name, counted in (("naive", standard.counted), ("online", recomputed.counted))
)

# %%
ratio = recomputed.counted.hbm_bytes / standard.counted.hbm_bytes
print(f"you said {my_prediction}; counted {ratio:.2f}")

# %% [markdown]
# A quarter more FLOPs and less than half of the bytes. The extra memory is that of the backward alone: dp and
# ds there, delta and dq_sum here. The standard backward needs P from the forward besides, 32 MiB more.
#
# ## Counted against predicted

# %%
for counted, closed_form in (
    (standard.counted, cost.naive_backward(real)),
    (recomputed.counted, cost.online_backward(real)),
):
    print(f"counted     {counted.hbm_bytes:,} bytes")
    print(f"closed form {closed_form.hbm_bytes:,} bytes")
    assert counted == closed_form

# %%
fig = plots.traffic(
    {"naive": standard.bytes_by_tensor(), "online": recomputed.bytes_by_tensor()},
    "Backward: no N × N tensor, but dq travels (N = 4096, D = 64)",
)

# %% [markdown]
# *Figure 1. Recomputation takes p, dp and ds out of HBM. What it pays for that: q and do pass by once for
# each key tile, and dq_sum is read and written as the shares of dq add up.*
#
# ## Less memory and less time
#
# The times that no kernel with this traffic and these FLOPs can beat, as in chapter 01:

# %%
cards = [gpu(key) for key in ("t4", "a100-80", "h100", "h200")]
bounds = {
    card.name: [card.bound(m.counted, "float16") for m in (standard, recomputed)]
    for card in cards
}
table(
    {
        "card": name,
        "naive, at least": human_seconds(naive_bound.seconds),
        "online, at least": human_seconds(online_bound.seconds),
        "naive to online": f"{naive_bound.seconds / online_bound.seconds:.1f}",
        "limit of both": f"{naive_bound.limit}, {online_bound.limit}",
    }
    for name, (naive_bound, online_bound) in bounds.items()
)

# %% [markdown]
# More arithmetic, and yet a lower bound on every card, because arithmetic was never the limit. These are
# bounds, not measurements.
#
# ## Is it right?
#
# The gradients of whole calls against the oracle, whose formulas are in float64. The budget is the same as
# before: twice the error of plain PyTorch in the same precision, plus a few roundings.

# %%
check = Problem(Nq=67, Nk=131, D=40, H=4, H_kv=2, causal=True, dtype="float32")
for family in ("normal", "peaked", "large", "rising"):
    q, k, v, do = draw(check, family, framework="torch")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    online.attention(*leaves, causal=True, block_q=32, block_k=48).backward(do)
    got = reference.Reference(None, None, *(x.grad for x in leaves))
    found = errors(got, q, k, v, do, causal=True)
    verdicts = {name: error.within for name, error in found.items()}
    print(f"{family:7} within the budget: {verdicts}")

# %% [markdown]
# PyTorch's own check perturbs each input, in float64, and compares the change with the gradient:

# %%
tiny = Problem(Nq=5, Nk=7, D=3, H=2, H_kv=1, dtype="float64", causal=True)
leaves = [x.requires_grad_() for x in draw(tiny, framework="torch")[:3]]
torch.autograd.gradcheck(
    lambda *x: online.attention(*x, causal=True, block_q=2, block_k=3), leaves
)

# %% [markdown]
# ## Takeaway
#
# **The backward computes P again instead of reading it: some more arithmetic, far fewer bytes, and
# memory that grows with N.** What is still slow: these stages are Python loops. They show the traffic of
# a fast kernel; they are not one. The next step is to write the same algorithm as a program for the GPU.
#
# ## Exercises
#
# **1.** Swap the tile sizes: 128 queries and 64 keys. What happens to the traffic of the backward, and why?
#
# <details><summary>Answer</summary>
#
# It nearly doubles, to 200 MiB: with twice as many key tiles, q, do and dq_sum pass by twice as often.
#
# ```python
# cost.online_backward(Problem(Nq=4096, D=64, block_q=128, block_k=64)).hbm_bytes / 2**20
# ```
# </details>
#
# **2.** Leave out delta: set ds = p ∘ dp. Which gradients are wrong? Which is still right?
#
# <details><summary>Answer</summary>
#
# dq and dk are wrong, as both come from ds. dv is right: it is pᵀ do and does not use ds.
# </details>
#
# **3.** Why is dq summed in float32, when q is float16?
#
# <details><summary>Answer</summary>
#
# A query tile gets 32 shares here, one from each key tile. In float16 each addition would round to 11
# bits, and the errors would add up. One rounding at the end costs N · D · (4 + 2) bytes of traffic.
# </details>
