# %% [markdown]
# # 09 · Numerics
#
# **Claim.** Two right answers differ, and an error budget says by how much.
#
# Before: [08 · How fast](08_how_fast.ipynb). Next: [10 · Decode](10_decode.ipynb).

# %%
import inspect
import itertools

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashedu import plots
from flashedu.memory import Machine, Problem
from flashedu.notebook import source, table
from flashedu.numerics import FORMATS, round_mantissa, round_to
from flashedu.stages import naive, online, reference, rung
from flashedu.stages.reference import Reference
from flashedu.testing import draw, errors

# %% [markdown]
# ## The problem that the last rungs left
#
# "Why does the output not match PyTorch's?" FlashAttention's users ask it again and again (issues
# [211](https://github.com/Dao-AILab/flash-attention/issues/211),
# [410](https://github.com/Dao-AILab/flash-attention/issues/410),
# [434](https://github.com/Dao-AILab/flash-attention/issues/434),
# [886](https://github.com/Dao-AILab/flash-attention/issues/886) and
# [1445](https://github.com/Dao-AILab/flash-attention/issues/1445) of its repository). Every chapter so far has
# said *within the budget* and left it at that. Here are the same inputs, in float32, through four right
# programs.

# %%
problem = Problem(Nq=256, D=64, dtype="float32")
q, k, v, do = draw(problem, framework="torch")
results = {
    "naive": torch.from_numpy(naive.attention(q.numpy(), k.numpy(), v.numpy())),
    "online, 64 keys in a tile": online.attention(q, k, v, block_k=64),
    "online, 128 keys in a tile": online.attention(q, k, v, block_k=128),
}

# %%
# The Triton kernel, interpreted where there is no GPU. Triton exists on Linux only.
if rung("flash2").missing() is None:
    from flashedu.stages import triton_mode

    flash2 = rung("flash2").load()
    device = "cpu" if triton_mode.INTERPRETED else "cuda"
    o = flash2.attention(*(x.to(device) for x in (q, k, v)), block_q=64, block_k=64)
    results["flash2"] = o.cpu()

# %%
table(
    {
        "result": name,
        "same bits as naive": torch.equal(o, results["naive"]),
        "within the budget": errors(Reference(o, None), q, k, v)["o"].within,
    }
    for name, o in results.items()
)

# %%
pairs = list(itertools.combinations(results.values(), 2))
print("pairs with the same bits:", sum(torch.equal(a, b) for a, b in pairs))

# %% [markdown]
# No two of them agree in every bit, not even one stage with two tile sizes. None is wrong.
#
# ## The idea: each addition rounds
#
# A **floating-point number** keeps a fixed count of digits: its **mantissa**. After each addition the digits
# that do not fit are rounded away. So what is lost depends on what was added to what, and when:
# $(a + b) + c$ and $a + (b + c)$ may differ. Addition is not **associative** in floating point.
#
# By hand, in float16. From 2048 to 4096 it has every second integer only, and a tie goes to the neighbour
# whose last bit is 0. So 2048 + 1 is 2048 again.

# %%
a, b, c = np.float16([2048, 1, 1])
print(f"(a + b) + c = {(a + b) + c:.0f}")
print(f"a + (b + c) = {a + (b + c):.0f}")

# %% [markdown]
# A **tile** is a choice of order: first the sum of each tile, then the sum of those. One 2048 and seven ones,
# in tiles of 1, 2 and 4. The exact sum is 2055, and the nearest float16 is 2056.


# %%
def sum_in_tiles(x, size):
    # cumsum adds from the left, one after the other
    tiles = [tile.cumsum(dtype="float16")[-1] for tile in np.split(x, len(x) // size)]
    return np.cumsum(tiles, dtype="float16")[-1]


x = np.float16([2048, 1, 1, 1, 1, 1, 1, 1])
for size in (1, 2, 4):
    print(f"tiles of {size}: {sum_in_tiles(x, size):.0f}")

# %% [markdown]
# Three orders, three sums, and none is the exact one. Attention adds D products for each score and N terms
# for each output. Other tiles, another order, other last bits. For the first outputs of the table above,
# against float64:

# %%
exact = reference.attention(q, k, v).o
fig = plots.two_answers(
    {
        f"{size} keys in a tile": (
            results[f"online, {size} keys in a tile"].double() - exact
        )[0, 0, 0, :40].tolist()
        for size in (64, 128)
    },
    "Two tile sizes: other errors, not larger ones",
)

# %% [markdown]
# *Figure 1. Both results scatter about the exact one. Their difference is as large as their errors. So a
# comparison of the two with each other cannot tell which is better. A comparison with float64 can.*
#
# ## The error budget
#
# How large may an error be? As large as the precision makes it, and no number picked by hand says how large
# that is. FlashAttention's tests therefore take a yardstick that has the same precision: standard attention,
# as a PyTorch user writes it. So does this course. A result $x$ is right if
#
# $$\max|x - x_{64}| \;\le\; 2 \max|x_\text{plain} - x_{64}| + 4\,(\varepsilon \max|x_{64}| + \varepsilon_{32}\, t)$$
#
# $x_{64}$ is the oracle, in float64. $x_\text{plain}$ is the plain formula in the precision of the inputs. ε is
# the step from 1 to the next number of that precision: a rounding is off by at most half of it, relative to
# the number. So the last term allows four steps, twice what four roundings can lose, of the result and of the
# float32 sums behind it, whose terms have the size $t$. (lse is float32 always, and so is its yardstick.) It is there for rows in which the plain formula is lucky.
#
# `flashedu.testing.errors` gives both sides for each result:

# %%
found = errors(Reference(results["naive"], None), q, k, v)["o"]
print("below the budget:", found.error <= found.budget)
print("off by 1e-4, below the budget:", found.error + 1e-4 <= found.budget)

# %% [markdown]
# ## Why not a fixed tolerance?
#
# Because it is wrong both ways. First: **it lets wrong kernels pass.** With normal inputs and many keys, no
# key stands out, and an output is a mean of N random values: about $1/\sqrt N$. Here is an impostor that never
# looks at q and k. It returns the mean of v.


# %%
def impostor(q, k, v):
    return v.mean(2, keepdim=True).expand_as(q)


many = Problem(Nq=4, Nk=2**18, D=16, dtype="float32", block_k=2**14)
inputs = draw(many, framework="torch")[:3]
right, wrong = online.attention(*inputs, block_k=2**14), impostor(*inputs)
print("torch.allclose, atol=1e-2:", torch.allclose(wrong, right, rtol=0, atol=1e-2))
for name, o in (("impostor", wrong), ("online", right)):
    found = errors(Reference(o, None), *inputs)["o"]
    print(f"{name:8} within the budget:", found.within)

# %% [markdown]
# Second: **it rejects right ones.** Standard attention in float16 stores its scores in float16. With "peaked"
# inputs, whose scores reach some tens, that rounding moves a weight by a percent or more. Nothing is wrong
# with the code.

# %%
peaked = Problem(H=4, Nq=256, D=128)
arrays = draw(peaked, "peaked")[:3]
best = reference.attention(*arrays).o
result = naive.attention(*arrays)
found = errors(Reference(result, None), *arrays)["o"]
once_rounded = (best.half().double() - best).abs().max().item()
print("naive, atol=1e-2:       ", found.error < 1e-2)
print("naive within the budget:", found.within)
print("exact, then rounded to float16, atol=1e-3:", once_rounded < 1e-3)

# %% [markdown]
# The last line is the exact result, rounded once. No float16 can be nearer, and it fails a tolerance of 1e-3.
#
# One more comparison, since users ask: which is nearer to the truth, FlashAttention or what they compare it
# with? A flash stage keeps its scores on the chip in float32 and never rounds them to float16.

# %%
flash = online.attention(*(torch.from_numpy(x) for x in arrays))
flash_error = errors(Reference(flash, None), *arrays)["o"].error
print("online is at least 5 times nearer than naive:", 5 * flash_error < found.error)

# %% [markdown]
# Errors and budgets against the number of keys, in three precisions, beside the impostor:

# %%
lengths = [2**e for e in range(8, 19, 2)]
found = {"bfloat16": [], "float16": [], "float32": []}
wrong = []
for n in lengths:
    p = Problem(Nq=4, Nk=n, D=16, dtype="float32")
    inputs = draw(p, framework="torch")[:3]
    wrong.append(errors(Reference(impostor(*inputs), None), *inputs)["o"].error)
    for name in found:
        rounded = [x.to(getattr(torch, name)) for x in inputs]
        o = online.attention(*rounded, block_k=4096)
        found[name].append(errors(Reference(o, None), *rounded)["o"])

# %%
fig = plots.error_against_n(
    lengths, found, wrong, 1e-2, "Budgets tell right from wrong at any N; 1e-2 does not"
)

# %% [markdown]
# *Figure 2. Each right result (solid) stays below its own budget (dashed). The impostor's error falls with
# 1/√N and slips below the fixed tolerance, yet it stays above every budget. The budget of float32 hardly falls:
# it is mostly the roundings of the scores, which do not shrink with N.*
#
# ## Four formats
#
# A number is a **sign**, an **exponent**, which says between which two powers of two it lies, and a mantissa,
# which says where between them. The exponent's bits set the range, the mantissa's bits the precision.
#
# - **float32** is PyTorch's default, and what the stages compute in.
# - **float16** halves the bytes. It has the shortest exponent: it overflows above 65,504.
# - **bfloat16** has float32's range and the coarsest steps.
# - **TF32** is no format to store. It is what a tensor core, the GPU's unit for matrix products, reads of a
#   float32: all of the exponent, and 10 bits of the mantissa.

# %%
fig = plots.bit_layout(FORMATS, "TF32: float32's exponent and float16's mantissa")

# %% [markdown]
# *Figure 3. Same exponent, same range; same mantissa, same precision. ε is the step from 1 to the next
# number.*
#
# What does it cost to round q, k and v? We round the inputs, and compute the rest in float64, so that this is
# the only error.

# %%
inputs = draw(Problem(Nq=256, D=64, dtype="float32"), framework="torch")[:3]
exact = reference.attention(*inputs).o
rounding_error = {}
for form in FORMATS:
    o = reference.attention(*(round_to(x, form.name) for x in inputs)).o
    rounding_error[form.name] = (o - exact).abs().max().item()
table(
    {
        "format": form.name,
        "bits": form.bits,
        "ε": f"{form.eps:.1e}",
        "largest": f"{form.largest:.3g}",
        "error of o": f"{rounding_error[form.name]:.1e}",
    }
    for form in FORMATS
)

# %% [markdown]
# The errors go as ε: bfloat16 has three mantissa bits less than float16, and some eight times the error. (The
# inputs were drawn in float32, so float32 changes nothing.)
#
# Rounding to TF32 takes a few operations on the bits of a float32. If what is cut off is more than half a step, the
# kept part goes up by one step. If it is exactly half, it goes to the neighbour whose last bit is 0.

# %%
source(round_mantissa)

# %%
x = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-23])
for before, after in zip(x, round_to(x, "tf32"), strict=True):
    print(f"1 + {before - 1:.8f}  becomes  1 + {(after - 1) * 2**10:.0f} · 2⁻¹⁰")

# %% [markdown]
# ## TF32: ten bits, unless you ask for more
#
# In Triton, `tl.dot` of two float32 tiles uses TF32 by default, because tensor cores take TF32 and not float32. The
# result is stored as float32 and looks like float32. So each `tl.dot` of flash2 says `input_precision="ieee"`:
# true float32. (PyTorch has such a switch for its own products, `torch.set_float32_matmul_precision`. Triton's
# interpreter computes in float32 whatever the switch says, so we emulate TF32. We round to the nearest. A card may
# cut the bits off instead, with errors up to twice as large.)
#
# All products of the stage `online` go through the machine that it is given, forward and backward. So a
# machine whose products round is enough.


# %%
class TF32Machine(Machine):
    def matmul(self, a, b):
        return super().matmul(round_to(a, "tf32"), round_to(b, "tf32"))


def run(inputs, machine):
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    o, lse = online.attention_with_lse(*leaves, machine=machine)
    gradients = torch.autograd.grad(o, leaves, inputs[3])
    return errors(Reference(o, lse, *gradients), *inputs)


# %%
p, rows = Problem(H=2, Nq=256, D=64, dtype="float32"), {}
for family in ("normal", "large"):
    inputs = draw(p, family, framework="torch")
    single = run(inputs, Machine(trace=False))
    tf32 = run(inputs, TF32Machine(trace=False))
    for name in single:
        rows[f"{family}: {name}"] = {"float32": single[name], "tf32": tf32[name]}
fig = plots.against_budget(
    rows, "TF32 is over the budget of float32, with one exception"
)

# %% [markdown]
# *Figure 4. With normal inputs every result of TF32 is some ten times over or more, gradients included. With large
# scores the budget of the gradients is wide, as it allows for the worst that float32's roundings could do there, and
# dk slips through. So tests need more than one family of inputs.*

# %%
table(
    {
        "normal inputs": name,
        "float32 within": rows[f"normal: {name}"]["float32"].within,
        "TF32 within": rows[f"normal: {name}"]["tf32"].within,
        "TF32 passes atol=1e-3": rows[f"normal: {name}"]["tf32"].error < 1e-3,
    }
    for name in ("o", "lse", "dq", "dk", "dv")
)

# %% [markdown]
# ## Large scores, and rows that see nothing
#
# $e^s$ leaves the range of a format at a small s: at the log of its largest number.

# %%
for form in FORMATS:
    print(f"{form.name:8} exp overflows above s = {np.log(form.largest):.2f}")

# %% [markdown]
# The scores of the family "large" reach some hundreds. The softmax subtracts the maximum first, so the largest
# exponential is $e^0 = 1$, and nothing overflows. What underflows to 0 is too small to count beside that 1.

# %%
s = torch.tensor([100.0, 99.0, 0.0])
print("without the maximum:", (torch.exp(s) / torch.exp(s).sum()).tolist())
p = torch.exp(s - s.max())
print("with it:            ", [round(x, 4) for x in (p / p.sum()).tolist()])

# %% [markdown]
# The maximum brings one danger. A mask sets a hidden score to −∞, as $e^{-\infty} = 0$. If a query sees no key
# at all, the maximum of its row is −∞ too, and −∞ − (−∞) has no value: it is **NaN**, not a number. One NaN
# spreads to all that is computed from it.

# %%
hidden = torch.full((3,), -torch.inf)
print("−inf − (−inf):          ", (hidden - hidden.max()).tolist())
print("softmax of a hidden row:", torch.softmax(hidden, 0).tolist())
lowest = torch.finfo(torch.float32).min
print("exp(−inf − lowest):     ", torch.exp(hidden - lowest).tolist())

# %% [markdown]
# So the stages start m from the lowest finite float32. Then p = exp(−∞ − m) = 0, l stays 0, and such a row
# gives o = 0 and lse = −∞. That is the log of an empty sum, and it makes the row the neutral element of a merge
# (chapter 03). With three queries, one key and a causal mask, only the last query sees the key. PyTorch's own
# attention, `scaled_dot_product_attention` or **SDPA**, also gives 0 for such a row. It has several
# implementations, and `sdpa_kernel` picks the plain one:

# %%
ones = torch.ones(1, 1, 3, 1)
one_key, value = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 7.0)
o, lse = online.attention_with_lse(ones, one_key, value, causal=True)
print("online: o =", o.flatten().tolist(), " lse =", lse.flatten().tolist())

seen = torch.tensor([[False], [False], [True]])
with sdpa_kernel(SDPBackend.MATH):
    o = scaled_dot_product_attention(ones, one_key, value, attn_mask=seen)
print("SDPA:   o =", o.flatten().tolist())

# %% [markdown]
# ## Base 2
#
# flash2 computes no $e^x$. A GPU's exponential unit gives $2^x$, and $e^s = 2^{s \log_2 e}$. The scores are
# multiplied by `scale` anyway, so the factor $\log_2 e = 1.4427$ joins it and costs nothing. It is the same
# number, up to the rounding of one product: a relative error of ε in an exponent of size |s| moves the result by
# |s| ε.

# %%
s = torch.linspace(-80, 80, 100_001)
base_e = torch.exp(s)
base_2 = torch.exp2(s * np.log2(np.e))
off = (base_2 - base_e).abs() / base_e
eps = torch.finfo(torch.float32).eps
print("the same bits everywhere:    ", torch.equal(base_2, base_e))
print("within (2 + |s|) ε everywhere:", bool((off <= (2 + s.abs()) * eps).all()))

# %% [markdown]
# As m is subtracted first, |s − m| is large only where p is tiny. So base 2 is one more reason for other last
# bits, and no reason for concern.
#
# ## Predict first: where sums are kept
#
# A kernel reads float16 and could keep its sums in float16 too. Add the number 1 five thousand times, in
# float16. What is the sum?

# %%
my_prediction = 5000

# %%
ones = np.ones(5000, dtype="float16")
print(f"you said {my_prediction}; float16 says {ones.cumsum(dtype='float16')[-1]:.0f}")

# %% [markdown]
# At 2048 the steps of float16 are 2 wide, and 2048 + 1 rounds back to 2048. From there on the sum stands still.
# Bfloat16 stops earlier. In general a sum of ones stops at 2 / ε, the last integer up to which the format has
# them all:

# %%
sums = {}
for name in ("float32", "float16", "bfloat16"):
    one, total = torch.ones((), dtype=getattr(torch, name)), 0 * torch.ones(())
    total = total.to(one.dtype)
    sums[name] = [(total := total + one).item() for _ in range(5000)]
fig = plots.running_sums(sums, "A sum of ones stops where a step is 2 wide")

# %%
for form in FORMATS:
    print(f"{form.name:8} counts to {form.all_integers_to:,}")

# %% [markdown]
# *Figure 5. A sum of 5000 ones, added one after the other. Float16 is wrong by more than half, bfloat16 by 95%.*
#
# So tensor cores multiply float16 and add in float32, and m, l and acc are float32 in every stage: only what goes
# to HBM is rounded. Here is the mistake: the source of `online.forward`, with acc rounded to the inputs' dtype
# after each tile. Such a changed copy is called a **mutant**.

# %%
line = "acc_i = alpha * acc_i + matmul(p_ij, v_j)"
text = inspect.getsource(online.forward)
assert text.count(line) == 1
mutant = dict(vars(online))
exec(text.replace(line, f"{line}; acc_i = acc_i.to(q.dtype).float()"), mutant)

# %%
short = Problem(Nq=2, Nk=1024, D=16, dtype="bfloat16", block_k=64)
long = short.replace(Nk=2**15)
normal = draw(short, framework="torch")[:3]
q, k, v = draw(long, framework="torch")[:3]
equal = q, torch.zeros_like(k), torch.ones_like(v)
for p, inputs in ((short, normal), (long, equal)):
    o, _ = mutant["forward"](*inputs, p, 0.25, Machine(trace=False))
    print("within the budget:", errors(Reference(o, None), *inputs)["o"].within)
print("o =", o[0, 0, 0, 0].item(), "and should be 1")

# %% [markdown]
# With normal inputs and 1024 keys, a usual size for a test, the mutant passes: the terms of v cancel, so acc stays
# small. Then 32,768 equal keys with v = 1: each tile of 64 adds 64 to acc. From 16,384 on, the steps of bfloat16
# are 128 wide, and 64 is lost. acc stands still, while l in float32 counts on, and o is one half. The suite's
# contract has a case of equal terms for this reason (`long_sums_keep_their_precision`).
#
# ## The same bits, each time?
#
# What differed above was which operations were done, and in which order. A program that fixes both gives the same
# bits each time: it is **deterministic**.

# %%
inputs = draw(problem, framework="torch")[:3]
first, second = (online.attention(*inputs, block_k=64) for _ in range(2))
print("online, twice:", torch.equal(first, second))

# %% [markdown]
# On a GPU hundreds of programs run side by side, and which is first changes from run to run. That does no harm
# while each result has one program that sums it. It does if many programs add to one number in HBM, with
# **atomic** additions (the hardware lets one addition at a time through). Then their order is that of arrival.
# The backward's dq is such a sum: each key tile has a share of it. Take 32 shares of one dq, in 1000 orders:

# %%
rng = np.random.default_rng(0)
shares = rng.standard_normal(32).astype(np.float32)
nearest = np.float32(shares.astype(float).sum())
shuffled = np.stack([rng.permutation(shares) for _ in range(1000)])
totals = shuffled.cumsum(axis=1)[:, -1]  # float32, from the left
print("more than one result:", len(set(totals.tolist())) > 1)
largest_partial_sum = np.abs(shuffled.cumsum(axis=1)).max()
allowed = 32 * np.finfo(np.float32).eps * largest_partial_sum
print("all within 32 roundings:", bool(np.all(np.abs(totals - nearest) <= allowed)))

# %%
steps = np.rint((totals - nearest) / np.spacing(np.abs(nearest))).astype(int)
fig = plots.orders(steps, "The same 32 numbers, added in 1000 orders")

# %% [markdown]
# *Figure 6. All of these are right sums. A kernel with atomics draws one of them at each run.*
#
# flash2 has no atomics: one kernel owns dk and dv, another owns dq, each with a fixed order. P is computed twice
# for it. In return a training run can be repeated bit for bit, on the same card with the same code and tiles.
# Another tile size, card or library version may give other last bits, and all of them may be right.
#
# ## Is it right?
#
# The stage `online` in every precision and on every family, within one and the same budget rule, gradients
# included:

# %%
sizes = Problem(Nq=67, Nk=131, D=40, H=4, H_kv=2)
families = ("normal", "peaked", "large", "rising")
for dtype in ("float64", "float32", "float16", "bfloat16"):
    p = sizes.replace(dtype=dtype)
    cases = [run(draw(p, f, framework="torch"), Machine(trace=False)) for f in families]
    print(f"{dtype:8}", all(error.within for case in cases for error in case.values()))

# %% [markdown]
# ## Takeaway
#
# **Two right answers differ in the last bits, because they add in different orders. Compare each with float64,
# and allow it twice the error of the plain formula in the same precision.** A fixed tolerance passes a kernel
# that ignores q and k, and rejects a right one. What comes next uses this freedom: one query's keys are split
# over many programs, and the parts are merged in whatever order is fastest.
#
# ## Exercises
#
# **1.** Somebody's float32 kernel forgot `input_precision="ieee"`. Its test draws normal inputs and allows
# `atol=1e-3`. Which family of inputs exposes the mistake to that test? And which exposes dk to the budget?
# Decide first, then run `run(draw(…, family, …), TF32Machine(trace=False))` for each.
#
# <details><summary>Answer</summary>
#
# With `atol=1e-3`, normal inputs expose nothing: the table above says that every result passes. "Peaked",
# "large" and "rising" do. TF32 moves a score s by about |s| · 2⁻¹¹, and the weight by the same *relative* amount,
# so large scores make a large absolute error: o is off by some 1e-2 when peaked and by some 1e-1 when large. But a
# right float16 kernel fails there as well: its o when peaked, and its gradients in all three.
#
# To the budget, "normal" exposes dk best: some ten times over. The budget grows with the scores, as
# float32's own error does, and for "large" and "rising" it lets this dk pass. No one family is enough: a suite needs several,
# and a rule that scales.
#
# ```python
# p = Problem(H=2, Nq=256, D=64, dtype="float32")
# for family in families:
#     found = run(draw(p, family, framework="torch"), TF32Machine(trace=False))
#     for name, e in found.items():
#         print(f"{family:7} {name:3} atol {e.error < 1e-3!s:5} budget {e.within}")
# ```
# </details>
#
# **2.** Another kernel keeps l in the inputs' precision, and acc in float32. All scores are equal, so a tile of
# 128 keys adds 128 to l. At which N does l go wrong in bfloat16? In float16? What is o for v = 1 then?
#
# <details><summary>Answer</summary>
#
# In bfloat16 the steps are 256 wide from 32,768 on, so 32,768 + 128 is a tie and goes back to 32,768. l stands
# still and acc grows: o = 2 at N = 65,536. In float16 the steps are 32 at most, so all sums of 128s are exact,
# until 65,536 is beyond the largest number and becomes infinite: then o = acc / ∞ = 0.
#
# ```python
# for dtype in (torch.bfloat16, torch.float16):
#     l = torch.zeros((), dtype=dtype)
#     for n in range(128, 2**16 + 128, 128):
#         l += 128
#         if l.item() != n:
#             print(dtype, "wrong from N =", n, "where l =", l.item())
#             break
# ```
# </details>
#
# **3.** In the backward, p = exp(s − lse). What does a row that sees no key give there, and what does the stage do
# about it? Look at `online.backward`.
#
# <details><summary>Answer</summary>
#
# s and lse are both −∞, so p would be NaN, and would reach dk and dv of keys that other queries do see. The stage
# takes lse = +∞ for such a row: exp(−∞ − ∞) = 0, so the row adds nothing. Starting m from a finite number does
# not help here, as lse itself is −∞.
# </details>
