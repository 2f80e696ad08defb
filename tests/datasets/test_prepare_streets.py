"""The streets program: what it writes, twice, and with other settings."""

import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).resolve().parents[2] / "datasets" / "prepare_streets.py"
SMALL = ("--num-train", "2", "--num-val", "1", "--size", "64", "96")


def _only(snapshot: dict) -> dict:
    return {name: content for name, content in snapshot.items() if name.endswith(".png")}


def test_writes_pairs_of_all_splits(run, tmp_path: Path, files) -> None:
    assert run("streets", tmp_path, *SMALL)[0] == 0
    for split, count in (("train", 2), ("val", 1), ("night", 1), ("fog", 1), ("sketch", 1)):
        images = sorted((tmp_path / "images" / split).glob("*.png"))
        assert len(images) == count
        for image in images:
            labels = files.read(tmp_path / "labels" / split / image.name)
            assert files.read(image).shape == (64, 96, 3) and files.read(image).dtype == np.uint8
            assert labels.shape == (64, 96) and labels.max() < 19


def test_second_run_changes_nothing_and_mends_what_is_missing(run, tmp_path: Path, files) -> None:
    run("streets", tmp_path, *SMALL)
    before = _only(files.snapshot(tmp_path))
    run("streets", tmp_path, *SMALL)
    assert _only(files.snapshot(tmp_path)) == before
    (tmp_path / "labels/fog/00000.png").unlink()
    run("streets", tmp_path, *SMALL)
    after = _only(files.snapshot(tmp_path))
    assert {name: content[0] for name, content in after.items()} == {name: c[0] for name, c in before.items()}


def test_other_settings_replace_everything(run, tmp_path: Path, files) -> None:
    run("streets", tmp_path, *SMALL)
    before = _only(files.snapshot(tmp_path))
    run("streets", tmp_path, "--num-train", "1", *SMALL[2:], "--seed", "5")
    after = _only(files.snapshot(tmp_path))
    assert set(before) - set(after) == {"images/train/00001.png", "labels/train/00001.png"}
    assert all(after[name][0] != before[name][0] for name in after)


def test_processes_draw_the_same_as_one(run, tmp_path: Path, files) -> None:
    run("streets", tmp_path / "one", *SMALL)
    command = [sys.executable, str(PROGRAM), str(tmp_path / "two"), "--jobs", "2", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = _only(files.snapshot(tmp_path / "one")), _only(files.snapshot(tmp_path / "two"))
    assert {name: content[0] for name, content in one.items()} == {name: content[0] for name, content in two.items()}


def test_bad_settings(run, tmp_path: Path) -> None:
    code, text = run("streets", tmp_path, "--size", "32", "96")
    assert code == 1 and "at least 64" in text
    code, text = run("streets", tmp_path, "--num-val", "0")
    assert code == 1 and "num_val=0" in text
