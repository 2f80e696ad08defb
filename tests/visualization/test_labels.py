"""Painting label maps."""

import numpy as np
import pytest

from mfuser_d2.data.labels import CLASSES, COLORS
from mfuser_d2.visualization.labels import (
    classes_present,
    draw_legend,
    overlay_labels,
    paint_errors,
    paint_labels,
)

LABELS = np.array([[0, 1, 255], [18, 40, 2]], np.uint8)
IMAGE = np.random.default_rng(0).integers(0, 256, (2, 3, 3)).astype(np.uint8)


def test_each_class_gets_its_colour_and_the_rest_the_ignored_one() -> None:
    painted = paint_labels(LABELS, COLORS, ignored=(1, 2, 3))
    assert painted.dtype == np.uint8 and painted.shape == (2, 3, 3)
    expected = [[COLORS[0], COLORS[1], (1, 2, 3)], [COLORS[18], (1, 2, 3), COLORS[2]]]
    np.testing.assert_array_equal(painted, np.array(expected))


def test_negative_labels_do_not_wrap_around() -> None:
    np.testing.assert_array_equal(paint_labels(np.array([[-1]]), COLORS), [[[0, 0, 0]]])


@pytest.mark.parametrize(("opacity", "source"), [(0.0, "image"), (1.0, "colours")])
def test_overlay_ends_at_image_and_colours(opacity, source) -> None:
    expected = IMAGE if source == "image" else paint_labels(LABELS, COLORS)
    overlaid = overlay_labels(IMAGE, LABELS, COLORS, opacity=opacity)
    has_class = LABELS < 19
    np.testing.assert_array_equal(overlaid[has_class], expected[has_class])
    np.testing.assert_array_equal(overlaid[~has_class], IMAGE[~has_class])


def test_errors_are_red_and_ignored_pixels_dark() -> None:
    image = np.full((1, 3, 3), 120, np.uint8)
    errors = paint_errors(image, np.array([[4, 4, 255]]), np.array([[4, 5, 5]])).astype(int)[0]
    right, wrong, ignored = errors
    assert np.ptp(right) == 0 and right[0] > 180
    assert wrong[0] - wrong[1] > 100
    assert np.ptp(ignored) == 0 and ignored[0] < 60


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 3\) and \(3, 2\)"):
        overlay_labels(IMAGE, LABELS.T, COLORS)


def test_legend_wraps_and_shows_every_colour() -> None:
    wide = draw_legend(CLASSES, COLORS, width=2000)
    narrow = draw_legend(CLASSES, COLORS, width=300)
    assert wide.shape[1] == 2000 and narrow.shape[1] == 300
    assert narrow.shape[0] >= 4 * wide.shape[0]
    shown = {tuple(int(c) for c in pixel) for pixel in narrow.reshape(-1, 3)}
    assert set(COLORS) <= shown
    assert draw_legend([], [], width=100).shape == (0, 100, 3)


def test_present_classes_leave_out_ignored_ones() -> None:
    assert classes_present([LABELS, np.array([[7]])], 19) == [0, 1, 2, 7, 18]
