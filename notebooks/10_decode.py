# %% [markdown]
# # 10 · Decode
#
# **Claim.** A model that writes has one query and a long cache. The keys are split over many programs, and the parts
# merge by the online softmax once more. The keys may lie anywhere in memory.
#
# Before: [09 · Numerics](09_numerics.ipynb). Next: [11 · Transformers](11_transformers.ipynb).

# %%
from contextlib import suppress

import numpy as np
import torch

from flashedu import ladder, plots
from flashedu.bench import published
from flashedu.bench import record as records
from flashedu.memory import Machine, Problem, cost, gpu
from flashedu.memory.machine import UNCOUNTED
from flashedu.notebook import source, table
from flashedu.pages import OutOfPages, PageAllocator, idle_in_contiguous, idle_in_pages
from flashedu.pages import table as block_table_of
from flashedu.player import RecordedAllocator, play_pages
from flashedu.schedule import assign, finish_times
from flashedu.stages import decode, decode_tiles, online, paged, reference
from flashedu.testing import assert_right, draw
from flashedu.units import human_bytes, human_seconds

# %% [markdown]
# ## The problem that the last rungs left
#
# A model writes token by token. Each new token has one query for each head. Its keys and values are those of all
# tokens before it, kept from step to step: the **cache**. Reading the prompt is called *prefill*, and is what all
# chapters so far timed. Writing is called **decoding**.
#
# Our example has 16 query heads. Eight of them share one key and value head (**grouped-query attention**, GQA), so
# there are 2 key heads, of D = 128. How many programs does `flash2` launch for one new token?

# %%
real = Problem(H=16, H_kv=2, Nq=1, Nk=1024, D=128, block_q=16, block_k=64)
unsplit = ladder.count("flash2", real)
h100 = gpu("h100")
programs = unsplit.programs["flash2"]
print(f"flash2 runs {programs} programs on the {h100.sm_count} SMs of an H100")
print(f"SMs without a program: {1 - programs / h100.sm_count:.0%}")

# %% [markdown]
# One query is one query tile, however many keys there are. So the length of the sequence, which gave `flash2` its
# programs in chapter 06, gives none here.
#
# And the arithmetic? Each key is used for the eight queries of its group, and not again:

# %%
k_and_v = 2 * real.H_kv * real.Nk * real.D * 2  # float16
products = 2 * 2 * real.H * real.Nk * real.D
print(f"FLOPs for each byte of k and v: {products / k_and_v:.0f}")
print(f"that an H100 can compute meanwhile: {h100.ridge('float16'):.0f}")

# %% [markdown]
# Nothing is left to save in arithmetic. A step of decoding lasts as long as k and v take to cross memory, at best.
# The rest of this chapter is about reaching that.
#
# ## First idea: the heads of a group are rows of a tile
#
# `flash2` gives each query head its own program, so eight programs load the same k and v. But a tile has room for 16
# rows or more, and one query fills one of them. `decode` packs the eight queries of a group into one tile. They are
# different heads, but for the products with k and v they are rows like any others.

# %%
source(decode.packed)

# %% [markdown]
# Predict first: k and v take 1 MiB here. How many MiB does `flash2` load in all, and how many does `decode`?

# %%
my_prediction_flash2_mib, my_prediction_decode_mib = 1, 1

# %%
packed = ladder.count("decode", real)
for name, machine, said in (
    ("flash2", unsplit, my_prediction_flash2_mib),
    ("decode", packed, my_prediction_decode_mib),
):
    n_bytes = sum(machine.bytes_by_tensor()[x][0] for x in "kv")
    print(
        f"{name}: you said {said} MiB of k and v; counted {n_bytes / 2**20:.0f} MiB, "
        f"by {machine.programs[name]} programs"
    )

# %% [markdown]
# An eighth. (On a card, L2 would serve some of the seven other loads, as in chapter 08.) But now 2 programs have the
# work of 16, and 130 SMs are idle.
#
# ## Second idea: split the keys
#
# Nothing is left to cut but the keys. Give each program a part of them, a **split**. It finds m, l and acc over its
# own keys, and writes what every stage returns: the o and the lse of these keys.

# %%
source(decode.decode_kernel.fn)

# %% [markdown]
# The loop is that of `flash2`. New are `start` and `stop`, which keep it within one split, and that `rows` belong to
# queries of several heads. (FIRST and STOP are for padded batches, which come in chapter 11; here they are None. EARLY
# lets a GPU of Hopper's generation begin the next kernel before this one is done.)
#
# A split that holds no key a row may see gives o = 0 and lse = −∞.
#
# ## The merge is the online softmax
#
# Chapter 03 merged parts of a row, each with m, l and acc. A part is now given as o = acc / l and lse = m + log l.
# What does it weigh among the others? Its weights, before they were divided, add up to
# $l\, e^{m} = e^{\text{lse}}$. So
#
# $$o = \frac{\sum_j e^{\text{lse}_j}\, o_j}{\sum_j e^{\text{lse}_j}} = \text{softmax}(\text{lse}) \cdot o_j$$
#
# This is attention with one query, in which the splits take the place of keys: lse are the scores, and o the
# values. Then the second kernel needs nothing new:

# %%
source(decode.merge_kernel.fn)

# %% [markdown]
# ### By hand: six keys in three splits
#
# The row of chapter 03 again: scores 1, 3, 2, 5, 4, 0 and values 1 to 6. Three splits of two keys each:

# %%
scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 0.0])
values = torch.arange(1.0, 7.0)
parts = scores.split(2), values.split(2)
lse_split = torch.stack([s.logsumexp(0) for s in parts[0]])
o_split = torch.stack([torch.softmax(s, 0) @ v for s, v in zip(*parts, strict=True)])
table(
    {"split": j, "keys": f"{2 * j}, {2 * j + 1}", "lse": f"{lse:.4f}", "o": f"{o:.4f}"}
    for j, (lse, o) in enumerate(zip(lse_split, o_split, strict=True))
)

# %% [markdown]
# If the merge is attention, then the stage of chapter 03 can do it. We give it lse as k and o as v, with D = 1, q = 1
# and scale 1, and watch m, l and acc after each split:

# %%
one = torch.ones(1, 1, 1, 1)
machine = Machine(watch=["m_i", "l_i", "acc_i"])
k, v = (x.reshape(1, 1, 3, 1) for x in (lse_split, o_split))
o, lse = online.attention_with_lse(
    one, k, v, scale=1.0, block_q=1, block_k=1, machine=machine
)
states = (machine.watched[name][1:] for name in ("m_i", "l_i", "acc_i"))
table(
    {
        "after split": j,
        "m": f"{m.item():.4f}",
        "l": f"{l.item():.4f}",
        "acc": f"{acc.item():.4f}",
    }
    for j, (m, l, acc) in enumerate(zip(*states, strict=True))
)

# %% [markdown]
# In the second line m rises from 3.1269 to 5.0486, so α = e⁻¹·⁹²¹⁷ = 0.1464. l = α + 1, and
# acc = α · 1.8808 + 3.9526. In the third line nothing rises. Now the kernel itself, on the same three splits, and the
# softmax over all six keys at once:

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
one = one.to(device)
o_in, lse_in = decode.scratch(one, 3, UNCOUNTED)
o_in[0, :, 0, 0], lse_in[0, :, 0] = o_split, lse_split
o_out, lse_out = decode.empty_like(one), torch.empty(1, 1, 1, device=device)
hand = Problem(Nq=1, Nk=6, D=1, dtype="float32")
decode.merge(o_in, lse_in, o_out, lse_out, 3, hand, UNCOUNTED)
print(f"merged by online: o = {o.item():.5f}, lse = {lse.item():.5f}")
print(f"merge_kernel:     o = {o_out.item():.5f}, lse = {lse_out.item():.5f}")
print(
    f"all six at once:  o = {torch.softmax(scores, 0) @ values:.5f}, "
    f"lse = {scores.logsumexp(0):.5f}"
)

# %% [markdown]
# ## Predict first: programs and bytes
#
# The 1024 keys of our example, cut into 4 splits of 256. How many programs do the two kernels launch, and by how many
# percent do the bytes grow? (Each split writes o in float32 for its 8 rows, and the merge reads them.)

# %%
my_prediction_programs, my_prediction_percent = 32, 50

# %%
in_splits = real.replace(splits=4)
split = ladder.count("decode", in_splits)
more = split.counted.hbm_bytes / packed.counted.hbm_bytes - 1
print(f"you said {my_prediction_programs} programs; counted {split.programs}")
print(f"you said {my_prediction_percent}% more bytes; counted {more:.1%}")

# %% [markdown]
# Two parts of four splits are 8 programs, and the merge has one for each part here. Does the count equal the closed
# form? For one part of $R$ packed rows, $S$ splits, and $w$ bytes a number:
#
# $$\text{traffic} = \underbrace{(S R D + 2 N_k D)\, w}_{q,\; k \text{ and } v} +
# \underbrace{2\, S R\, (D + 1) \cdot 4}_{\text{o and lse of the splits, written and read}} +
# \underbrace{R\, (D w + 4)}_{\text{o and lse}}$$

# %%
R, S, N, D, w = 8, 4, 1024, 128, 2
by_hand = 2 * ((S * R * D + 2 * N * D) * w + 2 * S * R * (D + 1) * 4 + R * (D * w + 4))
print("counted    ", f"{split.counted.hbm_bytes:,} bytes")
print("closed form", f"{cost.decode_forward(in_splits).hbm_bytes:,} bytes")
print("by hand    ", f"{by_hand:,} bytes")
assert split.counted == cost.decode_forward(in_splits)

# %%
fig = plots.traffic(
    {
        "flash2": unsplit.bytes_by_tensor(),
        "decode": split.bytes_by_tensor(),
    },
    "k and v cross once; o of the splits is a small price (1024 keys, 4 splits)",
)

# %% [markdown]
# *Figure 1. `flash2` loads k and v for each of the eight heads of a group. `decode` loads them once. With more keys in a
# split, o of the splits is a smaller part still.*
#
# ## How many splits?
#
# Enough to fill the card. How many programs an SM holds at a time depends on their tiles; all SMs together make up the
# **places** of the card. A model as in chapter 06: each place takes one program after the other, and a tile of keys takes
# one unit of time. 131,072 keys, with the tiles of this card, and a batch of 1 (2 parts) or 8 (16 parts):

# %%
places = decode_tiles.PROGRAMS_PER_SM * h100.sm_count
block_k = decode_tiles.tile_for(h100.compute_capability, 128, 2, rows=8).block_k
tiles = 131072 // block_k
print(f"{places} places, {tiles:,} tiles of {block_k} keys for each key head")


def modelled(splits, parts):
    each = -(-tiles // splits)
    work = [min(each, tiles - at) for at in range(0, tiles, each)] * parts
    done = max(finish_times(assign(work, places), places))
    return splits, sum(work) / (places * done), done


# %%
cases = {
    f"batch {B}": [modelled(n, 2 * B) for n in range(1, 2 * places // (2 * B) + 1)]
    for B in (1, 8)
}
chosen = {
    f"batch {B}": decode_tiles.splits_for(places, 2 * B, 131072, block_k)
    for B in (1, 8)
}
fig = plots.splits(
    cases, chosen, "tiles, one after the other", "Splits fill the card, in whole waves"
)

# %% [markdown]
# *Figure 2. Without splits nearly all places are idle. The share at work grows with the splits until all places are taken.
# One split more, and a second wave begins that is nearly empty: the card is half idle, and the time doubles. The dashed
# line is what `decode` takes.*

# %%
source(decode_tiles.splits_for)

# %% [markdown]
# A split has a smallest size, as each one costs an o. What is that price at the chosen number?

# %%
for B, splits in zip((1, 8), chosen.values(), strict=True):
    long = real.replace(B=B, Nk=131072, block_k=block_k)
    whole, cut = (cost.decode_forward(long.replace(splits=n)) for n in (1, splits))
    more = cut.hbm_bytes / whole.hbm_bytes - 1
    print(f"batch {B}: {splits} splits move {more:.1%} more bytes than one")

# %% [markdown]
# ## The least time
#
# Now predict a time. Batch 8, 131,072 keys: k and v take 8 · 2 · 2 · 131,072 · 128 numbers of 2 bytes. By its data sheet
# an H100 reads 3.35 TB a second from HBM. How many µs does a step take at least, and how many will `decode` take?

# %%
my_prediction_least_us, my_prediction_decode_us = 100, 200

# %%
measured = records.latest("decode", card="H100")


def run_of(case, peer):
    return next(run for run in case["runs"] if run["peer"] == peer)


def time_of(case, peer):
    seconds = run_of(case, peer)["median_s"]
    return human_seconds(seconds) if seconds else "-"


# %%
(largest,) = measured.cases("decode", B=8, N=131072)
least = largest["bytes"] / h100.hbm_bytes_per_s
print(measured.label)
print(f"you said at least {my_prediction_least_us} µs; it is {human_seconds(least)}")
print(
    f"you said {my_prediction_decode_us} µs; decode took {time_of(largest, 'decode')}"
)

# %% [markdown]
# No program reaches the data sheet. A fairer yardstick is a copy of as many bytes, by PyTorch: k is read, and a copy of
# it is written. It was timed in the same run, in turns with the others:

# %%
fig = plots.decode_times(measured, "A step of decoding, beside a copy of as many bytes")

# %% [markdown]
# *Figure 3. The time of a step, lower is better. From some length on it grows as the bytes do. `flash2` has 16 programs for
# each sequence of the batch, and loads k and v eight times. Nothing that reads each of them once can be much faster than the
# copy.*

# %%
peers = {
    "decode": "decode",
    "sdpa-flash": "SDPA flash",
    "sdpa-cudnn": "SDPA cuDNN",
    "copy": "copy",
}
table(
    {
        "batch": case["B"],
        "keys": case["N"],
        "bytes": human_bytes(case["bytes"]),
        "least": human_seconds(case["bytes"] / h100.hbm_bytes_per_s),
    }
    | {name: time_of(case, peer) for peer, name in peers.items()}
    for case in measured.cases("decode")
)

# %%
ratios = [
    run_of(case, "decode")["times_as_fast_as"] for case in measured.cases("decode")
]
ahead = sum(
    all(ratio >= 1 for peer, (ratio, *_) in found.items() if "sdpa" in peer)
    for found in ratios
)
print(f"as fast as the best of SDPA's, or faster: {ahead} of {len(ratios)} sizes")
longest = run_of(largest, "decode")["times_as_fast_as"]["copy"][0]
print(f"at batch 8 and 131,072 keys: {longest:.0%} of the copy's speed")

# %% [markdown]
# With a short cache, the start of two kernels takes a large part of the time. With a long one, memory does.
#
# What did Flash-Decoding, which this stage follows, gain when it was published? FlashAttention-2 had no splits then. A ratio
# of the two, and ours of `flash2` and `decode`, in the same shape:

# %%
table(
    {
        "claim": claim.what,
        "published": f"{claim.published[0]:.1f}",
        "ours": f"{claim.ours[0]:.1f}",
        "reproduced": claim.reproduced,
    }
    for claim in published.decoding("H100")
)

# %% [markdown]
# Theirs is CUDA in float16 on an A100, with 108 SMs; ours is Triton in float16 on an H100, with 132. The more SMs a card
# has and the smaller the batch, the more of them stood idle without splits. With a batch of 256 `flash2` has programs enough; what is left to gain
# there is to load k and v once.
#
# ## Is it right?
#
# Any number of splits, in four families of inputs, against float64. 500 keys, so that the last of 8 tiles is not full, and
# with 20 splits most have no key at all:

# %%
check = Problem(H=6, H_kv=2, Nq=1, Nk=500, D=40, dtype="float32")
for family in ("normal", "peaked", "large", "rising"):
    q, k, v = (x.to(device) for x in draw(check, family, framework="torch")[:3])
    for splits in (1, 3, 20):
        got = decode.attention_with_lse(q, k, v, block_k=64, splits=splits)
        assert_right(reference.Reference(*got), q, k, v)
    print(f"{family}: o and lse within the budget with 1, 3 and 20 splits")

# %% [markdown]
# Chapter 09 said why the bits may differ: the splits add in another order. Each of these is a right answer.
#
# ## Where the cache lies: the problem
#
# So far a sequence's keys lay in a row. Then somebody has to reserve that row, before the sequence is written, and nobody
# knows how long it will be. So room is reserved for the longest that it may become. Sixty-four sequences, of 1 to
# 4096 keys. What share of the memory holds no key? And if memory is given in **pages** of 16 keys, as needed?

# %%
my_prediction_idle_rows, my_prediction_idle_pages = "20%", "10%"

# %%
lengths = np.random.default_rng(0).integers(1, 4097, 64).tolist()
contiguous, pages_16 = idle_in_contiguous(lengths, 4096), idle_in_pages(lengths, 16)
print(f"you said {my_prediction_idle_rows} in rows; it is {contiguous:.1%}")
print(f"you said {my_prediction_idle_pages} in pages; it is {pages_16:.1%}")

# %% [markdown]
# Half a page is idle for each sequence, on average: 8 keys of some 2000.

# %%
rooms = {"room for 4096 each": (sum(lengths), contiguous)} | {
    f"pages of {size}": (sum(lengths), idle_in_pages(lengths, size))
    for size in (256, 128, 64, 32, 16)
}
fig = plots.idle_memory(rooms, "Pages leave a half of one idle, for each sequence")

# %% [markdown]
# *Figure 4. The memory that the same 64 sequences take. Small pages waste less. Large ones need fewer page numbers, and
# a tile of keys never crosses a page: below a tile's size, smaller pages mean smaller tiles.*
#
# What is saved holds more sequences. In decoding that is speed for the whole model: its weights cross memory once a step,
# however many sequences use them.
#
# ## Pages
#
# The idea is that of an operating system. Memory is cut into pages of one size. A sequence has a list of pages, its row of
# the **block table**: the first holds keys 0 to 15, the second the next 16, wherever they are. The allocator hands out
# pages, and takes them back. It moves no keys.

# %%
source(PageAllocator.take)

# %% [markdown]
# A new page is taken only when the last one is full. Sequences that begin alike, such as answers to one prompt,
# share the pages of their beginning:

# %%
source(PageAllocator.share)

# %% [markdown]
# A page counts its users. It is free again when the last of them is freed. And who writes to a page that others have too
# takes a copy first (**copy on write**): that is `copies` in `take`.
#
# Predict first. A prompt of 1000 keys, and 8 answers to it, of 100 keys each. In pages of 16, how many pages do they take
# together, the prompt included? Without sharing it would be 9 rows, 63 + 8 · 69 pages.

# %%
my_prediction_pages = 63 + 8 * 69

# %%
allocator = PageAllocator(n_pages=1000, page_size=16)
prompt = allocator.new()
allocator.take(prompt, 1000)
answers = [allocator.share(prompt) for _ in range(8)]
copies = [copy for answer in answers for copy in allocator.take(answer, 100)]
print(f"you said {my_prediction_pages}; they take {allocator.used_pages} pages")
print(f"copied: {len(copies)} times, page {copies[0][0]}")

# %% [markdown]
# 1000 keys are 62 full pages and 8 keys on the 63rd. Each answer copies that one, fills it with its first 8 keys, and takes
# 6 more for the other 92: 63 + 8 · 7 = 119.
#
# ## The allocator at work
#
# A small memory, 16 pages of 4 keys. This allocator records what it does. Two sequences share a beginning; others come, one
# asks for more than there is, some are done and give their pages back.

# %%
cache = RecordedAllocator(n_pages=16, page_size=4)
a = cache.new()
cache.take(a, 6)
b = cache.share(a)
for sequence in (b, a, b, a, a):
    cache.take(sequence, 1)
c, d = cache.new(), cache.new()
cache.take(c, 17)
cache.take(d, 9)
cache.free(c)
e = cache.new()
cache.take(e, 21)
with suppress(OutOfPages):
    cache.take(d, 20)
cache.free(a)
cache.take(d, 11)
cache.free(b)
cache.free(e)
play_pages(cache, longest=32)

# %% [markdown]
# *Figure 5. Pages filling and being freed. Watch page 1 when B writes its first key, and page 0 when A is freed. E gets the pages
# that C gave back, and one more. Without pages, this memory has room for two sequences of up to 32 keys, and no more.*
#
# ## Attention from pages
#
# What changes in the kernel? Before a tile is loaded, its page is looked up:

# %%
source(paged.paged_kernel.fn)

# %% [markdown]
# `K.load([page, h, j % PAGE, 0])` stands where `K.load([b, h, j, 0])` stood. As sequences have different lengths, each program
# reads its own, and the queries are the last tokens of their sequences. The end of a last page holds anything, so
# the last tile is masked, and its v as well: 0 · NaN would be NaN.
#
# ### By hand: a gather
#
# Two sequences of 40 and 23 keys, in pages of 16 that they took in turns. What no key was written to is NaN here, to be sure
# that nobody reads it.

# %%
small = Problem(B=2, H=4, H_kv=2, Nq=1, Nk=40, D=32, dtype="float32")
q, k, v, _ = draw(small, framework="torch")
allocator = PageAllocator(n_pages=8, page_size=16)
first, second = allocator.new(), allocator.new()
for n_first, n_second in ((16, 10), (20, 13), (4, 0)):
    allocator.take(first, n_first)
    allocator.take(second, n_second)
rows, lengths = block_table_of([first, second])
print("block table:", rows, " lengths:", lengths)

# %%
k_pages, v_pages = (torch.full((8, 2, 16, 32), torch.nan) for _ in "kv")
for b, sequence in enumerate((first, second)):
    for j in range(sequence.length):
        place = sequence.pages[j // 16], slice(None), j % 16
        k_pages[place], v_pages[place] = k[b, :, j], v[b, :, j]

gathered = k_pages[torch.tensor(rows[0])].transpose(0, 1).flatten(1, 2)[:, :40]
print("k of the first, gathered by its row:", torch.equal(gathered, k[0]))

# %% [markdown]
# The kernel does this gather tile by tile, and writes it nowhere. Is the result that of `decode`? With tiles of 16 keys and
# the same splits, both do the same arithmetic in the same order. So not only within the budget: to the bit.

# %%
tables = torch.tensor(rows, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
from_pages = paged.attention(
    *(x.to(device) for x in (q, k_pages, v_pages, *tables)), splits=2
)
for b, n in enumerate(lengths):
    inputs = [x[b : b + 1, :, :n].to(device) for x in (q, k, v)]
    in_a_row = decode.attention(*inputs, causal=True, block_q=16, block_k=16, splits=2)
    same = torch.equal(from_pages[b : b + 1], in_a_row)
    assert_right(reference.Reference(from_pages[b : b + 1], None), *inputs)
    print(f"sequence {b}, {n} keys: equal to the bit: {same}; within the budget")

# %% [markdown]
# What does it cost in bytes? A page number for each tile of each key head:

# %%
key_tiles = small.H_kv * sum(-(-n // 16) for n in lengths)
print(f"page numbers: {human_bytes(4 * key_tiles)}")
print(f"k and v:      {human_bytes(2 * key_tiles * 16 * small.D * small.item_bytes)}")

# %% [markdown]
# And in time? Recorded with pages that lie in any order: the time over that of `decode`, whose keys lie in a row.

# %%
in_pages = records.latest("paged", card="H100")
table(
    {"batch": case["B"], "keys": case["N"]}
    | {
        f"pages of {size}": f"{1 / ratio:.2f}"
        for size in (16, 64, 256)
        for ratio, *_ in [run_of(case, f"paged-{size}")["times_as_fast_as"]["decode"]]
    }
    for case in in_pages.cases("paged")
)

# %% [markdown]
# A page number has to arrive before its tile can be asked for, and small pages mean many small tiles.
#
# ## Takeaway
#
# **With one query, the keys are the only axis left to be parallel over. Split them, merge by the online softmax, and a step
# is bound by what k and v take to cross memory. The keys may lie in pages, and no memory is kept for tokens that may never
# come.** What is left is to turn it on in a real model. Chapter 11 does.
#
# ## Exercises
#
# **1.** A model without GQA: 32 query heads, 32 key heads, D = 128, batch 1, 65,536 keys in tiles of 128, on a card with 132
# places. How many splits does `splits_for` take, and why not more? How much larger are its k and v than those of our
# example with as many keys?
#
# <details><summary>Answer</summary>
#
# 32 parts on 132 places: 4 splits make 128 programs, 97% of one wave. 8 would make 256, 97% of two waves; of equals it
# takes the fewest. k and v are 16 times as large, 1 GiB, and so is the least time. GQA was made for this.
#
# ```python
# decode_tiles.splits_for(132, 32, 65536, 128)
# ```
# </details>
#
# **2.** A draft model guesses the next 3 tokens, and the large model checks them in one step: Nq = 4 queries in place of
# 1. How many rows has a packed tile, and how many more bytes move? Try `cost.decode_forward` with `Nq=4`, `causal=True` and
# `block_q=32`.
#
# <details><summary>Answer</summary>
#
# 4 · 8 = 32 rows, and k and v are the same. At 131,072 keys, with 64 splits, some 3% more bytes, most of them o of the
# splits: four tokens in nearly the time of one, if the guesses are right.
#
# ```python
# p = Problem(H=16, H_kv=2, Nq=1, Nk=131072, D=128, block_q=16, splits=64)
# four = p.replace(Nq=4, causal=True, block_q=32)
# cost.decode_forward(four).hbm_bytes / cost.decode_forward(p).hbm_bytes
# ```
# </details>
#
# **3.** With pages of one key nothing is ever idle. Why does nobody take them?
#
# <details><summary>Answer</summary>
#
# A tile lies in one page, so it would have one key. A load would bring 256 bytes, after a load of its page number, and the
# matrix units want 16 keys at least: the stage refuses pages of less than 16. At 16 the idle share of 64 sequences is
# below 1% already.
# </details>
#
# **4.** The prompt above is freed, and then its 8 answers, one after the other. How many pages are in use after each?
# `allocator.used_pages` says whether you are right.
#
# <details><summary>Answer</summary>
#
# With the prompt only page 62 goes back: all answers have copied it, so nobody else has it, and 118 are left. Each answer
# gives back its own 7: 111, 104 and so on down to 69. The 62 full pages stay for the last answer, and go back with it: 0.
# </details>
