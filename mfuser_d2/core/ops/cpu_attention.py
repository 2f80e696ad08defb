"""Attention in bfloat16 on the CPU, head by head.

PyTorch's fused kernel for the CPU multiplies at an eighth of the processor's rate in bfloat16 where there is no AMX;
two plain products around a softmax in place take 0.4 of its time (tools/BENCHMARKS.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MIN_SCORES = 64 * 64
"""Scores a head below which the fused kernel is as fast."""


def attend_by_head(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """`F.scaled_dot_product_attention` without mask and without gradient.

    The scores are rounded to the tensors' dtype, as in attention that is written out.

    Args:
        query: (N, heads, Q, C).
        key, value: (N, heads, T, C).
        scale: factor of the scores; None: C ** -0.5.
    Returns:
        (N, heads, Q, C).
    """
    batch_heads, (rows, width) = query.shape[:2], query.shape[2:]
    query = (query * (width**-0.5 if scale is None else scale)).flatten(0, 1)
    key, value = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    scores = query.new_empty(rows, key.shape[2])  # of one head at a time, so that they stay in the cache
    for index in range(len(query)):
        torch.mm(query[index], key[index], out=scores)
        torch.softmax(scores, dim=-1, out=scores)
        torch.mm(scores, value[index], out=out[index])
    return out.unflatten(0, batch_heads)


class CpuAttention(TorchFunctionMode):
    """Inside, attention in bfloat16 on the CPU runs by `attend_by_head` wherever nothing but the result is asked for.

    A mode, because the frozen encoders call `F.scaled_dot_product_attention` from within their libraries.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _suits(*args, **kwargs):
            return attend_by_head(*args[:3], scale=kwargs.get("scale"))
        if func is F.multi_head_attention_forward and _is_plain(*args, **kwargs):
            with self:
                return _self_attention(*args, **kwargs), None
        return func(*args, **kwargs)


def _suits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.dim() == 4
        and query.shape[-2] * key.shape[-2] >= MIN_SCORES
        and attn_mask is None
        and not (dropout_p or is_causal or enable_gqa or torch.is_grad_enabled())
    )


def _is_plain(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, in_weight: Tensor | None,
    in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero: bool, *_: Any, **options: Any,
) -> bool:  # fmt: skip
    """Whether `nn.MultiheadAttention` is asked for self-attention and nothing else, as in CLIP's image encoder."""
    wanted = {"need_weights": False, "attn_mask": None, "key_padding_mask": None}
    is_self = query is key is value and in_weight is not None and bias_k is None and not add_zero
    return is_self and not torch.is_grad_enabled() and all(options.get(k) is v for k, v in wanted.items())


def _self_attention(
    tokens: Tensor, _key: Tensor, _value: Tensor, _dim: int, num_heads: int, in_weight: Tensor, in_bias: Tensor | None,
    _bias_k: None, _bias_v: None, _add_zero: bool, _dropout: float, out_weight: Tensor, out_bias: Tensor | None,
    **_: Any,
) -> Tensor:  # fmt: skip
    """`F.multi_head_attention_forward` of plain self-attention in eval mode, (T, N, C) to the same shape."""
    packed = F.linear(tokens, in_weight, in_bias).unflatten(2, (3, num_heads, -1))
    out = F.scaled_dot_product_attention(*packed.permute(2, 1, 3, 0, 4))  # (N, heads, T, C / heads)
    return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)
