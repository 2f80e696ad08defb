"""Classes, colours and the publishers' numbering."""

import numpy as np
import pytest

from mfuser_d2.data import labels


def test_nineteen_classes_with_their_colours() -> None:
    assert labels.NUM_CLASSES == len(labels.CLASSES) == len(set(labels.CLASSES)) == 19
    assert len(set(labels.COLORS)) == 19
    assert labels.CLASSES[0] == "road" and labels.COLORS[0] == (128, 64, 128)
    assert labels.class_id("bicycle") == 18


def test_unknown_class_lists_the_classes() -> None:
    with pytest.raises(KeyError, match="motorcycle"):
        labels.class_id("bike")


def test_numbering_agrees_with_cityscapesscripts() -> None:
    official = pytest.importorskip("cityscapesscripts.helpers.labels", reason="cityscapesscripts is not installed")
    wanted = {label.id: label.trainId for label in official.labels if label.trainId not in (255, -1)}
    assert wanted == labels.CITYSCAPES_IDS
    for label in official.labels:
        if label.trainId not in (255, -1):
            assert labels.CLASSES[label.trainId] == label.name
            assert labels.COLORS[label.trainId] == label.color


@pytest.mark.parametrize("ids", [labels.GTA5_IDS, labels.SYNTHIA_IDS, *labels.MAPILLARY_IDS.values()])
def test_every_mapping_reaches_every_class(ids: dict[int, int]) -> None:
    assert set(ids.values()) == set(range(19))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_translation_ignores_what_it_does_not_know(dtype: type) -> None:
    ids = np.array([[7, 8, 200], [0, 33, 11]], dtype)
    np.testing.assert_array_equal(labels.to_train_ids(ids, labels.GTA5_IDS), [[0, 1, 255], [255, 18, 2]])


def test_translation_refuses_colours() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 3\)"):
        labels.to_train_ids(np.zeros((2, 2, 3), np.uint8), labels.GTA5_IDS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_invalid_labels_are_listed(dtype: type) -> None:
    assert labels.invalid_labels(np.array([[0, 18, 255], [19, 254, 19]], dtype)) == [19, 254]


def test_picture_of_labels() -> None:
    picture = labels.colorize(np.array([[0, 13], [255, 18]], np.uint8))
    np.testing.assert_array_equal(picture, [[[128, 64, 128], [0, 0, 142]], [[0, 0, 0], [119, 11, 32]]])
