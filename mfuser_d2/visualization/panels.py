"""Side-by-side pictures: one row per image with image, truth, prediction and, if asked, the errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .labels import Colors, classes_present, draw_legend, paint_errors, paint_labels, text_font

_GAP = 10
_TEXT = (40, 40, 40)
_FAINT = (110, 110, 110)
_EMPTY = (235, 235, 235)


@dataclass(frozen=True)
class PanelRow:
    """One image of a picture.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) trainIds, or None where it is unknown.
        prediction: (H, W) trainIds, or None.
        caption: printed above the row, such as the domain and the image's IoU.
    """

    image: np.ndarray
    truth: np.ndarray | None = None
    prediction: np.ndarray | None = None
    caption: str = ""


def draw_panels(
    rows: Sequence[PanelRow],
    class_names: Sequence[str],
    colors: Colors,
    *,
    panel_width: int = 384,
    has_errors: bool = False,
    ignore_label: int = 255,
) -> np.ndarray:
    """Draw rows of (image, truth, prediction) with column heads and a legend of the classes that occur.

    Args:
        rows: what to show, top to bottom; sizes may differ.
        class_names: K names.
        colors: K RGB triples, 0..255.
        panel_width: pixels of each panel; heights follow from each image's aspect.
        has_errors: adds a fourth column, red where the prediction is wrong.
        ignore_label: the value of a truth without a class.
    Returns:
        (height, width, 3) uint8 RGB.
    Raises:
        ValueError: there is no row, or an image and its labels differ in size.
    """
    if not rows:
        raise ValueError("no rows to draw; give at least one PanelRow")
    heads = ["image", "truth", "prediction"] + (["errors"] if has_errors else [])
    painted = [_paint_row(row, colors, has_errors, ignore_label) for row in rows]
    grid = draw_grid(painted, heads=heads, captions=[row.caption for row in rows], panel_width=panel_width)
    return np.concatenate([grid, _draw_footer(rows, class_names, colors, grid.shape[1])], axis=0)


def draw_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    heads: Sequence[str],
    captions: Sequence[str] | None = None,
    panel_width: int = 384,
) -> np.ndarray:
    """Lay pictures out in rows and columns on white.

    Args:
        rows: (H, W, 3) uint8 RGB pictures; None leaves a grey place. The first of a row sets the row's aspect.
        heads: printed above the columns.
        captions: printed above each row.
        panel_width: pixels of each panel.
    Returns:
        (height, width, 3) uint8 RGB.
    """
    width = len(heads) * (panel_width + _GAP) + _GAP
    blocks = [_draw_heads(heads, panel_width, width)]
    for row, caption in zip(rows, captions or [""] * len(rows), strict=True):
        blocks.append(_join_row(row, caption, panel_width, width))
    return np.concatenate(blocks, axis=0)


def save_panels(
    path: str | Path, rows: Sequence[PanelRow], class_names: Sequence[str], colors: Colors, **options: int | bool
) -> None:
    """Save the picture of `draw_panels`, which takes the same arguments; the suffix chooses the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_panels(rows, class_names, colors, **options)).save(path)


def _paint_row(row: PanelRow, colors: Colors, has_errors: bool, ignore_label: int) -> list[np.ndarray | None]:
    size = row.image.shape[:2]
    for name, labels in (("truth", row.truth), ("prediction", row.prediction)):
        if labels is not None and labels.shape != size:
            raise ValueError(f"panel {row.caption!r}: image is {size} but its {name} is {labels.shape}")
    painted = [None if labels is None else paint_labels(labels, colors) for labels in (row.truth, row.prediction)]
    panels = [row.image, *painted]
    if has_errors:
        is_known = row.truth is not None and row.prediction is not None
        panels.append(
            paint_errors(row.image, row.truth, row.prediction, ignore_label=ignore_label) if is_known else None
        )
    return panels


def _join_row(panels: Sequence[np.ndarray | None], caption: str, panel_width: int, width: int) -> np.ndarray:
    height = max(1, round(panels[0].shape[0] * panel_width / panels[0].shape[1]))
    top = 24 if caption else 0
    canvas = Image.new("RGB", (width, top + height + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    if caption:
        draw.text((_GAP, 12), caption, fill=_FAINT, font=text_font(14), anchor="lm")
    for column, panel in enumerate(panels):
        corner = (_GAP + column * (panel_width + _GAP), top)
        if panel is None:
            draw.rectangle((*corner, corner[0] + panel_width - 1, corner[1] + height - 1), fill=_EMPTY)
            continue
        # Labels keep their pure colours when they grow; a shrunk map is averaged, which reads better than gaps.
        is_growing = panel.shape[1] < panel_width
        smooth = Image.Resampling.BICUBIC if column == 0 else Image.Resampling.NEAREST
        method = smooth if is_growing else Image.Resampling.BOX
        canvas.paste(Image.fromarray(panel).resize((panel_width, height), method), corner)
    return np.array(canvas)


def _draw_heads(heads: Sequence[str], panel_width: int, width: int) -> np.ndarray:
    canvas = Image.new("RGB", (width, 34), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        center = _GAP + column * (panel_width + _GAP) + panel_width // 2
        draw.text((center, 18), head, fill=_TEXT, font=text_font(17), anchor="mm")
    return np.array(canvas)


def _draw_footer(rows: Sequence[PanelRow], class_names: Sequence[str], colors: Colors, width: int) -> np.ndarray:
    label_maps = [labels for row in rows for labels in (row.truth, row.prediction) if labels is not None]
    used = classes_present(label_maps, len(class_names))
    legend = draw_legend([class_names[k] for k in used], [colors[k] for k in used], width=width - 2 * _GAP)
    canvas = np.full((legend.shape[0] + _GAP, width, 3), 255, dtype=np.uint8)
    canvas[: legend.shape[0], _GAP : width - _GAP] = legend
    return canvas
