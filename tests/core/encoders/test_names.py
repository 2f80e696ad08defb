"""Encoders beyond the release's, by name: each gives its publisher's numbers and joins with another one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mfuser_d2.core.adapters import build_adapter
from mfuser_d2.core.dual_encoder import DualEncoder
from mfuser_d2.core.encoders.builders import build_text_tower, build_vfm, build_vlm, vocabulary_of
from mfuser_d2.core.encoders.class_tokens import tokenize_classes
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD, VFM_PRESETS

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}
NEW_VLMS = ["ViT-L-16-SigLIP2-384", "PE-Core-L-14-336"]
DINOV3_REGISTERS = 4


def small_vfm(name: str, **kwargs: Any):
    """A preset, narrow and shallow, with norms and layer scales that are not ones."""
    torch.manual_seed(0)
    tower = build_vfm(name=name, image_size=(64, 96), kwargs={**SMALL, **kwargs})
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tower


def small_vlm(name: str):
    torch.manual_seed(0)
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 512}
    changes = {"vision_cfg": {"timm_kwargs": SMALL}, "text_cfg": text, "embed_dim": 64}
    return build_vlm(name=name, image_size=(64, 64), kwargs=changes), build_text_tower(name=name, kwargs=changes)


@torch.no_grad()
def run(tower, images: torch.Tensor) -> torch.Tensor:
    tokens, context = tower.embed(images)
    for index in range(tower.depth):
        tokens = tower.run_block(index, tokens, context)
    return tower.final_norm(tokens)


@pytest.mark.parametrize("name", sorted(set(VFM_PRESETS) - {"tiny_vfm"}))
def test_every_vfm_by_name_gives_timms_features(name: str) -> None:
    # Position grids are resized when the tower is made, so timm sees the same table; DINOv2 has its own oblong rule.
    size = (64, 64) if "dinov2" in name else (64, 96)
    torch.manual_seed(0)
    # DINOv2-g's gated MLP wants a whole number of channels in each half.
    kwargs = {**SMALL, "mlp_ratio": 4} if "vitg" in name else SMALL
    tower = build_vfm(name=name, image_size=size, kwargs=kwargs)
    images = torch.randn(2, 3, *size)
    if "dinov2" in name:
        images = images[..., :56, :56]  # timm refuses a remainder
        tower.set_geometry(grid=(4, 4))
    elif tower.patch_size[0] == 14:
        images = images[..., :56, :84]
    tower.model.patch_embed.grid_size = tower.native_grid
    tower.model.patch_embed.img_size = tuple(images.shape[-2:])
    with torch.no_grad():
        expected = tower.model.forward_features(images)
    torch.testing.assert_close(run(tower, images), expected, atol=1e-5, rtol=1e-4)


def test_registers_stand_between_class_token_and_patches() -> None:
    for name, count in (("dinov2_vits14", 1), ("dinov2_vits14_reg", 5), ("dinov3_vits16", 5)):
        tower = small_vfm(name)
        assert tower.num_prefix_tokens == count and tower.has_class_token
        h, w = tower.grid_of((64, 96))
        assert tower.embed(torch.randn(1, 3, 64, 96))[0].shape == (1, count + h * w, 64)


@pytest.mark.parametrize("name", NEW_VLMS)
def test_new_vlms_give_timms_global_embedding_and_pool_every_patch(name: str) -> None:
    tower, _ = small_vlm(name)
    tower.model.patch_embed.grid_size = tower.native_grid
    patch = tower.patch_size[0]
    images = torch.randn(2, 3, 64 // patch * patch, 64 // patch * patch)
    tower.model.patch_embed.img_size = tuple(images.shape[-2:])
    with torch.no_grad():
        pooled, dense = tower.project(run(tower, images))
        expected = tower.model(images)
    torch.testing.assert_close(pooled[:, 0], expected, atol=1e-5, rtol=1e-4)
    assert dense.shape == (2, (64 // patch) ** 2, tower.joint_dim)


@pytest.mark.parametrize("name", NEW_VLMS)
def test_new_vlms_texts_live_in_the_space_of_their_images(name: str) -> None:
    vision, text = small_vlm(name)
    tokens = text.model.token_embedding(torch.randint(0, 512, (3, 6)))
    assert text(tokens, torch.full((3,), 5)).shape == (3, vision.joint_dim)


@pytest.mark.parametrize(
    ("vfm", "vlm"),
    [("dinov3_vits16", "PE-Core-L-14-336"), ("dinov2_vits14_reg", "ViT-L-16-SigLIP2-384"), ("pe_spatial_s", None)],
)
def test_new_encoders_interleave_across_depths_grids_and_widths(vfm: str, vlm: str | None) -> None:
    vfm_tower = small_vfm(vfm, embed_dim=96, depth=4, num_heads=3)
    vlm_tower = build_vlm(name="tiny_eva02", image_size=(64, 96)) if vlm is None else small_vlm(vlm)[0]
    pairs = min(vfm_tower.depth, vlm_tower.depth)
    encoder = DualEncoder(
        vfm=vfm_tower,
        vlm=vlm_tower,
        adapters=[
            build_adapter("mvfuser", vfm_dim=vfm_tower.embed_dim, vlm_dim=vlm_tower.embed_dim) for _ in range(pairs)
        ],
        tap_layers=tuple(range(pairs)),
        pixel_mean=CLIP_MEAN,
        pixel_std=CLIP_STD,
    )
    features = encoder(torch.randn(2, 3, 64, 96))
    grid = vlm_tower.grid_of((64, 96))
    assert features.taps[-1].shape == (2, 96 + vlm_tower.embed_dim, *grid)
    assert features.dense_embedding.shape == (2, vlm_tower.joint_dim, *grid)
    features.dense_embedding.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.adapters[0].parameters())


def dinov3_file(path: Path) -> dict[str, torch.Tensor]:
    """Weights under the names and with the extras of Meta's DINOv3 files, for a ViT of `SMALL`'s size."""
    torch.manual_seed(1)
    dim, shapes = 64, {"cls_token": (1, 1, 64), "storage_tokens": (1, DINOV3_REGISTERS, 64), "mask_token": (1, 64)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "rope_embed.periods": (8,)}
    for block in (f"blocks.{index}." for index in range(2)):
        shapes |= {f"{block}{norm}.{kind}": (dim,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.qkv.weight": (3 * dim, dim), f"{block}attn.qkv.bias": (3 * dim,)}
        shapes |= {f"{block}attn.qkv.bias_mask": (3 * dim,), f"{block}ls1.gamma": (dim,), f"{block}ls2.gamma": (dim,)}
        shapes |= {f"{block}attn.proj.weight": (dim, dim), f"{block}attn.proj.bias": (dim,)}
        shapes |= {f"{block}mlp.fc1.weight": (4 * dim, dim), f"{block}mlp.fc1.bias": (4 * dim,)}
        shapes |= {f"{block}mlp.fc2.weight": (dim, 4 * dim), f"{block}mlp.fc2.bias": (dim,)}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    torch.save(state, path)
    return state


def test_dinov3s_own_file_loads_strictly(tmp_path: Path) -> None:
    state = dinov3_file(tmp_path / "dinov3.pth")
    tower = build_vfm(name="dinov3_vits16", weights=str(tmp_path / "dinov3.pth"), image_size=(64, 96), kwargs=SMALL)
    torch.testing.assert_close(tower.model.reg_token, state["storage_tokens"])
    block, query_bias = tower.model.blocks[1], state["blocks.1.attn.qkv.bias"][:64]
    torch.testing.assert_close(block.attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    torch.testing.assert_close(block.attn.q_bias, query_bias)
    torch.testing.assert_close(block.gamma_2, state["blocks.1.ls2.gamma"])
    assert not tower.has_random_weights


def test_vocabularies_follow_the_names_and_siglip2_asks_for_its_file() -> None:
    assert vocabulary_of("PE-Core-L-14-336") == vocabulary_of("tiny_siglip") == "clip"
    assert vocabulary_of("ViT-L-16-SigLIP-384") == "siglip"
    assert vocabulary_of("ViT-L-16-SigLIP2-384") == "siglip2"
    with pytest.raises(ValueError, match="SigLIP2 has other ones.*TOKENIZER"):
        tokenize_classes(["road"], vocabulary="siglip2")


def test_siglip2_pads_with_zeros_after_the_end_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizer.json files are read by tokenizers")
    words = tokenizers.models.WordLevel({"<unk>": 3, "road": 17, "traffic": 18, "light": 19}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = tokenize_classes(
        ["road", "Traffic light"], vocabulary="siglip2", tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    assert found.tolist() == [[17, 1, 0, 0, 0], [18, 19, 1, 0, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_vfm(name="dinov4", image_size=(64, 64)), "VFM.NAME='dinov4'.*dinov3_vitl16.*clip:"),
        (lambda: build_vlm(name="clap", image_size=(64, 64)), "VLM.NAME='clap'.*PE-Core-L-14-336"),
        (lambda: build_vlm(name="vfm:dinov4", image_size=(64, 64)), "dinov4"),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(call, words: str) -> None:
    with pytest.raises(KeyError, match=words):
        call()
