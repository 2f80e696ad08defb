"""Depth-wise convolution + SiLU and the gated norm against the modules they replace."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mfuser_d2.core.ops import depthwise_conv_silu, gated_rms_norm
from mfuser_d2.core.ops.triton_support import triton_obstacle


@pytest.mark.parametrize("length", [1, 2, 7])
def test_conv_is_the_symmetric_depthwise_one(length):
    conv = nn.Conv1d(5, 5, 3, padding="same", groups=5, bias=False)
    x = torch.randn(2, length, 5, requires_grad=True)
    wanted = F.silu(conv(x.transpose(1, 2))).transpose(1, 2)
    got = depthwise_conv_silu(x, conv.weight)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad((got * weights).sum(), (x, conv.weight)),
        torch.autograd.grad((wanted * weights).sum(), (x, conv.weight)),
    ):
        torch.testing.assert_close(mine, theirs)


def test_norm_comes_before_the_gate():
    y, gate = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    weight = torch.randn(6)
    wanted = F.rms_norm(y, (6,), weight, eps=1e-5) * F.silu(gate)
    torch.testing.assert_close(gated_rms_norm(y, gate, weight), wanted)


def test_gradients_in_float64():
    x, weight = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(3, 1, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(depthwise_conv_silu, (x.requires_grad_(), weight.requires_grad_()))
    y, gate, scale = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4, 3), (2, 4, 3), (3,)))
    assert torch.autograd.gradcheck(gated_rms_norm, tuple(t.requires_grad_() for t in (y, gate, scale)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_its_dtype(dtype):
    y, gate, weight = torch.randn(2, 4, 64) * 300, torch.randn(2, 4, 64), torch.randn(64)  # squares overflow float16
    got = gated_rms_norm(y.to(dtype), gate.to(dtype), weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), gated_rms_norm(y, gate, weight), rtol=3e-2, atol=3e-2)
    x, kernel = torch.randn(2, 4, 64), torch.randn(64, 1, 3)
    got = depthwise_conv_silu(x.to(dtype), kernel)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), depthwise_conv_silu(x, kernel), rtol=3e-2, atol=3e-2)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="wanted"):
        depthwise_conv_silu(torch.randn(2, 4, 3), torch.randn(4, 1, 3))
    with pytest.raises(ValueError, match="wanted"):
        gated_rms_norm(torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.randn(4))


def gradients(function, *tensors):
    """Result and gradients of a fixed weighting of it."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    result = function(*leaves)
    weights = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape).to(result.dtype)
    return result, *torch.autograd.grad((result * weights).sum(), leaves)


@pytest.mark.parametrize("function", [depthwise_conv_silu, gated_rms_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_triton_equals_plain(function, dtype, is_transposed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 5, 7, device=device).transpose(1, 2) if is_transposed else torch.randn(2, 7, 5, device=device)
    obstacle = triton_obstacle(x)
    if obstacle:
        pytest.skip(obstacle)
    weight = torch.randn((5, 1, 3) if function is depthwise_conv_silu else (5,), device=device)
    tensors = (x, weight) if function is depthwise_conv_silu else (x, torch.randn_like(x), weight)
    wanted = gradients(function, *(tensor.double() for tensor in tensors))  # float64 takes the plain path
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(gradients(function, *(tensor.to(dtype) for tensor in tensors)), wanted):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
