"""The contract of every adapter that lets two frozen encoders correct each other."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfuser_d2.core.ops.grid import Grid


@dataclass(frozen=True)
class TokenLayout:
    """Where the patches lie in both token sequences.

    Attributes:
        vfm_grid, vlm_grid: height and width in patches.
        vfm_prefix, vlm_prefix: number of class and register tokens before the patches.
    """

    vfm_grid: Grid
    vlm_grid: Grid
    vfm_prefix: int
    vlm_prefix: int


class CoAdapter(nn.Module):
    """Corrections for the tokens of both encoders after a pair of blocks (Eq. 2-3: `v += dv`, `l += dl`).

    Args:
        vfm_dim, vlm_dim: token widths.
        project_vfm: take VFM tokens into the VLM's width and back by two linear maps, as the release's CLIP variant
            does; always so where the widths differ.
        keeps_widths: the adapter never brings tokens of both encoders together, so that nothing is projected.
    """

    def __init__(self, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False, keeps_widths: bool = False) -> None:
        super().__init__()
        self.has_projection = not keeps_widths and (project_vfm or vfm_dim != vlm_dim)
        if self.has_projection:
            self.vfm_in = nn.Linear(vfm_dim, vlm_dim)
            self.vfm_out = nn.Linear(vlm_dim, vfm_dim)

    def forward(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Corrections to add.

        Args:
            vfm: (N, Tv, Cv) tokens of the vision foundation model.
            vlm: (N, Tl, Cl) tokens of the vision-language model.
            layout: where the patches lie in them.
        Returns:
            corrections in the shapes of `vfm` and `vlm`.
        """
        if not self.has_projection:
            return self.fuse(vfm, vlm, layout)
        vfm_delta, vlm_delta = self.fuse(self.vfm_in(vfm), vlm, layout)
        return self.vfm_out(vfm_delta), vlm_delta

    @abstractmethod
    def fuse(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The adapter's own work on tokens of one width C: (N, Tv, C), (N, Tl, C) to corrections of the same shapes."""


class SmallStep(nn.Module):
    """The end of every adapter: dropout, then a learned factor that starts small, so that training starts at "none".

    Args:
        dropout: probability with which values are dropped in training.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def forward(self, correction: Tensor) -> Tensor:
        return self.dropout(correction) * self.scale


class JointAdapter(CoAdapter):
    """An adapter that sees both sequences as one, `[v; l]` (Eq. 2)."""

    def fuse(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        joint = self.fuse_joint(torch.cat([vfm, vlm], dim=1), layout)
        return joint.split([vfm.shape[1], vlm.shape[1]], dim=1)

    @abstractmethod
    def fuse_joint(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Corrections (N, Tv + Tl, C) for the joined tokens (N, Tv + Tl, C)."""
