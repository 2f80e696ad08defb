"""Sampling maps at points, and choosing the points where a mask is least certain."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Rand = Callable[[tuple[int, ...]], Tensor]


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps at given points.

    Args:
        maps: (N, C, h, w), floating point.
        points: (N, P, 2), (x, y), 0..1 over the whole map (a pixel's centre lies at (i + 0.5) / w); outside reads 0.
    Returns:
        (N, C, P).
    """
    grid = (2 * points - 1)[:, :, None].to(maps.dtype)  # (N, P, 1, 2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


@torch.no_grad()
def choose_uncertain_points(
    logits: Tensor, *, num_points: int, oversample_ratio: float, importance_ratio: float, rand: Rand | None = None
) -> Tensor:
    """Points at which to compare masks: most of them where the logit is nearest to 0, the rest anywhere.

    `int(num_points * oversample_ratio)` candidates are drawn uniformly; the `int(num_points * importance_ratio)`
    most uncertain of them are kept and the remainder is drawn afresh. No gradient flows through the choice.

    Args:
        logits: (L, M, h, w), M masks in each of L predictions.
        num_points: P, points per mask.
        oversample_ratio: candidates per point, at least 1.
        importance_ratio: share of points that are chosen by uncertainty, 0..1.
        rand: `rand(shape)` gives uniform numbers in [0, 1) and stands in for `torch.rand`. Per prediction, in order, it
            is asked for the candidates (M, candidates, 2) and then, where any are left over, for the rest (M, rest, 2).
    Returns:
        (L, M, P, 2), (x, y), 0..1.
    """
    num_predictions, num_masks, height, width = logits.shape
    num_candidates, num_chosen = int(num_points * oversample_ratio), int(num_points * importance_ratio)
    num_free = num_points - num_chosen
    draw = rand or (lambda shape: torch.rand(shape, device=logits.device))
    candidates, free = [], []
    for _ in range(num_predictions):
        candidates.append(draw((num_masks, num_candidates, 2)))
        free.append(draw((num_masks, num_free, 2)) if num_free else logits.new_zeros(num_masks, 0, 2))
    points = torch.stack(candidates).to(logits).flatten(0, 1)  # (L*M, candidates, 2)
    values = point_sample(logits.reshape(-1, 1, height, width), points).squeeze(1)
    nearest = values.abs().topk(num_chosen, dim=1, largest=False, sorted=False).indices
    chosen = points.gather(1, nearest[..., None].expand(-1, -1, 2))
    points = torch.cat((chosen, torch.stack(free).to(logits).flatten(0, 1)), dim=1)
    return points.unflatten(0, (num_predictions, num_masks))
