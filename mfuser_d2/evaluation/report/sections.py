"""Parts of the report that show one run: headline, table, confusion, images, training curves, protocol."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from mfuser_d2.data.labels import CLASSES, COLORS

from ..table import flatten_protocol, short_name
from .charts import Series, confusion_chart, line_chart
from .pictures import Pictures, embed_pictures
from .run import Run, Target

_MAX_CLASSES_IN_CONFUSION = 64
_OVERALL = ("mIoU", "mIoU-16", "mIoU-13", "fwIoU", "mACC", "pACC")


def headline(run: Run) -> str:
    """Show the mean over targets and each target's mIoU as large numbers."""
    tiles = [("mean over targets", run.mean.get("mIoU", math.nan), "tile main")]
    for target in run.targets:
        kind = "tile source" if target.name in run.sources else "tile"
        label = short_name(target.name) + (" (source)" if target.name in run.sources else "")
        tiles.append((label, run.scores(target.name).get("mIoU", math.nan), kind))
    cells = "".join(
        f'<li class="{kind}"><b>{percent(value)}</b><span>{escape(label)}</span></li>' for label, value, kind in tiles
    )
    return f'<ul class="tiles" aria-label="mIoU in percent">{cells}</ul>'


def result_table(run: Run) -> str:
    """Show the class x target table with a bar in each cell."""
    names = [target.name for target in run.targets]
    heads = [short_name(name) + (" (source)" if name in run.sources else "") for name in names] + ["mean"]
    columns = [*(run.scores(name) for name in names), run.mean]
    colors = class_colors(run)
    rows = []
    for name, color in zip(run.classes, colors, strict=True):
        cells = "".join(bar_cell(scores.get(f"IoU-{name}", math.nan)) for scores in columns)
        rows.append(f'<tr><th scope="row">{swatch(color)}{escape(name)}</th>{cells}</tr>')
    total = []
    for key in _OVERALL:
        if key in run.mean:
            cells = "".join(f"<td>{percent(scores.get(key, math.nan))}</td>" for scores in columns)
            total.append(f'<tr><th scope="row">{escape(key)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in heads)
    return scrolling(
        f'<table class="bars"><thead><tr><th scope="col">IoU (%)</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{''.join(total)}</tfoot></table>",
        "IoU per class and target",
    )


def confusion_section(run: Run) -> str:
    """Show each target's confusion matrix and its most frequent confusions, folded except the first."""
    parts = []
    for target in run.targets:
        counts = target.counts
        if counts is None:
            parts.append(missing(f"{short_name(target.name)}: no confusion.json beside the results."))
            continue
        body = worst_confusions(counts, run.classes)
        if len(run.classes) <= _MAX_CLASSES_IN_CONFUSION:
            title = f"confusion on {short_name(target.name)}, percent of each true class's pixels"
            body = confusion_chart(counts, run.classes, title=title) + body
        note = "Row: true class. Column: predicted class. Percent of the true class's pixels."
        parts.append(foldable(run, target, f'<p class="note">{note}</p><div class="beside">{body}</div>'))
    return "".join(parts)


def foldable(run: Run, target: Target, body: str) -> str:
    """Fold a target's part of a section; the first unseen target stands open."""
    unseen = [other.name for other in run.targets if other.name not in run.sources]
    is_open = " open" if target.name == (unseen or [run.targets[0].name])[0] else ""
    return f"<details{is_open}><summary>{escape(short_name(target.name))}</summary>{body}</details>"


def worst_confusions(counts: np.ndarray, class_names: Sequence[str], *, count: int = 12) -> str:
    """List the off-diagonal cells with the largest share of their true class."""
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(100.0 * counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    np.fill_diagonal(share, 0)
    rows = []
    for index in np.argsort(share, axis=None)[::-1][:count]:
        truth, predicted = np.unravel_index(index, share.shape)
        if share[truth, predicted] > 0:
            rows.append(
                f"<tr><td>{escape(class_names[truth])}</td><td>{escape(class_names[predicted])}</td>"
                f"<td>{share[truth, predicted]:.1f}</td></tr>"
            )
    if not rows:
        return ""
    head = "<tr><th scope=col>truth</th><th scope=col>taken for</th><th scope=col>% of truth</th></tr>"
    return f'<table class="plain">{head}{"".join(rows)}</table>'


def image_section(run: Run, *, num_images: int, max_width: int) -> str:
    """Show the worst and best images of each target."""
    if not num_images:
        return ""
    parts = [_target_images(run, target, num_images, max_width) for target in run.targets]
    parts = [foldable(run, target, body) for target, body in zip(run.targets, parts, strict=True)]
    legend = "".join(
        f"<li>{swatch(color)}{escape(name)}</li>" for name, color in zip(run.classes, class_colors(run), strict=True)
    )
    return f'{"".join(parts)}<ul class="legend classes">{legend}</ul>'


def _target_images(run: Run, target: Target, num_images: int, max_width: int) -> str:
    if not target.images:
        return missing(
            "No images were recorded. Evaluate with <code>TEST.MFUSER.SAVE_PER_IMAGE True "
            "TEST.MFUSER.SAVE_PREDICTIONS True</code> to see the best and worst ones here.",
            is_html=True,
        )
    worst = target.images[:num_images]
    best = [record for record in reversed(target.images[-num_images:]) if record not in worst]
    colors = class_colors(run)
    ignore_label = (target.confusion or {}).get("ignore_label", 255)
    body = ""
    for title, records in (("Best", best), ("Worst", worst)):
        cards = []
        for record in records:
            drawn = embed_pictures(record, target.folder, colors, ignore_label=ignore_label, max_width=max_width)
            cards.append(_card(record, drawn))
        if cards:
            body += f'<h5>{title}</h5><div class="cards">{"".join(cards)}</div>'
    return body


def _card(record: Mapping, pictures: Pictures | None) -> str:
    name = record["image"].replace("\\", "/").rsplit("/", 1)[-1]
    caption = f"<figcaption><b>{record['mIoU']:.1f}</b> mIoU · {escape(name)}</figcaption>"
    if pictures is None:
        return f'<figure class="card">{caption}{missing("Its files or its prediction are missing.")}</figure>'
    height, width = pictures.size
    layers = ";".join(
        f"--{key}:url({uri})"
        for key, uri in (
            ("photo", pictures.image),
            ("truth", pictures.truth),
            ("prediction", pictures.prediction),
            ("errors", pictures.errors),
        )
    )
    panels = "".join(
        f'<button type="button" class="panel {kind}" data-view="{kind}" aria-label="{kind} of {escape(name)}, enlarge">'
        f"<span>{kind}</span></button>"
        for kind in ("image", "truth", "prediction", "errors")
    )
    return (
        f'<figure class="card" style="--ratio:{width}/{height};{layers}" data-size="{width}x{height}">{caption}'
        f'<div class="panels">{panels}</div></figure>'
    )


def training_section(run: Run) -> str:
    """Show losses, learning rate and mIoU over the iterations of metrics.json."""
    if not run.metrics:
        return missing("No metrics.json beside the results: this run was evaluated only.")
    keys = dict.fromkeys(key for line in run.metrics for key in line)
    losses = [key for key in ("total_loss", "loss_align", "loss_cls", "loss_mask", "loss_dice") if key in keys]
    scores = [key for key in keys if key == "mean/mIoU" or key.endswith("sem_seg/mIoU")]
    labels = {key: short_name(key.removesuffix("/mIoU").removesuffix("/sem_seg")) for key in scores}
    charts = [
        line_chart([Series(key, run.series(key)) for key in losses], title="loss"),
        line_chart([Series(labels[key], run.series(key)) for key in scores], title="mIoU", unit="%"),
        line_chart([Series("lr", run.series("lr"))], title="learning rate"),
    ]
    body = "".join(charts)
    return f'<div class="charts">{body}</div>' if body else missing("metrics.json holds nothing to draw.")


def protocol_section(run: Run) -> str:
    """Show everything the numbers depend on."""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in flatten_protocol(run.protocol)
        if value
    )
    return scrolling(f'<table class="plain">{rows}</table>', "protocol")


def class_colors(run: Run) -> list[tuple[int, int, int]]:
    """Give each class's RGB: the data set's own, the Cityscapes one for a Cityscapes name, else a hue per index."""
    for target in run.targets:
        stored = (target.confusion or {}).get("colors")
        if stored and len(stored) >= len(run.classes):
            return [tuple(color) for color in stored[: len(run.classes)]]
    known = dict(zip(CLASSES, COLORS, strict=True))
    return [known.get(name) or _spread_color(index) for index, name in enumerate(run.classes)]


def _spread_color(index: int) -> tuple[int, int, int]:
    """Give a colour of its own to an index: the golden angle keeps neighbours apart."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(index * 0.61803 % 1.0, 0.55 + 0.15 * (index % 3), 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def swatch(color: Iterable[int]) -> str:
    return f'<i class="swatch" style="background:rgb({",".join(str(int(value)) for value in color)})"></i>'


def bar_cell(value: float) -> str:
    if math.isnan(value):
        return "<td>–</td>"
    return f'<td class="bar" style="--value:{value:.2f}">{value:.2f}</td>'


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def scrolling(content: str, label: str) -> str:
    """Let wide content scroll sideways on its own, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def missing(text: str, *, is_html: bool = False) -> str:
    return f'<p class="missing">{text if is_html else escape(text)}</p>'
