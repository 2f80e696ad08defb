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
    in_map, out_map = (_per_channel(m.to(state_dtype), inputs) for m in (B, C))  # (B | 1, D, N, L | 1) each
    decay = torch.exp(steps[..., None] * A.to(state_dtype)[None, :, None, :])  # (B, D, L, N)
    drive = (steps * inputs)[..., None] * in_map.transpose(2, 3)  # (B, D, L, N)
    out_map = out_map.expand(-1, -1, -1, inputs.shape[-1])
    state = torch.zeros_like(decay[:, :, 0])
    outputs = []
    for t in range(inputs.shape[-1]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append((state * out_map[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1)  # (B, D, L)
    if D is not None:
        y = y + D.to(state_dtype)[:, None] * inputs
    return y.to(u.dtype), state


def _per_channel(matrix: Tensor, inputs: Tensor) -> Tensor:
    """(D, N) or (B, G, N, L) as (1, D, N, 1) or (B, D, N, L)."""
    if matrix.dim() == 2:
        return matrix[None, :, :, None]
    return matrix.repeat_interleave(inputs.shape[1] // matrix.shape[1], dim=1)
