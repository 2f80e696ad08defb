"""MTEnhancer: class-name embeddings refined by what the image shows (Eq. 7-10), and the variants of Table 6."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.adapters.mvfuser import MVFuserBlock
from mfuser_d2.core.attention import MultiHeadAttention


class ClassSelfAttention(nn.Module):
    """Multi-head self-attention over the classes, q, k and v without bias (Eq. 7).

    Args:
        dim: width, divisible by `num_heads`.
        num_heads: attention heads.
        dropout: on the output, in training.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"MODEL.MFUSER.MT_ENHANCER.WIDTH={dim} is not divisible by NUM_HEADS={num_heads}")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, texts: Tensor) -> Tensor:
        """(N, K, C) to (N, K, C)."""
        query, key, value = (
            proj(texts).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (N, heads, K, C / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(mixed))


class ImageCrossAttention(nn.Module):
    """Class texts query the visual tokens: what the paper compares the Mamba block with.

    Args:
        dim: width, divisible by `num_heads`.
        num_heads: attention heads.
        dropout: on the output, in training.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(dim=dim, num_heads=num_heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, texts: Tensor, visual: Tensor) -> Tensor:
        """(N, K, C) and (N, T, C) to (N, K, C)."""
        return self.dropout(self.attn(texts, visual, visual))


class LayerParts(NamedTuple):
    """What an MTEnhancer layer consists of besides its MLP.

    Attributes:
        has_attention: self-attention over the classes.
        reader: what brings in the image: "mamba", "cross_attention", or None.
        has_leading_texts: the Mamba block reads `[text; image; text]` instead of `[image; text]`.
    """

    has_attention: bool = True
    reader: str | None = "mamba"
    has_leading_texts: bool = True


FULL = LayerParts()

ENHANCERS: dict[str, LayerParts | None] = {
    "none": None,
    "attention": LayerParts(reader=None),
    "mamba": LayerParts(has_attention=False),
    "one_text_copy": LayerParts(has_leading_texts=False),
    "cross_attention": LayerParts(reader="cross_attention"),
    "full": FULL,
}
"""The refinements of Table 6. A single copy of the texts follows the image: the scan runs forward only, so texts before
it would never hear of it."""


class MTEnhancer(nn.Module):
    """One refinement layer: attention over classes, Mamba over `[text; image; text]`, MLP; residual around each.

    Args:
        dim: width of texts and visual tokens.
        num_heads: heads of the attentions.
        dropout: in training, after attention, Mamba and twice in the MLP.
        state_dim: states per channel of the scan.
        parts: which of these parts there are.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        dropout: float = 0.1,
        state_dim: int = 16,
        parts: LayerParts = FULL,
    ) -> None:
        super().__init__()
        self.parts = parts
        if parts.has_attention:
            self.norm1 = nn.LayerNorm(dim)
            self.self_attn = ClassSelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        if parts.reader is not None:
            self.norm2 = nn.LayerNorm(dim)
        if parts.reader == "mamba":
            self.mamba = MVFuserBlock(dim=dim, state_dim=state_dim, dropout=dropout)
        elif parts.reader == "cross_attention":
            self.image_attn = ImageCrossAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, texts: Tensor, visual: Tensor) -> Tensor:
        """Refine texts (N, K, C) by visual tokens (N, T, C); returns (N, K, C)."""
        if self.parts.has_attention:
            texts = texts + self.self_attn(self.norm1(texts))
        if self.parts.reader == "mamba":
            texts = self._scan_image(texts, visual)
        elif self.parts.reader == "cross_attention":
            texts = texts + self.image_attn(self.norm2(texts), visual)
        return texts + self.mlp(self.norm3(texts))

    def _scan_image(self, texts: Tensor, visual: Tensor) -> Tensor:
        num_classes, normed = texts.shape[1], self.norm2(texts)
        if not self.parts.has_leading_texts:
            return texts + self.mamba(torch.cat([visual, normed], dim=1))[:, -num_classes:]
        mixed = self.mamba(torch.cat([normed, visual, normed], dim=1))
        return texts + mixed[:, :num_classes] + mixed[:, -num_classes:]


class NoRefiner(nn.Module):
    """Class texts as they are, whatever the image shows."""

    def forward(self, texts: Tensor, visual: Tensor) -> Tensor:
        """(N, K, E), unchanged."""
        return texts


class TextRefiner(nn.Module):
    """MTEnhancer layers between projections into a small width and back; `texts + gamma * refined`.

    Args:
        text_dim: E, width of texts and visual embeddings.
        width: inside, divisible by `num_heads`.
        num_heads: heads of the attentions.
        num_layers: MTEnhancer layers.
        dropout: in training.
        parts: what a layer consists of; without a part that reads the image, nothing here looks at it.
    """

    def __init__(
        self,
        *,
        text_dim: int,
        width: int = 256,
        num_heads: int = 4,
        num_layers: int = 1,
        dropout: float = 0.1,
        parts: LayerParts = FULL,
    ) -> None:
        super().__init__()
        self.reads_image = parts.reader is not None
        if self.reads_image:
            self.visual_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.layers = nn.ModuleList(
            MTEnhancer(dim=width, num_heads=num_heads, dropout=dropout, parts=parts) for _ in range(num_layers)
        )
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim))
        self.apply(_init_linear)
        # Standard deviation 1, cut at 2: the release overwrites the small value it means to start from.
        self.gamma = nn.Parameter(nn.init.trunc_normal_(torch.empty(text_dim)))

    def forward(self, texts: Tensor, visual: Tensor) -> Tensor:
        """Refine the class texts.

        Args:
            texts: (N, K, E), not normalised.
            visual: (N, T, E) global embedding first, then the dense ones; not normalised.
        Returns:
            (N, K, E), not normalised.
        """
        return texts + self.gamma * self.residual(texts, visual)

    def residual(self, texts: Tensor, visual: Tensor) -> Tensor:
        """What is added to the texts, before `gamma`: (N, K, E)."""
        visual, refined = self.visual_proj(visual) if self.reads_image else visual, self.text_proj(texts)
        for layer in self.layers:
            refined = layer(refined, visual)
        return self.out_proj(refined)


def build_refiner(kind: str, *, text_dim: int, **options: int | float) -> nn.Module:
    """A text refinement by its name in `ENHANCERS`; arguments as `TextRefiner`.

    Raises:
        KeyError: the name is unknown.
    """
    if kind not in ENHANCERS:
        raise KeyError(f"MODEL.MFUSER.MT_ENHANCER.KIND={kind!r} is unknown; choose from {sorted(ENHANCERS)}")
    parts = ENHANCERS[kind]
    return NoRefiner() if parts is None else TextRefiner(text_dim=text_dim, parts=parts, **options)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
