"""The authors' MFuser checkpoints: their names against ours, both ways, strictly.

Source: state-dict names of the authors' public release. Oddities that algebra can absorb are absorbed here, so that the
network stays clean: CLIP's class embedding, which the release adds twice, is doubled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mfuser_d2.core.encoders.key_rules import EVA02_VISION, SIGLIP_TEXT, SIGLIP_VISION
from mfuser_d2.core.key_map import Rule, apply_rules, prefixed, rename, transform

VARIANTS = ("clip", "eva02", "siglip")

_HEAD = "sem_seg_head."
_ENCODER = "backbone.encoder."

_FFN = [rename("ffns.0.layers.0.0.{}", "ffn.linear1.{}"), rename("ffns.0.layers.1.{}", "ffn.linear2.{}")]
_NORMS = [rename(f"norms.{index}.{{}}", f"norm{index + 1}.{{}}") for index in range(3)]

_PIXEL_DECODER = [
    rename("input_convs.{}.**", "input_projs.{}.**"),
    rename("encoder.layers.{}.attentions.0.**", "encoder_layers.{}.self_attn.**"),
    rename("encoder.layers.{}.attentions.1.attn.**", "encoder_layers.{}.cross_attn.**"),
    *prefixed(_FFN + _NORMS, "encoder.layers.{}.", "encoder_layers.{}."),
    rename("encoder.post_norm.{}", "post_norm.{}"),
    rename("lateral_convs.0.**", "lateral_proj.**"),
    rename("output_convs.0.**", "output_proj.**"),
    rename("mask_feature.{}", "mask_proj.{}"),
    rename("level_encoding.weight", "level_encoding.weight"),
    rename("text_proj.{}", "text_proj.{}"),
    rename("text_pos_embed.weight", "text_pos_embed.weight"),
]

_TRANSFORMER_DECODER = [
    rename("transformer_decoder.layers.{}.attentions.0.attn.**", "layers.{}.cross_attn.**"),
    rename("transformer_decoder.layers.{}.attentions.1.attn.**", "layers.{}.self_attn.**"),
    *prefixed(_FFN + _NORMS, "transformer_decoder.layers.{}.", "layers.{}."),
    rename("transformer_decoder.post_norm.{}", "post_norm.{}"),
    rename("query_embed.weight", "query_embed.weight"),
    rename("level_embed.weight", "level_embed.weight"),
    rename("text_proj.{}.{}", "text_proj.{}.{}"),
    rename("cls_embed.{}", "class_head.{}"),
    rename("mask_embed.{}.{}", "mask_head.{}.{}"),
]

# Named one by one: a model with another adapter or enhancer must not pass for the release's.
_MVFUSER = [
    rename(name, name)
    for name in ("A_log", "D", "scale", "dt_proj.bias", "norm.weight")
    + tuple(f"{layer}.weight" for layer in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d_x", "conv1d_z"))
]

_MTENHANCER = [
    rename(name, name)
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.proj.{}")
    + ("norm1.{}", "norm2.{}", "norm3.{}", "mlp.{}.{}")
]

TEXT_REFINER = [
    rename("memory_proj.**", "visual_proj.**"),
    rename("text_proj.**", "text_proj.**"),
    rename("out_proj.**", "out_proj.**"),
    *prefixed(_MVFUSER, "decoder.{}.cross_attn.", "layers.{}.mamba."),
    *prefixed(_MTENHANCER, "decoder.{}.", "layers.{}."),
]

_SHARED = [
    rename("contexts", _HEAD + "text_encoder.prompt"),
    rename("gamma", _HEAD + "text_refiner.gamma"),
    *prefixed(TEXT_REFINER, "context_decoder.", _HEAD + "text_refiner."),
    *prefixed(_PIXEL_DECODER, "decode_head.pixel_decoder.", _HEAD + "pixel_decoder."),
    *prefixed(_TRANSFORMER_DECODER, "decode_head.", _HEAD + "transformer_decoder."),
    rename("backbone.fpn1.**", "backbone.pyramid.up4.**"),
    rename("backbone.fpn2.0.{}", "backbone.pyramid.up2.{}"),
    *prefixed(_MVFUSER, "backbone.adapter.{}.", _ENCODER + "adapters.{}.block."),
    rename("backbone.dinov2.**", _ENCODER + "vfm.model.**"),
]

_PLAIN_TEXT = [rename("text_encoder.**", _HEAD + "text_encoder.tower.model.**")]

_BY_VARIANT: dict[str, list[Rule]] = {
    "clip": [
        rename("backbone.adapter_proj1.{}.{}", _ENCODER + "adapters.{}.vfm_in.{}"),
        rename("backbone.adapter_proj2.{}.{}", _ENCODER + "adapters.{}.vfm_out.{}"),
        rename("backbone.adapter_proj3.{}", _ENCODER + "vfm_to_joint.{}"),
        # The release adds the class embedding twice; doubling and halving are exact.
        transform("backbone.class_embedding", _ENCODER + "vlm.model.class_embedding", lambda t: t * 2, lambda t: t / 2),
        rename("backbone.**", _ENCODER + "vlm.model.**"),
        *_PLAIN_TEXT,
    ],
    "eva02": [*prefixed(EVA02_VISION, "backbone.", _ENCODER + "vlm.model."), *_PLAIN_TEXT],
    "siglip": [
        *prefixed(SIGLIP_VISION, "backbone.", _ENCODER + "vlm.model."),
        *prefixed(SIGLIP_TEXT, "text_encoder.", _HEAD + "text_encoder.tower.model."),
    ],
}

EMPTY_KEYS: dict[str, dict[str, str]] = {
    "clip": {r"backbone\.dinov2\.mask_token": "only used in DINOv2's own training"},
    "eva02": {
        r"backbone\.dinov2\.mask_token": "only used in DINOv2's own training",
        r"random_text": "a parameter the release never reads",
        r"backbone\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)": "rotary tables, computed from the grid",
    },
    "siglip": {
        r"backbone\.dinov2\.mask_token": "only used in DINOv2's own training",
        r"backbone\.adapter_proj[123]\..*": "projections the release never calls",
        r"(backbone\.)?logit_(scale|bias)": "of the alignment loss in training only",
    },
}
"""Keys per variant that carry nothing (regular expressions), and why."""


def recognize_variant(state: Mapping[str, Tensor]) -> str:
    """Which variant wrote a state dict: "clip", "eva02" or "siglip".

    Raises:
        ValueError: none of them.
    """
    if "backbone.embeddings.patch_embedding.weight" in state:
        return "siglip"
    if "backbone.blocks.0.attn.inner_attn_ln.weight" in state:
        return "eva02"
    if "backbone.conv1.weight" in state and "backbone.dinov2.pos_embed" in state:
        return "clip"
    example = next(iter(state), "none at all")
    hint = (
        "it is a checkpoint of this package: load it as it is, or turn it round with --reverse"
        if any(key.startswith((_HEAD, _ENCODER)) for key in state)
        else "the release has keys like backbone.dinov2.*, context_decoder.* and decode_head.*"
    )
    raise ValueError(f"these are no weights of the authors' MFuser release (first key: {example!r}); {hint}")


def unwrap_official(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bare state dict of an authors' checkpoint: out of mmcv's wrapper, without `module.` prefixes.

    Raises:
        ValueError: an entry is no tensor; names it.
    """
    state = checkpoint
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"entry {key!r} is a {type(value).__name__}, not a tensor: this is no state dict")
    return {key.removeprefix("module."): value for key, value in state.items()}


def split_empty(state: Mapping[str, Tensor], variant: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The keys that count, and those that carry nothing, each with the reason."""
    empty = [(re.compile(pattern), why) for pattern, why in EMPTY_KEYS[variant].items()]
    reasons = {key: why for key in state for pattern, why in empty if pattern.fullmatch(key)}
    return {key: value for key, value in state.items() if key not in reasons}, reasons


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the release's state dict to ours; every key is used or on the list of empty ones.

    Raises:
        ValueError: a key is unknown, or one that belongs with others is missing; names them.
    """
    variant = recognize_variant(state)
    full, _ = split_empty(state, variant)
    renamed, left = apply_rules(full, _SHARED + _BY_VARIANT[variant])
    if left:
        raise ValueError(
            f"{len(left)} keys of this {variant} checkpoint are unknown: {left[:8]}; it is not the release's"
        )
    return renamed


def to_official(state: Mapping[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Rename our state dict to the release's. Keys that carry nothing there are not made up.

    Raises:
        ValueError: a key has no place in the release (another adapter, another decoder), or the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; choose from {list(VARIANTS)}")
    rules = [rule.inverse() for rule in _SHARED + _BY_VARIANT[variant]]
    renamed, left = apply_rules(state, rules)
    if left:
        raise ValueError(
            f"the release's {variant} variant has no place for {left[:8]}; only its own parts can go there"
        )
    return renamed
