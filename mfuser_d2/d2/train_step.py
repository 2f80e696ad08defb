"""One training step in float32, float16 or bfloat16, on CPU or GPU, that stops where numbers go wrong."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from mfuser_d2.core.segmenter import PRECISIONS
from mfuser_d2.d2.solver import Clip


def training_dtype(cfg: CfgNode) -> torch.dtype:
    """Number format of matrix products in training: MODEL.MFUSER.PRECISION, or float16 by SOLVER.AMP.ENABLED alone.

    Raises:
        KeyError: the precision is unknown.
    """
    name = cfg.MODEL.MFUSER.PRECISION
    if name not in PRECISIONS:
        raise KeyError(f"MODEL.MFUSER.PRECISION={name!r} is unknown; choose from {sorted(PRECISIONS)}")
    return torch.float16 if name == "float32" and cfg.SOLVER.AMP.ENABLED else PRECISIONS[name]


class PrecisionTrainer(SimpleTrainer):
    """Forward, backward, checks, optimizer step.

    In float16 the loss is scaled and a step whose gradients overflow is skipped, which is how the scale finds its size.
    Otherwise a loss or gradient that is not finite stops the run before the weights change.

    Args:
        model: list of image dicts -> dict of losses, whose sum is minimised.
        data_loader: gives lists of image dicts.
        optimizer: over the model's trained parameters.
        dtype: number format of the matrix products.
        clip: bounds the gradients in place; None = no clipping.
        seed: every step's dropout and sampled points follow from it, the iteration and the process alone, so that a
            resumed run goes on as it would have; None leaves torch's random state alone.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype = torch.float32,
        clip: Clip | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.dtype = dtype
        self.clip = clip
        self.seed = seed
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """Train on the next batch.

        Raises:
            FloatingPointError: loss or gradient is not finite; the message names iteration, terms and images.
        """
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        if self.seed is not None:
            torch.manual_seed((self.seed << 32) + self.iter * comm.get_world_size() + comm.get_rank())
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            losses = self.model(data)
        total = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip is not None:
            self.clip(parameters)

        # All numbers in one copy, so that a GPU is waited for once a step.
        numbers = torch.stack([value.detach().float() for value in (*losses.values(), norm)]).tolist()
        metrics = dict(zip(losses, numbers))
        self._check_finite(metrics, numbers[-1], data)
        self._write_numbers({**metrics, "total_loss": sum(numbers[:-1]), "grad_norm": numbers[-1]}, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_finite(self, losses: Mapping[str, float], norm: float, data: Sequence[Mapping[str, Any]]) -> None:
        bad = [f"{name}={value}" for name, value in losses.items() if not np.isfinite(value)]
        if not bad and (np.isfinite(norm) or self.grad_scaler.is_enabled()):
            return
        culprits = ", ".join(bad) if bad else f"all losses are finite but the gradient norm is {norm}"
        if not bad:
            names = [name for name, p in self.model.named_parameters() if p.grad is not None and _is_bad(p.grad)]
            culprits += f", first in {names[0]} ({len(names)} tensors)" if names else ""
        images = ", ".join(str(item.get("file_name", "an image without file_name")) for item in data)
        raise FloatingPointError(
            f"Training stopped at iteration {self.iter}: {culprits}. Images of this batch: {images}. The weights were "
            "not changed by it. Look at these images and labels; else lower SOLVER.BASE_LR, turn on "
            "SOLVER.CLIP_GRADIENTS, or set MODEL.MFUSER.PRECISION float32 and resume from the last checkpoint."
        )

    def _write_numbers(self, metrics: dict[str, float], data_time: float) -> None:
        """Put the means over processes into the event storage; the slowest process's waiting for data."""
        gathered = comm.gather({**metrics, "data_time": data_time})
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(numbers.pop("data_time") for numbers in gathered), cur_iter=self.iter)
        means = {name: float(np.mean([numbers[name] for numbers in gathered])) for name in metrics}
        storage.put_scalars(cur_iter=self.iter, **means)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and loss scale, as plain values and tensors."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over optimizer and loss scale; a run may go on in another precision, then the scale starts anew."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler") and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _is_bad(tensor: Tensor) -> bool:
    return not bool(tensor.isfinite().all())
