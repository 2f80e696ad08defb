"""Reading truth and writing predictions."""

import numpy as np
import pytest
from PIL import Image

from mfuser_d2.data.labels import COLORS
from mfuser_d2.evaluation.label_files import read_label, write_label

LABELS = np.arange(20, dtype=np.uint8).reshape(4, 5) % 19


def test_written_labels_read_back_and_show_their_colours(tmp_path) -> None:
    path = tmp_path / "city" / "a.png"
    write_label(path, LABELS, COLORS)
    np.testing.assert_array_equal(read_label(path), LABELS)
    shown = np.array(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(shown, np.array(COLORS, np.uint8)[LABELS])
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_more_than_256_classes_need_16_bits(tmp_path) -> None:
    labels = LABELS.astype(np.int64) + 290
    write_label(tmp_path / "a.png", labels)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png"), labels)


def test_colours_instead_of_labels_are_refused(tmp_path) -> None:
    Image.fromarray(np.array(COLORS, np.uint8)[LABELS]).save(tmp_path / "color.png")
    with pytest.raises(ValueError, match=r"color.png is an image of mode RGB.*trainIds"):
        read_label(tmp_path / "color.png")


def test_missing_and_truncated_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="absent.png is missing"):
        read_label(tmp_path / "absent.png")
    write_label(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 19, (64, 64)))
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.png cannot be read"):
        read_label(tmp_path / "cut.png")
