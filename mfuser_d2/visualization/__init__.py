"""Pictures: label overlays and panels, confusion matrices, feature views. Needs neither Detectron2 nor `core`."""

from .confusion import save_confusion_picture
from .features import (
    PrincipalAxes,
    common_range,
    draw_color_bar,
    fit_principal_axes,
    paint_components,
    paint_features,
    paint_heat,
    text_similarity,
)
from .labels import draw_legend, overlay_labels, paint_errors, paint_labels
from .panels import PanelRow, draw_grid, draw_panels, save_panels

__all__ = [
    "PanelRow",
    "PrincipalAxes",
    "common_range",
    "draw_color_bar",
    "draw_grid",
    "draw_legend",
    "draw_panels",
    "fit_principal_axes",
    "overlay_labels",
    "paint_components",
    "paint_errors",
    "paint_features",
    "paint_heat",
    "paint_labels",
    "save_confusion_picture",
    "save_panels",
    "text_similarity",
]
