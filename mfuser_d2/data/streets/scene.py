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


def paint_ground(c: Canvas, rng: np.random.Generator, layout: Layout) -> None:
    """Road with markings, paved sidewalks with kerbs, grass beyond them, and the shadow of one row of houses."""
    first = int(np.ceil(c.horizon + 1))
    rows, cols = np.mgrid[first : c.height, 0 : c.width].astype(np.float32)
    z = np.minimum(c.focal * c.eye / (rows + 0.5 - c.horizon), 250)
    x = (cols + 0.5 - c.vanish) * z / c.focal

    size = 1024
    fine = noise(rng, (size, size), 1) + noise(rng, (size, size), 3)
    coarse = noise(rng, (size, size), 24)
    scale = 40.0  # texels per metre
    iu, iv = (x * scale).astype(np.int32) % size, (z * scale * 0.6).astype(np.int32) % size
    fade = np.clip(9.0 / z, 0, 1)
    grain, stain = fine[iv, iu] * fade, coarse[(iv // 3) % size, (iu // 3) % size]

    asphalt = np.array(vary(rng, (96, 96, 102), 9), np.float32)
    slab = np.array(vary(rng, (172, 158, 150), 9), np.float32)
    grass = np.array(vary(rng, (142, 150, 74), 10), np.float32)

    (kl, kr), (wl, wr) = layout.kerbs, layout.walks
    is_road, is_walk = (x > kl) & (x < kr), (x > wl) & (x < wr)
    color = grass + (grain * 11 + stain * 9)[..., None] * np.array([1.1, 1.0, 0.6], np.float32)
    pitch = 0.9
    joint = (np.mod(x - wl, pitch) < 0.05) | (np.mod(z + pitch / 2 * (np.floor((x - wl) / pitch) % 2), pitch) < 0.07)
    tile = np.sin(np.floor((x - wl) / pitch) * 12.9 + np.floor(z / pitch) * 78.2) * 5
    paving = slab + (grain * 4 + stain * 4 + tile - 34 * joint * np.clip(16 / z, 0, 1))[..., None]
    color = np.where(is_walk[..., None], paving, color)
    tar = asphalt + (grain * 6 + stain * 5)[..., None]
    lane = (layout.kerbs[0] + layout.kerbs[1]) / 2
    white = (np.abs(x - lane) < 0.09) & (np.mod(z + rng.uniform(0, 6), 6) < 3.2)
    white |= (np.abs(x - kl - 0.35) < 0.06) | (np.abs(x - kr + 0.35) < 0.06)
    if rng.random() < 0.3:
        start = rng.uniform(7, 14)
        white |= (z > start) & (z < start + 3) & (np.mod(x - kl, 1.1) < 0.6)
    tar = np.where(white[..., None], 222 + grain[..., None] * 7, tar)
    if layout.tracks is not None:
        for offset in (-0.72, 0.72):
            tar = np.where((np.abs(x - layout.tracks - offset) < 0.09)[..., None], 62 + grain[..., None] * 4, tar)
    color = np.where(is_road[..., None], tar, color)
    kerb = (is_walk & ~is_road) & ((np.abs(x - kl) < 0.18) | (np.abs(x - kr) < 0.18))
    color = np.where(kerb[..., None], 196 + grain[..., None] * 5, color)

    edge = layout.sun_side * rng.uniform(-2.0, 3.5) + 0.5 * np.sin(z * 0.6)
    in_shadow = np.clip((x * layout.sun_side - edge * layout.sun_side) * 3, 0, 1)
    color *= (1 - 0.3 * in_shadow)[..., None]
    c.color[first:] = np.clip(color, 0, 255)
    c.label[first:] = np.where(is_road, class_id("road"), np.where(is_walk, class_id("sidewalk"), class_id("terrain")))
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
        lane(left + 1.9, rng.uniform(6, 14), True, 0.75)
    lane(right - 3.3 + rng.uniform(0, 0.6), rng.uniform(7, 15), False, 0.7)
    if right > 4.2:
        lane(right - 1.2, rng.uniform(5, 10), False, 0.65)
    for draw in (vehicles.draw_bicycle, vehicles.draw_motorcycle):
        for has_rider, chance in ((True, 0.75), (False, 0.5)):
            if rng.random() > chance:
                continue
            z = rng.uniform(4.5, 11)
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
            x, z = rng.uniform(low + 0.5, high - 0.4), 5 + 16 * rng.random() ** 1.5
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
