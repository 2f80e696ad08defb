"""From decoder logits to per-class scores, for whole images and sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class InferenceSettings:
    """How an image is cut up for the network.

    Attributes:
        mode: "slide" for overlapping windows, "whole" for one pass.
        crop_size: height and width of a window in pixels.
        stride: vertical and horizontal step between windows in pixels.
        batch: windows per forward pass.
        final_softmax: softmax over the classes of the result, as the release does at the end; the argmax is the same.
        scales: factors of the image's size at which it is seen; the scores are averaged.
        flip: see it mirrored as well, at every scale.
    Raises:
        ValueError: an unknown mode, a stride that would leave gaps, or no positive scale.
    """

    mode: str = "slide"
    crop_size: Size = (512, 512)
    stride: Size = (341, 341)
    batch: int = 4
    final_softmax: bool = False
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("slide", "whole"):
            raise ValueError(f"MODEL.MFUSER.INFERENCE.MODE={self.mode!r} is unknown; choose from ['slide', 'whole']")
        for step, crop in zip(self.stride, self.crop_size):
            if not 0 < step <= crop:
                raise ValueError(
                    f"MODEL.MFUSER.INFERENCE.STRIDE={self.stride} must lie in 1..CROP_SIZE={self.crop_size}; "
                    "a larger step would leave pixels without a prediction"
                )
        if self.batch < 1:
            raise ValueError(f"MODEL.MFUSER.INFERENCE.BATCH={self.batch} must be at least 1")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"MODEL.MFUSER.INFERENCE.SCALES={list(self.scales)} has to be one or more positive factors; [1.0] sees "
                "every image at its own size only"
            )


def class_scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Per-pixel class scores of one prediction: class probability times mask probability, summed over queries.

    Args:
        class_logits: (N, Q, K + 1), "none" last.
        mask_logits: (N, Q, h, w).
    Returns:
        (N, K, h, w) in [0, Q].
    """
    probabilities = class_logits.float().softmax(dim=-1)[..., :-1]
    return torch.einsum("nqk,nqhw->nkhw", probabilities, mask_logits.float().sigmoid())


def resize_scores(scores: Tensor, size: Size) -> Tensor:
    """Resize scores (N, K, h, w) bilinearly, corners not aligned."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def window_offsets(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` start along an axis of `length` >= 1 pixels; the last one is shifted inside."""
    if length <= crop:
        return [0]
    count = -(-(length - crop) // stride) + 1
    return [min(i * stride, length - crop) for i in range(count)]


def slide(images: Tensor, predict: Callable[[Tensor], Tensor], *, crop_size: Size, stride: Size, batch: int) -> Tensor:
    """Average the predictions of overlapping windows.

    Args:
        images: (N, 3, H, W), normalised.
        predict: windows (M, 3, h, w) to scores (M, K, h, w); h, w are `crop_size`, or smaller where the image is.
        crop_size, stride: in pixels.
        batch: windows per call of `predict`, of one or several images.
    Returns:
        (N, K, H, W).
    """
    height, width = images.shape[-2:]
    crop_height, crop_width = min(crop_size[0], height), min(crop_size[1], width)
    windows = [
        (n, top, left)
        for n in range(len(images))
        for top in window_offsets(height, crop_height, stride[0])
        for left in window_offsets(width, crop_width, stride[1])
    ]
    total: Tensor | None = None
    count = images.new_zeros(1, 1, height, width)
    for start in range(0, len(windows), batch):
        chunk = windows[start : start + batch]
        crops = torch.stack([images[n, :, top : top + crop_height, left : left + crop_width] for n, top, left in chunk])
        scores = predict(crops)
        if total is None:
            total = scores.new_zeros(len(images), scores.shape[1], height, width)
        for (n, top, left), window in zip(chunk, scores):
            total[n, :, top : top + crop_height, left : left + crop_width] += window
            if n == 0:
                count[..., top : top + crop_height, left : left + crop_width] += 1
    return total / count


def average_views(
    images: Tensor, predict: Callable[[Tensor], Tensor], *, scales: Sequence[float], flip: bool
) -> Tensor:
    """Test-time augmentation: average what `predict` says of the images at several sizes, and mirrored.

    Args:
        images: (N, 3, H, W), normalised.
        predict: images (N, 3, h, w) to scores (N, K, h, w).
        scales: factors of height and width, which are rounded to whole pixels.
        flip: also the mirror image of each.
    Returns:
        (N, K, H, W).
    """
    size = tuple(images.shape[-2:])
    total: Tensor | None = None
    for scale in scales:
        view = resize_scores(images, (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)))
        scores = predict(view)
        if flip:
            scores = (scores + predict(view.flip(-1)).flip(-1)) / 2
        scores = resize_scores(scores, size)
        total = scores if total is None else total + scores
    return total / len(scales)


def rescale_to(scores: Tensor, sizes: Sequence[Size], *, final_softmax: bool) -> list[Tensor]:
    """Each image's scores (K, h, w) at its own output size, with the release's softmax at the end if asked."""
    outputs = []
    for score, size in zip(scores, sizes):
        score = resize_scores(score[None], size)[0]
        outputs.append(score.softmax(dim=0) if final_softmax else score)
    return outputs
