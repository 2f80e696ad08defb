"""The drawn streets: deterministic, complete, and shifted between domains."""

import numpy as np
import pytest

from mfuser_d2.data.labels import CLASSES, class_id
from mfuser_d2.data.streets import SPLITS, draw_street

SIZE = (96, 192)


def test_same_key_same_picture() -> None:
    first, again = (draw_street(split="train", index=3, seed=1, size=SIZE) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


@pytest.mark.parametrize("other", [{"index": 4}, {"seed": 2}, {"split": "val"}])
def test_other_key_other_street(other: dict) -> None:
    key = {"split": "train", "index": 3, "seed": 1, "size": SIZE}
    assert not np.array_equal(draw_street(**key)[1], draw_street(**key | other)[1])


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_picture_and_labels_fit(split: str) -> None:
    image, labels = draw_street(split=split, index=0, size=(80, 130))
    assert image.shape == (80, 130, 3) and image.dtype == np.uint8
    assert labels.shape == (80, 130) and labels.dtype == np.uint8
    assert labels.max() < len(CLASSES)


def test_every_class_is_common_and_large_enough_to_learn() -> None:
    seen = np.array(
        [np.bincount(draw_street(split="train", index=i, size=SIZE)[1].ravel(), minlength=19) for i in range(24)]
    )
    share = (seen > 25).mean(axis=0)  # 25 of 96x192 pixels are 100 at the default size
    rare = {name: round(float(s), 2) for name, s in zip(CLASSES, share) if s < 0.2}
    assert not rare, f"too few pictures show {rare}"


def test_perspective_puts_sky_above_and_road_below() -> None:
    labels = np.stack([draw_street(split="val", index=i, size=SIZE)[1] for i in range(6)])
    rows = np.arange(SIZE[0])[:, None]
    middle = {name: (rows * (labels == class_id(name))).sum() / (labels == class_id(name)).sum() for name in CLASSES}
    assert middle["sky"] < middle["building"] < middle["car"] < middle["road"]


def test_domains_shift_the_way_their_names_say() -> None:
    def mean(split: str, statistic) -> float:
        return float(np.mean([statistic(draw_street(split=split, index=i, size=SIZE)[0]) for i in range(4)]))

    def contrast(image: np.ndarray) -> float:
        return image.mean(axis=2).std()

    def edges(image: np.ndarray) -> float:
        return np.abs(np.diff(image.mean(axis=2), axis=1)).mean()

    assert mean("night", np.mean) < 0.6 * mean("val", np.mean)
    assert mean("fog", contrast) < 0.8 * mean("val", contrast)
    assert mean("sketch", edges) > 1.4 * mean("val", edges)


def test_wrong_split_and_size() -> None:
    with pytest.raises(KeyError, match="sketch"):
        draw_street(split="rain", index=0)
    with pytest.raises(ValueError, match="at least 64"):
        draw_street(split="train", index=0, size=(64, 32))
