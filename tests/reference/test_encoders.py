"""The frozen encoders alone, and how pretrained grids and kernels are resized for them."""

import math
import re

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from mfuser_d2.core.encoders.builders import build_text_tower, build_vfm, build_vlm
from mfuser_d2.core.encoders.key_rules import EVA02_VISION, SIGLIP_TEXT
from mfuser_d2.core.encoders.text import PromptedTextEncoder
from mfuser_d2.core.encoders.tower import VisionTower
from mfuser_d2.core.key_map import apply_rules

TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def below(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}


def sizes(recorded: dict[str, Tensor], prefix: str = "in.image.") -> list[tuple[int, int]]:
    found = [re.fullmatch(re.escape(prefix) + r"(\d+)x(\d+)", key) for key in recorded]
    result = [(int(match[1]), int(match[2])) for match in found if match]
    assert any(height != width for height, width in result)
    return result


def thin(full: Tensor, like: Tensor) -> Tensor:
    """Every n-th entry along each axis, as many as were recorded."""
    for axis, length in enumerate(like.shape):
        step = next(step for step in range(1, full.shape[axis] + 1) if -(-full.shape[axis] // step) == length)
        full = full[(slice(None),) * axis + (slice(None, None, step),)]
    return full


def run_blocks(tower: VisionTower, images: Tensor) -> list[Tensor]:
    """Tokens before the first block and after each."""
    tokens, context = tower.embed(images)
    states = [tokens]
    for index in range(tower.depth):
        states.append(tower.run_block(index, states[-1], context))
    return states


def count(state: dict[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def heads_of(note: str) -> int:
    match = re.search(r"(\d+) heads|heads (\d+)", note)
    return int(match[1] or match[2])


@pytest.mark.parametrize("name", ["dinov2_p14", "dinov2_p16"])
def test_dinov2(load_tensors, load_facts, check, name):
    recorded = load_tensors(f"mod_{name}")
    state = below(recorded, "param.")
    state.pop("mask_token")
    patch, native = state["patch_embed.proj.weight"].shape[2], math.isqrt(state["pos_embed"].shape[1] - 1)
    width = state["cls_token"].shape[2]
    tower = build_vfm(
        name="dinov2_vitl14",
        image_size=(native * patch, native * patch),
        kwargs={
            "img_size": native * patch,
            "patch_size": patch,
            "embed_dim": width,
            "depth": count(state, "blocks."),
            "num_heads": heads_of(load_facts("mod_index")[name]["note"]),
            "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        },
    )
    tower.model.load_state_dict(state, strict=True)
    for height, width in sizes(recorded):
        size = f"{height}x{width}"
        states = run_blocks(tower, recorded[f"in.image.{size}"])
        check(f"DINOv2 patch {patch}, tokens", states[0], recorded[f"out.tokens.{size}"], TOLERANCE)
        for index, tokens in enumerate(states[1:]):
            wanted = recorded[f"out.block{index}.{size}"]
            check(f"DINOv2 patch {patch}, blocks", thin(tokens, wanted), wanted, TOLERANCE)
        check(f"DINOv2 patch {patch}, norm", tower.final_norm(states[-1]), recorded[f"out.norm.{size}"], TOLERANCE)


@pytest.fixture
def eva_block(load_tensors, load_facts) -> tuple[VisionTower, dict[str, Tensor]]:
    """A tower of one block with the recorded weights."""
    recorded = load_tensors("mod_eva_block")
    state = {k: v for k, v in below(recorded, "param.").items() if "rope" not in k}
    ours, left = apply_rules({f"blocks.0.{key}": value for key, value in state.items()}, EVA02_VISION)
    assert left == []
    grid, width = math.isqrt(recorded["in.x"].shape[1] - 1), recorded["in.x"].shape[2]
    patch = 14
    tower = build_vlm(
        name="EVA02-L-14-336",
        image_size=(grid * patch, grid * patch),
        kwargs={
            "embed_dim": width,
            "vision_cfg": {
                "timm_kwargs": {
                    "img_size": grid * patch,
                    "embed_dim": width,
                    "depth": 1,
                    "num_heads": heads_of(load_facts("mod_index")["eva_block"]["note"]),
                    "mlp_ratio": (state["mlp.w1.weight"].shape[0] + 0.5) / width,
                }
            },
        },
    )
    tower.model.blocks[0].load_state_dict({k.removeprefix("blocks.0."): v for k, v in ours.items()}, strict=True)
    return tower, recorded


def test_eva02_rotation(eva_block, check):
    tower, recorded = eva_block
    grid = math.isqrt(recorded["in.q"].shape[2])
    table = tower.rope.get_embed(shape=[grid, grid])
    sine, cosine = table.chunk(2, dim=-1)
    check("EVA02 rotary tables", sine, recorded["param.attn.rope.freqs_sin"], TOLERANCE)
    check("EVA02 rotary tables", cosine, recorded["param.attn.rope.freqs_cos"], TOLERANCE)
    check("EVA02 rotation", apply_rot_embed_cat(recorded["in.q"], table), recorded["out.rope_q"], TOLERANCE)


@pytest.mark.parametrize("kind", ["plain", "xattn"])
def test_eva02_block(eva_block, check, kind):
    """The release has two attention routines, which agree."""
    tower, recorded = eva_block
    grid = math.isqrt(recorded["in.x"].shape[1] - 1)
    got = tower.run_block(0, recorded["in.x"], tower.rope.get_embed(shape=[grid, grid]))
    check("EVA02 block", got, recorded[f"out.y_{kind}"], TOLERANCE)


def test_rotary_tables_of_the_checkpoint(load_tiny, check):
    """They are dropped by the converter, so ours have to be the same."""
    tiny = load_tiny("eva02")
    tower = tiny.build_backbone().encoder.vlm
    sine, cosine = tower.rope.get_embed(shape=list(tower.native_grid)).chunk(2, dim=-1)
    tables = {key: value for key, value in tiny.weights.items() if "rope.freqs" in key}
    assert tables
    for key, value in tables.items():
        check("EVA02 rotary tables", cosine if key.endswith("cos") else sine, value, TOLERANCE)


def test_eva02_vision(load_tensors, load_tiny, check):
    recorded, tiny = load_tensors("mod_eva_vit"), load_tiny("eva02")
    tower = tiny.build().backbone.encoder.vlm
    tokens = run_blocks(tower, tiny.shared["in.image"])[-1]
    check("EVA02 vision", tokens, recorded["out.all_tokens_no_adapter"], TOLERANCE)
    pooled, _ = tower.project(tower.final_norm(tokens))
    check("EVA02 vision, pooled", pooled[:, 0], recorded["out.pooled_no_adapter"], TOLERANCE)


def test_clip_vision(load_tensors, load_tiny, check):
    """Alone and with DINOv2, adapters and pyramid, at an oblong size too."""
    recorded, backbone = load_tensors("mod_clip_vit"), load_tiny("clip").build().backbone
    tower = backbone.encoder.vlm
    for height, width in sizes(recorded):
        size = f"{height}x{width}"
        images = recorded[f"in.image.{size}"]
        states = run_blocks(tower, images)
        check("CLIP vision, tokens", states[0].transpose(0, 1), recorded[f"out.tokens.{size}"], TOLERANCE)
        for index, tokens in enumerate(states[1:]):
            wanted = recorded[f"out.block{index}.{size}"]
            check("CLIP vision, blocks", thin(tokens.transpose(0, 1), wanted), wanted, TOLERANCE)
        features = backbone(images)
        for index in range(4):
            wanted = recorded[f"out.full.fpn{index}.{size}"]
            check("CLIP backbone, pyramid", thin(features[f"res{index + 2}"], wanted), wanted, TOLERANCE)
        for ours, theirs in (("global_embedding", "global"), ("dense_embedding", "visual")):
            check("CLIP backbone, embeddings", features[ours], recorded[f"out.full.{theirs}.{size}"], TOLERANCE)


def test_siglip_vision(load_tensors, load_tiny, check):
    recorded, tiny = load_tensors("mod_siglip_vit"), load_tiny("siglip")
    tower = tiny.build().backbone.encoder.vlm
    states = run_blocks(tower, tiny.shared["in.image"])
    check("SigLIP vision, tokens", states[0], recorded["out.embeddings"], TOLERANCE)
    check("SigLIP vision, blocks", states[-1], recorded["out.encoder_no_adapter"], TOLERANCE)
    normed = tower.final_norm(states[-1])
    check("SigLIP vision, norm", normed, recorded["out.post_layernorm"], TOLERANCE)
    pooled, dense = tower.project(normed)
    check("SigLIP vision, pooled", pooled, recorded["out.head_global"], TOLERANCE)
    check("SigLIP vision, dense", dense, recorded["out.head_local"], TOLERANCE)


def test_siglip_positions_at_another_size(load_tensors, load_tiny, check):
    recorded = load_tensors("mod_siglip_vit")
    tower = load_tiny("siglip").build().backbone.encoder.vlm
    tokens, _ = tower.embed(recorded["in.image2"])
    check("SigLIP vision, other size", tokens, recorded["out.embeddings2_interpolated"], TOLERANCE)


TEXTS = {"clip": "ViT-L-14-336-quickgelu", "eva": "EVA02-L-14-336", "siglip": "ViT-L-16-SigLIP-384"}


def text_state(recorded: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    state = below(recorded, "param.")
    if kind != "siglip":
        return state
    ours, left = apply_rules(state, SIGLIP_TEXT)
    assert left == []
    return ours


@pytest.mark.parametrize("kind", TEXTS)
def test_prompted_texts(load_tensors, load_facts, load_tiny, check, kind):
    """One prompt for all classes; a batch of prompts is one encoder each."""
    recorded = load_tensors(f"mod_{kind}_text")
    state, note = text_state(recorded, kind), load_facts("mod_index")[f"{kind}_text"]["note"]
    vocabulary, width = state["token_embedding.weight"].shape
    projection = state["text_projection.weight"] if kind == "siglip" else state["text_projection"].T
    heads = heads_of(note) if "heads" in note else load_tiny("siglip").sizes["text_heads"]
    tower = build_text_tower(
        name=TEXTS[kind],
        kwargs={
            "embed_dim": projection.shape[0],
            "text_cfg": {
                "context_length": len(state["positional_embedding"]),
                "vocab_size": vocabulary,
                "width": width,
                "heads": heads,
                "layers": count(state, "transformer.resblocks."),
                "mlp_ratio": (state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] + 0.5) / width,
            },
        },
    )
    tower.model.load_state_dict(state, strict=True)
    outputs = [key for key in recorded if key.startswith("out.text")]
    assert outputs
    for key in outputs:
        prompts, wanted = recorded[key.replace("out.text", "in.context")], recorded[key]
        for prompt, text in zip(prompts, wanted.view(len(prompts), *wanted.shape[-2:]), strict=True):
            encoder = PromptedTextEncoder(tower=tower, class_tokens=recorded["in.ids"], prompt_length=prompts.shape[1])
            encoder.prompt.copy_(prompt[None])
            check(f"prompted texts, {kind}", encoder(), text, TOLERANCE)


SOURCES = {
    "dino": ("", "patch_embed.proj.weight", "pos_embed"),
    "dino1": ("", "patch_embed.proj.weight", "pos_embed"),
    "clip": ("visual.", "conv1.weight", "positional_embedding"),
    "eva": ("visual.", "patch_embed.proj.weight", "pos_embed"),
    "siglip": ("vision_model.", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"),
}


def tower_for(kind: str, *, width: int, grid: int, patch: int) -> VisionTower:
    """A tower of the publisher's geometry, as wide as what was recorded of the tensors."""
    geometry = {"img_size": grid * patch, "patch_size": patch, "embed_dim": width, "depth": 1, "num_heads": 2}
    size = {"image_size": (grid * patch, grid * patch)}
    if kind.startswith("dino"):
        return build_vfm(name="dinov2_vitl14", kwargs=geometry, **size)
    changes = {"timm_kwargs": geometry}
    if kind == "clip":
        changes = {"image_size": grid * patch, "patch_size": patch, "width": width, "layers": 1, "head_width": 4}
    return build_vlm(name=TEXTS[kind], kwargs={"embed_dim": width, "vision_cfg": changes}, **size)


def geometry_tensors(tower: VisionTower) -> tuple[nn.Module, nn.Module, str]:
    """The patch projection, and the module and name of the position table."""
    if hasattr(tower.model, "conv1"):
        return tower.model.conv1, tower.model, "positional_embedding"
    return tower.model.patch_embed.proj, tower.model, "pos_embed"


def test_pretrained_grids_and_kernels(load_tensors, check):
    """Each publisher's table and kernels, resized by the tower that takes them."""
    recorded = load_tensors("mod_pretrained_convert")
    targets = {key.split(".out.")[0] for key in recorded if ".out." in key}
    assert {target.split("_")[0] for target in targets} == set(SOURCES)
    for target in sorted(targets):
        kind, patch, image_size = re.fullmatch(r"(\w+?)_p(\d+)_(\d+)", target).groups()
        prefix, kernel_name, table_name = SOURCES[kind]
        kernel, table = (recorded[f"{kind}.in.{prefix}{name}"] for name in (kernel_name, table_name))
        rows = table.reshape(-1, table.shape[-1])
        grid = math.isqrt(len(rows))
        tower = tower_for(kind, width=rows.shape[1], grid=grid, patch=kernel.shape[2])
        projection, owner, name = geometry_tensors(tower)
        projection.weight.zero_()[: len(kernel)] = kernel
        getattr(owner, name).copy_(table.view_as(getattr(owner, name)))
        tower.set_geometry(patch_size=(int(patch), int(patch)))
        tower.set_geometry(grid=tower.grid_of((int(image_size), int(image_size))))
        wanted = below(recorded, f"{target}.out.")
        (kernel_out,) = (value for value in wanted.values() if value.dim() == 4)
        (table_out,) = (value for value in wanted.values() if value.dim() < 4)
        check(f"resized kernels, {target}", projection.weight[: len(kernel)], kernel_out, TOLERANCE)
        check(f"resized grid, {target}", getattr(owner, name).view_as(table_out), table_out, TOLERANCE)
