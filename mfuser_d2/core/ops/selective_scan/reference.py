"""Backend `reference`: the recurrence written out, the oracle that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, D, L) and last state (B, D, N) of `h[t] = exp(delta A) h[t-1] + delta B u`, `y[t] = C h[t] + D u`.

    Plain differentiable operators and a Python loop over time, after both (B, D, L, N) factors were laid out: needs
    2N times the memory of `u`, and autograd a multiple of that. Arguments as `selective_scan` has checked them.
    """
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    steps = delta.to(state_dtype)
    if delta_bias is not None:
        steps = steps + delta_bias.to(state_dtype)[:, None]
    if delta_softplus:
        steps = F.softplus(steps)
    inputs = u.to(state_dtype)
    groups = next((m.shape[1] for m in (B, C) if m.dim() == 4), 1)
    in_map, out_map = (_by_group(m.to(state_dtype), groups) for m in (B, C))  # (B | 1, G, D/G | 1, L | 1, N) each
    decay = torch.exp(steps[..., None] * A.to(state_dtype)[:, None, :]).unflatten(1, (groups, -1))
    drive = (steps * inputs)[..., None].unflatten(1, (groups, -1)) * in_map  # (B, G, D/G, L, N)
    out_map = out_map.expand(-1, -1, -1, inputs.shape[-1], -1)
    state = torch.zeros_like(decay[:, :, :, 0])
    outputs = []
    for t in range(inputs.shape[-1]):
        state = decay[:, :, :, t] * state + drive[:, :, :, t]
        outputs.append((state * out_map[:, :, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1).flatten(1, 2)  # (B, D, L)
    if D is not None:
        y = y + D.to(state_dtype)[:, None] * inputs
    return y.to(u.dtype), state.flatten(1, 2)


def _by_group(matrix: Tensor, groups: int) -> Tensor:
    """(D, N) as (1, G, D/G, 1, N), or (B, G, N, L) as (B, G, 1, L, N)."""
    if matrix.dim() == 2:
        return matrix.unflatten(0, (groups, -1))[None, :, :, None]
    return matrix.transpose(2, 3)[:, :, None]
