"""Adapter by deformable attention: every patch looks at a few places of both encoders' grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfuser_d2.core.adapters.co_adapter import CoAdapter, SmallStep, TokenLayout
from mfuser_d2.core.ops.deformable_attention import MultiScaleDeformableAttention
from mfuser_d2.core.ops.grid import Grid


class DeformableAdapter(CoAdapter):
    """Bidirectional: the patches of both encoders are the queries, their two grids are the levels.

    Class and register tokens have no place on a grid and stay as they are.

    Args:
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`.
        num_heads: attention heads; divides the VLM's width.
        num_points: places per head and grid.
        dropout: on the correction, in training.
    """

    def __init__(
        self,
        *,
        vfm_dim: int,
        vlm_dim: int,
        project_vfm: bool = False,
        num_heads: int = 8,
        num_points: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm)
        self.norm = nn.LayerNorm(vlm_dim)
        self.query_proj = nn.Linear(vlm_dim, vlm_dim)
        self.attn = MultiScaleDeformableAttention(dim=vlm_dim, num_heads=num_heads, num_levels=2, num_points=num_points)
        self.step = SmallStep(dropout)

    def fuse(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        patches = self.norm(torch.cat([vfm[:, layout.vfm_prefix :], vlm[:, layout.vlm_prefix :]], dim=1))
        grids = (layout.vfm_grid, layout.vlm_grid)
        centres = torch.cat([_patch_centres(grid, patches) for grid in grids])
        correction = self.step(self.attn(self.query_proj(patches), patches, centres, grids))
        of_vfm, of_vlm = correction.split([height * width for height, width in grids], dim=1)
        return _after_prefix(of_vfm, layout.vfm_prefix), _after_prefix(of_vlm, layout.vlm_prefix)


def _patch_centres(grid: Grid, like: Tensor) -> Tensor:
    """(x, y) of every patch's centre, 0..1, (h*w, 2), row-major; float32 at least, places need it."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    y, x = ((torch.arange(length, device=like.device, dtype=dtype) + 0.5) / length for length in grid)
    return torch.stack([x.expand(grid), y[:, None].expand(grid)], dim=2).flatten(0, 1)


def _after_prefix(patches: Tensor, num_prefix: int) -> Tensor:
    """Zeros for the prefix tokens before the patches' corrections."""
    return torch.cat([patches.new_zeros(len(patches), num_prefix, patches.shape[2]), patches], dim=1)
