"""Reads photographs of any kind as 8-bit RGB, turned upright; says which file is none and why."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 29
"""Larger pictures are refused: 512 megapixels are 1.5 GB as RGB."""


def read_photo(path: str | Path) -> np.ndarray:
    """Read a picture as people see it.

    EXIF rotation is applied, transparency laid over white, 16 bits scaled to 8, grey, palette and CMYK made RGB. Of
    an animation the first frame is taken.

    Returns:
        (H, W, 3) uint8 RGB.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, is truncated, or has more than MAX_PIXELS pixels.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, wanted a picture")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            # Pillow's limit on sizes is taken for what it is, a warning; ours is below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                _check_size(path, picture)
                return to_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        kind = "an empty file" if path.stat().st_size == 0 else "no picture that Pillow can read"
        raise ValueError(f"{path} is {kind}; give a PNG, JPEG, WebP, TIFF, ...") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path} is too large, more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); copy or download it again") from error


def _check_size(path: Path, picture: Image.Image) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"{path} has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS / 1e6:.0f} million; cut it up"
        )


def to_rgb(image: Any) -> np.ndarray:
    """Make any picture (H, W, 3) uint8 RGB.

    Args:
        image: a PIL image; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), RGB or RGBA, of bools, 8-bit or
            16-bit integers, or floats in 0..1.
    Raises:
        ValueError: another shape or type, no pixels, or floats outside 0..1.
    """
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            f"an image array is (H, W), (H, W, 3) or (H, W, 4) with at least one pixel, got {array.shape}"
            + ("; move the channels to the end" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else "")
        )
    array = _to_bytes(array)
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, axis=2)
    return _over_white(array) if array.shape[2] == 4 else np.ascontiguousarray(array)


def _from_pillow(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16"):
        return to_rgb(np.array(picture).astype(np.uint16))
    if picture.mode in ("I", "F"):
        return to_rgb(_stretch(np.array(picture)))
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        return _over_white(np.array(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def _stretch(values: np.ndarray) -> np.ndarray:
    """Integers or floats without a stated range as 0..1: 16-bit integers by their range, others by their content."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the picture holds NaN or infinity")
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return values
    if low >= 0 and high <= 65535 and np.array_equal(values, np.rint(values)):
        return values / (255 if high <= 255 else 65535)
    logger.warning("A picture without a stated range of values is stretched from %g..%g to 0..255.", low, high)
    return (values - low) / (high - low if high > low else 1.0)


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also where there are NaN
            raise ValueError(f"a float image has to lie in 0..1, got {low:g}..{high:g}; divide by 255, or give uint8")
        return np.rint(array * 255).astype(np.uint8)
    raise ValueError(f"an image array is uint8, uint16, bool or float, got {array.dtype}; convert it first")


def _over_white(rgba: np.ndarray) -> np.ndarray:
    if (rgba[..., 3] == 255).all():
        return np.ascontiguousarray(rgba[..., :3])
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
