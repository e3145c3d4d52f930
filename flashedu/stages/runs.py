"""Runs: which keys each query sees, as the first of them and the one behind the last.

A causal mask, a sliding window, padding on either side, sequences packed one behind another: in all
of them the keys that a query sees lie side by side. So two numbers a query say all that a mask of
Nq × Nk would say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Runs(NamedTuple):
    """Query i of batch b sees the keys first[b, i] ≤ j < stop[b, i]; none if first ≥ stop.

    Both (B, Nq), int32, on the device of q. Numbers below 0 or above Nk do no harm.
    """

    first: torch.Tensor
    stop: torch.Tensor

    def mask(self, Nk: int) -> torch.Tensor:
        """The same as a mask, (B, 1, Nq, Nk): True where a query sees a key."""
        keys = torch.arange(Nk, device=self.first.device)
        seen = (keys >= self.first[..., None]) & (keys < self.stop[..., None])
        return seen[:, None]


def everywhere(B: int, Nq: int, Nk: int, *, causal: bool, device: Any = None) -> Runs:
    """All keys for each query; causal: the keys up to i + Nk − Nq."""
    first = torch.zeros(B, Nq, dtype=torch.int32, device=device)
    stop = torch.full_like(first, Nk)
    if causal:
        stop = torch.arange(1, Nq + 1, dtype=torch.int32, device=device) + (Nk - Nq)
        stop = stop.clamp(min=0).expand(B, Nq).contiguous()
    return Runs(first, stop)


def packed(
    lengths: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    device: Any = None,
) -> Runs:
    """Sequences one behind another, as one batch: each query sees the keys of its own sequence.

    `lengths`: queries of each sequence; `lengths_k`: its keys, as many if None. causal: within a
    sequence, query i sees the keys up to i + Nk − Nq. window: and of those the last so many.
    Returns runs of (1, sum(lengths)).

    Raises TypeError or ValueError for lengths that are none, or of another number of sequences.
    """
    lengths = _checked("lengths", lengths)
    lengths_k = lengths if lengths_k is None else _checked("lengths_k", lengths_k)
    if len(lengths_k) != len(lengths):
        raise ValueError(
            f"lengths_k must have a length for each of the {len(lengths)} sequences, got "
            f"{len(lengths_k)}"
        )
    if window is not None and (not _is_integer(window) or window < 1):
        raise ValueError(f"window must be None, or an integer of 1 or more, got {window!r}")
    n_queries, n_keys = (
        torch.tensor(n, dtype=torch.int64, device=device) for n in (lengths, lengths_k)
    )
    end_q, end_k = n_queries.cumsum(0), n_keys.cumsum(0)
    mine = torch.repeat_interleave(n_queries, output_size=sum(lengths))  # sequence of each query
    first, stop = (end_k - n_keys)[mine], end_k[mine]
    if causal:
        left = end_q[mine] - 1 - torch.arange(len(mine), device=device)  # queries behind it
        stop = torch.maximum(first, stop - left)
    if window is not None:
        first = torch.maximum(first, stop - window)
    return Runs(first.to(torch.int32)[None], stop.to(torch.int32)[None])


def _checked(name: str, lengths: Any) -> list[int]:
    if isinstance(lengths, torch.Tensor):
        lengths = lengths.tolist()
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise TypeError(f"{name} must be a sequence of integers, got {type(lengths).__name__}")
    for n in lengths:
        if not _is_integer(n):
            raise TypeError(f"{name} must be a sequence of integers, got {n!r} in it")
        if n < 0:
            raise ValueError(f"{name} must be 0 or more, got {n}")
    return [int(n) for n in lengths]


def _is_integer(n: Any) -> bool:
    return hasattr(n, "__index__") and not isinstance(n, bool)
