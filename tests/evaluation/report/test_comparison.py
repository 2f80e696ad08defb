"""Several runs against the first."""

import re

from mfuser_d2.evaluation.report.comparison import comparison_section, protocol_differences
from mfuser_d2.evaluation.report.run import load_run

NIGHT = "streets_night_sem_seg_val"


def _cells(section: str, label: str) -> list[str]:
    row = re.search(rf'<tr><th scope="row">{label}</th>(.*?)</tr>', section).group(1)
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_differences_are_those_of_the_results(make_run) -> None:
    runs = [load_run(make_run("a", noise=0.2)), load_run(make_run("b", noise=0.6)), load_run(make_run("c", noise=0.1))]
    section = comparison_section(runs)
    cells = _cells(section, "streets_night_val")
    values = [run.scores(NIGHT)["mIoU"] for run in runs]
    assert cells[0::2] == [f"{values[0]:.2f}", f"{values[1] - values[0]:+.2f}", f"{values[2] - values[0]:+.2f}"]
    assert values[1] < values[0] < values[2]
    assert 'class="worse">-' in section and 'class="better">+' in section
    means = _cells(section, "<b>mean over targets</b>")
    assert means[0] == f"{runs[0].mean['mIoU']:.2f}"


def test_same_protocols_are_called_the_same(make_run) -> None:
    runs = [load_run(make_run("a")), load_run(make_run("b", noise=0.6))]
    assert protocol_differences(runs) == []
    assert "same protocol" in comparison_section(runs)


def test_what_makes_runs_incomparable_is_said(make_run) -> None:
    runs = [load_run(make_run("a")), load_run(make_run("b", stride=256))]
    assert protocol_differences(runs) == [("inference.stride", ["341, 341", "256, 256"])]
    assert "not measured alike" in comparison_section(runs)


def test_different_targets_are_said(make_run) -> None:
    runs = [load_run(make_run("a")), load_run(make_run("b"))]
    runs[1].targets.pop()
    assert protocol_differences(runs)[-1][0] == "targets in the mean"


def test_equal_runs_differ_by_zero_without_sign(make_run) -> None:
    runs = [load_run(make_run("a")), load_run(make_run("b"))]
    assert _cells(comparison_section(runs), "streets_night_val")[2] == "0.00"
