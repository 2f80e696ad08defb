"""Multi-scale deformable attention: one kernel each way on a GPU, plain PyTorch elsewhere."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.ops.triton_support import triton_obstacle


def deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples that each query takes from several feature maps.

    Args:
        value: (N, T, heads, C / heads), the maps of all levels, flattened row-major and concatenated.
        spatial_shapes: (height, width) of each level in the order of `value`; their areas add up to T.
        sampling_locations: (N, Q, heads, levels, points, 2), (x, y), 0..1 over the whole map; samples outside are 0.
        weights: (N, Q, heads, levels, points).
    Returns:
        (N, Q, C), in the dtype of `value`. Samples are taken in the wider dtype of `value` and the locations.
    Raises:
        ValueError: the levels' areas do not add up to T.
    """
    batch, num_tokens, num_heads, head_dim = value.shape
    areas = [height * width for height, width in spatial_shapes]
    if sum(areas) != num_tokens:
        raise ValueError(f"value has {num_tokens} tokens, but spatial_shapes {list(spatial_shapes)} need {sum(areas)}")
    if not torch.compiler.is_compiling() and triton_obstacle(value) is None and weights.dtype != torch.float64:
        from mfuser_d2.core.ops.deformable_triton import FusedDeformable

        return FusedDeformable.apply(value, spatial_shapes, sampling_locations, weights)
    # The look-up's backward is slow for small maps; and what is traced keeps to the operator that every runtime knows.
    is_trained = value.requires_grad or sampling_locations.requires_grad or weights.requires_grad
    if value.device.type == "cpu" and not (is_trained or torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return _look_up(value, spatial_shapes, sampling_locations, weights)
    return _sample_maps(value, spatial_shapes, sampling_locations, weights)


def _sample_maps(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, weights: Tensor
) -> Tensor:
    """By `grid_sample`, level by level; arguments and result as `deformable_attention`."""
    batch, _, num_heads, head_dim = value.shape
    areas = [height * width for height, width in spatial_shapes]
    num_queries = sampling_locations.shape[1]
    # Half-precision coordinates would move samples by whole pixels.
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    grids = (2 * sampling_locations - 1).to(dtype).permute(3, 0, 2, 1, 4, 5)  # (levels, N, heads, Q, points, 2)
    scales = weights.to(dtype).permute(3, 0, 2, 1, 4)  # (levels, N, heads, Q, points)
    maps = value.to(dtype).permute(0, 2, 3, 1).split(areas, dim=3)  # levels x (N, heads, C / heads, h*w)
    out = value.new_zeros(())
    for (height, width), level, grid, scale in zip(spatial_shapes, maps, grids, scales, strict=True):
        level = level.reshape(batch * num_heads, head_dim, height, width)
        samples = F.grid_sample(level, grid.flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (samples * scale.flatten(0, 1)[:, None]).sum(-1)  # (N*heads, C / heads, Q)
    return out.view(batch, num_heads * head_dim, num_queries).transpose(1, 2).to(value.dtype)


def _look_up(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, weights: Tensor
) -> Tensor:
    """By one weighted look-up of all corners of all samples; arguments and result as `deformable_attention`.

    Five times as fast as `grid_sample` on a CPU: it reads the values where they lie, and never stores a sample.
    """
    batch, num_tokens, num_heads, head_dim = value.shape
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    heights, widths = (
        torch.tensor(sides)[:, None].repeat(1, weights.shape[4]) for sides in zip(*spatial_shapes)
    )  # (levels, points) each
    left, right, left_share, right_share = _neighbours(sampling_locations[..., 0].to(dtype), widths)
    top, bottom, top_share, bottom_share = _neighbours(sampling_locations[..., 1].to(dtype), heights)
    starts = (heights * widths)[:, :1].cumsum(0, dtype=torch.int32) - (heights * widths)[:, :1].int()  # (levels, 1)
    top, bottom = (row * widths.int() + starts for row in (top, bottom))
    top_share, bottom_share = (share * weights for share in (top_share, bottom_share))
    cells = torch.stack((top + left, top + right, bottom + left, bottom + right), dim=5)
    shares = [top_share * left_share, top_share * right_share, bottom_share * left_share, bottom_share * right_share]
    # Row (n * T + t) * heads + head of the table is what head sees at cell t of image n.
    images, heads = (torch.arange(count, dtype=torch.int32).view(-1, 1, 1, 1) for count in (batch, num_heads))
    rows = (cells + images[..., None, None] * num_tokens) * num_heads + heads
    mixed = F.embedding_bag(
        rows.flatten(3).flatten(0, 2),
        value.reshape(-1, head_dim).to(dtype),
        mode="sum",
        per_sample_weights=torch.stack(shares, dim=5).flatten(3).flatten(0, 2).to(dtype),
    )  # (N*Q*heads, C / heads)
    return mixed.view(batch, -1, num_heads * head_dim).to(value.dtype)


def _neighbours(places: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two cells around each place along one axis, moved inside the map, and their shares, 0 for cells outside.

    Args:
        places: (..., levels, points), 0..1.
        sizes: (levels, points), cells of the axis.
    """
    places = places * sizes - 0.5
    first = places.floor()
    share = places - first
    near = torch.where((first >= 0) & (first < sizes), 1 - share, 0)
    far = torch.where((first >= -1) & (first < sizes - 1), share, 0)
    # Whatever a place that is no number becomes here, it ends up inside.
    cells, last = first.int(), (sizes - 1).int()
    nothing = torch.zeros_like(last)
    return cells.clamp(nothing, last), (cells + 1).clamp(nothing, last), near, far


class MultiScaleDeformableAttention(nn.Module):
    """Each query samples a few points around its own place on every level and mixes them.

    Args:
        dim: token width C.
        num_heads: number of heads; has to divide `dim`.
        num_levels: number of feature maps.
        num_points: samples per head and level.
    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, *, dim: int, num_heads: int = 8, num_levels: int = 3, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}; choose a divisor of the width")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * samples)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Start with equal weights on rings: head i looks in direction i, point j at distance j + 1 pixels."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)  # (heads, 2), on the unit square
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, value: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Sample and mix.

        Args:
            query: (N, Q, C), positional embedding included.
            value: (N, T, C), the flattened levels, without positional embedding.
            reference_points: (Q, 2) or (N, Q, 2), (x, y), 0..1 over the map, the same place on every level.
            spatial_shapes: (height, width) of each level.
        Returns:
            (N, Q, C), without the residual.
        Raises:
            ValueError: the number of levels is another than at construction, or their areas do not add up to T.
        """
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(f"got {len(spatial_shapes)} levels, this attention was built for {self.num_levels}")
        heads = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(2, (*heads, 2))  # in pixels of the level
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1).unflatten(3, heads[1:])
        # Repeated for the points, because a CPU divides rows of 2 numbers slowly.
        sizes = _level_sizes(spatial_shapes, reference_points).repeat(1, self.num_points, 1)
        locations = reference_points[..., None, None, None, :] + offsets / sizes
        value = self.value_proj(value).unflatten(2, (self.num_heads, -1))  # (N, T, heads, C / heads)
        return self.output_proj(deformable_attention(value, spatial_shapes, locations, weights))


def _level_sizes(spatial_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """(width, height) of each level, (levels, 1, 2); filled on the device, as a copy would stall the GPU's queue."""
    sides = [like.new_full((1,), side) for height, width in spatial_shapes for side in (width, height)]
    return torch.cat(sides).view(-1, 1, 2)
