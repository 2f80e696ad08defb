"""Training hooks: progress line, checkpoints, evaluation, and the average of the weights."""

from __future__ import annotations

import datetime
import logging
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, TensorboardXWriter, get_event_storage

from mfuser_d2.core.checkpoint import FORMAT, encoder_identity, trainable_state_dict
from mfuser_d2.core.checkpoint_file import remove_unfinished, write_checkpoint
from mfuser_d2.core.ema import WeightAverage
from mfuser_d2.d2.checkpoint import MFuserCheckpointer, numbered_checkpoints
from mfuser_d2.d2.metrics import WINDOW, RecordNumbers
from mfuser_d2.d2.run import RunError, first_line, reason_outside
from mfuser_d2.d2.stopping import Stopped, StopSignals

logger = logging.getLogger(__name__)


class ProgressPrinter(EventWriter):
    """One log line: iteration, time left, losses, learning rate, speed, share of waiting for data, memory.

    Speed and share are means: where a loader with four workers is too slow, three of four batches come at once and the
    fourth is waited for, and a median would see no waiting at all.

    Args:
        max_iter: iterations in all.
        images_per_step: over all processes.
    """

    def __init__(self, *, max_iter: int, images_per_step: int) -> None:
        self.max_iter = max_iter
        self.images_per_step = images_per_step
        self._first_iter: int | None = None
        self._is_loader_slow = False

    def write(self) -> None:
        """Log the line; nothing after the last iteration."""
        storage = get_event_storage()
        if storage.iter < self.max_iter:
            logger.info(self.line(storage))
            self._watch_loader(storage)

    def line(self, storage: EventStorage) -> str:
        """The progress line for what the storage holds."""
        parts = [f"iter {storage.iter + 1}/{self.max_iter}"]
        seconds, waiting = _seconds_of_step(storage)
        if seconds:
            left = datetime.timedelta(seconds=int(seconds * (self.max_iter - storage.iter - 1)))
            parts.append(f"left {left}")
        parts.append(self._losses(storage))
        if "lr" in storage.histories():
            parts.append(f"lr {storage.history('lr').latest():.3g}")
        if seconds:
            speed = f"{seconds:.3f} s/iter  {self.images_per_step / seconds:.2f} images/s"
            parts.append(f"{speed}  data {waiting / seconds:.0%}")
        parts.append(f"memory {peak_memory() / 2**30:.2f} GiB")
        return "  ".join(parts)

    def _losses(self, storage: EventStorage) -> str:
        """Total and the terms of the last prediction; metrics.json has those of the earlier ones (loss_cls_0, ...)."""
        names = [name for name in storage.histories() if name.startswith("loss_") and not name[-1].isdigit()]
        terms = " ".join(f"{name.removeprefix('loss_')} {_median(storage, name):.3f}" for name in names)
        total = _median(storage, "total_loss")
        return f"loss {total:.3f} ({terms})" if total is not None else "loss not known yet"

    def _watch_loader(self, storage: EventStorage) -> None:
        """Warn where a window without the first batches, for which the workers had to start, is slow; again if it was
        fast meanwhile."""
        if self._first_iter is None:
            self._first_iter = storage.iter
        seconds, waiting = _seconds_of_step(storage)
        if not seconds or storage.iter < self._first_iter + 2 * WINDOW:
            return
        share = waiting / seconds
        if share > 0.3 and not self._is_loader_slow:
            logger.warning(
                "%.0f %% of the time is spent waiting for data: raise DATALOADER.NUM_WORKERS or use a faster disk.",
                100 * share,
            )
        self._is_loader_slow = share > (0.15 if self._is_loader_slow else 0.3)


class TensorBoardFiles(TensorboardXWriter):
    """TensorBoard's files; where they cannot be written any more, that is said once and training goes on."""

    _has_failed = False

    def write(self) -> None:
        self._unless_failed(super().write)

    def close(self) -> None:
        self._unless_failed(super().close)

    def _unless_failed(self, action: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            action()
        except OSError as error:
            self._has_failed = True
            logger.warning("No more TensorBoard files are written (%s); metrics.json has the same numbers.", error)


class KeepCheckpoints(HookBase):
    """Saves every `period` iterations, at the end, and when a signal asks the run to end; keeps the newest files.

    Of the files named after an iteration `max_to_keep` stay; `model_final.pth` is never deleted. A file is deleted only
    after a newer one is whole on the disk, those that a resumed run could not read first.

    Args:
        checkpointer: writes on the main process only.
        period: iterations.
        max_to_keep: at least 1.
        stop: the signals that end a run.
    """

    def __init__(self, checkpointer: MFuserCheckpointer, *, period: int, max_to_keep: int, stop: StopSignals) -> None:
        self.checkpointer = checkpointer
        self.period, self.max_to_keep, self.stop = period, max_to_keep, stop
        self.saved = -1
        self._files: list[str] = []

    def before_train(self) -> None:
        """Take over the files of the run that goes on: what cannot be read or lies in its future counts as oldest."""
        self.stop.install()
        self.saved = self.trainer.start_iter - 1
        last = Path(self.checkpointer.resumed_from).name
        if self.trainer.start_iter >= self.trainer.max_iter and last != "model_final.pth":
            self.trainer.iter -= 1  # the run was killed between its last two files
            self.checkpointer.save("model_final", iteration=self.trainer.iter)
            self.trainer.iter += 1
        if not comm.is_main_process():
            return
        left = remove_unfinished(self.checkpointer.save_dir)
        if left:
            logger.info("Removed what a killed run left unfinished: %s", ", ".join(left))
        damaged = self.checkpointer.damaged
        files = sorted(numbered_checkpoints(self.checkpointer.save_dir).items())
        self._files = [path for number, path in files if path in damaged or number >= self.trainer.start_iter]
        self._files += [path for _, path in files if path not in self._files]

    def after_step(self) -> None:
        self.stop.leave_step()
        number = self.stop.agreed()
        done = self.trainer.iter + 1
        if done % self.period == 0 or (number and done < self.trainer.max_iter):
            self.save()
        if done >= self.trainer.max_iter:
            self.checkpointer.save("model_final", iteration=self.trainer.iter)
        if number:
            # No process may leave before the file is whole: the others would be ended with it.
            comm.synchronize()
            logger.warning(
                "Ended by %s after iteration %d; %s has everything. Start again with --resume to go on.",
                *(signal.Signals(number).name, self.trainer.iter, self.checkpointer.get_checkpoint_file()),
            )
            raise Stopped(number)

    def after_train(self) -> None:
        self.stop.restore()

    def save(self) -> None:
        """Save what the run holds after the current iteration, unless it was saved already."""
        if self.saved == self.trainer.iter:
            return
        self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        self.saved = self.trainer.iter
        if comm.is_main_process():
            self._say_what_vanished()
            self._delete_oldest(self.checkpointer.get_checkpoint_file())

    def _say_what_vanished(self) -> None:
        gone = [path for path in self._files if not Path(path).exists()]
        if gone:
            self._files = [path for path in self._files if path not in gone]
            logger.error(
                "Somebody removed %s or the disk it lay on; this run has made OUTPUT_DIR=%s again and goes on, but "
                "what lay there before, log.txt included, is lost.",
                *(", ".join(gone), self.checkpointer.save_dir),
            )

    def _delete_oldest(self, newest: str) -> None:
        self._files = [*(path for path in self._files if path != newest), newest]
        while len(self._files) > self.max_to_keep:
            Path(self._files.pop(0)).unlink(missing_ok=True)


class EvaluateRegularly(HookBase):
    """Evaluates every `period` iterations (0 = never between) and at the end of a training that went well.

    What was trained is saved before, so that nothing is lost where the evaluation fails or is killed; a run that goes
    on makes an evaluation up for that was not finished.

    Args:
        evaluate: gives metric -> value on the main process.
        period: iterations.
        checkpoints: saves.
        numbers: records the scores.
    """

    def __init__(
        self,
        evaluate: Callable[[], Mapping[str, float]],
        *,
        period: int,
        checkpoints: KeepCheckpoints,
        numbers: RecordNumbers,
    ) -> None:
        self._evaluate = evaluate
        self.period, self.checkpoints, self.numbers = period, checkpoints, numbers

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if self.period > 0 and 0 < start < self.trainer.max_iter and start % self.period == 0:
            is_missing = comm.is_main_process() and not self.numbers.has_scores(start - 1)
            if any(comm.all_gather(is_missing)):
                logger.info("The evaluation after %d iterations was not finished; it is done now", start)
                self._run(start - 1)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done < self.trainer.max_iter:
            self.checkpoints.save()
            self._run(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # else an error or a signal ended the training
            self._run(self.trainer.max_iter)
        del self._evaluate  # it holds the trainer

    def _run(self, iteration: int) -> None:
        self.checkpoints.stop.install()  # the end of training gave the signals back
        try:
            with self.checkpoints.stop.ending_at_once():
                scores = self._evaluate()
        except (MemoryError, RuntimeError, OSError) as error:
            reason = _reason_in_evaluation(error)
            if not reason:
                raise
            raise RunError(
                f"The evaluation after iteration {iteration} failed: {reason} Everything trained is in "
                f"{self.checkpoints.checkpointer.get_checkpoint_file()}; a run with --resume evaluates it first."
            ) from error
        finally:
            if self.trainer.iter >= self.trainer.max_iter:
                self.checkpoints.stop.restore()
        if scores:
            self.numbers.write_scores(scores, iteration)
        comm.synchronize()  # evaluation takes the processes different times


def _reason_in_evaluation(error: Exception) -> str:
    """What outside the program made an evaluation fail and what to do, "" where nothing is known."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(error):
        return (
            f"memory was short ({first_line(error)}). Lower MODEL.MFUSER.INFERENCE.BATCH, or DATALOADER.NUM_WORKERS, "
            "or set INPUT.MFUSER.TEST_SIZE."
        )
    if isinstance(error, RunError):
        return str(error)
    return reason_outside(error) or (f"{str(error).rstrip('.')}." if isinstance(error, OSError) else "")


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
        if not comm.is_main_process() or self.trainer.iter < self.trainer.max_iter:
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


def _seconds_of_step(storage: EventStorage) -> tuple[float, float]:
    """Mean seconds of the last steps, and of waiting for data in them; 0 where nothing was timed yet."""
    if not {"time", "data_time"} <= set(storage.histories()):
        return 0.0, 0.0
    count = max(storage.count_samples("time", WINDOW), 1)
    return storage.history("time").avg(count), storage.history("data_time").avg(count)


def _median(storage: EventStorage, name: str) -> float | None:
    if name not in storage.histories():
        return None
    return storage.history(name).median(max(storage.count_samples(name, WINDOW), 1))
