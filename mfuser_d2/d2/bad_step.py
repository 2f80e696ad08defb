"""Training steps whose numbers are not finite: what is said about them, and the file to repeat them with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from mfuser_d2.core.checkpoint import FORMAT, encoder_identity, load_trainable, trainable_state_dict
from mfuser_d2.core.checkpoint_file import read_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)

Batch = Sequence[Mapping[str, Any]]


class BadSteps:
    """Records steps whose loss or gradient is not finite, and ends the run after the last one that may be skipped.

    Each process writes `folder`/bad_step_<iteration>_<process>.pth: its images, the random seed of the step, and the
    weights before it; see `repeat_step`. Files are written for the first ten only.

    Args:
        folder: OUTPUT_DIR.
        max_skipped: steps that are left out instead of ending the run, over the whole run.
    """

    def __init__(self, folder: str | Path, *, max_skipped: int = 0) -> None:
        self.folder = Path(folder)
        self.max_skipped = max_skipped
        self.count = 0

    def handle(self, step: BadStep, model: nn.Module) -> None:
        """Record a step; all processes of the run have to call it.

        Args:
            step: this process's part of it.
            model: with the weights and batch statistics from before the step.
        Raises:
            FloatingPointError: no further step may be skipped. The message has the iteration, the terms, the first
                tensor, and the images of the processes where it happened.
        """
        self.count += 1
        path = self.folder / f"bad_step_{step.iteration:07d}_{comm.get_rank()}.pth"
        said = [text for text in comm.all_gather(step.says() if step.culprits else "") if text]
        kept = ""
        if self.count <= 10:
            try:
                write_checkpoint(path, step.record(model))
                kept = f" The step can be repeated from {path} (mfuser_d2.d2.bad_step.repeat_step)."
            except OSError as error:
                kept = f" It could not be kept for a repeat: {error}"
        where = f"iteration {step.iteration}: {'; '.join(said)}.{kept} The weights were not changed by it."
        if self.count <= self.max_skipped:
            logger.error("Left out %s (%d of SOLVER.MAX_BAD_STEPS=%d)", where, self.count, self.max_skipped)
            return
        raise FloatingPointError(
            f"Training stopped at {where} Look at these images and labels; else lower SOLVER.BASE_LR, turn on "
            "SOLVER.CLIP_GRADIENTS, set MODEL.MFUSER.PRECISION float32, or leave such steps out with "
            "SOLVER.MAX_BAD_STEPS, and resume from the last checkpoint."
        )


@dataclasses.dataclass(frozen=True)
class BadStep:
    """One process's part of a step that went wrong.

    Args:
        iteration: counted from 0.
        culprits: the terms that are not finite, such as "loss_cls=nan"; empty where only another process has some.
        first: the first module or gradient that is not finite, "" if unknown.
        batch: the image dicts.
        seed: torch's, set before the step; None = not set.
    """

    iteration: int
    culprits: tuple[str, ...]
    first: str
    batch: Batch
    seed: int | None

    def says(self) -> str:
        """One clause for the message."""
        images = ", ".join(str(item.get("file_name", "an image without file_name")) for item in self.batch)
        first = f", first in {self.first}" if self.first else ""
        return f"{', '.join(self.culprits)}{first}. Images of this batch: {images}"

    def record(self, model: nn.Module) -> dict[str, Any]:
        """The content of the file: a checkpoint of the weights with the step beside them."""
        kinds = (Tensor, str, int, float)
        batch = [{key: value for key, value in item.items() if isinstance(value, kinds)} for item in self.batch]
        step = {"iteration": self.iteration, "culprits": list(self.culprits), "first": self.first, "seed": self.seed}
        return {
            "format": FORMAT,
            "model": trainable_state_dict(model),
            "encoders": encoder_identity(model),
            "bad_step": {**step, "batch": batch},
        }


def repeat_step(path: str | Path, model: nn.Module) -> tuple[dict[str, float], str]:
    """Load a recorded step into a model of the same config and compute its losses again.

    Returns:
        The losses, and the first module whose output is not finite ("" where all are).
    Raises:
        ValueError: the file holds no step, or belongs to another model.
    """
    data = read_checkpoint(path)
    if "bad_step" not in data:
        raise ValueError(f"{path} is a checkpoint without a recorded step; give a bad_step_*.pth of OUTPUT_DIR.")
    load_trainable(model, data["model"], data["encoders"])
    step = data["bad_step"]
    model.train()
    losses: dict[str, Tensor] = {}

    def run() -> None:
        if step["seed"] is not None:
            torch.manual_seed(step["seed"])
        losses.update(model(step["batch"]))

    first = first_bad_module(model, run)
    return {name: float(value.detach()) for name, value in losses.items()}, first


def first_bad_module(model: nn.Module, run: Callable[[], None]) -> str:
    """Name and type of the first module whose output is not finite while `run` uses the model; "" where all are."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(is_bad(tensor) for tensor in tensors_in(output)):
                found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def first_bad_gradient(model: nn.Module) -> str:
    """The first parameter whose gradient is not finite, with the number of them; "" where all are."""
    names = [name for name, p in model.named_parameters() if p.grad is not None and is_bad(p.grad)]
    return f"{names[0]} ({len(names)} tensors)" if names else ""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
