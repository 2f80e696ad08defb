"""SYNTHIA: uint16 with three channels, 16 classes, a drawn split."""

from pathlib import Path

import numpy as np
import pytest

TRAIN_IDS = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14,
             19: 15, 20: 16, 12: 17, 11: 18}  # fmt: skip
OCCURRING = [v for v in range(23) if v not in (16, 18, 20)]
IDS = np.resize(np.array(OCCURRING), (12, 20)).astype(np.uint16)


def _channels(ids: np.ndarray) -> np.ndarray:
    """As published: the instance in the first two channels (OpenCV's order), the class in the last."""
    noise = np.random.default_rng(0).integers(0, 60000, (*ids.shape, 2), np.uint16)
    return np.dstack([noise, ids])


@pytest.fixture
def archive(tmp_path: Path, files) -> Path:
    for index in range(10):
        files.image(tmp_path / f"RGB/{index:07d}.png")
        files.ids(tmp_path / f"GT/LABELS/{index:07d}.png", _channels(IDS))
    return tmp_path


def test_last_channel_becomes_train_ids(run, archive: Path, files) -> None:
    code, text = run("synthia", archive)
    assert code == 0, text
    wanted = np.vectorize(lambda v: TRAIN_IDS.get(v, 255))(IDS)
    np.testing.assert_array_equal(files.read(archive / "labels_train_ids/0000004.png"), wanted)


def test_split_is_seventy_to_thirty_and_stays(run, archive: Path) -> None:
    run("synthia", archive)
    train = (archive / "splits/train.txt").read_text()
    val = (archive / "splits/val.txt").read_text()
    assert len(train.split()) == 7 and len(val.split()) == 3
    assert not set(train.split()) & set(val.split())
    run("synthia", archive)
    assert (archive / "splits/train.txt").read_text() == train


def test_bad_frame_leaves_the_others_where_they_are(run, archive: Path, files) -> None:
    run("synthia", archive)
    before = {split: (archive / f"splits/{split}.txt").read_text().split() for split in ("train", "val")}
    bad = before["val"][0]
    files.image(archive / "GT/LABELS" / bad)
    assert run("synthia", archive)[0] == 1
    after = {split: (archive / f"splits/{split}.txt").read_text().split() for split in ("train", "val")}
    assert after == {"train": before["train"], "val": before["val"][1:]}


def test_given_lists(run, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lists = tmp_path_factory.mktemp("lists")
    (lists / "train.txt").write_text("0000001.png\n")
    (lists / "val.txt").write_text("RGB/0000002.png GT/LABELS/0000002.png\n")
    code, text = run("synthia", archive, "--lists", str(lists))
    assert code == 0, text
    assert (archive / "splits/val.txt").read_text().split() == ["0000002.png"]
    (lists / "val.txt").write_text("0000099.png\n")
    code, text = run("synthia", archive, "--lists", str(lists))
    assert code == 1 and "0000099.png" in text


def test_class_that_cannot_occur(run, archive: Path, files) -> None:
    files.ids(archive / "GT/LABELS/0000003.png", _channels(np.where(IDS == 3, 16, IDS).astype(np.uint16)))
    code, text = run("synthia", archive)
    assert code == 1 and "pixels of terrain, which this data set does not have" in text


def test_colour_labels(run, archive: Path, files) -> None:
    files.image(archive / "GT/LABELS/0000003.png")
    code, text = run("synthia", archive)
    assert code == 1 and "0000003.png" in text and "three channels of uint16" in text
