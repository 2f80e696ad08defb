"""Label maps over pictures as Detectron2's Visualizer draws them, with a legend below or inside."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .labels import Colors, classes_present, draw_legend, overlay_labels

MAX_DRAWN_PIXELS = 1 << 23
"""Larger pictures are drawn smaller: matplotlib needs some hundred bytes per pixel."""
_MIN_DRAWN_WIDTH = 480
_MAX_GROWTH = 8
_MIN_REGIONS_EDGE = 4


def draw_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    colors: Colors,
    *,
    opacity: float = 0.6,
    has_text: bool = True,
    keeps_size: bool = False,
) -> np.ndarray:
    """Draw regions in their class's colour with outlines and names, by Detectron2's `Visualizer.draw_sem_seg`.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers; values without a class are not drawn.
        class_names, colors: K names and RGB triples, 0..255.
        opacity: 0 shows the image only, 1 the colours only.
        has_text: write the names into the regions.
        keeps_size: the result is as large as the image. Else small images are enlarged so that names can be read, and
            pictures of more than MAX_DRAWN_PIXELS are shrunk.
    Returns:
        (h, w, 3) uint8 RGB.
    """
    from detectron2.data.catalog import Metadata
    from detectron2.utils.visualizer import Visualizer

    height, width = labels.shape
    growth = 1
    if not keeps_size:
        shrink = (height * width / MAX_DRAWN_PIXELS) ** 0.5
        if shrink > 1:
            size = (max(1, round(height / shrink)), max(1, round(width / shrink)))
            image, labels = _resized(image, size, Image.Resampling.BOX), _picked(labels, size)
        growth = min(max(1, -(-_MIN_DRAWN_WIDTH // max(height, width))), _MAX_GROWTH)
    if min(labels.shape) < _MIN_REGIONS_EDGE:  # no outlines to find; Detectron2's masks refuse a width of 2
        painted = overlay_labels(image, labels, colors, opacity=opacity)
        return painted.repeat(growth, axis=0).repeat(growth, axis=1)
    metadata = Metadata(name="overlay", stuff_classes=list(class_names), stuff_colors=[list(c) for c in colors])
    visualizer = Visualizer(np.ascontiguousarray(image), metadata, scale=growth)
    # The text's background hides what is below it; in a small picture that is everything.
    is_large = min(labels.shape) * growth >= 120
    drawn = visualizer.draw_sem_seg(labels.astype(np.int64), alpha=opacity, draw_text=has_text and is_large)
    # Figures grow by a rounding pixel now and then.
    return np.ascontiguousarray(drawn.get_image()[: labels.shape[0] * growth, : labels.shape[1] * growth])


def add_legend(picture: np.ndarray, labels: Sequence[np.ndarray], class_names: Sequence[str], colors: Colors):
    """Put the classes that occur in any of the label maps below a picture: (H + legend, W or more, 3) uint8 RGB."""
    used = classes_present(labels, len(class_names))
    width = max(picture.shape[1], 240)
    legend = draw_legend([class_names[k] for k in used], [colors[k] for k in used], width=width - 16)
    canvas = np.full((picture.shape[0] + legend.shape[0] + 8, width, 3), 255, dtype=np.uint8)
    left = (width - picture.shape[1]) // 2
    canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
    canvas[picture.shape[0] + 4 : picture.shape[0] + 4 + legend.shape[0], 8 : width - 8] = legend
    return canvas


def lay_legend(picture: np.ndarray, used: Sequence[int], class_names: Sequence[str], colors: Colors) -> np.ndarray:
    """Lay the legend of the classes `used` over a picture's lower edge, half transparent; the size stays.

    A legend that would take more than a third of the height is left out.
    """
    height, width = picture.shape[:2]
    font_size = min(max(10, width // 70), 24)
    legend = draw_legend(
        [class_names[k] for k in used], [colors[k] for k in used], width=max(1, width - 8), font_size=font_size
    )
    if not len(legend) or legend.shape[0] > height // 3 or legend.shape[1] + 8 > width:
        return picture
    result = picture.copy()
    band = result[height - legend.shape[0] :]
    band[:] = band // 3 + 170
    shown = band[:, 4 : 4 + legend.shape[1]]
    shown[:] = np.where((legend > 250).all(axis=2, keepdims=True), shown, legend)
    return result


def _resized(image: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size[::-1], method))


def _picked(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]
