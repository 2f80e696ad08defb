"""Colours of known and new classes."""

from mfuser_d2.data.labels import CLASSES, COLORS
from mfuser_d2.visualization.class_colors import colors_of


def test_known_names_keep_their_colors():
    assert colors_of(CLASSES) == list(COLORS)


def test_new_names_get_colors_of_their_own_in_any_company():
    names = [*CLASSES[:5], *(f"thing {i}" for i in range(295))]
    colors = colors_of(names)
    assert len(set(colors)) == 300 and colors[:5] == list(COLORS[:5])
    assert all(0 <= part <= 255 for color in colors for part in color)
    assert colors_of(["tractor", "car"])[0] == colors_of(["tractor"])[0]
