"""Deformable attention, and the losses of recorded logits, against the recorded numbers."""

import json
import math
from pathlib import Path

import pytest
import torch

from mfuser_d2.core.criterion import Criterion
from mfuser_d2.core.ops.deformable_attention import MultiScaleDeformableAttention

safetensors = pytest.importorskip("safetensors.torch", reason="the recorded numbers are safetensors files")

MODULE_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module")
def recorded(reference_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.load_file(reference_dir / "mod_msda.safetensors")


@pytest.fixture
def attention(recorded) -> MultiScaleDeformableAttention:
    """A fresh module of the recorded sizes, which follow from the recorded initial offsets."""
    offsets = recorded["init.sampling_offsets.bias"]
    num_levels = len(recorded["in.spatial_shapes"])
    num_points = round(offsets.abs().max().item())  # the outermost point lies that many pixels away
    return MultiScaleDeformableAttention(
        dim=recorded["in.query"].shape[-1],
        num_heads=offsets.numel() // (2 * num_levels * num_points),
        num_levels=num_levels,
        num_points=num_points,
    )


def test_deformable_attention_starts_as_recorded(recorded, attention):
    got = attention.sampling_offsets.bias.detach()
    assert relative_error(got, recorded["init.sampling_offsets.bias"]) <= MODULE_TOLERANCE


def test_deformable_attention_values_and_gradients(recorded, attention):
    attention.load_state_dict({k.removeprefix("param."): v for k, v in recorded.items() if k.startswith("param.")})
    query = recorded["in.query"].transpose(0, 1).clone().requires_grad_()
    position, weight = (recorded[f"in.{name}"].transpose(0, 1) for name in ("query_pos", "grad_weight"))
    shapes = [tuple(shape) for shape in recorded["in.spatial_shapes"].tolist()]
    # The recorded module adds its residual itself.
    out = query + attention(query + position, query, recorded["in.reference_points_one_level"], shapes)
    assert relative_error(out.detach(), recorded["out.y"].transpose(0, 1)) <= MODULE_TOLERANCE
    (out * weight).sum().backward()
    assert relative_error(query.grad, recorded["grad.in.query"].transpose(0, 1)) <= MODULE_TOLERANCE
    for name, parameter in attention.named_parameters():
        assert relative_error(parameter.grad, recorded[f"grad.param.{name}"]) <= MODULE_TOLERANCE, name


@pytest.mark.parametrize("variant", ["clip", "eva02", "siglip"])
def test_losses_of_recorded_logits(reference_dir: Path, variant):
    """Class losses of every prediction and the alignment loss; masks are recorded at half resolution only."""
    shared = safetensors.load_file(reference_dir / "tiny_shared.safetensors")
    outputs = safetensors.load_file(reference_dir / f"tiny_{variant}_io.safetensors")
    facts = json.loads((reference_dir / f"tiny_{variant}.json").read_text())
    wanted = facts["losses"]["eval_mode"]
    num = sum(key.startswith("out.cls.") for key in outputs)
    classes = torch.stack([outputs[f"out.cls.{i}"] for i in range(num)])
    masks = torch.stack([outputs[f"out.mask.{i}.strided2"] for i in range(num)])
    logit = facts["siglip_logit"]
    scale, bias = (math.exp(logit["logit_scale"]), logit["logit_bias"]) if logit else (1 / 0.07, 0.0)
    labels = shared["train.gt_semantic_seg"][:, 0]
    losses = Criterion(num_classes=classes.shape[2])(classes, masks, outputs["out.score_map"] * scale + bias, labels)
    names = {"loss_align": "scr_map.loss_seg", "loss_cls": "decode.loss_cls"}
    names |= {f"loss_cls_{i}": f"decode.d{i}.loss_cls" for i in range(num - 1)}
    for ours, official in names.items():
        assert losses[ours].item() == pytest.approx(wanted[official], rel=LOSS_TOLERANCE), ours
