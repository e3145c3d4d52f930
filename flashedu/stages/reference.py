"""The oracle: attention and its gradients in float64, formula by formula.

No tiles, no tricks, no autograd. Tests and checkers compare with it; no stage imports it.
"""

from typing import NamedTuple

import torch


class Reference(NamedTuple):
    """Outputs and gradients, float64, on the device of the inputs."""

    o: torch.Tensor  # (B, H, Nq, D)
    lse: torch.Tensor  # (B, H, Nq)
    dq: torch.Tensor | None = None  # as q
    dk: torch.Tensor | None = None  # as k
    dv: torch.Tensor | None = None  # as v


def attention(q, k, v, do=None, *, causal=False, scale=None, runs=None):
    """o and lse in float64, and dq, dk, dv if do, the gradient of o, is given.

    q, do: (B, H, Nq, D). k, v: (B, H_kv, Nk, D). NumPy arrays or torch tensors of any dtype.
    runs: the keys that each query sees, or None.
    """
    q, k, v = (torch.as_tensor(x).detach().double() for x in (q, k, v))
    (_, H, Nq, D), (B, H_kv, Nk, _) = q.shape, k.shape
    scale = D**-0.5 if scale is None else scale
    k_h, v_h = (x.repeat_interleave(H // H_kv, dim=1) for x in (k, v))  # (B, H, Nk, D)

    s = scale * q @ k_h.mT  # (B, H, Nq, Nk)
    if causal:
        visible = torch.ones(Nq, Nk, dtype=torch.bool, device=q.device).tril(Nk - Nq)
        s = s.masked_fill(~visible, -torch.inf)
    if runs is not None:
        s = s.masked_fill(~runs.mask(Nk), -torch.inf)
    lse = torch.logsumexp(s, -1) if Nk else torch.full(s.shape[:3], -torch.inf).to(s)
    p = torch.exp(s - lse[..., None]).nan_to_num(nan=0.0)  # -inf - -inf: a row with no key
    o = p @ v_h
    if do is None:
        return Reference(o, lse)

    do = torch.as_tensor(do).detach().double()
    delta = (do * o).sum(-1, keepdim=True)  # (B, H, Nq, 1)
    dv_h = p.mT @ do
    dp = do @ v_h.mT
    ds = p * (dp - delta)
    dq = scale * ds @ k_h
    dk_h = scale * ds.mT @ q

    def sum_over_group(x):
        return x.reshape(B, H_kv, H // H_kv, Nk, D).sum(2)

    return Reference(o, lse, dq, sum_over_group(dk_h), sum_over_group(dv_h))
