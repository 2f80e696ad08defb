"""New class names on a trained head: what is borrowed, and that trained names keep their meaning."""

import pytest
import torch

from mfuser_d2.core.encoders.class_tokens import tokenize_classes
from mfuser_d2.core.factory import build_head
from mfuser_d2.core.new_classes import ClassLookup, TrainedClasses

NAMES = ["road", "car", "traffic light", "sky"]
DIM = 32


def tokens_of(names):
    return tokenize_classes(names, vocabulary="clip")


def make_head(**options):
    small = {"hidden_dim": DIM, "mask_dim": DIM, "num_heads": 2, "encoder_ffn_dim": DIM, "decoder_ffn_dim": DIM}
    return build_head(
        vlm={"name": "tiny_clip"},
        class_names=NAMES,
        in_dims=[DIM] * 4,
        encoder_layers=1,
        decoder_layers=2,
        refiner_kwargs={"width": DIM},
        **({"prompt_length": 2} | small | options),
    ).eval()


def make_features(batch=2, dim=DIM, joint=64):
    maps = {f"res{i + 2}": torch.randn(batch, dim, 16 >> i, 24 >> i) for i in range(4)}
    return {
        **maps,
        "global_embedding": torch.randn(batch, 1, joint),
        "dense_embedding": torch.randn(batch, joint, 4, 6),
    }


def scores(head, features):
    from mfuser_d2.core.inference import class_scores

    with torch.no_grad():
        output = head(features, last_only=True)
    return class_scores(output.class_logits[-1], output.mask_logits[-1])


@pytest.mark.parametrize(
    "options", [{}, {"prompt_templates": ["a photo of a {}.", "{}"], "prompt_length": 0}], ids=["prompts", "templates"]
)
def test_trained_list_gives_the_trained_result(options):
    from mfuser_d2.core.encoders.class_queries import fill_templates

    head, features = make_head(**options), make_features()
    wanted = scores(head, features)
    templates = options.get("prompt_templates", ["{}"])
    lookup = head.set_classes(tokens_of(fill_templates(templates, NAMES)))
    assert lookup.parents.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(scores(head, features), wanted, rtol=1e-4, atol=1e-6)


def test_order_of_trained_names_moves_their_scores_along():
    head, features = make_head(), make_features()
    wanted = scores(head, features)
    order = [3, 1, 0, 2]
    head.set_classes(tokens_of([NAMES[i] for i in order]))
    # The refinement scans the texts one after the other, so another order is another computation; the masks hardly
    # move with random weights, and a swapped class would.
    torch.testing.assert_close(scores(head, features), wanted[:, order], rtol=0.05, atol=0.02)


def test_new_words_borrow_from_the_nearest_trained_class():
    head = make_head()
    positions = head.transformer_decoder.query_embed.weight.detach().clone()
    lookup = head.set_classes(tokens_of(["tractor", "car", "road"]))
    parent = int(lookup.parents[0])
    assert lookup.parents.tolist()[1:] == [1, 0]
    torch.testing.assert_close(lookup.similarity[1:], torch.ones(2))
    assert float(lookup.similarity[0]) < 1
    torch.testing.assert_close(head.transformer_decoder.query_embed.weight, positions[[parent, 1, 0]])
    assert scores(head, make_features()).shape == (2, 3, 16, 24)


def test_classes_can_be_replaced_again():
    head, features = make_head(), make_features()
    wanted = scores(head, features)
    head.set_classes(tokens_of(["tractor", "dog"]))
    head.set_classes(tokens_of(NAMES))
    torch.testing.assert_close(scores(head, features), wanted, rtol=1e-4, atol=1e-6)


def test_many_classes():
    head = make_head()
    head.set_classes(tokens_of([a + b for a in "abcdefghijklmno" for b in "abcdefghijklmnopqrst"]))
    assert scores(head, make_features(batch=1)).shape == (1, 300, 16, 24)


def make_lookup(parents):
    parents = torch.tensor(parents)
    return ClassLookup(trained=TrainedClasses(*4 * [None]), parents=parents, similarity=torch.ones(len(parents)))


def test_siblings_are_told_apart_by_their_queries():
    # Classes 0 and 1 share trained class 0; queries 0 and 1 say "trained class 0" with probability 0.9.
    trained = torch.tensor([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.2, 0.7, 0.1]])
    got = make_lookup([0, 0, 1])(trained.log()).softmax(-1)
    torch.testing.assert_close(got[0], torch.tensor([0.9, 0.0, 0.05, 0.05]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], torch.tensor([0.0, 0.9, 0.05, 0.05]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[2], torch.tensor([0.1, 0.1, 0.7, 0.1]), atol=1e-6, rtol=1e-5)


def test_trained_classes_without_children_count_as_none():
    got = make_lookup([1])(torch.tensor([[0.6, 0.3, 0.1]]).log()).softmax(-1)
    torch.testing.assert_close(got, torch.tensor([[0.3, 0.7]]))


def test_same_words_are_refused():
    with pytest.raises(ValueError, match="classes 0 and 2 .* same words"):
        make_head().set_classes(tokens_of(["car", "road", "CAR"]))


def test_names_too_long_for_random_weights_are_refused():
    with pytest.raises(ValueError, match="shorter class names"):
        make_head().set_classes(tokens_of(["a very long name of a thing that was never trained on"]))


def test_longer_names_take_back_published_positions():
    head = make_head()
    head.text_encoder.tower.has_random_weights = False
    before = head.text_encoder.tower.model.positional_embedding.clone()
    head.set_classes(tokens_of([*NAMES, "a very long name of a thing that was never trained on"]))
    after = head.text_encoder.tower.model.positional_embedding
    assert len(after) > len(before)
    torch.testing.assert_close(after[: len(before)], before)
    assert head.text_encoder.tower.model.attn_mask.shape == (len(after), len(after))
    assert scores(head, make_features()).shape[1] == 5


def test_learned_queries_have_no_words():
    head = make_head(queries="learned", joint_dim=64)
    with pytest.raises(ValueError, match="learned"):
        head.set_classes(tokens_of(["car"]))
