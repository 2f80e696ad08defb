"""Pixel decoder: deformable self-attention over three scales, each layer also attending to the class texts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.attention import FeedForward, MultiHeadAttention
from mfuser_d2.core.feature_pyramid import PendingUpsample
from mfuser_d2.core.ops.deformable_attention import MultiScaleDeformableAttention
from mfuser_d2.core.position_encoding import sine_position_encoding

NUM_GROUPS = 32
NUM_LEVELS = 3


class ConvGroupNorm(nn.Module):
    """Convolution that keeps the map's size, then group norm in groups of `dim / 32` channels.

    Args:
        in_dim: channels in.
        dim: channels out, a multiple of 32.
        kernel_size: odd kernel size in pixels.
        has_bias: whether the convolution has a bias.
    """

    def __init__(self, *, in_dim: int, dim: int, kernel_size: int = 1, has_bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, padding=kernel_size // 2, bias=has_bias)
        self.gn = nn.GroupNorm(NUM_GROUPS, dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if has_bias:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor | PendingUpsample) -> Tensor:
        """(N, in_dim, h, w) to (N, dim, h, w); a deconvolution that is still pending is folded into a 1x1 kernel."""
        return self.gn(x.project(self.conv) if isinstance(x, PendingUpsample) else self.conv(x))


class PixelEncoderLayer(nn.Module):
    """Deformable self-attention, attention to the class texts, feed-forward; a layer norm after each residual.

    Args:
        dim: token width C.
        num_heads: heads of both attentions.
        num_points: deformable samples per head and level.
        ffn_dim: hidden width of the feed-forward block.
    """

    def __init__(self, *, dim: int, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(
            dim=dim, num_heads=num_heads, num_levels=NUM_LEVELS, num_points=num_points
        )
        self.cross_attn = MultiHeadAttention(dim=dim, num_heads=num_heads)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        texts: Tensor,
        text_positions: Tensor,
    ) -> Tensor:
        """Refine the tokens of all levels.

        Args:
            tokens: (N, T, C).
            positions: (T, C), added to the queries of both attentions, never to values.
            reference_points: (T, 2), (x, y), 0..1.
            spatial_shapes: (height, width) per level.
            texts: (N, K, C).
            text_positions: (K, C), added to the keys of the attention to texts.
        Returns:
            (N, T, C).
        """
        tokens = self.norm1(tokens + self.self_attn(tokens + positions, tokens, reference_points, spatial_shapes))
        tokens = self.norm2(tokens + self.cross_attn(tokens + positions, texts + text_positions, texts))
        return self.norm3(tokens + self.ffn(tokens))


class PixelDecoder(nn.Module):
    """High-resolution mask features and three refined maps from a four-level feature pyramid.

    Args:
        in_dims: channels of the four pyramid maps, high to low resolution; they may differ.
        feature_dim: width C of everything inside; a multiple of 32, of 4 and of `num_heads`.
        mask_dim: channels of the mask features.
        text_dim: width E of the class texts.
        num_classes: K, number of class texts.
        num_layers: encoder layers.
        num_heads: heads of both attentions.
        num_points: deformable samples per head and level.
        ffn_dim: hidden width of the feed-forward blocks.
    Raises:
        ValueError: not four `in_dims`, or a `feature_dim` that cannot be divided as needed.
    """

    def __init__(
        self,
        *,
        in_dims: Sequence[int],
        feature_dim: int = 256,
        mask_dim: int = 256,
        text_dim: int,
        num_classes: int,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 2048,
    ) -> None:
        super().__init__()
        if len(in_dims) != NUM_LEVELS + 1:
            raise ValueError(f"in_dims={list(in_dims)} has to name {NUM_LEVELS + 1} widths, high to low resolution")
        if feature_dim % NUM_GROUPS:
            raise ValueError(f"feature_dim={feature_dim} has to be a multiple of {NUM_GROUPS} (group norm)")
        self.num_classes = num_classes
        # Low to high resolution, as everything below: level 0 is the smallest map.
        self.input_projs = nn.ModuleList(
            ConvGroupNorm(in_dim=in_dim, dim=feature_dim, has_bias=True) for in_dim in reversed(in_dims[1:])
        )
        self.level_encoding = nn.Embedding(NUM_LEVELS, feature_dim)
        self.text_proj = nn.Linear(text_dim, feature_dim)
        self.text_pos_embed = nn.Embedding(num_classes, feature_dim)
        self.encoder_layers = nn.ModuleList(
            PixelEncoderLayer(dim=feature_dim, num_heads=num_heads, num_points=num_points, ffn_dim=ffn_dim)
            for _ in range(num_layers)
        )
        self.post_norm = nn.LayerNorm(feature_dim)
        self.lateral_proj = ConvGroupNorm(in_dim=in_dims[0], dim=feature_dim)
        self.output_proj = ConvGroupNorm(in_dim=feature_dim, dim=feature_dim, kernel_size=3)
        self.mask_proj = nn.Conv2d(feature_dim, mask_dim, 1)

    def forward(
        self, features: Sequence[Tensor | PendingUpsample], texts: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Refine the pyramid with the help of the class texts.

        Args:
            features: four maps (N, C_i, h_i, w_i), high to low resolution, of any size; the pyramid may leave its last
                deconvolutions pending.
            texts: (N, K, E), refined class texts, not normalised.
        Returns:
            mask features (N, mask_dim, h_0, w_0), and three memories (N, C, h, w), low to high resolution.
        Raises:
            ValueError: the number of maps or texts is another than at construction.
        """
        if len(features) != NUM_LEVELS + 1:
            raise ValueError(f"got {len(features)} feature maps, wanted {NUM_LEVELS + 1}, high to low resolution")
        if texts.shape[1] != self.num_classes:
            raise ValueError(f"got {texts.shape[1]} class texts, this decoder was built for {self.num_classes}")
        memories = self._encode(features[:0:-1], self.text_proj(texts))
        lateral = self.lateral_proj(features[0])
        upsampled = F.interpolate(memories[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_proj(F.relu(self.output_proj(lateral + upsampled))), memories

    def _encode(self, features: Sequence[Tensor], texts: Tensor) -> list[Tensor]:
        """Run the encoder over three maps, low to high resolution, and give them back refined."""
        maps = [proj(feature) for proj, feature in zip(self.input_projs, features, strict=True)]
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (N, T, C)
        dim, like = tokens.shape[2], {"device": tokens.device, "dtype": tokens.dtype}
        positions = torch.cat(
            [
                sine_position_encoding(shape, dim, **like) + level
                for shape, level in zip(shapes, self.level_encoding.weight, strict=True)
            ]
        )
        points = torch.cat([_cell_centres(shape, tokens) for shape in shapes])
        for layer in self.encoder_layers:
            tokens = layer(tokens, positions, points, shapes, texts, self.text_pos_embed.weight)
        levels = self.post_norm(tokens).split([height * width for height, width in shapes], dim=1)
        return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(levels, shapes, strict=True)]


def _cell_centres(shape: tuple[int, int], like: Tensor) -> Tensor:
    """(x, y) of the centre of each cell, 0..1, (h*w, 2), row-major; never narrower than float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    y, x = ((torch.arange(length, device=like.device, dtype=dtype) + 0.5) / length for length in shape)
    return torch.stack((x.expand(shape), y[:, None].expand(shape)), dim=2).flatten(0, 1)
