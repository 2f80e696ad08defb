"""One frozen encoder alone, with or without a bottleneck after each block: the single rows of the paper's Table 5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfuser_d2.core.adapters import MVFuserBlock
from mfuser_d2.core.dual_encoder import DualFeatures, check_taps
from mfuser_d2.core.encoders.tower import InputNorm, VisionTower, joint_embeddings
from mfuser_d2.core.ops.grid import tokens_to_map

SINGLE_ADAPTERS = {"vfm": ("none", "vfm_only"), "vlm": ("none", "vlm_only")}
"""Adapters that make sense where one encoder sees the image."""


def check_single(encoders: str, adapter: str, joint_features: str = "both") -> None:
    """Refuse what needs two encoders where there is one.

    Args:
        encoders: "vfm" or "vlm", the one that is there.
        adapter: name of the adapter.
        joint_features: see `DualEncoder`.
    Raises:
        ValueError: says what to take.
    """
    if adapter not in SINGLE_ADAPTERS[encoders]:
        raise ValueError(
            f"MODEL.MFUSER.ADAPTER.NAME={adapter!r} needs both encoders, but MODEL.MFUSER.ENCODERS={encoders!r} keeps "
            f"one; choose from {list(SINGLE_ADAPTERS[encoders])}, or set ENCODERS to 'both'"
        )
    if encoders == "vfm" and joint_features == "vlm":
        raise ValueError(
            "MODEL.MFUSER.ALIGN_LOSS.FEATURES='vlm' wants features of the VLM, which sees no image with "
            "MODEL.MFUSER.ENCODERS='vfm'; leave FEATURES at 'both'"
        )


class SingleEncoder(nn.Module):
    """A frozen encoder whose taps and embeddings take the place of `DualEncoder`'s.

    Args:
        tower: the encoder.
        adapters: one bottleneck per block, or none at all.
        tap_layers: blocks whose output feeds the pyramid, from 0, ascending.
        joint_dim: E, width of the space of the class texts, for an encoder that has no image-text space: a linear map
            into it is learned. None takes the encoder's own space, or its tokens as they are where it has none.
        pixel_mean, pixel_std: how the incoming images are normalised, RGB, 0..255 scale.
        use_checkpoint: recompute each block in the backward pass instead of storing its activations.
    Raises:
        ValueError: adapters or taps do not fit the depth.
    """

    def __init__(
        self,
        *,
        tower: VisionTower,
        adapters: Sequence[MVFuserBlock] = (),
        tap_layers: Sequence[int],
        joint_dim: int | None = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if len(adapters) not in (0, tower.depth):
            raise ValueError(f"{len(adapters)} adapters for {tower.depth} blocks; give one per block, or none")
        check_taps(tap_layers, tower.depth, f"the blocks of {type(tower).__name__}")
        self.tower = tower
        self.adapters = nn.ModuleList(adapters)
        self.tap_layers = tuple(tap_layers)
        self.use_checkpoint = use_checkpoint
        self.input_norm = InputNorm(pixel_mean=pixel_mean, pixel_std=pixel_std, tower=tower)
        self.has_projection = tower.joint_dim is None and joint_dim is not None
        if self.has_projection:
            self.to_joint = nn.Linear(tower.embed_dim, joint_dim)
        self.joint_dim = joint_dim if self.has_projection else tower.joint_dim or tower.embed_dim

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of a cell of the taps."""
        return self.tower.patch_size

    @property
    def tap_dim(self) -> int:
        """Channels of every tap."""
        return self.tower.embed_dim

    def forward(self, images: Tensor) -> DualFeatures:
        """Encode normalised images (N, 3, H, W)."""
        grid = self.tower.grid_of(tuple(images.shape[-2:]))
        with torch.no_grad():
            tokens, context = self.tower.embed(self.input_norm(images))
        taps = []
        for index in range(self.tower.depth):
            if self.use_checkpoint and torch.is_grad_enabled():
                tokens = checkpoint(self._run_block, index, tokens, context, use_reentrant=False)
            else:
                tokens = self._run_block(index, tokens, context)
            if index in self.tap_layers:
                taps.append(tokens_to_map(tokens[:, self.tower.num_prefix_tokens :], grid))
        pooled, dense = joint_embeddings(self.tower, self.tower.final_norm(tokens))
        if self.has_projection:
            pooled, dense = self.to_joint(pooled), self.to_joint(dense)
        return DualFeatures(taps, pooled, tokens_to_map(dense, grid))

    def _run_block(self, index: int, tokens: Tensor, context: object) -> Tensor:
        tokens = self.tower.run_block(index, tokens, context)
        return tokens + self.adapters[index](tokens) if self.adapters else tokens
