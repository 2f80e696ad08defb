"""Detectron2's evaluator of semantic segmentation for unseen domains."""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from .confusion import ABSENT_CLASS_MODES, ConfusionMatrix, iou_per_class, mean_of_known, score_confusion, sum_counts
from .label_files import read_label, write_label

logger = logging.getLogger(__name__)

# Label and image of one frame may differ by rounding when one was made at half size, not by more than this.
_MAX_ASPECT_DIFFERENCE = 0.02


class DGSSEvaluator(DatasetEvaluator):
    """Compare predictions with trainId PNGs and give mIoU and its relatives under Detectron2's names.

    Scores are compared at the label's own resolution. Only (K, K) int64 counts are kept, so the memory does not grow
    with the number of images, and the counts of several processes sum to the same bits as those of one.

    Args:
        dataset_name: a registered data set whose metadata holds `stuff_classes` and `ignore_label`.
        output_dir: the folder of this evaluation; None writes nothing. Gets confusion.json, and confusion.png,
            predictions/, images.jsonl, sem_seg_predictions.json as switched on below.
        absent_class: "skip" or "zero", see `ABSENT_CLASS_MODES`.
        save_predictions: write each prediction as a palette PNG of trainIds.
        save_per_image: write the counts of each image, one JSON object a line.
        save_rle: write every mask run-length encoded, in the form of Detectron2's own evaluator.
        has_confusion_picture: draw confusion.png.
        distributed: sum over all processes; False evaluates what this process saw.
        read_label_file: path -> (H, W) integers, trainIds.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        *,
        absent_class: str = "skip",
        save_predictions: bool = False,
        save_per_image: bool = False,
        save_rle: bool = False,
        has_confusion_picture: bool = True,
        distributed: bool = True,
        read_label_file: Callable[[str], np.ndarray] = read_label,
    ) -> None:
        if absent_class not in ABSENT_CLASS_MODES:
            raise ValueError(
                f"TEST.MFUSER.ABSENT_CLASS={absent_class!r} is unknown; choose from {sorted(ABSENT_CLASS_MODES)}"
            )
        if output_dir is None and (save_predictions or save_per_image or save_rle):
            raise ValueError("saving predictions or per-image counts needs an output_dir")
        metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.class_names: list[str] = list(metadata.stuff_classes)
        self.colors: Sequence[Sequence[int]] | None = metadata.get("stuff_colors")
        self.ignore_label: int = metadata.get("ignore_label", 255)
        self.absent_class = absent_class
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._image_root: str | None = metadata.get("image_root") or metadata.get("image_dir")
        self._save_predictions = save_predictions
        self._save_per_image = save_per_image
        self._save_rle = save_rle
        self._has_confusion_picture = has_confusion_picture
        self._distributed = distributed
        self._read_label_file = read_label_file
        self._label_files: dict[str, str] | None = None
        self._has_warned_of_resize = False
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._confusion = ConfusionMatrix(num_classes=len(self.class_names), ignore_label=self.ignore_label)
        self._num_images = 0
        # Lines go to one file per process as they come; the main process joins them at the end.
        for stem, is_used in (("images", self._save_per_image), ("masks", self._save_rle)):
            if is_used:
                self._part_file(stem).parent.mkdir(parents=True, exist_ok=True)
                self._part_file(stem).write_text("")

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Count a batch: each output holds "sem_seg", (K, H, W) scores of any floating type on any device.

        Raises:
            ValueError: the label is unreadable, has unknown values or another shape than the scores; the message
                names its file.
        """
        for image, output in zip(inputs, outputs, strict=True):
            label_file = self._label_file(image)
            truth = self._read_label_file(label_file)
            prediction = self._labels_from_scores(output["sem_seg"], truth.shape, label_file)
            try:
                counts = self._confusion.update(prediction, truth)
            except ValueError as error:
                raise ValueError(f"{label_file}: {error}") from error
            self._num_images += 1
            prediction_file = None
            if self._save_predictions:
                prediction_file = Path("predictions") / self._relative_name(image["file_name"])
                write_label(self.output_dir / prediction_file, prediction, self.colors)
            if self._save_per_image:
                self._append("images", self._image_record(image["file_name"], label_file, prediction_file, counts))
            if self._save_rle:
                for record in encode_masks(prediction, image["file_name"]):
                    self._append("masks", record)

    def evaluate(self) -> OrderedDict | None:
        """Give {"sem_seg": {"mIoU", "fwIoU", "IoU-<class>", "mACC", "pACC", ...}} in percent on the main process.

        The other processes get None, as Detectron2 expects.
        """
        counts, num_images = self._confusion.counts, self._num_images
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((counts, num_images))
            if gathered:
                counts, num_images = sum_counts(part for part, _ in gathered), sum(number for _, number in gathered)
        self._join_part_files()
        if self._distributed and not comm.is_main_process():
            return None
        if num_images == 0:
            logger.warning("%s: no image was evaluated; every metric is NaN", self.dataset_name)
        if self.output_dir is not None:
            self._write_confusion(counts, num_images)
        scores = score_confusion(counts, self.class_names, absent_class=self.absent_class)
        return OrderedDict(sem_seg=scores)

    def _labels_from_scores(self, scores: Tensor, size: tuple[int, int], label_file: str) -> np.ndarray:
        num_classes = len(self.class_names)
        if scores.ndim != 3 or len(scores) != num_classes:
            raise ValueError(
                f"{self.dataset_name} has {num_classes} classes but the model gives scores of shape "
                f"{tuple(scores.shape)}; wanted ({num_classes}, H, W): do the model's classes fit the data set?"
            )
        if scores.shape[1:] != size:
            scores = self._resize(scores, size, label_file)
        labels = scores.argmax(dim=0)
        return labels.to(torch.uint8 if num_classes <= 256 else torch.int32).cpu().numpy()

    def _resize(self, scores: Tensor, size: tuple[int, int], label_file: str) -> Tensor:
        height, width = scores.shape[1:]
        if abs((width / height) / (size[1] / size[0]) - 1) > _MAX_ASPECT_DIFFERENCE:
            raise ValueError(
                f"{label_file} is {size[0]}x{size[1]} (height x width) but the prediction of its image is "
                f"{height}x{width}: image and label do not belong together; remove or prepare the pair again"
            )
        if not self._has_warned_of_resize:
            self._has_warned_of_resize = True
            logger.warning(
                "%s: scores of %dx%d are resized to the label's own %dx%d (first: %s)",
                *(self.dataset_name, height, width, *size, label_file),
            )
        return F.interpolate(scores[None].float(), size=size, mode="bilinear", align_corners=False)[0]

    def _label_file(self, image: dict[str, Any]) -> str:
        """Find the label of an image; Detectron2's own mapper drops the key at test time, the catalog still has it."""
        if "sem_seg_file_name" in image:
            return image["sem_seg_file_name"]
        if self._label_files is None:
            self._label_files = {
                record["file_name"]: record["sem_seg_file_name"] for record in DatasetCatalog.get(self.dataset_name)
            }
        if image["file_name"] not in self._label_files:
            raise KeyError(f"{image['file_name']} is not an image of {self.dataset_name}; no label to compare with")
        return self._label_files[image["file_name"]]

    def _relative_name(self, image_file: str) -> Path:
        """Keep the folders below the data set's image root, so that equal names in two folders stay apart."""
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
        return self.output_dir / f".{stem}.rank{comm.get_rank()}.part"

    def _append(self, stem: str, record: dict[str, Any]) -> None:
        with self._part_file(stem).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def _join_part_files(self) -> None:
        """Join what each process wrote; gathered by message, because machines need not share a disk."""
        if self._save_per_image:
            self._join("images", self.output_dir / "images.jsonl", _write_lines)
        if self._save_rle:
            self._join("masks", self.output_dir / "sem_seg_predictions.json", _write_list)

    def _join(self, stem: str, target: Path, write: Callable[[IO[str], list[str]], None]) -> None:
        own = self._part_file(stem).read_text(encoding="utf-8")
        texts = comm.gather(own) if self._distributed else [own]
        self._part_file(stem).unlink()
        if texts:  # empty on all but the main process
            lines = sorted(line for text in texts for line in text.splitlines())
            with target.open("w", encoding="utf-8") as file:
                write(file, lines)

    def _write_confusion(self, counts: np.ndarray, num_images: int) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        content = {
            "dataset": self.dataset_name,
            "classes": self.class_names,
            "colors": None if self.colors is None else [list(map(int, color)) for color in self.colors],
            "ignore_label": self.ignore_label,
            "absent_class": self.absent_class,
            "num_images": num_images,
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


def build_evaluator(
    dataset_name: str,
    output_dir: str | Path | None,
    *,
    absent_class: str = "skip",
    save_predictions: bool = False,
    save_per_image: bool = False,
    save_rle: bool = False,
    has_confusion_picture: bool = True,
) -> DGSSEvaluator:
    """Give the evaluator of one target; its files go to `output_dir`/inference/`dataset_name`.

    Args:
        output_dir: the run's folder (cfg.OUTPUT_DIR); None writes nothing.
    """
    folder = None if output_dir is None else Path(os.fspath(output_dir)) / "inference" / dataset_name
    return DGSSEvaluator(
        dataset_name,
        folder,
        absent_class=absent_class,
        save_predictions=save_predictions,
        save_per_image=save_per_image,
        save_rle=save_rle,
        has_confusion_picture=has_confusion_picture,
    )
