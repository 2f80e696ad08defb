"""The part of the report that sets several runs against the first one."""

import math
from collections.abc import Sequence
from html import escape

from ..table import flatten_protocol, short_name
from .charts import Series, line_chart
from .run import Run
from .sections import bar_cell, class_colors, percent, scrolling, swatch

# Where runs may differ without the numbers becoming incomparable.
_FREE_KEYS = ("weights.", "versions.", "mean_over", "classes_counted.", "train_datasets")


def comparison_section(runs: Sequence[Run]) -> str:
    """Show mIoU per target and IoU per class of all runs, with differences to the first."""
    return (
        _protocol_warning(runs)
        + "<h4>mIoU per target</h4>"
        + _target_table(runs)
        + "<h4>IoU per class, mean over targets</h4>"
        + _class_table(runs)
        + _curves(runs)
    )


def protocol_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Give (key, value per run) of what the runs' protocols say differently and what may move the numbers."""
    flat = [dict(flatten_protocol(run.protocol)) for run in runs]
    keys = dict.fromkeys(key for protocol in flat for key in protocol)
    found = []
    for key in keys:
        values = [protocol.get(key, "unstated") for protocol in flat]
        if len(set(values)) > 1 and not key.startswith(_FREE_KEYS):
            found.append((key, values))
    targets = [
        ", ".join(sorted(target.name for target in run.targets if target.name not in run.sources)) for run in runs
    ]
    if len(set(targets)) > 1:
        found.append(("targets in the mean", targets))
    return found


def _protocol_warning(runs: Sequence[Run]) -> str:
    differences = protocol_differences(runs)
    if not differences:
        return '<p class="note">All runs state the same protocol (weights and versions aside).</p>'
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for key, values in differences
    )
    return (
        '<div class="warning" role="note"><p><b>These runs were not measured alike.</b> Their numbers can differ for '
        "these reasons alone:</p>"
        + scrolling(f'<table class="plain"><tr><td></td>{head}</tr>{rows}</table>', "protocol differences")
        + "</div>"
    )


def _target_table(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(target.name for run in runs for target in run.targets)
    rows = []
    for name in names:
        is_source = any(name in run.sources for run in runs)
        label = short_name(name) + (" (source)" if is_source else "")
        rows.append((escape(label), [run.scores(name).get("mIoU", math.nan) for run in runs]))
    rows.append(("<b>mean over targets</b>", [run.mean.get("mIoU", math.nan) for run in runs]))
    return _difference_table(runs, rows, "mIoU per target")


def _class_table(runs: Sequence[Run]) -> str:
    classes = dict.fromkeys(name for run in runs for name in run.classes)
    colors = {name: color for run in reversed(runs) for name, color in zip(run.classes, class_colors(run), strict=True)}
    rows = [
        (swatch(colors[name]) + escape(name), [run.mean.get(f"IoU-{name}", math.nan) for run in runs])
        for name in classes
    ]
    return _difference_table(runs, rows, "IoU per class")


def _difference_table(runs: Sequence[Run], rows: Sequence[tuple[str, Sequence[float]]], label: str) -> str:
    """Draw rows of (label as HTML, value per run) with the difference to the first run beside each other value."""
    head = f'<th scope="col">{escape(runs[0].name)}</th>'
    head += "".join(f'<th scope="col">{escape(run.name)}</th><th scope="col">difference</th>' for run in runs[1:])
    body = []
    for name, values in rows:
        cells = bar_cell(values[0])
        cells += "".join(bar_cell(value) + _difference_cell(value - values[0]) for value in values[1:])
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return scrolling(
        f'<table class="bars"><thead><tr><th scope="col">%</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>",
        label,
    )


def _difference_cell(value: float) -> str:
    if math.isnan(value):
        return "<td>–</td>"
    kind = "same" if abs(value) < 0.005 else "better" if value > 0 else "worse"
    sign = "+" if value > 0 and kind != "same" else ""
    return f'<td class="{kind}">{sign}{percent(value if kind != "same" else 0.0)}</td>'


def _curves(runs: Sequence[Run]) -> str:
    charts = [
        line_chart([Series(run.name, run.series("total_loss")) for run in runs], title="total loss"),
        line_chart([Series(run.name, run.series("mean/mIoU")) for run in runs], title="mean mIoU", unit="%"),
    ]
    body = "".join(charts)
    return f'<h4>Training</h4><div class="charts">{body}</div>' if body else ""
