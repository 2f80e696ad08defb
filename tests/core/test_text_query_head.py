"""The head as a whole: shapes, what reaches what, the text cache, and one or many classes."""

import pytest
import torch

from mfuser_d2.core.factory import build_head
from mfuser_d2.core.text_query_head import TextQueryHead

DIM = 16


def head(num_classes: int = 3, vlm: str = "tiny_clip", **options) -> TextQueryHead:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "mask_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2}
    ids = torch.cat([torch.tensor([[1]]).expand(num_classes, 1), torch.arange(2, num_classes + 2)[:, None]], dim=1)
    ids = torch.cat([ids, torch.full((num_classes, 1), num_classes + 5)], dim=1)
    return build_head(
        vlm={"name": vlm},
        class_names=[f"class {i}" for i in range(num_classes)],
        class_tokens=ids,
        in_dims=[DIM] * 4,
        prompt_length=2,
        refiner_kwargs={"width": 16, "num_heads": 2, "dropout": 0.0},
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        **{**sizes, **options},
    )


def features(joint_dim: int = 64, batch: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    sizes = {"res2": (12, 20), "res3": (6, 10), "res4": (3, 5), "res5": (1, 2)}
    maps = {name: torch.randn(batch, DIM, *size) for name, size in sizes.items()}
    return {
        **maps,
        "global_embedding": torch.randn(batch, 1, joint_dim),
        "dense_embedding": torch.randn(batch, joint_dim, 3, 5),
    }


@pytest.mark.parametrize("num_classes", [1, 3, 150])
def test_shapes(num_classes):
    out = head(num_classes)(features())
    assert out.class_logits.shape == (3, 2, num_classes, num_classes + 1)
    assert out.mask_logits.shape == (3, 2, num_classes, 12, 20)
    assert out.alignment_logits.shape == (2, num_classes, 3, 5)


def test_last_prediction_alone_is_the_last_of_all():
    model, given = head().eval(), features()
    every, last = model(given), model(given, last_only=True)
    torch.testing.assert_close(last.class_logits[-1], every.class_logits[-1])
    torch.testing.assert_close(last.mask_logits[-1], every.mask_logits[-1])
    assert len(last.class_logits) == 1


def test_alignment_is_a_scaled_cosine():
    model, given = head(temperature=0.25).eval(), features()
    texts = model.refined_texts(given)
    out = model(given).alignment_logits
    wanted = torch.cosine_similarity(given["dense_embedding"][1, :, 2, 3], texts[1, 2], dim=0) / 0.25
    torch.testing.assert_close(out[1, 2, 2, 3], wanted)


def test_models_own_scale_and_bias_at_temperature_zero():
    model = head(vlm="tiny_siglip", temperature=0.0)
    assert model.alignment_scale == pytest.approx(10.0)


def test_gradients_reach_every_trained_parameter_and_the_image():
    model, given = head().train(), features()
    given = {name: value.requires_grad_() for name, value in given.items()}
    out = model(given)
    sum(value.square().sum() for value in out).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A fresh deformable attention weighs its samples equally, whatever the query: these start from zero weights.
    assert all("sampling_offsets" in name or "attention_weights" in name or "in_proj_bias" in name for name in idle)
    assert all(value.grad is not None and value.grad.any() for value in given.values())
    assert all(p.grad is None for p in model.text_encoder.tower.parameters())


def test_texts_are_encoded_once_in_evaluation():
    model, given = head().eval(), features()
    calls = []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = model(given).class_logits
        assert torch.equal(model(given).class_logits, first) and len(calls) == 1
    model(given)
    assert len(calls) == 2, "gradients have to reach the prompt"


@pytest.mark.parametrize("change", ["train", "load", "convert"])
def test_the_cache_is_dropped_when_the_prompt_may_change(change):
    model = head().eval()
    with torch.no_grad():
        before = model.class_texts().clone()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state["text_encoder.prompt"] += 1
        if change == "load":
            model.load_state_dict(state)
        else:
            model.text_encoder.prompt.add_(1)
            model = model.train().eval() if change == "train" else model.double()
        assert not torch.allclose(model.class_texts().float(), before)


def test_texts_in_another_order_give_masks_in_another_order():
    """Query k is class k: where the learned places of the queries are equal, only the text tells them apart."""
    model, given = head().eval(), features()
    with torch.no_grad():
        for table in (model.transformer_decoder.query_embed, model.pixel_decoder.text_pos_embed):
            table.weight.copy_(table.weight[:1].expand_as(table.weight))
        for layer in model.text_refiner.layers:
            layer.mamba.scale.zero_()  # the only part of the refinement that knows an order
        masks = model(given).mask_logits
        model.text_encoder.set_class_tokens(model.text_encoder.class_tokens[[2, 0, 1]])
        model.train().eval()
        torch.testing.assert_close(model(given).mask_logits, masks[:, :, [2, 0, 1]], rtol=1e-4, atol=1e-4)
