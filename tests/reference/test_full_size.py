"""The full-size models: names, shapes, counts and initial values of the release."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfuser_d2.core import factory
from mfuser_d2.core.backbone import DualEncoderBackbone
from mfuser_d2.core.encoders.class_tokens import tokenize_classes
from mfuser_d2.core.official import EMPTY_KEYS, from_official, to_official
from mfuser_d2.core.official_sizes import SIZES, convert_checked
from mfuser_d2.core.text_query_head import TextQueryHead

VARIANTS = {
    "clip": {"vlm": "ViT-L-14-336-quickgelu", "patch_size": 16, "prompt_length": 5, "project_vfm": True},
    "eva02": {"vlm": "EVA02-L-14-336", "patch_size": 14, "prompt_length": 8},
    "siglip": {"vlm": "ViT-L-16-SigLIP-384", "patch_size": 16, "prompt_length": 5},
}
"""What the configs say of the release's models; tests/d2 compares the configs themselves."""

STATISTICS_SIGMAS = 6


def build(variant: str, class_names: list[str], *, trained_device: str = "meta") -> nn.Module:
    """The full-size model with encoders that take no memory."""
    spec = VARIANTS[variant]
    vlm = {"name": spec["vlm"]}
    with pytest.MonkeyPatch.context() as patch, torch.device(trained_device):
        for name in ("build_vfm", "build_vlm", "build_text_tower"):
            patch.setattr(factory, name, on_meta(getattr(factory, name)))
        backbone = DualEncoderBackbone(
            **factory.build_backbone_parts(
                vfm={"name": "dinov2_vitl14"},
                vlm=vlm,
                image_size=(512, 512),
                patch_size=spec["patch_size"],
                tap_layers=[7, 11, 15, 23],
                project_vfm=spec.get("project_vfm", False),
            )
        )
        head = TextQueryHead(
            **factory.build_head_parts(
                vlm=vlm,
                class_names=class_names,
                in_dims=[backbone.encoder.tap_dim] * 4,
                prompt_length=spec["prompt_length"],
            )
        )
    model = nn.Module()
    model.backbone, model.sem_seg_head = backbone, head
    return model


def on_meta(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(**kwargs: Any) -> nn.Module:
        with torch.device("meta"):
            return builder(**kwargs)

    return build


def recorded_tensors(keys: dict) -> dict[str, Tensor]:
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, shape, dtype, _ in keys["keys"]
    }


def is_empty(variant: str, key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in EMPTY_KEYS[variant])


@pytest.fixture(params=VARIANTS)
def full(request, load_facts) -> tuple[str, dict, nn.Module]:
    """A variant, its recorded keys, and ours on the meta device."""
    keys = load_facts(f"keys_{request.param}")
    return request.param, keys, build(request.param, keys["class_names"])


def test_every_key_and_shape(full):
    """The release's list, less the keys that carry nothing, is our state dict, and the other way round."""
    variant, keys, model = full
    theirs, ours = recorded_tensors(keys), model.state_dict()
    assert len(theirs) == keys["n_keys"]
    converted = convert_checked(theirs, ours)
    assert {k: (v.shape, v.dtype) for k, v in converted.items()} == {k: (v.shape, v.dtype) for k, v in ours.items()}
    back = to_official(ours, variant)
    used = {key: value for key, value in theirs.items() if not is_empty(variant, key)}
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in used.items()}


def test_parameter_counts(full):
    variant, keys, model = full
    numels = {key: math.prod(shape) for key, shape, _, _ in keys["keys"]}
    unused = {
        trained: sum(numels[key] for key, _, _, flag in keys["keys"] if flag is trained and is_empty(variant, key))
        for trained in (True, False)
    }
    got = {flag: sum(p.numel() for p in model.parameters() if p.requires_grad is flag) for flag in (True, False)}
    assert got[True] == keys["trainable_total"] - unused[True]
    assert got[False] == keys["frozen_total"] - unused[False]


def test_the_same_parameters_are_trained(full):
    variant, keys, model = full
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {key for key, _, _, flag in keys["keys"] if flag and not is_empty(variant, key)}
    assert set(to_official(trained, variant)) == wanted


def test_class_tokens(load_facts):
    """CLIP's tokenizer gives the recorded ids; the recorded SigLIP ids are made up."""
    for variant in ("clip", "eva02"):
        keys = load_facts(f"keys_{variant}")
        assert tokenize_classes(keys["class_names"], vocabulary="clip").tolist() == keys["texts"]


def test_every_size_can_be_read(full):
    """The converter tells sizes apart by these; a pattern that fits nothing would tell nothing."""
    variant, keys, _ = full
    converted = from_official(recorded_tensors(keys))
    silent = [size.config_key for size in SIZES if size.read(converted) == 0]
    assert silent == ([] if variant == "clip" else ["MODEL.MFUSER.ADAPTER.PROJECT_VFM (projections)"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_values_of_every_trained_tensor(load_facts, variant):
    """Mean, spread and largest value of each tensor, within what other random numbers of the same law give."""
    keys, recorded = load_facts(f"keys_{variant}"), load_facts("training_reference")[f"optimizer_{variant}"]
    model = build(variant, keys["class_names"], trained_device="cpu")
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = to_official(trained, variant)
    seen, wrong = set(), []
    for pattern, facts in recorded["by_pattern"].items():
        expression = re.escape(pattern).replace(r"\*", r"\d+") + "$"
        mine = {key: value for key, value in tensors.items() if re.match(expression, key)}
        if not mine:
            assert is_empty(variant, re.sub(r"\*", "0", pattern)), f"{pattern} has no tensor of ours"
            continue
        assert len(mine) == facts["n"], pattern
        assert {tuple(v.shape) for v in mine.values()} == {tuple(shape) for shape in facts["shapes"]}, pattern
        wrong += [f"{key}: {problem}" for key, value in mine.items() for problem in problems(value, facts)]
        seen |= set(mine)
    assert seen == set(tensors)
    assert wrong == []


def problems(value: Tensor, facts: dict) -> list[str]:
    """What of a tensor lies outside the recorded range, widened by the chance of its size."""
    flat = value.double().flatten()
    count, spread = len(flat), max(facts["std"])
    chance = STATISTICS_SIGMAS / math.sqrt(count)
    mean, std, largest = (
        flat.mean().item(),
        flat.std(unbiased=False).item() if count > 1 else 0.0,
        flat.abs().max().item(),
    )
    found = []
    rounding = 1.1e-6  # recorded with six decimals
    low, high = facts["mean"]
    if not low - chance * spread - rounding <= mean <= high + chance * spread + rounding:
        found.append(f"mean {mean:.6f}, recorded {low}..{high}")
    low, high = facts["std"]
    if not low * (1 - chance) - rounding <= std <= high * (1 + chance) + rounding:
        found.append(f"standard deviation {std:.6f}, recorded {low}..{high}")
    # The tail of few values is wide, that of many is cut (uniform, truncated) or long (normal).
    low, high = facts["absmax"]
    slack = min(1.0, 30 / count) + (0.35 if high > 2.5 * spread > 0 else 0.02 if spread else 0)
    if not low * (1 - slack) - rounding <= largest <= high * (1 + slack) + rounding:
        found.append(f"largest {largest:.6f}, recorded {low}..{high}")
    return found
