"""Loaders from a config, and registration."""

import itertools
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="loaders and catalogs are Detectron2's")

from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

import mfuser_d2.data  # noqa: E402
from mfuser_d2.data import build_test_loader, build_train_loader  # noqa: E402
from mfuser_d2.data.config import add_data_config  # noqa: E402
from mfuser_d2.data.labels import CLASSES, COLORS  # noqa: E402
from mfuser_d2.data.layouts import LAYOUTS  # noqa: E402
from mfuser_d2.data.prepare import Report  # noqa: E402
from mfuser_d2.data.streets.writer import write_streets  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_streets(folder / "streets", report=Report(jobs=1), num_train=6, num_val=2, size=(64, 96))
    return folder


@pytest.fixture
def cfg(root: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    node = get_cfg()
    add_data_config(node)
    node.INPUT.CROP.SIZE = [32, 48]
    node.DATASETS.TRAIN = ("streets_sem_seg_train",)
    node.DATALOADER.NUM_WORKERS = 0
    node.DATALOADER.MFUSER.RCS_MIN_PIXELS = 10
    node.SOLVER.IMS_PER_BATCH = 3
    node.SEED = 1
    return node


def take(cfg: CfgNode, count: int, **options: int) -> list[dict]:
    return list(itertools.chain(*itertools.islice(build_train_loader(cfg, **options), count)))


def test_every_name_is_registered_with_its_metadata() -> None:
    for name in LAYOUTS:
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        assert metadata.stuff_classes == list(CLASSES)
        assert [tuple(color) for color in metadata.stuff_colors] == list(COLORS)
        assert metadata.ignore_label == 255
        assert metadata.evaluator_type == ("cityscapes_sem_seg" if name.startswith("cityscapes") else "sem_seg")
    assert MetadataCatalog.get("mapillary19_robustnet_sem_seg_val").label_mapping == "robustnet"


def test_registering_again_is_harmless_and_keeps_a_users_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DatasetCatalog.data, "acdc_fog_sem_seg_val", lambda: ["mine"])
    mfuser_d2.data.registration.register_all()
    assert DatasetCatalog.get("acdc_fog_sem_seg_val") == ["mine"]


@pytest.mark.parametrize("name", ["gta5_sem_seg_train", "cityscapes_fine_sem_seg_val"])
def test_missing_data_set_is_an_error_when_used(name: str, cfg: CfgNode) -> None:
    with pytest.raises(FileNotFoundError, match="prepare_"):
        DatasetCatalog.get(name)


def test_batches(cfg: CfgNode) -> None:
    for batch in itertools.islice(build_train_loader(cfg), 3):
        assert len(batch) == 3
        assert all(item["image"].shape[1:] == item["sem_seg"].shape for item in batch)


@pytest.mark.parametrize("is_rare", [True, False])
def test_workers_do_not_change_the_items(cfg: CfgNode, is_rare: bool) -> None:
    cfg.DATALOADER.MFUSER.RARE_CLASS_SAMPLING = is_rare
    alone = take(cfg, 4)
    cfg.DATALOADER.NUM_WORKERS = 2
    helped = take(cfg, 4)
    for one, two in zip(alone, helped):
        assert one["file_name"] == two["file_name"] and torch.equal(one["image"], two["image"])


def test_start_iter_goes_on_with_unseen_draws(cfg: CfgNode) -> None:
    whole, rest = take(cfg, 4), take(cfg, 2, start_iter=2)
    for one, two in zip(whole[6:], rest):
        assert torch.equal(one["image"], two["image"])


def test_several_sources_by_weight(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ("streets_sem_seg_train", "streets_fog_sem_seg_val")
    cfg.DATALOADER.MFUSER.SOURCE_WEIGHTS = (1.0, 4.0)
    share = np.mean(["/fog/" in item["file_name"] for item in take(cfg, 60)])
    assert 0.7 < share < 0.9


def test_rare_class_statistics_are_kept_beside_the_labels(cfg: CfgNode, root: Path) -> None:
    take(cfg, 1)
    assert list((root / "streets/labels/train").glob(".class_counts_*.npz"))


def test_wrong_labels_show_before_training(cfg: CfgNode, root: Path, tmp_path: Path, monkeypatch) -> None:
    for kind in ("images", "labels"):
        (tmp_path / f"streets/{kind}/train").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / f"streets/{kind}/train/0.png"), np.full((64, 96, 3), 9, np.uint8))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(ValueError, match="labels/train/0.png is a colour picture"):
        build_train_loader(cfg)


def test_crop_larger_than_the_images_shows_before_training(cfg: CfgNode) -> None:
    cfg.INPUT.CROP.SIZE = [128, 128]
    with pytest.raises(ValueError, match="INPUT.CROP.SIZE"):
        build_train_loader(cfg)


def test_no_training_data_set(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        build_train_loader(cfg)


def test_test_loader_is_ordered_and_single(cfg: CfgNode) -> None:
    batches = list(build_test_loader(cfg, "streets_fog_sem_seg_val"))
    assert [len(batch) for batch in batches] == [1, 1]
    assert [Path(batch[0]["file_name"]).stem for batch in batches] == ["00000", "00001"]
    assert batches[0][0]["image"].shape == (3, 64, 96)


def test_all_ignored_image_does_not_stop_a_loader(cfg: CfgNode, tmp_path: Path, monkeypatch, caplog) -> None:
    write_streets(tmp_path / "streets", report=Report(jobs=1), num_train=1, num_val=1, size=(64, 96))
    cv2.imwrite(str(tmp_path / "streets/labels/train/00000.png"), np.full((64, 96), 255, np.uint8))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg.DATALOADER.MFUSER.RARE_CLASS_SAMPLING = False
    with caplog.at_level(logging.WARNING):
        assert all((item["sem_seg"] == 255).all() for item in take(cfg, 2))
    assert "ignored everywhere" in caplog.text
