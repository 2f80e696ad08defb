"""Colours for class names, known and new."""

import colorsys
from collections.abc import Mapping, Sequence

from mfuser_d2.data.labels import CLASSES, COLORS

Color = tuple[int, int, int]

CITYSCAPES_COLORS: Mapping[str, Color] = dict(zip(CLASSES, COLORS, strict=True))
_GOLDEN_TURN = 0.6180339887498949


def colors_of(names: Sequence[str], known: Mapping[str, Color] = CITYSCAPES_COLORS) -> list[Color]:
    """Give every class an RGB colour of its own: known names theirs, others bright ones that no other name has.

    Args:
        names: distinct class names.
        known: colours by name.
    """
    used = {tuple(known[name]) for name in names if name in known}
    colors, step = [], 0
    for name in names:
        if name in known:
            colors.append(tuple(known[name]))
            continue
        while True:
            # Turning by the golden ratio keeps neighbours apart; lightness and saturation change as the circle fills.
            hue = (0.11 + step * _GOLDEN_TURN) % 1
            light, full = (0.55, 0.42, 0.68)[step // 7 % 3], (0.95, 0.6)[step // 21 % 2]
            color = tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, light, full))
            step += 1
            if color not in used:
                break
        used.add(color)
        colors.append(color)
    return colors
