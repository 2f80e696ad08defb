"""ACDC: four conditions."""

from pathlib import Path

import numpy as np
import pytest

IDS = np.resize(np.r_[np.arange(19), 255], (12, 20)).astype(np.uint8)
CONDITIONS = ("fog", "night", "rain", "snow")


@pytest.fixture
def archive(tmp_path: Path, files) -> Path:
    for condition in CONDITIONS:
        for split in ("train", "val"):
            stem = f"{condition}/{split}/GOPR0475/GOPR0475_frame_000041"
            files.image(tmp_path / f"rgb_anon/{stem}_rgb_anon.png")
            files.ids(tmp_path / f"gt/{stem}_gt_labelTrainIds.png", IDS)
            files.ids(tmp_path / f"gt/{stem}_gt_labelIds.png", IDS)
    return tmp_path


def test_four_conditions_are_checked(run, archive: Path) -> None:
    code, text = run("acdc", archive)
    assert code == 0, text
    for condition in CONDITIONS:
        assert (archive / f"prepared_acdc_{condition}_val.json").is_file()


def test_missing_half(run, archive: Path) -> None:
    path = next((archive / "gt/snow/val").rglob("*labelTrainIds.png"))
    path.unlink()
    code, text = run("acdc", archive)
    assert code == 1 and path.name in text
