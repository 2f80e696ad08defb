"""Lays out one street and paints it from far to near."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from mfuser_d2.data.labels import class_id
from mfuser_d2.data.streets import furniture, vehicles
from mfuser_d2.data.streets.canvas import Canvas, noise, vary

Thing = tuple[float, Callable[[], None]]
"""Depth in metres and what paints it."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of the street lie; metres to the right of the camera."""

    kerbs: tuple[float, float]
    walks: tuple[float, float]
    fronts: tuple[float, float]
    sun_side: int  # -1 or 1: which row of houses throws its shadow on the street
    tracks: float | None  # middle of the tram tracks


def draw_layout(rng: np.random.Generator) -> Layout:
    """Pick the widths of one street; the camera drives in its right half."""
    left, right = -rng.uniform(5.6, 7.6), rng.uniform(3.4, 5.2)
    walks = (left - rng.uniform(2.2, 3.4), right + rng.uniform(2.2, 3.4))
    fronts = (walks[0] - rng.uniform(2.5, 7), walks[1] + rng.uniform(2.5, 7))
    has_tracks = rng.random() < 0.45
    return Layout((left, right), walks, fronts, int(rng.choice((-1, 1))), left + 1.9 if has_tracks else None)


def paint_sky(c: Canvas, rng: np.random.Generator) -> None:
    """A graded sky with clouds."""
    rows = np.linspace(0, 1, c.height, dtype=np.float32)[:, None, None] * c.height / max(c.horizon, 1)
    zenith = np.array(vary(rng, (94, 146, 206), 14), np.float32)
    low = np.array(vary(rng, (206, 222, 234), 8), np.float32)
    sky = zenith + (low - zenith) * np.clip(rows, 0, 1) ** 0.8
    shape = (c.height, c.width)
    cloud = noise(rng, shape, c.width / 7) + 0.5 * noise(rng, shape, c.width / 20) + 0.25 * noise(rng, shape, 12)
    cover = np.clip((cloud - rng.uniform(-0.4, 1.2)) * 0.7, 0, 0.9)[..., None]
    bright = 244 + 8 * np.clip(noise(rng, shape, c.width / 16), -1.5, 1)[..., None]
    c.color[:] = np.clip(sky * (1 - cover) + bright * cover, 0, 255)


def paint_skyline(c: Canvas, rng: np.random.Generator) -> None:
    """Hazy houses and trees where the street ends."""
    x = -90.0
    while x < 90:
        wide, z = rng.uniform(8, 16), rng.uniform(75, 110)
        if rng.random() < 0.7:
            tone = vary(rng, (164, 160, 162), 8)
            c.face([(x, 0, z), (x + wide, 0, z), (x + wide, rng.uniform(7, 17), z), (x, rng.uniform(7, 17), z)],
                   tone, class_id("building"))  # fmt: skip
        else:
            c.disc((x + wide / 2, 2.5, z), wide * 0.55, vary(rng, (112, 138, 104), 8), class_id("vegetation"))
        x += wide * 0.9


def _ground_kinds(rng: np.random.Generator, layout: Layout, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Which row of the palette in `paint_ground` each ground pixel at world (x, z) takes."""
    (kl, kr), (wl, wr) = layout.kerbs, layout.walks
    kind = np.zeros(x.shape, np.uint8)
    kind[(x > wl) & (x < wr)] = 1
    kind[((x > kl - 0.18) & (x < kr + 0.18))] = 2
    kind[(x > kl) & (x < kr)] = 3
    is_road = kind == 3
    white = (np.abs(x - (kl + kr) / 2) < 0.09) & (np.mod(z + rng.uniform(0, 6), 6) < 3.2)
    white |= (np.abs(x - kl - 0.35) < 0.06) | (np.abs(x - kr + 0.35) < 0.06)
    if rng.random() < 0.3:  # a crossing
        start = rng.uniform(7, 14)
        white |= (z > start) & (z < start + 3) & (np.mod(x - kl, 1.1) < 0.6)
    kind[white & is_road] = 4
    if layout.tracks is not None:
        for offset in (-0.72, 0.72):
            kind[is_road & (np.abs(x - layout.tracks - offset) < 0.09)] = 5
    return kind


def paint_ground(c: Canvas, rng: np.random.Generator, layout: Layout) -> None:
    """Road with markings, paved sidewalks with kerbs, grass beyond them, and the shadow of one row of houses."""
    first = int(np.ceil(c.horizon + 1))
    rows = np.arange(first, c.height, dtype=np.float32)[:, None] + np.float32(0.5)
    cols = np.arange(c.width, dtype=np.float32)[None] + np.float32(0.5)
    z = np.minimum(np.float32(c.focal * c.eye) / (rows - np.float32(c.horizon)), 250)
    x = (cols - np.float32(c.vanish)) * (z / np.float32(c.focal))
    kind = _ground_kinds(rng, layout, x, z)

    size = 512
    fine = noise(rng, (size, size), 1) + noise(rng, (size, size), 3)
    coarse = noise(rng, (size, size), 24)
    iu, iv = (x * 40).astype(np.int32) & (size - 1), (z * 24).astype(np.int32) & (size - 1)
    grain = fine[iv, iu] * np.clip(9 / z, 0, 1)
    stain = coarse[iv // 3, iu // 3]

    # Grass, paving, kerb, asphalt, paint, rail: colour, then how much grain and stain show.
    base = [vary(rng, (142, 150, 74), 10), vary(rng, (172, 158, 150), 9), (196, 194, 190), vary(rng, (96, 96, 102), 9),
            (222, 222, 218), (62, 60, 60)]  # fmt: skip
    gains = np.array([[11, 9], [4, 4], [5, 0], [6, 5], [7, 0], [4, 0]], np.float32)
    tone = grain * gains[kind, 0] + stain * gains[kind, 1]
    pitch = 0.9
    left = layout.walks[0]
    column = np.floor((x - left) / pitch)
    joint = (np.mod(x - left, pitch) < 0.05) | (np.mod(z + pitch / 2 * np.mod(column, 2), pitch) < 0.07)
    slabs = np.sin(column * 12.9 + np.floor(z / pitch) * 78.2) * 5 - 34 * joint * np.clip(16 / z, 0, 1)
    tone += np.where(kind == 1, slabs, 0)

    edge = layout.sun_side * rng.uniform(-2.0, 3.5) + 0.5 * np.sin(z * 0.6)
    sunlight = 1 - 0.3 * np.clip((x - edge) * (layout.sun_side * 3), 0, 1)
    color = (np.array(base, np.float32)[kind] + tone[..., None]) * sunlight[..., None].astype(np.float32)
    c.color[first:] = np.clip(color, 0, 255)
    names = ("terrain", "sidewalk", "sidewalk", "road", "road", "road")
    c.label[first:] = np.array([class_id(name) for name in names], np.uint8)[kind]
    c.depth[first:] = z


def _houses(rng: np.random.Generator, c: Canvas, layout: Layout) -> list[Thing]:
    """Both rows of houses, with parks between them."""
    things: list[Thing] = []
    for front in layout.fronts:
        z = rng.uniform(1.5, 4)
        while z < 70:
            end = z + rng.uniform(7, 14)
            if rng.random() < 0.68:
                top = rng.uniform(6.5, 15)
                draw = partial(furniture.draw_facade, c, rng, front, z, end, top)
                things.append((end, draw))
            else:
                for _ in range(int(rng.integers(1, 4))):
                    tx, tz = front + np.sign(front) * rng.uniform(-0.5, 6), rng.uniform(max(z, 6), end + 5)
                    things.append((tz, partial(furniture.draw_tree, c, rng, tx, tz, 1.25)))
            z = end + (rng.uniform(1, 4) if rng.random() < 0.3 else 0)
    return things


def _borders(rng: np.random.Generator, c: Canvas, layout: Layout) -> list[Thing]:
    """Walls, fences and hedges between the sidewalks and the gardens."""
    things: list[Thing] = []
    for walk in layout.walks:
        z = rng.uniform(2, 5)
        while z < 45:
            end, kind = z + rng.uniform(4, 9), rng.random()
            edge = walk + np.sign(walk) * rng.uniform(0.15, 1.1)
            draw = furniture.draw_wall if kind < 0.28 else furniture.draw_fence if kind < 0.56 else None
            draw = furniture.draw_hedge if 0.56 <= kind < 0.62 else draw
            if draw is not None:
                things.append((z, partial(draw, c, rng, edge, z, end)))
            z = end + rng.uniform(0, 2.5)
    return things


def _furniture(rng: np.random.Generator, c: Canvas, layout: Layout) -> list[Thing]:
    """Trees, lamps, signals and signs along the kerbs."""
    things: list[Thing] = []
    draws = (furniture.draw_lamp_post, furniture.draw_traffic_light, furniture.draw_sign, furniture.draw_tree)
    for side in (0, 1):
        outward = 1 if side else -1
        z = rng.uniform(6.0, 8.5)
        order = list(rng.permutation([0, 1, 2, 3, 1, 2]))
        while z < 48:
            kind = order.pop() if order else int(rng.integers(4))
            x = layout.kerbs[side] + outward * (rng.uniform(0.35, 0.6) if kind < 3 else rng.uniform(1.6, 3.0))
            things.append((z, partial(draws[kind], c, rng, x, z)))
            z += rng.uniform(2.6, 5.0)
    return things


def _traffic(rng: np.random.Generator, c: Canvas, layout: Layout) -> list[Thing]:
    """Vehicles in three rows (two lanes and the right kerb), two-wheelers between them."""
    things: list[Thing] = []
    (left, right), tracks = layout.kerbs, layout.tracks
    big = (vehicles.draw_truck, vehicles.draw_bus, vehicles.draw_car, vehicles.draw_car)
    weights = np.array([0.25, 0.21, 0.27, 0.27])

    def lane(x: float, start: float, is_oncoming: bool, density: float) -> None:
        z = start
        while z < 60:
            kind = int(rng.choice(4, p=weights))
            long = (8.5, 9.5, 4.6, 4.6)[kind]
            if rng.random() < density:
                jitter = x + rng.uniform(-0.2, 0.2)
                things.append((z, partial(big[kind], c, rng, jitter, z, is_oncoming)))
            z += long + rng.uniform(2.5, 8)

    if tracks is not None:
        z = rng.uniform(7, 20)
        things.append((z, partial(vehicles.draw_train, c, rng, tracks, z, True)))
        lane(tracks, z + 24, True, 0.5)
    else:
        lane(left + 1.9, rng.uniform(5.5, 11), True, 0.8)
    lane(right - 3.3 + rng.uniform(0, 0.6), rng.uniform(7, 15), False, 0.7)
    if right > 4.2:
        lane(right - 1.2, rng.uniform(5, 10), False, 0.65)
    for draw in (vehicles.draw_bicycle, vehicles.draw_motorcycle):
        for has_rider, chance in ((True, 0.75), (False, 0.5)):
            if rng.random() > chance:
                continue
            z = rng.uniform(4.3, 8.5)
            if has_rider:
                x, along = rng.uniform(left + 3.6, right - 0.5), (0.0, float(rng.choice((-1, 1))))
                if rng.random() < 0.5:
                    along = (float(rng.choice((-0.9, 0.9))), 0.43)
            else:
                side = int(rng.integers(2))
                x, along = layout.kerbs[side] + (1 if side else -1) * rng.uniform(0.7, 1.8), (0.95, 0.31)
            things.append((z, partial(draw, c, rng, x, z, along, has_rider)))
    return things


def _people(rng: np.random.Generator, c: Canvas, layout: Layout) -> list[Thing]:
    things: list[Thing] = []
    for side in (0, 1):
        low, high = sorted((layout.kerbs[side], layout.walks[side]))
        for _ in range(int(rng.integers(2, 6))):
            x, z = rng.uniform(low + 0.5, high - 0.4), 4.6 + 13 * rng.random() ** 1.6
            things.append((z, partial(vehicles.draw_person, c, rng, x, z)))
    return things


def paint_street(rng: np.random.Generator, height: int, width: int) -> Canvas:
    """One street at noon.

    Args:
        rng: decides everything.
        height, width: pixels of the canvas.
    Returns:
        A canvas with colour (H, W, 3) uint8 RGB, label (H, W) trainIds, depth (H, W) metres and light (H, W, 3), the
        colour of what shines at night.
    """
    c = Canvas(
        height=height,
        width=width,
        horizon=height * rng.uniform(0.40, 0.50),
        vanish=width * rng.uniform(0.42, 0.58),
        focal=height * rng.uniform(0.82, 0.98),
        eye=rng.uniform(1.6, 2.0),
    )
    layout = draw_layout(rng)
    paint_sky(c, rng)
    paint_skyline(c, rng)
    paint_ground(c, rng, layout)
    street = _furniture(rng, c, layout) + _traffic(rng, c, layout) + _people(rng, c, layout)
    # What lies nearer to the middle of the street is never hidden by what lies beyond it.
    for layer in (_houses(rng, c, layout), _borders(rng, c, layout), street):
        for _, paint in sorted(layer, key=lambda thing: -thing[0]):
            paint()
    _add_surface(c, rng, layout)
    return c


def _add_surface(c: Canvas, rng: np.random.Generator, layout: Layout) -> None:
    """Plaster grain, leaf mottling and a soft light gradient across the street."""
    shape = (c.height, c.width)
    grain = noise(rng, shape, 1.5)
    leaves = noise(rng, shape, 3.5)
    strength = np.full(256, 0.015, np.float32)
    strength[class_id("building")] = strength[class_id("wall")] = 0.045
    strength[class_id("sky")] = 0.0
    mottle = np.zeros(256, np.float32)
    mottle[class_id("vegetation")], mottle[class_id("terrain")] = 0.17, 0.06
    gain = 1 + strength[c.label] * grain + mottle[c.label] * leaves
    ramp = np.linspace(-0.07, 0.07, c.width, dtype=np.float32)[None] * -layout.sun_side
    gain = gain * np.where(c.label == class_id("sky"), 1, 1 + ramp)
    haze = (1 - np.exp(-np.minimum(c.depth, 200) / 260))[..., None] * (c.label != class_id("sky"))[..., None]
    lit = c.color * gain[..., None]
    c.color[:] = cv2.convertScaleAbs(np.clip(lit * (1 - haze) + np.array([206, 218, 230]) * haze, 0, 255))
