"""Building the frozen encoders by name, with random or published weights, at a wanted geometry."""

from __future__ import annotations

from typing import Any

import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower

from mfuser_d2.core.encoders.clip_tower import ClipTower
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD, HALF, VFM_PRESETS, VLM_SOURCES, TimmPreset, vlm_config
from mfuser_d2.core.encoders.text import TextTower
from mfuser_d2.core.encoders.timm_tower import TimmTower
from mfuser_d2.core.encoders.tower import FrozenModule, VisionTower
from mfuser_d2.core.encoders.weights import load_text, load_timm, load_vision, vlm_state

Kwargs = dict[str, Any]

VLM_PREFIX, VFM_PREFIX = "clip:", "vfm:"
"""A VLM's vision half in the VFM's place ("clip:EVA02-L-14-336"), a VFM in the VLM's ("vfm:dinov2_vitl14")."""


def build_vfm(
    *,
    name: str,
    weights: str = "",
    image_size: tuple[int, int],
    patch_size: int = 0,
    resample: str | None = None,
    kwargs: Kwargs | None = None,
) -> VisionTower:
    """A frozen vision foundation model.

    Args:
        name: a short name of `VFM_PRESETS`, a timm ViT by its timm name, or "clip:<open_clip name>" for the vision half
            of a vision-language model (VLM + VLM pairs).
        weights: a file in its publisher's format, "hf-hub:<id>" or a timm tag, "" for random weights.
        image_size: (height, width) in pixels that the position grid is resampled to.
        patch_size: pixels; 0 keeps the encoder's own, else the patch kernels are resampled.
        resample: "bicubic" or "bilinear"; None takes the release's choice.
        kwargs: constructor arguments that differ from timm's (width, depth, ... of reduced models).
    Raises:
        KeyError: the name is unknown.
        FileNotFoundError, ValueError: the weights are missing, or not those of this encoder.
    """
    if name.startswith(VLM_PREFIX):
        return build_vlm(
            name=name.removeprefix(VLM_PREFIX),
            weights=weights,
            image_size=image_size,
            patch_size=patch_size,
            resample=resample,
            kwargs=kwargs,
        )
    preset = VFM_PRESETS.get(name)
    if preset is None:
        if not timm.is_model(name):
            raise KeyError(
                f"MODEL.MFUSER.VFM.NAME={name!r} is unknown; choose from {sorted(VFM_PRESETS)}, "
                "any ViT of timm.list_models('vit_*'), or 'clip:' and an open_clip name"
            )
        preset = TimmPreset(name, {}, f"timm's hub: set MODEL.MFUSER.VFM.WEIGHTS to hf-hub:timm/{name}.<tag>")
    model = timm.create_model(preset.model, num_classes=0, dynamic_img_size=True, **{**preset.kwargs, **(kwargs or {})})
    if weights:
        load_timm(model, weights, source=preset.source)
    config = timm.get_pretrained_cfg(preset.model)
    tower = TimmTower(
        model=model,
        has_joint_space=False,
        pixel_mean=_to_pixels(config.mean),
        pixel_std=_to_pixels(config.std),
        scale_offset=0.1 if "dinov2" in preset.model else None,
    )
    return _finish(tower, name, weights, image_size, patch_size, resample)


def build_vlm(
    *,
    name: str,
    weights: str = "",
    image_size: tuple[int, int],
    patch_size: int = 0,
    resample: str | None = None,
    kwargs: Kwargs | None = None,
    double_class_token: bool = True,
) -> VisionTower:
    """The frozen vision half of a vision-language model; arguments as in `build_vfm`.

    Args:
        name: an open_clip model, a tiny one of `VLM_PRESETS`, or "vfm:<name>" for a model without image-text space
            (VFM + VFM pairs).
        kwargs: nested changes to open_clip's config.
        double_class_token: add CLIP's class embedding twice when weights are loaded, as the release does (it matters
            for its checkpoints only in that the frozen part is then the same). Other encoders do not look at it.
    """
    if name.startswith(VFM_PREFIX):
        return build_vfm(
            name=name.removeprefix(VFM_PREFIX),
            weights=weights,
            image_size=image_size,
            patch_size=patch_size,
            resample=resample,
            kwargs=kwargs,
        )
    config = vlm_config(name, kwargs)
    vision = dict(config["vision_cfg"])
    timm_kwargs = vision.pop("timm_kwargs", {})
    if "timm_model_name" in vision:
        tower: VisionTower = _timm_vlm(config, vision, timm_kwargs)
    else:
        quick = config.get("quick_gelu", False)
        tower = ClipTower(
            model=_build_vision_tower(config["embed_dim"], CLIPVisionCfg(**vision), quick_gelu=quick),
            pixel_mean=CLIP_MEAN,
            pixel_std=CLIP_STD,
        )
    if weights:
        load_vision(tower.model, vlm_state(weights, source=_source(name)), double_class_token=double_class_token)
    return _finish(tower, name, weights, image_size, patch_size, resample)


def build_text_tower(*, name: str, weights: str = "", kwargs: Kwargs | None = None) -> TextTower:
    """The frozen text half of a vision-language model; arguments as in `build_vlm`.

    Its `logit_scale` and `logit_bias` are those of the weights (SigLIP), or of a fresh model.
    """
    config = vlm_config(name, kwargs)
    text = dict(config["text_cfg"])
    if text.get("no_causal_mask") and "SigLIP2" not in name:
        # SigLIP was trained with the tanh GELU; open_clip's config of version 1 leaves the exact one.
        text.setdefault("act_kwargs", {"approximate": "tanh"})
    model = _build_text_tower(config["embed_dim"], CLIPTextCfg(**text), quick_gelu=config.get("quick_gelu", False))
    tower = TextTower(model=model, logit_bias=float(config.get("init_logit_bias") or 0.0))
    if weights:
        load_text(tower, vlm_state(weights, source=_source(name)))
    return _mark(tower, f"{name} text", weights)


def vocabulary_of(name: str) -> str:
    """Which vocabulary of `tokenize_classes` a vision-language model reads: "clip", "siglip" or "siglip2"."""
    # Only the SigLIPs name a tokenizer of their own; CLIP's relatives share CLIP's.
    if not vlm_config(name)["text_cfg"].get("hf_tokenizer_name"):
        return "clip"
    return "siglip2" if "SigLIP2" in name else "siglip"


def _timm_vlm(config: Kwargs, vision: Kwargs, timm_kwargs: Kwargs) -> TimmTower:
    name, is_siglip = vision["timm_model_name"], "siglip" in vision["timm_model_name"]
    options: Kwargs = {"dynamic_img_size": True, "global_pool": vision.get("timm_pool", "avg")}
    if is_siglip:
        options["act_layer"] = "gelu_tanh"
    if vision.get("image_size"):
        options["img_size"] = vision["image_size"]
    has_projection = vision.get("timm_proj") is None
    if not has_projection and vision["timm_proj"] != "none":
        raise ValueError(f"open_clip's {vision['timm_proj']!r} projection is not supported; choose another VLM")
    model = timm.create_model(
        name, num_classes=config["embed_dim"] if has_projection else 0, **{**options, **timm_kwargs}
    )
    # The SigLIP tower of the release takes 0.5 / 0.5; its grids are resized bilinearly, EVA02's bicubically.
    mean, std = (HALF, HALF) if is_siglip or "pe_core" in name else (CLIP_MEAN, CLIP_STD)
    return TimmTower(
        model=model,
        has_joint_space=True,
        pixel_mean=mean,
        pixel_std=std,
        resample_mode="bilinear" if is_siglip else "bicubic",
    )


def _finish(
    tower: VisionTower, name: str, weights: str, image_size: tuple[int, int], patch_size: int, resample: str | None
) -> VisionTower:
    if patch_size:
        tower.set_geometry(patch_size=(patch_size, patch_size), mode=resample)
    tower.set_geometry(grid=tower.grid_of(image_size), mode=resample)
    tower.freeze()
    return _mark(tower, name, weights)


def _mark(tower: FrozenModule, name: str, weights: str) -> Any:
    """What checkpoints need to tell encoders apart (see `core.checkpoint`)."""
    tower.encoder_name = name
    tower.has_random_weights = not weights
    return tower


def _source(name: str) -> str:
    return VLM_SOURCES.get(name, f"the hub: open_clip.list_pretrained() names weights of {name}")


def _to_pixels(values: tuple[float, ...]) -> tuple[float, float, float]:
    return tuple(255 * value for value in values)
