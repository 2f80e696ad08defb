"""A small evaluated run on disk, made without Detectron2."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfuser_d2.data.labels import CLASSES, COLORS
from mfuser_d2.evaluation import TargetRecorder, describe_protocol, summarize, target_mean

SIZE = (24, 40)
TARGETS = ("streets_sem_seg_val", "streets_night_sem_seg_val", "streets_fog_sem_seg_val")


def _write_target(folder: Path, name: str, noise: float, num_images: int, seed: int) -> dict:
    """Write images whose predictions get worse with their number, and record them."""
    generator = np.random.default_rng(seed)
    recorder = TargetRecorder(
        dataset_name=name,
        class_names=CLASSES,
        colors=COLORS,
        output_dir=folder / "inference" / name,
        save_predictions=True,
        save_per_image=True,
        has_confusion_picture=False,
    )
    data = folder / "data" / name
    data.mkdir(parents=True)
    for index in range(num_images):
        truth = np.repeat(generator.integers(0, 19, (3, 5)), 8, axis=0).repeat(8, axis=1).astype(np.uint8)
        truth[:4] = 255
        wrong = generator.random(SIZE) < noise * (index + 1) / num_images
        prediction = np.where(wrong | (truth == 255), generator.integers(0, 19, SIZE), truth).astype(np.uint8)
        image, label = data / f"{index}.jpg", data / f"{index}.png"
        Image.fromarray(generator.integers(0, 256, (*SIZE, 3)).astype(np.uint8)).save(image)
        Image.fromarray(truth).save(label)
        recorder.add(prediction, truth, image_file=str(image), label_file=str(label))
    return recorder.finish()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Give a function that writes an evaluated OUTPUT_DIR and returns it."""

    def make(name: str = "run", *, noise: float = 0.4, num_images: int = 5, stride: int = 341, seed: int = 0) -> Path:
        folder = tmp_path / name
        results = {
            target: _write_target(folder, target, noise * (1 + index), num_images, seed + index)
            for index, target in enumerate(TARGETS)
        }
        protocol = describe_protocol(crop_size=(512, 512), stride=(stride, stride), train_datasets=["streets_train"])
        summarize(results, protocol, folder / "inference", sources=TARGETS[:1])
        mean = target_mean(results, exclude=TARGETS[:1])["mIoU"]
        lines = [
            {"iteration": iteration, "total_loss": 10 / (1 + iteration), "loss_cls": 1.0, "lr": 1e-4}
            for iteration in range(0, 100, 20)
        ]
        lines.append({"iteration": 99, "mean/mIoU": mean, "streets_night_sem_seg_val/sem_seg/mIoU": float("nan")})
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make
