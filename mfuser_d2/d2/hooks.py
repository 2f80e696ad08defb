"""Training hooks: the progress line, the checkpoints that are kept, and the average of the weights."""

from __future__ import annotations

import datetime
import logging
import resource
import sys
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from mfuser_d2.core.checkpoint import FORMAT, encoder_identity, trainable_state_dict
from mfuser_d2.core.checkpoint_file import write_checkpoint
from mfuser_d2.core.ema import WeightAverage

logger = logging.getLogger(__name__)

_WINDOW = 20  # iterations that the numbers of the progress line are taken over


class ProgressPrinter(EventWriter):
    """One log line: iteration, time left, losses, learning rate, speed, share of waiting for data, memory.

    Args:
        max_iter: iterations in all.
        images_per_step: over all processes.
    """

    def __init__(self, *, max_iter: int, images_per_step: int) -> None:
        self.max_iter = max_iter
        self.images_per_step = images_per_step
        self._has_warned_of_loader = False

    def write(self) -> None:
        """Log the line; nothing after the last iteration."""
        storage = get_event_storage()
        if storage.iter < self.max_iter:
            logger.info(self.line(storage))

    def line(self, storage: EventStorage) -> str:
        """The progress line for what the storage holds."""
        parts = [f"iter {storage.iter + 1}/{self.max_iter}"]
        seconds = _median(storage, "time")
        if seconds:
            left = datetime.timedelta(seconds=int(seconds * (self.max_iter - storage.iter - 1)))
            parts.append(f"left {left}")
        parts.append(self._losses(storage))
        if "lr" in storage.histories():
            parts.append(f"lr {storage.history('lr').latest():.3g}")
        if seconds:
            waiting = (_median(storage, "data_time") or 0.0) / seconds
            parts.append(f"{seconds:.3f} s/iter  {self.images_per_step / seconds:.2f} images/s  data {waiting:.0%}")
            self._warn_of_loader(waiting)
        parts.append(f"memory {peak_memory() / 2**30:.2f} GiB")
        return "  ".join(parts)

    def _losses(self, storage: EventStorage) -> str:
        """Total and the terms of the last prediction; metrics.json has those of the earlier ones (loss_cls_0, ...)."""
        names = [name for name in storage.histories() if name.startswith("loss_") and not name[-1].isdigit()]
        terms = " ".join(f"{name.removeprefix('loss_')} {_median(storage, name):.3f}" for name in names)
        total = _median(storage, "total_loss")
        return f"loss {total:.3f} ({terms})" if total is not None else "loss not known yet"

    def _warn_of_loader(self, waiting: float) -> None:
        if waiting > 0.3 and not self._has_warned_of_loader:
            self._has_warned_of_loader = True
            logger.warning(
                "%.0f %% of the time is spent waiting for data: raise DATALOADER.NUM_WORKERS or use a faster disk.",
                100 * waiting,
            )


class LastCheckpoints(PeriodicCheckpointer):
    """Detectron2's periodic checkpointer that also counts files of the run it continues.

    Of the files named after an iteration the newest `max_to_keep` stay; `model_final.pth` is never deleted.
    """

    def before_train(self) -> None:
        super().before_train()
        folder = Path(self.checkpointer.save_dir)
        files = folder.glob(f"{self.file_prefix}_*.pth") if self.max_to_keep else ()
        # The names hold the iteration with leading zeros, so their order is that of the iterations.
        self.recent_checkpoints = sorted(str(file) for file in files if file.stem.rsplit("_", 1)[1].isdigit())


class AverageWeights(HookBase):
    """Keeps the moving average of the weights and writes it as `model_final_ema.pth` when training ends.

    Args:
        average: over the trainer's model.
        folder: OUTPUT_DIR.
    """

    def __init__(self, average: WeightAverage, folder: str) -> None:
        self.average = average
        self.path = Path(folder) / "model_final_ema.pth"

    def after_step(self) -> None:
        self.average.update()

    def after_train(self) -> None:
        """Write the weights alone: training is resumed from the usual checkpoints, which hold the average as well."""
        if not comm.is_main_process() or self.trainer.iter + 1 < self.trainer.max_iter:
            return
        model = self.average.model
        with self.average.applied():
            data = {"format": FORMAT, "model": trainable_state_dict(model), "encoders": encoder_identity(model)}
            write_checkpoint(str(self.path), data)
        logger.info("Saved the average of the weights as %s", self.path)


def peak_memory() -> int:
    """Most memory this process has held so far, in bytes: on the GPU where there is one in use, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _median(storage: EventStorage, name: str) -> float | None:
    if name not in storage.histories():
        return None
    return storage.history(name).median(max(storage.count_samples(name, _WINDOW), 1))
