"""How many pixels of each class each label file has, counted once and kept beside the files."""

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mfuser_d2.data.labels import NUM_CLASSES
from mfuser_d2.data.reading import PathLike, read_labels

logger = logging.getLogger(__name__)


def count_classes(path: PathLike) -> np.ndarray:
    """Pixels of each class in a label file, (19,) int64; ignored pixels are left out."""
    return np.bincount(read_labels(path).ravel(), minlength=256)[:NUM_CLASSES]


def _cache_path(paths: Sequence[Path]) -> Path:
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    names = "\n".join(str(path.relative_to(folder)) for path in paths)
    return folder / f".class_counts_{hashlib.sha256(names.encode()).hexdigest()[:16]}.npz"


def _stamps(paths: Sequence[Path]) -> np.ndarray:
    """(files, 2) int64: size in bytes and time of change; a changed file is counted again."""
    states = [path.stat() for path in paths]
    return np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64)


def class_counts(label_paths: Sequence[PathLike]) -> np.ndarray:
    """Pixels of each class in each label file.

    The counts are kept in a hidden file beside the labels, keyed to the names, sizes and times of the files: only new
    and changed ones are counted. Where that folder cannot be written they are counted in each run, which is logged.

    Args:
        label_paths: trainId files.
    Returns:
        (files, 19) int64.
    Raises:
        FileNotFoundError, ValueError: a label file is missing, truncated or no trainIds; names it.
    """
    paths = [Path(path).absolute() for path in label_paths]
    if not paths:
        raise ValueError("there are no label files to count; prepare the data set again")
    cache, stamps = _cache_path(paths), _stamps(paths)
    counts = np.zeros((len(paths), NUM_CLASSES), np.int64)
    todo = np.ones(len(paths), bool)
    try:
        with np.load(cache) as kept:
            if kept["counts"].shape == counts.shape and kept["stamps"].shape == stamps.shape:
                todo = (kept["stamps"] != stamps).any(axis=1)
                counts[:] = kept["counts"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s cannot be read (%s); counting again", cache, error)
    indices = np.flatnonzero(todo)
    if not len(indices):
        return counts
    logger.info("counting the classes of %d label files (kept in %s)", len(indices), cache)
    # OpenCV and numpy let go of the interpreter lock while they decode and count.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for index, row in zip(indices, pool.map(count_classes, [paths[i] for i in indices]), strict=True):
            counts[index] = row
    _keep(cache, counts, stamps)
    return counts


def _keep(cache: Path, counts: np.ndarray, stamps: np.ndarray) -> None:
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            np.savez_compressed(stream, counts=counts, stamps=stamps)
        os.replace(part, cache)
    except OSError as error:
        part.unlink(missing_ok=True)
        logger.warning("class counts cannot be kept in %s (%s); they are counted in each run", cache, error.strerror)
