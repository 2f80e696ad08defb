"""The recorded training and test pipelines of the authors' release, number by number."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mfuser_d2.data.augmentation import augment, fit_within, resize_image

safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors to read the recorded numbers")


@pytest.fixture(scope="module")
def recorded(reference_dir: Path) -> tuple[dict[str, np.ndarray], dict]:
    numbers = safetensors.load_file(reference_dir / "pipeline.safetensors")
    return numbers, json.loads((reference_dir / "pipeline.json").read_text())


def _step(facts: dict, kind: str) -> dict:
    return next(step for step in facts["train_pipeline"] if step["type"] == kind)


def _normalize(image_bgr: np.ndarray, facts: dict) -> torch.Tensor:
    """As the network does it: RGB, minus the mean, over the spread."""
    step = _step(facts, "Normalize")
    rgb = torch.from_numpy(np.ascontiguousarray(image_bgr[..., ::-1].transpose(2, 0, 1))).float()
    return (rgb - torch.tensor(step["mean"]).view(3, 1, 1)) / torch.tensor(step["std"]).view(3, 1, 1)


def _pad(tensor: torch.Tensor, size: list[int], value: float) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, size[1] - tensor.shape[-1], 0, size[0] - tensor.shape[-2]), value=value)


def test_training_pipeline_gives_the_recorded_crops(recorded: tuple[dict[str, np.ndarray], dict]) -> None:
    numbers, facts = recorded
    bgr, labels = np.ascontiguousarray(numbers["in.image_rgb_u8"][..., ::-1]), numbers["in.label"]
    crop, pad = _step(facts, "RandomCrop"), _step(facts, "Pad")
    names = [name for name in facts["meta"] if name.startswith("train.seed")]
    assert names, "pipeline.json records no training seed"
    for name in names:
        image, target = augment(
            bgr,
            labels,
            np.random.RandomState(int(name.removeprefix("train.seed"))),
            crop_size=tuple(crop["crop_size"]),
            scale_range=tuple(_step(facts, "Resize")["ratio_range"]),
            max_area=crop["cat_max_ratio"],
            flip_chance=_step(facts, "RandomFlip")["prob"],
        )
        padded = _pad(_normalize(image, facts), pad["size"], pad["pad_val"])
        target = _pad(torch.from_numpy(target.copy()), pad["size"], pad["seg_pad_val"])
        torch.testing.assert_close(padded, torch.from_numpy(numbers[f"{name}.img"]), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(target.numpy(), numbers[f"{name}.seg"][0], err_msg=name)
        present = np.unique(target.numpy())
        np.testing.assert_array_equal(present[present != pad["seg_pad_val"]], numbers[f"{name}.labels"])


def test_test_pipeline_gives_the_recorded_image(recorded: tuple[dict[str, np.ndarray], dict]) -> None:
    numbers, facts = recorded
    bgr = np.ascontiguousarray(numbers["in.image_rgb_u8"][..., ::-1])
    width, height = facts["meta"]["test"]["img_scale"]
    image = resize_image(bgr, fit_within(bgr.shape[:2], (height, width)))
    assert list(image.shape) == facts["meta"]["test"]["img_shape"]
    torch.testing.assert_close(_normalize(image, facts), torch.from_numpy(numbers["test.img"]), rtol=0, atol=1e-5)
