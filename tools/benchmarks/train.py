"""`train`: time, memory and operations of a training step, by part of the network."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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

PAPER_ITERATIONS = 20000
FROZEN = ("VFM", "VLM, image", TEXT, "encoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `train`."""
    add_network_arguments(parser)
    parser.add_argument("--checkpoint", nargs="+", choices=("off", "on"), default=["off"], help="recompute blocks")
    parser.add_argument("--batch", type=int, help="images a step (default: the config's)")


def run(arguments: argparse.Namespace) -> int:
    """Print a line a case; returns the exit status."""
    start(arguments)
    cases = itertools.product(arguments.config_file, arguments.precision, arguments.checkpoint)
    rows = [measure_step(arguments, *case) for case in cases]
    if arguments.plot:
        draw_parts(rows, arguments.plot)
    return 0


def measure_step(arguments: argparse.Namespace, config_file: str, precision: str, checkpoint: str) -> dict:
    """The row of a config in one precision, with or without checkpointing."""
    from mfuser_d2.d2.bad_step import BadSteps
    from mfuser_d2.d2.solver import build_clip, build_optimizer
    from mfuser_d2.d2.train_step import PrecisionTrainer, training_dtype

    device = arguments.device
    before = memory_in_use(device)
    options = ["MODEL.MFUSER.PRECISION", precision, "MODEL.MFUSER.CHECKPOINT", str(checkpoint == "on")]
    cfg, model = build_network(config_file, options, arguments)
    size, count = tuple(cfg.INPUT.CROP.SIZE), arguments.batch or cfg.SOLVER.IMS_PER_BATCH
    batch = make_batch(count, size, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    trainer = PrecisionTrainer(
        model=model.train(),
        data_loader=itertools.repeat(batch),
        optimizer=build_optimizer(cfg, model),
        dtype=training_dtype(cfg),
        clip=build_clip(cfg),
        bad_steps=BadSteps(cfg.OUTPUT_DIR),
    )
    rates = [matrix_rates(precision, device)]
    row = {"benchmark": "train", "config": name_of(config_file), "precision": precision}
    row |= {"case": f"batch {count}" + (", checkpoint" if checkpoint == "on" else ""), "size": size, "device": device}
    row |= observe(trainer, batch, device)
    with peak_memory(device, before) as peak:
        step(trainer)
    row |= {"peak_memory_bytes": peak[0] if peak else None}
    row |= time_calls(lambda: step(trainer), arguments.repeats, device)
    row["hours_for_20000_steps"] = row["seconds"] * PAPER_ITERATIONS / 3600
    rates.append(matrix_rates(precision, device))
    parts = count_flops(model, size)
    # Backward takes the forward's operations once for the inputs, and once more for weights that train. What
    # checkpointing computes again does not count.
    flops = sum(value * (2 if part in FROZEN else 3) * (1 if part == TEXT else count) for part, value in parts.items())
    return emit(add_efficiency(row, flops, rates))


def make_batch(count: int, size: tuple[int, int], num_classes: int) -> list[dict]:
    """Random images with labels in patches, so that most classes are in every image; some pixels are ignored."""
    batch = []
    for _ in range(count):
        cells = torch.randint(0, num_classes, (-(-size[0] // 32), -(-size[1] // 32)))
        cells[torch.rand(cells.shape) < 0.05] = 255
        labels = cells.repeat_interleave(32, 0).repeat_interleave(32, 1)[: size[0], : size[1]]
        batch.append({"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8), "sem_seg": labels})
    return batch


def step(trainer) -> None:
    """A whole step of the real trainer, checks and metrics included."""
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        trainer.iter = 0
        trainer.run_step()


def observe(trainer, batch: list[dict], device: str) -> dict:
    """A step in pieces under the clock: each part's share, and the bytes that the forward keeps for the backward."""
    clock, saved = PartClock(trainer.model, device), {}
    for is_measured in (False, True):  # the first pass warms up and makes the optimizer's state
        with clock.running():
            with saved_bytes(trainer.model, lambda count: saved.update(total=saved.get("total", 0) + count)):
                with torch.autocast(trainer.device_type, dtype=trainer.dtype, enabled=trainer.dtype != torch.float32):
                    total = sum(trainer.model(batch).values())
            clock.enter("backward")
            trainer.optimizer.zero_grad()
            total.backward()
            clock.leave()
            clock.enter("optimizer")
            trainer.optimizer.step()
            clock.leave()
        if not is_measured:
            saved.clear()
    seconds = clock.seconds()
    return {"saved_bytes": saved["total"], "part_seconds": seconds, "part_shares": shares(seconds)}


@contextmanager
def saved_bytes(model: nn.Module, add: Callable[[int], None]) -> Iterator[None]:
    """Calls `add` with the size of every storage that autograd keeps, once each; weights do not count."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:  # what is kept stays alive, so no address comes twice
            seen.add(storage.data_ptr())
            add(storage.nbytes())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
