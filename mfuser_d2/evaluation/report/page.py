"""The whole page, and writing it."""

import logging
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .comparison import comparison_section
from .run import Run, load_run
from .script import SCRIPT
from .sections import (
    confusion_section,
    headline,
    image_section,
    protocol_section,
    result_table,
    training_section,
)
from .style import STYLE

logger = logging.getLogger(__name__)

# The page may load nothing at all: what it shows is inside it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    num_images: int = 4,
    max_width: int = 800,
) -> Path:
    """Write one self-contained HTML page over one or several evaluations.

    Args:
        paths: run folders or results.json files; with several, the others are compared with the first.
        output: the page; by default report.html in the first run's folder.
        names: what the page calls the runs; by default their folders' names.
        num_images: how many best and how many worst images of each target; 0 leaves the images out.
        max_width: width in pixels that images are shrunk to.
    Returns:
        Where the page was written.
    Raises:
        ValueError: no run is given, a run holds no evaluation, or the names do not match the runs.
    """
    if not paths:
        raise ValueError("no run to report on; give at least one OUTPUT_DIR")
    if names is not None and len(names) != len(paths):
        raise ValueError(f"{len(names)} names for {len(paths)} runs; give one each")
    runs = [load_run(path, name=names[index] if names else None) for index, path in enumerate(paths)]
    target = Path(output) if output else runs[0].folder / "report.html"
    text = render_page(distinct_names(runs), num_images=num_images, max_width=max_width)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(target)
    logger.info("report of %d run(s): %s, %.1f MB", len(runs), target, len(text) / 1e6)
    return target


def distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Give runs of the same name different ones, so that the page can tell them apart."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    renamed = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        renamed.append(run if seen[run.name] == 1 else replace(run, name=f"{run.name} ({seen[run.name]})"))
    return renamed


def render_page(runs: Sequence[Run], *, num_images: int = 4, max_width: int = 800) -> str:
    """Give the page's HTML; see `write_report`."""
    title = " · ".join(run.name for run in runs)
    panes = [(run.name, _run_pane(run, num_images, max_width)) for run in runs]
    if len(runs) > 1:
        panes.insert(0, ("Comparison", f"<h2>Comparison with {escape(runs[0].name)}</h2>" + comparison_section(runs)))
    tabs = ""
    if len(panes) > 1:
        buttons = "".join(
            f'<button role="tab" type="button" id="tab-{index}" aria-controls="pane-{index}" '
            f'aria-selected="{str(index == 0).lower()}" tabindex="{0 if index == 0 else -1}">{escape(name)}</button>'
            for index, (name, _) in enumerate(panes)
        )
        tabs = f'<div class="tabs" role="tablist" aria-label="runs">{buttons}</div>'
    role = 'role="tabpanel" ' if tabs else ""
    body = "".join(
        f'<article {role}id="pane-{index}" aria-label="{escape(name)}">{content}</article>'
        for index, (name, content) in enumerate(panes)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)} – mfuser_d2 evaluation</title><style>{STYLE}</style></head>"
        f'<body><header><p class="kicker">mfuser_d2 evaluation</p><h1>{escape(title)}</h1>{tabs}</header>'
        f"<main>{body}</main>{_VIEWER}<script>{SCRIPT}</script></body></html>\n"
    )


def _run_pane(run: Run, num_images: int, max_width: int) -> str:
    sections = [
        ("table", "Results", headline(run) + result_table(run)),
        ("confusion", "Confusion", confusion_section(run)),
        ("images", "Best and worst images", image_section(run, num_images=num_images, max_width=max_width)),
        ("training", "Training", training_section(run)),
        ("protocol", "Protocol", protocol_section(run)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    prefix = "".join(character if character.isalnum() else "-" for character in run.name)
    links = "".join(f'<a href="#{prefix}-{key}">{title}</a>' for key, title, _ in shown)
    parts = "".join(f'<section id="{prefix}-{key}"><h3>{title}</h3>{body}</section>' for key, title, body in shown)
    return f'<h2>{escape(run.name)}</h2><nav aria-label="sections">{links}</nav>{parts}'


_VIEWER = """
<dialog class="viewer" aria-label="image viewer">
<form method="dialog"><b class="caption"></b><button class="close" aria-label="close">✕</button></form>
<div class="stage" data-view="slider"><div class="layer photo"></div><div class="layer truth"></div>
<div class="layer prediction"></div><div class="layer errors"></div><div class="divider"></div></div>
<p class="reading" aria-live="polite">&nbsp;</p>
<div class="controls">
<label class="slide"><span>truth</span><input type="range" class="cut" min="0" max="100" value="50" step="1"
aria-label="slide between truth and prediction"><span>prediction</span></label>
<div class="views" role="group" aria-label="view"><button type="button" data-view="slider">slider</button>
<button type="button" data-view="image">image</button><button type="button" data-view="truth">truth</button>
<button type="button" data-view="prediction">prediction</button>
<button type="button" data-view="errors">errors</button></div>
<label class="blend">labels <input type="range" class="opacity" min="0" max="100" value="85" step="5"
aria-label="opacity of the labels"></label>
<div class="turn"><button type="button" class="previous">◀ previous</button>
<button type="button" class="next">next ▶</button></div>
</div>
<p class="keys">Keys: ← → move the slider · 1–5 view · N / P next and previous image · Esc close</p>
</dialog>
"""
