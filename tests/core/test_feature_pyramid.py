"""The four scales of the pyramid, and folding a projection into its deconvolutions."""

import pytest
import torch
from torch import nn

from mfuser_d2.core.feature_pyramid import FeaturePyramid, PendingUpsample


def taps(height: int = 5, width: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 8, height, width) for _ in range(4)]


@pytest.mark.parametrize(("height", "width"), [(5, 6), (2, 9)])
def test_scales(height, width):
    maps = FeaturePyramid(dim=8)(taps(height, width))
    assert [tuple(m.shape[-2:]) for m in maps] == [
        (4 * height, 4 * width),
        (2 * height, 2 * width),
        (height, width),
        (height // 2, width // 2),
    ]


def test_each_scale_has_its_own_tap():
    pyramid, given = FeaturePyramid(dim=8).eval(), taps()
    before = pyramid(given)
    for index in range(4):
        changed = pyramid([tap + 1 if i == index else tap for i, tap in enumerate(given)])
        assert [not torch.equal(a, b) for a, b in zip(before, changed)] == [i == index for i in range(4)]


def test_third_is_the_tap_and_fourth_its_maxima():
    given = taps(4, 6)
    maps = FeaturePyramid(dim=8)(given)
    assert maps[2] is given[2]
    assert maps[3][0, 3, 1, 2] == given[3][0, 3, 2:4, 4:6].max()


def test_batch_statistics_in_training_running_ones_in_evaluation():
    pyramid = FeaturePyramid(dim=8)
    pyramid.train()(taps())
    assert pyramid.up4[1].num_batches_tracked == 1
    pyramid.eval()(taps())
    assert pyramid.up4[1].num_batches_tracked == 1


@pytest.mark.parametrize("bias", [True, False])
def test_folded_projection_gives_the_same_values_and_gradients(bias):
    pyramid, conv = FeaturePyramid(dim=8).double(), nn.Conv2d(8, 5, 1, bias=bias).double()
    given = [tap.double().requires_grad_() for tap in taps()]
    results = []
    for is_pending in (False, True):
        scale = pyramid(given, is_pending=is_pending)[1]
        assert isinstance(scale, PendingUpsample) is is_pending
        out = scale.project(conv) if is_pending else conv(scale)
        parameters = [*conv.parameters(), pyramid.up2.weight, pyramid.up2.bias, given[1]]
        results.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
    for plain, folded in zip(*results):
        torch.testing.assert_close(plain, folded)


def test_pending_map_can_be_made_after_all():
    pyramid, given = FeaturePyramid(dim=8).eval(), taps()
    pending = pyramid(given, is_pending=True)
    assert torch.equal(pending[0].resolve(), pyramid(given)[0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="takes 4 taps, got 3"):
        FeaturePyramid(dim=8)(taps()[:3])
    with pytest.raises(ValueError, match="patch grid of 1x6 cannot be halved"):
        FeaturePyramid(dim=8)(taps(1, 6))
