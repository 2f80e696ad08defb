"""SVG charts."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from mfuser_d2.evaluation.report.charts import Series, confusion_chart, line_chart, nice_ticks


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 100.0), (14.9, 54.2), (1e-6, 1e-4), (-3.0, 7.0), (5.0, 5.0), (0.0, 0.0), (0.1, 123456.0)]
)
def test_ticks_cover_the_range_evenly_and_are_few(low, high) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)


def _svg(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", html, re.DOTALL).group(0))


def test_lines_are_inside_the_picture_and_keep_their_values() -> None:
    chart = line_chart(
        [Series("total_loss", [(0, 10.0), (50, 5.0), (100, 1.0)]), Series("a <b>", [(0, 0.5), (100, 2.0)])],
        title="loss & co",
    )
    lines = _svg(chart).findall(".//polyline")
    assert len(lines) == 2
    points = [tuple(map(float, pair.split(","))) for pair in lines[0].get("points").split()]
    assert all(0 <= x <= 720 and 0 <= y <= 280 for x, y in points)
    assert points[0][0] < points[1][0] < points[2][0] and points[0][1] < points[1][1] < points[2][1]
    stored = re.search(r'data-chart="([^"]*)"', chart).group(1).replace("&quot;", '"').replace("&lt;", "<")
    assert [point[:2] for point in json.loads(stored.replace("&gt;", ">"))[0]["points"]] == [[0, 10], [50, 5], [100, 1]]
    assert "a &lt;b&gt;" in chart and "loss &amp; co" in chart and "a <b>" not in chart


def test_long_series_are_thinned_to_their_last_point() -> None:
    chart = line_chart([Series("x", [(i, float(i)) for i in range(20001)])], title="long")
    points = _svg(chart).find(".//polyline").get("points").split()
    assert len(points) <= 402
    assert float(points[-1].split(",")[0]) == 706.0


def test_single_points_are_dots_and_nothing_gives_nothing() -> None:
    assert _svg(line_chart([Series("one", [(3, 4.0)])], title="t")).find(".//circle") is not None
    assert line_chart([Series("none", [])], title="t") == ""


def test_confusion_shows_shares_of_each_row() -> None:
    counts = np.array([[3, 1, 0], [0, 8, 0], [0, 0, 0]])
    chart = confusion_chart(counts, ["road", "sky & sea", "car"], title="t")
    svg = _svg(chart)
    cells = {
        rect.findtext("title"): rect.get("style") for rect in svg.findall(".//rect") if rect.find("title") is not None
    }
    assert len(cells) == 6
    assert cells["road → road: 75.0 %"] == "--share:0.750"
    assert cells["road → sky & sea: 25.0 %"] == "--share:0.250"
    assert len([rect for rect in svg.findall(".//rect") if rect.get("class") == "absent"]) == 1
