"""Drawing and applying each step of the training augmentation."""

import colorsys

import numpy as np
import pytest

from mfuser_d2.data.augmentation import (
    ColorChange,
    Crop,
    augment,
    change_color,
    draw_color,
    draw_crop,
    draw_flip,
    draw_scaled_size,
    fit_within,
    item_rng,
    resize_image,
    resize_labels,
)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (40, 60, 3), np.uint8)
    return image, np.repeat(np.repeat(rng.integers(0, 19, (8, 12), np.uint8), 5, 0), 5, 1)


@pytest.mark.parametrize(
    ("size", "bounds", "wanted"),
    [
        ((72, 96), (80, 160), (80, 107)),
        ((1024, 2048), (1024, 2048), (1024, 2048)),
        ((1052, 1914), (1024, 2048), (1024, 1863)),
        ((2000, 1000), (1024, 2048), (2048, 1024)),
        ((720, 1280), (720, 1280), (720, 1280)),
    ],
)
def test_fit_within(size: tuple[int, int], bounds: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert fit_within(size, bounds) == wanted


def test_scaled_sizes_stay_in_range_and_keep_the_aspect() -> None:
    rng = np.random.RandomState(0)
    sizes = np.array([draw_scaled_size(rng, (300, 500), (0.5, 2.0)) for _ in range(400)])
    assert sizes[:, 0].min() >= 149 and sizes[:, 0].max() <= 600
    assert np.abs(sizes[:, 1] / sizes[:, 0] - 5 / 3).max() < 0.02
    assert sizes[:, 0].min() < 170 and sizes[:, 0].max() > 580


def test_crop_avoids_a_dominating_class() -> None:
    labels = np.zeros((40, 100), np.uint8)
    labels[:, 60:] = np.arange(40)[:, None] % 2 + 1
    crops = [draw_crop(np.random.RandomState(seed), labels, (20, 20), 0.75) for seed in range(60)]
    free = [draw_crop(np.random.RandomState(seed), labels, (20, 20), 1.0) for seed in range(60)]

    def share(crop: Crop) -> float:
        return np.bincount(crop.of(labels).ravel()).max() / 400

    assert np.mean([share(crop) < 0.75 for crop in crops]) > 0.9
    assert np.mean([share(crop) < 0.75 for crop in free]) < 0.6


def test_ignored_pixels_do_not_count_in_a_crop() -> None:
    labels = np.full((10, 10), 255, np.uint8)
    labels[0, :8] = [1, 1, 1, 1, 2, 2, 2, 2]
    rng = np.random.RandomState(0)
    draw_crop(rng, labels, (10, 10), 0.75)
    one_try = np.random.RandomState(0)
    one_try.randint(0, 1), one_try.randint(0, 1)
    assert rng.rand() == one_try.rand(), "the first crop is good, although 92 of its 100 pixels are ignored"


def test_crop_larger_than_the_image_takes_all_of_it() -> None:
    crop = draw_crop(np.random.RandomState(0), np.zeros((30, 50), np.uint8), (40, 40), 0.75)
    assert (crop.top, crop.height, crop.width) == (0, 30, 40)


def test_all_ignored_labels_still_give_a_crop() -> None:
    crop = draw_crop(np.random.RandomState(0), np.full((30, 50), 255, np.uint8), (20, 20), 0.75)
    assert (crop.height, crop.width) == (20, 20)


def test_flip_happens_half_the_time() -> None:
    rng = np.random.RandomState(0)
    assert 0.4 < np.mean([draw_flip(rng) for _ in range(500)]) < 0.6
    assert not any(draw_flip(rng, 0.0) for _ in range(50))


def test_each_colour_step_is_drawn_half_the_time_and_in_range() -> None:
    rng = np.random.RandomState(0)
    changes = [draw_color(rng) for _ in range(800)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = [getattr(change, name) for change in changes if getattr(change, name) is not None]
        assert 0.42 < len(values) / len(changes) < 0.58, name
        assert low <= min(values) and max(values) <= high and max(values) - min(values) > 0.9 * (high - low), name
    assert 0.42 < np.mean([change.is_contrast_first for change in changes]) < 0.58


def test_brightness_and_contrast_clip_and_truncate(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image = pair[0]
    brighter = change_color(image, ColorChange(brightness=20.7))
    np.testing.assert_array_equal(brighter, np.clip(image.astype(np.float32) + 20.7, 0, 255).astype(np.uint8))
    flatter = change_color(image, ColorChange(contrast=0.6))
    np.testing.assert_array_equal(flatter, (image.astype(np.float32) * np.float32(0.6)).astype(np.uint8))


def test_hue_turns_by_twice_the_drawn_number_in_degrees() -> None:
    image = np.full((2, 2, 3), (40, 60, 200), np.uint8)  # BGR, a red
    blue, green, red = change_color(image, ColorChange(hue=15))[0, 0] / 255
    turned = colorsys.rgb_to_hsv(red, green, blue)[0] - colorsys.rgb_to_hsv(200 / 255, 60 / 255, 40 / 255)[0]
    assert abs(turned * 360 - 30) < 3


def test_zero_saturation_would_be_grey_and_half_is_half() -> None:
    image = np.full((2, 2, 3), (40, 60, 200), np.uint8)
    blue, green, red = change_color(image, ColorChange(saturation=0.5))[0, 0].astype(float)
    assert abs((red - blue) - 80) < 4 and abs(red - 200) < 2


def test_image_and_labels_move_together() -> None:
    labels = np.repeat(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4), 20, 0), 20, 1)
    image = np.repeat(labels[..., None] * 10, 3, 2)
    for seed in range(20):
        crop, target = augment(image, labels, item_rng(seed), crop_size=(32, 32), use_color=False)
        assert crop.shape[:2] == target.shape
        assert np.mean(crop[..., 0] == target * 10) > 0.8, "only pixels at the borders between labels are mixed"


def test_same_key_same_crop_other_key_other_crop(pair: tuple[np.ndarray, np.ndarray]) -> None:
    first = augment(*pair, item_rng(1, 2), crop_size=(24, 24))
    again = augment(*pair, item_rng(1, 2), crop_size=(24, 24))
    other = augment(*pair, item_rng(1, 3), crop_size=(24, 24))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_inputs_are_not_changed(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image, labels = pair[0].copy(), pair[1].copy()
    for seed in range(10):
        augment(image, labels, item_rng(seed), crop_size=(24, 24))
    np.testing.assert_array_equal(image, pair[0])
    np.testing.assert_array_equal(labels, pair[1])


def test_labels_are_never_blended(pair: tuple[np.ndarray, np.ndarray]) -> None:
    labels = np.where(pair[1] > 9, 255, 0).astype(np.uint8)
    assert set(np.unique(resize_labels(labels, (71, 33)))) <= {0, 255}
    assert resize_image(pair[0], (71, 33)).shape == (71, 33, 3)
