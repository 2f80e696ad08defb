"""Looking into the encoders: patch tokens after a block, of the frozen encoder alone and with its adapters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mfuser_d2.core.dual_encoder import DualEncoder
from mfuser_d2.core.encoders.text import PromptedTextEncoder
from mfuser_d2.core.encoders.tower import InputNorm, VisionTower
from mfuser_d2.core.ops.grid import Grid
from mfuser_d2.core.single_encoder import SingleEncoder


class PatchTokens(NamedTuple):
    """Tokens of one encoder for one image.

    Attributes:
        tokens: (h*w, C), row-major, without prefix tokens.
        grid: (h, w) in patches.
    """

    tokens: Tensor
    grid: Grid


def encoder_parts(encoder: nn.Module) -> dict[str, tuple[VisionTower, InputNorm]]:
    """The encoders that see the image, "vfm" and "vlm" or one of them, each with its input normalisation."""
    if isinstance(encoder, DualEncoder):
        return {"vfm": (encoder.vfm, encoder.vfm_input), "vlm": (encoder.vlm, encoder.vlm_input)}
    assert isinstance(encoder, SingleEncoder), f"{type(encoder).__name__} is no encoder known here"
    name = "vfm" if encoder.tower.joint_dim is None else "vlm"
    return {name: (encoder.tower, encoder.input_norm)}


@torch.no_grad()
def frozen_tokens(encoder: nn.Module, image: Tensor) -> dict[str, PatchTokens]:
    """Patch tokens after the last block of each encoder as it was published, without any adapter.

    Args:
        encoder: `DualEncoder` or `SingleEncoder`.
        image: (1, 3, H, W), normalised for the network.
    """
    found = {}
    for name, (tower, normalize) in encoder_parts(encoder).items():
        tokens, context = tower.embed(normalize(image))
        for index in range(tower.depth):
            tokens = tower.run_block(index, tokens, context)
        found[name] = _patches(tower, tokens, image)
    return found


@torch.no_grad()
def adapted_tokens(encoder: nn.Module, image: Tensor) -> dict[str, PatchTokens]:
    """The same tokens in the adapted network, after the last adapter's correction (Eq. 2-3)."""
    parts = encoder_parts(encoder)
    if not len(encoder.adapters):
        return frozen_tokens(encoder, image)
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, inputs: tuple, corrections: Tensor | tuple[Tensor, Tensor]) -> None:
        both = corrections if isinstance(corrections, tuple) else (corrections,)
        for name, before, correction in zip(parts, inputs, both):
            seen[name] = before + correction

    handle = encoder.adapters[-1].register_forward_hook(record)
    try:
        encoder(image)
    finally:
        handle.remove()
    return {name: _patches(tower, seen[name], image) for name, (tower, _) in parts.items()}


@torch.no_grad()
def frozen_similarity_inputs(
    encoder: nn.Module, text_encoder: nn.Module, image: Tensor
) -> tuple[PatchTokens, Tensor]:
    """Patches and words of the vision-language model as it was published: no adapters, no learned prompts.

    Args:
        encoder: with a vision-language model that sees the image.
        text_encoder: a `PromptedTextEncoder` that has the words.
        image: (1, 3, H, W), normalised for the network.
    Returns:
        patches (h*w, E) in the image-text space, and texts (K, E).
    Raises:
        ValueError: no vision-language model sees the image, or there is no text encoder with words.
    """
    parts = encoder_parts(encoder)
    if "vlm" not in parts or parts["vlm"][0].joint_dim is None or not isinstance(text_encoder, PromptedTextEncoder):
        raise ValueError("similarity before adaptation needs a vision-language model and texts in this config")
    tower, normalize = parts["vlm"]
    tokens, context = tower.embed(normalize(image))
    for index in range(tower.depth):
        tokens = tower.run_block(index, tokens, context)
    _, dense = tower.project(tower.final_norm(tokens))
    words = text_encoder.class_tokens
    texts = text_encoder.tower(text_encoder.tower.model.token_embedding(words), words.argmax(dim=1))
    return PatchTokens(dense[0], tower.grid_of(tuple(image.shape[-2:]))), texts


def _patches(tower: VisionTower, tokens: Tensor, image: Tensor) -> PatchTokens:
    return PatchTokens(tokens[0, tower.num_prefix_tokens :], tower.grid_of(tuple(image.shape[-2:])))
