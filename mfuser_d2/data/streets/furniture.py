"""Poles, signals, signs, trees, facades, walls and fences along the street."""

import numpy as np

from mfuser_d2.data.labels import class_id
from mfuser_d2.data.streets.canvas import Canvas, Color, shade, vary

FACADES: tuple[Color, ...] = (
    (168, 92, 72), (205, 178, 140), (190, 150, 110), (150, 112, 96), (214, 196, 170), (176, 128, 92), (150, 130, 124),
    (198, 140, 116),
)  # fmt: skip
POLE: Color = (132, 136, 138)


def draw_pole(c: Canvas, rng: np.random.Generator, x: float, z: float, top: float) -> None:
    """An upright post with a foot and a lit edge."""
    label, color = class_id("pole"), vary(rng, POLE, 8)
    thickness = 0.25
    c.limb((x, 0, z), (x, top, z), thickness, color, label, min_pixels=6)
    c.limb((x + thickness * 0.28, 0, z), (x + thickness * 0.28, top, z), thickness * 0.3, shade(color, 0.65),
           min_pixels=1.4)  # fmt: skip
    c.limb((x, 0, z), (x, 0.45, z), thickness * 1.7, shade(color, 0.8), label, min_pixels=7)


def draw_lamp_post(c: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A street lamp whose arm reaches over the road."""
    top, reach = rng.uniform(5.2, 6.5), -np.sign(x) * rng.uniform(1.0, 1.5)
    draw_pole(c, rng, x, z, top)
    c.limb((x, top, z), (x + reach, top + 0.35, z), 0.14, POLE, class_id("pole"), min_pixels=3.5)
    c.limb((x + reach * 0.7, top + 0.26, z), (x + reach * 1.25, top + 0.3, z), 0.26, (226, 226, 214), class_id("pole"),
           glow=(255, 214, 140), min_pixels=3)  # fmt: skip


def draw_traffic_light(c: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A signal head with a pale rim on a post; one of its three lamps is lit."""
    label, lit = class_id("traffic light"), int(rng.integers(3))
    foot = rng.uniform(2.3, 2.9)
    draw_pole(c, rng, x, z, foot + 0.2)
    wide, tall = 0.38, 1.8
    for grow, color in ((0.1, (224, 206, 96)), (0.0, (30, 32, 32))):
        x0, x1, y0, y1 = x - wide - grow, x + wide + grow, foot - grow, foot + tall + grow
        c.face([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], color, label)
    lamps: tuple[Color, ...] = ((255, 52, 40), (255, 190, 40), (60, 255, 130))
    for k, color in enumerate(lamps):
        center = (x, foot + tall * (5 - 2 * k) / 6, z)
        c.disc(center, 0.24, color if k == lit else shade(color, 0.28), glow=color if k == lit else None)


def draw_sign(c: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A traffic sign on a post: disc, triangle, diamond or board in the usual colours."""
    label, kind = class_id("traffic sign"), int(rng.integers(5))
    y, size = rng.uniform(2.4, 3.0), rng.uniform(0.5, 0.62)
    draw_pole(c, rng, x, z, y)
    red, blue, white = vary(rng, (208, 26, 36), 5), vary(rng, (24, 84, 190), 5), (244, 244, 240)

    def shape(corners: int, turn: float, radius: float, color: Color, as_label: int | None = None) -> None:
        t = np.arange(corners) * 2 * np.pi / corners + turn
        c.face([(x + radius * np.cos(a), y + radius * np.sin(a), z) for a in t], color, as_label)

    if kind == 0:  # limit
        shape(20, 0, size, red, label)
        shape(20, 0, size * 0.72, white)
        c.limb((x - size * 0.25, y, z), (x + size * 0.3, y, z), size * 0.55, (30, 30, 30))
    elif kind == 1:  # direction
        shape(20, 0, size, blue, label)
        c.limb((x - size * 0.5, y - size * 0.1, z), (x + size * 0.45, y + size * 0.3, z), size * 0.28, white)
    elif kind == 2:  # warning
        shape(3, np.pi / 2, size * 1.25, red, label)
        shape(3, np.pi / 2, size * 0.82, white)
        c.limb((x, y - size * 0.15, z), (x, y + size * 0.4, z), size * 0.2, (20, 20, 20))
    elif kind == 3:  # priority
        shape(4, 0, size * 1.15, white, label)
        shape(4, 0, size * 0.9, (250, 196, 24))
    else:  # crossing
        shape(4, np.pi / 4, size * 1.3, blue, label)
        shape(3, np.pi / 2, size * 0.75, white)


def draw_tree(c: Canvas, rng: np.random.Generator, x: float, z: float, size: float = 1.0) -> None:
    """A trunk under a crown of leaf clusters, darker below and away from the sun."""
    label = class_id("vegetation")
    green: Color = vary(rng, (62, 112, 42), 12)
    trunk, crown = rng.uniform(1.6, 2.4) * size, rng.uniform(1.5, 2.3) * size
    tip = (x + rng.uniform(-0.2, 0.2), trunk + crown * 0.5, z)
    c.limb((x, 0, z), tip, 0.32 * size, (84, 66, 50), label, min_pixels=3)
    c.disc((x, trunk + crown * 0.75, z), crown * 0.86, shade(green, 0.6), label)
    count = int(np.clip(c.scale_at(z) * crown * 1.6, 24, 110))
    angle, reach = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.random(count)) * crown
    up = np.sin(angle) * reach * 0.9
    for dx, dy, r, glint in zip(np.cos(angle) * reach, up, rng.uniform(0.16, 0.34, count) * crown,
                                rng.normal(0, 0.1, count), strict=True):  # fmt: skip
        light = 0.95 + 0.34 * dy / crown + 0.16 * dx / crown + glint
        c.disc((x + dx, trunk + crown * 0.8 + dy, z), r, shade(green, light), label)


def draw_hedge(c: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float) -> None:
    """A row of bushes from z1 to z0."""
    label, green = class_id("vegetation"), vary(rng, (56, 100, 40), 10)
    for z in np.arange(z1, z0, -0.6):
        for _ in range(4):
            dx, dy = rng.uniform(-0.4, 0.4), rng.uniform(0.2, 1.1)
            c.disc((x + dx, dy, z), rng.uniform(0.25, 0.5), shade(green, 0.6 + 0.5 * dy + rng.normal(0, 0.08)), label)


def draw_facade(c: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float, top: float) -> None:
    """A house front along the street from z0 to z1 with windows, a ground floor and the end wall towards the camera."""
    label, color = class_id("building"), vary(rng, FACADES[rng.integers(len(FACADES))], 10)
    away = np.sign(x) * 10
    roof = shade(color, 0.5)
    c.face([(x, 0, z0), (x + away, 0, z0), (x + away, top, z0), (x, top, z0)], shade(color, 0.62), label)
    strips = np.linspace(z1, z0, max(2, round((z1 - z0) / 3) + 1))
    for far, near in zip(strips[:-1], strips[1:], strict=True):
        c.face([(x, 0, near), (x, top, near), (x, top, far), (x, 0, far)], color, label)
    c.face([(x, top - 0.5, z0), (x, top, z0), (x, top, z1), (x, top - 0.5, z1)], roof)
    c.face([(x, 0, z0), (x, 0.6, z0), (x, 0.6, z1), (x, 0, z1)], shade(color, 0.7))
    pane, trim = vary(rng, (74, 92, 108), 12), shade(color, 1.3)
    pitch, wide = rng.uniform(2.1, 2.9), rng.uniform(1.0, 1.5)
    count = max(1, int((z1 - z0 - 0.4) / pitch))
    for floor in range(int((top - 1.2) / 3)):
        y = 1.0 + 3 * floor
        for k in range(count):
            a = z0 + (z1 - z0 - pitch * count) / 2 + pitch * (k + 0.5) - wide / 2
            is_door = floor == 0 and rng.random() < 0.3
            low, high = (0.05, y + 1.5) if is_door else (y, y + 1.75)
            is_lit = rng.random() < 0.4
            c.face([(x, low - 0.12, a - 0.14), (x, high + 0.12, a - 0.14), (x, high + 0.12, a + wide + 0.14),
                    (x, low - 0.12, a + wide + 0.14)], trim)  # fmt: skip
            c.face([(x, low, a), (x, high, a), (x, high, a + wide), (x, low, a + wide)],
                   (92, 62, 44) if is_door else shade(pane, rng.uniform(0.75, 1.25)),
                   glow=(255, 206, 120) if is_lit else None)  # fmt: skip
            if not is_door:
                c.face([(x, low, a + wide * 0.46), (x, high, a + wide * 0.46), (x, high, a + wide * 0.54),
                        (x, low, a + wide * 0.54)], trim)  # fmt: skip
    for k in range(int(top / 3)):  # windows of the end wall
        for step in (0.25, 0.6):
            a = x + away * step
            c.face([(a, 1 + 3 * k, z0), (a + away * 0.13, 1 + 3 * k, z0), (a + away * 0.13, 2.6 + 3 * k, z0),
                    (a, 2.6 + 3 * k, z0)], shade(pane, 0.7))  # fmt: skip


def draw_wall(c: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float) -> None:
    """A free-standing wall of grey-blue or sandstone blocks with a coping."""
    label, top = class_id("wall"), rng.uniform(1.5, 2.1)
    color = vary(rng, ((122, 128, 146), (140, 138, 150), (112, 116, 128))[rng.integers(3)], 8)
    for z in np.arange(z1, z0, -1.0):
        near, row = max(z - 1.0, z0), 0
        c.face([(x, 0, near), (x, top, near), (x, top, z), (x, 0, z)], color, label)
        for y in np.arange(0.05, top - 0.2, 0.4):
            row += 1
            shift = 0.5 * (row % 2)
            for part in (0.0, 0.5):
                a = near + (part + shift * 0.5) * (z - near)
                b = min(a + 0.46 * (z - near), z)
                tone = shade(color, 1 + rng.normal(0, 0.13))
                c.face([(x, y, a), (x, y + 0.34, a), (x, y + 0.34, b), (x, y, b)], tone)
    inner = x + np.sign(x) * 0.35
    c.face([(x, 0, z0), (inner, 0, z0), (inner, top, z0), (x, top, z0)], shade(color, 0.8), label)
    c.face([(x, top, z0), (x, top + 0.14, z0), (x, top + 0.14, z1), (x, top, z1)], shade(color, 1.35), label)


def draw_fence(c: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float) -> None:
    """A plank fence; the gaps between planks belong to it."""
    label, top = class_id("fence"), rng.uniform(1.3, 1.8)
    color = vary(rng, ((206, 192, 160), (196, 160, 112), (222, 214, 200))[rng.integers(3)], 8)
    for z in np.arange(z1, z0 + 0.1, -0.5):
        near = max(z - 0.5, z0)
        c.face([(x, 0, near), (x, top, near), (x, top, z), (x, 0, z)], shade(color, 0.42), label)
        a, b = near + 0.06, near + 0.06 + (z - near) * 0.62
        c.face([(x, 0, a), (x, top, a), (x, top + 0.18, (a + b) / 2), (x, top, b), (x, 0, b)],
               shade(color, 1 + rng.normal(0, 0.06)), label)  # fmt: skip
    for y in (0.35, top - 0.3):
        c.face([(x, y, z0), (x, y + 0.14, z0), (x, y + 0.14, z1), (x, y, z1)], shade(color, 0.8))
