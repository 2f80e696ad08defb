"""Four scales (x4, x2, x1, x1/2 of the patch grid) from the tapped blocks of both encoders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


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

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Scale the taps.

        Args:
            taps: four maps (N, C, h, w), earliest block first.
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
        return [self.up4(taps[0]), self.up2(taps[1]), taps[2], self.down2(taps[3])]
