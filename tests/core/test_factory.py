"""Putting backbone and head together from names and numbers."""

import pytest
import torch

from mfuser_d2.core.backbone import PYRAMID_LEVELS, DualEncoderBackbone
from mfuser_d2.core.factory import build_backbone_parts, build_head

SIZE = (48, 64)
CLASSES = ["road", "sky", "traffic light"]
HEAD = {"hidden_dim": 32, "mask_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
HEAD |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "refiner_kwargs": {"width": 16}}


def backbone(vlm: str = "tiny_eva02", **options) -> DualEncoderBackbone:
    torch.manual_seed(0)
    defaults = {"vfm": {"name": "tiny_vfm"}, "image_size": SIZE, "tap_layers": (0, 1, 2, 3)}
    return DualEncoderBackbone(**build_backbone_parts(vlm={"name": vlm}, **{**defaults, **options}))


@pytest.mark.parametrize("vlm", ["tiny_clip", "tiny_eva02", "tiny_siglip"])
def test_backbone_and_head_fit_each_other(vlm):
    body = backbone(vlm)
    head = build_head(vlm={"name": vlm}, class_names=CLASSES, in_dims=[body.pyramid.dim] * 4, prompt_length=2, **HEAD)
    out = head(body(torch.randn(2, 3, *SIZE)))
    assert out.mask_logits.shape == (2, 2, 3, 24, 32)


def test_backbone_names_its_outputs():
    features = backbone()(torch.randn(1, 3, *SIZE))
    assert set(PYRAMID_LEVELS) | {"global_embedding", "dense_embedding"} == set(features)


def test_geometry_reaches_both_encoders():
    encoder = backbone(patch_size=16, image_size=(64, 96)).encoder
    for tower in (encoder.vfm, encoder.vlm):
        assert tower.patch_size == (16, 16) and tower.native_grid == (4, 6)


def test_one_adapter_per_pair_with_its_options():
    body = backbone(adapter_kwargs={"state_dim": 5, "dropout": 0.25})
    assert len(body.encoder.adapters) == 4
    assert all(a.block.state_dim == 5 and a.block.dropout.p == 0.25 for a in body.encoder.adapters)
    assert len({id(adapter) for adapter in body.encoder.adapters}) == 4


def test_projection_is_a_choice_where_widths_are_equal():
    assert not hasattr(backbone().encoder, "vfm_to_joint")
    assert hasattr(backbone(project_vfm=True).encoder, "vfm_to_joint")


def test_temperature_or_the_models_own_scale():
    dims = {"in_dims": [16] * 4, "class_names": CLASSES, "prompt_length": 1, **HEAD}
    assert build_head(vlm={"name": "tiny_clip"}, temperature=0.5, **dims).alignment_scale == 2
    own = build_head(vlm={"name": "tiny_siglip"}, temperature=0.0, **dims)
    assert own.alignment_scale == pytest.approx(10.0) and own.alignment_bias == 0.0


def test_known_token_ids_are_taken_as_they_are():
    ids = torch.tensor([[1, 2, 3], [1, 4, 3]])
    head = build_head(
        vlm={"name": "tiny_clip"}, class_names=["x", "y"], class_tokens=ids, in_dims=[16] * 4, prompt_length=1, **HEAD
    )
    assert torch.equal(head.text_encoder.class_tokens, ids)


def test_model_without_memory():
    """On the meta device a model tells its names and shapes; the converter builds full-size ones so."""
    with torch.device("meta"):
        body = backbone()
        head = build_head(vlm={"name": "tiny_eva02"}, class_names=CLASSES, in_dims=[192] * 4, prompt_length=1, **HEAD)
    assert all(value.is_meta for part in (body, head) for value in part.state_dict().values())
    assert set(body.state_dict()) == set(backbone().state_dict())


def test_unknown_names_list_the_known():
    with pytest.raises(KeyError, match="ADAPTER.NAME='bridge'.*mvfuser"):
        backbone(adapter="bridge")
