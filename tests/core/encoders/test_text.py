"""Prompted class texts: what goes where, and what gradients reach."""

import pytest
import torch

from mfuser_d2.core.encoders.builders import build_text_tower
from mfuser_d2.core.encoders.class_tokens import MIN_TOKENS, check_class_names, tokenize_classes
from mfuser_d2.core.encoders.text import PromptedTextEncoder

TINY = ["tiny_clip", "tiny_eva02", "tiny_siglip"]
IDS = torch.tensor([[7, 5, 9, 0, 0], [7, 6, 4, 9, 0]])


def encoder(name: str = "tiny_clip", ids: torch.Tensor = IDS, prompt_length: int = 3) -> PromptedTextEncoder:
    torch.manual_seed(0)
    return PromptedTextEncoder(tower=build_text_tower(name=name), class_tokens=ids, prompt_length=prompt_length)


@pytest.mark.parametrize("name", TINY)
def test_only_the_prompt_learns(name):
    texts = encoder(name).train()
    before = {key: value.clone() for key, value in texts.state_dict().items()}
    out = texts()
    assert out.shape == (2, texts.joint_dim)
    out.square().sum().backward()
    trained = {key: p for key, p in texts.named_parameters() if p.requires_grad}
    assert list(trained) == ["prompt"] and bool(texts.prompt.grad.abs().sum(dim=2).all())
    torch.optim.SGD(trained.values(), lr=1.0).step()
    changed = [key for key, value in texts.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["prompt"] and not texts.tower.training


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_eva02"])
def test_nothing_behind_the_end_token_matters(name):
    texts = encoder(name)
    out = texts()
    texts.set_class_tokens(torch.tensor([[7, 5, 9, 3, 2], [7, 6, 4, 9, 1]]))
    torch.testing.assert_close(texts(), out)


def test_siglip_attends_to_the_padding():
    texts = encoder("tiny_siglip", torch.tensor([[5, 1, 1, 1, 1]]))
    out = texts()
    texts.set_class_tokens(torch.tensor([[5, 1, 2, 1, 1]]))
    assert not torch.allclose(texts(), out)


@pytest.mark.parametrize("name", TINY)
def test_the_prompt_stands_behind_the_first_token(name):
    """A prompt that repeats tokens of the vocabulary is the sequence with these tokens written out."""
    texts = encoder(name, torch.tensor([[7, 5, 9, 1, 1]]), prompt_length=2)
    with torch.no_grad():
        texts.prompt.copy_(texts.tower.model.token_embedding(torch.tensor([[3, 4]])))
    written = PromptedTextEncoder(
        tower=texts.tower, class_tokens=torch.tensor([[7, 3, 4, 5, 9, 1, 1]]), prompt_length=0
    )
    torch.testing.assert_close(texts(), written())


def test_no_prompt_and_one_class():
    texts = encoder(ids=IDS[:1], prompt_length=0)
    assert texts().shape == (1, texts.joint_dim) and texts.prompt.numel() == 0


def test_hundreds_of_classes():
    ids = torch.randint(1, 8, (300, 5))
    ids[:, 0], ids[:, 4] = 8, 9
    assert encoder(ids=ids)().shape[0] == 300


def test_table_is_cut_to_the_length_in_use():
    texts = encoder()
    assert len(texts.tower.model.positional_embedding) == IDS.shape[1] + 3
    with pytest.raises(ValueError, match="PROMPT_LENGTH"):
        PromptedTextEncoder(tower=texts.tower, class_tokens=IDS, prompt_length=4)


@pytest.mark.parametrize("ids", [torch.zeros(0, 5, dtype=torch.long), torch.zeros(5, dtype=torch.long)])
def test_token_tables_without_rows_are_refused(ids):
    with pytest.raises(ValueError, match="one row of token ids per class"):
        encoder(ids=ids)


def test_ids_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="tokenized for another encoder"):
        encoder(ids=torch.tensor([[7, 50_000, 9]]))


def test_clip_ids():
    ids = tokenize_classes(["road", "traffic light"], vocabulary="clip")
    assert ids.tolist() == [[49406, 1759, 49407, 0, 0], [49406, 3399, 1395, 49407, 0]]


def test_short_names_are_padded_and_long_ones_make_the_table_longer():
    assert tokenize_classes(["car"], vocabulary="clip").shape == (1, MIN_TOKENS)
    long = tokenize_classes(["car", "the left half of a very old traffic light"], vocabulary="clip")
    assert long.shape[1] == 11 and long[0, 3:].eq(0).all()


def test_names_that_cannot_be_queries_are_refused():
    for names, message in ((["a", " "], "class 1 has an empty name"), (["a", "b", "a"], "'a' occurs twice")):
        with pytest.raises(ValueError, match=message):
            check_class_names(names)
    with pytest.raises(ValueError, match="class list is empty"):
        tokenize_classes([], vocabulary="clip")
    with pytest.raises(KeyError, match="choose from"):
        tokenize_classes(["a"], vocabulary="bert")
