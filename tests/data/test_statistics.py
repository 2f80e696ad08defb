"""Class counts and their cache."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mfuser_d2.data import statistics
from mfuser_d2.data.statistics import class_counts


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    written = []
    for index in range(4):
        path = tmp_path / f"{'ab'[index % 2]}/{index}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), rng.choice(np.r_[np.arange(19), 255], (10, 14)).astype(np.uint8))
        written.append(path)
    return written


def expected(paths: list[Path]) -> np.ndarray:
    maps = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths]
    return np.array([[(labels == k).sum() for k in range(19)] for labels in maps])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really read."""
    names: list[str] = []
    original = statistics.read_labels
    monkeypatch.setattr(statistics, "read_labels", lambda path: names.append(Path(path).name) or original(path))
    return names


def test_counts_and_order(paths: list[Path]) -> None:
    np.testing.assert_array_equal(class_counts(paths), expected(paths))
    np.testing.assert_array_equal(class_counts(paths[::-1]), expected(paths[::-1]))


def test_second_time_reads_nothing(paths: list[Path], read: list[str]) -> None:
    first = class_counts(paths)
    assert len(read) == 4
    np.testing.assert_array_equal(class_counts(paths), first)
    assert len(read) == 4


def test_changed_file_is_counted_again(paths: list[Path], read: list[str]) -> None:
    class_counts(paths)
    read.clear()
    cv2.imwrite(str(paths[2]), np.full((10, 14), 3, np.uint8))
    np.testing.assert_array_equal(class_counts(paths), expected(paths))
    assert read == ["2.png"]


def _garbage(content: bytes) -> bytes:
    return b"half a file"


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    middle = content.index(b"counts.npy") + 60
    return content[:middle] + bytes(255 - value for value in content[middle : middle + 20]) + content[middle + 20 :]


@pytest.mark.parametrize("damage", [_garbage, _half, _flipped], ids=lambda damage: damage.__name__.strip("_"))
def test_broken_cache_is_replaced(paths: list[Path], caplog: pytest.LogCaptureFixture, damage) -> None:
    class_counts(paths)
    cache = next(paths[0].parents[1].glob(".class_counts_*.npz"))
    cache.write_bytes(damage(cache.read_bytes()))
    np.testing.assert_array_equal(class_counts(paths), expected(paths))
    assert cache.name in caplog.text
    with np.load(cache) as kept:
        np.testing.assert_array_equal(kept["counts"], expected(paths))


def test_cache_that_cannot_be_written_is_told(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(statistics.os, "replace", refuse)
    np.testing.assert_array_equal(class_counts(paths), expected(paths))
    assert "counted in each run" in caplog.text
    assert not list(paths[0].parents[1].glob("*.part")) and not list(paths[0].parents[1].glob(".*.part"))


def test_bad_label_file_is_named(paths: list[Path]) -> None:
    cv2.imwrite(str(paths[1]), np.full((10, 14), 77, np.uint8))
    with pytest.raises(ValueError, match="1.png"):
        class_counts(paths)
