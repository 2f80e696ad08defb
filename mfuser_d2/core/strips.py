"""Labels of images of any size in bounded memory: windows in strips, each strip decided as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfuser_d2.core.inference import Size, window_offsets


def slide_labels(
    image: Tensor, predict: Callable[[Tensor], Tensor], *, crop_size: Size, stride: Size, batch: int
) -> Tensor:
    """The class of every pixel, as the argmax of `inference.slide`'s scores, without holding these scores.

    Memory: the scores of one strip, as deep as a window and as long as the image's shorter side.

    Args:
        image: (3, H, W), any dtype.
        predict: windows (M, 3, h, w) of `image` to scores (M, K, h, w); h, w are `crop_size`, or smaller where the
            image is.
        crop_size, stride: (height, width) in pixels.
        batch: windows per call of `predict`.
    Returns:
        (H, W) int16 on the CPU.
    """
    if image.shape[1] < image.shape[2]:  # strips run along the shorter side
        turned = slide_labels(
            image.transpose(1, 2),
            lambda windows: predict(windows.transpose(2, 3)).transpose(2, 3),
            crop_size=crop_size[::-1],
            stride=stride[::-1],
            batch=batch,
        )
        return turned.T.contiguous()
    height, width = image.shape[1:]
    crop_height, crop_width = min(crop_size[0], height), min(crop_size[1], width)
    tops = window_offsets(height, crop_height, stride[0])
    lefts = window_offsets(width, crop_width, stride[1])
    labels = torch.empty(height, width, dtype=torch.int16)  # of the largest images a gigabyte less than int64
    strip: Tensor | None = None  # (K, crop_height, W), sums of scores; counts do not move the argmax
    for top, following in zip(tops, [*tops[1:], tops[-1] + crop_height]):
        rows = image[:, top : top + crop_height]
        for start in range(0, len(lefts), batch):
            chunk = lefts[start : start + batch]
            scores = predict(torch.stack([rows[..., left : left + crop_width] for left in chunk]))
            if strip is None:
                strip = scores.new_zeros(scores.shape[1], crop_height, width)
            for left, window in zip(chunk, scores):
                strip[..., left : left + crop_width] += window
        done = following - top
        labels[top:following] = strip[:, :done].argmax(dim=0).cpu()
        kept = strip[:, done:].clone()
        strip[:, : crop_height - done] = kept
        strip[:, crop_height - done :] = 0
    return labels
