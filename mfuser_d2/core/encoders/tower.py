"""What every frozen image encoder offers, so that two of them can be interleaved block by block."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfuser_d2.core.ops.grid import Grid


class FrozenModule(nn.Module):
    """A module whose parameters never train and that stays in eval mode."""

    def freeze(self) -> None:
        """Turn gradients off and switch to eval mode; call once, when all submodules exist."""
        self.requires_grad_(False)
        self.train(False)

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """Keep the weights of matrix products and convolutions in `dtype`, for use under autocast to that dtype.

        Autocast would convert these very weights in every forward; the numbers stay the same, the time and half of the
        memory go. Norms, position tables and class tokens stay as they are.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                module.to(dtype)

    def train(self, mode: bool = True) -> FrozenModule:
        """Stay in eval mode, whatever `mode` asks for."""
        return super().train(False)


class VisionTower(FrozenModule):
    """A frozen ViT taken apart: embedding, single blocks, final norm, and (for a VLM) the joint projection.

    Tokens are (N, P + h*w, C): P = `num_prefix_tokens` prefix tokens (class token first, then registers), then the
    patches row by row.

    Args:
        embed_dim: C, width of the tokens.
        depth: number of blocks.
        patch_size: height and width of a patch in pixels.
        num_prefix_tokens: P.
        pixel_mean, pixel_std: this encoder's own RGB normalisation on the 0..255 scale.
    """

    has_class_token: bool
    joint_dim: int | None = None
    """Width of the image-text space; None for an encoder that has none."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        patch_size: Grid,
        num_prefix_tokens: int,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.depth = depth
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.pixel_values = (*pixel_mean, *pixel_std)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def grid_of(self, image_size: tuple[int, int]) -> Grid:
        """Patches per column and row of an image (height, width); the remainder at bottom and right is not seen.

        Raises:
            ValueError: the image is smaller than one patch.
        """
        grid = (image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1])
        if min(grid) < 1:
            raise ValueError(
                f"an image of {image_size[0]}x{image_size[1]} pixels is smaller than one "
                f"{self.patch_size[0]}x{self.patch_size[1]} patch; use larger images or crops"
            )
        return grid

    @abstractmethod
    def set_geometry(
        self, *, grid: Grid | None = None, patch_size: Grid | None = None, mode: str | None = None
    ) -> None:
        """Resample the position table to `grid` and the patch kernels to `patch_size`, once, after loading weights.

        Args:
            grid: height and width in patches; None keeps it.
            patch_size: in pixels; None keeps it.
            mode: "bicubic" or "bilinear"; None takes what the authors' release takes for this encoder.
        """

    def fix_image_size(self, image_size: tuple[int, int]) -> None:
        """Resample the position table once to what `embed` gives images of this size; for exported graphs.

        Other runtimes resample bicubically by other rules; a table that is ready needs none.
        """
        self.set_geometry(grid=self.grid_of(image_size))

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        """Patch tokens with positions, ready for block 0.

        Args:
            images: (N, 3, H, W), normalised with this tower's own mean and std.
        Returns:
            tokens (N, P + h*w, C), and whatever the blocks need besides (a rotary table, or None).
        """

    @abstractmethod
    def run_block(self, index: int, tokens: Tensor, context: Any) -> Tensor:
        """Block `index` applied to tokens (N, T, C)."""

    @abstractmethod
    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm after the last block, token by token."""

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Global and dense embedding in the image-text space.

        Args:
            tokens: (N, P + h*w, C), after `final_norm`.
        Returns:
            global (N, 1, E) and dense (N, h*w, E).
        """
        raise ValueError(
            f"{type(self).__name__} has no image-text space; use a vision-language model as MODEL.MFUSER.VLM"
        )


def joint_embeddings(tower: VisionTower, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Global (N, 1, E) and dense (N, h*w, E) embedding of tokens (N, P + h*w, C) after the final norm.

    An encoder without image-text space gives its tokens as they are: the class token, or the mean of the patches where
    it has none, and the patches; only learned queries can be compared with these.
    """
    if tower.joint_dim is not None:
        return tower.project(tokens)
    patches = tokens[:, tower.num_prefix_tokens :]
    return tokens[:, :1] if tower.has_class_token else patches.mean(dim=1, keepdim=True), patches


class InputNorm(nn.Module):
    """Images normalised for the network made images normalised for one encoder; the same tensor where nothing changes.

    Args:
        pixel_mean, pixel_std: how the images come in, RGB, 0..255 scale.
        tower: the encoder that takes them.
    """

    def __init__(self, *, pixel_mean: Sequence[float], pixel_std: Sequence[float], tower: VisionTower) -> None:
        super().__init__()
        values = {
            "mean": torch.tensor(pixel_mean, dtype=torch.float32).view(3, 1, 1),
            "std": torch.tensor(pixel_std, dtype=torch.float32).view(3, 1, 1),
            "tower_mean": tower.pixel_mean.clone(),
            "tower_std": tower.pixel_std.clone(),
        }
        for name, value in values.items():
            self.register_buffer(name, value, persistent=False)
        # Decided here, once, on plain numbers: comparing tensors would make a GPU wait, and a meta device has none.
        pairs = zip((*pixel_mean, *pixel_std), tower.pixel_values, strict=True)
        self.is_identity = all(math.isclose(ours, theirs, rel_tol=1e-5) for ours, theirs in pairs)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to the same shape."""
        return images if self.is_identity else (images * self.std + self.mean - self.tower_mean) / self.tower_std
