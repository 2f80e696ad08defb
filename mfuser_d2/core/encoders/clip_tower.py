"""open_clip's own VisionTransformer (CLIP and its relatives) as a vision tower."""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mfuser_d2.core.encoders.tower import VisionTower
from mfuser_d2.core.ops.grid import Grid, map_to_tokens, resample_kernel, resample_positions


class ClipTower(VisionTower):
    """Drives the parts of an open_clip ViT at any image size.

    Args:
        model: the vision half, with a learned position table and no attention pooling.
        pixel_mean, pixel_std: RGB normalisation on the 0..255 scale.
        resample_mode: how positions and kernels are resized; the release resizes CLIP bilinearly.
    """

    has_class_token = True

    def __init__(
        self,
        *,
        model: VisionTransformer,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        resample_mode: str = "bilinear",
    ) -> None:
        if model.attn_pool is not None:
            raise ValueError("open_clip ViTs with attention pooling (CoCa) are not supported; choose a plain CLIP ViT")
        super().__init__(
            embed_dim=model.conv1.out_channels,
            depth=len(model.transformer.resblocks),
            patch_size=tuple(model.patch_size),
            num_prefix_tokens=1,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.model = model
        self.native_grid: Grid = tuple(model.grid_size)
        self.resample_mode = resample_mode
        self.joint_dim = model.output_dim
        self.freeze()

    def set_geometry(
        self, *, grid: Grid | None = None, patch_size: Grid | None = None, mode: str | None = None
    ) -> None:
        mode = mode or self.resample_mode
        model = self.model
        if grid is not None:
            rows = resample_positions(model.positional_embedding, self.native_grid, grid, num_prefix=1, mode=mode)
            model.positional_embedding = nn.Parameter(rows, requires_grad=False)
            self.native_grid = grid
        if patch_size is not None and tuple(patch_size) != self.patch_size:
            kernel = resample_kernel(model.conv1.weight, patch_size, mode)
            model.conv1.weight = nn.Parameter(kernel, requires_grad=False)
            model.conv1.kernel_size = model.conv1.stride = self.patch_size = tuple(patch_size)

    def embed(self, images: Tensor) -> tuple[Tensor, None]:
        model = self.model
        grid = self.grid_of(images.shape[-2:])
        patches = map_to_tokens(model.conv1(images))  # (N, h*w, C)
        class_token = model.class_embedding.expand(len(images), 1, -1)
        positions = resample_positions(
            model.positional_embedding, self.native_grid, grid, num_prefix=1, mode=self.resample_mode
        )
        return model.ln_pre(torch.cat([class_token, patches], dim=1) + positions), None

    def run_block(self, index: int, tokens: Tensor, context: None) -> Tensor:
        return self.model.transformer.resblocks[index](tokens)

    def final_norm(self, tokens: Tensor) -> Tensor:
        return self.model.ln_post(tokens)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        joint = tokens @ self.model.proj
        return joint[:, :1], joint[:, 1:]
