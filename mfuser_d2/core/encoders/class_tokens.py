"""Class names to token ids, in the vocabulary of each vision-language model."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

MIN_TOKENS = 5
"""Fewest token positions per class, prompts not counted, as in the release; SigLIP attends to the padding."""

SIGLIP_TABLE = Path(__file__).with_name("siglip_tokens.json")
SIGLIP_END = 1
"""SigLIP's end token, which is also its padding, and SigLIP2's, which pads with 0."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


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


def tokenize_classes(names: Sequence[str], *, vocabulary: str, tokenizer_file: str = "") -> Tensor:
    """Token ids of class names, without any template text around them.

    Args:
        names: K class names.
        vocabulary: "clip" (CLIP, EVA02-CLIP, PE: start, name, end, zeros), "siglip" (name, then end tokens) or
            "siglip2" (Gemma's words: name, end, zeros).
        tokenizer_file: SigLIP's `spiece.model` or `tokenizer.json`; needed for names outside the committed table, and
            for SigLIP2, whose `tokenizer.json` it then is, always.
    Returns:
        (K, L) int64, L = 5 or what the longest name takes.
    Raises:
        ValueError: an empty or repeated name, a name that the committed table lacks, or SigLIP2 without its file.
        KeyError: an unknown vocabulary.
    """
    check_class_names(names)
    if vocabulary == "clip":
        tokenizer = SimpleTokenizer()
        rows = [[tokenizer.sot_token_id, *tokenizer.encode(name), tokenizer.eot_token_id] for name in names]
        padding = 0
    elif vocabulary in ("siglip", "siglip2"):
        if vocabulary == "siglip2" and not tokenizer_file:
            raise ValueError(
                "the committed table holds ids of SigLIP, SigLIP2 has other ones; set MODEL.MFUSER.VLM.TOKENIZER to "
                "the tokenizer.json of huggingface.co/google/siglip2-large-patch16-384"
            )
        rows = [[*ids, SIGLIP_END] for ids in siglip_ids(names, tokenizer_file)]
        padding = SIGLIP_END if vocabulary == "siglip" else 0
    else:
        raise KeyError(f"vocabulary {vocabulary!r} is unknown; choose from ['clip', 'siglip', 'siglip2']")
    length = max(MIN_TOKENS, *(len(row) for row in rows))
    # On the CPU whatever the default device: ids are checked, and a model may be built without memory.
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows], device="cpu")


def siglip_ids(names: Sequence[str], tokenizer_file: str = "") -> list[list[int]]:
    """SigLIP's ids of each name, lower-case and without punctuation, no end token.

    Args:
        names: class names.
        tokenizer_file: see `tokenize_classes`; "" looks them up in the committed table.
    Raises:
        FileNotFoundError: there is no such tokenizer file.
        ValueError: the table lacks a name.
    """
    words = [" ".join(name.lower().translate(_NO_PUNCTUATION).split()) for name in names]
    if not tokenizer_file:
        table = json.loads(SIGLIP_TABLE.read_text(encoding="utf-8"))["ids"]
        unknown = [name for name, word in zip(names, words) if word not in table]
        if unknown:
            raise ValueError(
                f"the committed table of SigLIP token ids lacks {unknown}; set MODEL.MFUSER.VLM.TOKENIZER to the "
                "spiece.model or tokenizer.json of huggingface.co/google/siglip-large-patch16-384"
            )
        return [table[word] for word in words]
    if not Path(tokenizer_file).is_file():
        raise FileNotFoundError(
            f"MODEL.MFUSER.VLM.TOKENIZER={tokenizer_file} does not exist; get spiece.model or tokenizer.json from "
            "huggingface.co/google/siglip-large-patch16-384"
        )
    if tokenizer_file.endswith(".json"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(tokenizer_file)
        return [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    from sentencepiece import SentencePieceProcessor

    return [SentencePieceProcessor(model_file=tokenizer_file).encode(word) for word in words]
