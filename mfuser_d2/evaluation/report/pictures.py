"""Images of an evaluation as data URIs, so that the page needs no other file."""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mfuser_d2.data.reading import check_pixels
from mfuser_d2.evaluation.label_files import read_label

logger = logging.getLogger(__name__)

_RIGHT, _WRONG, _IGNORED = (0, 0, 0, 0), (226, 35, 46, 235), (0, 0, 0, 170)


@dataclass(frozen=True)
class Pictures:
    """One image's layers as data URIs of equal size.

    Attributes:
        size: (height, width) in pixels of all layers.
        image: the photograph, JPEG.
        truth: the true classes' colours, PNG, transparent where ignored.
        prediction: the predicted classes' colours, PNG.
        errors: PNG, red where wrong, dark where ignored, transparent where right.
    """

    size: tuple[int, int]
    image: str
    truth: str
    prediction: str
    errors: str


def embed_pictures(
    record: Mapping[str, Any],
    folder: Path,
    colors: Sequence[Sequence[int]],
    *,
    ignore_label: int = 255,
    max_width: int = 800,
) -> Pictures | None:
    """Read an image, its truth and its prediction, shrink them to `max_width` and encode them.

    Args:
        record: a line of images.jsonl.
        folder: the target's folder, which the record's prediction is relative to.
        colors: K RGB triples, 0..255.
    Returns:
        The layers, or None where no prediction was saved or a file cannot be read; the log says which.
    """
    if not record.get("prediction"):
        return None
    try:
        with Image.open(record["image"]) as file:
            check_pixels(record["image"], file.height, file.width)
            photo = ImageOps.exif_transpose(file).convert("RGB")
        truth = read_label(record["label"])
        prediction = read_label(folder / record["prediction"])
    except (OSError, ValueError) as error:
        logger.warning("the report leaves out %s: %s", record.get("image"), error)
        return None
    width = min(max_width, truth.shape[1])
    size = (max(1, round(truth.shape[0] * width / truth.shape[1])), width)
    photo = photo.resize(size[::-1], Image.Resampling.LANCZOS, reducing_gap=3.0)
    truth, prediction = shrink_labels(truth, size), shrink_labels(prediction, size)
    errors = np.where(truth == ignore_label, 2, truth != prediction).astype(np.uint8)
    truth[truth == ignore_label] = len(colors)
    opaque = [(*color, 255) for color in colors]
    return Pictures(
        size=size,
        image=_data_uri(photo, "JPEG", quality=82, optimize=True),
        truth=_palette_uri(truth, opaque),
        prediction=_palette_uri(prediction, opaque),
        errors=_palette_uri(errors, [_RIGHT, _WRONG, _IGNORED]),
    )


def shrink_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Take the label at the middle of each cell of a (height, width) grid laid over the map; int64."""
    rows = ((np.arange(size[0]) + 0.5) * labels.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * labels.shape[1] / size[1]).astype(np.int64)
    return labels[np.ix_(rows, columns)].astype(np.int64)


def _palette_uri(labels: np.ndarray, colors: Sequence[Sequence[int]]) -> str:
    """Encode a label map with RGBA colours; a label without a colour is transparent."""
    table = np.array([*colors, (0, 0, 0, 0)], dtype=np.uint8)
    indices = np.minimum(labels, len(colors))
    if len(table) > 256:
        return _data_uri(Image.fromarray(table[indices]), "PNG", optimize=True)
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(table[:, :3].tobytes())
    return _data_uri(image, "PNG", optimize=True, transparency=table[:, 3].tobytes())


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
