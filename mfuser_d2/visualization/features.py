"""What features hold: their principal components as colours, and their likeness to words as heat maps.

Pure functions over tokens; where the tokens come from is the caller's business. Arrays and tensors on any device work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np
from PIL import Image

from .labels import text_font

if TYPE_CHECKING:
    from torch import Tensor

Values = Union[np.ndarray, "Tensor"]
Grid = tuple[int, int]


@dataclass(frozen=True)
class PrincipalAxes:
    """Common axes for the colours of several images.

    Attributes:
        mean: (C,), what is subtracted.
        axes: (C, 3), unit length, the direction of most variance first.
        low, high: (3,), the range of each component that the colours span.
        explained: (3,), each axis's share of the total variance, 0..1.
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    explained: np.ndarray


def to_floats(values: Values) -> np.ndarray:
    """Give numbers of any kind as a float64 array on the CPU."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def fit_principal_axes(tokens: Sequence[Values], *, clip: float = 1.0) -> PrincipalAxes:
    """Find the first three principal components of the tokens of all images together.

    The sign of each axis is fixed (its largest loading is positive), so that the colours of two runs can be compared.

    Args:
        tokens: one (T_i, C) per image, patches only; the counts may differ, C may not.
        clip: percent of the tokens at either end whose component lies outside the colour range.
    Raises:
        ValueError: no tokens, widths below 3 or differing, or values that are not finite.
    """
    arrays = [to_floats(part) for part in tokens]
    if not arrays or any(part.ndim != 2 or part.shape[1] != arrays[0].shape[1] for part in arrays):
        raise ValueError(f"tokens of one width are wanted, (T, C) per image; got {[part.shape for part in arrays]}")
    stacked = np.concatenate(arrays)
    if stacked.shape[1] < 3 or len(stacked) < 2:
        raise ValueError(
            f"three components need C >= 3 and at least 2 tokens, got {len(stacked)} of {stacked.shape[1]}"
        )
    if not np.isfinite(stacked).all():
        raise ValueError("the tokens hold NaN or infinity; run the network in float32")
    mean = stacked.mean(axis=0)
    centred = stacked - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(stacked))  # ascending
    axes = directions[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(3)])
    low, high = np.percentile(centred @ axes, [clip, 100 - clip], axis=0)
    total = max(float(variances.clip(min=0).sum()), np.finfo(float).tiny)
    return PrincipalAxes(mean=mean, axes=axes, low=low, high=high, explained=variances[::-1][:3].clip(min=0) / total)


def paint_components(
    tokens: Values, grid: Grid, axes: PrincipalAxes, *, size: tuple[int, int] | None = None, is_smooth: bool = True
) -> np.ndarray:
    """Paint one image's tokens: first component red, second green, third blue.

    Args:
        tokens: (h*w, C), row-major.
        grid: (h, w) in patches.
        axes: from `fit_principal_axes`; the same for all images that are to be compared.
        size: (height, width) of the picture in pixels; None gives one pixel per patch.
        is_smooth: enlarge bicubically; False shows the patches.
    Returns:
        (H, W, 3) uint8 RGB.
    """
    components = (_checked(tokens, grid) - axes.mean) @ axes.axes
    span = np.where(axes.high > axes.low, axes.high - axes.low, 1.0)
    scaled = ((components - axes.low) / span).clip(0, 1)
    picture = np.rint(255 * scaled).astype(np.uint8).reshape(*grid, 3)
    if size is None:
        return picture
    method = Image.Resampling.BICUBIC if is_smooth else Image.Resampling.NEAREST
    return np.array(Image.fromarray(picture).resize(size[::-1], method))


def paint_features(
    tokens: Sequence[Values],
    grids: Sequence[Grid],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    is_smooth: bool = True,
) -> list[np.ndarray]:
    """Paint several images' tokens on common axes; see `fit_principal_axes` and `paint_components`."""
    axes = fit_principal_axes(tokens)
    pixels = sizes or [None] * len(grids)
    return [
        paint_components(part, grid, axes, size=size, is_smooth=is_smooth)
        for part, grid, size in zip(tokens, grids, pixels, strict=True)
    ]


def text_similarity(tokens: Values, texts: Values) -> np.ndarray:
    """Give the cosine of each word to each patch.

    Args:
        tokens: (T, E), patches in the space shared with the texts.
        texts: (K, E), one embedding per word.
    Returns:
        (K, T) in -1..1; 0 where a vector has no length.
    """
    patches, words = to_floats(tokens), to_floats(texts)
    if patches.ndim != 2 or words.ndim != 2 or patches.shape[1] != words.shape[1]:
        raise ValueError(
            f"tokens (T, E) and texts (K, E) of one width are wanted, got {patches.shape} and {words.shape}; "
            "project the tokens into the joint space first"
        )
    return _unit(words) @ _unit(patches).T


def common_range(values: Sequence[Values], *, clip: float = 1.0) -> tuple[float, float]:
    """Give a (low, high) that fits several maps, so that one colour means one value in all of them.

    Args:
        values: the maps, any shapes.
        clip: percent of all values at either end that may lie outside.
    """
    joined = np.concatenate([to_floats(part).ravel() for part in values])
    low, high = np.percentile(joined, [clip, 100 - clip])
    return float(low), float(high)


def paint_heat(
    values: Values,
    grid: Grid,
    *,
    value_range: tuple[float, float],
    size: tuple[int, int] | None = None,
    image: np.ndarray | None = None,
    opacity: float = 0.65,
    colormap: str = "inferno",
) -> np.ndarray:
    """Paint one value per patch as a heat map, over its image if given.

    Args:
        values: (h*w,), row-major.
        grid: (h, w) in patches.
        value_range: the values of the darkest and the brightest colour, see `common_range`.
        size: (height, width) in pixels; by default the image's, or one pixel per patch.
        image: (H, W, 3) uint8 RGB to lay the map over, in grey.
        opacity: of the map over the image; 0..1.
        colormap: one of matplotlib's names.
    Returns:
        (H, W, 3) uint8 RGB.
    """
    flat = _checked(to_floats(values).reshape(-1, 1), grid).reshape(grid)
    low, high = value_range
    scaled = ((flat - low) / (high - low if high > low else 1.0)).clip(0, 1)
    if image is not None:
        size = size or image.shape[:2]
    if size is not None:
        enlarged = Image.fromarray(scaled.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
        scaled = np.asarray(enlarged).clip(0, 1)
    heat = _colors(scaled, colormap)
    if image is None:
        return heat
    shown = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS), dtype=np.float64)
    grey = shown.mean(axis=2, keepdims=True)
    return np.rint(opacity * heat + (1 - opacity) * grey).astype(np.uint8)


def draw_color_bar(
    value_range: tuple[float, float], *, width: int, label: str = "", colormap: str = "inferno"
) -> np.ndarray:
    """Draw the scale of `paint_heat`: (40, width, 3) uint8 RGB, with the values at its ends and a label between."""
    from PIL import ImageDraw

    bar = _colors(np.tile(np.linspace(0, 1, width), (14, 1)), colormap)
    canvas = Image.new("RGB", (width, 40), "white")
    canvas.paste(Image.fromarray(bar), (0, 2))
    draw, font = ImageDraw.Draw(canvas), text_font(13)
    low, high = value_range
    for x, text, anchor in ((0, f"{low:.3g}", "lm"), (width // 2, label, "mm"), (width - 1, f"{high:.3g}", "rm")):
        draw.text((x, 29), text, fill=(60, 60, 60), font=font, anchor=anchor)
    return np.array(canvas)


def _colors(scaled: np.ndarray, colormap: str) -> np.ndarray:
    from matplotlib import colormaps

    if colormap not in colormaps:
        raise KeyError(f"colormap {colormap!r} is unknown to matplotlib; choose from {sorted(colormaps)[:12]}, ...")
    return np.rint(255 * colormaps[colormap](scaled)[..., :3]).astype(np.uint8)


def _checked(tokens: Values, grid: Grid) -> np.ndarray:
    array = to_floats(tokens)
    if array.ndim != 2 or len(array) != grid[0] * grid[1]:
        raise ValueError(
            f"{array.shape} tokens do not fill a grid of {grid[0]}x{grid[1]} patches; wanted ({grid[0] * grid[1]}, C), "
            "without prefix tokens"
        )
    return array


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
