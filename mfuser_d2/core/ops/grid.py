"""Token grids: laying tokens out as maps, and resampling position grids and patch kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""Height and width of a token grid, in patches."""


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Lay patch tokens out as an image-shaped map.

    Args:
        tokens: (N, h*w, C), row-major, without prefix tokens.
        grid: height and width in patches.
    Returns:
        (N, C, h, w), a view where memory allows.
    Raises:
        ValueError: the token count is not h*w.
    """
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a {grid[0]}x{grid[1]} grid; drop prefix tokens first")
    # In this order the strides say "channels last" for a single image too, which convolutions on the CPU look for.
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Flatten a map (N, C, h, w) to row-major tokens (N, h*w, C)."""
    return feature_map.flatten(2).transpose(1, 2)


def resample_map(feature_map: Tensor, grid: Grid, mode: str = "bilinear") -> Tensor:
    """Resize a map (N, C, h, w) to `grid`, corners not aligned; the same map where nothing changes."""
    if tuple(feature_map.shape[-2:]) == tuple(grid):
        return feature_map
    return F.interpolate(feature_map, size=grid, mode=mode, align_corners=False)


def resample_positions(
    positions: Tensor,
    old_grid: Grid,
    new_grid: Grid,
    *,
    num_prefix: int,
    mode: str,
    scale_offset: float | None = None,
) -> Tensor:
    """Resize a learned position table to another grid.

    Args:
        positions: (P + h*w, C), the P prefix rows first; they are kept as they are.
        old_grid: h, w of the table.
        new_grid: h', w' wanted.
        num_prefix: P.
        mode: "bicubic" or "bilinear"; no antialiasing, corners not aligned.
        scale_offset: DINOv2 samples at scale (h' + offset) / h instead of by size, so that even the same grid comes
            out changed; pass its 0.1 here to get its numbers. None samples by size.
    Returns:
        (P + h'*w', C).
    Raises:
        ValueError: the table does not hold P + h*w rows.
    """
    if positions.shape[0] != num_prefix + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"position table has {positions.shape[0]} rows, wanted {num_prefix} prefix + {old_grid[0]}x{old_grid[1]}"
        )
    if scale_offset is None and tuple(old_grid) == tuple(new_grid):
        return positions
    prefix, table = positions[:num_prefix], positions[num_prefix:]
    table = tokens_to_map(_at_least_float32(table[None]), old_grid)  # (1, C, h, w)
    if scale_offset is None:
        table = F.interpolate(table, size=new_grid, mode=mode, align_corners=False)
    else:
        scale = tuple((new + scale_offset) / old for new, old in zip(new_grid, old_grid))
        table = F.interpolate(table, scale_factor=scale, mode=mode, align_corners=False)
    rows = map_to_tokens(table)[0].to(positions.dtype)
    return torch.cat([prefix, rows])


def resample_kernel(kernel: Tensor, size: Grid, mode: str) -> Tensor:
    """Resize patch-embedding kernels (C_out, C_in, p, p) to `size` pixels, as the release does: plain interpolation.

    Differs from timm, which uses a pseudo-inverse; its numbers are others.
    """
    return resample_map(_at_least_float32(kernel), size, mode).to(kernel.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
