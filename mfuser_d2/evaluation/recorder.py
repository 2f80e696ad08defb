"""Counting one target and writing its files, without Detectron2."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .confusion import ABSENT_CLASS_MODES, ConfusionMatrix, iou_per_class, mean_of_known, score_confusion, sum_counts
from .label_files import write_label

logger = logging.getLogger(__name__)

Gather = Callable[[Any], list]


def gather_alone(value: Any) -> list:
    """Gather in a single process: give what was put in."""
    return [value]


class TargetRecorder:
    """Running counts of one target, and the files that the table and the report are made of.

    Only (K, K) int64 counts are kept in memory; what concerns single images goes to disk as it comes.

    Args:
        dataset_name: the target.
        class_names: K names.
        colors: K RGB triples, 0..255, for the predictions' palette; None leaves them grey.
        ignore_label: the value of a truth without a class.
        output_dir: the target's own folder; None writes nothing. Gets confusion.json, and confusion.png,
            predictions/, images.jsonl, sem_seg_predictions.json as switched on below.
        image_root: predictions keep the folders of their image below it, so that equal names stay apart.
        absent_class: "skip" or "zero", see `ABSENT_CLASS_MODES`.
        save_predictions: write each prediction as a palette PNG of trainIds.
        save_per_image: write the counts of each image, one JSON object a line.
        save_rle: write every mask run-length encoded, in the form of Detectron2's own evaluator.
        has_confusion_picture: draw confusion.png.
        rank: this process's number.
    Raises:
        ValueError: `absent_class` is unknown, or files are wanted without `output_dir`.
    """

    def __init__(
        self,
        *,
        dataset_name: str,
        class_names: Sequence[str],
        colors: Sequence[Sequence[int]] | None = None,
        ignore_label: int = 255,
        output_dir: str | Path | None = None,
        image_root: str | Path | None = None,
        absent_class: str = "skip",
        save_predictions: bool = False,
        save_per_image: bool = False,
        save_rle: bool = False,
        has_confusion_picture: bool = True,
        rank: int = 0,
    ) -> None:
        if absent_class not in ABSENT_CLASS_MODES:
            raise ValueError(
                f"TEST.MFUSER.ABSENT_CLASS={absent_class!r} is unknown; choose from {sorted(ABSENT_CLASS_MODES)}"
            )
        if output_dir is None and (save_predictions or save_per_image or save_rle):
            raise ValueError("saving predictions, masks or per-image counts needs an output_dir")
        self.dataset_name = dataset_name
        self.class_names = list(class_names)
        self.colors = None if colors is None else [tuple(int(value) for value in color) for color in colors]
        self.absent_class = absent_class
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.num_images = 0  # of this process
        self.num_all_images = 0  # of all processes; known on the main one after `finish`
        self.confusion = ConfusionMatrix(num_classes=len(self.class_names), ignore_label=ignore_label)
        self._image_root = image_root
        self._save_predictions = save_predictions
        self._save_per_image = save_per_image
        self._save_rle = save_rle
        self._has_confusion_picture = has_confusion_picture
        self._rank = rank
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.confusion = ConfusionMatrix(num_classes=len(self.class_names), ignore_label=self.confusion.ignore_label)
        self.num_images = 0
        # Lines go to one file per process as they come; the main process joins them at the end.
        for stem, is_used in (("images", self._save_per_image), ("masks", self._save_rle)):
            if is_used:
                self._part_file(stem).parent.mkdir(parents=True, exist_ok=True)
                self._part_file(stem).write_text("")

    def add(self, prediction: np.ndarray, truth: np.ndarray, *, image_file: str, label_file: str) -> None:
        """Count one image and write what was asked for.

        Args:
            prediction: (H, W), classes 0..K-1.
            truth: (H, W), classes 0..K-1 or the ignore label.
            image_file: names the image in the records and its prediction on disk.
            label_file: where `truth` came from.
        Raises:
            ValueError: sizes differ or a value is no class; the message names `label_file`.
        """
        try:
            counts = self.confusion.update(prediction, truth)
        except ValueError as error:
            raise ValueError(f"{label_file}: {error}") from error
        self.num_images += 1
        prediction_file = None
        if self._save_predictions:
            prediction_file = Path("predictions") / self._relative_name(image_file)
            write_label(self.output_dir / prediction_file, prediction, self.colors)
        if self._save_per_image:
            self._append("images", self._image_record(image_file, label_file, prediction_file, counts))
        if self._save_rle:
            for record in encode_masks(prediction, image_file):
                self._append("masks", record)

    def finish(self, gather: Gather = gather_alone) -> dict[str, float] | None:
        """Sum over all processes, write the files and give the metrics, see `score_confusion`.

        Args:
            gather: value -> the values of all processes on the main one, and an empty list on the others.
        Returns:
            Metrics in percent on the main process, None on the others.
        """
        gathered = gather((self.confusion.counts, self.num_images))
        self.num_all_images = sum(number for _, number in gathered)
        for stem, name, write in (
            ("images", "images.jsonl", _write_lines if self._save_per_image else None),
            ("masks", "sem_seg_predictions.json", _write_list if self._save_rle else None),
        ):
            if write is not None:
                self._join(stem, self.output_dir / name, write, gather)
        if not gathered:
            return None
        counts = sum_counts(part for part, _ in gathered)
        if self.num_all_images == 0:
            logger.warning("%s: no image was evaluated; every metric is NaN", self.dataset_name)
        if self.output_dir is not None:
            self._write_confusion(counts)
        return score_confusion(counts, self.class_names, absent_class=self.absent_class)

    def _relative_name(self, image_file: str) -> Path:
        name = Path(image_file)
        if self._image_root and name.is_relative_to(self._image_root):
            return name.relative_to(self._image_root).with_suffix(".png")
        return Path(name.name).with_suffix(".png")

    def _image_record(
        self, image_file: str, label_file: str, prediction_file: Path | None, counts: np.ndarray
    ) -> dict[str, Any]:
        """Give one image's record; its counts hold [true positives, truth pixels, predicted pixels] per class."""
        hits, truth, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
        miou = 100 * mean_of_known(iou_per_class(counts, self.absent_class))
        used = np.flatnonzero(truth + predicted)
        return {
            "image": image_file,
            "label": label_file,
            "prediction": None if prediction_file is None else prediction_file.as_posix(),
            "mIoU": None if np.isnan(miou) else round(miou, 3),
            "counts": {int(k): [int(hits[k]), int(truth[k]), int(predicted[k])] for k in used},
        }

    def _part_file(self, stem: str) -> Path:
        return self.output_dir / f".{stem}.rank{self._rank}.part"

    def _append(self, stem: str, record: dict[str, Any]) -> None:
        with self._part_file(stem).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def _join(self, stem: str, target: Path, write: Callable[[IO[str], list[str]], None], gather: Gather) -> None:
        """Join what each process wrote; gathered by message, because machines need not share a disk."""
        texts = gather(self._part_file(stem).read_text(encoding="utf-8"))
        self._part_file(stem).unlink()
        if texts:
            lines = sorted(line for text in texts for line in text.splitlines())
            with target.open("w", encoding="utf-8") as file:
                write(file, lines)

    def _write_confusion(self, counts: np.ndarray) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        content = {
            "dataset": self.dataset_name,
            "classes": self.class_names,
            "colors": self.colors,
            "ignore_label": self.confusion.ignore_label,
            "absent_class": self.absent_class,
            "num_images": self.num_all_images,
            "rows": "truth",
            "counts": counts.tolist(),
        }
        (self.output_dir / "confusion.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
        if self._has_confusion_picture:
            from mfuser_d2.visualization.confusion import save_confusion_picture

            save_confusion_picture(self.output_dir / "confusion.png", counts, self.class_names, title=self.dataset_name)


def encode_masks(labels: np.ndarray, image_file: str) -> list[dict[str, Any]]:
    """Give the mask of each class in (H, W) labels, run-length encoded in COCO's form."""
    from pycocotools import mask as mask_util

    records = []
    for label in np.unique(labels):
        encoded = mask_util.encode(np.asfortranarray(labels == label, dtype=np.uint8))
        encoded["counts"] = encoded["counts"].decode("ascii")
        records.append({"file_name": image_file, "category_id": int(label), "segmentation": encoded})
    return records


def _write_lines(file: IO[str], lines: list[str]) -> None:
    file.writelines(line + "\n" for line in lines)


def _write_list(file: IO[str], lines: list[str]) -> None:
    file.write("[" + ",\n".join(lines) + "]\n")
