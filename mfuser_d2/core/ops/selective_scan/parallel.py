"""Backend `parallel`: the scan as a handful of operators on whole sequences, for exported graphs.

The other backends loop over time: thousands of nodes per scan, or code outside of PyTorch. Here the number of nodes
grows with the logarithm of the length. It holds several (batch, channels, length, states) tensors at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32
"""Steps scanned together before the chunks are; a power of two. Fewer passes over the large tensors than one scan."""


def scan_parallel(
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

    Steps are joined in pairs, then pairs in fours and so on: `(a1, b1) then (a2, b2) = (a1 a2, a2 b1 + b2)`. Decays are
    multiplied, never divided by, so long ones stay finite.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    inputs, steps, length = u.to(dtype), delta.to(dtype), u.shape[-1]
    if delta_bias is not None:
        steps = steps + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        steps = F.softplus(steps)
    in_map, out_map = (_per_channel(m.to(dtype), u.shape[1]) for m in (B, C))  # (B | 1, D, L | 1, N)
    decay = torch.exp(steps[..., None] * A.to(dtype)[:, None])  # (B, D, L, N)
    drive = (steps * inputs)[..., None] * in_map

    missing = -length % CHUNK  # filled with steps that change nothing
    decay = F.pad(decay, (0, 0, 0, missing), value=1.0).unflatten(2, (-1, CHUNK))  # (B, D, chunks, CHUNK, N)
    drive = F.pad(drive, (0, 0, 0, missing)).unflatten(2, (-1, CHUNK))
    decay, drive = _join_steps(decay, drive)
    _, ends = _join_steps(decay[..., -1, :], drive[..., -1, :])  # (B, D, chunks, N)
    before = F.pad(ends[:, :, :-1], (0, 0, 1, 0))
    states = (drive + decay * before[..., None, :]).flatten(2, 3)[:, :, :length]  # (B, D, L, N)

    y = (states * out_map).sum(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * inputs
    return y.to(u.dtype), ends[:, :, -1]


def _join_steps(decay: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
    """Each step (..., L, N) joined with all before it."""
    shift, length = 1, decay.shape[-2]
    while shift < length:
        earlier = F.pad(drive[..., : length - shift, :], (0, 0, shift, 0))
        drive = drive + decay * earlier
        decay = decay * F.pad(decay[..., : length - shift, :], (0, 0, shift, 0), value=1.0)
        shift *= 2
    return decay, drive


def _per_channel(matrix: Tensor, channels: int) -> Tensor:
    """(D, N) or (B, G, N, L) as (1, D, 1, N) or (B, D, L, N)."""
    if matrix.dim() == 2:
        return matrix[None, :, None]
    matrix = matrix.transpose(2, 3)
    return (
        matrix.expand(-1, channels, -1, -1)
        if matrix.shape[1] == 1
        else matrix.repeat_interleave(channels // matrix.shape[1], dim=1)
    )
