"""Pictures: label overlays and panels, confusion matrices, feature views. Needs neither Detectron2 nor `core`."""

from .confusion import save_confusion_picture
from .labels import draw_legend, overlay_labels, paint_errors, paint_labels
from .panels import PanelRow, draw_panels, save_panels

__all__ = [
    "PanelRow",
    "draw_legend",
    "draw_panels",
    "overlay_labels",
    "paint_errors",
    "paint_labels",
    "save_confusion_picture",
    "save_panels",
]
