"""Mapillary: two mappings, two layouts, half-size copies."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

IDS = (np.arange(240) % 66).reshape(12, 20).astype(np.uint8)
BOTH = {17: 2, 6: 3, 3: 4, 48: 6, 30: 8, 29: 9, 27: 10, 19: 11, 20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16,
        57: 17, 52: 18}  # fmt: skip
OPENSEG = BOTH | {7: 0, 8: 0, 10: 0, 13: 0, 14: 0, 23: 0, 24: 0, 2: 1, 9: 1, 11: 1, 15: 1, 44: 5, 45: 5, 47: 5, 46: 7,
                  49: 7, 50: 7}  # fmt: skip
ROBUSTNET = BOTH | {13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 45: 5, 47: 5, 50: 7}


def _wanted(table: dict[int, int]) -> np.ndarray:
    return np.vectorize(lambda v: table.get(v, 255))(IDS)


@pytest.fixture(params=["v1.2/labels", "labels"])
def archive(tmp_path: Path, files, request: pytest.FixtureRequest) -> Path:
    for split in ("training", "validation"):
        files.image(tmp_path / f"{split}/images/a.jpg")
        files.palette(tmp_path / f"{split}/{request.param}/a.png", IDS)
    return tmp_path


@pytest.mark.parametrize(("mapping", "table"), [("openseg", OPENSEG), ("robustnet", ROBUSTNET)])
def test_mappings(run, archive: Path, files, mapping: str, table: dict[int, int]) -> None:
    code, text = run("mapillary", archive, "--mapping", mapping)
    assert code == 0, text
    for split in ("training", "validation"):
        labels = files.read(archive / f"{split}/labels_train_ids_{mapping}/a.png")
        np.testing.assert_array_equal(labels, _wanted(table))
    record = json.loads((archive / f"prepared_mapillary_validation_{mapping}.json").read_text())
    assert record["label_mapping"] == mapping
    assert (archive / "validation" / record["label_folder"] / "a.png").is_file()
    assert record["label_folder"].endswith("labels")


def test_v12_unpacked_after_older_labels(run, tmp_path: Path, files) -> None:
    files.image(tmp_path / "validation/images/a.jpg")
    files.palette(tmp_path / "validation/labels/a.png", IDS)
    run("mapillary", tmp_path)
    newer = tmp_path / "validation/v1.2/labels/a.png"
    files.palette(newer, IDS[::-1])
    os.utime(newer, (1_500_000_000, 1_500_000_000))
    assert run("mapillary", tmp_path)[0] == 0
    labels = files.read(tmp_path / "validation/labels_train_ids_openseg/a.png")
    np.testing.assert_array_equal(labels, _wanted(OPENSEG)[::-1])


def test_half_size_copies(run, archive: Path, files) -> None:
    code, text = run("mapillary", archive, "--half", "--splits", "validation")
    assert code == 0, text
    assert files.read(archive / "validation/images_half/a.jpg").shape == (6, 10, 3)
    half = files.read(archive / "validation/labels_train_ids_openseg_half/a.png")
    np.testing.assert_array_equal(half, _wanted(OPENSEG)[1::2, 1::2])  # Pillow's choice of the nearest pixel
    assert not (archive / "training/images_half").exists()


def test_index_above_65(run, archive: Path, files) -> None:
    label = next((archive / "validation").rglob("labels/a.png"))
    files.palette(label, np.where(IDS == 65, 66, IDS))
    code, text = run("mapillary", archive)
    assert code == 1 and "unknown ids [66]" in text
