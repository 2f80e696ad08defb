"""Which images are drawn, how often, and that it follows from the seed."""

import itertools

import numpy as np
import pytest

from mfuser_d2.data.sampler import NO_CLASS, DrawSampler, RareClasses, rare_class_probabilities


def take(sampler: DrawSampler, count: int) -> list:
    return list(itertools.islice(iter(sampler), count))


def test_one_source_shows_each_image_once_before_any_twice() -> None:
    draws = take(DrawSampler(sizes=[7], seed=0), 21)
    for start in (0, 7, 14):
        assert sorted(draw.index for draw in draws[start : start + 7]) == list(range(7))
    assert [draw.number for draw in draws] == list(range(21))
    assert {draw.rare_class for draw in draws} == {NO_CLASS}


def test_sources_without_weights_are_one_shuffle() -> None:
    draws = take(DrawSampler(sizes=[3, 5], seed=0), 8)
    assert sorted(draw.index for draw in draws) == list(range(8))


def test_weights_decide_how_often_a_source_is_drawn() -> None:
    draws = take(DrawSampler(sizes=[5, 50], weights=[3, 1], seed=1), 4000)
    share = np.mean([draw.index < 5 for draw in draws])
    assert abs(share - 0.75) < 3 * np.sqrt(0.75 * 0.25 / 4000)
    counts = np.bincount([draw.index for draw in draws if draw.index < 5])
    assert counts.max() - counts.min() <= 1, "within a source every image comes equally often"


def test_seed_decides_everything() -> None:
    first, again = (take(DrawSampler(sizes=[9, 4], weights=[1, 1], seed=3), 50) for _ in range(2))
    other = take(DrawSampler(sizes=[9, 4], weights=[1, 1], seed=4), 50)
    assert first == again and first != other


def test_processes_share_one_stream() -> None:
    whole = take(DrawSampler(sizes=[10], seed=0), 12)
    parts = [take(DrawSampler(sizes=[10], seed=0, rank=rank, world_size=3), 4) for rank in range(3)]
    assert [draw for group in zip(*parts) for draw in group] == whole


def test_start_goes_on_where_a_run_stopped() -> None:
    whole = take(DrawSampler(sizes=[10], weights=[1], seed=0), 12)
    assert take(DrawSampler(sizes=[10], weights=[1], seed=0, start=5), 7) == whole[5:]


@pytest.fixture
def tables() -> RareClasses:
    counts = np.zeros((4, 19), np.int64)
    counts[:, 0] = 5000
    counts[1, 7] = 900
    counts[2, 7] = 40
    counts[3, 12] = 700
    return RareClasses.from_counts(counts, temperature=100.0, min_pixels=100)


def test_rare_classes_bring_their_images(tables: RareClasses) -> None:
    draws = take(DrawSampler(sizes=[4], rare_classes=[tables], seed=0), 3000)
    by_class = {k: {d.index for d in draws if d.rare_class == k} for k in (0, 7, 12)}
    assert by_class == {0: {0, 1, 2, 3}, 7: {1}, 12: {3}}
    shares = np.bincount([draw.rare_class for draw in draws], minlength=19)[[0, 7, 12]] / len(draws)
    for share, wanted in zip(shares, tables.probabilities[np.argsort(tables.classes)]):
        assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(draws))


def test_rare_classes_of_the_second_source_point_behind_the_first(tables: RareClasses) -> None:
    draws = take(DrawSampler(sizes=[4, 4], weights=[1, 1e-9 + 1], rare_classes=[tables, tables], seed=0), 400)
    assert {d.index for d in draws if d.rare_class == 12} == {3, 7}


def test_low_temperature_prefers_the_rare() -> None:
    classes, probabilities = rare_class_probabilities(np.array([90, 0, 9, 1]), 0.1)
    assert classes.tolist() == [3, 2, 0]
    assert probabilities[0] > probabilities[1] > 100 * probabilities[2]


def test_class_without_any_large_image_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    counts = np.zeros((2, 19), np.int64)
    counts[:, 0], counts[:, 5] = 1000, 10
    tables = RareClasses.from_counts(counts, temperature=100.0, min_pixels=100)
    assert tables.classes.tolist() == [0] and tables.probabilities.tolist() == [1.0]
    assert "pole" in caplog.text


def test_errors_name_the_keys() -> None:
    with pytest.raises(ValueError, match="SOURCE_WEIGHTS"):
        DrawSampler(sizes=[3, 4], weights=[1], seed=0)
    with pytest.raises(ValueError, match="SOURCE_WEIGHTS"):
        DrawSampler(sizes=[3, 4], weights=[1, 0], seed=0)
    with pytest.raises(ValueError, match="at least one image"):
        DrawSampler(sizes=[3, 0], seed=0)
    with pytest.raises(ValueError, match="RCS_MIN_PIXELS=100"):
        RareClasses.from_counts(np.ones((2, 19), np.int64), temperature=1.0, min_pixels=100)
    with pytest.raises(ValueError, match="RCS_TEMPERATURE"):
        rare_class_probabilities(np.ones(19), 0.0)
