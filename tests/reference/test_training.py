"""Losses, gradients and one step of batch statistics, by replaying the random numbers of the release."""

import re
from collections.abc import Callable

import pytest
import torch

from mfuser_d2.core.official import EMPTY_KEYS, to_official
from mfuser_d2.core.segmenter import Segmenter

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
STATISTICS_TOLERANCE = 1e-5
NOISE_LIMIT, NOISY_SHARE = 1e-2, 0.2
IGNORE = 255

Tensors = dict[str, torch.Tensor]


class Run:
    """Losses and gradients of the recorded batch in one of the recorded settings."""

    def __init__(self, tiny, replay, *, train: bool, ignore_image0: bool = False, dtype: torch.dtype = torch.float32):
        self.model: Segmenter = tiny.build().train(train).to(dtype)
        labels = tiny.shared["train.gt_semantic_seg"][:, 0].long()
        shapes = tiny.facts["rand_call_shapes"]
        if ignore_image0:
            labels = labels.clone()
            labels[0] = IGNORE
            shapes = tiny.facts["losses"]["eval_mode_image0_all_ignored_rand_shapes"]
        # One generator fed every setting, so a shorter list of draws is the start of the same stream of numbers.
        stream = torch.cat([v.flatten() for k, v in sorted(tiny.shared.items()) if k.startswith("train.rand.")])
        rand = replay.of_stream(stream, shapes, len(labels))
        output = self.model.predict_all(tiny.shared["in.image"].to(dtype))
        self.losses = self.model.criterion(*output, labels, rand=rand)
        assert rand.is_used_up()
        sum(self.losses.values()).backward()
        names, parameters = tiny.official_names(self.model), dict(self.model.named_parameters())
        self.gradients = {key: parameters[name].grad for key, name in names.items()}


@pytest.fixture(scope="module")
def runs(tiny, replay):
    """Runs by setting, made when first asked for."""
    made: dict[tuple, Run] = {}

    def get(**setting) -> Run:
        key = tuple(sorted(setting.items(), key=str))
        if key not in made:
            made[key] = Run(tiny, replay, **setting)
        return made[key]

    return get


@pytest.fixture
def compare_losses(tiny, check, official_losses):
    def compare(losses: Tensors, recorded: dict[str, float]) -> None:
        got = official_losses(losses)
        wanted = {key: value for key, value in recorded.items() if key != "loss" and "acc_seg" not in key}
        assert set(got) == set(wanted)
        for key, value in wanted.items():
            check(key.rsplit(".", 1)[1], got[key], value, LOSS_TOLERANCE, group=tiny.variant)
        check("total loss", sum(got.values()), recorded["loss"], LOSS_TOLERANCE, group=tiny.variant)

    return compare


def test_losses_in_eval_mode(tiny, runs, compare_losses):
    compare_losses(runs(train=False).losses, tiny.facts["losses"]["eval_mode"])


def test_losses_in_training_mode(tiny, runs, compare_losses):
    """Batch statistics instead of running ones; nothing dropped."""
    compare_losses(runs(train=True).losses, tiny.facts["losses"]["train_mode_nodropout"])


def test_losses_with_an_image_without_labels(tiny, runs, compare_losses):
    recorded = tiny.facts["losses"]["eval_mode_image0_all_ignored"]
    compare_losses(runs(train=False, ignore_image0=True).losses, recorded)


def compare_gradients(stage, tiny, check, got: Tensors, wanted: Tensors, exact: Callable[[], Tensors]) -> None:
    """Each within 1e-4 of its largest value, save for the rounding noise of the float32 that was recorded.

    What noise is, our own gradients in float64 tell: sums that cancel (`adapter.*.scale`, the bias in front of the
    batch norm), and all that lies behind a single hidden unit so near to zero that rounding decides whether ReLU lets
    it through (clip: 4e-7 in a unit of the first pixel encoder layer, which the recorded float32 run has on the other
    side). Noise may excuse a hundredth of the largest value among a gradient's like at most, and few gradients.
    """
    noisy = {}
    for key, value in wanted.items():
        error = (got[key] - value).abs().max().item()
        if error > GRADIENT_TOLERANCE * value.abs().max().item():
            noisy[key] = error
        else:
            check(stage, got[key], value, GRADIENT_TOLERANCE, group=tiny.variant)
    assert len(noisy) <= NOISY_SHARE * len(wanted), sorted(noisy)
    true = exact() if noisy else {}
    for key, error in noisy.items():
        noise = max((value - true[key]).abs().max().item() for value in (got[key], wanted[key]))
        like = max(value.abs().max().item() for other, value in wanted.items() if pattern(other) == pattern(key))
        assert error <= min(2 * noise, NOISE_LIMIT * like), f"{stage}, {key}: {error:.1e} apart, noise {noise:.1e}"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gradient_norm_of_every_parameter(tiny, runs, check, train):
    mode = "train_mode_nodropout" if train else "eval_mode"
    recorded = tiny.facts["losses"][f"{mode}_grad_norm"]
    wanted = {key: torch.tensor(norm).double() for key, norm in recorded.items() if norm is not None}
    got = norms(runs(train=train).gradients)
    assert set(got) == set(wanted)
    compare_gradients(
        f"gradient norms, {'train' if train else 'eval'} mode",
        tiny,
        check,
        got,
        wanted,
        lambda: norms(runs(train=train, dtype=torch.float64).gradients),
    )


def norms(gradients: Tensors) -> Tensors:
    return {key: gradient.double().norm() for key, gradient in gradients.items()}


def pattern(key: str) -> str:
    return re.sub(r"\d+", "*", key)


def test_parameters_without_gradient_are_those_that_carry_nothing(tiny):
    recorded = tiny.facts["losses"]["eval_mode_grad_norm"]
    unused = [key for key, norm in recorded.items() if norm is None]
    empty = EMPTY_KEYS[tiny.variant]
    assert all(any(re.fullmatch(known, key) for known in empty) for key in unused)


def test_selected_gradients(tiny, runs, check):
    prefix = "train.grad."
    recorded = {key.removeprefix(prefix): value for key, value in tiny.io.items() if key.startswith(prefix)}
    assert recorded

    def exact() -> Tensors:
        return runs(train=False, dtype=torch.float64).gradients

    compare_gradients("selected gradients", tiny, check, runs(train=False).gradients, recorded, exact)


def test_batch_statistics_after_one_step(tiny, runs, check):
    prefix = "train.after_one_step_bn."
    recorded = {key.removeprefix(prefix): value for key, value in tiny.io.items() if key.startswith(prefix)}
    assert recorded
    ours = to_official({k: v for k, v in runs(train=True).model.state_dict().items() if "pyramid" in k}, tiny.variant)
    for key, wanted in recorded.items():
        check("batch statistics", ours[key], wanted, STATISTICS_TOLERANCE, group=tiny.variant)
