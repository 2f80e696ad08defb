"""The confusion picture."""

import numpy as np
import pytest
from PIL import Image

from mfuser_d2.visualization.confusion import save_confusion_picture


def _blue_cells(path) -> int:
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    return int((pixels[..., 2] - pixels[..., 0] > 90).sum())


def test_a_perfect_diagonal_is_darker_than_none(tmp_path) -> None:
    names = ["road", "sky", "car"]
    save_confusion_picture(tmp_path / "a" / "right.png", np.diag([5, 6, 7]), names, title="right")
    save_confusion_picture(tmp_path / "spread.png", np.ones((3, 3), int), names)
    assert _blue_cells(tmp_path / "a" / "right.png") > 2 * _blue_cells(tmp_path / "spread.png")


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("num_classes", [1, 19, 60])
def test_any_number_of_classes_even_without_pixels(tmp_path, num_classes) -> None:
    names = [f"class {k}" for k in range(num_classes)]
    save_confusion_picture(tmp_path / "c.png", np.zeros((num_classes, num_classes), np.int64), names)
    with Image.open(tmp_path / "c.png") as picture:
        assert min(picture.size) > 300


def test_names_must_fit_the_counts(tmp_path) -> None:
    with pytest.raises(ValueError, match="2 class names for confusion counts of shape"):
        save_confusion_picture(tmp_path / "c.png", np.eye(3), ["a", "b"])
