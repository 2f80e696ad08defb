"""What can stand in place of the prompted class texts: fixed templates, or queries that are learned outright."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.encoders.text import TextTower


def fill_templates(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Every class name in every template, template by template.

    Args:
        templates: sentences with `{}` in the name's place, e.g. "a photo of a {}.".
        class_names: K names.
    Raises:
        ValueError: a template has not exactly one `{}`.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"MODEL.MFUSER.PROMPT_TEMPLATES: {template!r} has to have one {{}}, where the class name goes"
            )
    return [template.replace("{}", name) for template in templates for name in class_names]


class TemplateTextEncoder(nn.Module):
    """Class-name embeddings from fixed sentences, the mean over the templates' directions; nothing is learned.

    Args:
        tower: frozen text tower.
        sentence_tokens: (templates * K, L) token ids, as `fill_templates` orders the sentences.
        num_classes: K.
    """

    def __init__(self, *, tower: TextTower, sentence_tokens: Tensor, num_classes: int) -> None:
        super().__init__()
        tower.set_length(sentence_tokens.shape[1])
        self.tower = tower
        self.num_classes = num_classes
        self.num_templates = len(sentence_tokens) // num_classes
        self.register_buffer("sentence_tokens", sentence_tokens, persistent=False)

    @property
    def class_tokens(self) -> Tensor:
        """Token ids of all sentences, (templates * K, L)."""
        return self.sentence_tokens

    def set_class_tokens(self, class_tokens: Tensor) -> None:
        """Speak of other classes from now on: (templates * K, L) ids of the same templates with other names."""
        self.tower.ensure_length(class_tokens.shape[1])
        self.sentence_tokens = class_tokens.to(self.sentence_tokens.device)
        self.num_classes = len(class_tokens) // self.num_templates

    @property
    def joint_dim(self) -> int:
        return self.tower.joint_dim

    def forward(self) -> Tensor:
        """Embeddings of all classes, (K, E), with the mean length of their sentences' embeddings."""
        tokens = self.tower.model.token_embedding(self.sentence_tokens)
        # The end token has the largest id of CLIP's vocabulary.
        embeddings = self.tower(tokens, self.sentence_tokens.argmax(dim=1)).unflatten(0, (-1, self.num_classes))
        lengths = embeddings.norm(dim=2, keepdim=True).mean(dim=0)  # (K, 1)
        # A template with long embeddings counts no more than the others, as usual with CLIP.
        return F.normalize(F.normalize(embeddings, dim=2).mean(dim=0), dim=1) * lengths


class LearnedQueries(nn.Module):
    """One learned vector per class in place of a text: the network then knows nothing of language.

    Args:
        num_classes: K.
        joint_dim: E, width of the dense embedding that they are compared with.
    """

    def __init__(self, *, num_classes: int, joint_dim: int) -> None:
        super().__init__()
        self.joint_dim = joint_dim
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_classes, joint_dim)))

    @property
    def num_classes(self) -> int:
        return self.queries.shape[0]

    def forward(self) -> Tensor:
        """(K, E)."""
        return self.queries
