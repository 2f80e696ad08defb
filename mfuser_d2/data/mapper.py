"""From a dataset dict to what the network gets."""

import copy
import logging
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.transforms import Augmentation, AugmentationList

from mfuser_d2.data.augmentation import CROP_TRIES, Size, fit_within, item_rng, resize_image
from mfuser_d2.data.config import NATIVE_SIZE
from mfuser_d2.data.labels import IGNORE_LABEL
from mfuser_d2.data.reading import read_image, read_pair
from mfuser_d2.data.sampler import NO_CLASS
from mfuser_d2.data.transforms import LazyAugInput, RandomCategoryCrop, RandomColor, RandomMirror, RandomScale

logger = logging.getLogger(__name__)


def _to_tensor(image_bgr: np.ndarray) -> torch.Tensor:
    """(H, W, 3) BGR to (3, H, W) RGB."""
    return torch.from_numpy(np.ascontiguousarray(image_bgr[..., ::-1].transpose(2, 0, 1)))


class TrainMapper:
    """Reads a pair and returns an augmented crop.

    The dict may carry `draw_number` (with the seed it decides all random numbers) and `rare_class` (crops are drawn
    until one shows enough of it). Without a draw number the augmentation follows numpy's global state.

    Args:
        crop_size: (height, width), pixels.
        scale_range: factors of the native size.
        max_area: no class covers this part or more of the labelled pixels.
        flip_chance: probability of mirroring.
        use_color: with photometric distortion.
        min_class_pixels: a crop shows the rare class from more pixels of it on; 0 takes the first crop.
        seed: of the augmentation.
    """

    @configurable
    def __init__(
        self,
        *,
        crop_size: Size,
        scale_range: tuple[float, float] = (0.5, 2.0),
        max_area: float = 0.75,
        flip_chance: float = 0.5,
        use_color: bool = True,
        min_class_pixels: float = 0,
        seed: int = 0,
    ) -> None:
        if len(crop_size) != 2 or min(crop_size) < 1 or any(int(edge) != edge for edge in crop_size):
            raise ValueError(f"INPUT.CROP.SIZE={tuple(crop_size)} must be two whole numbers of pixels (height, width)")
        if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"INPUT.MFUSER.SCALE_RANGE={tuple(scale_range)} must be two positive factors, low first")
        self.crop_size: Size = (int(crop_size[0]), int(crop_size[1]))
        self.scale_range, self.max_area = tuple(scale_range), max_area
        self.flip_chance, self.use_color = flip_chance, use_color
        self.min_class_pixels, self.seed = min_class_pixels, seed
        self._has_warned = False

    @classmethod
    def from_config(cls, cfg: CfgNode, seed: int | None = None) -> dict[str, Any]:
        if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
            raise ValueError(f"INPUT.RANDOM_FLIP={cfg.INPUT.RANDOM_FLIP!r} is not offered; use 'horizontal' or 'none'")
        if not cfg.INPUT.CROP.ENABLED or cfg.INPUT.CROP.TYPE != "absolute":
            raise ValueError(
                f"INPUT.CROP.ENABLED={cfg.INPUT.CROP.ENABLED} with TYPE={cfg.INPUT.CROP.TYPE!r}: training crops have a "
                "fixed size; use ENABLED True, TYPE 'absolute' and SIZE in pixels"
            )
        loader = cfg.DATALOADER.MFUSER
        return {
            "crop_size": cfg.INPUT.CROP.SIZE,
            "scale_range": cfg.INPUT.MFUSER.SCALE_RANGE,
            "max_area": cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA,
            "flip_chance": 0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0,
            "use_color": cfg.INPUT.MFUSER.COLOR_AUG,
            "min_class_pixels": loader.RCS_MIN_PIXELS * loader.RCS_MIN_CROP_RATIO,
            "seed": max(cfg.SEED, 0) if seed is None else seed,
        }

    def augmentations(self, rng: np.random.RandomState) -> list[Augmentation]:
        """The steps in their order, drawing from `rng`."""
        steps: list[Augmentation] = [
            RandomScale(rng, self.scale_range),
            RandomCategoryCrop(rng, self.crop_size, self.max_area),
            RandomMirror(rng, self.flip_chance),
        ]
        return [*steps, RandomColor(rng)] if self.use_color else steps

    def read(self, dataset_dict: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 BGR and labels (H, W) uint8 of a dict.

        Raises:
            FileNotFoundError, ValueError: unreadable, mismatched, wrong label values, or smaller than the crop; the
                message names the file and how to mend it.
        """
        image, labels = read_pair(dataset_dict["file_name"], dataset_dict["sem_seg_file_name"])
        if any(have < want for have, want in zip(labels.shape, self.crop_size, strict=True)):
            raise ValueError(
                f"image {dataset_dict['file_name']} is {labels.shape[0]}x{labels.shape[1]} (H x W), smaller than "
                f"INPUT.CROP.SIZE={self.crop_size}; set a smaller crop or leave the image out"
            )
        if not self._has_warned and (labels == IGNORE_LABEL).all():
            self._has_warned = True
            logger.warning("%s is ignored everywhere and teaches nothing", dataset_dict["sem_seg_file_name"])
        return image, labels

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Add `image` (3, H, W) uint8 RGB, `sem_seg` (H, W) int64, and the native `height` and `width`.

        The crop is at most crop_size: the network normalises it and pads it. Raises as `read`.
        """
        result = copy.copy(dataset_dict)
        number, rare_class = result.pop("draw_number", None), result.pop("rare_class", NO_CLASS)
        rng = item_rng(np.random.randint(2**31)) if number is None else item_rng(self.seed, 1, number)
        image, labels = self.read(result)
        tries = CROP_TRIES if rare_class != NO_CLASS and self.min_class_pixels > 0 else 1
        for _ in range(tries):
            crop = LazyAugInput(image, sem_seg=labels)
            AugmentationList(self.augmentations(rng))(crop)
            if tries == 1 or np.count_nonzero(crop.sem_seg == rare_class) > self.min_class_pixels:
                break
        result["height"], result["width"] = labels.shape
        result["image"] = _to_tensor(crop.image)
        result["sem_seg"] = torch.from_numpy(crop.sem_seg.astype(np.int64))
        return result


class TestMapper:
    """Reads an image and scales it to the test size of its data set.

    Args:
        size: (height, width) that the image has to fit into, or (0, 0) for its own size.
    """

    __test__ = False  # pytest: this is no test

    @configurable
    def __init__(self, *, size: Size) -> None:
        if len(size) != 2 or min(size) < 0 or (min(size) == 0) != (max(size) == 0):
            raise ValueError(f"test size {tuple(size)} must be (height, width) in pixels; (0, 0) is the image's own")
        self.size: Size = (int(size[0]), int(size[1]))

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str) -> dict[str, Any]:
        return {"size": test_size(cfg, dataset_name)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Add `image` (3, H', W') uint8 RGB and the native `height` and `width`.

        Raises:
            FileNotFoundError, ValueError: the image is missing or unreadable; names it.
        """
        result = copy.copy(dataset_dict)
        image = read_image(result["file_name"])
        result["height"], result["width"] = image.shape[:2]
        if self.size != NATIVE_SIZE:
            image = resize_image(image, fit_within(image.shape[:2], self.size))
        result["image"] = _to_tensor(image)
        return result


def test_size(cfg: CfgNode, dataset_name: str) -> Size:
    """The test size of a data set, (height, width) in pixels: its own key under INPUT.MFUSER.TEST_SIZE or `default`."""
    sizes = cfg.INPUT.MFUSER.TEST_SIZE
    return tuple(sizes.get(dataset_name) or sizes.default)


test_size.__test__ = False
