"""BDD100K: masks are checked, colour maps refused, the older layout accepted."""

from pathlib import Path

import numpy as np
import pytest

IDS = np.resize(np.r_[np.arange(19), 255], (12, 20)).astype(np.uint8)


@pytest.fixture
def archive(tmp_path: Path, files) -> Path:
    for split in ("train", "val"):
        files.image(tmp_path / f"images/10k/{split}/a.jpg")
        files.ids(tmp_path / f"labels/sem_seg/masks/{split}/a.png", IDS)
    return tmp_path


def test_good_masks_pass_untouched(run, archive: Path, files) -> None:
    before = files.snapshot(archive)
    code, text = run("bdd100k", archive)
    assert code == 0, text
    after = files.snapshot(archive)
    assert set(after) - set(before) == {"prepared_bdd100k_train.json", "prepared_bdd100k_val.json"}
    assert {name: after[name] for name in before} == before


def test_older_layout(run, tmp_path: Path, files) -> None:
    for split in ("train", "val"):
        files.image(tmp_path / f"seg/images/{split}/a.jpg")
        files.ids(tmp_path / f"seg/labels/{split}/a_train_id.png", IDS)
    code, text = run("bdd100k", tmp_path)
    assert code == 0, text


def test_colours_in_place_of_masks(run, archive: Path, files) -> None:
    files.image(archive / "labels/sem_seg/masks/val/a.png")
    code, text = run("bdd100k", archive)
    assert code == 1 and "masks/val/a.png is a colour picture" in text


def test_only_colormaps_unpacked(run, tmp_path: Path, files) -> None:
    files.image(tmp_path / "images/10k/val/a.jpg")
    files.image(tmp_path / "labels/sem_seg/colormaps/val/a.png")
    code, text = run("bdd100k", tmp_path)
    assert code == 1 and "colormaps holds colours" in text


def test_wrong_ids(run, archive: Path, files) -> None:
    files.ids(archive / "labels/sem_seg/masks/val/a.png", np.where(IDS == 3, 33, IDS).astype(np.uint8))
    code, text = run("bdd100k", archive)
    assert code == 1 and "a.png holds [33]" in text
