"""What every vision tower keeps: its contract at any size, frozen weights, and the publisher's own forward."""

import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from torch import Tensor

from mfuser_d2.core.encoders.builders import build_vfm, build_vlm
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD, HALF
from mfuser_d2.core.encoders.tower import InputNorm, VisionTower

DINO = {"img_size": 56, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}
TIMM = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
VLMS = {
    "ViT-L-14-336-quickgelu": {"image_size": 64, "patch_size": 16, "width": 24, "layers": 2, "head_width": 12},
    "EVA02-L-14-336": {"timm_kwargs": TIMM},
    "ViT-L-16-SigLIP-384": {"timm_kwargs": TIMM},
}
NAMES = ["dinov2_vits14", "dinov2_vits14_reg", *VLMS]


def make(name: str, image_size: tuple[int, int] = (64, 64), **options) -> VisionTower:
    torch.manual_seed(0)
    if name.startswith("dinov2"):
        tower = build_vfm(name=name, image_size=image_size, kwargs=DINO, **options)
    else:
        kwargs = {"embed_dim": 20 if "SigLIP" not in name else 24, "vision_cfg": VLMS[name]}
        tower = build_vlm(name=name, image_size=image_size, kwargs=kwargs, **options)
    with torch.no_grad():  # norms and layer scales that change something
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tower


def run(tower: VisionTower, images: Tensor) -> Tensor:
    tokens, context = tower.embed(images)
    for index in range(tower.depth):
        tokens = tower.run_block(index, tokens, context)
    return tokens


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (65, 95)])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_at_any_size(name, size):
    tower = make(name)
    height, width = tower.grid_of(size)
    assert (height, width) == (size[0] // tower.patch_size[0], size[1] // tower.patch_size[1])
    tokens = tower.final_norm(run(tower, torch.randn(2, 3, *size)))
    assert tokens.shape == (2, tower.num_prefix_tokens + height * width, tower.embed_dim)
    assert bool(tokens.isfinite().all())
    if tower.joint_dim is not None:
        pooled, dense = tower.project(tokens)
        assert pooled.shape == (2, 1, tower.joint_dim) and dense.shape == (2, height * width, tower.joint_dim)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_the_publishers_forward(name):
    """At the native size, block by block is what timm's and open_clip's own forward gives."""
    tower = make(name, (56, 56) if name.startswith("dinov2") else (64, 64))
    images = torch.randn(2, 3, *((56, 56) if name.startswith("dinov2") else (64, 64)))
    tokens = tower.final_norm(run(tower, images))
    if name.startswith("dinov2"):
        wanted, got = tower.model.forward_features(images), tokens
    else:
        wanted, got = tower.model(images), tower.project(tokens)[0][:, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_frozen_for_good(name):
    tower = make(name).train()
    assert not tower.training and not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    run(tower, images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in tower.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_images_smaller_than_a_patch_are_refused(name):
    tower = make(name)
    with pytest.raises(ValueError, match="smaller than one"):
        tower.embed(torch.randn(1, 3, 8, 64))


@pytest.mark.parametrize("name", NAMES)
def test_geometry_is_set_once(name):
    """Patch kernels and position table are resized when built; an image of that size then needs nothing more."""
    tower = make(name, (48, 80), patch_size=8)
    assert tower.patch_size == (8, 8) and tower.native_grid == (6, 10)
    assert run(tower, torch.randn(1, 3, 48, 80)).shape[1] == tower.num_prefix_tokens + 60
    table = getattr(tower.model, "pos_embed", None)
    table = tower.model.positional_embedding[None] if table is None else table
    assert table.shape[1] in (60, 60 + tower.num_prefix_tokens) and not table.requires_grad


def test_resampling_is_a_choice():
    tables = [make("ViT-L-16-SigLIP-384", (96, 96), resample=mode).model.pos_embed for mode in (None, "bilinear")]
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], make("ViT-L-16-SigLIP-384", (96, 96), resample="bicubic").model.pos_embed)


def test_global_embedding_of_siglip_is_not_a_patch():
    tower = make("ViT-L-16-SigLIP-384")
    assert not tower.has_class_token and tower.num_prefix_tokens == 0
    pooled, dense = tower.project(tower.final_norm(run(tower, torch.randn(1, 3, 64, 64))))
    assert not torch.allclose(pooled, dense[:, :1])


def test_towers_without_a_text_side_have_no_joint_space():
    with pytest.raises(ValueError, match="vision-language model"):
        make("dinov2_vits14").project(torch.randn(1, 5, 24))


def test_attention_pooling_of_open_clip_is_refused():
    from mfuser_d2.core.encoders.clip_tower import ClipTower

    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32, attentional_pool=True)
    model = _build_vision_tower(32, vision)
    with pytest.raises(ValueError, match="CoCa"):
        ClipTower(model=model, pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD)


def test_unknown_names_list_what_there_is():
    with pytest.raises(KeyError, match="VFM.NAME='dino_v9'.*dinov2_vitl14"):
        build_vfm(name="dino_v9", image_size=(64, 64))
    with pytest.raises(KeyError, match="VLM.NAME='clap'.*EVA02-L-14-336"):
        build_vlm(name="clap", image_size=(64, 64))


def test_a_vlm_can_take_the_vfms_place():
    tower = build_vfm(name="clip:EVA02-L-14-336", image_size=(64, 64), kwargs={"vision_cfg": {"timm_kwargs": TIMM}})
    assert tower.embed_dim == 24 and tower.has_class_token


@pytest.mark.parametrize("name", ["ViT-L-16-SigLIP-384", "dinov2_vits14"])
def test_input_is_normalised_again_for_each_encoder(name):
    tower = make(name)
    pixels = torch.rand(1, 3, 8, 8) * 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    norm = InputNorm(pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD, tower=tower)
    assert not norm.is_identity
    wanted = (pixels - tower.pixel_mean) / tower.pixel_std
    torch.testing.assert_close(norm((pixels - mean) / std), wanted, rtol=1e-4, atol=1e-5)


def test_input_is_left_alone_where_nothing_changes():
    norm = InputNorm(pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD, tower=make("EVA02-L-14-336"))
    images = torch.randn(1, 3, 4, 4)
    assert norm.is_identity and norm(images) is images
    assert not InputNorm(pixel_mean=HALF, pixel_std=HALF, tower=make("EVA02-L-14-336")).is_identity
