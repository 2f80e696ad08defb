"""Detectron2's evaluator of semantic segmentation for unseen domains."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from .label_files import read_label
from .recorder import TargetRecorder, gather_alone

logger = logging.getLogger(__name__)

# Label and image of one frame may differ by rounding when one was made at half size, not by more than this.
_MAX_ASPECT_DIFFERENCE = 0.02


class DGSSEvaluator(DatasetEvaluator):
    """Compare predictions with trainId PNGs and give mIoU and its relatives under Detectron2's names.

    Scores are compared at the label's own resolution. The memory does not grow with the number of images, and the
    counts of several processes sum to the same bits as those of one.

    Args:
        dataset_name: a registered data set whose metadata holds `stuff_classes` and `ignore_label`.
        output_dir: the folder of this evaluation; None writes nothing.
        distributed: sum over all processes; False evaluates what this process saw.
        read_label_file: path -> (H, W) integers, trainIds.
        options: `absent_class`, `save_predictions`, `save_per_image`, `save_rle` and `has_confusion_picture`, see
            `TargetRecorder`.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        *,
        distributed: bool = True,
        read_label_file: Callable[[str], np.ndarray] = read_label,
        **options: Any,
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.recorder = TargetRecorder(
            dataset_name=dataset_name,
            class_names=metadata.stuff_classes,
            colors=metadata.get("stuff_colors"),
            ignore_label=metadata.get("ignore_label", 255),
            output_dir=output_dir,
            image_root=metadata.get("image_root") or metadata.get("image_dir"),
            rank=comm.get_rank(),
            **options,
        )
        self._distributed = distributed
        self._read_label_file = read_label_file
        self._label_files: dict[str, str] | None = None
        self._has_warned_of_resize = False

    def reset(self) -> None:
        """Forget all images."""
        self.recorder.reset()

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
            self.recorder.add(prediction, truth, image_file=image["file_name"], label_file=label_file)

    def evaluate(self) -> OrderedDict | None:
        """Give {"sem_seg": {"mIoU", "fwIoU", "IoU-<class>", "mACC", "pACC", ...}} in percent on the main process.

        Beside it "images": how many were counted, without which a part of a data set would pass for the whole.
        The other processes get None, as Detectron2 expects.
        """
        if self._distributed:
            comm.synchronize()
        scores = self.recorder.finish(comm.gather if self._distributed else gather_alone)
        return None if scores is None else OrderedDict(sem_seg=scores, images=self.recorder.num_all_images)

    def _labels_from_scores(self, scores: Tensor, size: tuple[int, int], label_file: str) -> np.ndarray:
        num_classes = len(self.recorder.class_names)
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
        absent_class, save_predictions, save_per_image, save_rle, has_confusion_picture: see `TargetRecorder`.
    """
    return DGSSEvaluator(
        dataset_name,
        None if output_dir is None else Path(output_dir) / "inference" / dataset_name,
        absent_class=absent_class,
        save_predictions=save_predictions,
        save_per_image=save_per_image,
        save_rle=save_rle,
        has_confusion_picture=has_confusion_picture,
    )
