"""The 19 Cityscapes classes, their colours and how each data set's publisher numbers them.

Nothing else in the package knows a class id, name or colour. Every label file that the network sees holds
trainIds: uint8, 0 to 18, and 255 where a pixel counts neither in the loss nor in the metric.
"""

from collections.abc import Mapping

import numpy as np

IGNORE_LABEL = 255

CLASSES: tuple[str, ...] = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""Class names in trainId order."""

COLORS: tuple[tuple[int, int, int], ...] = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
"""RGB, 0 to 255, in trainId order."""

NUM_CLASSES = len(CLASSES)

CITYSCAPES_IDS: dict[int, int] = dict(
    zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(NUM_CLASSES), strict=True)
)
"""Cityscapes label id -> trainId."""

GTA5_IDS = CITYSCAPES_IDS
"""GTAV's palette indices are Cityscapes label ids."""

SYNTHIA_IDS: dict[int, int] = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15,
    20: 16, 12: 17, 11: 18,
}  # fmt: skip
"""SYNTHIA-RAND-CITYSCAPES class id -> trainId."""

SYNTHIA_ABSENT: tuple[str, ...] = ("terrain", "truck", "train")
"""Classes without a pixel in SYNTHIA: a model trained on it is scored on the other 16."""

SYNTHIA_13_ABSENT: tuple[str, ...] = (*SYNTHIA_ABSENT, "wall", "fence", "pole")
"""Classes left out by papers that report SYNTHIA's 13-class mean."""

_MAPILLARY_COMMON: dict[int, int] = {
    17: 2, 6: 3, 3: 4, 48: 6, 30: 8, 29: 9, 27: 10, 19: 11, 20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16,
    57: 17, 52: 18,
}  # fmt: skip


def _with_common(own: Mapping[int, tuple[int, ...]]) -> dict[int, int]:
    return _MAPILLARY_COMMON | {source: train_id for train_id, sources in own.items() for source in sources}


MAPILLARY_IDS: dict[str, dict[int, int]] = {
    "openseg": _with_common({0: (7, 8, 10, 13, 14, 23, 24), 1: (2, 9, 11, 15), 5: (44, 45, 47), 7: (46, 49, 50)}),
    "robustnet": _with_common({0: (13, 24, 41), 1: (2, 15), 5: (45, 47), 7: (50,)}),
}
"""Mapillary Vistas v1.2 palette index -> trainId, in the two mappings that circulate."""

MAPILLARY_NUM_IDS = 66

TRAIN_IDS: dict[int, int] = {i: i for i in range(NUM_CLASSES)}
"""The identity: files that hold trainIds already (BDD100K masks, ACDC)."""


def class_id(name: str) -> int:
    """The trainId of a class name.

    Raises:
        KeyError: no such class; the message lists them.
    """
    try:
        return CLASSES.index(name)
    except ValueError:
        raise KeyError(f"class {name!r} is unknown; choose from {list(CLASSES)}") from None


def palette() -> np.ndarray:
    """Colours as a lookup table: (256, 3) uint8 RGB, black where there is no class."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:NUM_CLASSES] = COLORS
    return table


def colorize(labels: np.ndarray) -> np.ndarray:
    """A picture of a label map.

    Args:
        labels: (H, W) trainIds.
    Returns:
        (H, W, 3) uint8 RGB; ignored pixels are black.
    """
    return palette()[labels.astype(np.uint8, copy=False)]


def lookup_table(ids: Mapping[int, int], size: int = 65536) -> np.ndarray:
    """A table from publisher id to trainId: (size,) uint8, IGNORE_LABEL where `ids` has no entry."""
    table = np.full(size, IGNORE_LABEL, dtype=np.uint8)
    table[list(ids)] = list(ids.values())
    return table


def to_train_ids(ids: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """Translate a publisher's ids.

    Args:
        ids: (H, W) uint8 or uint16.
        mapping: publisher id -> trainId; ids it does not name become IGNORE_LABEL.
    Returns:
        (H, W) uint8 trainIds.
    Raises:
        ValueError: `ids` is not a two-dimensional array of unsigned integers.
    """
    if ids.ndim != 2 or ids.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"label ids must be (H, W) uint8 or uint16, got {ids.shape} {ids.dtype}")
    return lookup_table(mapping, 256 if ids.dtype == np.uint8 else 65536)[ids]


def invalid_labels(labels: np.ndarray) -> list[int]:
    """The values of a label map that are neither a trainId nor IGNORE_LABEL, ascending."""
    if labels.dtype == np.uint8:
        counts = np.bincount(labels.ravel(), minlength=256)
        found = np.flatnonzero(counts)
    else:
        found = np.unique(labels)
    return [int(v) for v in found if not (0 <= v < NUM_CLASSES or v == IGNORE_LABEL)]
