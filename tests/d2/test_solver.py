import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from mfuser_d2.core.optim import linear_lr, poly_lr  # noqa: E402
from mfuser_d2.d2.config import load_config  # noqa: E402
from mfuser_d2.d2.solver import build_clip, build_lr_scheduler, build_optimizer  # noqa: E402


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.norm = nn.LayerNorm(2)
    model[0].weight.requires_grad_(False)
    return model


def configured(*opts: str):
    return load_config("", opts)


def rates(cfg, count: int) -> list[float]:
    optimizer = build_optimizer(cfg, network())
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[-1]["lr"])
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        optimizer.step()
        scheduler.step()
    return found


def test_optimizer_is_the_adamw_of_the_release():
    optimizer = build_optimizer(configured(), network())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    by_decay = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert by_decay == {1e-5: 3, 0.0: 2}


def test_default_scheduler_steps_through_the_schedule_of_the_release():
    cfg = configured("SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "10")
    expected = [poly_lr(i, base_lr=1e-4, max_iter=40, warmup_iters=10) for i in range(40)]
    assert rates(cfg, 40) == pytest.approx(expected, rel=1e-12)


def test_linear_scheduler_of_the_paper():
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupLinearLR", "SOLVER.BASE_LR_END", "0.0")
    cfg = configured("SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "10", *opts)
    expected = [linear_lr(i, base_lr=1e-4, max_iter=40, end_lr=0.0, warmup_iters=10) for i in range(40)]
    assert rates(cfg, 40) == pytest.approx(expected, rel=1e-9)
    assert max(expected) == 1e-4


def test_full_size_schedule_is_exact_inside_detectron2(reference_dir):
    import json

    cfg = configured()
    recorded = json.loads((reference_dir / "training_reference.json").read_text())["lr_schedule_base_1e-4"]
    multiplier = build_lr_scheduler(cfg, build_optimizer(cfg, network()))._multiplier
    for iteration, expected in recorded.items():
        assert 1e-4 * multiplier(int(iteration) / 20000) == pytest.approx(expected, rel=1e-9), iteration


def test_scheduler_goes_on_after_loading_its_state():
    cfg = configured("SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "10")
    optimizer = build_optimizer(cfg, network())
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(17):
        optimizer.step()
        scheduler.step()
    other = build_optimizer(cfg, network())
    resumed = build_lr_scheduler(cfg, other)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]["lr"] == poly_lr(17, base_lr=1e-4, max_iter=40, warmup_iters=10)
    other.step()
    resumed.step()
    assert other.param_groups[0]["lr"] == pytest.approx(poly_lr(18, base_lr=1e-4, max_iter=40, warmup_iters=10))


def gradients_after(*opts: str) -> list[torch.Tensor]:
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.full((4,), 3.0), torch.tensor([8.0])
    clip = build_clip(configured("SOLVER.CLIP_GRADIENTS.ENABLED", "True", *opts))
    clip(parameters)
    return [parameter.grad for parameter in parameters]


def test_clipping_is_off_by_default():
    assert build_clip(configured()) is None


@pytest.mark.parametrize(
    ("clip_type", "expected"),
    [("value", [[2.0] * 4, [2.0]]), ("norm", [[1.0] * 4, [2.0]]), ("full_model", [[0.6] * 4, [1.6]])],
)
def test_clipping_bounds_what_its_type_says(clip_type: str, expected: list[list[float]]):
    opts = ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "2.0")
    for gradient, values in zip(gradients_after(*opts), expected):
        assert gradient.tolist() == pytest.approx(values, rel=1e-5)


def test_unknown_clip_type_lists_the_known_ones():
    with pytest.raises(KeyError, match="full_model"):
        gradients_after("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "model")


def test_unknown_schedule_lists_the_known_ones():
    cfg = configured("SOLVER.LR_SCHEDULER_NAME", "Cosine")
    with pytest.raises(KeyError, match="WarmupLinearLR"):
        build_lr_scheduler(cfg, build_optimizer(configured(), network()))
