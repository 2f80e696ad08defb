"""The two small steps around MVFuser's scan: depth-wise convolution + SiLU, and the gated RMS-norm.

Each is one kernel on a GPU, and plain PyTorch elsewhere, for float64 and under torch.compile, which fuses by itself.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser_d2.core.ops.triton_support import triton_obstacle

logger = logging.getLogger(__name__)


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
    if not torch.compiler.is_compiling():
        if x.is_cuda and x.shape[-1] % 8 == 0 and x.dtype != torch.float64 and _causal_conv1d() is not None:
            return _shifted_causal(x, weight)
        if _use_triton(x):
            from mfuser_d2.core.ops.fused_triton import FusedConvSilu

            return FusedConvSilu.apply(x, weight)
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
    if y.dim() != 3 or y.shape != gate.shape or tuple(weight.shape) != (y.shape[-1],):
        raise ValueError(
            f"y is {tuple(y.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)}; "
            "wanted twice (N, T, C) and (C,)"
        )
    if not torch.compiler.is_compiling() and _use_triton(y):
        from mfuser_d2.core.ops.fused_triton import FusedGatedNorm

        return FusedGatedNorm.apply(y, gate, weight, eps)
    wide = y.float() if y.dtype.itemsize < 4 else y
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.to(wide.dtype) * F.silu(gate.to(wide.dtype))).to(y.dtype)


def _use_triton(x: Tensor) -> bool:
    obstacle = triton_obstacle(x)
    if x.is_cuda and obstacle:
        _log_once(obstacle)
    return obstacle is None


@functools.cache
def _log_once(obstacle: str) -> None:
    logger.warning("convolution and gated norm run unfused: %s", obstacle)


@functools.cache
def _causal_conv1d():
    """causal_conv1d's function where its compiled part is installed, or None."""
    try:
        import causal_conv1d_cuda  # noqa: F401
        from causal_conv1d import causal_conv1d_fn
    except (ImportError, OSError, RuntimeError):
        return None
    return causal_conv1d_fn


def _shifted_causal(x: Tensor, weight: Tensor) -> Tensor:
    """The symmetric convolution as a causal one that is read one token later."""
    later = F.pad(x, (0, 0, 0, 1)).transpose(1, 2)  # (N, C, T + 1), channels last in memory
    out = _causal_conv1d()(later, weight.squeeze(1).to(x.dtype), None, activation="silu")
    return out[..., 1:].transpose(1, 2)
