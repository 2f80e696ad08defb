"""Evaluation: confusion counts, the Detectron2 evaluator, the table over targets, the report.

Importing this package needs no Detectron2; `DGSSEvaluator` and `build_evaluator` bring it in when they are used.
"""

from typing import TYPE_CHECKING, Any

from .config import add_evaluation_config
from .confusion import (
    ABSENT_CLASS_MODES,
    ConfusionMatrix,
    count_confusion,
    iou_per_class,
    score_confusion,
    sum_counts,
    target_mean,
)
from .protocol import describe_protocol, file_sha256, library_versions
from .recorder import TargetRecorder
from .table import ResultTable, summarize

if TYPE_CHECKING:
    from .sem_seg_evaluator import DGSSEvaluator, build_evaluator

__all__ = [
    "ABSENT_CLASS_MODES",
    "ConfusionMatrix",
    "DGSSEvaluator",
    "ResultTable",
    "TargetRecorder",
    "add_evaluation_config",
    "build_evaluator",
    "count_confusion",
    "describe_protocol",
    "file_sha256",
    "iou_per_class",
    "library_versions",
    "score_confusion",
    "sum_counts",
    "summarize",
    "target_mean",
]


def __getattr__(name: str) -> Any:
    if name in ("DGSSEvaluator", "build_evaluator"):
        from . import sem_seg_evaluator

        return getattr(sem_seg_evaluator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
