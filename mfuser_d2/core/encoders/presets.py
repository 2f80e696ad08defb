"""Names of encoders: what each is built from, how its pixels are normalised, where its weights come from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

Color = tuple[float, float, float]

CLIP_MEAN: Color = (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073)
CLIP_STD: Color = (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711)
HALF: Color = (255 * 0.5, 255 * 0.5, 255 * 0.5)


@dataclass(frozen=True)
class TimmPreset:
    """A vision foundation model by a short name.

    Attributes:
        model: timm's name of the architecture.
        kwargs: differs from timm's defaults in these.
        source: where the weights can be had, for the message when a file is missing.
    """

    model: str
    kwargs: dict[str, Any]
    source: str


def _dinov2(size: str, letter: str, registers: bool) -> TimmPreset:
    suffix = "_reg4" if registers else ""
    file = f"dinov2_vit{letter}14{suffix}_pretrain.pth"
    return TimmPreset(
        f"vit_{size}_patch14{suffix}_dinov2", {}, f"{file} from the model list of github.com/facebookresearch/dinov2"
    )


def _dinov3(size: str, letter: str) -> TimmPreset:
    # The files hold biases of q and v, which timm's plain names leave out (they are zero in the larger models).
    suffix = "" if size == "7b" else "_qkvb"
    file = f"dinov3_vit{letter}16_pretrain_lvd1689m-*.pth"
    return TimmPreset(
        f"vit_{size}_patch16_dinov3{suffix}", {}, f"{file} from the model list of github.com/facebookresearch/dinov3"
    )


def _pe_spatial(size: str, patch: int, pixels: int) -> TimmPreset:
    name = f"vit_pe_spatial_{size}_patch{patch}_{pixels}"
    return TimmPreset(name, {}, f"set MODEL.MFUSER.VFM.WEIGHTS to hf-hub:timm/{name}.fb, or to a copy of that file")


_SIZES = {"small": "s", "base": "b", "large": "l", "giant": "g"}

VFM_PRESETS: dict[str, TimmPreset] = {
    **{f"dinov2_vit{letter}14": _dinov2(size, letter, False) for size, letter in _SIZES.items()},
    **{f"dinov2_vit{letter}14_reg": _dinov2(size, letter, True) for size, letter in _SIZES.items()},
    "dinov3_vits16": _dinov3("small", "s"),
    "dinov3_vitsp16": _dinov3("small_plus", "splus"),
    "dinov3_vitb16": _dinov3("base", "b"),
    "dinov3_vitl16": _dinov3("large", "l"),
    "dinov3_vithp16": _dinov3("huge_plus", "hplus"),
    "dinov3_vit7b16": _dinov3("7b", "7b"),
    "pe_spatial_t": _pe_spatial("tiny", 16, 512),
    "pe_spatial_s": _pe_spatial("small", 16, 512),
    "pe_spatial_b": _pe_spatial("base", 16, 512),
    "pe_spatial_l": _pe_spatial("large", 14, 448),
    "pe_spatial_g": _pe_spatial("gigantic", 14, 448),
    "tiny_vfm": TimmPreset(
        "vit_small_patch14_dinov2",
        {"img_size": 128, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "init_values": 1.0},
        "it has none: it is random, for the quickstart",
    ),
}

_TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
_TINY_VISION = {"img_size": 128, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}

VLM_PRESETS: dict[str, dict[str, Any]] = {
    "tiny_clip": {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 128, "patch_size": 8, "width": 96, "layers": 4, "head_width": 24},
        "text_cfg": _TINY_TEXT,
    },
    "tiny_eva02": {
        "embed_dim": 64,
        "vision_cfg": {
            "timm_model_name": "eva02_large_patch14_clip_336",
            "timm_pool": "token",
            "timm_proj": None,
            "timm_kwargs": _TINY_VISION,
        },
        "text_cfg": _TINY_TEXT,
    },
    "tiny_siglip": {
        "embed_dim": 96,
        "vision_cfg": {
            "timm_model_name": "vit_large_patch16_siglip_384",
            "timm_pool": "map",
            "timm_proj": "none",
            "timm_kwargs": _TINY_VISION,
        },
        "text_cfg": {
            **_TINY_TEXT,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    },
}
"""Tiny encoders with random weights in open_clip's config format; `timm_kwargs` is this package's addition."""

VLM_SOURCES = {
    "ViT-L-14-336-quickgelu": "OpenAI's ViT-L-14-336px.pt (listed in github.com/openai/CLIP)",
    "EVA02-L-14-336": "EVA02_CLIP_L_336_psz14_s6B.pt from huggingface.co/QuanSun/EVA-CLIP",
    "ViT-L-16-SigLIP-384": "model.safetensors of huggingface.co/google/siglip-large-patch16-384",
    "ViT-L-16-SigLIP2-384": "model.safetensors of huggingface.co/google/siglip2-large-patch16-384",
    "PE-Core-L-14-336": "open_clip_model.safetensors of huggingface.co/timm/PE-Core-L-14-336",
}


def vlm_config(name: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """open_clip's config of a vision-language model, changed by nested overrides.

    Args:
        name: one of `VLM_PRESETS`, or any open_clip model.
        overrides: for example `{"text_cfg": {"layers": 2}}`; merged into the config.
    Raises:
        KeyError: the name is unknown.
    """
    import open_clip

    config = VLM_PRESETS.get(name) or open_clip.get_model_config(name.removeprefix("hf-hub:"))
    if config is None:
        known = sorted(VLM_PRESETS) + [m for m in open_clip.list_models() if m.startswith(("ViT", "EVA", "PE"))]
        raise KeyError(f"MODEL.MFUSER.VLM.NAME={name!r} is unknown; choose from {known}")
    return _merge(copy.deepcopy(config), overrides or {})


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        is_nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = _merge(base[key], value) if is_nested else value
    return base
