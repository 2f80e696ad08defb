"""The steps of `augmentation` as Detectron2 augmentations and transforms.

Each augmentation takes its random numbers from the `rng` it is given, so that an item depends on its seed alone.
"""

import numpy as np
from detectron2.data.transforms import AugInput, Augmentation, NoOpTransform, Transform
from fvcore.transforms.transform import CropTransform, HFlipTransform, TransformList

from mfuser_d2.data.augmentation import (
    ColorChange,
    Size,
    change_color,
    draw_color,
    draw_crop,
    draw_flip,
    draw_scaled_size,
    fit_within,
    resize_image,
    resize_labels,
)


class ScaleTransform(Transform):
    """Resize to new_size: images bilinear by OpenCV, labels nearest."""

    def __init__(self, size: Size, new_size: Size) -> None:
        super().__init__()
        self.size, self.new_size = tuple(size), tuple(new_size)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return resize_image(img, self.new_size)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return resize_labels(segmentation, self.new_size)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * (self.new_size[1] / self.size[1], self.new_size[0] / self.size[0])

    def inverse(self) -> "ScaleTransform":
        return ScaleTransform(self.new_size, self.size)


class ColorTransform(Transform):
    """Photometric distortion of a uint8 BGR image; labels and coordinates stay."""

    def __init__(self, change: ColorChange) -> None:
        super().__init__()
        self.change = change

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return change_color(np.ascontiguousarray(img), self.change)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords


class RandomScale(Augmentation):
    """Scale by a factor from `scale_range` of the native size."""

    input_args = ("sem_seg",)

    def __init__(self, rng: np.random.RandomState, scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.rng, self.scale_range = rng, scale_range

    def get_transform(self, sem_seg: np.ndarray) -> Transform:
        size = sem_seg.shape[:2]
        return ScaleTransform(size, draw_scaled_size(self.rng, size, self.scale_range))


class FitWithin(Augmentation):
    """Scale to the largest size within `bounds` (height, width), see `augmentation.fit_within`."""

    def __init__(self, bounds: Size) -> None:
        super().__init__()
        self.bounds = tuple(bounds)

    def get_transform(self, image: np.ndarray) -> Transform:
        return ScaleTransform(image.shape[:2], fit_within(image.shape[:2], self.bounds))


class RandomCategoryCrop(Augmentation):
    """Crop so that no class covers too much, see `augmentation.draw_crop`."""

    input_args = ("sem_seg",)

    def __init__(self, rng: np.random.RandomState, crop_size: Size, max_area: float) -> None:
        super().__init__()
        self.rng, self.crop_size, self.max_area = rng, tuple(crop_size), max_area

    def get_transform(self, sem_seg: np.ndarray) -> Transform:
        crop = draw_crop(self.rng, sem_seg, self.crop_size, self.max_area)
        return CropTransform(crop.left, crop.top, crop.width, crop.height, sem_seg.shape[1], sem_seg.shape[0])


class RandomMirror(Augmentation):
    """Mirror left and right with probability `chance`."""

    input_args = ("sem_seg",)

    def __init__(self, rng: np.random.RandomState, chance: float = 0.5) -> None:
        super().__init__()
        self.rng, self.chance = rng, chance

    def get_transform(self, sem_seg: np.ndarray) -> Transform:
        return HFlipTransform(sem_seg.shape[1]) if draw_flip(self.rng, self.chance) else NoOpTransform()


class RandomColor(Augmentation):
    """Photometric distortion of BGR images, see `augmentation.draw_color`."""

    input_args = ("sem_seg",)

    def __init__(self, rng: np.random.RandomState) -> None:
        super().__init__()
        self.rng = rng

    def get_transform(self, sem_seg: np.ndarray) -> Transform:
        return ColorTransform(draw_color(self.rng))


class LazyAugInput(AugInput):
    """An AugInput that touches the image only when someone asks for it.

    Crops are chosen by their labels and may be drawn ten times; the image is then transformed once.
    """

    def __init__(self, image: np.ndarray, *, sem_seg: np.ndarray) -> None:
        self._image, self._waiting = image, []
        self.boxes, self.sem_seg = None, sem_seg

    @property
    def image(self) -> np.ndarray:
        if self._waiting:
            self._image, self._waiting = TransformList(self._waiting).apply_image(self._image), []
        return self._image

    def transform(self, tfm: Transform) -> None:
        self._waiting.append(tfm)
        self.sem_seg = tfm.apply_segmentation(self.sem_seg)
