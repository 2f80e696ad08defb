"""The decode head: class texts, refined by the image, query a mask decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.backbone import DENSE_EMBEDDING, GLOBAL_EMBEDDING, PYRAMID_LEVELS
from mfuser_d2.core.encoders.text import PromptedTextEncoder
from mfuser_d2.core.mt_enhancer import TextRefiner
from mfuser_d2.core.new_classes import ClassLookup, adopt_classes
from mfuser_d2.core.ops.grid import map_to_tokens
from mfuser_d2.core.pixel_decoder import PixelDecoder
from mfuser_d2.core.transformer_decoder import TransformerDecoder


class HeadOutput(NamedTuple):
    """All predictions of the head; query k is class k.

    Attributes:
        class_logits: (L + 1, N, K, K + 1), before the first decoder layer and after each; the last class is "none".
        mask_logits: (L + 1, N, K, h, w) at the pyramid's finest scale.
        alignment_logits: (N, K, h', w'), similarity of patches and class texts, scaled as the alignment loss wants it.
    """

    class_logits: Tensor
    mask_logits: Tensor
    alignment_logits: Tensor


class TextQueryHead(nn.Module):
    """Prompted texts, MTEnhancer, pixel decoder and masked-attention decoder in one.

    Args:
        text_encoder: class names to texts (K, E).
        text_refiner: texts and image embeddings to refined texts.
        pixel_decoder: pyramid and texts to mask features and memories.
        transformer_decoder: refined texts as queries to class and mask logits.
        alignment_scale, alignment_bias: similarity * scale + bias are the logits of the alignment loss: 1/0.07 and 0
            for CLIP and EVA02-CLIP, the model's own exp(logit_scale) and logit_bias for SigLIP.
    """

    def __init__(
        self,
        *,
        text_encoder: PromptedTextEncoder,
        text_refiner: TextRefiner,
        pixel_decoder: PixelDecoder,
        transformer_decoder: TransformerDecoder,
        alignment_scale: float,
        alignment_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_refiner = text_refiner
        self.pixel_decoder = pixel_decoder
        self.transformer_decoder = transformer_decoder
        self.alignment_scale = alignment_scale
        self.alignment_bias = alignment_bias
        self.class_lookup: ClassLookup | None = None
        self._cached_texts: Tensor | None = None

    def set_classes(self, class_tokens: Tensor) -> ClassLookup:
        """Predict other classes from now on, without training; see `new_classes` for what stands in for what.

        Args:
            class_tokens: (K', L) token ids of the new names.
        Returns:
            for each new class the trained one that it is nearest to.
        Raises:
            ValueError: two names are the same tokens, a name is too long, or the queries are learned without texts.
        """
        self.class_lookup = adopt_classes(self, class_tokens)
        self._cached_texts = None
        return self.class_lookup

    @property
    def num_classes(self) -> int:
        return self.text_encoder.num_classes

    def train(self, mode: bool = True) -> TextQueryHead:
        self._cached_texts = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._cached_texts = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: object, **kwargs: object) -> TextQueryHead:
        self._cached_texts = None
        return super()._apply(*args, **kwargs)

    def class_texts(self) -> Tensor:
        """Class texts (K, E) before refinement; in eval mode without gradients they are computed only once."""
        if self.training or torch.is_grad_enabled():
            return self.text_encoder()
        if self._cached_texts is None:
            self._cached_texts = self.text_encoder()
        return self._cached_texts

    def forward(self, features: dict[str, Tensor], *, last_only: bool = False) -> HeadOutput:
        """Predict from the backbone's features (see `DualEncoderBackbone.forward`).

        Args:
            features: "res2".."res5", "global_embedding", "dense_embedding".
            last_only: give only the last decoder layer's prediction, which is all that inference needs.
        """
        texts, dense = self.refined_texts(features), features[DENSE_EMBEDDING]
        similarity = torch.einsum("nehw,nke->nkhw", F.normalize(dense, dim=1), F.normalize(texts, dim=2))
        mask_features, memories = self.pixel_decoder([features[level] for level in PYRAMID_LEVELS], texts)
        class_logits, mask_logits = self.transformer_decoder(memories, mask_features, texts, last_only=last_only)
        if self.class_lookup is not None:
            class_logits = self.class_lookup(class_logits)
        return HeadOutput(class_logits, mask_logits, similarity * self.alignment_scale + self.alignment_bias)

    def refined_texts(self, features: dict[str, Tensor]) -> Tensor:
        """Class texts refined by the image, (N, K, E), not normalised."""
        dense = features[DENSE_EMBEDDING]
        visual = torch.cat([features[GLOBAL_EMBEDDING], map_to_tokens(dense)], dim=1)
        return self.text_refiner(self.class_texts().expand(len(dense), -1, -1), visual)
