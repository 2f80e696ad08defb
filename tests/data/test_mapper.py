"""What the network gets from a dataset dict."""

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="the mappers are Detectron2's kind of callable")

from detectron2.config import CfgNode, get_cfg  # noqa: E402

from mfuser_d2.data.augmentation import augment, item_rng  # noqa: E402
from mfuser_d2.data.config import add_data_config  # noqa: E402
from mfuser_d2.data.mapper import TestMapper, TrainMapper  # noqa: E402
from mfuser_d2.data.reading import read_pair  # noqa: E402


@pytest.fixture
def cfg() -> CfgNode:
    node = get_cfg()
    add_data_config(node)
    node.INPUT.CROP.SIZE = [24, 32]
    node.SEED = 5
    return node


@pytest.fixture
def item(tmp_path: Path) -> dict:
    rng = np.random.default_rng(0)
    labels = np.zeros((48, 80), np.uint8)
    labels[:, 40:] = 1
    labels[:, :40:2] = 2
    labels[34:46, 6:18] = 7
    cv2.imwrite(str(tmp_path / "a.png"), rng.integers(0, 255, (48, 80, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), labels)
    return {"file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "b.png"), "image_id": "a"}


def test_result_is_what_the_network_takes(cfg: CfgNode, item: dict) -> None:
    result = TrainMapper(cfg)({**item, "draw_number": 3, "rare_class": -1})
    assert result["image"].dtype == torch.uint8 and result["sem_seg"].dtype == torch.int64
    assert result["image"].shape[1:] == result["sem_seg"].shape
    assert (result["height"], result["width"]) == (48, 80)
    assert result["image_id"] == "a" and "draw_number" not in result and "image" not in item


def test_detectron2_steps_equal_the_plain_augmentation(cfg: CfgNode, item: dict) -> None:
    mapper = TrainMapper(cfg)
    pair = read_pair(item["file_name"], item["sem_seg_file_name"])
    for number in range(25):
        result = mapper({**item, "draw_number": number})
        image, labels = augment(*pair, item_rng(5, 1, number), crop_size=(24, 32))
        np.testing.assert_array_equal(result["image"].permute(1, 2, 0).numpy(), image[..., ::-1])
        np.testing.assert_array_equal(result["sem_seg"].numpy(), labels)


def test_seed_and_draw_decide_the_crop(cfg: CfgNode, item: dict) -> None:
    first, again, other = (TrainMapper(cfg)({**item, "draw_number": n})["image"] for n in (3, 3, 4))
    assert torch.equal(first, again) and not (first.shape == other.shape and torch.equal(first, other))
    reseeded = TrainMapper(cfg, seed=6)({**item, "draw_number": 3})["image"]
    assert not (first.shape == reseeded.shape and torch.equal(first, reseeded))


def test_rare_class_is_in_the_crop(cfg: CfgNode, item: dict) -> None:
    cfg.DATALOADER.MFUSER.RCS_MIN_PIXELS = 20
    mapper = TrainMapper(cfg)

    def share(rare_class: int) -> float:
        crops = [mapper({**item, "draw_number": n, "rare_class": rare_class})["sem_seg"] for n in range(60)]
        return float(np.mean([(crop == 7).sum() > 10 for crop in crops]))

    assert share(7) > 0.9 > 0.6 > share(-1)


def test_switches(cfg: CfgNode, item: dict) -> None:
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MFUSER.COLOR_AUG = "none", False
    cfg.INPUT.MFUSER.SCALE_RANGE, cfg.INPUT.CROP.SIZE = (1.0, 1.0), [48, 80]
    result = TrainMapper(cfg)({**item, "draw_number": 0})
    image, labels = read_pair(item["file_name"], item["sem_seg_file_name"])
    np.testing.assert_array_equal(result["image"].permute(1, 2, 0).numpy(), image[..., ::-1])
    np.testing.assert_array_equal(result["sem_seg"].numpy(), labels)


def test_image_smaller_than_the_crop_is_named(cfg: CfgNode, item: dict) -> None:
    cfg.INPUT.CROP.SIZE = [64, 64]
    with pytest.raises(ValueError, match=r"a.png is 48x80.*INPUT.CROP.SIZE=\(64, 64\)"):
        TrainMapper(cfg)(item)


def test_all_ignored_is_told_once(cfg: CfgNode, item: dict, caplog: pytest.LogCaptureFixture) -> None:
    cv2.imwrite(item["sem_seg_file_name"], np.full((48, 80), 255, np.uint8))
    mapper = TrainMapper(cfg)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (mapper(item)["sem_seg"] == 255).all()
    assert len(caplog.records) == 1 and "b.png" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.CROP.SIZE", [0.9, 0.9]),
        ("INPUT.MFUSER.SCALE_RANGE", (2.0, 0.5)),
        ("INPUT.RANDOM_FLIP", "vertical"),
        ("INPUT.CROP.TYPE", "relative"),
    ],
)
def test_contradictory_keys_are_named(cfg: CfgNode, key: str, value: object) -> None:
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=key.rsplit(".", 1)[1]):
        TrainMapper(cfg)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cityscapes_fine_sem_seg_val", (1024, 1707)),
        ("bdd100k_sem_seg_val", (720, 1200)),
        ("streets_sem_seg_val", (48, 80)),
        ("a_data_set_of_my_own", (1024, 1707)),
    ],
)
def test_test_size_goes_by_data_set(cfg: CfgNode, item: dict, name: str, wanted: tuple[int, int]) -> None:
    result = TestMapper(cfg, name)(item)
    assert tuple(result["image"].shape) == (3, *wanted)
    assert (result["height"], result["width"]) == (48, 80)


def test_test_size_of_a_key(cfg: CfgNode, item: dict) -> None:
    cfg.merge_from_list(["INPUT.MFUSER.TEST_SIZE.bdd100k_sem_seg_val", "(24, 40)"])
    assert TestMapper(cfg, "bdd100k_sem_seg_val")(item)["image"].shape == (3, 24, 40)
    with pytest.raises(ValueError, match="test size"):
        TestMapper(size=(0, 40))
