"""Putting backbone and head together from names and numbers; used by Detectron2's shells and by plain PyTorch alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mfuser_d2.core.adapters import MVFuserBlock, adapter_options, build_adapter
from mfuser_d2.core.dual_encoder import DualEncoder
from mfuser_d2.core.encoders.builders import VFM_PREFIX, build_text_tower, build_vfm, build_vlm, vocabulary_of
from mfuser_d2.core.encoders.class_queries import LearnedQueries, TemplateTextEncoder, fill_templates
from mfuser_d2.core.encoders.class_tokens import tokenize_classes
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD
from mfuser_d2.core.encoders.text import PromptedTextEncoder
from mfuser_d2.core.feature_pyramid import FeaturePyramid
from mfuser_d2.core.mt_enhancer import build_refiner
from mfuser_d2.core.pixel_decoder import PixelDecoder
from mfuser_d2.core.single_encoder import SINGLE_ADAPTERS, SingleEncoder, check_single
from mfuser_d2.core.text_query_head import TextQueryHead
from mfuser_d2.core.transformer_decoder import TransformerDecoder

QUERIES = ("texts", "learned")


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
    encoders: str = "both",
    joint_features: str = "both",
    joint_dim: int | None = None,
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
        adapter_kwargs: options of the adapters; each takes its own.
        project_vfm: see `CoAdapter` and `DualEncoder`.
        encoders: "both", or the one that sees the image, "vfm" or "vlm".
        joint_features: see `DualEncoder`.
        joint_dim: see `SingleEncoder`; only looked at where a VFM is alone.
        tap_layers: see `DualEncoder`.
        pixel_mean, pixel_std: how images come in.
        use_checkpoint: see `DualEncoder`.
    Returns:
        {"encoder": DualEncoder or SingleEncoder, "pyramid": FeaturePyramid}.
    Raises:
        KeyError, ValueError: a name is unknown, or choices contradict each other.
    """
    geometry = {"image_size": tuple(image_size), "patch_size": patch_size, "resample": resample}
    shared = {
        "tap_layers": tap_layers,
        "pixel_mean": pixel_mean,
        "pixel_std": pixel_std,
        "use_checkpoint": use_checkpoint,
    }
    options = adapter_kwargs or {}
    if encoders == "both":
        towers = {"vfm": build_vfm(**vfm, **geometry), "vlm": build_vlm(**vlm, **geometry)}
        widths = {f"{name}_dim": tower.embed_dim for name, tower in towers.items()}
        adapters = [
            build_adapter(adapter, **widths, project_vfm=project_vfm, **options)
            for _ in range(min(tower.depth for tower in towers.values()))
        ]
        encoder = DualEncoder(
            **towers, adapters=adapters, project_vfm=project_vfm, joint_features=joint_features, **shared
        )
    elif encoders in SINGLE_ADAPTERS:
        check_single(encoders, adapter, joint_features)
        tower = build_vfm(**vfm, **geometry) if encoders == "vfm" else build_vlm(**vlm, **geometry)
        taken = {key: value for key, value in options.items() if key in adapter_options(adapter)}
        blocks = [MVFuserBlock(dim=tower.embed_dim, **taken) for _ in range(tower.depth)] if adapter != "none" else []
        encoder = SingleEncoder(tower=tower, adapters=blocks, joint_dim=joint_dim, **shared)
    else:
        raise KeyError(f"MODEL.MFUSER.ENCODERS={encoders!r} is unknown; choose from ['both', 'vfm', 'vlm']")
    return {"encoder": encoder, "pyramid": FeaturePyramid(dim=encoder.tap_dim)}


def build_head_parts(
    *,
    vlm: dict[str, Any],
    class_names: Sequence[str],
    in_dims: Sequence[int],
    tokenizer: str = "",
    class_tokens: Tensor | None = None,
    prompt_length: int = 8,
    prompt_templates: Sequence[str] = (),
    queries: str = "texts",
    joint_dim: int | None = None,
    refiner: str = "full",
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
        tokenizer: SigLIP's spiece.model or tokenizer.json, for class names outside the committed table.
        class_tokens: (K, L) token ids, where they are known already; None tokenizes the names.
        prompt_length: learned prompt vectors.
        prompt_templates: fixed sentences around the class names instead, see `TemplateTextEncoder`.
        queries: "texts", or "learned" for one learned vector per class (no text tower is built).
        joint_dim: E of the backbone's dense embedding, for learned queries.
        refiner: a name of `ENHANCERS`.
        refiner_kwargs: `TextRefiner`'s own arguments.
        temperature: of the alignment loss; 0 takes the model's own scale and bias.
        hidden_dim, mask_dim, num_heads, encoder_layers, decoder_layers, encoder_ffn_dim, decoder_ffn_dim: of the pixel
            and the transformer decoder.
    Raises:
        KeyError, ValueError: a name is unknown, or choices contradict each other.
    """
    check_queries(
        queries=queries,
        vlm_name=vlm["name"],
        prompt_length=prompt_length,
        prompt_templates=prompt_templates,
        temperature=temperature,
    )
    scale, bias = 1 / temperature if temperature else 1.0, 0.0
    if queries == "learned":
        if joint_dim is None:
            raise ValueError("learned queries need joint_dim, the width of the backbone's dense embedding")
        text_encoder: nn.Module = LearnedQueries(num_classes=len(class_names), joint_dim=joint_dim)
    else:
        tower = build_text_tower(**vlm)
        sentences = fill_templates(prompt_templates, class_names) if prompt_templates else class_names
        if class_tokens is None:
            class_tokens = tokenize_classes(sentences, vocabulary=vocabulary_of(vlm["name"]), tokenizer_file=tokenizer)
        if prompt_templates:
            text_encoder = TemplateTextEncoder(tower=tower, sentence_tokens=class_tokens, num_classes=len(class_names))
        else:
            text_encoder = PromptedTextEncoder(tower=tower, class_tokens=class_tokens, prompt_length=prompt_length)
        if temperature == 0:
            scale, bias = math.exp(tower.logit_scale), tower.logit_bias
    text_dim = text_encoder.joint_dim
    decoder = {"text_dim": text_dim, "num_classes": len(class_names), "num_heads": num_heads}
    return {
        "text_encoder": text_encoder,
        "text_refiner": build_refiner(refiner, text_dim=text_dim, **(refiner_kwargs or {})),
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
        "alignment_scale": scale,
        "alignment_bias": bias,
    }


def check_queries(
    *, queries: str, vlm_name: str, prompt_length: int, prompt_templates: Sequence[str], temperature: float
) -> None:
    """Refuse query sources that contradict each other; arguments as in `build_head_parts`.

    Raises:
        KeyError: the source is unknown.
        ValueError: says what excludes what.
    """
    if queries not in QUERIES:
        raise KeyError(f"MODEL.MFUSER.QUERIES={queries!r} is unknown; choose from {list(QUERIES)}")
    if queries == "learned" and (prompt_templates or temperature == 0):
        culprit = f"PROMPT_TEMPLATES={list(prompt_templates)}" if prompt_templates else "ALIGN_LOSS.TEMPERATURE=0"
        raise ValueError(
            f"MODEL.MFUSER.QUERIES='learned' takes no text encoder, but {culprit} needs one; set QUERIES to "
            "'texts', or leave the other at its default"
        )
    if queries == "texts" and vlm_name.startswith(VFM_PREFIX):
        raise ValueError(
            f"MODEL.MFUSER.VLM.NAME={vlm_name!r} has no text encoder; set MODEL.MFUSER.QUERIES to 'learned', or take a "
            "vision-language model"
        )
    if prompt_templates and prompt_length:
        raise ValueError(
            f"MODEL.MFUSER.PROMPT_LENGTH={prompt_length} learns prompts, PROMPT_TEMPLATES={list(prompt_templates)} "
            "fixes them; set PROMPT_LENGTH to 0 for templates, or PROMPT_TEMPLATES to []"
        )
    fill_templates(prompt_templates, ())


def build_head(**kwargs: Any) -> TextQueryHead:
    """A head from the arguments of `build_head_parts`."""
    return TextQueryHead(**build_head_parts(**kwargs))
