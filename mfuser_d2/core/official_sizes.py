"""Whether an authors' checkpoint and a model are of one build: variant, sizes, every key and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mfuser_d2.core.official import VARIANTS, from_official, recognize_variant, split_empty, to_official

_ENCODER, _HEAD = "backbone.encoder.", "sem_seg_head."
_PIXEL, _DECODER = _HEAD + "pixel_decoder.", _HEAD + "transformer_decoder."
_PROMPT, _REFINER = _HEAD + "text_encoder.prompt", _HEAD + "text_refiner."


@dataclass(frozen=True)
class Size:
    """A number that the shapes of a state dict tell, and the config key that sets it.

    Attributes:
        config_key: what to change.
        key: pattern of the tensors that tell.
        axis: length of this axis of the first tensor that fits; None counts the different numbers in the pattern.
    """

    config_key: str
    key: str
    axis: int | None = None

    def read(self, state: Mapping[str, Tensor]) -> int:
        """The number; 0 where nothing tells."""
        matches = [(re.fullmatch(self.key, name), value) for name, value in state.items()]
        found = [(match, value) for match, value in matches if match]
        if self.axis is None:
            return len({match[1] for match, _ in found})
        return found[0][1].shape[self.axis] if found else 0


_VLM_POSITIONS = _ENCODER + r"vlm\.model\.(?:pos_embed|positional_embedding)"

SIZES = (
    Size("MODEL.SEM_SEG_HEAD.NUM_CLASSES", _DECODER + "query_embed.weight", 0),
    Size("MODEL.MFUSER.PROMPT_LENGTH", _PROMPT, 1),
    Size("MODEL.MFUSER.VFM.NAME (blocks)", _ENCODER + r"vfm\.model\.blocks\.(\d+)\..*"),
    Size("MODEL.MFUSER.VFM.NAME (width)", _ENCODER + r"vfm\.model\.cls_token", 2),
    Size("MODEL.MFUSER.VLM.NAME (blocks)", _ENCODER + r"vlm\.model\.(?:transformer\.res)?blocks\.(\d+)\..*"),
    Size("MODEL.MFUSER.VLM.NAME (width)", _ENCODER + r"vlm\.model\.(?:conv1|patch_embed\.proj)\.weight", 0),
    Size("MODEL.MFUSER.VLM.NAME (width of the texts)", _PROMPT, 2),
    Size("MODEL.MFUSER.VLM.NAME (joint width)", _REFINER + "gamma", 0),
    Size("MODEL.MFUSER.PATCH_SIZE (vfm)", _ENCODER + r"vfm\.model\.patch_embed\.proj\.weight", 2),
    Size("MODEL.MFUSER.PATCH_SIZE (vlm)", _ENCODER + r"vlm\.model\.(?:conv1|patch_embed\.proj)\.weight", 2),
    Size("MODEL.MFUSER.IMAGE_SIZE (vfm positions)", _ENCODER + r"vfm\.model\.pos_embed", -2),
    Size("MODEL.MFUSER.IMAGE_SIZE (vlm positions)", _VLM_POSITIONS, -2),
    Size("MODEL.MFUSER.ADAPTER.STATE_DIM", _ENCODER + r"adapters\.\d+\.block\.A_log", 1),
    Size("MODEL.MFUSER.ADAPTER.PROJECT_VFM (projections)", _ENCODER + r"adapters\.(\d+)\.vfm_in\.weight"),
    Size("MODEL.MFUSER.MT_ENHANCER.WIDTH", _REFINER + r"text_proj\.1\.weight", 0),
    Size("MODEL.MFUSER.MT_ENHANCER.NUM_LAYERS", _REFINER + r"layers\.(\d+)\..*"),
    Size("MODEL.SEM_SEG_HEAD.HIDDEN_DIM", _DECODER + "query_embed.weight", 1),
    Size("MODEL.SEM_SEG_HEAD.MASK_DIM", _PIXEL + "mask_proj.weight", 0),
    Size("MODEL.SEM_SEG_HEAD.ENC_LAYERS", _PIXEL + r"encoder_layers\.(\d+)\..*"),
    Size("MODEL.SEM_SEG_HEAD.DEC_LAYERS", _DECODER + r"layers\.(\d+)\..*"),
    Size("MODEL.SEM_SEG_HEAD.ENC_FFN_DIM", _PIXEL + r"encoder_layers\.0\.ffn\.linear1\.weight", 0),
    Size("MODEL.SEM_SEG_HEAD.DEC_FFN_DIM", _DECODER + r"layers\.0\.ffn\.linear1\.weight", 0),
)
"""What two builds can differ in, told in words before single tensors are."""


def model_variant(state: Mapping[str, Tensor]) -> str:
    """The release's variant that a model of ours corresponds to.

    Args:
        state: names of `model.state_dict()`; tensors are not looked at.
    Raises:
        ValueError: it has parts that the release does not know.
    """
    vlm = _ENCODER + "vlm.model."
    marks = {"clip": "conv1.weight", "eva02": "blocks.0.attn.norm.weight", "siglip": "attn_pool.latent"}
    for variant in VARIANTS:
        if vlm + marks[variant] in state:
            return variant
    raise ValueError("this model's MODEL.MFUSER.VLM.NAME is none of the release's: CLIP, EVA02-CLIP or SigLIP")


def convert_checked(official: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's state dict under our names, if it fills a model exactly.

    Args:
        official: the release's state dict, unwrapped.
        model_state: `state_dict()` of the model it is for; on the meta device will do, only shapes are looked at.
    Returns:
        a tensor of the right shape for every entry of `model_state`.
    Raises:
        ValueError: it is of another variant or size (says which config keys differ and how), or keys are missing,
            unknown or of another shape (names them).
    """
    variant, wanted_variant = recognize_variant(official), model_variant(model_state)
    if variant != wanted_variant:
        raise ValueError(
            f"this is a checkpoint of the {variant} variant, the config builds the {wanted_variant} one; "
            f"use a config named mfuser_{variant}.yaml"
        )
    used, _ = split_empty(official, variant)
    _check_sizes(used, model_state)
    problems = _differences(used, to_official(model_state, variant))
    if problems:
        raise ValueError(f"this is no whole {variant} checkpoint of the release; {problems}")
    converted = from_official(used)
    assert set(converted) == set(model_state), "the renaming rules are not one to one"
    return converted


def check_complete(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> None:
    """Refuse a state dict of ours that does not fill a model.

    Raises:
        ValueError: names entries that are missing, unknown or of another shape.
    """
    problems = _differences(state, model_state)
    if problems:
        raise ValueError(f"this checkpoint does not fill the model of the config; {problems}")


def _check_sizes(used: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> None:
    try:
        converted = from_official(used)
    except ValueError:
        return  # unknown or missing keys, which are told next by the names they have in the file
    sizes = [(size.config_key, size.read(model_state), size.read(converted)) for size in SIZES]
    # 0: the checkpoint does not tell, its keys are missing.
    different = [
        f"{key} is {ours}, the checkpoint has {theirs}" for key, ours, theirs in sizes if theirs not in (0, ours)
    ]
    if different:
        raise ValueError("the config does not fit this checkpoint: " + "; ".join(different))


def _differences(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Keys that are missing, unknown or of another shape, in words; "" where there are none."""
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    missing, unknown = [key for key in wanted if key not in state], [key for key in state if key not in wanted]
    problems = []
    for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            problems.append(f"{len(found)} {what}: {', '.join(found[:8])}{more}")
    return "; ".join(problems)
