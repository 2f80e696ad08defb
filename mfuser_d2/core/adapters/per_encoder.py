"""Adapters that keep the encoders apart: none at all, or an MVFuser bottleneck on one encoder's tokens or on each's."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from mfuser_d2.core.adapters.co_adapter import CoAdapter, TokenLayout
from mfuser_d2.core.adapters.mvfuser import MVFuserBlock


class NoAdapter(CoAdapter):
    """No correction: the features of two encoders that know nothing of each other are joined in the taps.

    Args:
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`; there is nothing to project.
    """

    def __init__(self, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm, keeps_widths=True)

    def fuse(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        return _nothing(vfm), _nothing(vlm)


class PerEncoderMVFuser(CoAdapter):
    """A bottleneck of its own for each chosen encoder, at that encoder's width; tokens of both never meet.

    Args:
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`; there is nothing to project.
        encoders: which encoders have one, of "vfm" and "vlm"; the other one stays as it is.
        state_dim, dropout: see `MVFuserBlock`.
    """

    def __init__(
        self,
        *,
        vfm_dim: int,
        vlm_dim: int,
        project_vfm: bool = False,
        encoders: Collection[str],
        state_dim: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm, keeps_widths=True)
        widths = {"vfm": vfm_dim, "vlm": vlm_dim}
        self.blocks = nn.ModuleDict(
            {name: MVFuserBlock(dim=widths[name], state_dim=state_dim, dropout=dropout) for name in encoders}
        )

    def fuse(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        return self._correct("vfm", vfm), self._correct("vlm", vlm)

    def _correct(self, encoder: str, tokens: Tensor) -> Tensor:
        return self.blocks[encoder](tokens) if encoder in self.blocks else _nothing(tokens)


def _nothing(tokens: Tensor) -> Tensor:
    """Zeros like the tokens that take no memory."""
    return tokens.new_zeros(()).expand_as(tokens)
