"""metrics.json and the other records of a run, without gaps or repetitions across restarts."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from mfuser_d2.core.checkpoint_file import write_text

logger = logging.getLogger(__name__)

WINDOW = 20  # iterations that smoothed numbers are the median of


class MetricsFile(EventWriter):
    """One JSON object a line: the medians of a training row, or the scores of an evaluation.

    A row is on the disk before the checkpoint of its iteration is written, so cutting the file at the iteration that a
    run goes on from leaves exactly the rows that will not be written again.

    Args:
        path: of the file; its folder is made when it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self) -> None:
        """Append what the storage holds of the current iteration."""
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(WINDOW).items()
        self.append(storage.iter, {name: value for name, (value, iteration) in latest if iteration == storage.iter})

    def append(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Append one row; numbers that are not finite are left out, because JSON has none."""
        row = {name: value for name, value in numbers.items() if math.isfinite(value)}
        text = json.dumps({**row, "iteration": iteration}, sort_keys=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a last line that a killed run left behind in part is no row."""
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                found.append(row)
        return found

    def cut(self, iteration: int) -> None:
        """Drop the rows from `iteration` on, which the run that goes on there writes again."""
        if self.path.exists():
            kept = [json.dumps(row, sort_keys=True) + "\n" for row in self.rows() if row["iteration"] < iteration]
            write_text(self.path, "".join(kept))

    def set_aside(self) -> None:
        """Rename the file of an earlier run to metrics.json.1, .2, ..."""
        if self.path.exists():
            number = 1
            while (other := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            self.path.rename(other)
            logger.info("The metrics of an earlier run in this folder are now %s", other)


class RecordNumbers(HookBase):
    """Lets the writers write every `period` iterations, before the checkpoint of the iteration.

    Its state is what smoothing looks back at, so that rows after a restart are those of an uninterrupted run.

    Args:
        build_writers: gives the writers when training begins; empty on all but the main process.
        period: iterations.
    """

    def __init__(self, build_writers: Callable[[], Sequence[EventWriter]], period: int) -> None:
        self._build_writers = build_writers
        self.period = period
        self.writers: Sequence[EventWriter] = ()
        self._history: Mapping[str, Sequence[Sequence[float]]] = {}

    def before_train(self) -> None:
        self.writers = self._build_writers()
        put_history(get_event_storage(), self._history)
        start, is_resumed = self.trainer.start_iter, self.trainer.is_resumed
        for file in self._files():
            file.cut(start) if start or is_resumed else file.set_aside()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            for writer in self.writers:
                writer.write()

    def has_scores(self, iteration: int) -> bool:
        """Whether metrics.json holds an evaluation of that iteration (its names have a slash)."""
        rows = [row for file in self._files() for row in file.rows() if row["iteration"] == iteration]
        return any("/" in name for row in rows for name in row)

    def write_scores(self, scores: Mapping[str, float], iteration: int) -> None:
        """Record an evaluation."""
        get_event_storage().put_scalars(smoothing_hint=False, cur_iter=iteration, **scores)
        for writer in self.writers:
            if isinstance(writer, MetricsFile):
                writer.append(iteration, scores)
            else:
                writer.write()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The last values of every smoothed number, as [value, iteration]."""
        storage = getattr(self.trainer, "storage", None)  # there is none before training
        return {"history": recent_history(storage)} if self.writers and storage is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        history = state["history"]
        pairs = [pair for values in history.values() for pair in (values if isinstance(values, list) else [values])]
        if not all(isinstance(pair, list) and [type(number) for number in pair] == [float, int] for pair in pairs):
            raise ValueError("the recent numbers are no lists of [value, iteration]")
        self._history = history

    def _files(self) -> list[MetricsFile]:
        return [writer for writer in self.writers if isinstance(writer, MetricsFile)]


def recent_history(storage: EventStorage) -> dict[str, list[list[float]]]:
    """What smoothing needs of a storage, as plain numbers: name -> [[value, iteration], ...]."""
    hints = storage.smoothing_hints()
    return {
        name: [[float(value), int(iteration)] for value, iteration in history.values()[-WINDOW:]]
        for name, history in storage.histories().items()
        if hints[name]
    }


def put_history(storage: EventStorage, history: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The reverse of `recent_history`."""
    for name, values in history.items():
        for value, iteration in values:
            storage.put_scalar(name, value, cur_iter=int(iteration))
