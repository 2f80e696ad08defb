"""Label maps as PNG files that hold the class numbers and look like their colours."""

from pathlib import Path

import numpy as np
from PIL import Image

from .labels import Colors, paint_labels


def save_label_png(path: Path, labels: np.ndarray, colors: Colors) -> list[Path]:
    """Write a label map.

    Args:
        path: where to, ending in .png.
        labels: (H, W); uint8 gives a palette PNG: its values are the class numbers (trainIds), a viewer shows the
            colours. uint16 gives a 16-bit grey PNG of the numbers, and a picture of the colours beside it
            (`*_colors.png`), as PNG palettes end at 256.
        colors: K RGB triples.
    Returns:
        the files written.
    """
    if labels.dtype == np.uint8:
        picture = Image.frombytes("P", labels.shape[::-1], np.ascontiguousarray(labels).tobytes())
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: len(colors)] = colors
        picture.putpalette(table.tobytes())
        picture.save(path)
        return [path]
    Image.fromarray(np.ascontiguousarray(labels.astype(np.uint16))).save(path)
    painted = path.with_name(f"{path.stem}_colors.png")
    Image.fromarray(paint_labels(labels, colors)).save(painted)
    return [path, painted]
