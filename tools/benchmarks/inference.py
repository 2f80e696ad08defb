"""`inference`: time, memory and operations of a crop and of a whole image, by part of the network."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.measure import emit, memory_in_use, peak_memory, time_calls
from benchmarks.network import (
    TEXT,
    PartClock,
    add_efficiency,
    add_network_arguments,
    build_network,
    count_flops,
    draw_parts,
    matrix_rates,
    name_of,
    shares,
    start,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `inference`."""
    add_network_arguments(parser)
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), default=(1024, 2048))
    parser.add_argument(
        "--image-repeats",
        type=int,
        help="timed passes over the whole image; default: --repeats on a GPU, else 0: it is seen once, 18 windows",
    )
    parser.add_argument("--cases", nargs="+", choices=("crop", "image"), default=["crop", "image"])


def run(arguments: argparse.Namespace) -> int:
    """Print a line a case; returns the exit status."""
    start(arguments)
    rows = []
    for config_file in arguments.config_file:
        for precision in arguments.precision:
            rows += measure_network(arguments, config_file, precision)
    if arguments.plot:
        draw_parts(rows, arguments.plot)
    return 0


def measure_network(arguments: argparse.Namespace, config_file: str, precision: str) -> list[dict]:
    """Rows of a config in one precision, printed when all is measured."""
    device = arguments.device
    before = memory_in_use(device)
    cfg, model = build_network(config_file, ["MODEL.MFUSER.PRECISION", precision], arguments)
    model.eval()
    crop = tuple(cfg.MODEL.MFUSER.INFERENCE.CROP_SIZE)
    sizes = {"crop": crop, "image": tuple(arguments.image_size)}
    repeats = {"crop": arguments.repeats, "image": arguments.image_repeats}
    if repeats["image"] is None:
        repeats["image"] = arguments.repeats if device.startswith("cuda") else 0
    rows, rates = [], [matrix_rates(precision, device)]
    for case in arguments.cases:
        image = torch.randint(0, 256, (3, *sizes[case]), dtype=torch.uint8)
        call = lambda image=image: model.predict([image])  # noqa: E731
        model.predict([torch.zeros(3, *crop, dtype=torch.uint8)])  # encodes the texts
        row = {"benchmark": "inference", "config": name_of(config_file), "precision": precision, "case": case}
        row |= {"size": sizes[case], "batch": cfg.MODEL.MFUSER.INFERENCE.BATCH, "device": device}
        timed = time_calls(call, repeats[case], device) if repeats[case] else {}
        rows.append(row | observe(model, call, device, before) | timed)
        rates.append(matrix_rates(precision, device))
    flops = sum(count for part, count in count_flops(model, crop).items() if part != TEXT)  # texts are known by then
    return [emit(add_efficiency(row, row["windows"] * flops, rates)) for row in rows]


def observe(model: torch.nn.Module, call: Callable[[], object], device: str, before: int) -> dict:
    """One pass under the clock: its time, the parts' share, peak memory, and how often windows and texts went through.

    Args:
        before: memory in use before the model was built; its weights count.
    """
    clock, windows, texts = PartClock(model, device), [], []
    handle = model.sem_seg_head.text_encoder.register_forward_hook(lambda *_: texts.append(1))
    plain = model.window_scores

    def counted(images: torch.Tensor) -> torch.Tensor:
        windows.append(len(images))
        return plain(images)

    model.window_scores = counted
    try:
        with peak_memory(device, before) as peak, clock.running():
            cpu_start = time.process_time()
            call()
        cpu_seconds = time.process_time() - cpu_start
    finally:
        handle.remove()
        del model.window_scores
    seconds = clock.seconds()
    return {
        "seconds": sum(seconds.values()),
        "cpu_seconds": cpu_seconds,
        "windows": sum(windows),
        "passes": len(windows),
        "text_encodings": len(texts),
        "peak_memory_bytes": peak[0] if peak else None,
        "part_seconds": seconds,
        "part_shares": shares(seconds),
    }
