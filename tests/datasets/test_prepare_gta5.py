"""GTAV: palette indices, bad frames, splits, and what all programs do with broken input."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mfuser_d2.data.convert import Checked, Expected, Job, conclude
from mfuser_d2.data.prepare import Report

# From the publisher's mapping, typed here a second time on purpose.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
IDS = (np.arange(240) % 35).reshape(12, 20).astype(np.uint8)
WANTED = np.vectorize(lambda v: TRAIN_IDS.get(v, 255))(IDS)


@pytest.fixture
def archive(tmp_path: Path, files) -> Path:
    for stem in ("00001", "00002", "00003"):
        files.image(tmp_path / "images" / f"{stem}.png")
        files.palette(tmp_path / "labels" / f"{stem}.png", IDS)
    return tmp_path


def test_indices_become_train_ids(run, archive: Path, files) -> None:
    before = files.snapshot(archive)
    code, text = run("gta5", archive)
    assert code == 0, text
    np.testing.assert_array_equal(files.read(archive / "labels_train_ids/00002.png"), WANTED)
    assert (archive / "splits/all.txt").read_text().split() == ["00001.png", "00002.png", "00003.png"]
    after = files.snapshot(archive)
    assert {name: after[name] for name in before} == before, "a publisher's file was changed"
    assert "only gta5_sem_seg_all is ready" in text
    assert json.loads((archive / "prepared_gta5.json").read_text())["pairs"] == 3


def test_second_run_writes_no_label_again(run, archive: Path, files) -> None:
    run("gta5", archive)
    before = files.snapshot(archive / "labels_train_ids")
    assert run("gta5", archive)[0] == 0
    assert files.snapshot(archive / "labels_train_ids") == before


def test_official_split(run, archive: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="split.mat is written and read with scipy")
    scipy_io.savemat(str(archive / "split.mat"), {"trainIds": [[3], [1]], "valIds": [[2]], "testIds": [[900]]})
    code, text = run("gta5", archive)
    assert code == 0, text
    lists = {split: (archive / f"splits/{split}.txt").read_text().split() for split in ("train", "val", "test", "all")}
    assert lists["train"] == ["00003.png", "00001.png"]
    assert lists["val"] == ["00002.png"]
    assert lists["test"] == []
    assert len(lists["all"]) == 3


def test_split_folders(run, tmp_path: Path, files) -> None:
    for inside in ("train/00001.png", "val/00002.png", "test/00003.png"):
        files.image(tmp_path / "images" / inside)
        files.palette(tmp_path / "labels" / inside, IDS)
    assert run("gta5", tmp_path)[0] == 0
    assert (tmp_path / "splits/val.txt").read_text().split() == ["val/00002.png"]
    np.testing.assert_array_equal(files.read(tmp_path / "labels_train_ids/val/00002.png"), WANTED)


def test_known_bad_frames_are_left_out(run, archive: Path, files) -> None:
    files.image(archive / "images/15188.png")
    files.palette(archive / "labels/15188.png", IDS[:6])
    code, text = run("gta5", archive)
    assert code == 0, text
    assert "15188.png is left out" in text
    assert "15188.png" not in (archive / "splits/all.txt").read_text()


def test_blank_frames_are_named_and_dropped_on_demand(run, archive: Path, files) -> None:
    files.palette(archive / "labels/00002.png", np.zeros_like(IDS))
    code, text = run("gta5", archive, "--drop-blank")
    assert code == 0 and "1 frames are ignored everywhere, such as 00002.png" in text
    assert (archive / "splits/all.txt").read_text().split() == ["00001.png", "00003.png"]


def _colour_labels(archive: Path, files) -> str:
    files.image(archive / "labels/00002.png")
    return "these are colours"


def _unknown_id(archive: Path, files) -> str:
    files.palette(archive / "labels/00002.png", np.where(IDS == 5, 77, IDS))
    return "unknown ids [77]"


def _no_labels(archive: Path, files) -> str:
    (archive / "labels/00002.png").unlink()
    return "has no labels"


def _no_image(archive: Path, files) -> str:
    (archive / "images/00002.png").unlink()
    return "has no image"


def _truncated_image(archive: Path, files) -> str:
    path = archive / "images/00002.png"
    path.write_bytes(path.read_bytes()[:-30])
    return "is truncated"


def _truncated_labels(archive: Path, files) -> str:
    path = archive / "labels/00002.png"
    path.write_bytes(path.read_bytes()[:-60])
    return "cannot be read"


def _other_size(archive: Path, files) -> str:
    files.palette(archive / "labels/00002.png", IDS[:6])
    return "is 12x20 (H x W) but its labels"


@pytest.mark.parametrize(
    "damage",
    [_colour_labels, _unknown_id, _no_labels, _no_image, _truncated_image, _truncated_labels, _other_size],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_damage_is_named_and_fails(run, archive: Path, files, damage) -> None:
    says = damage(archive, files)
    code, text = run("gta5", archive)
    assert code == 1
    assert says in text and "00002" in text
    assert not (archive / "labels_train_ids/00002.png").exists()
    assert (archive / "labels_train_ids/00003.png").is_file(), "the good frames are prepared all the same"
    assert "00002.png" not in (archive / "splits/all.txt").read_text()
    assert not list(archive.rglob("*.part")) and not (archive / ".prepare.lock").exists()


def test_mended_damage_is_prepared_by_the_next_run(run, archive: Path, files) -> None:
    _other_size(archive, files)
    assert run("gta5", archive)[0] == 1
    files.palette(archive / "labels/00002.png", IDS)
    assert run("gta5", archive)[0] == 0
    np.testing.assert_array_equal(files.read(archive / "labels_train_ids/00002.png"), WANTED)


def test_changed_source_is_converted_again(run, archive: Path, files) -> None:
    run("gta5", archive)
    files.palette(archive / "labels/00001.png", np.full_like(IDS, 7))
    assert run("gta5", archive)[0] == 0
    assert (files.read(archive / "labels_train_ids/00001.png") == 0).all()


def test_labels_unpacked_again_are_converted_whatever_their_age(run, archive: Path, files) -> None:
    run("gta5", archive)
    path = archive / "labels/00001.png"
    files.palette(path, np.full_like(IDS, 8))
    os.utime(path, (1_470_000_000, 1_470_000_000))  # unzip gives files the time that they have in the archive
    assert run("gta5", archive)[0] == 0
    assert (files.read(archive / "labels_train_ids/00001.png") == 1).all()


def test_no_target_stays_of_labels_that_went_bad(run, archive: Path, files) -> None:
    run("gta5", archive)
    _other_size(archive, files)
    assert run("gta5", archive)[0] == 1
    assert not (archive / "labels_train_ids/00002.png").exists()


def test_damaged_target_is_made_again(run, archive: Path, files) -> None:
    run("gta5", archive)
    target = archive / "labels_train_ids/00001.png"
    target.write_bytes(target.read_bytes()[:30])
    assert run("gta5", archive)[0] == 0
    np.testing.assert_array_equal(files.read(target), WANTED)


def test_hidden_copies_of_macos_are_no_frames(run, archive: Path) -> None:
    for kind in ("images", "labels"):
        (archive / kind / "._00001.png").write_bytes(b"\0\5\x16\7")
    code, text = run("gta5", archive)
    assert code == 0, text
    assert (archive / "splits/all.txt").read_text().split() == ["00001.png", "00002.png", "00003.png"]


def test_record_counts_missing_halves(run, archive: Path) -> None:
    (archive / "labels/00002.png").unlink()
    (archive / "images/00003.png").unlink()
    assert run("gta5", archive)[0] == 1
    record = json.loads((archive / "prepared_gta5.json").read_text())
    assert (record["pairs"], record["problems"]) == (1, 2)


@pytest.mark.parametrize("content", [b"", b"no matrix" * 40], ids=["empty", "garbage"])
def test_damaged_split_file(run, archive: Path, content: bytes) -> None:
    pytest.importorskip("scipy.io", reason="split.mat is read with scipy")
    (archive / "split.mat").write_bytes(content)
    code, text = run("gta5", archive)
    assert code == 1 and "split.mat cannot be read" in text


def test_unusual_frequencies_of_a_complete_set(archive: Path) -> None:
    counts = np.full(20, 100)
    counts[0] = 1  # hardly any road: ids were exchanged
    report, done = Report(jobs=1), Checked(Job(archive, archive, archive), counts, (12, 20))
    conclude(report, archive, "x", [done], Expected(num_pairs=2))
    assert report.problems == [], "a part of the set may hold anything"
    conclude(report, archive, "x", [done], Expected(num_pairs=1))
    assert [text for text in report.problems if "are road, expected 8 to 65 %" in text]
    assert not [text for text in report.problems if "terrain" in text]


@pytest.mark.parametrize("has_all", [True, False])
def test_class_missing_in_a_complete_set(archive: Path, caplog: pytest.LogCaptureFixture, has_all: bool) -> None:
    counts = np.full(20, 100)
    counts[[0, 16]] = 400, 0
    report, done = Report(jobs=1), Checked(Job(archive, archive, archive), counts, (12, 20))
    caplog.set_level("INFO", "mfuser_d2")
    conclude(report, archive, "x", [done], Expected(num_pairs=1, has_all=has_all))
    says = "x: not one pixel of train in the complete set"
    assert says in caplog.text and report.problems == ([says] if has_all else [])


@pytest.mark.parametrize("jobs", ["-1", "two"])
def test_impossible_number_of_processes(run, archive: Path, jobs: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("gta5", archive, "--jobs", jobs)
    assert stopped.value.code == 2


def test_empty_folder(run, tmp_path: Path) -> None:
    code, text = run("gta5", tmp_path)
    assert code == 1 and "images/NNNNN.png" in text and "nothing" in text


def test_strict_refuses_a_part_of_the_set(run, archive: Path) -> None:
    code, text = run("gta5", archive, "--strict")
    assert code == 1 and "3 good pairs, the complete set has 24964" in text


def test_all_ignored_is_refused(run, archive: Path, files) -> None:
    for path in (archive / "labels").glob("*.png"):
        files.palette(path, np.zeros_like(IDS))
    code, text = run("gta5", archive)
    assert code == 1 and "every pixel is ignored" in text
