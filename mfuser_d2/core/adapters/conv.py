"""The spatial half of MVFuser alone, on the patch grids: a convolution where the paper's block scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.adapters.co_adapter import CoAdapter, SmallStep, TokenLayout
from mfuser_d2.core.ops.grid import Grid, map_to_tokens, tokens_to_map


class ConvAdapter(CoAdapter):
    """Bottleneck with a depth-wise 3x3 convolution and SiLU on each encoder's patch grid; one set of weights for both.

    Class and register tokens have no neighbours and only pass the bottleneck. The encoders share what is learned, but
    no token sees the other encoder.

    Args:
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`.
        dropout: on the correction, in training.
    Raises:
        ValueError: the VLM's width is odd.
    """

    def __init__(self, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False, dropout: float = 0.1) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm)
        if vlm_dim % 2:
            raise ValueError(f"the conv adapter halves its width; {vlm_dim} is odd")
        inner = vlm_dim // 2
        self.in_proj = nn.Linear(vlm_dim, inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.out_proj = nn.Linear(inner, vlm_dim, bias=False)
        self.step = SmallStep(dropout)

    def fuse(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        return (
            self._correct(vfm, layout.vfm_grid, layout.vfm_prefix),
            self._correct(vlm, layout.vlm_grid, layout.vlm_prefix),
        )

    def _correct(self, tokens: Tensor, grid: Grid, num_prefix: int) -> Tensor:
        inner = self.in_proj(tokens)
        patches = map_to_tokens(self.conv(tokens_to_map(inner[:, num_prefix:], grid)))  # (N, h*w, C/2)
        return self.step(self.out_proj(F.silu(torch.cat([inner[:, :num_prefix], patches], dim=1))))
