"""The confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MAX_CLASSES_WITH_NUMBERS = 30


def save_confusion_picture(
    path: str | Path, counts: np.ndarray, class_names: Sequence[str], *, title: str = ""
) -> None:
    """Draw confusion counts, each row in percent of its true class's pixels, and save the picture.

    Args:
        path: where to save; the suffix chooses the format (PNG, SVG, PDF).
        counts: (K, K), row = true class, column = predicted class. A row without pixels stays grey.
        class_names: K names.
        title: shown above.
    """
    # The object interface draws without a display and leaves the caller's pyplot state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(f"{num_classes} class names for confusion counts of shape {counts.shape}")
    totals = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)

    side = min(max(4.5, 0.42 * num_classes + 2.2), 40)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(num_classes), class_names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num_classes), class_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    axes.set_title(title or "confusion")
    axes.set_xticks(np.arange(-0.5, num_classes), minor=True)
    axes.set_yticks(np.arange(-0.5, num_classes), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if num_classes <= _MAX_CLASSES_WITH_NUMBERS:
        _write_numbers(axes, percent)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("% of the true class's pixels")
    bar.outline.set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)


def _write_numbers(axes, percent: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(percent >= 0.5), strict=True):
        value = percent[row, column]
        axes.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 55 else "0.15"
        )
