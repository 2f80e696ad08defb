"""Any timm ViT (VisionTransformer or Eva family) as a vision tower: DINOv2, DINOv3, EVA02, SigLIP, PE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.encoders.tower import VisionTower
from mfuser_d2.core.ops.grid import Grid, map_to_tokens, resample_kernel, resample_positions


class TimmTower(VisionTower):
    """Drives the parts of a timm ViT: embedding at any image size, single blocks, norm, pooling head.

    Args:
        model: a timm `VisionTransformer` or `Eva` built with `dynamic_img_size=True`.
        has_joint_space: the model's head maps into an image-text space (the vision half of a VLM).
        pixel_mean, pixel_std: RGB normalisation on the 0..255 scale.
        resample_mode: "bicubic" or "bilinear", how position tables and kernels are resized when weights are loaded. An
            image of another size resizes the table bicubically in any case, as the release's towers do.
        scale_offset: see `resample_positions`; DINOv2's 0.1.
    Raises:
        ValueError: the model is not a ViT of that kind.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        has_joint_space: bool,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        resample_mode: str = "bicubic",
        scale_offset: float | None = None,
    ) -> None:
        missing = [name for name in ("patch_embed", "blocks", "norm", "num_prefix_tokens") if not hasattr(model, name)]
        if missing or not hasattr(model.patch_embed, "proj"):
            raise ValueError(
                f"{type(model).__name__} is no ViT this tower can drive (no {missing or 'patch_embed.proj'})"
            )
        super().__init__(
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            patch_size=tuple(model.patch_embed.patch_size),
            num_prefix_tokens=model.num_prefix_tokens,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.model = model
        self.has_class_token = model.cls_token is not None
        self.native_grid: Grid = tuple(model.patch_embed.grid_size)
        self.resample_mode = resample_mode
        self.scale_offset = scale_offset
        self.rope = getattr(model, "rope", None)
        self.has_rope_per_block = bool(getattr(model, "rope_mixed", False))
        if has_joint_space:
            head = model.head
            self.joint_dim = head.out_features if isinstance(head, nn.Linear) else model.embed_dim
        else:
            # A pooling head nobody calls would only take memory.
            model.head, model.fc_norm, model.attn_pool = nn.Identity(), nn.Identity(), None
        self.freeze()

    @property
    def _num_position_prefix(self) -> int:
        return 0 if self.model.no_embed_class else self.num_prefix_tokens

    def set_geometry(
        self, *, grid: Grid | None = None, patch_size: Grid | None = None, mode: str | None = None
    ) -> None:
        mode = mode or self.resample_mode
        model = self.model
        if grid is not None and model.pos_embed is not None:
            rows = resample_positions(
                model.pos_embed[0], self.native_grid, grid, num_prefix=self._num_position_prefix, mode=mode
            )
            model.pos_embed = nn.Parameter(rows[None], requires_grad=False)
        if grid is not None:
            self.native_grid = grid
        if patch_size is not None and tuple(patch_size) != self.patch_size:
            projection = model.patch_embed.proj
            projection.weight = nn.Parameter(resample_kernel(projection.weight, patch_size, mode), requires_grad=False)
            projection.kernel_size = projection.stride = tuple(patch_size)
            self.patch_size = tuple(patch_size)

    def _positions(self, grid: Grid, image_size: tuple[int, int]) -> Tensor:
        """Position table for `grid`, (1, P + h*w, C)."""
        table = self.model.pos_embed
        # DINOv2 takes its table as it is only for square images; an oblong one on the same grid is resampled too.
        if grid == self.native_grid and (self.scale_offset is None or image_size[0] == image_size[1]):
            return table
        rows = resample_positions(
            table[0],
            self.native_grid,
            grid,
            num_prefix=self._num_position_prefix,
            mode="bicubic",
            scale_offset=self.scale_offset,
        )
        return rows[None]

    def fix_image_size(self, image_size: tuple[int, int]) -> None:
        grid, model = self.grid_of(image_size), self.model
        if model.pos_embed is not None:
            model.pos_embed = nn.Parameter(self._positions(grid, image_size).detach().clone(), requires_grad=False)
        self.native_grid, self.scale_offset = grid, None

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        model = self.model
        grid = self.grid_of(images.shape[-2:])
        tokens = map_to_tokens(model.patch_embed.proj(images))  # (N, h*w, C)
        tokens = model.patch_embed.norm(tokens)
        prefix = [
            token.expand(len(tokens), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None
        ]
        positions = None if model.pos_embed is None else self._positions(grid, tuple(images.shape[-2:]))
        if positions is not None and model.no_embed_class:
            tokens = tokens + positions
        tokens = torch.cat([*prefix, tokens], dim=1)
        if positions is not None and not model.no_embed_class:
            tokens = tokens + positions
        rope = None if self.rope is None else self.rope.get_embed(shape=list(grid))
        return model.norm_pre(tokens), rope

    def run_block(self, index: int, tokens: Tensor, context: Tensor | None) -> Tensor:
        block = self.model.blocks[index]
        if context is None:
            return block(tokens)
        return block(tokens, rope=context[index] if self.has_rope_per_block else context)

    def final_norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.joint_dim is None:
            return super().project(tokens)
        model, patches = self.model, tokens[:, self.num_prefix_tokens :]
        if model.attn_pool is not None:
            # The probe pools the image; every patch pools too, as its own query, which gives the dense embedding.
            queries = model.attn_pool.latent.expand(len(tokens), -1, -1)
            pooled, dense = self._attention_pool(queries, tokens), self._attention_pool(patches, tokens)
        else:
            pooled = tokens[:, :1] if self.has_class_token and model.global_pool == "token" else patches.mean(1, True)
            dense = patches
        return model.head(model.fc_norm(pooled)), model.head(model.fc_norm(dense))

    def _attention_pool(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """The pooling head with other queries than its probe: (N, Q, C) and (N, T, C) to (N, Q, C)."""
        pool = self.model.attn_pool

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (pool.num_heads, -1)).transpose(1, 2)  # (N, heads, T, C / heads)

        keys, values = pool.kv(tokens).chunk(2, dim=-1)
        query, key = pool.q_norm(split(pool.q(queries))), pool.k_norm(split(keys))
        pooled = F.scaled_dot_product_attention(query, key, split(values))
        pooled = pool.proj(pooled.transpose(1, 2).flatten(2))
        return pooled if pool.mlp is None else pooled + pool.mlp(pool.norm(pooled))
