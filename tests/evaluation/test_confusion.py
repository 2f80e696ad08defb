"""Confusion counts and metrics, against scikit-learn, cityscapesscripts and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mfuser_d2.data.labels import CITYSCAPES_IDS, CLASSES
from mfuser_d2.evaluation.confusion import (
    ConfusionMatrix,
    count_confusion,
    iou_per_class,
    score_confusion,
    sum_counts,
    target_mean,
)


def _random_pair(seed: int, size: tuple[int, int] = (13, 29), num_classes: int = 19) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, num_classes, size)
    prediction = np.where(generator.random(size) < 0.6, truth, generator.integers(0, num_classes, size))
    truth[generator.random(size) < 0.2] = 255
    return prediction.astype(np.uint8), truth.astype(np.uint8)


def test_counts_by_hand() -> None:
    truth = np.array([[0, 0, 1], [1, 255, 2]])
    prediction = np.array([[0, 1, 1], [1, 0, 0]])
    counts = count_confusion(prediction, truth, num_classes=3)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("num_classes", [1, 2, 19, 300])
def test_counts_agree_with_scikit_learn(num_classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    generator = np.random.default_rng(num_classes)
    truth, prediction = generator.integers(0, num_classes, (2, 17, 23))
    truth[3] = 999
    is_counted = truth != 999
    expected = metrics.confusion_matrix(truth[is_counted], prediction[is_counted], labels=range(num_classes))
    counts = count_confusion(prediction, truth, num_classes=num_classes, ignore_label=999)
    np.testing.assert_array_equal(counts, expected)
    is_used = expected.sum(axis=0) + expected.sum(axis=1) > 0
    jaccard = metrics.jaccard_score(
        truth[is_counted], prediction[is_counted], labels=np.flatnonzero(is_used), average=None
    )
    np.testing.assert_allclose(iou_per_class(counts, "zero")[is_used], jaccard, rtol=1e-12)


def test_iou_agrees_with_cityscapesscripts(tmp_path) -> None:
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="cityscapesscripts is not installed"
    )
    official.args.evalInstLevelScore = False
    expected = official.generateMatrix(official.args)
    ours = ConfusionMatrix(num_classes=19)
    to_id = np.zeros(256, np.uint8)  # 255 becomes 0, Cityscapes' "unlabeled", which its evaluation ignores
    to_id[list(CITYSCAPES_IDS.values())] = list(CITYSCAPES_IDS)
    for seed in range(3):
        prediction, truth = _random_pair(seed)
        truth[truth == 16] = 255  # a class that is predicted but has no ground truth
        prediction[prediction == 17] = truth[truth == 17] = 0  # and one that is neither
        ours.update(prediction, truth)
        files = [str(tmp_path / f"{name}_{seed}.png") for name in ("prediction", "truth")]
        for file, labels in zip(files, (prediction, truth), strict=True):
            Image.fromarray(to_id[labels]).save(file)
        official.evaluatePair(*files, expected, {}, {}, official.args)
    ids = list(CITYSCAPES_IDS)
    iou = [official.getIouScoreForLabel(label, expected, official.args) for label in ids]
    assert iou[16] == 0 and math.isnan(iou[17])
    np.testing.assert_array_equal(ours.counts, expected[np.ix_(ids, ids)].astype(np.int64))
    np.testing.assert_allclose(iou_per_class(ours.counts, "zero"), iou, rtol=1e-12)


def test_ignored_truth_counts_nowhere_even_as_false_positive() -> None:
    truth = np.full((4, 5), 255)
    truth[0, 0] = 1
    counts = count_confusion(np.ones((4, 5), int), truth, num_classes=2)
    assert counts.tolist() == [[0, 0], [0, 1]]


def test_conventions_differ_only_for_a_predicted_class_without_truth() -> None:
    #        neither truth nor prediction for class 3; class 2 is predicted only
    counts = np.array([[6, 0, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    skip, zero = iou_per_class(counts, "skip"), iou_per_class(counts, "zero")
    np.testing.assert_allclose(skip, [0.75, 1.0, np.nan, np.nan])
    np.testing.assert_allclose(zero, [0.75, 1.0, 0.0, np.nan])
    names = ["a", "b", "c", "d"]
    assert score_confusion(counts, names, absent_class="skip")["mIoU"] == pytest.approx(87.5)
    assert score_confusion(counts, names, absent_class="zero")["mIoU"] == pytest.approx(175 / 3)
    for key in ("fwIoU", "mACC", "pACC"):
        values = [score_confusion(counts, names, absent_class=mode)[key] for mode in ("skip", "zero")]
        assert values[0] == values[1]


def test_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ABSENT_CLASS='drop'.*skip.*zero"):
        iou_per_class(np.eye(2, dtype=np.int64), "drop")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_all_ignored_gives_nan_and_no_warning() -> None:
    counts = count_confusion(np.zeros((3, 4), int), np.full((3, 4), 255), num_classes=2)
    scores = score_confusion(counts, ["a", "b"])
    assert all(math.isnan(value) for value in scores.values())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_shards=st.integers(1, 5))
def test_any_split_over_processes_gives_the_same_bits(seed: int, num_shards: int) -> None:
    pairs = [_random_pair(seed + i, size=(3, 7)) for i in range(6)]
    shards = [ConfusionMatrix(num_classes=19) for _ in range(num_shards)]
    whole = ConfusionMatrix(num_classes=19)
    for i, (prediction, truth) in enumerate(pairs):
        whole.update(prediction, truth)
        shards[i % num_shards].update(prediction, truth)
    np.testing.assert_array_equal(sum_counts(shard.counts for shard in reversed(shards)), whole.counts)
    assert whole.scores(CLASSES) == pytest.approx(
        score_confusion(sum_counts(shard.counts for shard in shards), CLASSES), rel=0, abs=0, nan_ok=True
    )


def test_large_counts_stay_exact() -> None:
    big = np.array([[2**53 + 1, 0], [0, 1]], dtype=np.int64)
    assert sum_counts([big, big])[0, 0] == 2**54 + 2


def test_tensors_count_like_arrays() -> None:
    prediction, truth = _random_pair(5)
    from_tensors = count_confusion(torch.from_numpy(prediction), torch.from_numpy(truth), num_classes=19)
    np.testing.assert_array_equal(from_tensors, count_confusion(prediction, truth, num_classes=19))


def test_update_gives_the_image_its_own_counts() -> None:
    confusion = ConfusionMatrix(num_classes=2)
    first = confusion.update(np.zeros((2, 3), int), np.zeros((2, 3), int))
    second = confusion.update(np.ones((2, 3), int), np.zeros((2, 3), int))
    assert first.tolist() == [[6, 0], [0, 0]] and second.tolist() == [[0, 6], [0, 0]]
    assert confusion.counts.tolist() == [[6, 6], [0, 0]]


@pytest.mark.parametrize("bad", [19, 33, 254, -1])
def test_strange_truth_is_named(bad: int) -> None:
    truth = np.zeros((4, 4), int)
    truth[1, 2] = bad
    with pytest.raises(ValueError, match=rf"truth holds the values {bad}; wanted 0..18 or 255"):
        count_confusion(np.zeros((4, 4), int), truth, num_classes=19)


def test_strange_prediction_sizes_and_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction holds the values 255"):
        count_confusion(np.full((2, 2), 255), np.zeros((2, 2), int), num_classes=19)
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\) but truth is \(3, 2\)"):
        count_confusion(np.zeros((2, 3), int), np.zeros((3, 2), int), num_classes=19)
    with pytest.raises(ValueError, match="argmax"):
        count_confusion(np.zeros((2, 2)), np.zeros((2, 2), int), num_classes=19)


def test_synthia_means_leave_out_the_classes_synthia_lacks() -> None:
    counts = np.diag(np.full(19, 10))
    for name, wrong in (("terrain", 10), ("truck", 10), ("train", 10), ("wall", 5), ("fence", 5), ("pole", 5)):
        k = CLASSES.index(name)
        counts[k, k] -= wrong
        counts[k, CLASSES.index("road")] += wrong
    scores = score_confusion(counts, CLASSES)
    road = 100 * 10 / (10 + 45)
    assert scores["mIoU-13"] == pytest.approx((12 * 100 + road) / 13)
    assert scores["mIoU-16"] == pytest.approx((12 * 100 + 3 * 50 + road) / 16)
    assert scores["mIoU"] == pytest.approx((12 * 100 + 3 * 50 + road) / 19)
    assert "mIoU-16" not in score_confusion(np.eye(3, dtype=np.int64), ["road", "sky", "car"])


def test_frequency_weighting_by_hand() -> None:
    counts = np.array([[8, 2], [0, 10]])
    scores = score_confusion(counts, ["a", "b"])
    assert scores["IoU-a"] == pytest.approx(80) and scores["IoU-b"] == pytest.approx(1000 / 12)
    assert scores["fwIoU"] == pytest.approx((80 * 10 + 1000 / 12 * 10) / 20)
    assert scores["mACC"] == pytest.approx(90) and scores["pACC"] == pytest.approx(90)


def test_target_mean_leaves_out_sources_and_unknown_values() -> None:
    results = {
        "source": {"sem_seg": {"mIoU": 90.0, "IoU-car": 80.0}},
        "night": {"sem_seg": {"mIoU": 40.0, "IoU-car": 10.0}},
        "fog": {"mIoU": 50.0, "IoU-car": float("nan")},
        "empty": {},
    }
    assert target_mean(results, exclude=["source"]) == {"mIoU": 45.0, "IoU-car": 10.0}
    again = target_mean({**results, "mean": {"mIoU": 0.0}}, exclude=["source"])
    assert again["mIoU"] == 45.0
