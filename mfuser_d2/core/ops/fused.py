"""The two small steps around MVFuser's scan: depth-wise convolution + SiLU, and the gated RMS-norm."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def depthwise_conv_silu(x: Tensor, weight: Tensor) -> Tensor:
    """Depth-wise convolution of width 3 along the tokens, zero outside, no bias, then SiLU.

    Args:
        x: tokens (N, T, C).
        weight: (C, 1, 3), as `nn.Conv1d(C, C, 3, groups=C)` keeps it.
    Returns:
        (N, T, C) in x's dtype.
    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() != 3 or tuple(weight.shape) != (x.shape[-1], 1, 3):
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; wanted (N, T, C) and (C, 1, 3)")
    before, here, after = weight.to(x.dtype).squeeze(1).unbind(-1)
    padded = F.pad(x, (0, 0, 1, 1))  # (N, T + 2, C)
    return F.silu((padded[:, :-2] * before).addcmul(x, here).addcmul(padded[:, 2:], after))


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """`rms(y) * weight * silu(gate)` over the last axis: the norm comes before the gate (Eq. 6).

    Args:
        y, gate: (N, T, C).
        weight: (C,).
        eps: added to the mean square.
    Returns:
        (N, T, C) in y's dtype; computed in float32 at least.
    Raises:
        ValueError: the shapes do not fit.
    """
    if y.shape != gate.shape or tuple(weight.shape) != (y.shape[-1],):
        raise ValueError(
            f"y is {tuple(y.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)}; "
            "wanted twice (N, T, C) and (C,)"
        )
    wide = y.float() if y.dtype.itemsize < 4 else y
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.to(wide.dtype) * F.silu(gate.to(wide.dtype))).to(y.dtype)
