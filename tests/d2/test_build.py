"""Every config builds through Detectron2, and each variant trains and predicts; encoders are shrunk, weights random."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.d2 import load_config  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FULL_SIZE = sorted(path for source in ("gta5", "synthia", "cityscapes") for path in (CONFIGS / source).glob("*.yaml"))
QUICKSTART = sorted((CONFIGS / "quickstart").glob("*.yaml"))

SMALL_TEXT = {"width": 32, "heads": 2, "layers": 1}
SMALL_TIMM = {"embed_dim": 32, "num_heads": 2}
SMALL_VLM = {
    "ViT-L-14-336-quickgelu": {"vision_cfg": {"width": 32, "head_width": 16}, "text_cfg": SMALL_TEXT},
    "EVA02-L-14-336": {"vision_cfg": {"timm_kwargs": SMALL_TIMM}, "text_cfg": SMALL_TEXT},
    "ViT-L-16-SigLIP-384": {"embed_dim": 32, "vision_cfg": {"timm_kwargs": SMALL_TIMM}, "text_cfg": SMALL_TEXT},
}


def shrunk(path: Path) -> CfgNode:
    """The config with narrow encoders and decoders; depths, taps, patch sizes and everything else as they are."""
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS", "32"])
    cfg.defrost()
    node, head = cfg.MODEL.MFUSER, cfg.MODEL.SEM_SEG_HEAD
    if node.VLM.NAME in SMALL_VLM:
        node.VFM.KWARGS = CfgNode(SMALL_TIMM)
        node.VLM.KWARGS = CfgNode(SMALL_VLM[node.VLM.NAME])
    node.MT_ENHANCER.WIDTH = 32
    head.HIDDEN_DIM = head.MASK_DIM = 32
    head.ENC_FFN_DIM = head.DEC_FFN_DIM = 32
    cfg.freeze()
    return cfg


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_full_size_config_builds(path: Path):
    cfg = shrunk(path)
    model = build_model(cfg).eval()
    assert len(model.backbone.encoder.adapters) == 24
    image = torch.randint(0, 256, (3, 80, 112), dtype=torch.uint8)
    scores = model([{"image": image, "height": 40, "width": 60}])[0]["sem_seg"]
    assert scores.shape == (19, 40, 60) and bool(scores.isfinite().all())


@pytest.mark.parametrize("path", QUICKSTART, ids=lambda path: path.stem)
def test_variant_learns_one_batch_and_keeps_its_encoders(path: Path):
    model = build_model(shrunk(path)).train()
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    label = torch.randint(0, 19, (2, 4, 6)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    batch = [{"image": i, "sem_seg": t} for i, t in zip(image, label)]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    totals = []
    for _ in range(6):
        total = sum(model(batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0], totals
    assert len(frozen) > 100
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), f"{name} is frozen but moved"
    result = model.eval()([{"image": image[0], "height": 64, "width": 96}])[0]["sem_seg"]
    assert result.shape == (19, 64, 96)


def test_training_without_labels_is_refused():
    model = build_model(shrunk(QUICKSTART[0])).train()
    with pytest.raises(ValueError, match="street.png.*sem_seg"):
        model([{"image": torch.zeros(3, 64, 64), "file_name": "street.png"}])
