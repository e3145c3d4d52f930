"""How the course decides that an attention is right: inputs that expose, and an error budget.

A result is right if its error against float64 is at most twice that of the plain PyTorch formula
in the same precision, plus a few roundings: of the output, and of the scores and sums behind it.
So the tolerance follows the inputs, and a kernel is never asked to be better, nor allowed to be
worse, than its precision.

The roundings behind the output matter where the plain formula is lucky. With one key, its p is
exactly 1; exp(s − lse) is 1 only to within the rounding of s and lse, which grows with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flashedu.stages import reference
from flashedu.stages.reference import Reference

ROUNDINGS = 4  # of s, p, l and the sum


class Error(NamedTuple):
    """The largest error of one result, and what it may be."""

    error: float
    budget: float

    @property
    def within(self) -> bool:
        """False for NaN too."""
        return self.error <= self.budget


def plain(
    q: Any, k: Any, v: Any, do: Any = None, *, causal: bool, scale: float, runs: Any = None
) -> Reference:
    """The formula as a PyTorch user writes it, in the inputs' own dtype; autograd for gradients."""
    q, k, v = (torch.as_tensor(x).detach().clone().requires_grad_() for x in (q, k, v))
    group, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    s = scale * q @ k.repeat_interleave(group, 1).mT
    visible = torch.ones(s.shape[2:], dtype=torch.bool, device=s.device)
    if causal:
        visible = visible.tril(offset)
    if runs is not None:
        visible = runs.mask(s.shape[3])
    s = s.masked_fill(~visible, torch.finfo(s.dtype).min)
    p = torch.softmax(s, -1) * visible.any(-1, keepdim=True)
    o = p @ v.repeat_interleave(group, 1)
    lse = torch.logsumexp(s.masked_fill(~visible, -torch.inf).to(_acc(s.dtype)), -1)
    if do is None:
        return Reference(o.detach(), lse.detach())
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.as_tensor(do).detach())
    return Reference(o.detach(), lse.detach(), dq, dk, dv)


class Truth(NamedTuple):
    """What every result must be, in float64, and by how much it may differ from that."""

    exact: Mapping[str, torch.Tensor]
    budget: Mapping[str, float]

    def errors(self, got: Mapping[str, Any]) -> dict[str, Error]:
        """The error and the budget of each result in `got` that is not None."""
        return {
            name: Error(_distance(result, self.exact[name]), self.budget[name])
            for name, result in got.items()
            if result is not None
        }


def truth(
    q: Any,
    k: Any,
    v: Any,
    do: Any = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    runs: Any = None,
    rows: int | None = None,
) -> Truth:
    """The exact results and their budgets; gradients if `do` is given.

    `runs`: the keys that each query sees, as a stage takes them. `rows`: queries at a time, so that
    memory grows with rows · Nk; None takes all at once. What the rows give to dk and dv is added up
    in float32 or more.
    """
    q, k, v = (torch.as_tensor(x).detach() for x in (q, k, v))
    (Nq, D), Nk = q.shape[2:], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    parts = []
    for start in range(0, max(1, Nq), rows or max(1, Nq)):
        queries = slice(start, min(Nq, start + (rows or Nq)))
        keys = slice(0, max(0, queries.stop + Nk - Nq) if causal else Nk)
        part = (q[:, :, queries], k[:, :, keys], v[:, :, keys])
        do_part = None if do is None else torch.as_tensor(do).detach()[:, :, queries]
        runs_part = runs and type(runs)(*(x[:, queries] for x in runs))
        options = dict(causal=causal, scale=scale, runs=runs_part)
        exact = reference.attention(*part, do_part, **options)
        usual = plain(*part, do_part, **options)
        if _acc(q.dtype) != q.dtype:  # lse is float32 although q is not
            single = (x.float() for x in part)
            usual = usual._replace(lse=plain(*single, **options).lse)
        behind = _terms(exact, *part, do_part, **options)
        parts.append((_present(exact), _present(usual), behind))
    wanted, found, terms = (_joined(each, Nk) for each in zip(*parts, strict=True))

    budget = {}
    for name, want in wanted.items():
        acc_eps = torch.finfo(_acc(q.dtype)).eps
        eps = acc_eps if name == "lse" else torch.finfo(q.dtype).eps
        size = _largest(want[want.isfinite()].abs())
        floor = ROUNDINGS * (eps * size + acc_eps * _largest(terms[name]))
        in_dtype = found[name] if name == "lse" else found[name].to(q.dtype)
        budget[name] = 2 * _distance(in_dtype, want) + floor
    return Truth(wanted, budget)


def errors(
    got: Reference,
    q: Any,
    k: Any,
    v: Any,
    do: Any = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    runs: Any = None,
) -> dict[str, Error]:
    """For each result in `got` that is not None: its error against float64, and the budget.

    `got` holds NumPy arrays or torch tensors under the names of `Reference`.
    """
    return truth(q, k, v, do, causal=causal, scale=scale, runs=runs).errors(got._asdict())


def assert_right(got: Reference, q: Any, k: Any, v: Any, do: Any = None, **options: Any) -> None:
    """Raise AssertionError, with a sentence, unless every result in `got` is within budget."""
    for name, (error, budget) in errors(got, q, k, v, do, **options).items():
        assert error <= budget, (
            f"{name} differs from float64 by {error:.3g}; the budget is {budget:.3g}, twice the "
            f"error of the plain formula in this precision plus {ROUNDINGS} roundings"
        )


def saved_bytes(function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward of `function`."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function(*leaves)  # alive until here, so that no address is used twice
    del result
    return sum(kept.values())


def draw(
    problem: Any, family: str = "normal", *, framework: str = "numpy", seed: int = 0
) -> tuple[Any, Any, Any, Any]:
    """q, k, v and do, the same values for every framework, from a seeded generator.

    Families: "normal"; "peaked", where each softmax puts nearly all its weight on few keys, so
    that an attention that ignores q and k is far off; "large", whose logits reach some hundreds,
    so that an exponential without the maximum subtracted overflows; "rising", whose logits grow
    along the keys, so that the running maximum changes in every tile.
    """
    if framework not in ("numpy", "torch"):
        raise ValueError(f"framework must be numpy or torch, got {framework!r}")
    p, rng = problem, np.random.default_rng(seed)
    q = rng.standard_normal((p.B, p.H, p.Nq, p.D))
    k = rng.standard_normal((p.B, p.H_kv, p.Nk, p.D))
    v = rng.standard_normal((p.B, p.H_kv, p.Nk, p.D))
    do = rng.standard_normal((p.B, p.H, p.Nq, p.D))
    if family == "peaked":
        q, k = 3 * q, 3 * k
    elif family == "large":
        q, k = 12 * q, 12 * k
    elif family == "rising":
        k = np.abs(k) * np.linspace(0.1, 6, p.Nk)[:, None]
        q = np.abs(q)
    elif family != "normal":
        raise ValueError(f"family must be normal, peaked, large or rising, got {family!r}")
    dtype = "float32" if p.dtype == "bfloat16" else p.dtype
    arrays = tuple(x.astype(dtype) for x in (q, k, v, do))
    if framework == "numpy":
        if p.dtype == "bfloat16":
            raise ValueError("dtype must be one that NumPy has, got bfloat16; float16 would do")
        return arrays  # type: ignore[return-value]
    return tuple(torch.from_numpy(x).to(getattr(torch, p.dtype)) for x in arrays)  # type: ignore[return-value]


def _terms(
    exact: Reference, q: Any, k: Any, v: Any, do: Any, *, causal: bool, scale: float, runs: Any
) -> dict[str, torch.Tensor]:
    """The size of the terms behind each result: nothing cancels, and p is as unsure as its score.

    A rounding of each, of relative size ε, moves the result by ε times this.
    """
    q, k, v = (torch.as_tensor(x).detach().double() for x in (q, k, v))
    (B, H, Nq, _), (_, H_kv, Nk, D) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // H_kv, 1) for x in (k, v))
    p = torch.exp(scale * q @ k.mT - exact.lse[..., None])
    q, k, v, scale = q.abs(), k.abs(), v.abs(), abs(scale)
    s = scale * q @ k.mT
    if causal:
        p, s = p.tril(Nk - Nq), s.tril(Nk - Nq)
    if runs is not None:
        p, s = (x.masked_fill(~runs.mask(Nk), 0) for x in (p, s))
    unsure = 1 + (s.amax(-1, keepdim=True) if Nk else s.sum(-1, keepdim=True))  # (B, H, Nq, 1)
    p = p * unsure
    terms = {"o": p @ v, "lse": unsure}
    if do is not None:
        do = torch.as_tensor(do).detach().double().abs()
        ds = p * (do @ v.mT + (do * exact.o.abs()).sum(-1, keepdim=True))
        dk, dv = (
            x.reshape(B, H_kv, H // H_kv, Nk, D).sum(2) for x in (scale * ds.mT @ q, p.mT @ do)
        )
        terms |= {"dq": scale * ds @ k, "dk": dk, "dv": dv}
    return terms


def _present(results: Reference) -> dict[str, torch.Tensor]:
    return {name: x for name, x in results._asdict().items() if x is not None}


def _joined(parts: Sequence[Mapping[str, torch.Tensor]], Nk: int) -> dict[str, torch.Tensor]:
    """What some rows gave, put together: dk and dv are sums over rows, the others are rows."""
    joined = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name in ("dk", "dv"):
            whole = pieces[0].new_zeros((*pieces[0].shape[:2], Nk, pieces[0].shape[3]))
            joined[name] = whole.to(_acc(whole.dtype))
            for piece in pieces:
                joined[name][:, :, : piece.shape[2]] += piece
        else:
            joined[name] = torch.cat(pieces, 2)
    return joined


def _largest(x: torch.Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _distance(got: Any, want: torch.Tensor) -> float:
    """The largest absolute difference; equal infinities differ by 0; NaN where got is NaN."""
    got = torch.as_tensor(got).detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"the shape is {tuple(got.shape)}, not {tuple(want.shape)}")
    difference = torch.where(got == want, 0.0, (got - want).abs())
    return _largest(difference)


__all__ = ["Error", "Truth", "assert_right", "draw", "errors", "plain", "saved_bytes", "truth"]
