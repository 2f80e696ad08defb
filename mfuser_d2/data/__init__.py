"""Data sets: labels, registration, augmentation, mappers, samplers, loaders.

Importing this package registers all data sets with Detectron2 where that can be imported. `labels`, `layouts`,
`streets`, `reading`, `augmentation`, `sampler`, `statistics`, `plain` and `prepare` need only numpy, OpenCV and
PyTorch, and work without it.
"""

import importlib.util
import logging
from typing import Any

_LOADERS = ("build_train_loader", "build_test_loader")
_problem: ImportError | None = None

if importlib.util.find_spec("detectron2") is not None:
    try:
        from mfuser_d2.data import registration as registration
        from mfuser_d2.data.build import build_test_loader as build_test_loader
        from mfuser_d2.data.build import build_train_loader as build_train_loader
    except ImportError as error:  # installed for another torch, for instance; labels and streets still work
        _problem = error
        logging.getLogger(__name__).warning("Detectron2 cannot be imported (%s); no data set is registered", error)


def __getattr__(name: str) -> Any:
    if name in _LOADERS:
        reason = f"importing it failed: {_problem}" if _problem else "it is not installed"
        raise RuntimeError(
            f"mfuser_d2.data.{name} needs Detectron2, but {reason}; `bash tools/quickstart.sh` brings it"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
