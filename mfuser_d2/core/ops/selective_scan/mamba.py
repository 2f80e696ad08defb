"""Backend `mamba_ssm`: mamba's own CUDA kernel, where its compiled part is installed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def scan_mamba(
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

    Differs from the other backends: the kernel has no gradient for the last state, which is returned detached.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    D, delta_bias = (None if vector is None else vector.float() for vector in (D, delta_bias))
    maps = (m.to(u.dtype) if m.dim() == 4 else m.float() for m in (B, C))
    y, state = selective_scan_fn(
        u, delta.to(u.dtype), A.float(), *maps, D, None, delta_bias, delta_softplus, return_last_state=True
    )
    return y, state.detach()


def mamba_obstacle(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why mamba's kernel cannot run for these inputs, or None."""
    if u.device.type != "cuda":
        return f"u is on {u.device}, mamba's kernel needs an NVIDIA GPU"
    if u.dtype == torch.float64:
        return "mamba's kernel computes in float32 and u is float64"
    if A.shape[1] > 256:
        return f"mamba's kernel takes at most 256 states, not {A.shape[1]}"
    return _import_obstacle()


@functools.cache
def _import_obstacle() -> str | None:
    try:
        import selective_scan_cuda  # noqa: F401
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return (
            f"mamba_ssm's compiled scan is missing ({str(error).splitlines()[0]}); "
            "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba_ssm builds it"
        )
    return None
