"""Backend `triton`: launches the kernels of triton_kernels.py and adds autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfuser_d2.core.ops.triton_support import is_interpreted, on_device, triton_obstacle

PROGRAMS_WANTED = 512
"""Programs that keep a large GPU busy; as many channels share a tile as leave this many."""
TILE_ELEMENTS = 1024
WARPS = 4


def scan_triton(
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

    Gradients of B and C are added up atomically: their last bits differ from run to run.
    """
    return _TritonScan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)


def scan_obstacle(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why the kernels cannot run for these inputs, or None."""
    if B.dim() == 2 or C.dim() == 2:
        return "B or C is constant in time, which the kernels do not support"
    return triton_obstacle(u)


def _tile_size(batch: int, groups: int, width: int) -> tuple[int, int]:
    """Channels and steps of a tile."""
    if is_interpreted():
        return 2, 32  # several tiles even in the tiny cases of the tests
    channels = 8
    while channels > 1 and batch * groups * -(-width // channels) < PROGRAMS_WANTED:
        channels //= 2
    return channels, TILE_ELEMENTS // channels


class _Launch:
    """What both kernels are called with."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, softplus: bool) -> None:
        self.batch, self.channels, self.length = u.shape
        self.groups = B.shape[1]
        self.A = A.float().contiguous()
        self.B, self.C = (m.float().contiguous() for m in (B, C))  # small; (B, G, N, L)
        self.D, self.bias = (None if v is None else v.float().contiguous() for v in (D, delta_bias))
        width = self.channels // self.groups
        tile_channels, tile_steps = _tile_size(self.batch, self.groups, width)
        self.tiles = -(-self.length // tile_steps)
        blocks = -(-width // tile_channels)
        self.grid = (self.batch, self.groups * blocks)
        self.sizes = (self.length, width, blocks, self.channels)
        self.map_strides = self.B.stride()[:3]
        states = A.shape[1]
        self.constants = {
            "N": states,
            "BLOCK_N": 1 << (states - 1).bit_length(),
            "BLOCK_D": tile_channels,
            "BLOCK_T": tile_steps,
            "HAS_D": D is not None,
            "HAS_BIAS": delta_bias is not None,
            "SOFTPLUS": softplus,
            "num_warps": WARPS,
        }


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, softplus):
        from mfuser_d2.core.ops.selective_scan.triton_kernels import scan_forward_kernel

        launch = _Launch(u, delta, A, B, C, D, delta_bias, softplus)
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(u)
        state = u.new_empty(launch.batch, launch.channels, A.shape[1], dtype=torch.float32)
        saved = state.new_empty(launch.batch, launch.tiles, launch.channels, A.shape[1]) if keep else state
        with on_device(u):
            scan_forward_kernel[launch.grid](
                u, delta, launch.A, launch.B, launch.C, launch.D, launch.bias, y, state, saved, *launch.sizes,
                *u.stride(), *delta.stride(), *y.stride(), *launch.map_strides, **launch.constants, KEEP=keep,
            )  # fmt: skip
        if keep:
            ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, saved)
            ctx.softplus = softplus
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        from mfuser_d2.core.ops.selective_scan.triton_kernels import scan_backward_kernel

        u, delta, A, B, C, D, delta_bias, saved = ctx.saved_tensors
        launch = _Launch(u, delta, A, B, C, D, delta_bias, ctx.softplus)
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_A = torch.empty_like(grad_state, memory_format=torch.contiguous_format)
        grad_D, grad_bias = (grad_A.new_empty(launch.batch, launch.channels) for _ in range(2))
        grad_B, grad_C = torch.zeros_like(launch.B), torch.zeros_like(launch.C)
        with on_device(u):
            scan_backward_kernel[launch.grid](
                grad_y, grad_state.contiguous(), u, delta, launch.A, launch.B, launch.C, launch.D, launch.bias, saved,
                grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, *launch.sizes,
                *grad_y.stride(), *u.stride(), *delta.stride(), *grad_u.stride(), *grad_delta.stride(),
                *launch.map_strides, **launch.constants,
            )  # fmt: skip
        return (
            grad_u,
            grad_delta,
            grad_A.sum(0).to(A.dtype),
            grad_B.to(B.dtype),
            grad_C.to(C.dtype),
            None if D is None else grad_D.sum(0).to(D.dtype),
            None if delta_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
            None,
        )
