"""Triton kernels of deformable_attention.py and their autograd. Import only where Triton is installed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfuser_d2.core.ops.triton_support import is_interpreted, on_device

BLOCK_Q = 16
"""Queries of a program; it samples for one head."""


@triton.jit
def _corner(column, row, width, height, inside):
    """Index within its level and mask of grid cells at whole (column, row); cells outside the level are masked."""
    mask = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cell = tl.where(mask, row, 0.0).to(tl.int64) * width + tl.where(mask, column, 0.0).to(tl.int64)
    return cell, mask


@triton.jit
def _rows(value, cell, mask, heads, width, c):
    """(BLOCK_Q, BLOCK_C) values of cells as float32, 0 where masked."""
    wanted = mask[:, None] & (c < width)[None, :]
    return tl.load(value + cell[:, None] * heads * width + c[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def deform_forward_kernel(
    value, levels, places, weights, out, queries, tokens, heads, width,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of weighted bilinear samples; a program per block of queries and (image, head)."""
    n = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.arange(0, BLOCK_C)
    inside = q < queries
    value += (n * tokens * heads + head) * width
    sample = ((n * queries + q) * heads + head) * (LEVELS * POINTS)
    total = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for level in range(LEVELS):
        rows = tl.load(levels + 3 * level)
        columns = tl.load(levels + 3 * level + 1)
        start = value + tl.load(levels + 3 * level + 2).to(tl.int64) * heads * width
        for point in range(POINTS):
            s = sample + level * POINTS + point
            x = tl.load(places + 2 * s, mask=inside, other=0.0).to(tl.float32) * columns - 0.5
            y = tl.load(places + 2 * s + 1, mask=inside, other=0.0).to(tl.float32) * rows - 0.5
            w = tl.load(weights + s, mask=inside, other=0.0).to(tl.float32)
            left = tl.floor(x)
            top = tl.floor(y)
            for corner in tl.static_range(4):
                column = left + corner % 2
                row = top + corner // 2
                cell, mask = _corner(column, row, columns, rows, inside)
                share = w * (1.0 - tl.abs(x - column)) * (1.0 - tl.abs(y - row))
                total += share[:, None] * _rows(start, cell, mask, heads, width, c)
    place = ((n * queries + q) * heads + head)[:, None] * width + c[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside[:, None] & (c < width)[None, :])


@triton.jit
def deform_backward_kernel(
    value, levels, places, weights, grad, grad_value, grad_places, grad_weights, queries, tokens, heads, width,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of values (added up atomically), places and weights; the same programs as forward."""
    n = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.arange(0, BLOCK_C)
    inside = q < queries
    origin = (n * tokens * heads + head) * width
    sample = ((n * queries + q) * heads + head) * (LEVELS * POINTS)
    place = ((n * queries + q) * heads + head)[:, None] * width + c[None, :]
    d = tl.load(grad + place, mask=inside[:, None] & (c < width)[None, :], other=0.0).to(tl.float32)
    for level in range(LEVELS):
        rows = tl.load(levels + 3 * level)
        columns = tl.load(levels + 3 * level + 1)
        start = origin + tl.load(levels + 3 * level + 2).to(tl.int64) * heads * width
        for point in range(POINTS):
            s = sample + level * POINTS + point
            x = tl.load(places + 2 * s, mask=inside, other=0.0).to(tl.float32) * columns - 0.5
            y = tl.load(places + 2 * s + 1, mask=inside, other=0.0).to(tl.float32) * rows - 0.5
            w = tl.load(weights + s, mask=inside, other=0.0).to(tl.float32)
            left = tl.floor(x)
            top = tl.floor(y)
            dx = tl.zeros((BLOCK_Q,), tl.float32)
            dy = tl.zeros((BLOCK_Q,), tl.float32)
            dw = tl.zeros((BLOCK_Q,), tl.float32)
            for corner in tl.static_range(4):
                column = left + corner % 2
                row = top + corner // 2
                cell, mask = _corner(column, row, columns, rows, inside)
                share_x = 1.0 - tl.abs(x - column)
                share_y = 1.0 - tl.abs(y - row)
                # What the corner's value contributes to the loss per unit of its share.
                seen = tl.sum(d * _rows(value + start, cell, mask, heads, width, c), axis=1)
                dw += seen * share_x * share_y
                # A corner's share grows towards it: the right and lower ones with x and y, the others against them.
                dx += seen * share_y * (2 * (corner % 2) - 1)
                dy += seen * share_x * (2 * (corner // 2) - 1)
                target = grad_value + start + cell[:, None] * heads * width + c[None, :]
                added = (w * share_x * share_y)[:, None] * d
                tl.atomic_add(target, added, mask=mask[:, None] & (c < width)[None, :], sem="relaxed")
            tl.store(grad_places + 2 * s, (dx * w * columns).to(grad_places.dtype.element_ty), mask=inside)
            tl.store(grad_places + 2 * s + 1, (dy * w * rows).to(grad_places.dtype.element_ty), mask=inside)
            tl.store(grad_weights + s, dw.to(grad_weights.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=64)
def _level_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Height, width and first token of each level; kept, because copying it to a GPU makes the host wait."""
    rows, start = [], 0
    for height, width in shapes:
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


class FusedDeformable(torch.autograd.Function):
    """`deformable_attention` in one kernel each way; the shapes are checked there."""

    @staticmethod
    def forward(ctx, value: Tensor, shapes: Sequence[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
        value, places, weights = value.contiguous(), places.contiguous(), weights.contiguous()
        batch, queries, heads = places.shape[:3]
        out = value.new_empty(batch, queries, heads * value.shape[3])
        ctx.levels = _level_table(tuple(map(tuple, shapes)), value.device)
        grid, options = _launch(value, weights)
        with on_device(value):
            deform_forward_kernel[grid](value, ctx.levels, places, weights, out, queries, *value.shape[1:], **options)
        ctx.save_for_backward(value, places, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        value, places, weights = ctx.saved_tensors
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_places, grad_weights = torch.empty_like(places), torch.empty_like(weights)
        grid, options = _launch(value, weights)
        with on_device(value):
            deform_backward_kernel[grid](
                value, ctx.levels, places, weights, grad.contiguous(), grad_value, grad_places, grad_weights,
                places.shape[1], *value.shape[1:], **options,
            )  # fmt: skip
        return grad_value.to(value.dtype), None, grad_places, grad_weights


def _launch(value: Tensor, weights: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    batch, queries, heads, levels, points = weights.shape
    block = 2 if is_interpreted() else BLOCK_Q  # several blocks in the tests' tiny cases
    options = {"LEVELS": levels, "POINTS": points, "BLOCK_Q": block}
    return (triton.cdiv(queries, block), batch * heads), {**options, "BLOCK_C": triton.next_power_of_2(value.shape[3])}
