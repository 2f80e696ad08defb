"""The frozen text half of a vision-language model with learned prompts (CoOp) before each class name."""

from __future__ import annotations

import math

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from mfuser_d2.core.encoders.tower import FrozenModule


class TextTower(FrozenModule):
    """The frozen text transformer, driven from token embeddings because prompts are inserted between them.

    Args:
        model: open_clip's text transformer.
        logit_scale, logit_bias: of the image-text similarity in the model's own loss, the scale as a logarithm. They
            belong to the weights (SigLIP); the defaults are SigLIP's before training.
    """

    def __init__(self, *, model: TextTransformer, logit_scale: float = math.log(10.0), logit_bias: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.width = model.token_embedding.embedding_dim
        self.joint_dim = model.output_dim
        self.max_length = model.positional_embedding.shape[0]
        # In a tuple, so that it is neither parameter nor buffer: checkpoints hold the rows in use.
        self._whole = (model.positional_embedding.detach(), model.attn_mask)
        self.freeze()

    def set_length(self, length: int) -> None:
        """Keep the first `length` rows of the position table; longer sequences are refused from then on.

        Raises:
            ValueError: the table is shorter than that.
        """
        if length > self.max_length:
            raise ValueError(
                f"prompt and class name take {length} tokens, the text encoder knows {self.max_length} positions; "
                "use a smaller MODEL.MFUSER.PROMPT_LENGTH or shorter class names"
            )
        model = self.model
        model.positional_embedding = nn.Parameter(model.positional_embedding[:length].clone(), requires_grad=False)
        if model.attn_mask is not None:
            model.attn_mask = model.attn_mask[:length, :length].clone()
        self.max_length = length

    def ensure_length(self, length: int) -> None:
        """Take back what `set_length` cut off, for class names that are longer than those trained on.

        Raises:
            ValueError: the model has no such position, or its weights are random and no checkpoint holds those rows.
        """
        if length <= self.max_length:
            return
        model, (positions, mask) = self.model, self._whole
        if length > len(positions) or getattr(self, "has_random_weights", False):
            raise ValueError(
                f"prompt and class name take {length} tokens, the text encoder has {self.max_length} positions"
                + (" (its weights are random, so there are no others)" if length <= len(positions) else "")
                + "; use shorter class names"
            )
        used = model.positional_embedding
        added = positions[self.max_length : length].to(used)
        model.positional_embedding = nn.Parameter(torch.cat([used, added]), requires_grad=False)
        if mask is not None:
            model.attn_mask = mask[:length, :length].to(model.attn_mask)
        self.max_length = length

    def forward(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Embed sequences of token embeddings.

        Args:
            embeddings: (K, L, C), tokens and prompts, without positions.
            end: (K,) index of each sequence's end token, where CLIP-like models read their result; models that pool
                the last position (SigLIP) do not look at it.
        Returns:
            (K, E), not normalised.
        """
        model, length = self.model, embeddings.shape[1]
        tokens = embeddings + model.positional_embedding[:length]
        mask = None if model.attn_mask is None else model.attn_mask[:length, :length]
        tokens = model.ln_final(model.transformer(tokens, attn_mask=mask))
        if model.pool_type == "last":
            pooled = tokens[:, -1]
        else:
            pooled = tokens[torch.arange(len(tokens), device=tokens.device), end]
        projection = model.text_projection
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


class PromptedTextEncoder(nn.Module):
    """Class-name embeddings with learned context: `[start, prompt_1..n, name, end, pad]` through the frozen tower.

    Args:
        tower: frozen text tower.
        class_tokens: (K, L) token ids, one row a class, starting with the start token where the model has one.
        prompt_length: n, learned vectors inserted after the first token (CoOp). 0 leaves the names alone.
    Raises:
        ValueError: `class_tokens` is no (K, L) table with K, L >= 1, or an id is outside the vocabulary.
    """

    def __init__(self, *, tower: TextTower, class_tokens: Tensor, prompt_length: int) -> None:
        super().__init__()
        if class_tokens.ndim != 2 or 0 in class_tokens.shape:
            raise ValueError(
                f"class_tokens is {tuple(class_tokens.shape)}, wanted one row of token ids per class (K, L)"
            )
        tower.set_length(class_tokens.shape[1] + prompt_length)
        self.tower = tower
        self.prompt_length = prompt_length
        self.register_buffer("class_tokens", torch.empty(0, dtype=torch.long), persistent=False)
        self.set_class_tokens(class_tokens)
        # Standard deviation 1, cut at 2: what the release starts from.
        self.prompt = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prompt_length, tower.width)))

    def set_class_tokens(self, class_tokens: Tensor) -> None:
        """Speak of other classes from now on; the learned prompt stays.

        Args:
            class_tokens: (K, L) token ids; L plus the prompt length must fit the tower's position table.
        """
        vocabulary = self.tower.model.token_embedding.num_embeddings
        if int(class_tokens.min()) < 0 or int(class_tokens.max()) >= vocabulary:
            raise ValueError(
                f"token id {int(class_tokens.max())} is outside the text encoder's vocabulary of {vocabulary}; "
                "the class names were tokenized for another encoder"
            )
        self.tower.ensure_length(class_tokens.shape[1] + self.prompt_length)
        self.class_tokens = class_tokens.to(self.class_tokens.device)

    @property
    def num_classes(self) -> int:
        return self.class_tokens.shape[0]

    @property
    def joint_dim(self) -> int:
        return self.tower.joint_dim

    def forward(self) -> Tensor:
        """Embeddings of all classes, (K, E), not normalised; gradients reach the prompt."""
        tokens = self.tower.model.token_embedding(self.class_tokens)  # (K, L, C)
        prompt = self.prompt.expand(len(tokens), -1, -1)
        sequence = torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], dim=1)
        # The end token has the largest id of CLIP's vocabulary.
        return self.tower(sequence, self.class_tokens.argmax(dim=1) + self.prompt_length)
