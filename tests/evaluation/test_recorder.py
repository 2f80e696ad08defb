"""Counting a target and writing its files without Detectron2."""

import json
import math

import numpy as np
import pytest

from mfuser_d2.evaluation.recorder import TargetRecorder

NAMES = ["road", "sky", "car"]


def _pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 3, (6, 9)), generator.integers(0, 2, (6, 9))


def _record(recorder: TargetRecorder, seeds) -> TargetRecorder:
    for seed in seeds:
        recorder.add(*_pair(seed), image_file=f"town/{seed}.jpg", label_file=f"town/{seed}.png")
    return recorder


def test_processes_that_share_no_memory_give_the_files_of_one(tmp_path) -> None:
    options = {"dataset_name": "toy", "class_names": NAMES, "save_per_image": True, "has_confusion_picture": False}
    whole = _record(TargetRecorder(output_dir=tmp_path / "whole", **options), range(5))
    expected = whole.finish()
    parts = [TargetRecorder(output_dir=tmp_path / "split", rank=rank, **options) for rank in range(2)]
    _record(parts[0], (0, 2, 4))
    _record(parts[1], (1, 3))
    sent: list = []
    assert parts[1].finish(lambda value: sent.append(value) or []) is None
    own = iter(sent)
    scores = parts[0].finish(lambda value: [value, next(own)])
    assert scores == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    for file in ("confusion.json", "images.jsonl"):
        assert (tmp_path / "split" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert {path.name for path in (tmp_path / "split").iterdir()} == {"confusion.json", "images.jsonl"}


def test_records_hold_each_image_and_its_convention(tmp_path) -> None:
    def records(mode: str) -> list[dict]:
        folder = tmp_path / mode
        recorder = TargetRecorder(
            dataset_name="toy", class_names=NAMES, output_dir=folder, save_per_image=True, absent_class=mode
        )
        _record(recorder, range(2)).finish()
        return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]

    skip, zero = records("skip"), records("zero")
    assert [record["image"] for record in skip] == ["town/0.jpg", "town/1.jpg"]
    assert all(a["mIoU"] == pytest.approx(b["mIoU"] * 3 / 2, abs=2e-3) for a, b in zip(skip, zero, strict=True))
    prediction, truth = _pair(0)
    assert skip[0]["counts"]["0"] == [
        int(((prediction == 0) & (truth == 0)).sum()),
        int((truth == 0).sum()),
        int((prediction == 0).sum()),
    ]


def test_an_all_ignored_image_has_no_score(tmp_path) -> None:
    recorder = TargetRecorder(dataset_name="toy", class_names=NAMES, output_dir=tmp_path, save_per_image=True)
    recorder.add(np.zeros((2, 3), int), np.full((2, 3), 255), image_file="a.jpg", label_file="a.png")
    assert math.isnan(recorder.finish()["mIoU"])
    assert json.loads((tmp_path / "images.jsonl").read_text())["mIoU"] is None


def test_equal_names_below_the_image_root_stay_apart(tmp_path) -> None:
    recorder = TargetRecorder(
        dataset_name="toy", class_names=NAMES, output_dir=tmp_path, image_root="/data/images", save_predictions=True
    )
    for folder in ("ulm", "bonn"):
        recorder.add(*_pair(0), image_file=f"/data/images/{folder}/0.jpg", label_file="0.png")
    recorder.add(*_pair(1), image_file="/elsewhere/1.jpg", label_file="1.png")
    written = {str(path.relative_to(tmp_path / "predictions")) for path in (tmp_path / "predictions").rglob("*.png")}
    assert written == {"ulm/0.png", "bonn/0.png", "1.png"}


def test_a_bad_label_is_named_and_not_counted() -> None:
    recorder = TargetRecorder(dataset_name="toy", class_names=NAMES)
    with pytest.raises(ValueError, match="town/7.png: truth holds the values 9"):
        recorder.add(np.zeros((2, 2), int), np.full((2, 2), 9), image_file="town/7.jpg", label_file="town/7.png")
    assert recorder.num_images == 0 and recorder.confusion.counts.sum() == 0


def test_files_without_a_folder_are_refused() -> None:
    with pytest.raises(ValueError, match="needs an output_dir"):
        TargetRecorder(dataset_name="toy", class_names=NAMES, save_rle=True)
