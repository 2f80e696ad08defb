import math

import pytest
import torch

from mfuser_d2.core.ops.deformable_attention import (
    MultiScaleDeformableAttention,
    _look_up,
    _sample_maps,
    deformable_attention,
)
from mfuser_d2.core.ops.triton_support import triton_obstacle

SHAPES = [(2, 3), (5, 4), (1, 1)]
TOKENS = 6 + 20 + 1


def bilinear(level: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value of a map (h, w, d) at (x, y), 0..1, with zeros around it, one corner after the other."""
    height, width, dim = level.shape
    column, row = x * width - 0.5, y * height - 0.5
    out = level.new_zeros(dim)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                out += (1 - abs(row - i)) * (1 - abs(column - j)) * level[i, j]
    return out


def one_by_one(value, locations, weights):
    batch, _, heads, dim = value.shape
    out = value.new_zeros(batch, locations.shape[1], heads, dim)
    for n, q, head, level, point in torch.cartesian_prod(*(torch.arange(s) for s in weights.shape)).tolist():
        start = sum(h * w for h, w in SHAPES[:level])
        height, width = SHAPES[level]
        grid = value[n, start : start + height * width, head].view(height, width, dim)
        x, y = locations[n, q, head, level, point].tolist()
        out[n, q, head] += weights[n, q, head, level, point] * bilinear(grid, x, y)
    return out.flatten(2)


def make(num_queries: int = 4, heads: int = 2, dim: int = 3, points: int = 2):
    value = torch.randn(2, TOKENS, heads, dim, dtype=torch.float64)
    # A fifth of the way around the map lies outside it.
    locations = torch.rand(2, num_queries, heads, len(SHAPES), points, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.randn(2, num_queries, heads, len(SHAPES), points, dtype=torch.float64)
    return value, locations, weights


def test_matches_sampling_one_by_one():
    value, locations, weights = make()
    out = deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(out, one_by_one(value, locations, weights))


@pytest.mark.parametrize("path", [_look_up, _sample_maps])
def test_gradients_of_values_locations_and_weights(path):
    inputs = [x.requires_grad_() for x in make(num_queries=2, dim=2)]
    assert torch.autograd.gradcheck(lambda v, x, w: path(v, SHAPES, x, w), inputs)


def test_both_plain_paths_agree():
    value, locations, weights = (x.float() for x in make(num_queries=50))
    case = value, SHAPES, locations, weights
    torch.testing.assert_close(_look_up(*case), _sample_maps(*case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [math.nan, 1e30, -1e30, math.inf])
def test_places_that_are_no_place_read_nothing_outside(place):
    value, locations, weights = (x.float() for x in make())
    locations[0, 0] = place
    out = _look_up(value, SHAPES, locations, weights)
    assert not out[0, 0].isfinite().all() or not out[0, 0].any()
    torch.testing.assert_close(out[1], _look_up(value[1:], SHAPES, locations[1:], weights[1:])[0])


def test_half_precision_values_are_sampled_at_full_precision_places():
    value, locations, weights = (x.float() for x in make())
    out = deformable_attention(value.bfloat16(), SHAPES, locations, weights.bfloat16())
    assert out.dtype == torch.bfloat16
    wanted = deformable_attention(value.bfloat16().float(), SHAPES, locations, weights.bfloat16().float())
    torch.testing.assert_close(out, wanted.bfloat16())


def test_refuses_levels_that_do_not_fill_the_tokens():
    value, locations, weights = make()
    with pytest.raises(ValueError, match="27 tokens.*need 26"):
        deformable_attention(value, [(2, 3), (5, 4), (0, 1)], locations, weights)


def test_module_adds_offsets_in_pixels_of_each_level():
    attention = MultiScaleDeformableAttention(dim=6, num_heads=2, num_levels=3, num_points=2).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    query, value = torch.randn(2, 4, 6).double(), torch.randn(2, TOKENS, 6).double()
    reference = torch.rand(4, 2).double()
    offsets = attention.sampling_offsets(query).view(2, 4, 2, 3, 2, 2)
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(SHAPES):
        locations[..., level, :, 0] = reference[:, None, None, 0] + offsets[..., level, :, 0] / width
        locations[..., level, :, 1] = reference[:, None, None, 1] + offsets[..., level, :, 1] / height
    # One softmax over all levels and points of a head.
    weights = attention.attention_weights(query).view(2, 4, 2, 6).softmax(-1).view(2, 4, 2, 3, 2)
    wanted = attention.output_proj(one_by_one(attention.value_proj(value).view(2, TOKENS, 2, 3), locations, weights))
    torch.testing.assert_close(attention(query, value, reference, SHAPES), wanted)


def test_module_starts_on_rings_with_equal_weights():
    attention = MultiScaleDeformableAttention(dim=16, num_heads=4, num_levels=2, num_points=3)
    offsets = attention.sampling_offsets.bias.view(4, 2, 3, 2)
    directions = torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
    for point in range(3):
        wanted = (point + 1) * directions[:, None].expand(-1, 2, -1)
        torch.testing.assert_close(offsets[:, :, point], wanted, atol=1e-6, rtol=0)
    for constant in (attention.sampling_offsets.weight, *attention.attention_weights.parameters()):
        assert not constant.any()
    bound = math.sqrt(6 / 32)
    for layer in (attention.value_proj, attention.output_proj):
        assert not layer.bias.any()
        assert 0.9 * bound < layer.weight.abs().max() <= bound


def test_module_runs_under_autocast():
    attention = MultiScaleDeformableAttention(dim=8, num_heads=2, num_levels=3, num_points=2)
    query, value, reference = torch.randn(1, 4, 8), torch.randn(1, TOKENS, 8), torch.rand(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(query, value, reference, SHAPES)
    torch.testing.assert_close(out.float(), attention(query, value, reference, SHAPES), atol=0.03, rtol=0.03)


def test_module_refuses_bad_sizes():
    with pytest.raises(ValueError, match="num_heads=3"):
        MultiScaleDeformableAttention(dim=8, num_heads=3)
    attention = MultiScaleDeformableAttention(dim=8, num_heads=2, num_levels=3)
    with pytest.raises(ValueError, match="got 2 levels"):
        attention(torch.randn(1, 4, 8), torch.randn(1, 26, 8), torch.rand(4, 2), SHAPES[:2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_triton_equals_plain(dtype, tolerance):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    obstacle = triton_obstacle(torch.empty(0, device=device))
    if obstacle:
        pytest.skip(f"the kernel does not run here: {obstacle}")
    value, locations, weights = (x.to(device) for x in make(num_queries=5))
    locations[0, 0, 0, 0, 0], locations[0, 1, 0, 0, 0] = math.nan, 1e30
    rounded = [x.to(kind) for x, kind in ((value, dtype), (locations, torch.float32), (weights, dtype))]
    case = [x.clone().requires_grad_() for x in rounded]
    wide = [x.double().requires_grad_() for x in rounded]
    got = deformable_attention(case[0], SHAPES, *case[1:])
    wanted = deformable_attention(wide[0], SHAPES, *wide[1:])
    assert got.dtype == dtype
    broken = wanted.isnan()
    wanted = wanted.nan_to_num()
    assert (got.nan_to_num().double() - wanted).abs()[~broken].max() < tolerance * wanted.abs().max()
    seed = torch.randn_like(wanted).masked_fill(broken, 0)
    grads = torch.autograd.grad(got, case, seed.to(dtype))
    exact = torch.autograd.grad(wanted, wide, seed.to(dtype).double())
    for mine, theirs in zip(grads, exact, strict=True):
        sound = ~(theirs.isnan() | mine.isnan())
        assert sound.float().mean() > 0.9
        assert (mine.double() - theirs)[sound].abs().max() < tolerance * theirs[sound].abs().max()
