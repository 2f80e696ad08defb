"""Attention and feed-forward blocks shared by the two decoders."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over tokens (N, T, C).

    Parameters have the names, packing and initial values of `nn.MultiheadAttention` (rows q, k, v of
    `in_proj_weight`), so its weights load as they are; positional embeddings are the caller's business.

    Args:
        dim: token width C.
        num_heads: number of heads; has to divide `dim`.
    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}; choose a divisor of the width")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend from queries to keys.

        Args:
            query: (N, Q, C).
            key: (N, T, C).
            value: (N, T, C).
            allowed: bool, broadcastable to (N, heads, Q, T); True where a query may look. None: everywhere.
        Returns:
            (N, Q, C), without the residual.
        """
        tokens = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (self._split(F.linear(x, weight, bias)) for x, weight, bias in tokens)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # (N, heads, Q, C / heads)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T, C / heads)


class FeedForward(nn.Module):
    """Linear, ReLU, linear on tokens (N, T, C), without the residual.

    Args:
        dim: token width C.
        hidden_dim: width between the two layers.
    """

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x), inplace=True))
