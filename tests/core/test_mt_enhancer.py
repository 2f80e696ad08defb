"""MTEnhancer and the refiner around it (Eq. 7-10)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser_d2.core.mt_enhancer import ClassSelfAttention, MTEnhancer, TextRefiner


def by_the_equations(layer: MTEnhancer, texts: Tensor, visual: Tensor, num_heads: int) -> Tensor:
    w = layer.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    normed = norm(texts, "norm1")
    heads = []
    for q, k, v in zip(*((normed @ w[f"self_attn.{n}_proj.weight"].T).chunk(num_heads, dim=2) for n in "qkv")):
        heads.append((q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2) @ v)
    texts = texts + torch.cat(heads, dim=2) @ w["self_attn.proj.weight"].T + w["self_attn.proj.bias"]
    normed, count = norm(texts, "norm2"), texts.shape[1]
    mixed = layer.mamba(torch.cat([normed, visual, normed], dim=1))
    texts = texts + mixed[:, :count] + mixed[:, -count:]
    hidden = F.gelu(norm(texts, "norm3") @ w["mlp.0.weight"].T + w["mlp.0.bias"])
    return texts + hidden @ w["mlp.3.weight"].T + w["mlp.3.bias"]


@pytest.mark.parametrize(("num_classes", "length"), [(1, 1), (5, 7), (200, 3)])
def test_values(num_classes, length):
    layer = MTEnhancer(dim=16, num_heads=2).eval()
    with torch.no_grad():
        layer.mamba.scale.fill_(0.5)
    texts, visual = torch.randn(2, num_classes, 16), torch.randn(2, length, 16)
    wanted = by_the_equations(layer, texts, visual, 2)
    torch.testing.assert_close(layer(texts, visual), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_texts_image_and_every_parameter():
    layer = MTEnhancer(dim=16, num_heads=4)
    texts, visual = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 4, 16, requires_grad=True)
    layer(texts, visual).square().sum().backward()
    assert texts.grad.abs().sum() > 0 and visual.grad.abs().sum() > 0
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_attention_treats_classes_alike():
    attention, texts = ClassSelfAttention(dim=16, num_heads=2, dropout=0.0), torch.randn(1, 6, 16)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(attention(texts)[:, order], attention(texts[:, order]))


def test_refiner_adds_a_scaled_residual():
    refiner = TextRefiner(text_dim=12, width=16, num_heads=2, num_layers=2).eval()
    texts, visual = torch.randn(2, 5, 12), torch.randn(2, 10, 12)
    wanted = texts + refiner.gamma * refiner.residual(texts, visual)
    torch.testing.assert_close(refiner(texts, visual), wanted)
    with torch.no_grad():
        refiner.gamma.zero_()
    assert torch.equal(refiner(texts, visual), texts)


def test_texts_depend_on_their_own_image():
    refiner, texts, visual = TextRefiner(text_dim=12, width=16).eval(), torch.randn(2, 5, 12), torch.randn(2, 10, 12)
    with torch.no_grad():
        refiner.layers[0].mamba.scale.fill_(1.0)
    other = visual.clone()
    other[1] += 1
    same = (refiner(texts, visual) - refiner(texts, other)).abs().amax(dim=(1, 2)) == 0
    assert same.tolist() == [True, False]


def test_initial_values():
    """Linear layers as in the release: standard deviation 0.02, no bias, the Mamba block's steps too; gamma near 1."""
    torch.manual_seed(0)
    refiner = TextRefiner(text_dim=512)
    assert refiner.layers[0].mamba.dt_proj.bias.eq(0).all()
    for weight in (refiner.out_proj[1].weight, refiner.layers[0].mamba.in_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert refiner.gamma.std().item() == pytest.approx(0.88, rel=0.1) and refiner.gamma.abs().max() <= 2


def test_dropout_only_in_training():
    refiner, texts, visual = TextRefiner(text_dim=12, width=16), torch.randn(1, 5, 12), torch.randn(1, 10, 12)
    assert torch.equal(refiner.eval()(texts, visual), refiner(texts, visual))
    assert not torch.equal(refiner.train()(texts, visual), refiner(texts, visual))


def test_heads_have_to_divide_the_width():
    with pytest.raises(ValueError, match="WIDTH=10 is not divisible by NUM_HEADS=4"):
        TextRefiner(text_dim=12, width=10, num_heads=4)
