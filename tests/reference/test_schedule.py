"""Learning rate and weight decay against what the release's own hook and optimizer builder gave."""

import json
import re
from pathlib import Path

import pytest
import torch

from mfuser_d2.core.official import EMPTY_KEYS, from_official
from mfuser_d2.core.optim import is_undecayed, poly_lr

RULES = {"clip": "norms", "eva02": "norms_embeddings", "siglip": "norms_embeddings"}


def test_poly_schedule_at_recorded_iterations(reference_dir: Path):
    recorded = json.loads((reference_dir / "training_reference.json").read_text())["lr_schedule_base_1e-4"]
    assert len(recorded) >= 20
    for iteration, expected in recorded.items():
        got = poly_lr(int(iteration), base_lr=1e-4, max_iter=20000, end_lr=1e-6, power=0.9, warmup_iters=1500)
        assert got == pytest.approx(expected, rel=1e-12), iteration


@pytest.mark.parametrize("variant", RULES)
def test_poly_schedule_of_the_trajectories(reference_dir: Path, variant: str):
    steps = json.loads((reference_dir / f"trajectory_{variant}.json").read_text())["steps"]
    assert len(steps) == 30
    for index, step in enumerate(steps):
        got = poly_lr(index, base_lr=1e-3, max_iter=30, end_lr=1e-6, power=0.9, warmup_iters=5)
        assert got == pytest.approx(step["lr"], rel=1e-8), index


@pytest.mark.parametrize("variant", RULES)
def test_undecayed_weights_of_the_full_size_model(reference_dir: Path, variant: str):
    recorded = json.loads((reference_dir / "training_reference.json").read_text())[f"optimizer_{variant}"]
    keys = json.loads((reference_dir / f"keys_{variant}.json").read_text())["keys"]
    theirs = {key: torch.empty(shape, device="meta") for key, shape, _, _ in keys}
    is_trained = {id(theirs[key]) for key, _, _, requires_grad in keys if requires_grad}
    ours = {name: value for name, value in from_official(theirs).items() if id(value) in is_trained}
    undecayed = sum(value.numel() for name, value in ours.items() if is_undecayed(name, RULES[variant]))
    assert undecayed == recorded["trainable_numel_with_wd0"]
    rest = sum(value.numel() for name, value in ours.items()) - undecayed
    unused = sum(theirs[key].numel() for key, _, _, trained in keys if trained and _is_empty(variant, key))
    assert rest == recorded["trainable_numel"] - recorded["trainable_numel_with_wd0"] - unused


@pytest.mark.parametrize("variant", RULES)
def test_weight_decay_of_every_tensor(reference_dir: Path, variant: str):
    trained = json.loads((reference_dir / f"trajectory_{variant}.json").read_text())["after_step_29"]["trainable"]
    keys = json.loads((reference_dir / f"keys_{variant}.json").read_text())["keys"]
    # Only full-size key lists have the frozen parts by which a variant is recognised.
    theirs = {key: torch.empty(0, device="meta") for key, _, _, _ in keys if not key.startswith("backbone.adapter.")}
    theirs |= {key: torch.empty(0, device="meta") for key in trained}
    names = {id(value): name for name, value in from_official(theirs).items()}
    checked = 0
    for key, record in trained.items():
        if id(theirs[key]) not in names:
            assert _is_empty(variant, key), key
            continue
        name = names[id(theirs[key])]
        assert is_undecayed(name, RULES[variant]) is (record["weight_decay"] == 0), f"{key} -> {name}"
        checked += 1
    assert checked > 200


def _is_empty(variant: str, key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in EMPTY_KEYS[variant])
