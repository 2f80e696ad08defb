"""The class x target table, with its protocol, as text, Markdown, JSON and CSV."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .confusion import flat_scores, target_mean
from .protocol import library_versions

_OVERALL = {
    "mIoU": "mIoU",
    "mIoU-16": "mIoU (16 classes)",
    "mIoU-13": "mIoU (13 classes)",
    "fwIoU": "fwIoU",
    "mACC": "mACC",
    "pACC": "pACC",
}
_ABSENT = "-"


class ResultTable:
    """Per-class IoU and the overall metrics of several targets, in percent, and their mean.

    Args:
        results: data set name -> result dict of its evaluation, with or without its "sem_seg" level (percent, NaN =
            not counted); a key "mean" is not taken for a data set.
        protocol: everything the numbers depend on, see `describe_protocol`.
        sources: data sets shown in the table but left out of the mean, such as the source's validation split.
    Raises:
        ValueError: there is no result at all.
    """

    def __init__(
        self,
        *,
        results: Mapping[str, Mapping],
        protocol: Mapping[str, Any] | None = None,
        sources: Sequence[str] = (),
    ) -> None:
        flat = {name: dict(flat_scores(result)) for name, result in results.items() if name != "mean"}
        self.results: dict[str, dict[str, float]] = {name: scores for name, scores in flat.items() if scores}
        self.images = {name: results[name]["images"] for name in self.results if "images" in results[name]}
        """Data set -> how many of its images were evaluated, where its evaluator says so."""
        self.protocol = dict(protocol or {})
        self.sources = tuple(sources)
        if not self.results:
            raise ValueError("no results to put in a table: each data set's result dict is empty")

    @property
    def datasets(self) -> list[str]:
        return list(self.results)

    @property
    def classes(self) -> list[str]:
        keys = dict.fromkeys(key for scores in self.results.values() for key in scores)
        return [key[len("IoU-") :] for key in keys if key.startswith("IoU-")]

    @property
    def mean(self) -> dict[str, float]:
        """Each metric averaged over the targets; over all data sets where every one of them is a source."""
        is_all_sources = all(name in self.sources for name in self.datasets)
        return target_mean(self.results, exclude=() if is_all_sources else self.sources)

    @property
    def classes_counted(self) -> dict[str, int]:
        """Data set -> how many classes stand behind its mIoU."""
        return {
            name: sum(not math.isnan(scores.get(f"IoU-{c}", math.nan)) for c in self.classes)
            for name, scores in self.results.items()
        }

    def rows(self) -> list[tuple[str, str, list[float]]]:
        """Give (kind "class" or "overall", label, values per data set and then their mean)."""
        mean = self.mean
        keys = [("class", f"IoU-{name}", name) for name in self.classes]
        keys += [("overall", key, label) for key, label in _OVERALL.items() if key in mean]
        table = [*self.results.values(), mean]
        return [(kind, label, [scores.get(key, math.nan) for scores in table]) for kind, key, label in keys]

    def headers(self) -> list[str]:
        """Give short column heads; a source is marked as such because the mean leaves it out."""
        return [short_name(name) + (" (source)" if name in self.sources else "") for name in self.datasets] + ["mean"]

    def to_text(self) -> str:
        rows = self.rows()
        left = max(len(label) for _, label, _ in rows)
        heads = self.headers()
        widths = [max(len(head), 6) for head in heads]
        lines = ["  ".join(["IoU (%)".ljust(left), *(h.rjust(w) for h, w in zip(heads, widths, strict=True))])]
        rule = "-" * len(lines[0])
        previous = None
        for kind, label, values in rows:
            if kind != previous:
                lines.append(rule)
            cells = (_cell(v).rjust(w) for v, w in zip(values, widths, strict=True))
            lines.append("  ".join([label.ljust(left), *cells]))
            previous = kind
        return "\n".join([*lines, "", *self._protocol_lines()]) + "\n"

    def to_markdown(self) -> str:
        lines = ["| IoU (%) | " + " | ".join(self.headers()) + " |"]
        lines.append("|:--|" + "--:|" * len(self.headers()))
        for _, label, values in self.rows():
            cells = [_cell(value) for value in values]
            if label == "mIoU":
                label, cells = f"**{label}**", [f"**{cell}**" for cell in cells]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines += ["", "Protocol", ""]
        lines += [f"- {line}" for line in self._protocol_lines()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Give full precision; null = not counted."""
        content = {
            "results": {name: _nullable(scores) for name, scores in self.results.items()},
            "mean": _nullable(self.mean),
            "sources": list(self.sources),
            "classes": self.classes,
            "classes_counted": self.classes_counted,
            "protocol": _plain(self.full_protocol()),
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Give one line per class, overall metric and protocol entry; the first column says which it is."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["kind", "name", *self.datasets, "mean"])
        for kind, label, values in self.rows():
            writer.writerow([kind, label, *("" if math.isnan(v) else f"{v:.4f}" for v in values)])
        padding = [""] * len(self.datasets)
        for name, value in flatten_protocol(self.full_protocol()):
            writer.writerow(["protocol", name, value, *padding])
        return out.getvalue()

    def full_protocol(self) -> dict[str, Any]:
        """Give the protocol, completed by what the table itself knows."""
        protocol = dict(self.protocol)
        protocol["classes_counted"] = self.classes_counted
        if self.images:
            protocol["images"] = self.images
        protocol["mean_over"] = [name for name in self.datasets if name not in self.sources] or self.datasets
        protocol.setdefault("versions", library_versions())
        return protocol

    def _protocol_lines(self) -> list[str]:
        return [f"{name}: {value}" for name, value in flatten_protocol(self.full_protocol())]

    def write(self, folder: str | Path) -> None:
        """Write results.txt, .md, .json and .csv into `folder`, each in one step so that none is ever half-written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, render in (
            ("txt", self.to_text),
            ("md", self.to_markdown),
            ("json", self.to_json),
            ("csv", self.to_csv),
        ):
            unfinished = folder / f".results.{suffix}.part"
            unfinished.write_text(render(), encoding="utf-8")
            unfinished.replace(folder / f"results.{suffix}")


def summarize(
    results: Mapping[str, Mapping],
    protocol: Mapping[str, Any],
    output_dir: str | Path,
    *,
    sources: Sequence[str] = (),
) -> str:
    """Write the table of all targets to `output_dir` and give it as text.

    Call it on the main process only. For metrics.json and TensorBoard, put `target_mean(results, exclude=sources)`
    beside the results under "mean": Detectron2 then logs it as "mean/mIoU".

    Args:
        results: data set name -> result dict of its evaluator; a key "mean" is not taken for a data set.
        protocol: see `describe_protocol`.
        output_dir: gets results.txt, results.md, results.json and results.csv.
        sources: data sets that are shown but left out of the mean, such as the source's validation split.
    Raises:
        ValueError: there is no result at all.
    """
    table = ResultTable(results=results, protocol=protocol, sources=sources)
    table.write(output_dir)
    return table.to_text()


def short_name(dataset: str) -> str:
    """Give a data set's name as a column head."""
    return dataset.replace("_sem_seg", "")


def _cell(value: float) -> str:
    return _ABSENT if math.isnan(value) else f"{value:.2f}"


def _nullable(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else float(value) for key, value in scores.items()}


def _plain(value: Any) -> Any:
    """Turn tuples, paths and other odd values into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def flatten_protocol(protocol: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Give a nested protocol as ("weights.sha256", "...") pairs in its own order."""
    lines: list[tuple[str, str]] = []
    for key, value in _plain(protocol).items():
        if isinstance(value, dict):
            lines += flatten_protocol(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            lines.append((prefix + key, ", ".join(str(item) for item in value)))
        else:
            lines.append((prefix + key, "unknown" if value is None else str(value)))
    return lines
