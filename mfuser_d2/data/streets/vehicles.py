"""Cars, trucks, buses, trams, two-wheelers and the people on the street, built from faces in world metres."""

import numpy as np

from mfuser_d2.data.labels import class_id
from mfuser_d2.data.streets.canvas import Canvas, Color, shade, vary

CAR_COLORS: tuple[Color, ...] = (
    (186, 30, 34), (28, 60, 140), (225, 225, 222), (30, 32, 36), (150, 155, 160), (200, 160, 40), (30, 110, 110),
    (120, 20, 50), (90, 120, 60), (230, 110, 30),
)  # fmt: skip
CLOTHES: tuple[Color, ...] = (
    (200, 40, 50), (40, 70, 160), (230, 200, 60), (40, 120, 80), (235, 235, 230), (60, 60, 65), (150, 70, 140),
    (230, 120, 50), (100, 150, 190),
)  # fmt: skip
TROUSERS: tuple[Color, ...] = ((40, 45, 70), (50, 50, 52), (110, 95, 75), (80, 90, 110))
SKINS: tuple[Color, ...] = ((236, 196, 168), (198, 146, 110), (140, 95, 70), (96, 64, 48))
GLASS: Color = (58, 76, 92)
TYRE: Color = (26, 26, 28)
HEAD_GLOW: Color = (255, 244, 205)
TAIL_GLOW: Color = (255, 40, 30)


def _pick(rng: np.random.Generator, colors: tuple[Color, ...], amount: float = 10.0) -> Color:
    return vary(rng, colors[rng.integers(len(colors))], amount)


def _side(x0: float, x1: float) -> float | None:
    """The x of the side wall that the camera (at x = 0) sees, or None when it looks straight at the end."""
    return x0 if x0 > 0 else x1 if x1 < 0 else None


def ground_shadow(c: Canvas, x0: float, x1: float, z0: float, z1: float, spread: float = 0.15) -> None:
    """Dark ground below a thing; a detail, so the ground keeps its label."""
    a, b = x0 - spread, x1 + spread
    c.face([(a, 0, z0 - spread), (b, 0, z0 - spread), (b, 0, z1), (a, 0, z1)], (38, 38, 42))


def box(
    c: Canvas, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], color: Color, label: int
) -> None:
    """A cuboid: its top if below the eye, the side and the end towards the camera."""
    (x0, x1), (y0, y1), (z0, z1) = x, y, z
    if y1 < c.eye:
        c.face([(x0, y1, z0), (x1, y1, z0), (x1, y1, z1), (x0, y1, z1)], shade(color, 1.25), label)
    side = _side(x0, x1)
    if side is not None:
        c.face([(side, y0, z0), (side, y1, z0), (side, y1, z1), (side, y0, z1)], shade(color, 0.72), label)
    c.face([(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)], color, label)


def _wheel_side(c: Canvas, x: float, z: float, radius: float, label: int) -> None:
    for r, color in ((radius, TYRE), (radius * 0.55, (150, 150, 152)), (radius * 0.2, (70, 70, 72))):
        t = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        rim = [(x, radius + r * np.sin(a), z + r * np.cos(a)) for a in t]
        c.face(rim, color, label)


def _wheels(c: Canvas, x0: float, x1: float, zs: tuple[float, ...], z0: float, radius: float, label: int) -> None:
    for xa in (x0 + 0.05, x1 - 0.3):
        c.face([(xa, 0, z0), (xa + 0.25, 0, z0), (xa + 0.25, radius, z0), (xa, radius, z0)], TYRE, label)
    side = _side(x0, x1)
    if side is not None:
        for z in zs:
            _wheel_side(c, side, z, radius, label)


def _lamps(c: Canvas, x0: float, x1: float, y: float, z: float, is_oncoming: bool, size: float = 0.3) -> None:
    color, glow = ((250, 246, 225), HEAD_GLOW) if is_oncoming else ((205, 28, 26), TAIL_GLOW)
    for xa in (x0 + 0.12, x1 - 0.12 - size):
        c.face([(xa, y, z), (xa + size, y, z), (xa + size, y + 0.2, z), (xa, y + 0.2, z)], color, glow=glow)


def draw_car(c: Canvas, rng: np.random.Generator, x: float, z: float, is_oncoming: bool) -> None:
    """A hatchback or saloon of about 1.8 x 1.5 x 4.3 m, centred on x, its near end at z."""
    label, color = class_id("car"), _pick(rng, CAR_COLORS)
    wide, tall, long = 1.8 + rng.uniform(-0.1, 0.15), 1.5 + rng.uniform(-0.1, 0.35), 4.2 + rng.uniform(-0.4, 0.4)
    x0, x1, z1 = x - wide / 2, x + wide / 2, z + long
    belt, near_foot, near_top = 0.92, z + (0.9 if is_oncoming else 0.15), z + (1.7 if is_oncoming else 0.65)
    ground_shadow(c, x0, x1, z, z1)
    _wheels(c, x0, x1, (), z, 0.33, label)
    box(c, (x0, x1), (0.28, belt), (z, z1), color, label)
    top0, top1 = x0 + 0.2, x1 - 0.2
    far_top, far_foot = z1 - 1.4, z1 - 0.6
    c.face([(top0, tall, near_top), (top1, tall, near_top), (top1, tall, far_top), (top0, tall, far_top)],
           shade(color, 1.25), label)  # fmt: skip
    side = _side(x0, x1)
    if side is not None:
        lean = top0 if side == x0 else top1
        c.face([(side, belt, near_foot), (lean, tall, near_top), (lean, tall, far_top), (side, belt, far_foot)],
               shade(color, 0.72), label)  # fmt: skip
        middle, y0, y1 = (near_top + far_top) / 2, belt + 0.06, tall - 0.08
        for a, b in ((near_top - 0.1, middle - 0.06), (middle + 0.06, far_top + 0.1)):
            c.face([(side, y0, a - 0.15), (lean, y1, a + 0.1), (lean, y1, b), (side, y0, b)], GLASS)
        for zw in (z + 0.8, z1 - 0.8):
            _wheel_side(c, side, zw, 0.33, label)
    c.face([(x0, belt, near_foot), (x1, belt, near_foot), (top1, tall, near_top), (top0, tall, near_top)], color, label)
    c.face([(x0 + 0.15, belt + 0.03, near_foot), (x1 - 0.15, belt + 0.03, near_foot),
            (top1 - 0.08, tall - 0.07, near_top), (top0 + 0.08, tall - 0.07, near_top)], GLASS)  # fmt: skip
    c.face([(x0 + 0.3, belt + 0.05, near_foot), (x0 + 0.7, belt + 0.05, near_foot),
            (top0 + 0.6, tall - 0.1, near_top), (top0 + 0.35, tall - 0.1, near_top)], (110, 130, 148))  # fmt: skip
    _lamps(c, x0, x1, 0.62, z, is_oncoming)
    c.face([(x - 0.26, 0.42, z), (x + 0.26, 0.42, z), (x + 0.26, 0.54, z), (x - 0.26, 0.54, z)], (235, 235, 225))
    c.face([(x0, 0.28, z), (x1, 0.28, z), (x1, 0.36, z), (x0, 0.36, z)], (40, 40, 42))


def draw_truck(c: Canvas, rng: np.random.Generator, x: float, z: float, is_oncoming: bool) -> None:
    """A lorry: a cargo box with stripes above a dark chassis, and a cab at its front end."""
    label = class_id("truck")
    cargo = _pick(rng, ((214, 208, 196), (190, 150, 96), (120, 140, 116), (206, 180, 130)))
    cab = _pick(rng, ((200, 60, 40), (40, 80, 130), (60, 110, 70), (220, 170, 50)))
    wide, tall, long = 2.4, 3.1 + rng.uniform(0, 0.5), 7 + rng.uniform(-1.5, 1.5)
    x0, x1, z1 = x - wide / 2, x + wide / 2, z + long
    ground_shadow(c, x0, x1, z, z1)
    cab_z = (z, z + 1.9) if is_oncoming else (z1 - 1.9, z1)
    cargo_z = (z + 2.1, z1) if is_oncoming else (z, z1 - 2.1)
    parts = [(cab_z, cab, 2.5), (cargo_z, cargo, tall)]
    for (za, zb), color, top in sorted(parts, key=lambda part: -part[0][0]):
        box(c, (x0 + 0.1, x1 - 0.1), (0.4, 0.95), (za, zb), (52, 52, 56), label)
        box(c, (x0, x1), (0.95, top), (za, zb), color, label)
        side = _side(x0, x1)
        if color is cargo:
            for k in range(1, 5):
                xa = x0 + wide * k / 5
                c.face([(xa - 0.04, 1.0, za), (xa + 0.04, 1.0, za), (xa + 0.04, top, za), (xa - 0.04, top, za)],
                       shade(cargo, 0.8))  # fmt: skip
            for k in range(1, 8):
                if side is not None:
                    zk = za + (zb - za) * k / 8
                    c.face([(side, 1.0, zk), (side, top, zk), (side, top, zk + 0.1), (side, 1.0, zk + 0.1)],
                           shade(cargo, 0.6))  # fmt: skip
            c.face([(x0, 0.95, za), (x1, 0.95, za), (x1, 1.15, za), (x0, 1.15, za)], (206, 60, 40))
        elif side is not None:
            c.face([(side, 1.6, za + 0.3), (side, 2.3, za + 0.3), (side, 2.3, zb - 0.5), (side, 1.6, zb - 0.5)], GLASS)
    if is_oncoming:
        c.face([(x0 + 0.15, 1.55, z), (x1 - 0.15, 1.55, z), (x1 - 0.15, 2.35, z), (x0 + 0.15, 2.35, z)], GLASS)
        c.face([(x0 + 0.4, 1.0, z), (x1 - 0.4, 1.0, z), (x1 - 0.4, 1.35, z), (x0 + 0.4, 1.35, z)], (60, 60, 64))
    _wheels(c, x0, x1, (z + 1.0, z1 - 1.2, z1 - 2.4), z, 0.48, label)
    _lamps(c, x0, x1, 0.7, z, is_oncoming)


def _coach(
    c: Canvas,
    x: float,
    z: float,
    size: tuple[float, float, float],
    colors: tuple[Color, Color],
    label: int,
    panes: tuple[float, float, float],
) -> tuple[float, float]:
    """A long cabin with a window band; `panes` = (bottom, top, length) of a window in metres. Returns its x range."""
    wide, tall, long = size
    x0, x1, z1 = x - wide / 2, x + wide / 2, z + long
    ground_shadow(c, x0, x1, z, z1)
    box(c, (x0, x1), (0.35, tall), (z, z1), colors[0], label)
    box(c, (x0, x1), (0.35, panes[0] - 0.25), (z, z1), colors[1], label)
    side = _side(x0, x1)
    if side is not None:
        for start in np.arange(z + 0.5, z1 - panes[2] + 0.2, panes[2] + 0.25):
            end = start + panes[2]
            pane = [(side, panes[0], start), (side, panes[1], start), (side, panes[1], end), (side, panes[0], end)]
            c.face(pane, GLASS, glow=(235, 215, 150))
    return x0, x1


def draw_bus(c: Canvas, rng: np.random.Generator, x: float, z: float, is_oncoming: bool) -> None:
    """A city bus: yellow or orange, with a destination board and large windows."""
    body = _pick(rng, ((232, 178, 28), (226, 140, 30), (236, 200, 70)), 8)
    x0, x1 = _coach(c, x, z, (2.5, 3.0, 9.5), (body, shade(body, 0.82)), class_id("bus"), (1.5, 2.45, 1.3))
    c.face([(x0 + 0.15, 1.25, z), (x1 - 0.15, 1.25, z), (x1 - 0.15, 2.4, z), (x0 + 0.15, 2.4, z)], GLASS)
    c.face([(x0 + 0.3, 2.5, z), (x1 - 0.3, 2.5, z), (x1 - 0.3, 2.85, z), (x0 + 0.3, 2.85, z)], (30, 28, 26))
    c.face([(x0 + 0.7, 2.6, z), (x1 - 0.6, 2.6, z), (x1 - 0.6, 2.76, z), (x0 + 0.7, 2.76, z)], (255, 170, 40),
           glow=(255, 170, 60))  # fmt: skip
    _wheels(c, x0, x1, (z + 1.6, z + 7.4), z, 0.46, class_id("bus"))
    _lamps(c, x0, x1, 0.7, z, is_oncoming)


def draw_train(c: Canvas, rng: np.random.Generator, x: float, z: float, is_oncoming: bool) -> None:
    """A tram: white above, green or teal below, a rounded brow and a pantograph."""
    label, livery = class_id("train"), _pick(rng, ((20, 130, 105), (16, 118, 140), (40, 140, 70)), 8)
    x0, x1 = _coach(c, x, z, (2.6, 3.4, 17.0), ((236, 238, 236), livery), label, (1.45, 2.5, 1.9))
    c.face([(x0, 2.85, z), (x1, 2.85, z), (x1, 3.4, z), (x0, 3.4, z)], livery, label)
    c.face([(x0 + 0.3, 3.4, z), (x1 - 0.3, 3.4, z), (x1 - 0.6, 3.75, z + 0.4), (x0 + 0.6, 3.75, z + 0.4)],
           (150, 154, 158), label)  # fmt: skip
    c.face([(x0 + 0.2, 1.35, z), (x1 - 0.2, 1.35, z), (x1 - 0.35, 2.75, z), (x0 + 0.35, 2.75, z)], GLASS)
    c.face([(x - 0.5, 2.95, z), (x + 0.5, 2.95, z), (x + 0.5, 3.25, z), (x - 0.5, 3.25, z)], (250, 190, 60),
           glow=(255, 190, 80))  # fmt: skip
    c.face([(x0, 0.1, z), (x1, 0.1, z), (x1, 0.38, z), (x0, 0.38, z)], (48, 50, 54), label)
    _lamps(c, x0, x1, 0.75, z, is_oncoming, 0.35)


def _two_wheeler(
    c: Canvas, x: float, z: float, along: tuple[float, float], gap: float, radius: float, label: int, hub: Color
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Both wheels, far one first; returns the hubs (rear, front)."""
    dx, dz = along
    hubs = ((x - dx * gap / 2, radius, z - dz * gap / 2), (x + dx * gap / 2, radius, z + dz * gap / 2))
    for hx, hy, hz in sorted(hubs, key=lambda h: -h[2]):
        for r, color in ((radius, TYRE), (radius * 0.74, hub)):
            t = np.linspace(0, 2 * np.pi, 18, endpoint=False)
            # A wheel seen end on still shows its tread.
            tread = 0.06 + radius * 0.08
            rim = [(hx + r * np.cos(a) * dx + tread * np.sign(np.cos(a)) * abs(dz), hy + r * np.sin(a),
                    hz + r * np.cos(a) * dz) for a in t]  # fmt: skip
            c.face(rim, color, label)
    return hubs


def draw_bicycle(
    c: Canvas, rng: np.random.Generator, x: float, z: float, along: tuple[float, float], has_rider: bool
) -> None:
    """A bicycle whose travel direction is `along` (unit vector over x and z), with or without a rider."""
    label, frame = class_id("bicycle"), _pick(rng, ((200, 50, 60), (40, 120, 180), (230, 190, 50), (60, 150, 90)))
    dx, dz = along
    rear, front = _two_wheeler(c, x, z, along, 1.1, 0.38, label, (128, 122, 112))
    seat, bar = (x - dx * 0.25, 0.98, z - dz * 0.25), (x + dx * 0.42, 1.08, z + dz * 0.42)
    crank = (x - dx * 0.05, 0.36, z - dz * 0.05)
    for a, b in ((rear, crank), (crank, bar), (crank, seat), (rear, seat), (front, bar), (seat, bar)):
        c.limb(a, b, 0.11, frame, label, min_pixels=3)
    c.limb((bar[0] - 0.28 * abs(dz) - 0.05, 1.1, bar[2]), (bar[0] + 0.28 * abs(dz) + 0.05, 1.1, bar[2]), 0.07,
           TYRE, label, min_pixels=2)  # fmt: skip
    if has_rider:
        _draw_rider(c, rng, seat, bar, crank)


def draw_motorcycle(
    c: Canvas, rng: np.random.Generator, x: float, z: float, along: tuple[float, float], has_rider: bool
) -> None:
    """A motorcycle whose travel direction is `along`, with or without a rider."""
    label, paint = class_id("motorcycle"), _pick(rng, ((30, 30, 34), (170, 24, 30), (30, 50, 130), (210, 110, 20)))
    dx, dz = along
    rear, front = _two_wheeler(c, x, z, along, 1.45, 0.37, label, (74, 76, 82))
    seat, bar = (x - dx * 0.3, 0.82, z - dz * 0.3), (x + dx * 0.45, 1.12, z + dz * 0.45)
    body = (x + dx * 0.15, 0.8, z + dz * 0.15)
    c.limb(front, bar, 0.12, (140, 142, 146), label, min_pixels=2)
    c.limb((x - dx * 0.35, 0.42, z), (x + dx * 0.3, 0.42, z), 0.5, (72, 74, 78), label, min_pixels=4)
    c.disc((x, 0.6, z), 0.42, (50, 52, 56), label)
    c.limb((rear[0] - dx * 0.1, 0.78, rear[2]), (seat[0] + dx * 0.2, 0.74, seat[2]), 0.26, (34, 32, 32), label)
    c.disc(body, 0.45, paint, label, squash=0.66)
    c.disc((body[0] - 0.1, body[1] + 0.08, body[2]), 0.13, shade(paint, 1.6), squash=0.5)
    c.limb((bar[0] - 0.36 * abs(dz) - 0.05, 1.14, bar[2]), (bar[0] + 0.36 * abs(dz) + 0.05, 1.14, bar[2]), 0.08,
           TYRE, label, min_pixels=2)  # fmt: skip
    lamp = (front if dz < 0 else rear) if abs(dz) > abs(dx) else front
    glow = HEAD_GLOW if dz < 0 else TAIL_GLOW
    c.disc((lamp[0], 0.82, min(lamp[2], z)), 0.13, shade(glow, 0.95), label, glow=glow)
    if has_rider:
        _draw_rider(c, rng, seat, bar, (x, 0.4, z))


def _draw_rider(
    c: Canvas,
    rng: np.random.Generator,
    seat: tuple[float, float, float],
    bar: tuple[float, float, float],
    crank: tuple[float, float, float],
) -> None:
    """A seated person with a helmet: the class is rider."""
    label, jacket = class_id("rider"), _pick(rng, ((226, 240, 60), (250, 120, 30), (60, 220, 200), (240, 70, 120)))
    trousers = _pick(rng, TROUSERS)
    sx, sy, sz = seat
    lean = 0.35
    neck = (sx + lean * (bar[0] - sx), sy + 0.68, sz + lean * (bar[2] - sz))
    knee = ((sx + crank[0]) / 2 + 0.35 * (bar[0] - sx), (sy + crank[1]) / 2 + 0.1, crank[2])
    for offset in (-0.14, 0.14):
        spread = offset if abs(bar[0] - sx) < 0.3 else offset * 0.3
        c.limb((sx + spread, sy, sz), (knee[0] + spread * 1.4, knee[1], knee[2]), 0.2, trousers, label, min_pixels=3)
        c.limb((knee[0] + spread * 1.4, knee[1], knee[2]), (crank[0] + spread, crank[1] - 0.1, crank[2]), 0.16,
               shade(trousers, 0.9), label, min_pixels=2)  # fmt: skip
    c.limb((sx, sy - 0.05, sz), neck, 0.5, jacket, label, min_pixels=4)
    c.disc((neck[0], neck[1] - 0.1, neck[2]), 0.26, jacket, label)
    for offset in (-0.24, 0.24):
        hand = (bar[0] + offset * 0.7, bar[1] + 0.02, bar[2])
        c.limb((neck[0] + offset * 0.8, neck[1] - 0.1, neck[2]), hand, 0.14, shade(jacket, 0.82), label, min_pixels=2)
    head = (neck[0], neck[1] + 0.2, neck[2])
    c.disc(head, 0.18, _pick(rng, SKINS, 4), label)
    c.disc((head[0], head[1] + 0.06, head[2]), 0.19, _pick(rng, CLOTHES), label, squash=0.75)


def draw_person(c: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A pedestrian in mid-step, about 1.75 m tall, sometimes with a bag."""
    label, tall = class_id("person"), rng.uniform(0.92, 1.06)
    shirt, trousers, skin = _pick(rng, CLOTHES), _pick(rng, TROUSERS), _pick(rng, SKINS, 4)
    stride, swing = rng.uniform(-0.28, 0.28), rng.uniform(-0.2, 0.2)
    ground_shadow(c, x - 0.25, x + 0.25, z - 0.1, z + 0.35, 0.02)
    hip, neck = 0.92 * tall, 1.46 * tall
    for s, tone in ((-1, 0.85), (1, 1.0)):
        foot = x + s * stride
        c.limb((x + s * 0.09, hip, z), (foot, 0.06, z), 0.19, shade(trousers, tone), label, min_pixels=3)
        c.limb((foot - 0.08, 0.05, z), (foot + 0.14, 0.05, z), 0.1, (40, 34, 32), label, min_pixels=2)
    c.limb((x, hip - 0.06, z), (x, neck, z), 0.44, shirt, label, min_pixels=4)
    c.disc((x, neck - 0.12, z), 0.25, shirt, label, squash=0.6)
    for s, tone in ((-1, 0.75), (1, 0.88)):
        hand = (x + s * 0.3 + swing, hip - 0.02, z)
        c.limb((x + s * 0.23, neck - 0.08, z), hand, 0.14, shade(shirt, tone), label, min_pixels=2)
        c.disc(hand, 0.07, skin, label)
    c.limb((x, neck - 0.05, z), (x, neck + 0.12, z), 0.13, skin, label)
    c.disc((x, neck + 0.19 * tall, z), 0.15, skin, label, squash=1.2)
    c.disc((x, neck + 0.27 * tall, z), 0.155, vary(rng, (60, 44, 34), 16), label, squash=0.7)
    if rng.random() < 0.4:
        side = rng.choice((-1, 1))
        c.disc((x + side * 0.33, hip + 0.05, z), 0.16, _pick(rng, CLOTHES), label, squash=1.2)
