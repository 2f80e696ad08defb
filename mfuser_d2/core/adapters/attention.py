"""Adapters that bring the encoders together by attention: over all tokens, across encoders, or to learned tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfuser_d2.core.adapters.co_adapter import CoAdapter, JointAdapter, SmallStep, TokenLayout
from mfuser_d2.core.attention import MultiHeadAttention


class ConcatSelfAttention(JointAdapter):
    """Multi-head self-attention over `[v; l]`, normed first.

    Args:
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`.
        num_heads: attention heads; divides the VLM's width.
        dropout: on the correction, in training.
    """

    def __init__(
        self, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False, num_heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm)
        self.norm = nn.LayerNorm(vlm_dim)
        self.attn = MultiHeadAttention(dim=vlm_dim, num_heads=num_heads)
        self.step = SmallStep(dropout)

    def fuse_joint(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        tokens = self.norm(tokens)
        return self.step(self.attn(tokens, tokens, tokens))


class SeparateSelfAttention(CoAdapter):
    """Two attentions with weights of their own: VFM tokens query the VLM's, VLM tokens query the VFM's.

    Args:
        as `ConcatSelfAttention`.
    """

    def __init__(
        self, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False, num_heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm)
        self.vfm_norm, self.vlm_norm = nn.LayerNorm(vlm_dim), nn.LayerNorm(vlm_dim)
        self.vfm_attn = MultiHeadAttention(dim=vlm_dim, num_heads=num_heads)
        self.vlm_attn = MultiHeadAttention(dim=vlm_dim, num_heads=num_heads)
        self.vfm_step, self.vlm_step = SmallStep(dropout), SmallStep(dropout)

    def fuse(self, vfm: Tensor, vlm: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        vfm, vlm = self.vfm_norm(vfm), self.vlm_norm(vlm)
        return self.vfm_step(self.vfm_attn(vfm, vlm, vlm)), self.vlm_step(self.vlm_attn(vlm, vfm, vfm))


class TokenCrossAttention(JointAdapter):
    """Every token of both encoders asks one set of learned tokens, after Rein.

    The first learned token stands for "no correction": it takes its share of the softmax and gives nothing back.

    Args:
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`.
        num_tokens: learned tokens, at least two.
        dropout: on the correction, in training.
    Raises:
        ValueError: fewer than two tokens.
    """

    def __init__(
        self, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False, num_tokens: int = 100, dropout: float = 0.1
    ) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm)
        if num_tokens < 2:
            raise ValueError(
                f"MODEL.MFUSER.ADAPTER.NUM_TOKENS={num_tokens} leaves none beside the one for no correction; give two"
            )
        self.tokens = nn.Parameter(torch.empty(num_tokens, vlm_dim))
        nn.init.trunc_normal_(self.tokens, std=vlm_dim**-0.5)
        self.value_proj = nn.Linear(vlm_dim, vlm_dim)
        self.out_proj = nn.Linear(vlm_dim, vlm_dim)
        self.step = SmallStep(dropout)

    def fuse_joint(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        shares = (tokens @ self.tokens.T * tokens.shape[2] ** -0.5).softmax(dim=2)  # (N, Tv + Tl, learned)
        found = shares[..., 1:] @ self.value_proj(self.tokens[1:])
        return self.step(self.out_proj(tokens + found))
