"""Two encoders and a pyramid as one backbone: an image in, named feature maps out."""

from __future__ import annotations

from torch import Tensor, nn

from mfuser_d2.core.dual_encoder import DualEncoder
from mfuser_d2.core.feature_pyramid import FeaturePyramid, PendingUpsample

PYRAMID_LEVELS = ("res2", "res3", "res4", "res5")
GLOBAL_EMBEDDING, DENSE_EMBEDDING = "global_embedding", "dense_embedding"


class DualEncoderBackbone(nn.Module):
    """Frozen encoders with adapters, and the pyramid over their taps.

    Args:
        encoder: the interleaved encoders, with four taps.
        pyramid: over the taps' channels.
    """

    def __init__(self, *, encoder: DualEncoder, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.encoder = encoder
        self.pyramid = pyramid

    def forward(self, images: Tensor, *, is_pending: bool = False) -> dict[str, Tensor | PendingUpsample]:
        """Features of normalised images (N, 3, H, W).

        Args:
            images: normalised.
            is_pending: "res2" and "res3" come as `PendingUpsample`, for a head that projects them at once.
        Returns:
            "res2".."res5": maps (N, C, 4h, 4w) down to (N, C, h // 2, w // 2), h and w patches of the VLM;
            "global_embedding": (N, 1, E) and "dense_embedding": (N, E, h, w) in the image-text space.
        """
        features = self.encoder(images)
        outputs = dict(zip(PYRAMID_LEVELS, self.pyramid(features.taps, is_pending=is_pending)))
        outputs[GLOBAL_EMBEDDING] = features.global_embedding
        outputs[DENSE_EMBEDDING] = features.dense_embedding
        return outputs
