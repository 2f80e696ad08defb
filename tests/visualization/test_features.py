"""Feature PCA and word heat maps."""

import numpy as np
import pytest
import torch

from mfuser_d2.visualization.features import (
    common_range,
    draw_color_bar,
    fit_principal_axes,
    paint_components,
    paint_features,
    paint_heat,
    text_similarity,
)

GRID = (4, 6)


def _tokens(seed: int, count: int = 24, width: int = 12) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) * np.geomspace(10, 0.1, width) + 3.0


def test_axes_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn is not installed")
    parts = [_tokens(0), _tokens(1, 40)]
    axes = fit_principal_axes(parts)
    expected = decomposition.PCA(3, svd_solver="full").fit(np.concatenate(parts))
    np.testing.assert_allclose(np.abs(axes.axes.T), np.abs(expected.components_), atol=1e-8)
    np.testing.assert_allclose(axes.explained, expected.explained_variance_ratio_, rtol=1e-8)
    assert (axes.axes[np.abs(axes.axes).argmax(axis=0), range(3)] > 0).all()


def test_tensors_of_any_precision_give_the_picture_of_arrays() -> None:
    tokens = _tokens(2)
    axes = fit_principal_axes([torch.from_numpy(tokens)])
    painted = paint_components(torch.from_numpy(tokens).requires_grad_(), GRID, axes)
    np.testing.assert_array_equal(painted, paint_components(tokens, GRID, fit_principal_axes([tokens])))
    half = torch.from_numpy(tokens).bfloat16()
    assert np.abs(paint_components(half, GRID, axes).astype(int) - painted).max() < 12


def test_the_same_token_has_the_same_colour_in_every_image() -> None:
    first, second = _tokens(3), _tokens(4, 35)
    second[7] = first[9]
    pictures = paint_features([first, second], [GRID, (5, 7)])
    assert pictures[0].shape == (4, 6, 3) and pictures[1].shape == (5, 7, 3)
    np.testing.assert_array_equal(pictures[0].reshape(-1, 3)[9], pictures[1].reshape(-1, 3)[7])


def test_first_component_drives_red() -> None:
    tokens = np.zeros((24, 5))
    tokens[:, 2] = np.arange(24) * 10.0
    tokens[:, 4] = np.tile([0.0, 1.0], 12)
    picture = paint_components(tokens, GRID, fit_principal_axes([tokens], clip=0)).reshape(-1, 3).astype(int)
    assert (np.diff(picture[:, 0]) > 0).all() and picture[0, 0] == 0 and picture[-1, 0] == 255


def test_pictures_take_the_size_asked_for() -> None:
    tokens = _tokens(5)
    axes = fit_principal_axes([tokens])
    blocks = paint_components(tokens, GRID, axes, size=(40, 60), is_smooth=False)
    np.testing.assert_array_equal(blocks[5::10, 5::10], paint_components(tokens, GRID, axes))
    assert paint_components(tokens, GRID, axes, size=(33, 71)).shape == (33, 71, 3)


def test_constant_tokens_have_one_colour() -> None:
    picture = paint_features([np.ones((24, 4))], [GRID])[0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens of one width"),
        ([np.zeros((4, 5)), np.zeros((4, 6))], "tokens of one width"),
        ([np.zeros((4, 2))], "C >= 3"),
        ([np.full((4, 5), np.nan)], "NaN or infinity"),
    ],
)
def test_tokens_without_three_components_are_refused(tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit_principal_axes(tokens)


def test_prefix_tokens_are_noticed() -> None:
    tokens = _tokens(6, 25)
    with pytest.raises(ValueError, match=r"\(25, 12\) tokens do not fill a grid of 4x6 patches.*prefix"):
        paint_components(tokens, GRID, fit_principal_axes([tokens]))


def test_similarity_is_the_cosine() -> None:
    tokens, texts = torch.randn(24, 8), torch.randn(3, 8)
    tokens[4] = 0
    tokens[5] = 7 * texts[1]
    similarity = text_similarity(tokens, texts)
    expected = torch.nn.functional.cosine_similarity(texts[:, None].double(), tokens[None].double(), dim=-1)
    np.testing.assert_allclose(similarity, expected.numpy(), atol=1e-12)
    assert similarity[1, 5] == pytest.approx(1) and (similarity[:, 4] == 0).all()
    with pytest.raises(ValueError, match="joint space"):
        text_similarity(tokens, texts[:, :5])


def test_heat_is_brightest_where_the_value_is_highest() -> None:
    values = np.zeros(24)
    values[8] = 1.0
    heat = paint_heat(values, GRID, value_range=(0, 1)).astype(int).sum(axis=2)
    assert heat.argmax() == 8 and (np.delete(heat.ravel(), 8) == heat[0, 0]).all()


def test_one_value_has_one_colour_on_a_common_range() -> None:
    first, second = np.linspace(0, 1, 24), np.linspace(0.5, 3, 24)
    both = common_range([first, torch.from_numpy(second)], clip=0)
    assert both == (0.0, 3.0)
    second[3] = first[10]
    heats = [paint_heat(part, GRID, value_range=both).reshape(-1, 3) for part in (first, second)]
    np.testing.assert_array_equal(heats[0][10], heats[1][3])


def test_heat_over_an_image_keeps_its_size_and_mixes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    values = np.linspace(0, 1, 24)
    none = paint_heat(values, GRID, value_range=(0, 1), image=image, opacity=0.0).astype(int)
    np.testing.assert_allclose(none, np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2), atol=0.5)
    full = paint_heat(values, GRID, value_range=(0, 1), image=image, opacity=1.0)
    np.testing.assert_array_equal(full, paint_heat(values, GRID, value_range=(0, 1), size=(30, 50)))
    with pytest.raises(KeyError, match="'nothing' is unknown"):
        paint_heat(values, GRID, value_range=(0, 1), colormap="nothing")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_equal_values_do_not_divide_by_zero() -> None:
    heat = paint_heat(np.full(24, 2.0), GRID, value_range=(2.0, 2.0))
    assert len(np.unique(heat.reshape(-1, 3), axis=0)) == 1


def test_color_bar_runs_from_the_first_to_the_last_colour() -> None:
    bar = draw_color_bar((-0.1, 0.4), width=200, label="similarity")
    ends = paint_heat(np.array([0.0, 1.0]), (1, 2), value_range=(0, 1))[0]
    np.testing.assert_array_equal(bar[5, [0, -1]], ends)
    assert bar.shape == (40, 200, 3) and (bar[20:] < 128).any()
