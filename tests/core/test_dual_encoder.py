"""Two frozen encoders interleaved: pairs, taps, the joint embedding, and what trains."""

import pytest
import torch
from torch import Tensor, nn

from mfuser_d2.core.adapters import build_adapter
from mfuser_d2.core.dual_encoder import DualEncoder
from mfuser_d2.core.encoders.builders import build_vfm, build_vlm
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD
from mfuser_d2.core.encoders.tower import VisionTower

SIZE = (48, 64)
TIMM = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def vfm(name: str = "dinov2_vits14", **changes) -> VisionTower:
    return build_vfm(name=name, image_size=SIZE, kwargs={**TIMM, **changes})


def vlm(name: str = "EVA02-L-14-336", **changes) -> VisionTower:
    return build_vlm(
        name=name, image_size=SIZE, kwargs={"embed_dim": 20, "vision_cfg": {"timm_kwargs": {**TIMM, **changes}}}
    )


def join(first: VisionTower, second: VisionTower, *, adapter: str = "mvfuser", taps=(0, 1, 2, 3), **options):
    torch.manual_seed(0)
    adapters = [
        build_adapter(adapter, vfm_dim=first.embed_dim, vlm_dim=second.embed_dim)
        for _ in range(min(first.depth, second.depth))
    ]
    encoder = DualEncoder(
        vfm=first, vlm=second, adapters=adapters, tap_layers=taps, pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD, **options
    )
    for parameter in adapters[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def tokens_of(tower: VisionTower, images: Tensor, blocks: int) -> Tensor:
    tokens, context = tower.embed(images)
    for index in range(blocks):
        tokens = tower.run_block(index, tokens, context)
    return tokens


def test_shapes_on_an_oblong_image():
    features = join(vfm(), vlm())(torch.randn(2, 3, *SIZE))
    assert [tap.shape for tap in features.taps] == [(2, 48, 6, 8)] * 4
    assert features.global_embedding.shape == (2, 1, 20) and features.dense_embedding.shape == (2, 20, 6, 8)


def test_without_corrections_each_encoder_runs_alone():
    """Taps hold the VFM's channels first; the embedding is the sum of both after their own norms."""
    first, second = vfm(), vlm()
    encoder, images = join(first, second, adapter="none", taps=(0, 1, 2, 3)), torch.randn(2, 3, *SIZE)
    features = encoder(images)
    for index, tap in enumerate(features.taps):
        alone = tokens_of(first, encoder.vfm_input(images), index + 1)[:, 1:]
        torch.testing.assert_close(tap[:, :24].flatten(2).transpose(1, 2), alone)
        alone = tokens_of(second, images, index + 1)[:, 1:]
        torch.testing.assert_close(tap[:, 24:].flatten(2).transpose(1, 2), alone)
    joint = second.final_norm(tokens_of(second, images, 4))
    joint = joint + first.final_norm(tokens_of(first, encoder.vfm_input(images), 4))
    torch.testing.assert_close(features.global_embedding, second.project(joint)[0])


def test_corrections_after_a_block_reach_the_next_ones():
    encoder, images = join(vfm(), vlm()).eval(), torch.randn(1, 3, *SIZE)
    before = encoder(images)
    with torch.no_grad():
        encoder.adapters[1].block.scale.fill_(1.0)
    after = encoder(images)
    same = [torch.equal(a, b) for a, b in zip(before.taps, after.taps)]
    assert same == [True, False, False, False]
    assert not torch.equal(before.dense_embedding, after.dense_embedding)


def test_each_encoder_gets_its_own_normalisation():
    encoder, images = join(vfm(), vlm(name="ViT-L-16-SigLIP-384"), adapter="none"), torch.randn(1, 3, *SIZE)
    pixels = images * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    for tower, channels in ((encoder.vfm, slice(24)), (encoder.vlm, slice(24, None))):
        alone = tokens_of(tower, (pixels - tower.pixel_mean) / tower.pixel_std, 1)[:, tower.num_prefix_tokens :]
        tap = encoder(images).taps[0][:, channels].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tap, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"project_vfm": True}], ids=["norm", "projection"])
def test_only_adapters_and_projections_train(options):
    encoder = join(vfm(), vlm(), **options).train()
    frozen = {key: value.clone() for key, value in encoder.state_dict().items() if key.startswith(("vfm.", "vlm."))}
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(name.startswith(("adapters.", "vfm_to_joint.")) for name in trained)
    assert ("vfm_to_joint.weight" in trained) is bool(options)
    assert not encoder.vfm.training and not encoder.vlm.training and encoder.adapters.training
    features = encoder(torch.randn(2, 3, *SIZE))
    total = (
        features.global_embedding.sum() + features.dense_embedding.sum() + sum(t.square().sum() for t in features.taps)
    )
    total.backward()
    assert all(p.grad is not None for p in trained.values())
    torch.optim.SGD(trained.values(), lr=0.1).step()
    state = encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"patch_size": 16}),  # another grid
        ({"embed_dim": 32}, {}),  # another width
        ({"depth": 2}, {}),  # shallower
        ({}, {"depth": 8}),  # deeper
        ({"name": "dinov2_vits14_reg"}, {}),  # registers
    ],
    ids=["grid", "width", "shallow", "deep", "registers"],
)
def test_unequal_encoders(first, second):
    one, two = vfm(**first), vlm(**second)
    pairs = min(one.depth, two.depth)
    encoder = join(one, two, taps=tuple(range(pairs)))
    assert len(encoder.adapters) == encoder.num_pairs == pairs
    features = encoder(torch.randn(1, 3, *SIZE))
    grid = two.grid_of(SIZE)
    assert [tap.shape for tap in features.taps] == [(1, one.embed_dim + two.embed_dim, *grid)] * pairs
    assert features.dense_embedding.shape[-2:] == grid


@pytest.mark.parametrize(("depth", "runs"), [(2, [[0, 1], [2, 3]]), (3, [[0], [1], [2, 3]])])
def test_pairs_share_the_deeper_encoders_blocks(depth, runs):
    encoder = join(vfm(depth=depth), vlm(), taps=(0,))
    assert [list(encoder._blocks_of(encoder.vlm, pair)) for pair in range(depth)] == runs


def test_siglip_has_no_class_token_to_add_to():
    features = join(vfm(), vlm(name="ViT-L-16-SigLIP-384"))(torch.randn(2, 3, *SIZE))
    assert features.global_embedding.shape == (2, 1, 24) and features.dense_embedding.shape == (2, 24, 6, 8)


@pytest.mark.parametrize("size", [(48, 64), (41, 71), (16, 100)])
def test_odd_image_sizes(size):
    features = join(vfm(), vlm())(torch.randn(1, 3, *size))
    assert features.taps[0].shape[-2:] == (size[0] // 8, size[1] // 8)


def test_recomputing_blocks_changes_nothing():
    images, results = torch.randn(1, 3, *SIZE), []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        encoder = join(vfm(), vlm(), use_checkpoint=use_checkpoint).eval()
        encoder.adapters[0].zero_grad()
        features = encoder(images)
        (features.dense_embedding.square().sum() + features.taps[3].square().sum()).backward()
        results.append((features.dense_embedding, encoder.adapters[0].block.in_proj.weight.grad))
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("taps", [(0, 0, 1, 2), (2, 1, 0), (0, 1, 2, 4), (-1, 0)])
def test_taps_that_do_not_fit_are_refused(taps):
    with pytest.raises(ValueError, match="TAP_LAYERS"):
        join(vfm(), vlm(), taps=taps)


def test_wrong_number_of_adapters_is_refused():
    one, two = vfm(), vlm()
    with pytest.raises(ValueError, match="0 adapters for 4 block pairs"):
        DualEncoder(vfm=one, vlm=two, adapters=[], tap_layers=(0,), pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD)
