"""Masked-attention decoder whose queries are the class texts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.attention import FeedForward, MultiHeadAttention
from mfuser_d2.core.position_encoding import sine_position_encoding


class TransformerDecoderLayer(nn.Module):
    """Masked attention to one memory, self-attention, feed-forward; a layer norm after each residual.

    Args:
        dim: token width C.
        num_heads: heads of both attentions.
        ffn_dim: hidden width of the feed-forward block.
    """

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attn = MultiHeadAttention(dim=dim, num_heads=num_heads)
        self.self_attn = MultiHeadAttention(dim=dim, num_heads=num_heads)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, positions: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        """Refine the queries.

        Args:
            queries: (N, Q, C).
            positions: (Q, C), added to the queries (and keys of self-attention), never to values.
            keys: (N, T, C), values with their positions.
            values: (N, T, C).
            allowed: (N, 1, Q, T) bool, True where a query may look.
        Returns:
            (N, Q, C).
        """
        queries = self.norm1(queries + self.cross_attn(queries + positions, keys, values, allowed))
        placed = queries + positions
        queries = self.norm2(queries + self.self_attn(placed, placed, queries))
        return self.norm3(queries + self.ffn(queries))


class TransformerDecoder(nn.Module):
    """Class and mask logits for every query, before the first and after every layer.

    Query k starts as the text of class k; each layer attends to one memory, in turn, within the query's own last mask.

    Args:
        hidden_dim: width C of queries and memories, a multiple of 4 and of `num_heads`.
        mask_dim: channels of the mask features.
        text_dim: width E of the class texts.
        num_queries: Q, one per class text.
        num_classes: K; class logits have one entry more, for "no object".
        num_levels: number of memories.
        num_layers: L, decoder layers.
        num_heads: attention heads.
        ffn_dim: hidden width of the feed-forward blocks.
    """

    def __init__(
        self,
        *,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        text_dim: int,
        num_queries: int,
        num_classes: int,
        num_levels: int = 3,
        num_layers: int = 9,
        num_heads: int = 8,
        ffn_dim: int = 2048,
    ) -> None:
        super().__init__()
        self.num_queries, self.num_levels = num_queries, num_levels
        self.text_proj = nn.Sequential(
            nn.Linear(text_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, hidden_dim)
        )
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(dim=hidden_dim, num_heads=num_heads, ffn_dim=ffn_dim) for _ in range(num_layers)
        )
        self.post_norm = nn.LayerNorm(hidden_dim)
        self.class_head = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, mask_dim),
        )

    def forward(
        self, memories: Sequence[Tensor], mask_features: Tensor, texts: Tensor, *, last_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode the class texts into one mask per class.

        Args:
            memories: `num_levels` maps (N, C, h, w), low to high resolution, of any size.
            mask_features: (N, mask_dim, h_0, w_0).
            texts: (N, Q, E), refined class texts, not normalised.
            last_only: give only the last prediction, which is all that inference needs.
        Returns:
            class logits (L+1, N, Q, K+1) and mask logits (L+1, N, Q, h_0, w_0); index 0 is the prediction before the
            first layer. With `last_only` the first axis has length 1.
        Raises:
            ValueError: the number of memories or texts is another than at construction.
        """
        if len(memories) != self.num_levels:
            raise ValueError(f"got {len(memories)} memories, this decoder was built for {self.num_levels}")
        if texts.shape[1] != self.num_queries:
            raise ValueError(f"got {texts.shape[1]} class texts, this decoder was built for {self.num_queries} queries")
        levels = self._prepare_levels(memories, mask_features)
        queries = self.text_proj(texts)
        states, embeddings = [], []
        for index in range(len(self.layers) + 1):
            states.append(self.post_norm(queries))
            embeddings.append(self.mask_head(states[-1]))  # (N, Q, mask_dim)
            if index < len(self.layers):
                keys, values, features = levels[index % self.num_levels]
                allowed = allowed_positions(embeddings[-1], features)
                queries = self.layers[index](queries, self.query_embed.weight, keys, values, allowed)
        first = len(self.layers) if last_only else 0
        class_logits = self.class_head(torch.stack(states[first:]))
        # One product for all predictions, so that the mask features get their gradient once.
        mask_logits = torch.einsum("lnqc,nchw->lnqhw", torch.stack(embeddings[first:]), mask_features)
        return class_logits, mask_logits

    def _prepare_levels(self, memories: Sequence[Tensor], mask_features: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys (N, T, C), values (N, T, C) and shrunken mask features (N, mask_dim, T) of each memory."""
        levels = []
        for memory, embedding in zip(memories, self.level_embed.weight, strict=True):
            size = (memory.shape[2], memory.shape[3])
            values = memory.flatten(2).transpose(1, 2) + embedding
            position = sine_position_encoding(size, values.shape[2], device=values.device, dtype=values.dtype)
            # Resizing is linear: shrinking the features once stands for shrinking the mask logits at every layer.
            features = F.interpolate(mask_features.detach(), size=size, mode="bilinear", align_corners=False)
            levels.append((values + position, values, features.flatten(2)))
        return levels


@torch.no_grad()
def allowed_positions(embeddings: Tensor, features: Tensor) -> Tensor:
    """Where each query may look: inside its mask, or everywhere if that is empty.

    Args:
        embeddings: (N, Q, mask_dim), mask embeddings of the queries.
        features: (N, mask_dim, T), mask features at the memory's resolution.
    Returns:
        (N, 1, Q, T) bool, the same for all heads.
    """
    # "Not below one half" also lets a query look where its logit is NaN, so a broken mask cannot empty a row.
    allowed = ~((embeddings @ features).sigmoid() < 0.5)
    return (allowed | ~allowed.any(dim=2, keepdim=True))[:, None]
