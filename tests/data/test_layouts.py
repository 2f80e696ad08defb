"""Names, folder trees and the message about a missing data set."""

from pathlib import Path

import pytest

from mfuser_d2.data.layouts import LAYOUTS, list_pairs

NAMES = {
    *(f"gta5_sem_seg_{s}" for s in ("train", "val", "test", "all")),
    *(f"synthia_sem_seg_{s}" for s in ("train", "val", "all")),
    *(f"{d}_sem_seg_{s}" for d in ("cityscapes_fine", "bdd100k", "mapillary19") for s in ("train", "val")),
    *(f"acdc_{c}_sem_seg_{s}" for c in ("fog", "night", "rain", "snow") for s in ("train", "val")),
    *(f"streets_sem_seg_{s}" for s in ("train", "val")),
    *(f"streets_{d}_sem_seg_val" for d in ("night", "fog", "sketch")),
}

TREES = {
    "gta5_sem_seg_val": ("gta5", "images/train/1.png", "labels_train_ids/train/1.png"),
    "synthia_sem_seg_all": ("synthia", "RGB/1.png", "labels_train_ids/1.png"),
    "cityscapes_fine_sem_seg_val": (
        "cityscapes",
        "leftImg8bit/val/ulm/u_leftImg8bit.png",
        "gtFine/val/ulm/u_gtFine_labelTrainIds.png",
    ),
    "bdd100k_sem_seg_train": ("bdd100k", "images/10k/train/a.jpg", "labels/sem_seg/masks/train/a.png"),
    "mapillary19_sem_seg_val": (
        "mapillary",
        "validation/images/a.jpg",
        "validation/labels_train_ids_openseg/a.png",
    ),
    "mapillary19_robustnet_half_sem_seg_val": (
        "mapillary",
        "validation/images_half/a.jpg",
        "validation/labels_train_ids_robustnet_half/a.png",
    ),
    "acdc_rain_sem_seg_train": (
        "acdc",
        "rgb_anon/rain/train/G/a_rgb_anon.png",
        "gt/rain/train/G/a_gt_labelTrainIds.png",
    ),
    "streets_fog_sem_seg_val": ("streets", "images/fog/0.png", "labels/fog/0.png"),
}


def build(root: Path, name: str) -> tuple[Path, Path]:
    folder, image, labels = TREES[name]
    for inside in (image, labels):
        (root / folder / inside).parent.mkdir(parents=True, exist_ok=True)
        (root / folder / inside).touch()
    split = name.rsplit("_", 1)[1]
    lists = root / folder / "splits"
    lists.mkdir()
    (lists / f"{split}.txt").write_text("train/1.png\n" if folder == "gta5" else "1.png\n")
    return root / folder / image, root / folder / labels


def test_all_names_of_the_design_are_there() -> None:
    assert NAMES <= set(LAYOUTS)


@pytest.mark.parametrize("name", sorted(TREES))
def test_tree_is_found(name: str, tmp_path: Path) -> None:
    pair = build(tmp_path, name)
    assert list_pairs(name, tmp_path) == [pair]


def test_older_bdd100k_tree(tmp_path: Path) -> None:
    image = tmp_path / "bdd100k/seg/images/val/a.jpg"
    labels = tmp_path / "bdd100k/seg/labels/val/a_train_id.png"
    for path in (image, labels):
        path.parent.mkdir(parents=True)
        path.touch()
    assert list_pairs("bdd100k_sem_seg_val", tmp_path) == [(image, labels)]


def test_root_is_read_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = build(tmp_path, "streets_fog_sem_seg_val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert list_pairs("streets_fog_sem_seg_val") == [pair]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        list_pairs("streets_fog_sem_seg_val")


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_missing_data_set_says_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / LAYOUTS[name].folder / "something").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        list_pairs(name, tmp_path)
    text = str(caught.value)
    assert name in text and LAYOUTS[name].tree in text and "something/" in text
    assert f"python datasets/{LAYOUTS[name].program.split()[0]} {tmp_path / LAYOUTS[name].folder}" in text


def test_programs_that_messages_name_exist() -> None:
    programs = Path(__file__).resolve().parents[2] / "datasets"
    for layout in LAYOUTS.values():
        assert (programs / layout.program.split()[0]).is_file()


def test_missing_half_is_named(tmp_path: Path) -> None:
    _, labels = build(tmp_path, "acdc_rain_sem_seg_train")
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 1 label files are missing.*a_gt_labelTrainIds.png"):
        list_pairs("acdc_rain_sem_seg_train", tmp_path)


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(KeyError, match="gta5_sem_seg_train"):
        list_pairs("gta_sem_seg_train")
