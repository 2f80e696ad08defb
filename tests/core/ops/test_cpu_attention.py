"""Attention by heads is the fused attention, and stands in for it only where that is allowed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mfuser_d2.core.ops import cpu_attention
from mfuser_d2.core.ops.cpu_attention import CpuAttention, attend_by_head


def make_case(dtype: torch.dtype, *, tokens: int = 70, keys: int = 90) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Heads in the middle, as the encoders hand them over.
    shapes = [(2, length, 3, 16) for length in (tokens, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_the_fused_attention(dtype: torch.dtype, tolerance: float, scale: float | None) -> None:
    case = make_case(dtype)
    exact = F.scaled_dot_product_attention(*(x.double() for x in case), scale=scale)
    got = attend_by_head(*case, scale=scale)
    assert got.shape == exact.shape and got.dtype == dtype
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []

    def counted(*args, **kwargs):
        made.append(1)
        return attend_by_head(*args, **kwargs)

    monkeypatch.setattr(cpu_attention, "attend_by_head", counted)
    return made


def test_the_mode_reaches_attention_inside_other_libraries(calls: list[int]) -> None:
    attention = nn.MultiheadAttention(32, 2, batch_first=True).bfloat16().eval()
    tokens = torch.randn(1, 80, 32).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = attention(tokens, tokens, tokens, need_weights=False)[0]
        assert not calls
        with CpuAttention():
            got = attention(tokens, tokens, tokens, need_weights=False)[0]
    assert calls == [1]
    assert (got - plain).abs().max() <= 0.03 * plain.abs().max()


@pytest.mark.parametrize("reason", ["mask", "gradient", "float32", "few tokens"])
def test_the_mode_leaves_other_attention_alone(calls: list[int], reason: str) -> None:
    case = make_case(
        torch.float32 if reason == "float32" else torch.bfloat16, tokens=4 if reason == "few tokens" else 70
    )
    mask = torch.ones(70, 90, dtype=torch.bool) if reason == "mask" else None
    with torch.set_grad_enabled(reason == "gradient"), CpuAttention():
        got = F.scaled_dot_product_attention(*case, attn_mask=mask)
    assert not calls
    assert torch.equal(got, F.scaled_dot_product_attention(*case, attn_mask=mask))
