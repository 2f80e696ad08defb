import pytest
import torch
from torch import nn

from mfuser_d2.core.attention import FeedForward, MultiHeadAttention


@pytest.fixture
def pair() -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    ours, torchs = MultiHeadAttention(dim=12, num_heads=3), nn.MultiheadAttention(12, 3, batch_first=True)
    for parameter in torchs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def test_matches_torch_with_its_weights_and_a_mask(pair):
    ours, torchs = pair
    query, key, value = torch.randn(2, 4, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    allowed = torch.rand(2, 4, 7) < 0.6
    allowed[..., 0] = True
    wanted = torchs(query, key, value, attn_mask=~allowed.repeat_interleave(3, 0), need_weights=False)[0]
    torch.testing.assert_close(ours(query, key, value, allowed[:, None]), wanted)


def test_gradients_match_torch(pair):
    ours, torchs = (module.double() for module in pair)
    query, key = torch.randn(2, 4, 12).double(), torch.randn(2, 5, 12).double()
    ours(query, key, key).square().sum().backward()
    torchs(query, key, key, need_weights=False)[0].square().sum().backward()
    for name, parameter in torchs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)


def test_starts_like_torch():
    ours, torchs = MultiHeadAttention(dim=64, num_heads=4), nn.MultiheadAttention(64, 4)
    for name, wanted in torchs.state_dict().items():
        got = ours.state_dict()[name]
        assert got.shape == wanted.shape
        assert got.std().item() == pytest.approx(wanted.std().item(), rel=0.1)
        assert got.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.05)


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=5"):
        MultiHeadAttention(dim=12, num_heads=5)


def test_feed_forward_is_linear_relu_linear():
    block = FeedForward(dim=3, hidden_dim=5)
    x = torch.randn(2, 4, 3)
    hidden = (x @ block.linear1.weight.T + block.linear1.bias).clamp(min=0)
    torch.testing.assert_close(block(x), hidden @ block.linear2.weight.T + block.linear2.bias)
