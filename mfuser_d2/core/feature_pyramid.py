"""Four scales (x4, x2, x1, x1/2 of the patch grid) from the tapped blocks of both encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PendingUpsample(NamedTuple):
    """A map whose last 2x2 deconvolution has not been run, so that a 1x1 convolution after it can be folded in.

    Two consecutive linear maps are one linear map: at 2048 channels in and 256 out the folded one takes an eighth of
    the products, and gives the same numbers up to rounding, gradients included.

    Attributes:
        source: (N, C, h, w).
        weight, bias: of the deconvolution, (C, C', 2, 2) and (C',).
    """

    source: Tensor
    weight: Tensor
    bias: Tensor

    def resolve(self) -> Tensor:
        """The map itself, (N, C', 2h, 2w)."""
        return F.conv_transpose2d(self.source, self.weight, self.bias, stride=2)

    def project(self, conv: nn.Conv2d) -> Tensor:
        """The map after a 1x1 convolution to D channels, (N, D, 2h, 2w), without ever making the map."""
        matrix = conv.weight.flatten(1)  # (D, C')
        weight = torch.einsum("cevu,de->cdvu", self.weight, matrix)
        bias = matrix @ self.bias
        return F.conv_transpose2d(self.source, weight, bias if conv.bias is None else bias + conv.bias, stride=2)


class FeaturePyramid(nn.Module):
    """Up- and down-samples one tap each: two deconvolutions, one, none, max pooling.

    Args:
        dim: channels of every tap; kept at every scale.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.down2 = nn.MaxPool2d(2, ceil_mode=False)

    def forward(self, taps: Sequence[Tensor], *, is_pending: bool = False) -> list[Tensor | PendingUpsample]:
        """Scale the taps.

        Args:
            taps: four maps (N, C, h, w), earliest block first.
            is_pending: leave the last deconvolution of the first two scales to whoever projects them.
        Returns:
            (N, C, 4h, 4w), (N, C, 2h, 2w), (N, C, h, w), (N, C, h // 2, w // 2).
        Raises:
            ValueError: not four taps, or a patch grid of one row or column, which cannot be halved.
        """
        if len(taps) != 4:
            raise ValueError(f"the pyramid takes 4 taps, got {len(taps)}; give MODEL.MFUSER.TAP_LAYERS four blocks")
        if min(taps[3].shape[-2:]) < 2:
            raise ValueError(
                f"a patch grid of {taps[3].shape[-2]}x{taps[3].shape[-1]} cannot be halved; "
                "use images of at least 2x2 patches"
            )
        upsampled = [
            PendingUpsample(self.up4[:-1](taps[0]), self.up4[-1].weight, self.up4[-1].bias),
            PendingUpsample(taps[1], self.up2.weight, self.up2.bias),
        ]
        if not is_pending:
            upsampled = [scale.resolve() for scale in upsampled]
        return [*upsampled, taps[2], self.down2(taps[3])]
