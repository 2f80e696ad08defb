"""Detectron2 glue: importing it registers backbone, head, meta-architecture and data sets."""

import mfuser_d2.data  # noqa: F401  (registers the data sets)
from mfuser_d2.d2.backbone import MFuserBackbone
from mfuser_d2.d2.checkpoint import MFuserCheckpointer
from mfuser_d2.d2.config import add_mfuser_config, load_config
from mfuser_d2.d2.head import MFuserHead
from mfuser_d2.d2.meta_arch import MFuser
from mfuser_d2.d2.run import one_line_errors, set_up_run
from mfuser_d2.d2.trainer import MFuserTrainer
from mfuser_d2.d2.validation import validate_config

__all__ = [
    "MFuser",
    "MFuserBackbone",
    "MFuserCheckpointer",
    "MFuserHead",
    "MFuserTrainer",
    "add_mfuser_config",
    "load_config",
    "one_line_errors",
    "set_up_run",
    "validate_config",
]
