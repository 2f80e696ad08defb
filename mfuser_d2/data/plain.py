"""Loaders for a plain PyTorch loop: the same files, augmentation and dicts as the Detectron2 mappers, without it.

Rare-class sampling and several sources belong to the Detectron2 loaders in `build.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mfuser_d2.data.augmentation import Size, augment, fit_within, item_rng, resize_image
from mfuser_d2.data.layouts import list_pairs
from mfuser_d2.data.reading import calm_opencv, read_pair
from mfuser_d2.data.sampler import Draw, DrawSampler

Item = dict[str, Any]


def _item(image_bgr: np.ndarray, labels: np.ndarray) -> Item:
    rgb = np.ascontiguousarray(image_bgr[..., ::-1].transpose(2, 0, 1))
    return {"image": torch.from_numpy(rgb), "sem_seg": torch.from_numpy(labels.astype(np.int64))}


class TrainItems(Dataset[Item]):
    """Augmented crops of a data set, one for each `Draw`.

    Args:
        name: of the data set, a key of `layouts.LAYOUTS`.
        crop_size: (height, width), pixels.
        seed: of the augmentation.
        scale_range: factors of the native size.
        use_color: with photometric distortion.
        root: the folder above all data sets; None means $DETECTRON2_DATASETS.
    """

    def __init__(
        self,
        *,
        name: str,
        crop_size: Size,
        seed: int = 0,
        scale_range: tuple[float, float] = (0.5, 2.0),
        use_color: bool = True,
        root: str | Path | None = None,
    ) -> None:
        self.pairs = list_pairs(name, root)
        self.crop_size, self.seed = tuple(crop_size), seed
        self.scale_range, self.use_color = scale_range, use_color

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, draw: Draw) -> Item:
        """`image` (3, h, w) uint8 RGB and `sem_seg` (h, w) int64, at most crop_size, and the files they are from."""
        image_path, label_path = self.pairs[draw.index]
        image, labels = read_pair(image_path, label_path)
        crop = augment(
            image,
            labels,
            item_rng(self.seed, 1, draw.number),
            crop_size=self.crop_size,
            scale_range=self.scale_range,
            use_color=self.use_color,
        )
        return {**_item(*crop), "file_name": str(image_path), "sem_seg_file_name": str(label_path)}


def train_loader(items: TrainItems, *, batch_size: int, num_workers: int = 0) -> DataLoader[list[Item]]:
    """An endless loader of lists of items; the items follow from their seed, not from the number of workers."""
    calm_opencv()
    sampler = DrawSampler(sizes=[len(items)], seed=items.seed)
    return DataLoader(items, batch_size=batch_size, sampler=sampler, num_workers=num_workers, collate_fn=list)


def test_items(name: str, size: Size = (0, 0)) -> Iterator[Item]:
    """The images of a data set in order, for evaluation.

    Args:
        name: of the data set.
        size: (height, width) that images are scaled to fit into; (0, 0) leaves them as they are.
    Yields:
        `image` (3, H', W') uint8 RGB, `sem_seg` (H, W) int64 at native size, `height`, `width`, `file_name`.
    """
    for image_path, label_path in list_pairs(name):
        image, labels = read_pair(image_path, label_path)
        if size != (0, 0):
            image = resize_image(image, fit_within(image.shape[:2], size))
        item = _item(image, labels)
        yield {**item, "height": labels.shape[0], "width": labels.shape[1], "file_name": str(image_path)}


test_items.__test__ = False  # pytest: this is no test
