"""Confusion counts and the numbers that follow from them, in plain NumPy (no Detectron2)."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from mfuser_d2.data.labels import CLASSES, SYNTHIA_13_ABSENT, SYNTHIA_ABSENT

ABSENT_CLASS_MODES = {
    "skip": "a class without ground truth is left out of every mean (Detectron2's convention)",
    "zero": "a class that is predicted but has no ground truth counts as IoU 0 (mmseg's convention)",
}


def to_label_array(labels: np.ndarray | torch.Tensor) -> np.ndarray:
    """Give a label map (H, W) as a NumPy array on the CPU, whatever it was before."""
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu().numpy()
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub":
        raise ValueError(f"a label map holds integers, got dtype {labels.dtype}; take the argmax of scores first")
    return labels


def count_confusion(
    prediction: np.ndarray | torch.Tensor,
    truth: np.ndarray | torch.Tensor,
    *,
    num_classes: int,
    ignore_label: int = 255,
) -> np.ndarray:
    """Count the pixels of each (true class, predicted class) pair.

    Args:
        prediction: (H, W), classes 0..K-1.
        truth: (H, W), classes 0..K-1 or `ignore_label`; ignored pixels are not counted.
        num_classes: K.
        ignore_label: the value of `truth` without a class.
    Returns:
        (K, K) int64; row = true class, column = predicted class.
    Raises:
        ValueError: the sizes differ, or a value is outside 0..K-1 (and not the ignore label).
    """
    prediction, truth = to_label_array(prediction), to_label_array(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape} but truth is {truth.shape}; resize the scores to the truth")
    is_counted = truth != ignore_label
    true_classes = truth[is_counted].astype(np.int64)
    predicted_classes = prediction[is_counted].astype(np.int64)
    _check_range(true_classes, "truth", num_classes, f"0..{num_classes - 1} or {ignore_label} (ignore)")
    _check_range(predicted_classes, "prediction", num_classes, f"0..{num_classes - 1}")
    pairs = true_classes * num_classes + predicted_classes
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def _check_range(values: np.ndarray, name: str, num_classes: int, wanted: str) -> None:
    if values.size and (values.min() < 0 or values.max() >= num_classes):
        strange = np.unique(values[(values < 0) | (values >= num_classes)])
        listed = ", ".join(str(value) for value in strange[:8]) + (", ..." if strange.size > 8 else "")
        raise ValueError(f"{name} holds the values {listed}; wanted {wanted}. Are these raw ids instead of trainIds?")


class ConfusionMatrix:
    """Running confusion counts; the memory does not depend on how many images were added.

    `counts` is (K, K) int64, row = true class, column = predicted class. Counts of several processes are summed,
    so any split of the images gives the same bits.
    """

    def __init__(self, *, num_classes: int, ignore_label: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, prediction: np.ndarray | torch.Tensor, truth: np.ndarray | torch.Tensor) -> np.ndarray:
        """Add one image, both (H, W); returns that image's own (K, K) counts. Raises like `count_confusion`."""
        counts = count_confusion(prediction, truth, num_classes=self.num_classes, ignore_label=self.ignore_label)
        self.counts += counts
        return counts

    def scores(self, class_names: Sequence[str], absent_class: str = "skip") -> dict[str, float]:
        """Give the metrics of all images so far; see `score_confusion`."""
        return score_confusion(self.counts, class_names, absent_class=absent_class)


def sum_counts(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Add the (K, K) int64 counts of several processes or shards: exact, whatever their order."""
    return np.sum(list(parts), axis=0, dtype=np.int64)


def iou_per_class(counts: np.ndarray, absent_class: str = "skip") -> np.ndarray:
    """Give the intersection over union of each class.

    Args:
        counts: (K, K) int64, row = true class, column = predicted class.
        absent_class: "skip" or "zero", see `ABSENT_CLASS_MODES`. They differ in one case only: a class that is
            predicted somewhere but has no ground truth at all.
    Returns:
        (K,) float64 in 0..1; NaN for a class that is left out of the mean.
    """
    if absent_class not in ABSENT_CLASS_MODES:
        raise ValueError(
            f"TEST.MFUSER.ABSENT_CLASS={absent_class!r} is unknown; choose from {sorted(ABSENT_CLASS_MODES)}"
        )
    intersection = np.diagonal(counts).astype(np.float64)
    union = counts.sum(axis=1) + counts.sum(axis=0) - np.diagonal(counts)
    is_counted = union > 0 if absent_class == "zero" else counts.sum(axis=1) > 0
    return np.divide(intersection, union, out=np.full(len(counts), np.nan), where=is_counted)


def synthia_subsets(class_names: Sequence[str]) -> dict[str, list[int]]:
    """Give the class indices of the 16- and the 13-class mean, or nothing where the classes are not Cityscapes'.

    Papers report them where SYNTHIA, which never shows some classes, is the source. Only the mean is over fewer
    classes: the IoU of each still comes from the full confusion matrix, as in mmseg-based code.
    """
    if tuple(class_names) != CLASSES:
        return {}
    return {
        f"mIoU-{len(CLASSES) - len(absent)}": [i for i, name in enumerate(CLASSES) if name not in absent]
        for absent in (SYNTHIA_ABSENT, SYNTHIA_13_ABSENT)
    }


def score_confusion(counts: np.ndarray, class_names: Sequence[str], *, absent_class: str = "skip") -> dict[str, float]:
    """Give all metrics under Detectron2's names, in percent.

    Args:
        counts: (K, K) int64, row = true class, column = predicted class.
        class_names: K names.
        absent_class: "skip" or "zero", see `ABSENT_CLASS_MODES`.
    Returns:
        mIoU, fwIoU (weighted by the pixels of each class), mACC, pACC, IoU-<class>, ACC-<class>, and for the 19
        Cityscapes classes mIoU-16 and mIoU-13 (SYNTHIA's subsets). NaN where nothing can be said.
    Raises:
        ValueError: the number of names is not K, or `absent_class` is unknown.
    """
    if counts.shape != (len(class_names), len(class_names)):
        raise ValueError(f"{len(class_names)} class names for confusion counts of shape {counts.shape}")
    iou = 100 * iou_per_class(counts, absent_class)
    truth_pixels = counts.sum(axis=1)
    correct = np.diagonal(counts).astype(np.float64)
    num_pixels = int(truth_pixels.sum())
    accuracy = 100 * np.divide(correct, truth_pixels, out=np.full(len(counts), np.nan), where=truth_pixels > 0)
    weighted = np.where(truth_pixels > 0, iou, 0.0) * truth_pixels
    scores = {
        "mIoU": mean_of_known(iou),
        "fwIoU": float(weighted.sum() / num_pixels) if num_pixels else float("nan"),
    }
    scores.update({f"IoU-{name}": float(value) for name, value in zip(class_names, iou, strict=True)})
    scores["mACC"] = mean_of_known(accuracy)
    scores["pACC"] = float(100 * correct.sum() / num_pixels) if num_pixels else float("nan")
    scores.update({f"ACC-{name}": float(value) for name, value in zip(class_names, accuracy, strict=True)})
    scores.update({key: mean_of_known(iou[index]) for key, index in synthia_subsets(class_names).items()})
    return scores


def mean_of_known(values: Iterable[float]) -> float:
    """Average the values that are not NaN; NaN where there is none."""
    known = np.asarray([value for value in values if not np.isnan(value)], dtype=np.float64)
    return float(known.mean()) if known.size else float("nan")


def target_mean(results: Mapping[str, Mapping], *, exclude: Sequence[str] = ()) -> dict[str, float]:
    """Average over targets: the number a domain-generalisation paper reports.

    Args:
        results: data set name -> result dict of one evaluation, with or without its "sem_seg" level.
        exclude: data sets that are no target, such as the source's own validation split.
    Returns:
        mIoU (and every other overall or per-class metric) averaged over the targets, each target weighing the same.
    """
    targets = [flat_scores(scores) for name, scores in results.items() if name not in exclude and name != "mean"]
    targets = [scores for scores in targets if scores]
    keys = dict.fromkeys(key for scores in targets for key in scores)
    return {key: mean_of_known(scores.get(key, float("nan")) for scores in targets) for key in keys}


def flat_scores(result: Mapping) -> Mapping[str, float]:
    """Give the metrics of one result dict, whether or not they stand under Detectron2's "sem_seg" level."""
    return result.get("sem_seg", result) if result else {}
