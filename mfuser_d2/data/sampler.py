"""Which image comes next: several sources mixed by weight, rare classes first. No Detectron2 here."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from mfuser_d2.data.labels import CLASSES

logger = logging.getLogger(__name__)

NO_CLASS = -1


class Draw(NamedTuple):
    """One training item.

    Args:
        index: into the concatenated sources.
        number: counts all draws of a run; with the seed it decides the item's augmentation.
        rare_class: trainId that the crop should show, or NO_CLASS.
    """

    index: int
    number: int
    rare_class: int = NO_CLASS


def rare_class_probabilities(counts: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """How often each class is drawn.

    Args:
        counts: (K,) pixels of each class over the whole source.
        temperature: of the softmax over 1 - frequency.
    Returns:
        the classes that occur, rarest first, and their probabilities.
    Raises:
        ValueError: no class occurs, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"DATALOADER.MFUSER.RCS_TEMPERATURE={temperature} must be positive")
    classes = np.flatnonzero(counts)
    if not classes.size:
        raise ValueError("no label file has a single labelled pixel; prepare the data set again")
    classes = classes[np.argsort(counts[classes], kind="stable")]
    frequency = counts[classes] / counts.sum()
    logits = (1 - frequency) / temperature
    weights = np.exp(logits - logits.max())
    return classes, weights / weights.sum()


@dataclass(frozen=True)
class RareClasses:
    """Rare-class tables of one source: classes, their probabilities, and the images that have each."""

    classes: np.ndarray
    probabilities: np.ndarray
    images: tuple[np.ndarray, ...]

    @classmethod
    def from_counts(cls, counts: np.ndarray, *, temperature: float, min_pixels: int) -> "RareClasses":
        """Build the tables.

        Args:
            counts: (images, K) pixels of each class in each image.
            temperature: see `rare_class_probabilities`.
            min_pixels: an image has a class if it has more pixels of it.
        Raises:
            ValueError: no image has enough of any class.
        """
        classes, probabilities = rare_class_probabilities(counts.sum(axis=0), temperature)
        images = [np.flatnonzero(counts[:, k] > min_pixels) for k in classes]
        is_usable = np.array([len(found) > 0 for found in images])
        if not is_usable.any():
            raise ValueError(
                f"no image has more than DATALOADER.MFUSER.RCS_MIN_PIXELS={min_pixels} pixels of any class; lower "
                "it, or set DATALOADER.MFUSER.RARE_CLASS_SAMPLING False"
            )
        if not is_usable.all():
            names = [CLASSES[k] for k in classes[~is_usable]]
            logger.warning(
                "rare-class sampling never draws %s: no image has more than RCS_MIN_PIXELS=%d pixels of it",
                ", ".join(names), min_pixels,
            )  # fmt: skip
        kept = probabilities[is_usable]
        return cls(classes[is_usable], kept / kept.sum(), tuple(found for found in images if len(found)))


class DrawSampler(Sampler[Draw]):
    """An endless stream of draws, the same for the same seed whatever the number of workers.

    Args:
        sizes: images in each source.
        weights: how often each source is drawn; empty means by size.
        rare_classes: tables of each source, or empty for plain shuffling.
        seed: of the stream.
        start: draws to leave out, for a run that resumes.
        rank, world_size: this process takes every world_size-th draw.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        weights: Sequence[float] = (),
        rare_classes: Sequence[RareClasses] = (),
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every training data set needs at least one image, got sizes {list(sizes)}")
        if weights and (len(weights) != len(sizes) or min(weights) <= 0):
            raise ValueError(
                f"DATALOADER.MFUSER.SOURCE_WEIGHTS={tuple(weights)} must give one positive number for each of the "
                f"{len(sizes)} data sets in DATASETS.TRAIN, or be empty"
            )
        if rare_classes and len(rare_classes) != len(sizes):
            raise ValueError(f"rare-class tables of {len(rare_classes)} sources for {len(sizes)} sources")
        self.sizes, self.rare_classes = list(sizes), list(rare_classes)
        self.weights = np.asarray(weights or sizes, np.float64) / np.sum(weights or sizes)
        self.is_weighted = bool(weights)
        self.seed, self.start, self.rank, self.world_size = seed, start, rank, world_size

    def __iter__(self) -> Iterator[Draw]:
        return itertools.islice(self._draws(), self.start + self.rank, None, self.world_size)

    def _draws(self) -> Iterator[Draw]:
        rng = np.random.default_rng((self.seed, 0))
        offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        if self.is_weighted or self.rare_classes:
            orders = [_shuffles(rng.spawn(1)[0], size) for size in self.sizes]
        else:
            # By size means by image: one shuffle over all of them, each seen once before any is seen twice.
            orders, offsets = [_shuffles(rng.spawn(1)[0], sum(self.sizes))], np.zeros(1, np.int64)
        for number in itertools.count():
            source = int(rng.choice(len(self.sizes), p=self.weights)) if len(orders) > 1 else 0
            if not self.rare_classes:
                yield Draw(int(offsets[source] + next(orders[source])), number)
                continue
            table = self.rare_classes[source]
            row = int(rng.choice(len(table.classes), p=table.probabilities))
            image = int(rng.choice(table.images[row]))
            yield Draw(int(offsets[source] + image), number, int(table.classes[row]))


def _shuffles(rng: np.random.Generator, size: int) -> Iterator[int]:
    while True:
        yield from rng.permutation(size).tolist()
