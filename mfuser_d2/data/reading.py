"""Reads images and labels, and says which file is wrong and how to mend it."""

import contextlib
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mfuser_d2.data.labels import CLASSES, IGNORE_LABEL, invalid_labels

PathLike = str | os.PathLike[str]
MAX_PIXELS = 89_478_485
"""Larger pictures are refused before they are decoded (Pillow's own limit; about 9,459 x 9,459)."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for damaged files."""
_TAIL = 4096  # bytes at the end of a file in which its closing mark has to be


def calm_opencv() -> None:
    """Take OpenCV's threads away from this process. Call it before forking workers that use OpenCV.

    A forked child inherits the pool but not its threads, and would wait for them for ever; and one thread for each
    worker is what a loader wants anyway.
    """
    cv2.setNumThreads(0)


def _read(path: PathLike, flags: int, kind: str) -> np.ndarray:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        problem = f"{kind} {path} cannot be opened ({error.strerror}); check the data set's folder"
        raise FileNotFoundError(problem) from error
    if content.size and not _has_end(content[-_TAIL:].tobytes(), Path(path).suffix.lower()):
        raise ValueError(f"{kind} {path} is truncated ({content.size} bytes); unpack or download it again")
    array = None
    if content.size:
        _read_header(path, kind)
        with contextlib.suppress(cv2.error):  # what it cannot decode is None or an error
            array = cv2.imdecode(content, flags)
    if array is None:
        raise ValueError(f"{kind} {path} cannot be decoded ({content.size} bytes); unpack or download it again")
    return array


def _read_header(path: PathLike, kind: str) -> tuple[int, int]:
    """(height, width) of a picture that is not too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            with Image.open(path) as picture:
                width, height = picture.size
    except UNREADABLE as error:
        raise ValueError(f"{kind} {path} cannot be decoded ({error}); unpack or download it again") from error
    check_pixels(path, height, width, kind)
    return height, width


def check_pixels(path: PathLike, height: int, width: int, kind: str = "image") -> None:
    """Raise ValueError for a picture of more than MAX_PIXELS, whose decoding could take all memory."""
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{kind} {path} says it is {height}x{width} (H x W), more than {MAX_PIXELS:,} pixels, and is not decoded; "
            "make it smaller or leave it out"
        )


def _has_end(tail: bytes, suffix: str) -> bool:
    """Whether a PNG or JPEG has its closing mark: OpenCV fills what is missing with grey and says nothing."""
    mark = {".png": b"IEND", ".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9"}.get(suffix, b"")
    return mark in tail


def read_image(path: PathLike) -> np.ndarray:
    """The picture in a file, (H, W, 3) uint8 BGR as OpenCV reads it, not turned by EXIF.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no picture.
    """
    return _read(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, "image")


def read_ids(path: PathLike) -> np.ndarray:
    """The values of a label file as they are stored, with its own depth and channels (BGR order).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no picture.
    """
    return _read(path, cv2.IMREAD_UNCHANGED, "label file")


def read_size(path: PathLike) -> tuple[int, int]:
    """(height, width) of an image from its header, after a look at its end: a truncated file is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no picture.
    """
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.path.getsize(path) - _TAIL))
            tail = stream.read()
        if not _has_end(tail, Path(path).suffix.lower()):
            raise ValueError(f"image {path} is truncated; unpack or download it again")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} is missing; unpack the image archive again") from None
    except OSError as error:
        raise ValueError(f"image {path} cannot be read ({error}); unpack or download it again") from error
    return _read_header(path, "image")


def read_labels(path: PathLike) -> np.ndarray:
    """The trainIds in a PNG, (H, W) uint8: 0 to 18 and 255.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, in colour, or with values that are no trainId.
    """
    labels = read_ids(path)
    if labels.ndim != 2:
        raise ValueError(
            f"label file {path} is a colour picture {labels.shape}; one channel of trainIds is wanted: use the id "
            "files, not the colour ones, and run the datasets/prepare_*.py program of the data set"
        )
    wrong = invalid_labels(labels)
    if wrong:
        raise ValueError(
            f"label file {path} holds {wrong[:8]}{'...' if len(wrong) > 8 else ''}, wanted 0 to {len(CLASSES) - 1} and "
            f"{IGNORE_LABEL}: these look like the publisher's ids; run datasets/prepare_*.py of the data set"
        )
    return labels.astype(np.uint8, copy=False)


def check_pair(image: np.ndarray, labels: np.ndarray, image_path: PathLike, label_path: PathLike) -> None:
    """Raise ValueError unless an image and its labels have the same height and width."""
    if image.shape[:2] != labels.shape[:2]:
        raise ValueError(
            f"image {image_path} is {image.shape[0]}x{image.shape[1]} (H x W) but its labels {label_path} are "
            f"{labels.shape[0]}x{labels.shape[1]}; they do not belong together: leave the pair out or prepare the data "
            "set again"
        )


def read_pair(image_path: PathLike, label_path: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """`read_image` and `read_labels` of two files that belong together."""
    image, labels = read_image(image_path), read_labels(label_path)
    check_pair(image, labels, image_path, label_path)
    return image, labels
