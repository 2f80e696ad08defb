"""Images inside the page."""

import base64
import io
import os

import numpy as np
import pytest
from PIL import Image

from mfuser_d2.data.labels import COLORS
from mfuser_d2.evaluation.label_files import write_label
from mfuser_d2.evaluation.report.pictures import embed_pictures, shrink_labels

SIZE = (20, 30)


def _decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


@pytest.fixture
def record(tmp_path) -> dict:
    truth = np.zeros(SIZE, np.uint8)
    truth[:, 10:] = 13
    truth[:5] = 255
    prediction = np.where(np.arange(SIZE[1]) < 20, np.minimum(truth, 18), 14).astype(np.uint8)
    write_label(tmp_path / "label.png", truth)
    write_label(tmp_path / "target" / "predictions" / "a.png", prediction)
    Image.new("RGB", SIZE[::-1], (200, 100, 50)).save(tmp_path / "a.png")
    return {
        "image": str(tmp_path / "a.png"),
        "label": str(tmp_path / "label.png"),
        "prediction": "predictions/a.png",
        "mIoU": 50.0,
    }


def test_layers_show_truth_prediction_and_errors(record, tmp_path) -> None:
    pictures = embed_pictures(record, tmp_path / "target", COLORS)
    assert pictures.size == SIZE
    truth = np.array(_decode(pictures.truth).convert("RGBA"))
    assert tuple(truth[10, 2]) == (*COLORS[0], 255) and tuple(truth[10, 12]) == (*COLORS[13], 255)
    assert truth[2, 2, 3] == 0
    prediction = np.array(_decode(pictures.prediction).convert("RGBA"))
    assert tuple(prediction[10, 25]) == (*COLORS[14], 255) and tuple(prediction[2, 2]) == (*COLORS[18], 255)
    errors = np.array(_decode(pictures.errors).convert("RGBA"))
    assert errors[10, 12, 3] == 0
    assert errors[10, 25, 0] > 200 and errors[10, 25, 3] > 200
    assert errors[2, 25, :3].sum() == 0 and errors[2, 25, 3] > 100
    photo = np.array(_decode(pictures.image).convert("RGB")).astype(int)
    assert photo.shape == (*SIZE, 3) and np.abs(photo - (200, 100, 50)).max() < 12


def test_wide_images_shrink_with_their_aspect(record, tmp_path) -> None:
    pictures = embed_pictures(record, tmp_path / "target", COLORS, max_width=15)
    assert pictures.size == (10, 15)
    assert {_decode(uri).size for uri in (pictures.image, pictures.truth, pictures.errors)} == {(15, 10)}


def test_grey_and_16_bit_photographs_are_shown(record, tmp_path) -> None:
    for image in (Image.new("L", SIZE[::-1], 90), Image.new("CMYK", SIZE[::-1])):
        image.save(tmp_path / "photo.tif")
        assert embed_pictures({**record, "image": str(tmp_path / "photo.tif")}, tmp_path / "target", COLORS)


def test_more_classes_than_a_palette_holds(record, tmp_path) -> None:
    colors = [(k % 256, k // 256, 7) for k in range(300)]
    write_label(tmp_path / "target" / "predictions" / "a.png", np.full(SIZE, 299))
    pictures = embed_pictures(record, tmp_path / "target", colors)
    assert tuple(np.array(_decode(pictures.prediction))[0, 0]) == (43, 1, 7, 255)


@pytest.mark.parametrize("part", ["image", "label", "prediction"])
def test_a_missing_file_leaves_the_image_out_and_says_so(record, tmp_path, part, caplog) -> None:
    os.remove(tmp_path / "target" / record["prediction"] if part == "prediction" else record[part])
    assert embed_pictures(record, tmp_path / "target", COLORS) is None
    assert "leaves out" in caplog.text
    assert embed_pictures({**record, "prediction": None}, tmp_path / "target", COLORS) is None


def test_a_giant_photograph_is_left_out_before_it_is_decoded(record, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("mfuser_d2.data.reading.MAX_PIXELS", 599)
    assert embed_pictures(record, tmp_path / "target", COLORS) is None
    assert "a.png says it is 20x30 (H x W), more than 599 pixels" in caplog.text


def test_shrinking_takes_the_middle_of_each_cell() -> None:
    labels = np.arange(9).reshape(3, 3).repeat(3, axis=0).repeat(3, axis=1)
    np.testing.assert_array_equal(shrink_labels(labels, (3, 3)), np.arange(9).reshape(3, 3))
