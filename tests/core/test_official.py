"""The release's names, without a config."""

import re

import pytest
import torch

from mfuser_d2.core.official import (
    EMPTY_KEYS,
    VARIANTS,
    from_official,
    recognize_variant,
    split_empty,
    to_official,
    unwrap_official,
)

MARKS = {
    "clip": ["backbone.conv1.weight", "backbone.dinov2.pos_embed"],
    "eva02": ["backbone.blocks.0.attn.inner_attn_ln.weight"],
    "siglip": ["backbone.embeddings.patch_embedding.weight"],
}
SHARED = {
    "contexts": "sem_seg_head.text_encoder.prompt",
    "gamma": "sem_seg_head.text_refiner.gamma",
    "backbone.adapter.3.A_log": "backbone.encoder.adapters.3.block.A_log",
    "backbone.dinov2.blocks.0.ls1.gamma": "backbone.encoder.vfm.model.blocks.0.ls1.gamma",
    "backbone.fpn1.1.running_mean": "backbone.pyramid.up4.1.running_mean",
    "context_decoder.decoder.0.cross_attn.dt_proj.bias": "sem_seg_head.text_refiner.layers.0.mamba.dt_proj.bias",
    "decode_head.pixel_decoder.encoder.layers.1.ffns.0.layers.1.bias": (
        "sem_seg_head.pixel_decoder.encoder_layers.1.ffn.linear2.bias"
    ),
    "decode_head.transformer_decoder.layers.2.norms.0.weight": (
        "sem_seg_head.transformer_decoder.layers.2.norm1.weight"
    ),
    "decode_head.cls_embed.bias": "sem_seg_head.transformer_decoder.class_head.bias",
}


def state(variant: str, *keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.full((2,), float(i)) for i, key in enumerate([*MARKS[variant], *keys])}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_recognised_by_its_encoder(variant):
    assert recognize_variant(state(variant)) == variant


@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "backbone.conv1.weight"])
def test_strangers_are_refused(key):
    with pytest.raises(ValueError, match=f"first key: '{re.escape(key)}'"):
        recognize_variant({key: torch.ones(1)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_shared_names(variant):
    theirs = state(variant, *SHARED)
    ours = from_official(theirs)
    for official, name in SHARED.items():
        assert torch.equal(ours[name], theirs[official])
    assert set(SHARED) <= set(to_official({name: ours[name] for name in SHARED.values()}, variant))


def test_class_embedding_is_doubled_and_halved():
    theirs = state("clip", "backbone.class_embedding")
    ours = from_official(theirs)
    assert torch.equal(ours["backbone.encoder.vlm.model.class_embedding"], 2 * theirs["backbone.class_embedding"])
    assert torch.equal(to_official(ours, "clip")["backbone.class_embedding"], theirs["backbone.class_embedding"])


def test_keys_that_carry_nothing_are_dropped_with_a_reason():
    theirs = state("eva02", "random_text", "backbone.rope.freqs_cos", "backbone.blocks.7.attn.rope.freqs_sin")
    used, reasons = split_empty(theirs, "eva02")
    assert list(used) == MARKS["eva02"] and len(reasons) == 3 and all(reasons.values())
    assert len(from_official(theirs)) == 1


def test_a_key_is_empty_only_where_the_release_ignores_it():
    """CLIP uses the projections that SigLIP carries along for nothing."""
    key = "backbone.adapter_proj1.0.weight"
    assert "backbone.encoder.adapters.0.vfm_in.weight" in from_official(state("clip", key))
    assert len(from_official(state("siglip", key))) == len(MARKS["siglip"])
    assert not any(re.fullmatch(pattern, key) for pattern in EMPTY_KEYS["eva02"])


def test_unknown_keys_stop_the_conversion():
    with pytest.raises(ValueError, match="decode_head.conv_seg.weight"):
        from_official(state("eva02", "decode_head.conv_seg.weight"))


@pytest.mark.parametrize(
    "name",
    [
        "sem_seg_head.text_refiner.layers.0.image_attn.attn.in_proj_weight",
        "backbone.encoder.adapters.0.block.gate.weight",
        "sem_seg_head.text_encoder.queries",
    ],
)
def test_other_parts_have_no_place_in_the_release(name):
    with pytest.raises(ValueError, match=re.escape(name)):
        to_official({name: torch.ones(1)}, "eva02")


def test_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match="choose from .*clip"):
        to_official({}, "pe")


def test_wrapper_and_prefixes_are_taken_off():
    tensor = torch.ones(1)
    for wrapped in ({"gamma": tensor}, {"module.gamma": tensor}, {"state_dict": {"module.gamma": tensor}, "meta": {}}):
        assert unwrap_official(wrapped) == {"gamma": tensor}


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match="'iter' is a int"):
        unwrap_official({"gamma": torch.ones(1), "iter": 3})
