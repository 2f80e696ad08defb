import pytest
import torch

from mfuser_d2.core.ops.point_sampling import choose_uncertain_points, point_sample


def test_pixel_centres_read_pixels_and_outside_reads_zero():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    centres = [((x + 0.5) / 4, (y + 0.5) / 3) for y in range(3) for x in range(4)]
    points = torch.tensor([[*centres, (-0.5, 0.5), (0.5, 1.4)]])
    torch.testing.assert_close(point_sample(maps, points)[0, 0], torch.cat((maps.flatten(), torch.zeros(2))))


def test_between_pixels_is_bilinear_and_differentiable():
    maps = torch.tensor([[[[0.0, 4.0], [8.0, 20.0]]]], requires_grad=True)
    value = point_sample(maps, torch.tensor([[[0.5, 0.5]]]))
    assert value.item() == pytest.approx(8.0)
    value.sum().backward()
    torch.testing.assert_close(maps.grad, torch.full_like(maps, 0.25))


class Recorder:
    """Stands in for torch.rand and remembers what it gave out."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def __call__(self, shape):
        self.given.append(torch.rand(shape))
        return self.given[-1]


def test_draws_per_prediction_in_order():
    rand = Recorder()
    choose_uncertain_points(
        torch.randn(2, 3, 4, 5), num_points=8, oversample_ratio=3.0, importance_ratio=0.75, rand=rand
    )
    assert [tuple(x.shape) for x in rand.given] == [(3, 24, 2), (3, 2, 2)] * 2


def test_keeps_the_least_certain_candidates_and_appends_the_rest():
    logits, rand = torch.randn(2, 3, 4, 5), Recorder()
    points = choose_uncertain_points(logits, num_points=8, oversample_ratio=3.0, importance_ratio=0.75, rand=rand)
    assert points.shape == (2, 3, 8, 2)
    for prediction in range(2):
        candidates, free = rand.given[2 * prediction : 2 * prediction + 2]
        certainty = point_sample(logits[prediction][:, None], candidates)[:, 0].abs()
        for mask in range(3):
            wanted = candidates[mask][certainty[mask].argsort()[:6]]
            got = points[prediction, mask, :6]
            assert {tuple(p) for p in got.tolist()} == {tuple(p) for p in wanted.tolist()}
        torch.testing.assert_close(points[prediction, :, 6:], free)


@pytest.mark.parametrize(("ratio", "shapes"), [(1.0, [(1, 8, 2)]), (0.0, [(1, 8, 2), (1, 4, 2)])])
def test_all_by_uncertainty_or_none(ratio, shapes):
    rand = Recorder()
    points = choose_uncertain_points(
        torch.randn(1, 1, 3, 3), num_points=4, oversample_ratio=2.0, importance_ratio=ratio, rand=rand
    )
    assert points.shape == (1, 1, 4, 2)
    assert [tuple(x.shape) for x in rand.given] == shapes


def test_no_gradient_flows_through_the_choice():
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    points = choose_uncertain_points(logits, num_points=4, oversample_ratio=2.0, importance_ratio=0.5)
    assert not points.requires_grad
    assert 0 <= points.min() and points.max() < 1


def test_non_finite_logits_still_give_points():
    logits = torch.full((1, 1, 3, 3), float("nan"))
    points = choose_uncertain_points(logits, num_points=4, oversample_ratio=2.0, importance_ratio=0.5)
    assert points.isfinite().all()
