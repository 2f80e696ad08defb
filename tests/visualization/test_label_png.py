"""Label files hold class numbers and look like their colours."""

import numpy as np
from PIL import Image

from mfuser_d2.data.labels import COLORS
from mfuser_d2.visualization.label_png import save_label_png


def test_values_are_class_numbers_and_the_palette_their_colors(tmp_path):
    labels = np.array([[0, 18], [5, 255]], dtype=np.uint8)
    assert save_label_png(tmp_path / "a.png", labels, COLORS) == [tmp_path / "a.png"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P" and np.array_equal(np.array(picture), labels)
        assert np.array_equal(np.array(picture.convert("RGB"))[0], [COLORS[0], COLORS[18]])


def test_many_classes_take_16_bits(tmp_path):
    labels = np.array([[0, 299]], dtype=np.uint16)
    colors = [(i % 256, i // 256, 7) for i in range(300)]
    paths = save_label_png(tmp_path / "a.png", labels, colors)
    assert np.array_equal(np.array(Image.open(paths[0])), labels)
    assert np.array_equal(np.array(Image.open(paths[1])), [[colors[0], colors[299]]])
