import pytest
import torch
import torch.nn.functional as F

from mfuser_d2.core.transformer_decoder import TransformerDecoder, TransformerDecoderLayer, allowed_positions

SIZES = [(2, 3), (5, 4), (7, 9)]
MASK_SIZE = (13, 18)


def make(num_classes: int = 4, **changes) -> TransformerDecoder:
    settings = dict(hidden_dim=16, mask_dim=12, text_dim=5, num_layers=3, num_heads=4, ffn_dim=24)
    return TransformerDecoder(num_queries=num_classes, num_classes=num_classes, **{**settings, **changes})


def inputs(batch: int = 2, num_classes: int = 4) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    memories = [torch.randn(batch, 16, *size) for size in SIZES]
    return memories, torch.randn(batch, 12, *MASK_SIZE), torch.randn(batch, num_classes, 5)


@pytest.mark.parametrize(("batch", "num_classes"), [(1, 1), (2, 4), (1, 150)])
def test_one_prediction_before_and_after_every_layer(batch, num_classes):
    classes, masks = make(num_classes)(*inputs(batch, num_classes))
    assert classes.shape == (4, batch, num_classes, num_classes + 1)
    assert masks.shape == (4, batch, num_classes, *MASK_SIZE)


def test_last_only_is_the_last_prediction():
    decoder, args = make(), inputs()
    classes, masks = decoder(*args)
    last_classes, last_masks = decoder(*args, last_only=True)
    torch.testing.assert_close(last_classes, classes[-1:])
    torch.testing.assert_close(last_masks, masks[-1:])


def test_first_prediction_needs_only_texts_and_mask_features():
    decoder, (memories, features, texts) = make(), inputs()
    classes, masks = decoder(memories, features, texts)
    queries = decoder.post_norm(decoder.text_proj(texts))
    torch.testing.assert_close(classes[0], decoder.class_head(queries))
    torch.testing.assert_close(masks[0], torch.einsum("nqc,nchw->nqhw", decoder.mask_head(queries), features))


def test_layers_take_the_memories_in_turn():
    decoder, (memories, features, texts) = make(num_layers=5), inputs()
    classes = decoder(memories, features, texts)[0]
    for changed in range(3):
        other = list(memories)
        other[changed] = torch.randn_like(other[changed])
        differs = [(a != b).any().item() for a, b in zip(classes, decoder(other, features, texts)[0], strict=True)]
        assert differs == [index > changed for index in range(6)]


def test_every_parameter_gets_a_finite_gradient():
    decoder = make()
    classes, masks = decoder(*inputs())
    (classes.square().sum() + masks.square().sum()).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_gradients_survive_autocast():
    # Autocast caches converted weights; a first use without gradients must not swallow those of the second.
    decoder, args = make(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        classes, masks = decoder(*args)
        (classes.float().square().sum() + masks.float().square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_images_of_a_batch_do_not_touch_each_other():
    decoder, (memories, features, texts) = make(), inputs()
    classes, masks = decoder(memories, features, texts)
    alone_classes, alone_masks = decoder([m[1:] for m in memories], features[1:], texts[1:])
    torch.testing.assert_close(classes[:, 1:], alone_classes)
    torch.testing.assert_close(masks[:, 1:], alone_masks)


def test_layer_attends_then_relates_queries_then_feeds_forward():
    layer = TransformerDecoderLayer(dim=8, num_heads=2, ffn_dim=12)
    queries, positions = torch.randn(2, 3, 8), torch.randn(3, 8)
    keys, values, allowed = torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.ones(2, 1, 3, 6, dtype=torch.bool)
    x = layer.norm1(queries + layer.cross_attn(queries + positions, keys, values))
    x = layer.norm2(x + layer.self_attn(x + positions, x + positions, x))
    wanted = layer.norm3(x + layer.ffn(x))
    torch.testing.assert_close(layer(queries, positions, keys, values, allowed), wanted)


def test_layer_sees_only_what_is_allowed():
    layer = TransformerDecoderLayer(dim=8, num_heads=2, ffn_dim=12)
    queries, positions = torch.randn(1, 1, 8), torch.randn(1, 8)
    keys, values = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    allowed = torch.tensor([True, False, True, True, False, True]).view(1, 1, 1, 6)
    wanted = layer(queries, positions, keys, values, allowed)
    keys[:, 1], values[:, 4] = 50.0, -50.0
    torch.testing.assert_close(layer(queries, positions, keys, values, allowed), wanted)
    values[:, 0] = -50.0
    assert (layer(queries, positions, keys, values, allowed) - wanted).abs().max() > 0.1


def test_allowed_is_the_resized_mask_or_everything():
    embeddings, features = torch.randn(2, 5, 12).double(), torch.randn(2, 12, *MASK_SIZE).double()
    embeddings[1, 2] = -features[1].mean((1, 2)) * 100
    features[1] += 10 * features[1].mean((1, 2))[:, None, None].sign()
    logits = torch.einsum("nqc,nchw->nqhw", embeddings, features)
    inside = F.interpolate(logits, size=(5, 4), mode="bilinear", align_corners=False).flatten(2).sigmoid() >= 0.5
    assert not inside[1, 2].any() and inside[0].any(1).all() and not inside[0].all()
    inside |= ~inside.any(2, keepdim=True)
    small = F.interpolate(features, size=(5, 4), mode="bilinear", align_corners=False).flatten(2)
    assert torch.equal(allowed_positions(embeddings, small), inside[:, None])


def test_non_finite_mask_features_do_not_empty_a_row():
    allowed = allowed_positions(torch.full((1, 1, 2), float("nan")), torch.randn(1, 2, 6))
    assert allowed.all()


def test_full_size_has_the_parameters_of_the_release():
    with torch.device("meta"):
        decoder = TransformerDecoder(text_dim=768, num_queries=19, num_classes=19)
    parts = 14_209_280 + 4_864 + 262_656 + 768 + 5_140 + 197_376
    assert sum(p.numel() for p in decoder.parameters()) == parts


def test_initial_embeddings_are_standard_normal():
    decoder = make(num_classes=200, hidden_dim=64)
    for embedding in (decoder.query_embed, decoder.level_embed):
        assert embedding.weight.std().item() == pytest.approx(1, rel=0.15)


def test_refuses_what_does_not_fit():
    memories, features, texts = inputs()
    with pytest.raises(ValueError, match="got 2 memories"):
        make()(memories[:2], features, texts)
    with pytest.raises(ValueError, match="got 3 class texts.*4 queries"):
        make()(memories, features, texts[:, :3])
    with pytest.raises(ValueError, match="num_heads=3"):
        make(num_heads=3)
