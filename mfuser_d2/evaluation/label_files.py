"""Label maps on disk: reading trainId PNGs and writing predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mfuser_d2.data.reading import UNREADABLE, check_pixels

_ONE_CHANNEL_MODES = ("L", "P", "I", "I;16", "I;16B", "I;16L", "1")


def read_label(path: str | Path) -> np.ndarray:
    """Read a label PNG as (H, W) integers: a palette image gives its indices, not its colours.

    Raises:
        ValueError: the file is unreadable, or holds colours where ids belong.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _ONE_CHANNEL_MODES:
                raise ValueError(
                    f"{path} is an image of mode {image.mode}, wanted one channel of trainIds; run the data set's "
                    "datasets/prepare_<name>.py, and point at its labels, not at a colour map"
                )
            check_pixels(path, image.height, image.width, "label")
            return np.array(image)
    except FileNotFoundError as error:
        raise ValueError(f"label {path} is missing; run the data set's datasets/prepare_<name>.py") from error
    except UNREADABLE as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"label {path} cannot be read ({error}); is it truncated? Prepare it again") from error


def write_label(path: str | Path, labels: np.ndarray, colors: Sequence[Sequence[int]] | None = None) -> None:
    """Write (H, W) labels as a PNG whose pixel values are the labels.

    Up to 256 classes give an 8-bit image, shown in `colors` (K RGB triples, 0..255) by every viewer where given;
    more classes give a 16-bit one. The file appears in one step.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if labels.size and labels.max() > 255:
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        image = Image.fromarray(labels.astype(np.uint8))
        if colors is not None:
            image.putpalette([int(value) for color in colors for value in color])
    unfinished = path.with_name(f".{path.name}.part")
    image.save(unfinished, format="PNG")
    unfinished.replace(path)
