"""Authors' checkpoints for a config's model: there and back, and what does not fit."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.core.official import to_official  # noqa: E402
from mfuser_d2.d2 import MFuserCheckpointer, load_config  # noqa: E402
from mfuser_d2.d2.checkpoint import convert_official  # noqa: E402
from mfuser_d2.d2.official import empty_model_state, revert_official  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "quickstart"
VARIANTS = ("clip", "eva02", "siglip")
UNUSED = {
    "clip": {"backbone.dinov2.mask_token": (1, 96)},
    "eva02": {
        "backbone.dinov2.mask_token": (1, 96),
        "random_text": (19, 64),
        "backbone.rope.freqs_cos": (256, 24),
        "backbone.blocks.3.attn.rope.freqs_sin": (256, 24),
    },
    "siglip": {"backbone.adapter_proj1.0.weight": (96, 96), "backbone.adapter_proj3.bias": (96,)},
}


def config(variant: str, *opts: str) -> CfgNode:
    return load_config(str(CONFIGS / f"mfuser_tiny_{variant}.yaml"), ["MODEL.DEVICE", "cpu", *opts])


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def ours(variant) -> dict[str, torch.Tensor]:
    """A whole state dict of random numbers."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(3)
        for key, value in empty_model_state(config(variant)).items()
    }


@pytest.fixture
def official(variant, ours) -> dict[str, torch.Tensor]:
    """The same as the authors would have it, with what they keep for nothing."""
    return {**to_official(ours, variant), **{key: torch.ones(shape) for key, shape in UNUSED[variant].items()}}


def same_bits(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return set(got) == set(wanted) and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_model_is_built_without_memory(variant):
    assert all(value.is_meta for value in empty_model_state(config(variant)).values())


def test_round_trip_is_exact(variant, ours, official):
    cfg = config(variant)
    converted = convert_official(official, cfg)
    assert same_bits(converted, ours)
    back = revert_official(converted, cfg)
    assert same_bits(back, {key: value for key, value in official.items() if key not in UNUSED[variant]})


def test_wrapper_and_prefix_change_nothing(variant, ours, official):
    wrapped = {
        "meta": {"CLASSES": ("road",)},
        "state_dict": {f"module.{key}": value for key, value in official.items()},
        "optimizer": {"state": {}},
    }
    assert same_bits(convert_official(wrapped, config(variant)), ours)


def test_converted_file_loads_as_weights(variant, official, tmp_path):
    cfg = config(variant)
    torch.save({"model": convert_official(official, cfg)}, tmp_path / "converted.pth")
    model = build_model(cfg).eval()
    MFuserCheckpointer(model).load(str(tmp_path / "converted.pth"), [])
    theirs = to_official(model.state_dict(), variant)
    assert all(torch.equal(theirs[key], value) for key, value in official.items() if key in theirs)


def test_another_variant_names_the_config_to_use(variant, official):
    for wrong in set(VARIANTS) - {variant}:
        with pytest.raises(ValueError, match=rf"{variant} variant.*mfuser_{variant}\.yaml"):
            convert_official(official, config(wrong))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.MFUSER.PROMPT_LENGTH", "3"),
        ("MODEL.SEM_SEG_HEAD.DEC_LAYERS", "1"),
        ("MODEL.SEM_SEG_HEAD.ENC_FFN_DIM", "48"),
        ("MODEL.MFUSER.MT_ENHANCER.WIDTH", "32"),
        ("MODEL.MFUSER.ADAPTER.STATE_DIM", "4"),
        ("MODEL.MFUSER.IMAGE_SIZE", "[64, 64]"),
        ("MODEL.MFUSER.PATCH_SIZE", "16"),
    ],
)
def test_another_size_names_the_key(variant, official, key, value):
    with pytest.raises(ValueError, match=key):
        convert_official(official, config(variant, key, value))


def test_another_number_of_classes_is_told(variant, ours, official):
    queries = official["decode_head.query_embed.weight"]
    official["decode_head.query_embed.weight"] = torch.cat([queries, queries[:1]])
    with pytest.raises(ValueError, match="NUM_CLASSES is 19, the checkpoint has 20"):
        convert_official(official, config(variant))


def test_missing_and_unknown_keys_are_named(variant, official):
    official["decode_head.extra.weight"] = official.pop("decode_head.cls_embed.bias")
    with pytest.raises(ValueError, match=r"decode_head\.(cls_embed\.bias|extra\.weight)"):
        convert_official(official, config(variant))
    del official["decode_head.extra.weight"]
    with pytest.raises(ValueError, match=r"1 missing: decode_head\.cls_embed\.bias"):
        convert_official(official, config(variant))


def test_unknown_key_of_the_encoder_is_named(variant, official):
    official["backbone.surprise"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"backbone\.surprise"):
        convert_official(official, config(variant))


def test_misshapen_tensor_is_named(variant, official):
    official["decode_head.cls_embed.weight"] = torch.ones(20, 5)
    with pytest.raises(ValueError, match=r"decode_head\.cls_embed\.weight is \(20, 5\)"):
        convert_official(official, config(variant))


def test_other_things_are_refused(variant, ours):
    cfg = config(variant)
    with pytest.raises(ValueError, match="no weights of the authors"):
        convert_official({"layer1.weight": torch.ones(1)}, cfg)
    with pytest.raises(ValueError, match="--reverse"):
        convert_official(ours, cfg)
    with pytest.raises(ValueError, match="'epoch' is a int"):
        convert_official({"epoch": 3}, cfg)


def test_reverting_needs_every_entry(variant, ours):
    part = {key: value for key, value in ours.items() if "vfm" not in key}
    with pytest.raises(ValueError, match="missing: backbone.encoder.vfm"):
        revert_official(part, config(variant))


@pytest.mark.parametrize("variant", ["clip"], indirect=True)
def test_doubled_class_embedding_is_absorbed(variant, official):
    ours = convert_official(official, config(variant))
    assert torch.equal(ours["backbone.encoder.vlm.model.class_embedding"], 2 * official["backbone.class_embedding"])
