"""One evaluation on disk: its results, confusion counts, images and training curves, as the report needs them."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What one evaluation left in the folder of one data set; each part may be missing.

    Attributes:
        name: the data set.
        folder: where its files are, or None.
        confusion: the content of confusion.json; "counts" is (K, K), row = true class.
        images: the records of images.jsonl, worst first.
    """

    name: str
    folder: Path | None = None
    confusion: Mapping[str, Any] | None = None
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray | None:
        return None if self.confusion is None else np.asarray(self.confusion["counts"], dtype=np.int64)


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        name: what the report calls it.
        folder: the folder of results.json.
        content: what results.json holds; its nulls became NaN.
        targets: one per data set, in the table's order.
        metrics: the lines of metrics.json, one per iteration, ascending; empty where there is no such file.
    """

    name: str
    folder: Path
    content: Mapping[str, Any]
    targets: list[Target]
    metrics: list[dict[str, float]]

    @property
    def classes(self) -> list[str]:
        return self.content["classes"]

    @property
    def sources(self) -> list[str]:
        return self.content.get("sources", [])

    @property
    def protocol(self) -> Mapping[str, Any]:
        return self.content.get("protocol", {})

    @cached_property
    def mean(self) -> dict[str, float]:
        """Metric -> its average over the targets, in percent; NaN = not counted."""
        return _known(self.content["mean"])

    def scores(self, dataset: str) -> dict[str, float]:
        """Metric -> percent of one data set; NaN = not counted, empty where this run did not evaluate it."""
        return _known(self.content["results"].get(dataset, {}))

    def series(self, key: str) -> list[tuple[float, float]]:
        """Give (iteration, value) of a metric of metrics.json; lines without it or with a non-finite value drop out."""
        pairs = ((line["iteration"], line.get(key)) for line in self.metrics)
        return [(x, y) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]


def load_run(path: str | Path, *, name: str | None = None) -> Run:
    """Read an evaluation.

    Args:
        path: the run's folder (OUTPUT_DIR, or its `inference`), or a results.json.
        name: what the report calls it; by default the folder's name.
    Raises:
        ValueError: there is no results.json, or it is damaged.
    """
    path = Path(path)
    file = _find_results(path)
    content = _read_json(file)
    missing = {"results", "mean", "classes"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{file} lacks {sorted(missing)}; it is not a results.json of mfuser_d2's evaluation")
    home = file.parent.parent if file.parent.name == "inference" else file.parent
    return Run(
        name=name or home.resolve().name,
        folder=file.parent,
        content=content,
        targets=[_load_target(file.parent, dataset) for dataset in content["results"]],
        metrics=_load_metrics(home / "metrics.json"),
    )


def _find_results(path: Path) -> Path:
    candidates = [path] if path.suffix == ".json" else [path / "inference" / "results.json", path / "results.json"]
    for file in candidates:
        if file.is_file():
            return file
    raise ValueError(
        f"{path} holds no evaluation (looked for {', '.join(str(file) for file in candidates)}); run "
        "`python tools/train_net.py --eval-only` first and give its OUTPUT_DIR"
    )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); evaluate again") from error


def _load_target(folder: Path, dataset: str) -> Target:
    for candidate in (folder / dataset, folder / "inference" / dataset):
        if candidate.is_dir():
            confusion = candidate / "confusion.json"
            images = candidate / "images.jsonl"
            return Target(
                name=dataset,
                folder=candidate,
                confusion=_read_json(confusion) if confusion.is_file() else None,
                images=_worst_first(_read_lines(images)) if images.is_file() else [],
            )
    return Target(name=dataset)


def _worst_first(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    known = (record for record in records if record.get("mIoU") is not None)
    return sorted(known, key=lambda record: (record["mIoU"], record["image"]))


def _load_metrics(file: Path) -> list[dict[str, float]]:
    """Read Detectron2's metrics.json; a resumed run repeats iterations, of which the later line counts."""
    if not file.is_file():
        return []
    by_iteration: dict[float, dict[str, float]] = {}
    for line in _read_lines(file):
        if isinstance(line.get("iteration"), int | float):
            by_iteration.setdefault(line["iteration"], {}).update(line)
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: line %d is damaged and left out", file, number)
            continue
        if isinstance(record, dict):
            yield record


def _known(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else float(value) for key, value in scores.items()}
