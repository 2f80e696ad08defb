"""What a street is painted on: a pinhole camera and aligned colour, label, depth and light planes."""

from collections.abc import Sequence

import cv2
import numpy as np

from mfuser_d2.data.labels import class_id

Color = tuple[float, float, float]
"""RGB, 0 to 255."""

_SHIFT = 4  # cv2 draws at 1/16 pixel
_TURN = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_RIM = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)


class Canvas:
    """Planes of one picture plus the camera that looks down the street.

    World axes in metres: x right, y up from the ground, z away from the camera.

    Args:
        height, width: pixels.
        horizon, vanish: row and column of the vanishing point, pixels.
        focal: focal length, pixels.
        eye: height of the camera above the ground, metres.
    """

    near = 0.9

    def __init__(self, *, height: int, width: int, horizon: float, vanish: float, focal: float, eye: float) -> None:
        self.height, self.width = height, width
        self.horizon, self.vanish, self.focal, self.eye = horizon, vanish, focal, eye
        self.color = np.zeros((height, width, 3), np.uint8)
        self.label = np.full((height, width), class_id("sky"), np.uint8)
        self.depth = np.full((height, width), 1000.0, np.float32)
        self.light = np.zeros((height, width, 3), np.uint8)

    def project(self, points: Sequence[tuple[float, float, float]]) -> np.ndarray:
        """World points to (P, 2) pixel columns and rows; points behind the camera are moved to its near plane."""
        p = np.asarray(points, np.float64)
        flat = p[:, :2] * (1, -1) + (0, self.eye)
        return flat * (self.focal / np.maximum(p[:, 2:], self.near)) + (self.vanish, self.horizon)

    def scale_at(self, z: float) -> float:
        """Pixels per metre at depth z."""
        return self.focal / max(z, self.near)

    def polygon(
        self, pixels: np.ndarray, color: Color, label: int | None = None, depth: float = 0.0, glow: Color | None = None
    ) -> None:
        """Fill a polygon; without a label it is a detail on whatever carries the label already."""
        contour = [np.round(np.clip(pixels, -4e3, 4e3) * (1 << _SHIFT)).astype(np.int32)]
        cv2.fillPoly(self.color, contour, color, shift=_SHIFT)
        if label is not None:
            cv2.fillPoly(self.label, contour, label, shift=_SHIFT)
            cv2.fillPoly(self.depth, contour, depth, shift=_SHIFT)
        if label is not None or glow is not None:
            cv2.fillPoly(self.light, contour, glow or (0, 0, 0), shift=_SHIFT)

    def face(
        self,
        points: Sequence[tuple[float, float, float]],
        color: Color,
        label: int | None = None,
        glow: Color | None = None,
    ) -> None:
        """Fill a polygon given in world points; its depth is that of its middle."""
        self.polygon(self.project(points), color, label, float(np.mean([p[2] for p in points])), glow)

    def disc(
        self,
        center: tuple[float, float, float],
        radius: float,
        color: Color,
        label: int | None = None,
        glow: Color | None = None,
        squash: float = 1.0,
    ) -> None:
        """Fill a disc that faces the camera; radius in metres, `squash` is its height over its width."""
        size = radius * self.scale_at(center[2])
        rim = self.project([center]) + _RIM * (size, squash * size)
        self.polygon(rim, color, label, center[2], glow)

    def limb(
        self,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        thickness: float,
        color: Color,
        label: int | None = None,
        glow: Color | None = None,
        min_pixels: float = 0.0,
    ) -> None:
        """Fill a straight bar between two world points; thickness in metres, at least `min_pixels` wide."""
        a, b = self.project([start, end])
        along = b - a
        side = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-6)
        wide_a = max(thickness * self.scale_at(start[2]), min_pixels) / 2
        wide_b = max(thickness * self.scale_at(end[2]), min_pixels) / 2
        quad = np.stack([a + side * wide_a, b + side * wide_b, b - side * wide_b, a - side * wide_a])
        self.polygon(quad, color, label, (start[2] + end[2]) / 2, glow)


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise, (H, W) float32 around 0 with unit spread; `cell` is the size of its blobs in pixels."""
    small = rng.standard_normal((max(2, round(shape[0] / cell)), max(2, round(shape[1] / cell)))).astype(np.float32)
    smooth = cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return smooth / max(float(smooth.std()), 1e-6)


def shade(color: Color, factor: float) -> Color:
    """A colour made lighter or darker."""
    return tuple(float(min(255.0, max(0.0, c * factor))) for c in color)  # type: ignore[return-value]


def vary(rng: np.random.Generator, color: Color, amount: float = 14.0) -> Color:
    """A colour near the given one."""
    jitter = rng.normal(0, amount, 3) * 0.5 + rng.normal(0, amount)
    return tuple(float(np.clip(c + d, 0, 255)) for c, d in zip(color, jitter, strict=True))  # type: ignore[return-value]
