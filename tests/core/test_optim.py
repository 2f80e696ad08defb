import pytest
import torch
from torch import nn

from mfuser_d2.core.optim import is_undecayed, linear_lr, parameter_groups, poly_lr


def network() -> nn.Module:
    model = nn.Module()
    model.norm1 = nn.LayerNorm(2)
    model.text_proj = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 3))
    model.query_embed = nn.Embedding(4, 2)
    model.level_encoding = nn.Embedding(3, 2)
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    return model


def test_groups_hold_every_trained_parameter_once():
    groups = parameter_groups(network(), base_lr=0.1, weight_decay=0.01)
    names = {group["weight_decay"]: group["param_names"] for group in groups}
    assert names[0.0] == ["norm1.weight", "norm1.bias", "query_embed.weight"]
    assert set(names[0.01]) == {
        "text_proj.0.weight", "text_proj.0.bias", "text_proj.1.weight", "text_proj.1.bias", "level_encoding.weight",
    }  # fmt: skip
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(("rule", "expected"), [("nothing", False), ("norms", False), ("norms_embeddings", True)])
def test_rules_differ_in_embeddings(rule: str, expected: bool):
    assert is_undecayed("head.query_embed.weight", rule) is expected
    assert is_undecayed("head.layers.0.norm1.weight", rule) is (rule != "nothing")
    assert not is_undecayed("pixel_decoder.lateral_proj.gn.weight", rule)


def test_zero_weight_decay_gives_one_group():
    assert len(parameter_groups(network(), base_lr=0.1, weight_decay=0.0)) == 1


def test_unknown_rule_lists_the_known_ones():
    with pytest.raises(KeyError, match="norms_embeddings"):
        parameter_groups(network(), base_lr=0.1, weight_decay=0.0, no_decay="biases")


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(network().requires_grad_(False), base_lr=0.1, weight_decay=0.0)


def test_linear_schedule_reaches_base_lr_and_end_lr():
    options = {"base_lr": 0.1, "max_iter": 110, "end_lr": 0.01, "warmup_iters": 10, "warmup_factor": 0.0}
    assert linear_lr(0, **options) == 0
    assert linear_lr(5, **options) == pytest.approx(0.05)
    assert linear_lr(10, **options) == 0.1
    assert linear_lr(60, **options) == pytest.approx(0.055)
    assert linear_lr(110, **options) == pytest.approx(0.01)


def test_schedules_without_warmup_start_at_base_lr():
    assert poly_lr(0, base_lr=0.1, max_iter=10, warmup_iters=0) == pytest.approx(0.1)
    assert linear_lr(0, base_lr=0.1, max_iter=10, warmup_iters=0) == pytest.approx(0.1)
