"""`data`: images a second that the training loader feeds, and where the time goes."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.measure import describe_machine, emit
from mfuser_d2.data import plain
from mfuser_d2.data.augmentation import change_color, draw_color, item_rng, resize_image, resize_labels
from mfuser_d2.data.layouts import LAYOUTS
from mfuser_d2.data.prepare import encode_png
from mfuser_d2.data.reading import read_image, read_labels
from mfuser_d2.data.streets import draw_street

GTAV_SIZE = (1052, 1914)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `data`."""
    parser.add_argument("--dataset", help="a registered training set; default: drawn images of --size")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=GTAV_SIZE, help="of drawn images")
    parser.add_argument("--images", type=int, default=16, help="how many are drawn")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), default=(512, 512))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes, one case each")
    parser.add_argument("--seconds", type=float, default=15.0, help="measured in each case")


def run(arguments: argparse.Namespace) -> int:
    """Print a line a case; returns the exit status."""
    emit(describe_machine("cpu"))
    if arguments.dataset:
        measure_all(arguments, plain.TrainItems(name=arguments.dataset, crop_size=tuple(arguments.crop)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        measure_all(arguments, draw_items(Path(folder), arguments))
    return 0


def draw_items(root: Path, arguments: argparse.Namespace) -> plain.TrainItems:
    """A training set of drawn streets, with sensor noise so that PNG has as much to decode as in a photograph."""
    name = "streets_sem_seg_train"
    rng = np.random.default_rng(0)
    for index in range(arguments.images):
        image, labels = draw_street(split="train", index=index, size=tuple(arguments.size))
        noisy = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
        for kind, pixels in (("images", noisy), ("labels", labels)):
            path = root / LAYOUTS[name].folder / kind / "train" / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(pixels))
    return plain.TrainItems(name=name, crop_size=tuple(arguments.crop), root=root)


def measure_all(arguments: argparse.Namespace, items: plain.TrainItems) -> None:
    """The parts one by one on one thread, then the loader with each number of workers."""
    cv2.setNumThreads(0)
    for part, call in parts_of(items).items():
        emit({"benchmark": "data_part", "part": part, **seconds_of(call)})
    for workers in arguments.workers:
        emit(measure_loader(items, workers, arguments))


def parts_of(items: plain.TrainItems) -> dict[str, Callable[[], object]]:
    """What an item costs; the resizing is that of the mean area of the scale range, 1.75 times the native one."""
    image_path, label_path = items.pairs[0]
    image, labels = read_image(image_path), read_labels(label_path)
    size = tuple(round(edge * 1.75**0.5) for edge in labels.shape)
    crop = np.ascontiguousarray(image[: items.crop_size[0], : items.crop_size[1]])
    rng = item_rng(0)
    return {
        "read_image": lambda: read_image(image_path),
        "read_labels": lambda: read_labels(label_path),
        "resize_image": lambda: resize_image(image, size),
        "resize_labels": lambda: resize_labels(labels, size),
        "color": lambda: change_color(crop, draw_color(rng)),
    }


def seconds_of(call: Callable[[], object], repeats: int = 10) -> dict[str, float]:
    """Median wall and CPU seconds of a call; on a busy machine the latter say what an idle core would take."""
    times = []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - start, time.process_time() - cpu_start))
    wall, cpu = np.median(times, axis=0)
    return {"seconds": float(wall), "cpu_seconds": float(cpu)}


def measure_loader(items: plain.TrainItems, workers: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Images a second over some seconds, after the workers have started and filled their queues."""
    batches = iter(plain.train_loader(items, batch_size=arguments.batch, num_workers=workers))
    for _ in range(2 * max(workers, 1) + 1):
        next(batches)
    count, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < arguments.seconds:
        count += len(next(batches))
    return {
        "benchmark": "data",
        "workers": workers,
        "batch": arguments.batch,
        "crop": list(items.crop_size),
        "native": list(read_labels(items.pairs[0][1]).shape),
        "images": len(items),
        "images_per_second": round(count / elapsed, 2),
        # With workers this is what the main process does; without, all there is.
        "main_process_cpu_seconds_per_image": round((time.process_time() - cpu_start) / count, 4),
    }
