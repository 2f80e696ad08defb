"""The evaluation report: one self-contained HTML page over one or several runs."""

from .page import render_page, write_report
from .run import Run, Target, load_run

__all__ = ["Run", "Target", "load_run", "render_page", "write_report"]
