"""Overlays by Detectron2's Visualizer at any size, and legends."""

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from mfuser_d2.data.labels import CLASSES, COLORS  # noqa: E402
from mfuser_d2.visualization import overlay  # noqa: E402
from mfuser_d2.visualization.overlay import add_legend, draw_overlay, lay_legend  # noqa: E402


def scene(height, width):
    labels = np.full((height, width), 10)
    labels[height // 2 :] = 0
    return np.full((height, width, 3), 100, np.uint8), labels


def test_regions_take_their_colors():
    image, labels = scene(60, 90)
    drawn = draw_overlay(image, labels, CLASSES, COLORS, opacity=0.5, has_text=False, keeps_size=True)
    assert drawn.shape == (60, 90, 3)
    for row, label in ((15, 10), (45, 0)):
        wanted = (100 + np.array(COLORS[label])) / 2
        assert np.abs(drawn[row, 45].astype(float) - wanted).max() < 6


def test_pixels_without_a_class_are_not_drawn():
    image, labels = scene(60, 90)
    labels[:30] = 255
    drawn = draw_overlay(image, labels, CLASSES, COLORS, has_text=False, keeps_size=True)
    assert np.abs(drawn[10, 45].astype(int) - 100).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 2), (1, 300), (64, 96)])
def test_small_pictures_are_enlarged(size):
    image, labels = scene(*size)
    drawn = draw_overlay(image, labels, CLASSES, COLORS)
    growth = drawn.shape[0] // size[0]
    assert growth > 1 and drawn.shape == (size[0] * growth, size[1] * growth, 3)


def test_large_pictures_are_shrunk(monkeypatch):
    monkeypatch.setattr(overlay, "MAX_DRAWN_PIXELS", 200 * 300)
    drawn = draw_overlay(*scene(400, 600), CLASSES, COLORS, has_text=False)
    assert drawn.shape[0] < 400 and drawn.shape[0] * 300 == pytest.approx(200 * drawn.shape[1], rel=0.02)


def test_legend_below_names_what_is_there():
    image, labels = scene(60, 300)
    one, three = (add_legend(image, [x], CLASSES, COLORS) for x in (labels * 0, np.arange(3)[:, None]))
    assert np.array_equal(one[:60], image) and one.shape[0] > 60
    assert (three[60:] != 255).sum() > 2 * (one[60:] != 255).sum()


def test_legend_inside_keeps_the_size():
    image, _ = scene(400, 640)
    laid = lay_legend(image, range(19), CLASSES, COLORS)
    assert laid.shape == image.shape and np.array_equal(laid[:200], image[:200]) and not np.array_equal(laid, image)
    small, _ = scene(20, 30)
    assert np.array_equal(lay_legend(small, range(19), CLASSES, COLORS), small)
