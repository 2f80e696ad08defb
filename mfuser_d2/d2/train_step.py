"""One training step in float32, float16 or bfloat16, on CPU or GPU, that stops where numbers go wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mfuser_d2.core.checkpoint import trainable_keys
from mfuser_d2.core.checkpoint_file import check_kinds
from mfuser_d2.core.segmenter import PRECISIONS
from mfuser_d2.d2.bad_step import BadStep, BadSteps, first_bad_gradient, first_bad_module
from mfuser_d2.d2.run import RunError
from mfuser_d2.d2.solver import Clip
from mfuser_d2.d2.stopping import largest_of_all


class DataError(RunError):
    """A batch could not be had; nothing of its step was done."""


def training_dtype(cfg: CfgNode) -> torch.dtype:
    """Number format of matrix products in training: MODEL.MFUSER.PRECISION, or float16 by SOLVER.AMP.ENABLED alone.

    Raises:
        KeyError: the precision is unknown.
    """
    name = cfg.MODEL.MFUSER.PRECISION
    if name not in PRECISIONS:
        raise KeyError(f"MODEL.MFUSER.PRECISION={name!r} is unknown; choose from {sorted(PRECISIONS)}")
    return torch.float16 if name == "float32" and cfg.SOLVER.AMP.ENABLED else PRECISIONS[name]


def next_batch(batches: Iterator[list[dict[str, Any]]], what: str) -> list[dict[str, Any]]:
    """The next batch of a loader.

    Args:
        what: it is for, as the message says it.
    Raises:
        DataError: it could not be read, or a worker was killed.
        StopIteration: there is none.
    """
    try:
        return next(batches)
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        end_workers(batches)
        raise _data_error(error, what) from error


def _data_error(error: Exception, what: str) -> DataError:
    # A worker's error comes with its whole traceback as text; the last line is what went wrong.
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    hint = "bring the data set back" if isinstance(error, OSError) else "mend or leave out what it names"
    if "DataLoader worker" in reason:
        hint = "memory may have been short: lower DATALOADER.NUM_WORKERS"
    return DataError(f"The images of {what} could not be read: {reason} Then {hint}, and start again with --resume.")


class NamedBatches:
    """The batches of a loader, whose errors say what they are for; see `next_batch`."""

    def __init__(self, loader: Collection[list[dict[str, Any]]], what: str) -> None:
        self.loader, self.what = loader, what
        self._batches: Iterator[list[dict[str, Any]]] = iter(())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self._batches = self._started()
        while True:
            try:
                batch = next_batch(self._batches, self.what)
            except StopIteration:
                return
            yield batch

    def close(self) -> None:
        """End the workers, whoever still holds the iterator."""
        end_workers(self._batches)

    def _started(self) -> Iterator[list[dict[str, Any]]]:
        try:
            return iter(self.loader)
        except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
            raise _data_error(error, self.what) from error


def end_workers(batches: object) -> None:
    """End the workers of a loader's iterator.

    An error's traceback holds the iterator, so they would live until the process ends, and then for another minute:
    they outlive a SIGTERM that long (mfuser_d2.data.build), while the other processes wait for this one.
    """
    if hasattr(batches, "_shutdown_workers"):  # not of a loader without workers
        batches._shutdown_workers()


class PrecisionTrainer(SimpleTrainer):
    """Forward, backward, checks, optimizer step.

    In float16 the loss is scaled and a step whose gradients overflow is skipped, which is how the scale finds its size.
    Otherwise a loss or gradient that is not finite, on any process, stops the run before the weights change, or is left
    out where `bad_steps` allows it.

    Args:
        model: list of image dicts -> dict of losses, whose sum is minimised.
        data_loader: gives lists of image dicts.
        optimizer: over the model's trained parameters.
        dtype: number format of the matrix products.
        clip: bounds the gradients in place; None = no clipping.
        seed: every step's dropout and sampled points follow from it, the iteration and the process alone, so that a
            resumed run goes on as it would have; None leaves torch's random state alone.
        bad_steps: records the steps that went wrong.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        bad_steps: BadSteps,
        dtype: torch.dtype = torch.float32,
        clip: Clip | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.dtype = dtype
        self.clip = clip
        self.seed = seed
        self.bad_steps = bad_steps
        self._inner = model.module if isinstance(model, DistributedDataParallel) else model
        parameters = dict(self._inner.named_parameters())
        self._statistics = [key for key in trainable_keys(self._inner) if key not in parameters]
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """Train on the next batch.

        Raises:
            DataError: the loader gave none; the message says why.
            FloatingPointError: loss or gradient is not finite; the message names iteration, terms and images.
        """
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        data = next_batch(self._data_loader_iter, f"iteration {self.iter}")
        data_time = time.perf_counter() - start

        statistics = self._read_statistics()
        losses = self._forward(data)
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
        metrics = {**dict(zip(losses, numbers)), "total_loss": sum(numbers[:-1]), "grad_norm": numbers[-1]}
        culprits = self._culprits(metrics)
        if largest_of_all(float(bool(culprits))):
            self._handle_bad_step(culprits, data, statistics)
            return
        self._write_numbers(metrics, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _forward(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        seed = self._step_seed()
        if seed is not None:
            torch.manual_seed(seed)
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(data)

    def _step_seed(self) -> int | None:
        if self.seed is None:
            return None
        return (self.seed << 32) + self.iter * comm.get_world_size() + comm.get_rank()

    def _read_statistics(self) -> dict[str, Tensor]:
        """What a forward pass changes: the batch statistics, a few kilobytes."""
        state = self._inner.state_dict()
        return {key: state[key].clone() for key in self._statistics}

    def _culprits(self, metrics: Mapping[str, float]) -> tuple[str, ...]:
        """The terms of this process that are not finite; an overflow that a smaller loss scale may heal is none."""
        bad = tuple(
            f"{name}={value}"
            for name, value in metrics.items()
            if name not in ("total_loss", "grad_norm") and not math.isfinite(value)
        )
        if bad or math.isfinite(metrics["grad_norm"]) or self.grad_scaler.get_scale() > 1:
            return bad
        return (f"all losses are finite but the gradient norm is {metrics['grad_norm']}",)

    def _handle_bad_step(
        self, culprits: tuple[str, ...], data: list[dict[str, Any]], statistics: Mapping[str, Tensor]
    ) -> None:
        gradient = first_bad_gradient(self._inner)
        self._inner.load_state_dict(dict(statistics), strict=False)
        first = first_bad_module(self._inner, lambda: self._forward(data)) or gradient
        self._inner.load_state_dict(dict(statistics), strict=False)
        self.optimizer.zero_grad()
        step = BadStep(iteration=self.iter, culprits=culprits, first=first, batch=data, seed=self._step_seed())
        self.bad_steps.handle(step, self._inner)
        if self.grad_scaler.is_enabled():
            self.grad_scaler.update(self.grad_scaler.get_scale() * self.grad_scaler.get_backoff_factor())

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
        """Optimizer, loss scale and the number of steps left out, as plain values and tensors."""
        return {
            **super().state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "bad_steps": self.bad_steps.count,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over optimizer and loss scale; a run may go on in another precision, then the scale starts anew."""
        super().load_state_dict(state_dict)
        _check_moments(self.optimizer)
        if state_dict.get("grad_scaler") and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.bad_steps.count = state_dict.get("bad_steps", 0)


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless what a file brought fits: torch itself does not look, and writes past a short tensor."""
    kinds = set()
    for parameter, state in optimizer.state.items():
        if not isinstance(state, Mapping):
            raise ValueError(f"the optimizer's state of a parameter is a {type(state).__name__}")
        kinds.add(tuple((name, type(value)) for name, value in state.items()))
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step":
                check_kinds(parameter.detach(), value, f"the optimizer's {name}")
            elif isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"the optimizer's {name} is of shape {tuple(value.shape)}, wanted one number")
    if len(kinds) > 1:
        raise ValueError("the optimizer's state holds different things for different parameters")
