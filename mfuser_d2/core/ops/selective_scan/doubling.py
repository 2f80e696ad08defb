"""The scan as few, large, plain operators: what the `torch` backend becomes in an exported model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scan_doubling(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, D, L) and last state (B, D, N); arguments as `selective_scan` has checked them.

    Every state takes in the one 1, 2, 4 ... steps before it, so the graph grows with log(L) where a loop over time
    would unroll. Holds all (B, D, L, N) states at once; the length is fixed when the model is exported.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    steps = delta.to(dtype)
    if delta_bias is not None:
        steps = steps + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        steps = F.softplus(steps)
    inputs = u.to(dtype)
    in_map, out_map = (_per_channel(m.to(dtype), u.shape[1]) for m in (B, C))  # (B | 1, D | 1, N, L | 1)
    decay = torch.exp(steps.unsqueeze(2) * A.to(dtype).unsqueeze(-1))  # (B, D, N, L)
    states = (steps * inputs).unsqueeze(2) * in_map
    reach = 1
    while reach < u.shape[-1]:
        states = states + decay * F.pad(states[..., :-reach], (reach, 0))
        decay = decay * F.pad(decay[..., :-reach], (reach, 0))
        reach *= 2
    y = (states * out_map).sum(2)
    if D is not None:
        y = y + D.to(dtype)[:, None] * inputs
    return y.to(u.dtype), states[..., -1]


def _per_channel(matrix: Tensor, channels: int) -> Tensor:
    """(D, N) as (1, D, N, 1), or (B, G, N, L) as (B, D, N, L), or (B, 1, N, L) where one group serves all channels."""
    if matrix.dim() == 2:
        return matrix[None, :, :, None]
    return matrix if matrix.shape[1] == 1 else matrix.repeat_interleave(channels // matrix.shape[1], dim=1)
