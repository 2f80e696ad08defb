"""Backend `cpu`: the compiled kernel of cpu.cpp as a differentiable, traceable operator."""

from __future__ import annotations

import functools
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def scan_cpu(
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

    Memory beyond inputs and outputs: one state in 64 steps for the backward, a quarter of `u` for 16 states.
    """
    tensors = (u, delta, A, B, C, D, delta_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if delta.dtype != u.dtype:
        wide = torch.promote_types(u.dtype, delta.dtype)
        y, state, _ = torch.ops.mfuser_d2.scan_forward(u.to(wide), delta.to(wide), *tensors[2:], delta_softplus, keep)
        return y.to(u.dtype), state
    y, state, _ = torch.ops.mfuser_d2.scan_forward(*tensors, delta_softplus, keep)
    return y, state


def cpu_obstacle(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why the compiled kernel cannot run for these inputs, or None."""
    if u.device.type != "cpu":
        return f"u is on {u.device}, the kernel works on the CPU"
    if u.dtype == torch.float64:
        return "the kernel computes in float32 and u is float64"
    if B.dim() == 2 or C.dim() == 2:
        return "B or C is constant in time, which the kernel does not support"
    if B.shape[1] != C.shape[1]:
        return f"B has {B.shape[1]} groups and C {C.shape[1]}"
    return library_obstacle()


@torch.compiler.assume_constant_result
def library_obstacle() -> str | None:
    """Loads the compiled library on the first call; why it is not there, or None."""
    return _load()


@functools.cache
def _load() -> str | None:
    folder = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").is_file()]
    if not found:
        obstacle = "it was not compiled; `pip install --no-build-isolation -e .` with a C++ compiler builds it"
    else:
        try:
            torch.ops.load_library(found[0])
            _register()
            return None
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            obstacle = f"{found[0].name} does not load ({reason}); install again after changing torch"
    logger.warning("the compiled CPU scan is not used: %s", obstacle)
    return obstacle


def _register() -> None:
    lanes, chunk = torch.ops.mfuser_d2.scan_layout()

    @torch.library.register_fake("mfuser_d2::scan_forward")
    def fake_forward(u, delta, A, B, C, D, delta_bias, softplus, keep):
        groups = B.shape[1]
        blocks = groups * -(-(u.shape[1] // groups) // lanes)
        saved = u.shape[0] * -(-u.shape[2] // chunk) if keep else 0
        state = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=torch.float32)
        return torch.empty_like(u), state, u.new_empty(saved, blocks, A.shape[1], lanes, dtype=torch.float32)

    @torch.library.register_fake("mfuser_d2::scan_backward")
    def fake_backward(grad_y, grad_state, u, delta, A, B, C, D, delta_bias, softplus, saved):
        maps = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (B, C))
        vectors = (u.new_empty(u.shape[1], dtype=torch.float32) for _ in range(2))
        return torch.empty_like(u), torch.empty_like(delta), A.new_empty(A.shape), *maps, *vectors

    def keep_inputs(ctx, inputs, output):
        *tensors, ctx.softplus, _ = inputs
        ctx.save_for_backward(*tensors, output[2])

    def backward(ctx, grad_y, grad_state, _):
        *tensors, saved = ctx.saved_tensors
        u, delta, A, B, C, D, delta_bias = tensors
        *grads, grad_skip, grad_bias = torch.ops.mfuser_d2.scan_backward(
            grad_y, grad_state, *tensors, ctx.softplus, saved
        )
        grad_skip = None if D is None else grad_skip.to(D.dtype)
        return *grads, grad_skip, None if delta_bias is None else grad_bias.to(delta_bias.dtype), None, None

    torch.library.register_autograd("mfuser_d2::scan_forward", backward, setup_context=keep_inputs)
