"""Scores, sliding windows and their settings."""

import pytest
import torch

from mfuser_d2.core.inference import (
    InferenceSettings,
    average_views,
    class_scores,
    rescale_to,
    resize_scores,
    slide,
    window_offsets,
)


def test_class_scores_are_class_times_mask_probability():
    torch.manual_seed(0)
    classes, masks = torch.randn(2, 3, 5), torch.randn(2, 3, 4, 6)
    scores = class_scores(classes, masks)
    wanted = sum(classes[1, q].softmax(0)[2] * masks[1, q, 3, 1].sigmoid() for q in range(3))
    assert scores.shape == (2, 4, 4, 6)
    torch.testing.assert_close(scores[1, 2, 3, 1], wanted)


def test_none_takes_from_the_classes_but_is_no_class():
    classes = torch.zeros(1, 1, 3)
    classes[..., 2] = 100.0
    assert class_scores(classes, torch.full((1, 1, 2, 2), 9.0)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("length", "crop", "stride", "wanted"),
    [
        (10, 10, 4, [0]),
        (6, 10, 4, [0]),
        (11, 10, 4, [0, 1]),
        (18, 10, 4, [0, 4, 8]),
        (17, 10, 4, [0, 4, 7]),
        (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]),
        (1024, 512, 341, [0, 341, 512]),
    ],
)
def test_windows(length, crop, stride, wanted):
    assert window_offsets(length, crop, stride) == wanted


@pytest.mark.parametrize("length", range(1, 40))
def test_windows_cover_every_pixel(length):
    offsets = window_offsets(length, 7, 5)
    assert {i for start in offsets for i in range(start, min(start + 7, length))} == set(range(length))
    assert all(start + 7 <= length for start in offsets) or length < 7


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("size", [(20, 13), (7, 9), (5, 30)])
def test_slide_of_a_pixelwise_network_is_the_network(size, batch):
    images = torch.randn(2, 3, *size)
    sizes = set()

    def predict(windows: torch.Tensor) -> torch.Tensor:
        assert len(windows) <= batch
        sizes.add(tuple(windows.shape[-2:]))
        return torch.cat([windows, windows.square()], dim=1)

    scores = slide(images, predict, crop_size=(7, 9), stride=(5, 6), batch=batch)
    torch.testing.assert_close(scores, torch.cat([images, images.square()], dim=1))
    assert sizes == {(min(7, size[0]), min(9, size[1]))}


def test_overlaps_are_averaged():
    """Windows that say their own number: where two meet, the mean."""
    calls = iter(range(10))
    scores = slide(
        torch.zeros(1, 3, 4, 6),
        lambda w: torch.full((1, 1, *w.shape[-2:]), float(next(calls))),
        crop_size=(4, 4),
        stride=(4, 2),
        batch=1,
    )
    assert scores[0, 0, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_resizing_keeps_what_has_the_size():
    scores = torch.randn(1, 2, 3, 4)
    assert resize_scores(scores, (3, 4)) is scores
    assert resize_scores(scores, (6, 5)).shape == (1, 2, 6, 5)


def test_each_image_gets_its_own_size_and_softmax():
    scores = torch.randn(2, 3, 4, 5)
    plain = rescale_to(scores, [(4, 5), (7, 2)], final_softmax=False)
    assert [tuple(s.shape) for s in plain] == [(3, 4, 5), (3, 7, 2)]
    soft = rescale_to(scores, [(4, 5), (7, 2)], final_softmax=True)
    torch.testing.assert_close(soft[1].sum(0), torch.ones(7, 2))
    assert torch.equal(soft[1].argmax(0), plain[1].argmax(0))


def test_views_are_averaged_and_turned_back():
    images = torch.arange(24.0).view(1, 1, 4, 6)
    torch.testing.assert_close(average_views(images, lambda x: x, scales=(1.0,), flip=True), images)
    seen = []
    average_views(images, lambda x: seen.append(tuple(x.shape[-2:])) or x, scales=(0.5, 1.0, 1.5), flip=False)
    assert seen == [(2, 3), (4, 6), (6, 9)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "tiles"}, "choose from"),
        ({"stride": (513, 341)}, "STRIDE"),
        ({"stride": (341, 0)}, "STRIDE"),
        ({"batch": 0}, "BATCH=0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        InferenceSettings(**settings)
