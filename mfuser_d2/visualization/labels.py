"""Label maps as colours: painting, overlays, errors and the class legend. Arrays in, arrays out."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colors = Sequence[Sequence[int]]

_IGNORED = (0, 0, 0)
_WRONG = (214, 39, 40)
_TEXT = (40, 40, 40)


def paint_labels(labels: np.ndarray, colors: Colors, *, ignored: Sequence[int] = _IGNORED) -> np.ndarray:
    """Paint a label map.

    Args:
        labels: (H, W) integers; 0..K-1 get their colour, everything else `ignored`.
        colors: K RGB triples, 0..255.
        ignored: RGB of pixels without a class.
    Returns:
        (H, W, 3) uint8 RGB.
    """
    table = np.array([*colors, ignored], dtype=np.uint8)
    num_classes = len(colors)
    labels = labels.astype(np.int64, copy=False)
    return table[np.where((labels >= 0) & (labels < num_classes), labels, num_classes)]


def overlay_labels(image: np.ndarray, labels: np.ndarray, colors: Colors, *, opacity: float = 0.6) -> np.ndarray:
    """Lay the colours of a label map over its image; pixels without a class show the image alone.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers.
        colors: K RGB triples, 0..255.
        opacity: 0 shows the image only, 1 the colours only.
    Returns:
        (H, W, 3) uint8 RGB.
    """
    _check_sizes(image, labels)
    has_class = ((labels >= 0) & (labels < len(colors)))[..., None]
    blended = (1 - opacity) * image.astype(np.float32) + opacity * paint_labels(labels, colors)
    return np.where(has_class, np.rint(blended), image).astype(np.uint8)


def paint_errors(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, *, ignore_label: int = 255
) -> np.ndarray:
    """Show where a prediction is wrong: red there, the image in pale grey where it is right, darker where ignored.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) integers, `ignore_label` where nothing is counted.
        prediction: (H, W) integers.
    Returns:
        (H, W, 3) uint8 RGB.
    """
    _check_sizes(image, truth)
    _check_sizes(image, prediction)
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    right = np.broadcast_to(150 + 0.4 * grey, image.shape)
    wrong = 0.8 * np.array(_WRONG, np.float32) + 0.2 * grey
    ignored = np.broadcast_to(0.35 * grey, image.shape)
    is_wrong = (truth != prediction)[..., None]
    is_ignored = (truth == ignore_label)[..., None]
    return np.rint(np.where(is_ignored, ignored, np.where(is_wrong, wrong, right))).clip(0, 255).astype(np.uint8)


def draw_legend(
    class_names: Sequence[str], colors: Colors, *, width: int, font_size: int = 14, background: int = 255
) -> np.ndarray:
    """Draw the classes with their colours, in as many lines as `width` pixels need.

    Returns:
        (height, width, 3) uint8 RGB; height 0 where there are no classes.
    """
    font = text_font(font_size)
    swatch, gap, line = round(1.1 * font_size), round(0.5 * font_size), round(1.7 * font_size)
    places, x, y = [], 0, 0
    for name in class_names:
        needed = swatch + gap + round(font.getlength(name)) + 2 * gap
        if x and x + needed > width:
            x, y = 0, y + line
        places.append((x, y))
        x += needed
    picture = Image.new("RGB", (width, y + line if places else 0), (background,) * 3)
    draw = ImageDraw.Draw(picture)
    for (x, y), name, color in zip(places, class_names, colors, strict=True):
        top = y + (line - swatch) // 2
        box = (x, top, x + swatch - 1, top + swatch - 1)
        draw.rounded_rectangle(box, radius=3, fill=tuple(int(c) for c in color), outline=(120, 120, 120))
        draw.text((x + swatch + gap, y + line // 2), name, fill=_TEXT, font=font, anchor="lm")
    return np.array(picture)


@lru_cache(maxsize=16)
def text_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Give Pillow's own font, which needs no font file on the machine."""
    return ImageFont.load_default(size=size)


def classes_present(label_maps: Sequence[np.ndarray], num_classes: int) -> list[int]:
    """Give the classes that occur in any of the label maps, ascending."""
    found = set()
    for labels in label_maps:
        found.update(int(value) for value in np.unique(labels) if 0 <= value < num_classes)
    return sorted(found)


def _check_sizes(image: np.ndarray, labels: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[:2] != labels.shape:
        raise ValueError(f"an (H, W, 3) image and its (H, W) labels are wanted, got {image.shape} and {labels.shape}")
