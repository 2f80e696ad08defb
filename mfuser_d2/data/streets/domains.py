"""How the same street looks by day, at night, in fog and drawn with a pen."""

from collections.abc import Callable

import cv2
import numpy as np

from mfuser_d2.data.labels import class_id
from mfuser_d2.data.streets.canvas import Canvas, noise

Render = Callable[[np.random.Generator, Canvas], np.ndarray]
"""From a painted canvas to its picture, (H, W, 3) uint8 RGB of the same size."""


def _grain(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Sensor noise of unit spread, alike in all channels: (H, W, 1)."""
    return rng.standard_normal((*image.shape[:2], 1), dtype=np.float32)


def _to_u8(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).astype(np.uint8)


def render_day(rng: np.random.Generator, canvas: Canvas) -> np.ndarray:
    """Daylight of varying colour and strength, slight sensor noise."""
    warmth = rng.uniform(-0.05, 0.07)
    tint = np.array([1 + warmth, 1.0, 1 - warmth], np.float32) * rng.uniform(0.88, 1.1)
    image = canvas.color.astype(np.float32) * tint
    return _to_u8(image + _grain(rng, image) * 3)


def render_night(rng: np.random.Generator, canvas: Canvas) -> np.ndarray:
    """Moonlight, a dark sky, and the glow of lamps, windows and headlights around them."""
    height, width = canvas.label.shape
    base = canvas.color.astype(np.float32) / 255
    base = base**1.25 * np.array([0.50, 0.54, 0.72], np.float32) * rng.uniform(0.85, 1.1)
    is_sky = (canvas.label == class_id("sky"))[..., None]
    rows = np.linspace(0.6, 1.3, height, dtype=np.float32)[:, None, None]
    base = np.where(is_sky, np.array([0.05, 0.06, 0.13], np.float32) * rows + 0.10 * (base - base.mean()), base)
    light = canvas.light.astype(np.float32) / 255
    small = cv2.resize(light, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    near = cv2.GaussianBlur(small, (0, 0), height / 200)
    wide = cv2.GaussianBlur(small, (0, 0), height / 34)
    halo = cv2.resize(near * 0.55 + wide * 1.2, (width, height))
    headlight = np.exp(-(((np.mgrid[0:height, 0:width][1] - width / 2) / (0.33 * width)) ** 2))[..., None]
    below = np.clip((np.arange(height, dtype=np.float32) - canvas.horizon) / height, 0, 1)[:, None, None]
    lit = base * (1 + 2.2 * halo + 0.9 * headlight * below * 2) + 0.22 * halo * ~is_sky + 0.12 * halo
    image = np.maximum(lit, light * 0.95)
    return _to_u8(image * 255 + _grain(rng, image) * 8)


def render_fog(rng: np.random.Generator, canvas: Canvas) -> np.ndarray:
    """Light scattered by fog, by Koschmieder's law over the true depth."""
    visibility = rng.uniform(22, 50)  # metres until 5 % of the contrast is left
    keep = np.exp(-3 * np.minimum(canvas.depth, 400) / visibility)
    keep *= np.exp(0.12 * noise(rng, canvas.label.shape, canvas.width / 6))
    keep = np.clip(keep, 0, 1)[..., None]
    air = np.array([196, 200, 204], np.float32) * rng.uniform(0.92, 1.08)
    image = canvas.color.astype(np.float32)
    grey = image.mean(axis=2, keepdims=True)
    image = 0.6 * image + 0.4 * grey  # wet light washes colours out
    return _to_u8(image * keep + air * (1 - keep) + _grain(rng, image) * 2.5)


def render_sketch(rng: np.random.Generator, canvas: Canvas) -> np.ndarray:
    """A pen drawing on paper: outlines, hatched shadows and a thin wash of watercolour."""
    height, width = canvas.label.shape
    flat = cv2.bilateralFilter(canvas.color, 7, 50, 7)
    wash = np.round(flat.astype(np.float32) / 36) * 36
    paper = np.array([246, 240, 224], np.float32) + 5 * noise(rng, (height, width), 2)[..., None]
    grey = cv2.cvtColor(flat, cv2.COLOR_RGB2GRAY).astype(np.float32)
    image = paper * (0.30 + 0.70 * wash / 255 * 1.12)
    rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
    wobble = noise(rng, (height, width), 40) * 1.5
    for sign, limit in ((1, 105), (-1, 62)):
        stroke = np.cos((rows + sign * cols + wobble) * 2 * np.pi / 11) > 0.45
        image *= 1 - 0.34 * (stroke & (grey < limit))[..., None]
    edges = np.hypot(cv2.Scharr(grey, cv2.CV_32F, 1, 0), cv2.Scharr(grey, cv2.CV_32F, 0, 1))
    ink = np.clip((edges - 180) / 500, 0, 1)
    outline = (np.hypot(*np.gradient(canvas.label.astype(np.float32))) > 0).astype(np.float32)
    ink = np.maximum(ink, cv2.GaussianBlur(outline, (0, 0), 0.8) * 0.9)
    return _to_u8(image * (1 - ink[..., None]) + np.array([38, 34, 48], np.float32) * ink[..., None])


RENDERS: dict[str, Render] = {
    "day": render_day,
    "night": render_night,
    "fog": render_fog,
    "sketch": render_sketch,
}
