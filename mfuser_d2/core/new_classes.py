"""New class names for a trained head, without training.

Class texts come from the text encoder, so any words can be queries. Three things in the head belong to trained classes,
though: the pixel decoder's embedding per text, the decoder's embedding per query, and the rows of the class head. Every
new class borrows them from its parent, the trained class whose text is nearest. A trained name is its own parent, so
any subset or order of the trained names keeps its meaning, and the trained list gives the trained result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrainedClasses(NamedTuple):
    """What a head learned about its classes one by one.

    Attributes:
        tokens: (K, L) token ids of the names.
        texts: (K, E), before refinement.
        text_positions: (K, C) of the pixel decoder.
        query_positions: (K, C) of the transformer decoder.
    """

    tokens: Tensor
    texts: Tensor
    text_positions: Tensor
    query_positions: Tensor


class ClassLookup(nn.Module):
    """Turns the class head's logits over K trained classes into logits over K' new ones.

    The probability of a trained class goes to the new class whose own query is asked, if that is one of its children;
    another query's share is split evenly among the children. What no child takes is added to "none".

    Args:
        trained: of the head.
        parents: (K',) trained class of each new one.
        similarity: (K',) cosine between a new class and its parent.
    """

    def __init__(self, *, trained: TrainedClasses, parents: Tensor, similarity: Tensor) -> None:
        super().__init__()
        self.trained = trained
        is_sibling = parents[:, None] == parents
        own = torch.eye(len(parents), device=parents.device)
        shares = torch.where(is_sibling, own, 1 / is_sibling.sum(dim=0))
        self.register_buffer("parents", parents, persistent=False)
        self.register_buffer("similarity", similarity, persistent=False)
        self.register_buffer("shares", shares, persistent=False)  # (query, class)

    def forward(self, class_logits: Tensor) -> Tensor:
        """(..., K', K + 1) to (..., K', K' + 1); a softmax over the result gives the probabilities."""
        trained = class_logits.float().softmax(dim=-1)
        taken = trained[..., self.parents] * self.shares
        rest = (1 - taken.sum(dim=-1, keepdim=True)).clamp(min=0)
        return torch.cat([taken, rest], dim=-1).clamp(min=torch.finfo(torch.float32).tiny).log()


@torch.no_grad()
def adopt_classes(head: nn.Module, class_tokens: Tensor) -> ClassLookup:
    """Give a head other classes in place; see `TextQueryHead.set_classes`.

    Args:
        head: a `TextQueryHead` with its trained weights loaded; a checkpoint does not fit any more afterwards.
        class_tokens: (K', L) token ids.
    """
    encoder = head.text_encoder
    if not hasattr(encoder, "set_class_tokens"):
        raise ValueError(
            f"{type(encoder).__name__} knows no words (MODEL.MFUSER.QUERIES='learned'), so its classes cannot be "
            "replaced; use a model whose queries are texts"
        )
    _check_distinct(class_tokens)
    trained = head.class_lookup.trained if head.class_lookup is not None else _trained_classes(head)
    encoder.set_class_tokens(_padded_alike(class_tokens.to(trained.tokens.device), trained.tokens))
    similarity = F.normalize(encoder(), dim=1) @ F.normalize(trained.texts, dim=1).T  # (K', K)
    nearest = similarity.max(dim=1)
    parents = nearest.indices
    head.pixel_decoder.text_pos_embed = _embedding(trained.text_positions[parents])
    head.pixel_decoder.num_classes = len(parents)
    head.transformer_decoder.query_embed = _embedding(trained.query_positions[parents])
    head.transformer_decoder.num_queries = len(parents)
    return ClassLookup(trained=trained, parents=parents, similarity=nearest.values)


def _trained_classes(head: nn.Module) -> TrainedClasses:
    return TrainedClasses(
        head.text_encoder.class_tokens,
        head.text_encoder(),
        head.pixel_decoder.text_pos_embed.weight.detach(),
        head.transformer_decoder.query_embed.weight.detach(),
    )


def _padded_alike(tokens: Tensor, trained: Tensor) -> Tensor:
    """New names with at least as much padding as the trained ones had: SigLIP's text encoder looks at it."""
    missing = trained.shape[1] - tokens.shape[1]
    if missing <= 0:
        return tokens
    # Padding has the smallest id in the last column: 0 with CLIP, the end token 1 with SigLIP.
    return torch.cat([tokens, trained[:, -1].min().expand(len(tokens), missing)], dim=1)


def _check_distinct(tokens: Tensor) -> None:
    rows = [tuple(row) for row in tokens.tolist()]
    for index, row in enumerate(rows):
        if row in rows[:index]:
            raise ValueError(
                f"classes {rows.index(row)} and {index} (counted from 0) are the same words to the text encoder, which "
                "looks neither at capitals nor, with SigLIP, at punctuation; leave one out"
            )


def _embedding(rows: Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(rows.clone(), freeze=True)
