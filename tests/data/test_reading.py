"""Every way in which a file can be wrong is named with the file."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mfuser_d2.data.reading import read_image, read_labels, read_pair, read_size

IDS = np.resize(np.r_[np.arange(19), 255], (12, 20)).astype(np.uint8)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8))
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.png"
    cv2.imwrite(str(path), IDS)
    return path


def test_good_pair(image: Path, labels: Path) -> None:
    pixels, ids = read_pair(image, labels)
    np.testing.assert_array_equal(pixels, cv2.imread(str(image)))
    np.testing.assert_array_equal(ids, IDS)
    assert read_size(image) == (12, 20)


@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("read", [read_image, read_size])
def test_truncated_image(tmp_path: Path, ending: str, read) -> None:
    path = tmp_path / f"cut{ending}"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"cut{ending} is truncated"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no picture, and IEND all the same"])
@pytest.mark.parametrize("read", [read_image, read_labels, read_size])
def test_no_picture(tmp_path: Path, content: bytes, read) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="text.png"):
        read(path)


@pytest.mark.parametrize("read", [read_image, read_labels, read_size])
def test_missing_file(tmp_path: Path, read) -> None:
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read(tmp_path / "gone.png")


def test_sizes_that_differ(image: Path, labels: Path) -> None:
    cv2.imwrite(str(labels), IDS[:6])
    with pytest.raises(ValueError, match=r"image.png is 12x20 .*labels.png are 6x20"):
        read_pair(image, labels)


def test_colour_labels(image: Path) -> None:
    with pytest.raises(ValueError, match=r"colour picture \(12, 20, 3\).*prepare"):
        read_labels(image)


def test_publisher_ids(labels: Path) -> None:
    cv2.imwrite(str(labels), np.where(IDS == 4, 33, IDS).astype(np.uint8))
    with pytest.raises(ValueError, match=r"labels.png holds \[33\].*prepare"):
        read_labels(labels)


def test_sixteen_bit_labels_are_accepted_when_valid(labels: Path) -> None:
    cv2.imwrite(str(labels), IDS.astype(np.uint16))
    assert read_labels(labels).dtype == np.uint8
    cv2.imwrite(str(labels), (IDS.astype(np.uint16) + 256))
    with pytest.raises(ValueError, match="256"):
        read_labels(labels)
