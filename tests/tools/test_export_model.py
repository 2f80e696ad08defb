"""Exported files give the model's scores."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml")
SMALL = [
    *("MODEL.MFUSER.INFERENCE.CROP_SIZE", "[48,64]", "MODEL.MFUSER.INFERENCE.STRIDE", "[32,32]"),
    *("MODEL.MFUSER.ADAPTER.NAME", "none"),  # one scan, in the refiner, is quickly exported
    *("MODEL.MFUSER.IMAGE_SIZE", "[48,64]", "MODEL.SEM_SEG_HEAD.DEC_LAYERS", "1", "MODEL.SEM_SEG_HEAD.ENC_LAYERS", "1"),
]


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("export_model_tool", ROOT / "tools" / "export_model.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_both_formats_agree_with_the_model(tool, tmp_path, capsys):
    formats = ["program"]
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        formats.append("onnx")
    words = ["--output", str(tmp_path), "--formats", *formats, "--classes", "road,car,tractor"]
    assert tool.main(["--config-file", CONFIG, *words, "--opts", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert printed.count("good") == len(formats) and "BAD" not in printed
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["classes"] == ["road", "car", "tractor"] and about["input"]["shape"] == [1, 3, 48, 64]
    scores = torch.export.load(str(tmp_path / "model.pt2")).module()(torch.rand(1, 3, 48, 64) * 255)
    assert list(scores.shape) == about["output"]["shape"]


def test_a_difference_fails(tool, tmp_path, capsys):
    windows = [torch.rand(1, 3, 8, 8)]
    path = tmp_path / "a.onnx"
    path.write_bytes(b"")
    wanted = [window * 2 for window in windows]
    assert tool.check("x", path, lambda _: lambda window: window * 2.0001, windows, wanted, 0.0)
    assert not tool.check("x", path, lambda _: lambda window: window * 2.01, windows, wanted, 0.0)
    assert "BAD" in capsys.readouterr().out
