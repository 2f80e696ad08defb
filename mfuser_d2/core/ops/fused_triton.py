"""Triton kernels of fused.py and their autograd. Import only where Triton is installed."""

# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfuser_d2.core.ops.triton_support import is_interpreted, on_device

BLOCK_T, BLOCK_C = 32, 64
"""Tokens and channels of a program of the convolution."""
ROW_PROGRAMS = 1024
"""Programs over which the rows of the norm's backward are dealt; each adds up its own part of the weight's gradient."""


@triton.jit
def _tokens(x, t, c, x_t, x_c, length, width):
    """(BLOCK_T, BLOCK_C) tokens of one sequence as float32, 0 outside it."""
    mask = ((t >= 0) & (t < length))[:, None] & (c < width)[None, :]
    return tl.load(x + t[:, None] * x_t + c[None, :] * x_c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _grad_of_silu(x, grad):
    gate = tl.sigmoid(x)
    return grad * gate * (1.0 + x * (1.0 - gate))


@triton.jit
def conv_forward_kernel(
    x, weight, out, length, width, x_n, x_t, x_c, out_n, out_t, out_c, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """silu(w0 x[t-1] + w1 x[t] + w2 x[t+1])."""
    x += tl.program_id(0).to(tl.int64) * x_n
    out += tl.program_id(0).to(tl.int64) * out_n
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in tl.static_range(3):
        w = tl.load(weight + c * 3 + tap, mask=c < width, other=0.0).to(tl.float32)
        total += _tokens(x, t + (tap - 1), c, x_t, x_c, length, width) * w[None, :]
    mask = (t < length)[:, None] & (c < width)[None, :]
    value = total * tl.sigmoid(total)
    tl.store(out + t[:, None] * out_t + c[None, :] * out_c, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conv_backward_kernel(
    x, weight, grad, grad_x, grad_weight, length, width,
    x_n, x_t, x_c, grad_n, grad_t, grad_c, dx_n, dx_t, dx_c, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and of the weight, added up atomically; the convolution is computed again at t-1, t and t+1."""
    x += tl.program_id(0).to(tl.int64) * x_n
    grad += tl.program_id(0).to(tl.int64) * grad_n
    grad_x += tl.program_id(0).to(tl.int64) * dx_n
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    dx = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for shift in tl.static_range(3):  # the output at t + 1 - shift saw x[t] through tap `shift`
        conv = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for tap in tl.static_range(3):
            w = tl.load(weight + c * 3 + tap, mask=c < width, other=0.0).to(tl.float32)
            conv += _tokens(x, t + (tap - shift), c, x_t, x_c, length, width) * w[None, :]
        grad_conv = _grad_of_silu(conv, _tokens(grad, t + (1 - shift), c, grad_t, grad_c, length, width))
        w = tl.load(weight + c * 3 + shift, mask=c < width, other=0.0).to(tl.float32)
        dx += grad_conv * w[None, :]
        seen = tl.sum(grad_conv * _tokens(x, t, c, x_t, x_c, length, width), axis=0)
        tl.atomic_add(grad_weight + c * 3 + shift, seen, mask=c < width, sem="relaxed")
    mask = (t < length)[:, None] & (c < width)[None, :]
    tl.store(grad_x + t[:, None] * dx_t + c[None, :] * dx_c, dx.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def norm_forward_kernel(
    y, gate, weight, out, length, width, eps, y_n, y_t, y_c, gate_n, gate_t, gate_c, out_n, out_t, out_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """rms(y) weight silu(gate) of one row."""
    n = (tl.program_id(0) // length).to(tl.int64)
    t = (tl.program_id(0) % length).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < width
    value = tl.load(y + n * y_n + t * y_t + c * y_c, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + n * gate_n + t * gate_t + c * gate_c, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    result = value * scale * w * (z * tl.sigmoid(z))
    tl.store(out + n * out_n + t * out_t + c * out_c, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    y, gate, weight, grad, grad_y, grad_gate, grad_weight, rows, length, width, eps,
    y_n, y_t, y_c, gate_n, gate_t, gate_c, grad_n, grad_t, grad_c, dy_n, dy_t, dy_c, dg_n, dg_t, dg_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every ROW_PROGRAMS-th row, and this program's part (program, C) of the weight's."""
    c = tl.arange(0, BLOCK)
    mask = c < width
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    sum_w = tl.zeros((BLOCK,), tl.float32)
    row = tl.program_id(0)
    while row < rows:
        n = (row // length).to(tl.int64)
        t = (row % length).to(tl.int64)
        value = tl.load(y + n * y_n + t * y_t + c * y_c, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gate + n * gate_n + t * gate_t + c * gate_c, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(grad + n * grad_n + t * grad_t + c * grad_c, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
        normed = value * scale
        gated = d * (z * tl.sigmoid(z))
        sum_w += gated * normed
        inner = gated * w
        dy = scale * (inner - normed * (tl.sum(inner * normed, axis=0) / width))
        dz = _grad_of_silu(z, d * normed * w)
        tl.store(grad_y + n * dy_n + t * dy_t + c * dy_c, dy.to(grad_y.dtype.element_ty), mask=mask)
        tl.store(grad_gate + n * dg_n + t * dg_t + c * dg_c, dz.to(grad_gate.dtype.element_ty), mask=mask)
        row += tl.num_programs(0)
    tl.store(grad_weight + tl.program_id(0) * width + c, sum_w, mask=mask)


def _conv_grid(x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    block_t, block_c = (4, 4) if is_interpreted() else (BLOCK_T, BLOCK_C)  # several blocks in the tests' tiny cases
    grid = (x.shape[0], triton.cdiv(x.shape[1], block_t), triton.cdiv(x.shape[2], block_c))
    return grid, {"BLOCK_T": block_t, "BLOCK_C": block_c}


class FusedConvSilu(torch.autograd.Function):
    """`depthwise_conv_silu` in one kernel each way."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        weight_rows = weight.contiguous()
        out = torch.empty_like(x)
        grid, blocks = _conv_grid(x)
        with on_device(x):
            conv_forward_kernel[grid](x, weight_rows, out, *x.shape[1:], *x.stride(), *out.stride(), **blocks)
        ctx.save_for_backward(x, weight_rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grid, blocks = _conv_grid(x)
        with on_device(x):
            conv_backward_kernel[grid](
                x, weight, grad, grad_x, grad_weight, *x.shape[1:], *x.stride(), *grad.stride(), *grad_x.stride(),
                **blocks,
            )  # fmt: skip
        return grad_x, grad_weight.to(weight.dtype)


class FusedGatedNorm(torch.autograd.Function):
    """`gated_rms_norm` in one kernel each way."""

    @staticmethod
    def forward(ctx, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        weight = weight.contiguous()
        out = torch.empty_like(gate, dtype=y.dtype)
        _, length, width = y.shape
        with on_device(y):
            norm_forward_kernel[(y.shape[0] * length,)](
                y, gate, weight, out, length, width, eps, *y.stride(), *gate.stride(), *out.stride(),
                BLOCK=triton.next_power_of_2(width),
            )  # fmt: skip
        ctx.save_for_backward(y, gate, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, gate, weight = ctx.saved_tensors
        batch, length, width = y.shape
        grad_y, grad_gate = torch.empty_like(y), torch.empty_like(gate)
        programs = min(batch * length, 3 if is_interpreted() else ROW_PROGRAMS)
        grad_weight = torch.empty(programs, width, dtype=torch.float32, device=y.device)
        with on_device(y):
            norm_backward_kernel[(programs,)](
                y, gate, weight, grad, grad_y, grad_gate, grad_weight, batch * length, length, width, ctx.eps,
                *y.stride(), *gate.stride(), *grad.stride(), *grad_y.stride(), *grad_gate.stride(),
                BLOCK=triton.next_power_of_2(width),
            )  # fmt: skip
        return grad_y, grad_gate, grad_weight.sum(0).to(weight.dtype), None
