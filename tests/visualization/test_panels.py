"""Side-by-side pictures."""

import numpy as np
import pytest
from PIL import Image

from mfuser_d2.data.labels import CLASSES, COLORS
from mfuser_d2.visualization.panels import PanelRow, draw_grid, draw_panels, save_panels


def _row(size: tuple[int, int], seed: int, **parts) -> PanelRow:
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (*size, 3)).astype(np.uint8)
    truth = np.zeros(size, np.uint8)
    truth[:, size[1] // 2 :] = 8
    return PanelRow(**{"image": image, "truth": truth, "prediction": np.full_like(truth, 13), **parts})


def _count(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == np.array(color, np.uint8)).all(axis=-1).sum())


def test_each_panel_covers_its_share() -> None:
    picture = draw_panels([_row((20, 40), 0)], CLASSES, COLORS, panel_width=100)
    assert picture.shape[1] == 3 * 110 + 10
    assert _count(picture, COLORS[13]) >= 100 * 50
    assert abs(_count(picture, COLORS[0]) - 50 * 50) < 600  # the panel's half and a legend swatch
    assert _count(picture, COLORS[18]) == 0


def test_errors_add_a_column_and_captions_a_line() -> None:
    plain = draw_panels([_row((20, 40), 0)], CLASSES, COLORS, panel_width=100)
    more = draw_panels([_row((20, 40), 0, caption="night")], CLASSES, COLORS, panel_width=100, has_errors=True)
    assert more.shape[1] == plain.shape[1] + 110
    assert more.shape[0] > plain.shape[0]


def test_sizes_may_differ_and_labels_may_be_unknown() -> None:
    rows = [_row((30, 20), 1), _row((7, 200), 2, truth=None), _row((5, 5), 3, truth=None, prediction=None)]
    picture = draw_panels(rows, CLASSES, COLORS, panel_width=60, has_errors=True)
    assert picture.dtype == np.uint8 and picture.shape[0] > 90 + 2 + 60


def test_saved_picture_is_the_drawn_one(tmp_path) -> None:
    rows = [_row((10, 12), 4, caption="a · b")]
    save_panels(tmp_path / "new" / "p.png", rows, CLASSES, COLORS, panel_width=50)
    stored = np.array(Image.open(tmp_path / "new" / "p.png"))
    np.testing.assert_array_equal(stored, draw_panels(rows, CLASSES, COLORS, panel_width=50))


def test_bad_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_panels([], CLASSES, COLORS)
    with pytest.raises(ValueError, match=r"panel 'x': image is \(4, 6\) but its prediction is \(6, 4\)"):
        draw_panels([_row((4, 6), 0, prediction=np.zeros((6, 4), int), caption="x")], CLASSES, COLORS)


def test_grid_places_every_picture() -> None:
    colors = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    pictures = [np.full((10, 20, 3), color, np.uint8) for color in colors]
    grid = draw_grid([pictures[:2], [pictures[2], None]], heads=["a", "b"], captions=["one", ""], panel_width=40)
    assert grid.shape[1] == 2 * 50 + 10
    assert [_count(grid, color) for color in colors] == [40 * 20] * 3
    with pytest.raises(ValueError):
        draw_grid([pictures[:2]], heads=["a", "b"], captions=["one", "two"])
