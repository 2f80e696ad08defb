"""Putting backbone and head together from names and numbers; used by Detectron2's shells and by plain PyTorch alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfuser_d2.core.adapters import build_adapter
from mfuser_d2.core.dual_encoder import DualEncoder
from mfuser_d2.core.encoders.builders import build_text_tower, build_vfm, build_vlm
from mfuser_d2.core.encoders.class_tokens import tokenize_classes
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD, vlm_config
from mfuser_d2.core.encoders.text import PromptedTextEncoder
from mfuser_d2.core.feature_pyramid import FeaturePyramid
from mfuser_d2.core.mt_enhancer import TextRefiner
from mfuser_d2.core.pixel_decoder import PixelDecoder
from mfuser_d2.core.text_query_head import TextQueryHead
from mfuser_d2.core.transformer_decoder import TransformerDecoder


def build_backbone_parts(
    *,
    vfm: dict[str, Any],
    vlm: dict[str, Any],
    image_size: tuple[int, int],
    patch_size: int = 0,
    resample: str | None = None,
    adapter: str = "mvfuser",
    adapter_kwargs: dict[str, Any] | None = None,
    project_vfm: bool = False,
    tap_layers: Sequence[int],
    pixel_mean: Sequence[float] = CLIP_MEAN,
    pixel_std: Sequence[float] = CLIP_STD,
    use_checkpoint: bool = False,
) -> dict[str, Any]:
    """The two parts of a `DualEncoderBackbone`.

    Args:
        vfm, vlm: "name" and, where they differ from the defaults, "weights" and "kwargs" of `build_vfm`, `build_vlm`.
        image_size: (height, width) in pixels that position grids are resampled to.
        patch_size: pixels, for both encoders; 0 keeps each encoder's own.
        resample: how grids and kernels are resized; None takes the release's choice per encoder.
        adapter: a name of `ADAPTERS`.
        adapter_kwargs: the adapter's own arguments.
        project_vfm: see `CoAdapter` and `DualEncoder`.
        tap_layers: see `DualEncoder`.
        pixel_mean, pixel_std: how images come in.
        use_checkpoint: see `DualEncoder`.
    Returns:
        {"encoder": DualEncoder, "pyramid": FeaturePyramid}.
    """
    geometry = {"image_size": tuple(image_size), "patch_size": patch_size, "resample": resample}
    vfm_tower = build_vfm(**vfm, **geometry)
    vlm_tower = build_vlm(**vlm, **geometry)
    widths = {"vfm_dim": vfm_tower.embed_dim, "vlm_dim": vlm_tower.embed_dim, "project_vfm": project_vfm}
    adapters = [
        build_adapter(adapter, **widths, **(adapter_kwargs or {})) for _ in range(min(vfm_tower.depth, vlm_tower.depth))
    ]
    encoder = DualEncoder(
        vfm=vfm_tower,
        vlm=vlm_tower,
        adapters=adapters,
        tap_layers=tap_layers,
        project_vfm=project_vfm,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        use_checkpoint=use_checkpoint,
    )
    return {"encoder": encoder, "pyramid": FeaturePyramid(dim=encoder.tap_dim)}


def build_head_parts(
    *,
    vlm: dict[str, Any],
    class_names: Sequence[str],
    in_dims: Sequence[int],
    tokenizer: str = "",
    class_tokens: Tensor | None = None,
    prompt_length: int = 8,
    refiner_kwargs: dict[str, Any] | None = None,
    temperature: float = 0.07,
    hidden_dim: int = 256,
    mask_dim: int = 256,
    num_heads: int = 8,
    encoder_layers: int = 6,
    decoder_layers: int = 9,
    encoder_ffn_dim: int = 2048,
    decoder_ffn_dim: int = 2048,
) -> dict[str, Any]:
    """The parts of a `TextQueryHead`.

    Args:
        vlm: as in `build_backbone_parts`; its text tower is built here.
        class_names: K names, in the order of their trainIds.
        in_dims: channels of "res2".."res5".
        tokenizer: SigLIP's sentencepiece file, for class names outside the committed table.
        class_tokens: (K, L) token ids, where they are known already; None tokenizes the names.
        prompt_length: learned prompt vectors.
        refiner_kwargs: `TextRefiner`'s own arguments.
        temperature: of the alignment loss; 0 takes the model's own scale and bias.
        hidden_dim, mask_dim, num_heads, encoder_layers, decoder_layers, encoder_ffn_dim, decoder_ffn_dim: of the pixel
            and the transformer decoder.
    """
    tower = build_text_tower(**vlm)
    if class_tokens is None:
        # Only SigLIP names a tokenizer of its own; CLIP's relatives share CLIP's.
        vocabulary = "siglip" if vlm_config(vlm["name"])["text_cfg"].get("hf_tokenizer_name") else "clip"
        class_tokens = tokenize_classes(class_names, vocabulary=vocabulary, sentencepiece_file=tokenizer)
    text_encoder = PromptedTextEncoder(tower=tower, class_tokens=class_tokens, prompt_length=prompt_length)
    decoder = {"text_dim": tower.joint_dim, "num_classes": len(class_names), "num_heads": num_heads}
    own_scale = temperature == 0
    return {
        "text_encoder": text_encoder,
        "text_refiner": TextRefiner(text_dim=tower.joint_dim, **(refiner_kwargs or {})),
        "pixel_decoder": PixelDecoder(
            in_dims=in_dims,
            feature_dim=hidden_dim,
            mask_dim=mask_dim,
            num_layers=encoder_layers,
            ffn_dim=encoder_ffn_dim,
            **decoder,
        ),
        "transformer_decoder": TransformerDecoder(
            hidden_dim=hidden_dim,
            mask_dim=mask_dim,
            num_queries=len(class_names),
            num_layers=decoder_layers,
            ffn_dim=decoder_ffn_dim,
            **decoder,
        ),
        "alignment_scale": math.exp(tower.logit_scale) if own_scale else 1 / temperature,
        "alignment_bias": tower.logit_bias if own_scale else 0.0,
    }


def build_head(**kwargs: Any) -> TextQueryHead:
    """A head from the arguments of `build_head_parts`."""
    return TextQueryHead(**build_head_parts(**kwargs))
