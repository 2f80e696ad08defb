"""Loaders of the plain loop."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mfuser_d2.data import plain
from mfuser_d2.data.prepare import Report
from mfuser_d2.data.streets.writer import write_streets


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_streets(folder / "streets", report=Report(jobs=1), num_train=3, num_val=2, size=(64, 96))
    return folder


@pytest.fixture(autouse=True)
def _datasets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))


def test_batches_of_crops() -> None:
    items = plain.TrainItems(name="streets_sem_seg_train", crop_size=(32, 48), seed=1)
    for batch in itertools.islice(plain.train_loader(items, batch_size=2), 5):
        assert len(batch) == 2
        for item in batch:
            assert item["image"].dtype == torch.uint8 and item["sem_seg"].dtype == torch.int64
            assert item["image"].shape[0] == 3 and item["image"].shape[1:] == item["sem_seg"].shape
            assert item["image"].shape[1] <= 32 and item["image"].shape[2] <= 48


def test_workers_do_not_change_the_items() -> None:
    items = plain.TrainItems(name="streets_sem_seg_train", crop_size=(32, 48), seed=1)
    alone = list(itertools.islice(plain.train_loader(items, batch_size=2), 3))
    helped = list(itertools.islice(plain.train_loader(items, batch_size=2, num_workers=2), 3))
    for one, two in zip(itertools.chain(*alone), itertools.chain(*helped)):
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["sem_seg"], two["sem_seg"])


def test_test_items_keep_labels_at_native_size() -> None:
    items = list(plain.test_items("streets_fog_sem_seg_val", (32, 64)))
    assert len(items) == 2
    assert items[0]["image"].shape == (3, 32, 48) and items[0]["sem_seg"].shape == (64, 96)
    assert (items[0]["height"], items[0]["width"]) == (64, 96)


def test_images_are_rgb(root: Path) -> None:
    from PIL import Image

    item = next(plain.test_items("streets_sem_seg_val"))
    wanted = np.array(Image.open(item["file_name"]))
    np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), wanted)
