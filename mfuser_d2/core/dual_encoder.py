"""The only loop that interleaves two frozen encoders, with one adapter per pair of blocks (Eq. 1-3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfuser_d2.core.adapters import CoAdapter, TokenLayout
from mfuser_d2.core.encoders.tower import VisionTower
from mfuser_d2.core.ops.grid import map_to_tokens, resample_map, tokens_to_map


class DualFeatures(NamedTuple):
    """What two interleaved encoders say of a batch of images.

    Attributes:
        taps: maps (N, Cv + Cl, h, w) on the VLM's patch grid, VFM channels first, one per tapped block.
        global_embedding: (N, 1, E) in the image-text space, not normalised.
        dense_embedding: (N, E, h, w), the same for every patch.
    """

    taps: list[Tensor]
    global_embedding: Tensor
    dense_embedding: Tensor


class DualEncoder(nn.Module):
    """A frozen VFM and a frozen VLM that correct each other through adapters.

    Encoders of different depth are paired by relative depth: the shallower one has an adapter after every block. Patch
    grids may differ; VFM maps are then resized to the VLM's grid where the two meet.

    Args:
        vfm: vision foundation model.
        vlm: vision half of the vision-language model.
        adapters: one per block pair, `min(vfm.depth, vlm.depth)` in all.
        tap_layers: block pairs whose output feeds the pyramid, from 0, ascending.
        project_vfm: the VFM enters the joint embedding through a linear map instead of its own final norm (the
            release's CLIP variant); always so where the widths differ.
        pixel_mean, pixel_std: how the incoming images are normalised, RGB, 0..255 scale; each tower gets its own.
        use_checkpoint: recompute each block pair in the backward pass instead of storing its activations.
    Raises:
        ValueError: adapters or taps do not fit the depths, or the VLM has no image-text space.
    """

    def __init__(
        self,
        *,
        vfm: VisionTower,
        vlm: VisionTower,
        adapters: Sequence[CoAdapter],
        tap_layers: Sequence[int],
        project_vfm: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.num_pairs = min(vfm.depth, vlm.depth)
        if len(adapters) != self.num_pairs:
            raise ValueError(f"{len(adapters)} adapters for {self.num_pairs} block pairs; give one per pair")
        if list(tap_layers) != sorted(set(tap_layers)) or not 0 <= tap_layers[0] <= tap_layers[-1] < self.num_pairs:
            raise ValueError(
                f"MODEL.MFUSER.TAP_LAYERS={list(tap_layers)} must ascend within 0..{self.num_pairs - 1}, "
                f"the block pairs of a VFM of {vfm.depth} and a VLM of {vlm.depth} blocks"
            )
        if vlm.joint_dim is None:
            raise ValueError("MODEL.MFUSER.VLM has no image-text space; choose a vision-language model")
        self.vfm, self.vlm = vfm, vlm
        self.adapters = nn.ModuleList(adapters)
        self.tap_layers = tuple(tap_layers)
        self.use_checkpoint = use_checkpoint
        self.has_projection = project_vfm or vfm.embed_dim != vlm.embed_dim
        if self.has_projection:
            self.vfm_to_joint = nn.Linear(vfm.embed_dim, vlm.embed_dim)
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).view(3, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        # Decided here, once: comparing in forward would make a GPU wait.
        self._vfm_takes_input = self._is_normalized_for(vfm)
        self._vlm_takes_input = self._is_normalized_for(vlm)

    @property
    def tap_dim(self) -> int:
        """Channels of every tap."""
        return self.vfm.embed_dim + self.vlm.embed_dim

    @property
    def joint_dim(self) -> int:
        """E, width of the image-text space."""
        return self.vlm.joint_dim

    def forward(self, images: Tensor) -> DualFeatures:
        """Encode normalised images (N, 3, H, W)."""
        size = tuple(images.shape[-2:])
        layout = TokenLayout(
            self.vfm.grid_of(size), self.vlm.grid_of(size), self.vfm.num_prefix_tokens, self.vlm.num_prefix_tokens
        )
        with torch.no_grad():
            vfm, vfm_context = self.vfm.embed(
                images if self._vfm_takes_input else self._normalize_for(self.vfm, images)
            )
            vlm, vlm_context = self.vlm.embed(
                images if self._vlm_takes_input else self._normalize_for(self.vlm, images)
            )
        taps = []
        for pair in range(self.num_pairs):
            step = (pair, vfm, vlm, vfm_context, vlm_context, layout)
            if self.use_checkpoint and torch.is_grad_enabled():
                vfm, vlm = checkpoint(self._run_pair, *step, use_reentrant=False)
            else:
                vfm, vlm = self._run_pair(*step)
            if pair in self.tap_layers:
                taps.append(self._tap(vfm, vlm, layout))
        return DualFeatures(taps, *self._embed_jointly(vfm, vlm, layout))

    def _is_normalized_for(self, tower: VisionTower) -> bool:
        return torch.allclose(tower.pixel_mean, self.pixel_mean) and torch.allclose(tower.pixel_std, self.pixel_std)

    def _normalize_for(self, tower: VisionTower, images: Tensor) -> Tensor:
        return (images * self.pixel_std + self.pixel_mean - tower.pixel_mean) / tower.pixel_std

    def _run_pair(
        self, pair: int, vfm: Tensor, vlm: Tensor, vfm_context: Any, vlm_context: Any, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        for index in self._blocks_of(self.vfm, pair):
            vfm = self.vfm.run_block(index, vfm, vfm_context)
        for index in self._blocks_of(self.vlm, pair):
            vlm = self.vlm.run_block(index, vlm, vlm_context)
        vfm_delta, vlm_delta = self.adapters[pair](vfm, vlm, layout)
        return vfm + vfm_delta, vlm + vlm_delta

    def _blocks_of(self, tower: VisionTower, pair: int) -> range:
        return range(pair * tower.depth // self.num_pairs, (pair + 1) * tower.depth // self.num_pairs)

    def _vfm_patches(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """VFM patches as a map on the VLM's grid."""
        return resample_map(tokens_to_map(tokens[:, layout.vfm_prefix :], layout.vfm_grid), layout.vlm_grid)

    def _tap(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> Tensor:
        vlm_map = tokens_to_map(vlm[:, layout.vlm_prefix :], layout.vlm_grid)
        return torch.cat([self._vfm_patches(vfm, layout), vlm_map], dim=1)

    def _embed_jointly(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Sum of both encoders in the image-text space: (N, 1, E) and (N, E, h, w)."""
        if self.has_projection:
            tokens = self.vlm.final_norm(vlm + self._align(self.vfm_to_joint(vfm), vlm, layout))
        else:
            tokens = self.vlm.final_norm(vlm) + self._align(self.vfm.final_norm(vfm), vlm, layout)
        global_embedding, dense = self.vlm.project(tokens)
        return global_embedding, tokens_to_map(dense, layout.vlm_grid)

    def _align(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> Tensor:
        """VFM tokens laid out like the VLM's: class token on class token, patches on patches, nothing on registers."""
        patches = map_to_tokens(self._vfm_patches(vfm, layout))
        prefix = vlm.new_zeros(len(vlm), layout.vlm_prefix, vfm.shape[2])
        if self.vfm.has_class_token and self.vlm.has_class_token:
            prefix = torch.cat([vfm[:, :1], prefix[:, 1:]], dim=1)
        return torch.cat([prefix.to(patches.dtype), patches], dim=1)
