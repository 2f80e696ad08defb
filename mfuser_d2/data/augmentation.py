"""Training augmentation in numpy and OpenCV: scale, crop, flip, colour.

Each step is drawn (`draw_*`, from a random state) and then applied, so that Detectron2's transforms (`transforms.py`),
the plain loop (`plain.py`) and the tests share one arithmetic. Draws are made in the order of the authors' release:
with `np.random.RandomState(s)` the results are those that it gives after `np.random.seed(s)`.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from mfuser_d2.data.labels import IGNORE_LABEL

Size = tuple[int, int]
"""(height, width) in pixels."""

CROP_TRIES = 10


def item_rng(*key: int) -> np.random.RandomState:
    """A random state that depends on the numbers in `key` alone, such as (seed, draw)."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def fit_within(size: Size, bounds: Size) -> Size:
    """The largest size of the same aspect within bounds.

    Args:
        size: of the image.
        bounds: (height, width); as in the release, their longer side bounds the image's longer side, whichever way
            either lies.
    """
    scale = min(max(bounds) / max(size), min(bounds) / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def draw_scaled_size(rng: np.random.RandomState, size: Size, scale_range: tuple[float, float]) -> Size:
    """A size between `scale_range` times the native one, of the same aspect up to rounding."""
    low, high = scale_range
    ratio = rng.random_sample() * (high - low) + low
    return fit_within(size, (int(size[0] * ratio), int(size[1] * ratio)))


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Bilinear, not antialiased, as in the release."""
    if image.shape[:2] == tuple(size):
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """Nearest neighbour."""
    if labels.shape[:2] == tuple(size):
        return labels
    return cv2.resize(labels, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)


@dataclass(frozen=True)
class Crop:
    """A window: first row and column, height and width; smaller than asked where the image is."""

    top: int
    left: int
    height: int
    width: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """The window's part of an (H, W, ...) array; a view."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]


def draw_crop(
    rng: np.random.RandomState, labels: np.ndarray, size: Size, max_area: float, ignore_label: int = IGNORE_LABEL
) -> Crop:
    """A window in which no class covers too much, if ten tries find one.

    Args:
        rng: two draws a try.
        labels: (H, W) uint8.
        size: of the window.
        max_area: a class may cover less than this part of the labelled pixels; 1 or more accepts any window.
    """
    height, width = labels.shape

    def draw() -> Crop:
        top = rng.randint(0, max(height - size[0], 0) + 1)
        left = rng.randint(0, max(width - size[1], 0) + 1)
        return Crop(top, left, min(size[0], height), min(size[1], width))

    crop = draw()
    if max_area >= 1:
        return crop
    for _ in range(CROP_TRIES):
        counts = np.bincount(crop.of(labels).ravel(), minlength=ignore_label + 1)
        counts[ignore_label] = 0
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_area:
            break
        crop = draw()
    return crop


def draw_flip(rng: np.random.RandomState, chance: float = 0.5) -> bool:
    """Whether to mirror left and right."""
    return bool(rng.rand() < chance)


@dataclass(frozen=True)
class ColorChange:
    """A photometric distortion; None leaves that step out.

    Args:
        brightness: added, -32 to 32 grey levels.
        contrast: factor, 0.5 to 1.5.
        saturation: factor, 0.5 to 1.5.
        hue: added, -18 to 17 on OpenCV's scale of 180.
        is_contrast_first: contrast before saturation and hue rather than after them.
    """

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: int | None = None
    is_contrast_first: bool = True


def draw_color(rng: np.random.RandomState) -> ColorChange:
    """Each step with probability 0.5."""

    def factor() -> float | None:
        return rng.uniform(0.5, 1.5) if rng.randint(2) else None

    brightness = rng.uniform(-32, 32) if rng.randint(2) else None
    is_first = bool(rng.randint(2))
    contrast = factor() if is_first else None
    saturation = factor()
    hue = int(rng.randint(-18, 18)) if rng.randint(2) else None
    if not is_first:
        contrast = factor()
    return ColorChange(brightness, contrast, saturation, hue, is_first)


def _linear(image: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """uint8 times a factor plus an offset, truncated: only 256 values, hence a table."""
    levels = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8))


def change_color(image: np.ndarray, change: ColorChange) -> np.ndarray:
    """Apply a photometric distortion to (H, W, 3) uint8 BGR."""
    if change.brightness is not None:
        image = _linear(image, offset=change.brightness)
    if change.is_contrast_first and change.contrast is not None:
        image = _linear(image, change.contrast)
    # Saturation and hue each go to HSV and back, because rounding makes a shared round trip another result.
    if change.saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = _linear(np.ascontiguousarray(hsv[..., 1]), change.saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if change.hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + change.hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not change.is_contrast_first and change.contrast is not None:
        image = _linear(image, change.contrast)
    return image


def mirror(array: np.ndarray) -> np.ndarray:
    """Left and right exchanged."""
    return np.ascontiguousarray(array[:, ::-1])


def augment(
    image: np.ndarray,
    labels: np.ndarray,
    rng: np.random.RandomState,
    *,
    crop_size: Size,
    scale_range: tuple[float, float] = (0.5, 2.0),
    max_area: float = 0.75,
    flip_chance: float = 0.5,
    use_color: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The whole training augmentation.

    Args:
        image: (H, W, 3) uint8 BGR.
        labels: (H, W) uint8 trainIds.
        rng: advanced by the draws.
        crop_size: of the result; less where the scaled image is smaller, nothing is padded here.
        scale_range: factors of the native size.
        max_area: see `draw_crop`.
        flip_chance: probability of mirroring.
        use_color: with photometric distortion.
    Returns:
        image and labels, at most crop_size.
    """
    size = draw_scaled_size(rng, labels.shape[:2], scale_range)
    labels = resize_labels(labels, size)
    crop = draw_crop(rng, labels, crop_size, max_area)
    image, labels = crop.of(resize_image(image, size)), crop.of(labels)
    if draw_flip(rng, flip_chance):
        image, labels = mirror(image), mirror(labels)
    if use_color:
        image = change_color(np.ascontiguousarray(image), draw_color(rng))
    return image, labels
