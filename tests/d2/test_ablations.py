"""Every file of configs/ablations is short, listed and valid, and trains and predicts once its encoders are tiny."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="configs are read by Detectron2")

import yaml  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.core.adapters import ADAPTERS  # noqa: E402
from mfuser_d2.core.mt_enhancer import ENHANCERS  # noqa: E402
from mfuser_d2.d2 import load_config, validate_config  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ablations"
FILES = sorted(FOLDER.glob("*/*.yaml"))
TINY = {"SigLIP": "tiny_siglip", "quickgelu": "tiny_clip", "EVA02": "tiny_eva02", "PE": "tiny_clip", "dino": "tiny_vfm"}


def tiny_name(name: str) -> str:
    """The tiny encoder of the same kind, behind the same prefix."""
    prefix, _, rest = name.rpartition(":")
    return (f"{prefix}:" if prefix else "") + next(tiny for word, tiny in TINY.items() if word in rest)


def shrunk(path: Path) -> CfgNode:
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS", "32"])
    cfg.defrost()
    node, head = cfg.MODEL.MFUSER, cfg.MODEL.SEM_SEG_HEAD
    node.VFM.NAME, node.VLM.NAME = tiny_name(node.VFM.NAME), tiny_name(node.VLM.NAME)
    node.PATCH_SIZE, node.TAP_LAYERS, node.MT_ENHANCER.WIDTH = 0, [0, 1, 2, 3], 16
    node.IMAGE_SIZE = node.INFERENCE.CROP_SIZE = node.INFERENCE.STRIDE = cfg.INPUT.CROP.SIZE = [48, 48]
    head.HIDDEN_DIM = head.MASK_DIM = head.ENC_FFN_DIM = head.DEC_FFN_DIM = 32
    head.ENC_LAYERS, head.DEC_LAYERS, head.NUM_HEADS = 1, 1, 2
    cfg.freeze()
    return cfg


def test_every_row_of_the_tables_has_a_file() -> None:
    names = {folder: {path.stem for path in FILES if path.parent.name == folder} for folder in ("adapters", "text")}
    assert names["adapters"] == set(ADAPTERS)
    assert names["text"] == {*ENHANCERS, "templates", "learned_queries"}


def test_readme_lists_every_file_and_nothing_else() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = {part.split(")")[0] for part in text.split("](")[1:]}
    assert listed == {path.relative_to(FOLDER).as_posix() for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_file_is_short_named_after_its_row_and_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 12
    cfg = load_config(str(path))
    validate_config(cfg)
    assert path.with_suffix("").as_posix().endswith(cfg.OUTPUT_DIR.removeprefix("output/"))
    if path.parent.name == "adapters":
        assert cfg.MODEL.MFUSER.ADAPTER.NAME == path.stem
    if path.parent.name == "text" and path.stem in ENHANCERS:
        assert yaml.safe_load(text)["MODEL"]["MFUSER"]["MT_ENHANCER"]["KIND"] == path.stem


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name != "adapters"], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_file_builds_trains_a_step_and_predicts(path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cfg = shrunk(path)
        model = build_model(cfg).train()
        image, label = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8), torch.randint(0, 19, (48, 48))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sum(model([{"image": image, "sem_seg": label}] * 2).values()).backward()
        assert not [name for name, p in trained.items() if p.grad is None]
        torch.optim.SGD(trained.values(), lr=1e-3).step()
        scores = model.eval()([{"image": image, "height": 20, "width": 30}])[0]["sem_seg"]
        assert scores.shape == (19, 20, 30) and bool(scores.isfinite().all())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.MFUSER.ENCODERS", "vfm"], "'mvfuser' needs both encoders"),
        (["MODEL.MFUSER.ENCODERS", "one"], "ENCODERS='one'"),
        (["MODEL.MFUSER.MT_ENHANCER.KIND", "half"], "KIND='half'"),
        (["MODEL.MFUSER.ALIGN_LOSS.FEATURES", "vfm"], "FEATURES='vfm'"),
        (["MODEL.MFUSER.PROMPT_TEMPLATES", '["{}"]'], "set PROMPT_LENGTH to 0"),
        (["MODEL.MFUSER.QUERIES", "learned", "MODEL.MFUSER.ALIGN_LOSS.TEMPERATURE", "0.0"], "TEMPERATURE=0"),
        (["MODEL.MFUSER.VLM.NAME", "vfm:dinov2_vits14"], "no text encoder"),
        (["MODEL.MFUSER.ADAPTER.NUM_POINTS", "0"], "NUM_POINTS=0"),
        (["MODEL.MFUSER.INFERENCE.SCALES", "[]"], "SCALES"),
        (["SOLVER.EMA_DECAY", "1.0"], "EMA_DECAY=1.0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_built(opts: list[str], words: str) -> None:
    cfg = load_config(str(FOLDER.parent / "Base-MFuser.yaml"), opts)
    with pytest.raises((KeyError, ValueError), match=words):
        validate_config(cfg)
