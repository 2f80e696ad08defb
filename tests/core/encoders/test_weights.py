"""Each publisher's file format, small: what is read is what was written, and what is wrong says so."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mfuser_d2.core.encoders.builders import build_text_tower, build_vfm, build_vlm
from mfuser_d2.core.encoders.key_rules import EVA02_VISION, SIGLIP_TEXT, SIGLIP_VISION
from mfuser_d2.core.key_map import apply_rules

SIZE = {"image_size": (128, 128)}  # the tiny encoders' own, so that nothing is resized
SMALL_VFM = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}


def theirs(state: dict[str, Tensor], rules: list) -> dict[str, Tensor]:
    """A timm or open_clip state dict under its publisher's names."""
    renamed, left = apply_rules(state, [rule.inverse() for rule in rules])
    assert left == []
    return renamed


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


class Tree(nn.Module):
    """Nested modules that hold tensors under dotted names, which TorchScript can save."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, rest = key.partition(".")
            if rest:
                children.setdefault(name, {})[rest] = value
            else:
                self.register_buffer(name, value)
        for name, part in children.items():
            self.add_module(name, Tree(part))

    def forward(self, x: Tensor) -> Tensor:
        return x


def write(kind: str, folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A published file of a tiny vision-language model, and the vision and text weights it stands for."""
    vision = build_vlm(name=f"tiny_{kind}", **SIZE).model.state_dict()
    text = build_text_tower(name=f"tiny_{kind}").model.state_dict()
    text.pop("attn_mask", None)
    if kind == "clip":
        path = folder / "ViT.pt"
        extra = {"input_resolution": torch.tensor(128), "context_length": torch.tensor(77)}
        state = {**prefixed(vision, "visual."), **text, "logit_scale": torch.tensor(4.6), **extra}
        torch.jit.script(Tree({key: value.clone() for key, value in state.items()})).save(str(path))
    elif kind == "eva02":
        path = folder / "EVA02_CLIP.pt"
        rope = {"rope.freqs_cos": torch.ones(4, 2), "blocks.0.attn.rope.freqs_sin": torch.ones(4, 2)}
        state = prefixed({**theirs(vision, EVA02_VISION), **rope}, "visual.") | prefixed(text, "text.")
        torch.save({**state, "logit_scale": torch.tensor(4.6)}, path)
    else:
        path = folder / "model.safetensors"
        state = prefixed(theirs(vision, SIGLIP_VISION), "vision_model.")
        state |= prefixed(theirs(text, SIGLIP_TEXT), "text_model.")
        state |= {"logit_scale": torch.tensor([2.5]), "logit_bias": torch.tensor([-9.0])}
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path, vision, text


@pytest.mark.parametrize("kind", ["clip", "eva02", "siglip"])
def test_vision_language_models(tmp_path, kind):
    path, vision, text = write(kind, tmp_path)
    tower = build_vlm(name=f"tiny_{kind}", weights=str(path), double_class_token=False, **SIZE)
    loaded = tower.model.state_dict()
    assert set(loaded) == set(vision) and all(torch.equal(loaded[key], vision[key]) for key in vision)
    text_tower = build_text_tower(name=f"tiny_{kind}", weights=str(path))
    loaded = text_tower.model.state_dict()
    assert all(torch.equal(loaded[key], text[key]) for key in text)
    assert not tower.has_random_weights and not text_tower.has_random_weights


def test_logit_scale_and_bias_come_with_the_weights(tmp_path):
    path, _, _ = write("siglip", tmp_path)
    tower = build_text_tower(name="tiny_siglip", weights=str(path))
    assert (tower.logit_scale, tower.logit_bias) == (2.5, -9.0)


def test_clip_class_token_is_doubled_as_in_the_release(tmp_path):
    path, vision, _ = write("clip", tmp_path)
    tower = build_vlm(name="tiny_clip", weights=str(path), **SIZE)
    assert torch.equal(tower.model.class_embedding, 2 * vision["class_embedding"])


def test_half_precision_files_become_float32(tmp_path):
    vision = build_vlm(name="tiny_eva02", **SIZE).model.state_dict()
    text = build_text_tower(name="tiny_eva02").model.state_dict()
    state = prefixed(theirs(vision, EVA02_VISION), "visual.") | prefixed(text, "text.")
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "half.pt")
    tower = build_vlm(name="tiny_eva02", weights=str(tmp_path / "half.pt"), **SIZE)
    assert {value.dtype for value in tower.model.state_dict().values()} == {torch.float32}
    assert torch.equal(tower.model.norm.weight, vision["norm.weight"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_dinov2(tmp_path, wrapped):
    model = build_vfm(name="dinov2_vits14", image_size=(28, 28), kwargs=SMALL_VFM).model
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    published = {**state, "mask_token": torch.zeros(1, 24)}
    torch.save({"model": published} if wrapped else published, tmp_path / "dinov2.pth")
    weights = str(tmp_path / "dinov2.pth")
    loaded = build_vfm(name="dinov2_vits14", weights=weights, image_size=(28, 28), kwargs=SMALL_VFM).model.state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[key], state[key]) for key in state)


def test_dinov2_with_registers(tmp_path):
    """Their table has a row for the class token, timm's has that row added to the token."""
    build = {"name": "dinov2_vits14_reg", "image_size": (28, 28), "kwargs": SMALL_VFM}
    state = build_vfm(**build).model.state_dict()
    published = {key: torch.randn_like(value) for key, value in state.items() if key not in ("reg_token", "pos_embed")}
    published |= {"register_tokens": torch.randn(1, 4, 24), "pos_embed": torch.randn(1, 5, 24)}
    torch.save({**published, "mask_token": torch.zeros(1, 24)}, tmp_path / "reg.pth")
    model = build_vfm(**build, weights=str(tmp_path / "reg.pth")).model
    assert torch.equal(model.reg_token, published["register_tokens"])
    assert torch.equal(model.pos_embed, published["pos_embed"][:, 1:])
    assert torch.equal(model.cls_token, published["cls_token"] + published["pos_embed"][:, :1])


def test_loaded_encoders_are_resized_to_the_wanted_geometry(tmp_path):
    path, _, _ = write("clip", tmp_path)
    tower = build_vlm(name="tiny_clip", weights=str(path), image_size=(64, 96), patch_size=16)
    assert tower.native_grid == (4, 6) and tower.model.conv1.weight.shape[-2:] == (16, 16)
    assert tower.model.positional_embedding.shape[0] == 25


@pytest.mark.parametrize(
    ("build", "name", "source"),
    [
        (build_vfm, "dinov2_vitl14", "dinov2_vitl14_pretrain.pth from the model list"),
        (build_vlm, "EVA02-L-14-336", "EVA02_CLIP_L_336_psz14_s6B.pt from huggingface.co/QuanSun"),
        (build_vlm, "ViT-L-14-336-quickgelu", "ViT-L-14-336px.pt"),
        (build_vlm, "ViT-L-16-SigLIP-384", "model.safetensors of huggingface.co/google/siglip"),
    ],
)
def test_missing_file_says_where_to_get_it(build, name, source):
    with torch.device("meta"), pytest.raises(FileNotFoundError, match=f"nowhere.pth do not exist; get .*{source}"):
        build(name=name, weights="nowhere.pth", **SIZE)


def test_another_models_file_is_refused(tmp_path):
    torch.save({"layer1.conv.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="no vision-language model.*layer1.conv.weight"):
        build_vlm(name="tiny_eva02", weights=str(tmp_path / "resnet.pth"), **SIZE)
    with pytest.raises(ValueError, match="is it the file of another model or size"):
        build_vfm(name="tiny_vfm", weights=str(tmp_path / "resnet.pth"), **SIZE)


def test_another_size_or_kind_is_refused(tmp_path):
    path, _, _ = write("eva02", tmp_path)
    for name in ("tiny_clip", "tiny_siglip"):
        with pytest.raises(ValueError, match="is it the file of another model or size"):
            build_vlm(name=name, weights=str(path), **SIZE)
    with pytest.raises(ValueError, match="missing"):
        build_vlm(name="tiny_eva02", weights=str(path), kwargs={"vision_cfg": {"timm_kwargs": {"depth": 5}}}, **SIZE)


def test_web_page_is_refused(tmp_path):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="web page"):
        build_vlm(name="tiny_clip", weights=str(tmp_path / "page.pt"), **SIZE)
