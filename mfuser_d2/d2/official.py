"""The authors' MFuser checkpoints for the model that a config builds, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

import mfuser_d2.d2.backbone
import mfuser_d2.d2.head
import mfuser_d2.d2.meta_arch  # noqa: F401  (these three register what a config names)
import mfuser_d2.data  # noqa: F401  (registers the data sets, whose classes become the queries)
from mfuser_d2.core.official import to_official, unwrap_official
from mfuser_d2.core.official_sizes import check_complete, convert_checked, model_variant


def convert_official(state_dict: Mapping[str, Any], cfg: CfgNode) -> dict[str, Tensor]:
    """An authors' checkpoint as the whole state dict of the model that `cfg` builds, frozen encoders included.

    The tensors are the given ones wherever nothing but a name changes; none is rounded or resized.

    Args:
        state_dict: what the authors' file holds: mmcv's wrapper with its "state_dict", or that alone; with or without
            `module.` before every key.
        cfg: names variant, sizes and data sets; its encoder weights are not read.
    Raises:
        ValueError: the checkpoint is no MFuser of the release, is of another variant or size (the message says which
            config keys differ and how), or has keys that are unknown, missing or of another shape.
    """
    return convert_checked(unwrap_official(state_dict), empty_model_state(cfg))


def revert_official(state_dict: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """The other direction: a whole state dict of ours under the release's names, bit by bit what came from there.

    Keys that carry nothing (see `core.official.EMPTY_KEYS`) are not made up.

    Args:
        state_dict: all entries of the model, frozen encoders included.
        cfg: of the model.
    Raises:
        ValueError: entries are missing, unknown or of another shape, or the model has parts the release does not know.
    """
    wanted = empty_model_state(cfg)
    check_complete(state_dict, wanted)
    return to_official({key: state_dict[key] for key in wanted}, model_variant(wanted))


def empty_model_state(cfg: CfgNode) -> dict[str, Tensor]:
    """Names and shapes of the state dict of the model that `cfg` builds; takes no memory and reads no weights."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.MFUSER.VFM.WEIGHTS = cfg.MODEL.MFUSER.VLM.WEIGHTS = ""
    with torch.device("meta"):
        return build_model(cfg).state_dict()
