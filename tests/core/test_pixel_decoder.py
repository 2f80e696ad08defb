import math

import pytest
import torch

from mfuser_d2.core.pixel_decoder import PixelDecoder

IN_DIMS = (6, 10, 8, 12)
SIZES = [(13, 18), (7, 9), (3, 5), (1, 2)]  # odd on purpose: no level is twice the next


def make(num_classes: int = 3, **changes) -> PixelDecoder:
    settings = dict(feature_dim=32, mask_dim=12, text_dim=5, num_layers=2, num_heads=4, num_points=2, ffn_dim=24)
    return PixelDecoder(in_dims=IN_DIMS, num_classes=num_classes, **{**settings, **changes})


def pyramid(batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, dim, *size) for dim, size in zip(IN_DIMS, SIZES, strict=True)]


@pytest.mark.parametrize(("batch", "num_classes"), [(1, 1), (2, 3), (1, 150)])
def test_shapes_of_any_size_batch_and_class_count(batch, num_classes):
    masks, memories = make(num_classes)(pyramid(batch), torch.randn(batch, num_classes, 5))
    assert masks.shape == (batch, 12, 13, 18)
    assert [tuple(m.shape) for m in memories] == [(batch, 32, *size) for size in SIZES[:0:-1]]


def test_every_parameter_gets_a_finite_gradient():
    decoder = make()
    masks, memories = decoder(pyramid(), torch.randn(2, 3, 5))
    sum(x.square().sum() for x in (masks, *memories)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_images_of_a_batch_do_not_touch_each_other():
    decoder, features, texts = make(), pyramid(), torch.randn(2, 3, 5)
    masks, memories = decoder(features, texts)
    alone_masks, alone_memories = decoder([f[1:] for f in features], texts[1:])
    torch.testing.assert_close(masks[1:], alone_masks)
    for both, alone in zip(memories, alone_memories, strict=True):
        torch.testing.assert_close(both[1:], alone)


def test_texts_change_the_memories():
    decoder, features = make(), pyramid(1)
    first = decoder(features, torch.randn(1, 3, 5))[1]
    second = decoder(features, torch.randn(1, 3, 5))[1]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, second, strict=True))


def test_finest_map_reaches_the_masks_only():
    decoder, features, texts = make(), pyramid(1), torch.randn(1, 3, 5)
    masks, memories = decoder(features, texts)
    other_masks, other_memories = decoder([torch.randn_like(features[0]), *features[1:]], texts)
    assert (masks - other_masks).abs().max() > 1e-3
    for a, b in zip(memories, other_memories, strict=True):
        assert torch.equal(a, b)


def test_text_keys_have_positions_and_values_do_not():
    decoder = make(num_classes=1)
    features, texts = pyramid(1), torch.randn(1, 1, 5)
    before = decoder(features, texts)[0]
    torch.nn.init.normal_(decoder.text_pos_embed.weight, std=10)
    # With one text its weight is 1 whatever its key is, so a position can only enter by the value.
    torch.testing.assert_close(decoder(features, texts)[0], before)


def test_memories_are_normalised_once_more_at_the_end():
    memories = make()(pyramid(), torch.randn(2, 3, 5))[1]
    for memory in memories:
        torch.testing.assert_close(memory.mean(1), torch.zeros_like(memory[:, 0]), atol=1e-5, rtol=0)
        assert (memory.var(1, unbiased=False) - 1).abs().max() < 1e-2


def test_initial_values():
    decoder = make(feature_dim=256, num_heads=8)
    # Kaiming normal by fan-out: the 1x1 projections have 256 outputs, the 3x3 one 9 * 256.
    for proj in (*decoder.input_projs, decoder.lateral_proj):
        assert proj.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.1)
    assert decoder.output_proj.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 2304), rel=0.05)
    assert [proj.conv.bias is None for proj in (*decoder.input_projs, decoder.lateral_proj, decoder.output_proj)] == [
        *[False] * 3,
        *[True] * 2,
    ]
    assert not any(proj.conv.bias.any() for proj in decoder.input_projs)
    for embedding in (decoder.level_encoding, decoder.text_pos_embed):
        assert embedding.weight.std().item() == pytest.approx(1, rel=0.1)
    # Plain layers keep torch's default, uniform within 1 / sqrt(fan_in).
    assert decoder.mask_proj.weight.abs().max().item() == pytest.approx(1 / 16, rel=0.01)
    assert decoder.text_proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(5), rel=0.01)


def test_full_size_has_the_parameters_of_the_release():
    with torch.device("meta"):
        decoder = PixelDecoder(in_dims=[2048] * 4, text_dim=768, num_classes=19)
    assert sum(p.numel() for p in decoder.parameters()) == 12_086_208


def test_runs_under_autocast():
    decoder, features, texts = make(), pyramid(1), torch.randn(1, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks, memories = decoder(features, texts)
    wanted_masks, wanted_memories = decoder(features, texts)
    for got, wanted in zip((masks, *memories), (wanted_masks, *wanted_memories), strict=True):
        assert (got.float() - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="in_dims"):
        PixelDecoder(in_dims=[8, 8, 8], feature_dim=32, text_dim=5, num_classes=3)
    with pytest.raises(ValueError, match="feature_dim=48"):
        make(feature_dim=48)
    with pytest.raises(ValueError, match="num_heads=5"):
        make(num_heads=5)
    with pytest.raises(ValueError, match="got 3 feature maps"):
        make()(pyramid()[1:], torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="got 4 class texts.*built for 3"):
        make()(pyramid(), torch.randn(2, 4, 5))
