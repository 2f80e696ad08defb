"""What is exported is the segmenter's window, with its texts folded in."""

import pytest
import torch

from mfuser_d2.core.adapters import MVFuserBlock
from mfuser_d2.core.backbone import DualEncoderBackbone
from mfuser_d2.core.criterion import Criterion
from mfuser_d2.core.encoders.builders import build_vfm, build_vlm
from mfuser_d2.core.export import FoldedTexts, WindowModel, export_program, relative_difference
from mfuser_d2.core.factory import build_backbone_parts, build_head
from mfuser_d2.core.inference import InferenceSettings
from mfuser_d2.core.ops.selective_scan import scan_backend
from mfuser_d2.core.segmenter import Segmenter

SIZE = (32, 48)


def make_segmenter(precision="float32") -> Segmenter:
    backbone = DualEncoderBackbone(
        **build_backbone_parts(
            vfm={"name": "tiny_vfm"},
            vlm={"name": "tiny_clip"},
            image_size=SIZE,
            tap_layers=[0, 1, 2, 3],
            adapter="none",
        )
    )
    head = build_head(
        vlm={"name": "tiny_clip"},
        class_names=["road", "car", "sky"],
        in_dims=[backbone.pyramid.dim] * 4,
        hidden_dim=32,
        mask_dim=32,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        refiner_kwargs={"width": 32},
    )
    return Segmenter(
        backbone=backbone,
        sem_seg_head=head,
        criterion=Criterion(num_classes=3),
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
        crop_size=SIZE,
        inference=InferenceSettings(crop_size=SIZE, stride=SIZE),
        precision=precision,
    ).eval()


def test_window_model_gives_the_segmenters_scores_without_its_text_encoder(tmp_path):
    segmenter = make_segmenter()
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    wanted = segmenter.predict([image])[0]
    model = WindowModel(segmenter, size=SIZE)
    assert isinstance(segmenter.sem_seg_head.text_encoder, FoldedTexts)
    got = model(image[None].float())[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    export_program(model, tmp_path / "model.pt2")
    program = torch.export.load(str(tmp_path / "model.pt2"))
    assert relative_difference(program.module()(image[None].float())[0], wanted) < 1e-3
    check_operators(program)


def check_operators(program):
    """Nothing of this package is in the graph."""
    operators = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert operators <= {"aten", "prims", "<built-in function getitem>"}, operators


def test_an_adapter_is_a_short_graph_of_plain_operators():
    block, tokens = MVFuserBlock(dim=16, state_dim=4).eval().requires_grad_(False), torch.randn(1, 130, 16)
    with scan_backend("parallel"):
        program = torch.export.export(block, (tokens,), strict=False)
    check_operators(program)
    assert len(program.graph.nodes) < 250  # a loop over 130 tokens would be thousands
    torch.testing.assert_close(program.module()(tokens), block(tokens), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["tiny_vfm", "tiny_clip", "tiny_eva02", "tiny_siglip"])
def test_a_fixed_image_size_changes_no_token(name):
    build = build_vfm if name == "tiny_vfm" else build_vlm
    tower, images = build(name=name, image_size=(64, 64)), torch.randn(1, 3, 48, 72)
    wanted = tower.embed(images)[0]
    tower.fix_image_size((48, 72))
    assert torch.equal(tower.embed(images)[0], wanted)
    assert tower.native_grid == (6, 9)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="float32"):
        WindowModel(make_segmenter("bfloat16"), size=SIZE)
