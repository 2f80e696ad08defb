"""The only loop that interleaves two frozen encoders, with one adapter per pair of blocks (Eq. 1-3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfuser_d2.core.adapters import CoAdapter, TokenLayout
from mfuser_d2.core.encoders.tower import InputNorm, VisionTower, joint_embeddings
from mfuser_d2.core.ops.grid import Grid, map_to_tokens, resample_map, tokens_to_map

JOINT_FEATURES = ("both", "vlm")


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


def check_taps(tap_layers: Sequence[int], num_blocks: int, blocks: str) -> None:
    """Refuse taps that do not ascend within the blocks.

    Args:
        tap_layers: block indices from 0.
        num_blocks: how many blocks there are.
        blocks: what they are called in the message.
    Raises:
        ValueError: names the range.
    """
    if list(tap_layers) != sorted(set(tap_layers)) or not 0 <= tap_layers[0] <= tap_layers[-1] < num_blocks:
        raise ValueError(f"MODEL.MFUSER.TAP_LAYERS={list(tap_layers)} must ascend within 0..{num_blocks - 1}, {blocks}")


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
        joint_features: "both" for the sum of both encoders in the joint embedding (the release), "vlm" for the VLM's
            own features; the VFM then speaks through adapters and taps only.
        pixel_mean, pixel_std: how the incoming images are normalised, RGB, 0..255 scale; each tower gets its own.
        use_checkpoint: recompute each block pair in the backward pass instead of storing its activations.
    Raises:
        ValueError: adapters or taps do not fit the depths.
        KeyError: unknown `joint_features`.
    """

    def __init__(
        self,
        *,
        vfm: VisionTower,
        vlm: VisionTower,
        adapters: Sequence[CoAdapter],
        tap_layers: Sequence[int],
        project_vfm: bool = False,
        joint_features: str = "both",
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.num_pairs = min(vfm.depth, vlm.depth)
        if len(adapters) != self.num_pairs:
            raise ValueError(f"{len(adapters)} adapters for {self.num_pairs} block pairs; give one per pair")
        check_taps(
            tap_layers, self.num_pairs, f"the block pairs of a VFM of {vfm.depth} and a VLM of {vlm.depth} blocks"
        )
        if joint_features not in JOINT_FEATURES:
            raise KeyError(
                f"MODEL.MFUSER.ALIGN_LOSS.FEATURES={joint_features!r} is unknown; choose from {list(JOINT_FEATURES)}"
            )
        self.vfm, self.vlm = vfm, vlm
        self.adapters = nn.ModuleList(adapters)
        self.tap_layers = tuple(tap_layers)
        self.use_checkpoint = use_checkpoint
        self.has_vfm_in_joint = joint_features == "both"
        self.has_projection = self.has_vfm_in_joint and (project_vfm or vfm.embed_dim != vlm.embed_dim)
        if self.has_projection:
            self.vfm_to_joint = nn.Linear(vfm.embed_dim, vlm.embed_dim)
        self.vfm_input = InputNorm(pixel_mean=pixel_mean, pixel_std=pixel_std, tower=vfm)
        self.vlm_input = InputNorm(pixel_mean=pixel_mean, pixel_std=pixel_std, tower=vlm)

    @property
    def patch_size(self) -> Grid:
        """Height and width in pixels of a cell of the taps."""
        return self.vlm.patch_size

    @property
    def tap_dim(self) -> int:
        """Channels of every tap."""
        return self.vfm.embed_dim + self.vlm.embed_dim

    @property
    def joint_dim(self) -> int:
        """E, width of the image-text space, or of the tokens where the VLM's place is taken by a model without one."""
        return self.vlm.joint_dim or self.vlm.embed_dim

    def forward(self, images: Tensor) -> DualFeatures:
        """Encode normalised images (N, 3, H, W)."""
        size = tuple(images.shape[-2:])
        layout = TokenLayout(
            self.vfm.grid_of(size), self.vlm.grid_of(size), self.vfm.num_prefix_tokens, self.vlm.num_prefix_tokens
        )
        with torch.no_grad():
            vfm, vfm_context = self.vfm.embed(self.vfm_input(images))
            vlm, vlm_context = self.vlm.embed(self.vlm_input(images))
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
        # Joined as tokens, so that channels lie together whatever the batch: the pyramid's kernels are faster on that.
        tokens = torch.cat([map_to_tokens(self._vfm_patches(vfm, layout)), vlm[:, layout.vlm_prefix :]], dim=2)
        return tokens_to_map(tokens, layout.vlm_grid)

    def _embed_jointly(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Both encoders summed in the image-text space, or the VLM alone: (N, 1, E) and (N, E, h, w)."""
        if not self.has_vfm_in_joint:
            tokens = self.vlm.final_norm(vlm)
        elif self.has_projection:
            tokens = self.vlm.final_norm(vlm + self._align(self.vfm_to_joint(vfm), vlm, layout))
        else:
            tokens = self.vlm.final_norm(vlm) + self._align(self.vfm.final_norm(vfm), vlm, layout)
        global_embedding, dense = joint_embeddings(self.vlm, tokens)
        return global_embedding, tokens_to_map(dense, layout.vlm_grid)

    def _align(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> Tensor:
        """VFM tokens laid out like the VLM's: class token on class token, patches on patches, nothing on registers."""
        patches = map_to_tokens(self._vfm_patches(vfm, layout))
        prefix = vlm.new_zeros(len(vlm), layout.vlm_prefix, vfm.shape[2])
        if self.vfm.has_class_token and self.vlm.has_class_token:
            prefix = torch.cat([vfm[:, :1], prefix[:, 1:]], dim=1)
        return torch.cat([prefix.to(patches.dtype), patches], dim=1)
