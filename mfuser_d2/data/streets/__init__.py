"""Streets: drawn street scenes in the 19 classes, a data set that needs no download.

One source domain (noon) with a training and a validation split, and three domains for testing only: night, fog and a
pen drawing. Every picture follows from (seed, split, index) alone. Needs numpy and OpenCV, not Detectron2.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from mfuser_d2.data.streets.domains import RENDERS
from mfuser_d2.data.streets.scene import paint_street

VERSION = 3
"""Raised whenever the same seed would draw another picture."""

DEFAULT_SIZE = (192, 384)
_OVERSAMPLING = 2


@dataclass(frozen=True)
class Split:
    """One folder of pictures: the look of its domain and the stream of random numbers that is its own."""

    name: str
    domain: str
    stream: int
    is_train: bool = False


SPLITS: dict[str, Split] = {
    split.name: split
    for split in (
        Split("train", "day", 0, is_train=True),
        Split("val", "day", 1),
        Split("night", "night", 2),
        Split("fog", "fog", 3),
        Split("sketch", "sketch", 4),
    )
}


def draw_street(
    *, split: str, index: int, seed: int = 0, size: tuple[int, int] = DEFAULT_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """One picture of a split and its labels.

    Args:
        split: a key of SPLITS.
        index: which picture, from 0.
        seed: another seed is another town.
        size: (height, width) in pixels, at least 64 x 64.
    Returns:
        (H, W, 3) uint8 RGB and (H, W) uint8 trainIds; every pixel has a class.
    Raises:
        KeyError: unknown split.
        ValueError: size below 64 pixels.
    """
    if split not in SPLITS:
        raise KeyError(f"streets have no split {split!r}; choose from {sorted(SPLITS)}")
    height, width = size
    if min(size) < 64:
        raise ValueError(f"size={size} is too small for a street; both sides must be at least 64 pixels")
    rng = np.random.default_rng((seed, SPLITS[split].stream, index))
    canvas = paint_street(rng, height * _OVERSAMPLING, width * _OVERSAMPLING)
    image = RENDERS[SPLITS[split].domain](rng, canvas)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    middle = slice(_OVERSAMPLING // 2, None, _OVERSAMPLING)
    return image, np.ascontiguousarray(canvas.label[middle, middle])
