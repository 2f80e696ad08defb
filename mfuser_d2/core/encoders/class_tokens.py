"""Class names to token ids, in the vocabulary of each vision-language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

MIN_TOKENS = 5
"""Fewest token positions per class, prompts not counted, as in the release; SigLIP attends to the padding."""

SIGLIP_TABLE = Path(__file__).with_name("siglip_tokens.json")
SIGLIP_END = 1
"""SigLIP's end token, which is also its padding."""


def check_class_names(names: Sequence[str]) -> None:
    """Refuse empty and repeated class names.

    Raises:
        ValueError: names the culprit.
    """
    if not names:
        raise ValueError("the class list is empty; give at least one class name")
    for index, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"class {index} has an empty name; every class needs a word")
        if name in names[:index]:
            raise ValueError(f"class name {name!r} occurs twice; queries are told apart by their names")


def tokenize_classes(names: Sequence[str], *, vocabulary: str, sentencepiece_file: str = "") -> Tensor:
    """Token ids of class names, without any template text around them.

    Args:
        names: K class names.
        vocabulary: "clip" (CLIP, EVA02-CLIP, PE: start, name, end, zeros) or "siglip" (name, then end tokens).
        sentencepiece_file: SigLIP's `spiece.model`; needed for names outside the committed table.
    Returns:
        (K, L) int64, L = 5 or what the longest name takes.
    Raises:
        ValueError: an empty or repeated name, or a name that the committed table lacks.
        KeyError: an unknown vocabulary.
    """
    check_class_names(names)
    if vocabulary == "clip":
        tokenizer = SimpleTokenizer()
        rows = [[tokenizer.sot_token_id, *tokenizer.encode(name), tokenizer.eot_token_id] for name in names]
        padding = 0
    elif vocabulary == "siglip":
        rows = [[*ids, SIGLIP_END] for ids in _siglip_ids(names, sentencepiece_file)]
        padding = SIGLIP_END
    else:
        raise KeyError(f"vocabulary {vocabulary!r} is unknown; choose from ['clip', 'siglip']")
    length = max(MIN_TOKENS, *(len(row) for row in rows))
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows])


def _siglip_ids(names: Sequence[str], sentencepiece_file: str) -> list[list[int]]:
    if sentencepiece_file:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=sentencepiece_file)
        return [processor.encode(name.lower()) for name in names]
    table = json.loads(SIGLIP_TABLE.read_text())["ids"] if SIGLIP_TABLE.is_file() else {}
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(
            f"SigLIP token ids of {unknown} are not in the committed table; set MODEL.MFUSER.VLM.TOKENIZER to the "
            "spiece.model of huggingface.co/google/siglip-large-patch16-384"
        )
    return [table[name] for name in names]
