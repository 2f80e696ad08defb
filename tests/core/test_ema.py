import pytest
import torch
from torch import nn

from mfuser_d2.core.ema import WeightAverage


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.BatchNorm1d(4), nn.Linear(4, 2))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model(torch.randn(5, 3))


def averaged(average: WeightAverage) -> dict[str, torch.Tensor]:
    with average.applied():
        return snapshot(average.model)


def test_average_follows_the_formula_for_weights_and_statistics() -> None:
    model = make_model()
    average, expected = WeightAverage(model, 0.3), {}
    for n in range(6):
        shake(model)
        average.update()
        factor = min(0.3, n / (n + 9)) if n else 0.0
        for key in ("2.weight", "1.running_mean"):
            expected[key] = factor * expected.get(key, 0) + (1 - factor) * model.state_dict()[key].clone()
    found = averaged(average)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
        assert not torch.allclose(found[key], model.state_dict()[key])
    assert found["1.num_batches_tracked"] == 6


def test_applied_gives_the_weights_back_also_after_an_error() -> None:
    model = make_model()
    average = WeightAverage(model, 0.9)
    average.update()
    shake(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError), average.applied():
        assert not torch.equal(model[2].weight, before["2.weight"])
        raise RuntimeError
    for key, value in snapshot(model).items():
        assert torch.equal(value, before[key]), key


def test_frozen_weights_are_not_kept() -> None:
    average = WeightAverage(make_model(), 0.9)
    average.update()
    assert not any(key.startswith("0.") for key in average.state_dict()["average"])


def test_before_the_first_update_the_average_is_the_model() -> None:
    model = make_model()
    before, average = snapshot(model), WeightAverage(model, 0.9)
    for key, value in averaged(average).items():
        assert torch.equal(value, before[key])


def test_a_resumed_average_goes_on_as_an_uninterrupted_one() -> None:
    model = make_model()
    whole = WeightAverage(model, 0.5)
    for _ in range(3):
        shake(model)
        whole.update()
    resumed = WeightAverage(model, 0.5)
    resumed.load_state_dict({key: value for key, value in whole.state_dict().items()})
    shake(model)
    whole.update()
    resumed.update()
    for key, value in averaged(whole).items():
        assert torch.equal(value, averaged(resumed)[key]), key


def test_wrong_decay_and_foreign_average_are_refused() -> None:
    with pytest.raises(ValueError, match="EMA_DECAY=1.0"):
        WeightAverage(make_model(), 1.0)
    average = WeightAverage(make_model(), 0.5)
    with pytest.raises(ValueError, match="does not fit.*keys differ"):
        average.load_state_dict({"num_updates": 1, "average": {"2.weight": torch.zeros(2, 4)}})
