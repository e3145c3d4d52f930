"""The contract of every rung, claim by claim: each check raises AssertionError where it is broken.

A subject is a rung of the ladder or a mutant of one. The tolerance is flashedu.testing's error
budget, or none at all: 'same' means the same bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch

from flashedu.memory import Machine, Problem, cost, hbm
from flashedu.stages import ANY_TILES, Rung, contract, rung
from flashedu.stages.reference import Reference
from flashedu.stages.runs import Runs, packed
from flashedu.testing import assert_right, draw

Array = Any  # numpy.ndarray or torch.Tensor
Check = Callable[["Subject"], None]


@dataclass(frozen=True)
class Subject:
    """What is tested: a rung's description and its functions, on a device."""

    name: str
    framework: str
    dtypes: tuple[str, ...]
    tile_sizes: Sequence[int]
    lse: bool
    backward: bool
    attention: Callable[..., Array]
    attention_with_lse: Callable[..., tuple[Array, Array]] | None = None
    device: str = "cpu"
    splits: bool = False
    runs: bool = False

    @classmethod
    def of(cls, rung: Rung, module: ModuleType | None = None, device: str = "cpu") -> Subject:
        """The rung with its own functions, or with those of `module`."""
        module = module or rung.load()
        return cls(
            rung.name, rung.framework, rung.dtypes, rung.tile_sizes, rung.lse, rung.backward,
            module.attention, getattr(module, "attention_with_lse", None), device,
            rung.splits, rung.runs,
        )  # fmt: skip

    @property
    def any_tiles(self) -> bool:
        return self.tile_sizes == ANY_TILES

    @property
    def slow(self) -> bool:
        """Whether it is a Triton kernel: interpreted, or compiled for each size and dtype."""
        return rung(self.name).is_triton

    @property
    def rounds_scores(self) -> bool:
        """Whether S is stored in the precision of the inputs."""
        return not self.tile_sizes and not self.slow

    @property
    def hopper_only(self) -> bool:
        """Whether its tiles are its own, and larger than the sizes here: see `many_tiles`."""
        return rung(self.name).hopper_only

    @property
    def precise(self) -> str:
        """float32, or the stage's own."""
        return "float32" if "float32" in self.dtypes else self.dtypes[0]

    def run(self, p: Problem, q: Array, k: Array, v: Array, do: Array = None, **options: Any):
        """All that the rung can give: o; lse and the gradients, where it has them."""
        options = {"causal": p.causal, **self.tiles_of(p), **options}
        if not self.lse:
            return Reference(self.attention(q, k, v, **options), None)
        if not self.backward or do is None:
            return Reference(*self.attention_with_lse(q, k, v, **options))
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        o, lse = self.attention_with_lse(q, k, v, **options)
        return Reference(o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), do))

    def draw(self, p: Problem, family: str = "normal", seed: int = 0) -> tuple[Array, ...]:
        drawn = draw(p, family, framework=self.framework, seed=seed)
        return drawn if self.device == "cpu" else tuple(x.to(self.device) for x in drawn)

    def fitted(self, p: Problem) -> Problem:
        """`p` with the next larger tiles that the rung can take; keys in three parts, if in any."""
        if not self.tile_sizes:
            return p
        if self.splits:
            p = p.replace(splits=3)
        fit = {name: next(size for size in self.tile_sizes if size >= min(block, 64))
               for name, block in (("block_q", p.block_q), ("block_k", p.block_k))}  # fmt: skip
        return p if self.any_tiles else p.replace(**fit)

    def tiles_of(self, p: Problem) -> dict[str, int]:
        return rung(self.name).tiles_of(self.fitted(p))

    def assert_right(self, p: Problem, inputs: tuple[Array, ...], what: str, **options: Any):
        """Run, and hold the results named in `what` against float64."""
        got = only(what, self.run(p, *inputs, **options))
        with case(p, options):
            masks = {name: options.get(name) for name in ("scale", "runs")}
            assert_right(got, *inputs, causal=p.causal, **masks)


@functools.lru_cache(maxsize=64)
def results(subject: Subject, p: Problem, family: str = "normal") -> Reference:
    """All that the subject gives for the inputs that it draws: run once for all claims."""
    if not subject.backward:
        return forward_results(subject, p, family)
    return subject.run(p, *subject.draw(p, family))


@functools.lru_cache(maxsize=64)
def forward_results(subject: Subject, p: Problem, family: str = "normal") -> Reference:
    """The same without gradients."""
    return subject.run(p, *subject.draw(p, family)[:3])


def only(what: str, got: Reference) -> Reference:
    """The results that are named in `what`."""
    return Reference(**{name: x if name in what.split() else None
                        for name, x in got._asdict().items()})  # fmt: skip


@contextmanager
def case(*what: object) -> Iterator[None]:
    """Name the case in the error."""
    try:
        yield
    except AssertionError as error:
        error.add_note("in the case " + ", ".join(str(x) for x in what))
        raise


# the cases

FAMILIES = ("normal", "peaked", "large", "rising")

# B, heads, Nq, Nk and D differ wherever they can, and are prime: swapped axes cannot pass.
PRIMES = Problem(B=2, H=3, Nq=37, Nk=53, D=13, block_q=16, block_k=8)
GQA = Problem(B=2, H=6, H_kv=2, Nq=17, Nk=19, D=7, block_q=8, block_k=4)
BLIND = Problem(B=2, H=3, Nq=23, Nk=7, D=5, block_q=4, block_k=4, causal=True)  # 16 rows see none
SIZES = {
    "one": Problem(B=2, H=3, Nq=1, Nk=1, D=5),
    "below a tile": Problem(B=2, H=3, Nq=7, Nk=7, D=5, block_q=16, block_k=16),
    "a tile": Problem(B=2, H=3, Nq=16, Nk=16, D=5, block_q=16, block_k=16),
    "one over": Problem(B=2, H=3, Nq=17, Nk=17, D=5, block_q=16, block_k=16),
    "primes": PRIMES,
    "one query": Problem(B=2, H=3, Nq=1, Nk=67, D=5, block_q=16, block_k=16),
    "Nq < Nk": Problem(B=2, H=3, Nq=11, Nk=47, D=5, block_q=4, block_k=16),
    "Nq > Nk": BLIND,
    "tiles beyond N": Problem(B=2, H=3, Nq=37, Nk=41, D=5),
    "tiles of one": Problem(B=2, H=3, Nq=5, Nk=7, D=11, block_q=1, block_k=1),
    "odd tiles": Problem(B=2, H=3, Nq=47, Nk=47, D=5, block_q=5, block_k=11),
    "GQA": GQA,
    "MQA": Problem(B=2, H=5, H_kv=1, Nq=13, Nk=17, D=7, block_q=4, block_k=8),
}
EMPTY = {
    "B = 0": PRIMES.replace(B=0, Nq=5, Nk=7),
    "Nq = 0": PRIMES.replace(Nq=0, Nk=7),
    "Nk = 0": PRIMES.replace(Nq=5, Nk=0),
    "Nq = Nk = 0": PRIMES.replace(Nq=0, Nk=0),
}
HEAD_SIZES = (1, 3, 16, 40, 64, 127, 256)
TILES = ((2, 3), (1, 64), (64, 1), (8, 16), (16, 8), (37, 53), (36, 52), (38, 54), (1000, 1000))


T = TypeVar("T")
U = TypeVar("U")


def in_turns(subject: Subject, items: Iterable[T], options: Sequence[U]) -> Iterator[tuple[T, U]]:
    """Each item with each option; where a run is slow, the options take turns.

    With two options, each of the three sizes of `small` meets both: one masked, one not.
    """
    if subject.slow:
        return zip(items, itertools.cycle(options), strict=False)
    return itertools.product(items, options)


def in_every_dtype(subject: Subject, items: Iterable[T]) -> Iterator[tuple[T, str]]:
    """Each item in each dtype; where a run is slow, the dtypes take turns."""
    return in_turns(subject, items, subject.dtypes)


def cases(subject: Subject) -> Iterator[tuple[Problem, str]]:
    """Every size, with and without the mask, in every dtype; the families take turns.

    Standard attention rounds its scores to float16. Large ones are then off by e to the power of
    ¼, as in the plain formula, but in other rows: no budget says by how much.
    """
    masks, turns = (False, True), itertools.cycle(FAMILIES)
    sizes = [p.replace(B=1) if subject.slow else p for p in SIZES.values()]
    found = [
        (p.replace(causal=causal, dtype=dtype), next(turns))
        for (causal, p), dtype in in_every_dtype(subject, itertools.product(masks, sizes))
    ]
    found += [
        (PRIMES.replace(causal=causal, dtype=dtype), family)
        for (causal, family), dtype in in_every_dtype(subject, itertools.product(masks, FAMILIES))
    ]
    for p, family in found:
        if not (subject.rounds_scores and (p.dtype, family) == ("float16", "large")):
            yield p, family


def small(subject: Subject) -> Iterator[Problem]:
    """A few sizes, with and without the mask, for claims that do not turn on numbers."""
    dtype = subject.dtypes[0]
    for causal, p in itertools.product((False, True), (PRIMES, GQA, BLIND)):
        yield p.replace(causal=causal, dtype=dtype)


# small tools


def bits(x: Array) -> bytes:
    x = torch.as_tensor(x).detach().cpu().contiguous()
    return x.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: Reference, want: Reference) -> None:
    """The same shapes, dtypes and bits."""
    for name, x, y in zip(Reference._fields, got, want, strict=True):
        if x is None and y is None:
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{name} changed its dtype or shape"
        assert bits(x) == bits(y), f"{name} changed"


def at(results: Reference, **where: Any) -> Reference:
    """The part of each result that is named, and no others."""
    parts = {name: getattr(results, name)[index] for name, index in where.items()
             if getattr(results, name) is not None}  # fmt: skip
    return Reference(**{**dict.fromkeys(Reference._fields), **parts})


def copies(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x.copy() if isinstance(x, np.ndarray) else x.clone() for x in arrays)


def needs(what: str) -> Callable[[Check], Check]:
    """Mark a check that is for subjects with `what` only: any_tiles, lse or backward."""

    def mark(check: Check) -> Check:
        check.needs = what  # type: ignore[attr-defined]
        return check

    return mark


def claims(subject: Any) -> dict[str, Check]:
    """Claim → check, for all that apply to this subject or rung."""
    return {
        name.removeprefix("check_"): check
        for name, check in globals().items()
        if name.startswith("check_") and getattr(subject, getattr(check, "needs", "name"))
    }


# right numbers


def check_outputs_match_float64(subject: Subject) -> None:
    for p, family in cases(subject):
        got = only("o", forward_results(subject, p, family))
        with case(family, p):
            assert_right(got, *subject.draw(p, family)[:3], causal=p.causal)


@needs("lse")
def check_lse_matches_float64(subject: Subject) -> None:
    for p, family in cases(subject):
        got = only("lse", forward_results(subject, p, family))
        with case(family, p):
            assert_right(got, *subject.draw(p, family)[:3], causal=p.causal)


@needs("backward")
def check_gradients_match_float64(subject: Subject) -> None:
    for p, family in cases(subject):
        with case(family):
            subject.assert_right(p, subject.draw(p, family), "dq dk dv")


@needs("backward")
def check_gradients_of_lse_match_float64(subject: Subject) -> None:
    """d(Σ w lse)/ds = w p. Each sum has some 30 terms of size 10 at most: 300 roundings.

    In the most precise dtype: 300 of bfloat16's are 2.3, which none of these gradients exceeds.
    """
    dtype = min(subject.dtypes, key=lambda name: torch.finfo(getattr(torch, name)).eps)
    for p in small(subject):
        p = p.replace(dtype=dtype)
        q, k, v, do = subject.draw(p)
        w = do[..., 0].double()
        leaves = tuple(x.requires_grad_() for x in (q, k, v))
        _, lse = subject.attention_with_lse(*leaves, causal=p.causal, **subject.tiles_of(p))
        dq, dk, dv = torch.autograd.grad(lse, leaves, w.to(lse.dtype))
        want = reference_of_lse(p, q.detach().double(), k.detach().double(), w)
        with case(p):
            got, atol = (dq.double(), dk.double()), 300 * torch.finfo(q.dtype).eps
            torch.testing.assert_close(got, want, rtol=0, atol=atol)
            assert not dv.any(), "lse does not depend on v"


def reference_of_lse(p: Problem, q: Array, k: Array, w: Array) -> tuple[Array, Array]:
    """dq and dk of Σ w lse, a query at a time."""
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    for h, i in itertools.product(range(p.H), range(p.Nq)):
        seen = max(0, i + 1 + p.Nk - p.Nq) if p.causal else p.Nk
        keys = k[:, h // p.group, :seen]
        ds = torch.softmax(torch.einsum("bd,bkd->bk", q[:, h, i], keys) * p.D**-0.5, -1)
        ds = ds * w[:, h, i, None] * p.D**-0.5
        dq[:, h, i] = torch.einsum("bk,bkd->bd", ds, keys)
        dk[:, h // p.group, :seen] += torch.einsum("bk,bd->bkd", ds, q[:, h, i])
    return dq, dk


def check_every_head_size_is_right(subject: Subject) -> None:
    head_sizes = [D for D in HEAD_SIZES if rung(subject.name).largest_D >= D]
    sizes = itertools.product(head_sizes, (False, True))
    for (D, causal), dtype in in_every_dtype(subject, sizes):
        p = Problem(B=2, H=3, Nq=17, Nk=19, D=D, dtype=dtype, causal=causal, block_q=8, block_k=4)
        p = p.replace(B=1) if subject.slow else p
        subject.assert_right(p, subject.draw(p), "o lse dq dk dv")


def check_any_scale_is_right(subject: Subject) -> None:
    scales, sizes = (0.3, 1, 0, -0.5, np.float32(0.7), -1e-40), tuple(small(subject))
    turns = zip(scales, sizes, strict=False) if subject.slow else itertools.product(scales, sizes)
    for scale, p in turns:
        subject.assert_right(p, subject.draw(p), "o lse dq dk dv", scale=scale)


def check_scale_defaults_to_one_over_root_d(subject: Subject) -> None:
    for p in small(subject):
        got = subject.run(p, *subject.draw(p), scale=1 / p.D**0.5)
        assert_same(got, results(subject, p))


@needs("any_tiles")
def check_tile_size_does_not_change_the_result(subject: Subject) -> None:
    for (block_q, block_k), causal in itertools.product(TILES, (False, True)):
        p = PRIMES.replace(block_q=block_q, block_k=block_k, causal=causal, dtype="float32")
        subject.assert_right(p, subject.draw(p, "rising"), "o lse dq dk dv")


def check_order_of_keys_does_not_matter(subject: Subject) -> None:
    for p in small(subject):
        if p.causal:
            continue
        q, k, v, do = subject.draw(p, "peaked")
        order = np.random.default_rng(1).permutation(p.Nk)
        back = np.argsort(order)
        got = subject.run(p, q, k[:, :, order], v[:, :, order], do)
        if got.dk is not None:
            got = got._replace(dk=got.dk[:, :, back], dv=got.dv[:, :, back])
        with case(p):
            assert_right(got, q, k, v, do)


def check_large_logits_stay_finite(subject: Subject) -> None:
    """Logits of some thousands: e to the power of one is past float64."""
    for p, dtype in in_every_dtype(subject, small(subject)):
        p = p.replace(dtype=dtype)
        q, k, v, do = subject.draw(p)
        inputs = 40 * q, 40 * k, v, do
        for name, x in subject.run(p, *inputs)._asdict().items():
            with case(p, name):
                allowed = torch.tensor(-torch.inf if name == "lse" and p.causal else 0.0)
                x = torch.zeros(()) if x is None else torch.as_tensor(x)
                assert (x.isfinite() | (x == allowed)).all(), f"{name} is not finite"


def check_long_sums_keep_their_precision(subject: Subject) -> None:
    """Sums of 400 equal terms, one a tile: in bfloat16, 256 + 1 is 256.

    The terms of a kernel are sums of 16 keys, and 100 of them are enough. float16 has the integers
    alone from 1024 on: there 16 times 1 + 1/32 are 16.5, halfway between two, and each is rounded
    to 16. Likewise from 512 on half of that, of which dv is a sum.
    """
    dtype, n, high, low, up = "bfloat16", 400, 3, 1, 1
    if not subject.any_tiles:
        n, high, low, up = 100 * 16, 2 + 1 / 16, 1 + 1 / 32, 1 + 1 / 32
    if subject.slow or "bfloat16" not in subject.dtypes:
        dtype = "float16"
    sizes = ((2, n), (n, 2)) if subject.backward else ((2, n),)  # dk and dv are sums over queries
    for Nq, Nk in sizes:
        p = Problem(Nq=Nq, Nk=Nk, D=3, block_q=1, block_k=1, dtype=dtype)
        q, k, v, do = subject.draw(p)
        # Equal scores, as q or k is 0; v and k so that the terms of dq and dk are equal too.
        q[:], k[:], do[:] = (1, 0, up) if Nq > Nk else (0, 1, up)
        v[:, :, : Nk // 2], v[:, :, Nk // 2 :] = high, low
        k[:, :, Nk // 2 :] *= -1
        subject.assert_right(p, (q, k, v, do), "o lse dq dk dv")


def check_all_of_many_keys_are_seen(subject: Subject) -> None:
    """The last keys of many weigh little: a loose tolerance does not miss them."""
    for causal in (False, True):
        p = Problem(Nq=3, Nk=4101, D=8, dtype=subject.precise, causal=causal, block_q=4,
                    block_k=128)  # fmt: skip
        subject.assert_right(p, subject.draw(p), "o lse dq dk dv")


@needs("hopper_only")
def check_many_tiles_are_right(subject: Subject) -> None:
    """Several query tiles and key tiles, the last not full, and many pieces for each of 5 SMs."""
    from flashedu.stages import triton_mode

    turns = itertools.cycle(FAMILIES)
    lengths = (700, 900), (1100, 2300), (900, 300)
    for (Nq, Nk), D, causal in itertools.product(lengths, (64, 128), (False, True)):
        dtype, family = subject.dtypes[D // 64 % 2], next(turns)
        p = Problem(B=2, H=6, H_kv=3, Nq=Nq, Nk=Nk, D=D, causal=causal, dtype=dtype)
        with mock.patch.object(triton_mode, "sm_count", return_value=5), case(family):
            subject.assert_right(p, subject.draw(p, family), "o lse dq dk dv")


# the mask


def check_rows_that_see_no_key_give_zero(subject: Subject) -> None:
    for (block_q, block_k), dtype in in_every_dtype(subject, ((4, 4), (16, 5), (64, 64))):
        p = BLIND.replace(dtype=dtype, block_q=block_q, block_k=block_k)
        blind = slice(0, p.Nq - p.Nk)
        got = subject.run(p, *subject.draw(p))
        with case(p):
            assert not got.o[:, :, blind].any(), "o is not 0"
            assert got.o[:, :, p.Nq - p.Nk].all(), "o is 0 for the first row that sees a key"
            if got.lse is not None:
                assert (got.lse[:, :, blind] == -torch.inf).all(), "lse is not -inf"
            if got.dq is not None:
                assert not got.dq[:, :, blind].any(), "dq is not 0"
                assert got.dk.isfinite().all()
                assert got.dv.isfinite().all()


def check_future_keys_do_not_change_past_outputs(subject: Subject) -> None:
    for p in small(subject):
        if not p.causal:
            continue
        inputs, others = subject.draw(p), subject.draw(p, seed=1)
        want = results(subject, p)
        for first in (0, 1, p.Nk // 2, p.Nk - 1):
            past = slice(0, max(0, first - p.Nk + p.Nq))  # queries that see no key ≥ first
            if past.stop == 0:
                continue
            changed = copies(inputs)
            for x, other in zip(changed[1:3], others[1:3], strict=True):
                x[:, :, first:] = other[:, :, first:]
            where = {"o": np.s_[:, :, past], "lse": np.s_[:, :, past], "dq": np.s_[:, :, past]}
            with case(p, f"keys from {first} on"):
                got = subject.run(p, *changed)
                assert_same(at(got, **where), at(want, **where))
                rest = np.s_[:, :, past.stop :]
                assert bits(got.o[rest]) != bits(want.o[rest]), "no output saw the change"


# runs


def runs_of(subject: Subject) -> Iterator[tuple[str, Problem, Runs]]:
    """Each usual mask, and runs that nobody wants: without a key, beyond the keys, back again."""
    p = Problem(B=1, H=2, H_kv=1, Nq=50, Nk=50, D=13, block_q=16, block_k=16)
    texts = [20, 1, 0, 16, 13]
    yield "texts, causal", p, packed(texts, causal=True)
    yield "texts, full", p, packed(texts)
    more = [27, 2, 3, 0, 21]
    yield "texts with more keys or fewer", p.replace(Nk=53), packed(texts, more, causal=True)
    yield "a window", p, packed([50], causal=True, window=17)
    yield "texts with a window", p, packed([29, 21], causal=True, window=7)

    p = p.replace(B=2, Nq=37, Nk=53)
    n = torch.arange(1, p.Nq + 1, dtype=torch.int32)
    left, right = torch.tensor([[11], [0]], dtype=torch.int32), torch.tensor([[53], [41]])
    here = torch.zeros(2, p.Nq, dtype=torch.int32)
    yield "padding on the left", p, Runs(left + here, n + (p.Nk - p.Nq) + here)
    yield "padding on the right", p, Runs(here, right.to(torch.int32) + here)
    rng = np.random.default_rng(0)
    first = rng.integers(-40, p.Nk, here.shape)
    stop = first + rng.integers(-9, 2 * p.Nk, here.shape)
    yield "no key for any query", p, Runs(here + 5, here + 5)
    yield "any", p, Runs(*(torch.from_numpy(x).to(torch.int32) for x in (first, stop)))


@needs("runs")
def check_runs_match_float64(subject: Subject) -> None:
    turns = itertools.cycle(FAMILIES)
    for (title, p, runs), dtype in in_every_dtype(subject, runs_of(subject)):
        p, family = p.replace(dtype=dtype), next(turns)
        runs = Runs(*(x.to(subject.device) for x in runs))
        with case(title, family):
            subject.assert_right(p, subject.draw(p, family), "o lse dq dk dv", runs=runs)


@needs("runs")
def check_texts_do_not_mix(subject: Subject) -> None:
    p = Problem(H=2, Nq=50, Nk=50, D=5, dtype=subject.dtypes[0], block_q=16, block_k=16)
    runs = Runs(*(x.to(subject.device) for x in packed([23, 27], causal=True)))
    inputs, fresh = subject.draw(p), subject.draw(p, seed=1)
    changed = copies(inputs)
    for x, new in zip(changed, fresh, strict=True):
        x[:, :, 23:] = new[:, :, 23:]
    mine = dict.fromkeys(Reference._fields, np.s_[:, :, :23])
    got, want = (subject.run(p, *x, runs=runs) for x in (changed, inputs))
    assert_same(at(got, **mine), at(want, **mine))
    assert bits(got.o[:, :, 23:]) != bits(want.o[:, :, 23:]), (
        "the other text did not see the change"
    )


# heads and batches


def check_each_head_reads_its_own_key_head(subject: Subject) -> None:
    for p, head in in_turns(subject, small(subject), (0, 1)):
        others, mine = [h for h in range(p.H) if h // p.group != head], np.s_[:, head * p.group]
        other_keys = [h for h in range(p.H_kv) if h != head]
        inputs, fresh = subject.draw(p), subject.draw(p, seed=1)
        changed = copies(inputs)
        for x, new in zip(changed[1:3], fresh[1:3], strict=True):
            x[:, head] = new[:, head]
        where = dict.fromkeys(("o", "lse", "dq"), np.s_[:, others])
        where |= dict.fromkeys(("dk", "dv"), np.s_[:, other_keys])
        with case(p, f"key head {head}"):
            got, want = subject.run(p, *changed), results(subject, p)
            assert_same(at(got, **where), at(want, **where))
            assert bits(got.o[mine]) != bits(want.o[mine]), "its own heads did not see the change"


def check_batches_do_not_mix(subject: Subject) -> None:
    for p in small(subject):
        inputs, fresh = subject.draw(p), subject.draw(p, seed=1)
        changed = copies(inputs)
        for x, new in zip(changed, fresh, strict=True):
            x[0] = new[0]
        rest = dict.fromkeys(Reference._fields, np.s_[1:])
        with case(p):
            got, want = subject.run(p, *changed), results(subject, p)
            assert_same(at(got, **rest), at(want, **rest))


# memory


def check_empty_inputs_work(subject: Subject) -> None:
    sizes = itertools.product(EMPTY.items(), (False, True))
    for ((name, p), causal), dtype in in_every_dtype(subject, sizes):
        p = p.replace(causal=causal, dtype=dtype)
        inputs = subject.draw(p)
        got = subject.run(p, *inputs)
        with case(name, p):
            assert got.o.shape == inputs[0].shape
            assert not got.o.any(), "o is not 0"
            if got.lse is not None:
                assert (got.lse == -torch.inf).all(), "lse is not -inf"
            for gradient, x in zip(got[2:], inputs, strict=False):
                if gradient is not None:
                    assert gradient.shape == x.shape
                    assert not gradient.any()


def views(x: Array) -> Iterator[tuple[str, Array]]:
    """The values of x under other strides."""
    if isinstance(x, np.ndarray):
        yield "heads after rows", np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
        yield "columns first", np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3)
        yield "negative strides", x[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]
        yield "read-only", np.broadcast_to(x, x.shape)
        wide = np.repeat(x, 2, -1)
    else:
        yield "heads after rows", x.transpose(1, 2).contiguous().transpose(1, 2)
        yield "columns first", x.mT.contiguous().mT
        wide = x.repeat_interleave(2, -1)
    yield "every other column", wide[..., ::2]


def check_strides_do_not_matter(subject: Subject) -> None:
    for p in small(subject):
        if subject.slow and p.causal:
            continue  # the mask reads no memory
        inputs = subject.draw(p)
        for views_of_inputs in zip(*(views(x) for x in inputs), strict=True):
            with case(views_of_inputs[0][0]):
                got = subject.run(p, *(x for _, x in views_of_inputs))
                assert_right(got, *inputs, causal=p.causal)


def check_expanded_inputs_work(subject: Subject) -> None:
    """One batch in memory, many by a stride of 0."""
    for p in small(subject):
        one = subject.draw(p.replace(B=1))
        shapes = [(p.B, *x.shape[1:]) for x in one]
        expand = np.broadcast_to if subject.framework == "numpy" else torch.Tensor.expand
        inputs = tuple(expand(x, shape) for x, shape in zip(one, shapes, strict=True))
        with case(p):
            got = subject.run(p, *inputs)
            assert_right(got, *copies(inputs), causal=p.causal)


def check_inputs_are_not_modified(subject: Subject) -> None:
    for p, dtype in in_every_dtype(subject, small(subject)):
        inputs = subject.draw(p.replace(dtype=dtype))
        before = [bits(x) for x in inputs]
        subject.run(p, *inputs)
        with case(p):
            for name, x, old in zip(("q", "k", "v", "do"), inputs, before, strict=True):
                assert bits(x) == old, f"{name} was modified"


def check_results_look_like_their_inputs(subject: Subject) -> None:
    for p, dtype in in_every_dtype(subject, small(subject)):
        q, k, v, do = subject.draw(p.replace(dtype=dtype))
        got = subject.run(p, q, k, v, do)
        pairs = {"o": (got.o, q), "dq": (got.dq, q), "dk": (got.dk, k), "dv": (got.dv, v)}
        for name, (x, like) in pairs.items():
            if x is None:
                continue
            with case(p, name):
                assert type(x) is type(like)
                assert (x.shape, x.dtype) == (like.shape, like.dtype)
                if subject.framework == "torch":
                    assert x.device == like.device
        if got.lse is not None:
            wide = torch.float64 if dtype == "float64" else torch.float32
            assert got.lse.dtype == wide
            assert got.lse.shape == q.shape[:3]


def check_every_value_is_written(subject: Subject) -> None:
    """All memory that a stage asks for starts as NaN."""

    def poisoned(shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
        x = empty(shape, like, dtype)
        x[...] = float("nan")
        return x

    empty = hbm.empty
    with mock.patch.object(hbm, "empty", poisoned):
        for p in itertools.chain(small(subject), EMPTY.values()):
            for name, x in subject.run(p, *subject.draw(p))._asdict().items():
                if x is not None:
                    with case(p):
                        assert not torch.as_tensor(x).isnan().any(), f"{name} has unwritten values"


# running and counting


def check_two_runs_give_the_same_bits(subject: Subject) -> None:
    for p in small(subject):
        with case(p):
            assert_same(subject.run(p, *subject.draw(p)), results(subject, p))


def check_counting_does_not_change_a_bit(subject: Subject) -> None:
    options: list[dict[str, Any]] = [{}, {"trace": False}]
    if not rung(subject.name).is_triton:
        options.append({"sram_bytes": 2**30})
    for p, how in in_turns(subject, small(subject), options):
        with case(p, how):
            got = subject.run(p, *subject.draw(p), machine=Machine(**how))
            assert_same(got, results(subject, p))


def check_counted_bytes_are_the_closed_form(subject: Subject) -> None:
    for p, dtype in in_every_dtype(subject, small(subject)):
        p = p.replace(dtype=dtype)
        q, k, v, _do = subject.draw(p)
        machine = Machine()
        subject.run(p, q, k, v, machine=machine)
        with case(p):
            assert machine.counted == cost.FORWARD[subject.name](subject.fitted(p))


@needs("backward")
def check_counted_bytes_of_the_backward_are_the_closed_form(subject: Subject) -> None:
    for p, dtype in in_every_dtype(subject, small(subject)):
        p = p.replace(dtype=dtype)
        machine = Machine(trace=False)
        subject.run(p, *subject.draw(p), machine=machine)
        with case(p):
            fitted = subject.fitted(p)
            both = cost.FORWARD[subject.name](fitted) + cost.BACKWARD[subject.name](fitted)
            assert machine.counted == both


@needs("any_tiles")
def check_tile_sizes_may_be_numpy_integers(subject: Subject) -> None:
    p = Problem(Nq=150, Nk=150, D=3, dtype="float32", block_q=100, block_k=100)
    inputs = subject.draw(p)
    blocks = {"block_q": np.int8(100), "block_k": np.int8(100)}
    assert_same(subject.run(p, *inputs, **blocks), subject.run(p, *inputs))


@needs("lse")
def check_attention_is_the_first_result_of_attention_with_lse(subject: Subject) -> None:
    for p in small(subject):
        q, k, v, _ = subject.draw(p)
        o = subject.attention(q, k, v, causal=p.causal, **subject.tiles_of(p))
        assert_same(Reference(o, None), only("o", forward_results(subject, p)))


# what does not fit


@dataclass(frozen=True)
class Bad:
    """A call that the contract forbids, and what the message must hold."""

    changes: dict[str, Any]  # of the good call
    error: type[Exception]
    words: tuple[str, ...]  # the argument, what came

    def __str__(self) -> str:
        return " ".join(self.words)


def good_call(framework: str) -> dict[str, Any]:
    p = Problem(B=2, H=6, H_kv=3, Nq=5, Nk=7, D=8, dtype="float32")
    q, k, v, _ = draw(p, framework=framework)
    return {"q": q, "k": k, "v": v}


def bad_calls(subject: Any) -> dict[str, Bad]:
    """Id → call, for a subject or a rung."""
    found: dict[str, Bad] = {}

    def add(title: str, changes: dict[str, Any], error: type[Exception], *words: str) -> None:
        assert title not in found
        found[title] = Bad(changes, error, words)

    def array(*shape: int, dtype: str = "float32") -> Array:
        if subject.framework == "numpy":
            return np.zeros(shape, dtype)
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    good = good_call(subject.framework)
    foreign, its_name = {
        "numpy": (torch.zeros(2, 6, 5, 8), "torch.Tensor"),
        "torch": (np.zeros((2, 6, 5, 8), "float32"), "numpy.ndarray"),
    }[subject.framework]
    for name, x in good.items():
        for other, kind in ((x.tolist(), "list"), (None, "NoneType"), (foreign, its_name)):
            add(f"{name} is a {kind}", {name: other}, TypeError, f"{name} must be", f"got {kind}")
        for other in (x[0], x[0, 0], x[None], x.sum()):
            shape = str(tuple(other.shape))
            # a NumPy sum is a scalar, no array
            error = (
                ValueError if hasattr(other, "swapaxes") and not np.isscalar(other) else TypeError
            )
            add(f"{name} has {other.ndim} dimensions", {name: other}, error, f"{name} must",
                shape if error is ValueError else "float32")  # fmt: skip
        for dtype in ("int64", "bool", "complex64"):
            other = array(*x.shape, dtype=dtype)
            add(f"{name} is {dtype}", {name: other}, TypeError, f"{name} must", f"got {dtype}")
        if name == "q":
            continue
        add(f"{name} is float16", {name: array(*x.shape, dtype="float16")}, TypeError,
            f"{name} must have the dtype of q, float32", "got float16")  # fmt: skip
        add(f"{name} has another B", {name: array(3, 3, 7, 8)}, ValueError,
            f"{name} must", "B=2", "B=3")  # fmt: skip
        add(f"{name} has another D", {name: array(2, 3, 7, 9)}, ValueError,
            f"{name} must", "D=8", "D=9")  # fmt: skip
        if subject.framework == "torch":
            add(f"{name} is on another device", {name: x.to("meta")}, ValueError,
                f"{name} must be on the device of q, cpu", "got meta")  # fmt: skip

    if subject.framework == "numpy":
        add("q is big-endian", {"q": good["q"].astype(">f4")}, TypeError, "q must", "got >f4")
        masked = np.ma.masked_array(good["q"], good["q"] > 0)
        add("q is masked", {"q": masked}, TypeError, "q must not be a masked array", "got one")
    else:
        sparse = good["q"].to_sparse()
        add("q is sparse", {"q": sparse}, TypeError, "q must be a dense", "got torch.sparse_coo")
        add("q is float8", {"q": good["q"].to(torch.float8_e5m2)}, TypeError, "q must",
            "got float8_e5m2")  # fmt: skip
    add("v has another Nk", {"v": array(2, 3, 6, 8)}, ValueError, "v must", "(2, 3, 7, 8)",
        "got (2, 3, 6, 8)")  # fmt: skip
    add("v has other heads", {"v": array(2, 6, 7, 8)}, ValueError, "v must", "got (2, 6, 7, 8)")
    for H, H_kv in ((6, 4), (3, 6), (6, 0), (0, 3), (0, 0)):
        kv = array(2, H_kv, 7, 8)
        add(f"{H} heads and {H_kv} key heads", {"q": array(2, H, 5, 8), "k": kv, "v": kv},
            ValueError, "q must", f"H_kv={H_kv}", f"got H={H}")  # fmt: skip
    for D in (0, contract.MAX_D + 1):
        kv = array(2, 3, 7, D)
        add(f"D = {D}", {"q": array(2, 6, 5, D), "k": kv, "v": kv}, ValueError, "q must",
            str(contract.MAX_D), f"got D={D}")  # fmt: skip
    for causal in (1, 0, None, "yes"):
        add(f"causal = {causal!r}", {"causal": causal}, TypeError, "causal must", "True or False",
            f"got {causal!r}")  # fmt: skip
    for scale in ("x", True, 1j, [0.5]):
        add(f"scale = {scale!r}", {"scale": scale}, TypeError, "scale must", "None",
            f"got {scale!r}")  # fmt: skip
    add("scale too large", {"scale": 10**400}, ValueError, "scale must", "None", "got 1000")
    for scale in (float("nan"), float("inf"), float("-inf"), 1e39):
        add(f"scale = {scale}", {"scale": scale}, ValueError, "scale must", "None", f"got {scale}")
    if subject.tile_sizes:
        wanted = "1 or more" if subject.tile_sizes == ANY_TILES else "one of 16, 32, 64, 128, 256"
        wrong_types = (2.5, True, "64") + ((None,) if subject.tile_sizes == ANY_TILES else ())
        wrong_sizes = (0, -1) + (() if subject.tile_sizes == ANY_TILES else (1, 8, 24, 512))
        for name, block in itertools.product(("block_q", "block_k"), wrong_types):
            add(f"{name} = {block!r}", {name: block}, TypeError, f"{name} must", wanted,
                f"got {block!r}")  # fmt: skip
        for name, block in itertools.product(("block_q", "block_k"), wrong_sizes):
            add(f"{name} = {block}", {name: block}, ValueError, f"{name} must", wanted,
                f"got {block}")  # fmt: skip
    if subject.runs:
        runs = packed([5, 5])  # 2 batches of 5 are not 1 of 10
        add("runs of other sizes", {"runs": runs}, ValueError, "runs.first must", "(2, 5)",
            "got shape (1, 10)")  # fmt: skip
        fit = Runs(*(x.reshape(2, 5) for x in runs))
        add("runs in a tuple", {"runs": tuple(fit)}, TypeError, "runs must", "got tuple")
        add("runs of int64", {"runs": fit._replace(stop=fit.stop.long())}, TypeError,
            "runs.stop must", "got torch.int64")  # fmt: skip
        add("runs elsewhere", {"runs": Runs(*(x.to("meta") for x in fit))}, ValueError,
            "runs.first must", "got meta")  # fmt: skip
        add("runs and causal", {"runs": fit, "causal": True}, ValueError, "causal must be False",
            "got True")  # fmt: skip
    if subject.splits:
        for splits in (2.5, True, "3"):
            add(f"splits = {splits!r}", {"splits": splits}, TypeError, "splits must", "None",
                f"got {splits!r}")  # fmt: skip
        for splits in (0, -1, contract.MAX_SPLITS + 1):
            add(f"splits = {splits}", {"splits": splits}, ValueError, "splits must", "1 to",
                f"got {splits}")  # fmt: skip
    return found
