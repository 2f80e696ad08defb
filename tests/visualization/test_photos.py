"""Pictures of every kind come out as upright 8-bit RGB, or are refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from mfuser_d2.visualization.photos import read_photo, to_rgb


def colors(height=6, width=9):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path, picture, **options):
    picture.save(path, **options)
    return path


def test_png_comes_back_unchanged(tmp_path):
    picture = colors()
    assert np.array_equal(read_photo(saved(tmp_path / "a.png", Image.fromarray(picture))), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (40, 24), "black")
    upright.paste("red", (0, 0, 20, 12))  # the corner at top left
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = read_photo(saved(tmp_path / "a.png", stored, exif=exif))
    assert shown.shape == (24, 40, 3)
    assert shown[3, 3].tolist() == [255, 0, 0] and shown[20, 35].tolist() == [0, 0, 0]


def test_16_bit_grey_keeps_its_range(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    got = read_photo(saved(tmp_path / "a.png", Image.fromarray(values)))
    assert got[0, :, 0].tolist() == [0, 100, 255] and got.shape == (1, 3, 3)


def test_transparency_lies_over_white(tmp_path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    got = read_photo(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert got[0, 0].tolist() == [10, 20, 30] and got[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_other_modes_look_alike(tmp_path, mode):
    grey = np.tile(np.array([0, 255], np.uint8), (4, 3))
    picture = Image.fromarray(np.repeat(grey[..., None], 3, 2))
    if mode == "LA":
        picture = picture.convert("L").convert("LA")
    elif mode in ("I", "F"):
        picture = picture.convert("L").convert(mode)
    else:
        picture = picture.convert(mode)
    suffix = {"CMYK": "tif", "F": "tif", "I": "tif"}.get(mode, "png")
    if mode in ("HSV", "YCbCr"):  # no file gives the first; of the second Pillow 12 cannot read what it has written
        got = to_rgb(picture)
    else:
        got = read_photo(saved(tmp_path / f"a.{suffix}", picture))
    assert got.dtype == np.uint8 and np.abs(got.astype(int) - grey[..., None]).max() <= 2


def test_one_pixel(tmp_path):
    assert read_photo(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), "red"))).tolist() == [[[255, 0, 0]]]


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    stream = io.BytesIO()
    Image.fromarray(colors(64, 64)).save(stream, "PNG")
    (tmp_path / "cut.png").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    for name, reason in (("a.jpg", "no picture"), ("empty.png", "empty file"), ("cut.png", "truncated")):
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            read_photo(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing.png"):
        read_photo(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="folder"):
        read_photo(tmp_path)


def test_huge_pictures_are_refused_before_they_are_read(tmp_path, monkeypatch):
    import mfuser_d2.visualization.photos as photos

    monkeypatch.setattr(photos, "MAX_PIXELS", 50)
    with pytest.raises(ValueError, match="9x6 pixels"):
        read_photo(saved(tmp_path / "a.png", Image.fromarray(colors())))


def test_arrays():
    picture = colors()
    assert np.array_equal(to_rgb(picture), picture)
    assert np.array_equal(to_rgb(picture.astype(np.uint16) * 257), picture)
    assert np.array_equal(to_rgb(picture / 255), picture)
    assert np.array_equal(to_rgb(picture[..., 0])[..., 2], picture[..., 0])
    assert to_rgb(np.eye(3, dtype=bool))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((3, 8, 8), np.uint8), "channels to the end"),
        (np.zeros((0, 8, 3), np.uint8), "at least one pixel"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.full((8, 8, 3), 200.0), "0..1"),
        (np.full((8, 8, 3), np.nan), "0..1"),
    ],
)
def test_odd_arrays_are_refused(array, reason):
    with pytest.raises(ValueError, match=reason):
        to_rgb(array)
