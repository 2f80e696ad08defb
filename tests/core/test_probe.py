"""Tokens of the encoders before and after adaptation."""

import pytest
import torch

from mfuser_d2.core.encoders.class_queries import LearnedQueries
from mfuser_d2.core.encoders.class_tokens import tokenize_classes
from mfuser_d2.core.factory import build_backbone_parts, build_head_parts
from mfuser_d2.core.probe import adapted_tokens, encoder_parts, frozen_similarity_inputs, frozen_tokens

IMAGE_SIZE = (64, 96)


def make_encoder(**options):
    return build_backbone_parts(
        vfm={"name": "tiny_vfm"}, vlm={"name": "tiny_eva02"}, image_size=IMAGE_SIZE, tap_layers=[0, 1, 2, 3], **options
    )["encoder"].eval()


@pytest.fixture(scope="module")
def dual():
    return make_encoder()


def test_both_encoders_give_their_patches(dual):
    found = frozen_tokens(dual, torch.randn(1, 3, *IMAGE_SIZE))
    assert list(found) == ["vfm", "vlm"]
    for part in found.values():
        assert part.grid == (8, 12) and part.tokens.shape == (96, 96)


def test_without_corrections_adaptation_changes_nothing(dual):
    image = torch.randn(1, 3, *IMAGE_SIZE)
    scales = [adapter.block.scale for adapter in dual.adapters]
    kept = [scale.detach().clone() for scale in scales]
    before = frozen_tokens(dual, image)
    with torch.no_grad():
        for scale in scales:
            scale.zero_()
        alike = adapted_tokens(dual, image)
        for scale in scales:
            scale.fill_(1.0)
        other = adapted_tokens(dual, image)
        for scale, value in zip(scales, kept):
            scale.copy_(value)
    for name in before:
        torch.testing.assert_close(alike[name].tokens, before[name].tokens)
        assert (other[name].tokens - before[name].tokens).abs().max() > 0.1


def test_adapted_tokens_are_the_last_tap(dual):
    image = torch.randn(1, 3, *IMAGE_SIZE)
    found = adapted_tokens(dual, image)
    with torch.no_grad():
        tap = dual(image).taps[-1][0].flatten(1).T  # (h*w, Cv + Cl)
    torch.testing.assert_close(torch.cat([found["vfm"].tokens, found["vlm"].tokens], dim=1), tap)


@pytest.mark.parametrize("encoders, adapter", [("vfm", "none"), ("vlm", "vlm_only")])
def test_single_encoders(encoders, adapter):
    encoder = make_encoder(encoders=encoders, adapter=adapter)
    image = torch.randn(1, 3, *IMAGE_SIZE)
    assert list(encoder_parts(encoder)) == [encoders]
    assert adapted_tokens(encoder, image)[encoders].tokens.shape == frozen_tokens(encoder, image)[encoders].tokens.shape


def test_similarity_of_the_published_model(dual):
    parts = build_head_parts(vlm={"name": "tiny_eva02"}, class_names=["road", "car"], in_dims=[192] * 4)
    image = torch.randn(1, 3, *IMAGE_SIZE)
    text_encoder = parts["text_encoder"]
    patches, texts = frozen_similarity_inputs(dual, text_encoder, image)
    assert patches.tokens.shape == (96, 64) and texts.shape == (2, 64)
    with torch.no_grad():  # learned prompts have no part in it
        text_encoder.prompt.add_(1)
    torch.testing.assert_close(frozen_similarity_inputs(dual, text_encoder, image)[1], texts)
    text_encoder.set_class_tokens(tokenize_classes(["sky"], vocabulary="clip"))
    assert len(frozen_similarity_inputs(dual, text_encoder, image)[1]) == 1
    with pytest.raises(ValueError, match="texts"):
        frozen_similarity_inputs(dual, LearnedQueries(num_classes=2, joint_dim=64), image)
