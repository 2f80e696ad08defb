"""MFuser (Zhang & Tan, CVPR 2025) for domain-generalised semantic segmentation, as a Detectron2 project plugin.

Importing this package needs neither Detectron2 nor any encoder library: `mfuser_d2.core` is plain PyTorch, and only
`mfuser_d2.d2`, `mfuser_d2.data` and `mfuser_d2.evaluation` reach for Detectron2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__version__ = "0.1.0"

DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
DETECTRON2_COMMAND = (
    f"pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git@{DETECTRON2_COMMIT}'"
)


def require_detectron2() -> None:
    """Return if Detectron2 can be imported.

    Raises:
        RuntimeError: it cannot; the message holds the command that installs it against the installed torch.
    """
    try:
        import detectron2.layers  # noqa: F401  (its compiled part is where a broken build shows)
    except ImportError as error:
        raise RuntimeError(
            f"Detectron2 cannot be imported ({error}). It is not on PyPI; build it against the torch you have:\n"
            f"    {DETECTRON2_COMMAND}\n"
            "Without it, `python tools/plain_train.py` trains the same network in a plain PyTorch loop."
        ) from error


def add_mfuser_config(cfg: CfgNode) -> None:
    """Declare every config key of MFuser on a Detectron2 config, with its default; see `mfuser_d2.d2.config`.

    Raises:
        RuntimeError: Detectron2 is not installed.
    """
    require_detectron2()
    from mfuser_d2.d2.config import add_mfuser_config as declare

    declare(cfg)


def __getattr__(name: str) -> Any:
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_detectron2()
    from mfuser_d2.predictor import Predictor

    return Predictor
