"""The plain loop: it ends with a table and pictures, and its network and numbers are those of the quickstart config."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mfuser_d2.core.checkpoint import load_trainable
from mfuser_d2.core.checkpoint_file import read_checkpoint
from mfuser_d2.data.prepare import Report
from mfuser_d2.data.streets.writer import write_streets

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml"


@pytest.fixture(scope="module")
def plain_train() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))  # as where the file is run as a program
    try:
        spec = importlib.util.spec_from_file_location("plain_train", ROOT / "tools" / "plain_train.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plain_train.py", *arguments])
    module.main()


def test_it_ends_with_a_table_pictures_and_a_checkpoint(
    plain_train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_streets(tmp_path / "streets", report=Report(jobs=1), num_train=2, num_val=1, size=(64, 128))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(plain_train, "BATCH", 2)
    run(plain_train, monkeypatch, "--max-iter", "2", "--output", str(tmp_path / "out"))

    results = json.loads((tmp_path / "out" / "inference" / "results.json").read_text())
    assert list(results["results"]) == [plain_train.SOURCE, *plain_train.TARGETS]
    assert results["sources"] == [plain_train.SOURCE]
    targets = [results["results"][name]["mIoU"] for name in plain_train.TARGETS]
    assert results["mean"]["mIoU"] == pytest.approx(sum(targets) / 3)
    assert (tmp_path / "out" / "predictions.jpg").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "iter 2/2" in printed and "mIoU" in printed and "tools/setup_env.sh" in printed

    content = read_checkpoint(tmp_path / "out" / "model_final.pth")
    torch.manual_seed(1)
    other = plain_train.build_network()
    load_trainable(other, content["model"], content["encoders"])
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in content["model"].items())


def test_missing_pictures_are_named_with_the_command_that_draws_them(
    plain_train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"streets_sem_seg_train.*prepare_streets.py"):
        run(plain_train, monkeypatch, "--output", str(tmp_path / "out"))


def test_network_and_numbers_are_those_of_the_quickstart_config(plain_train: ModuleType) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from mfuser_d2.d2 import MFuserTrainer, load_config

    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu"])
    assert list(cfg.DATASETS.TEST) == [plain_train.SOURCE, *plain_train.TARGETS]
    solver = cfg.SOLVER
    wanted = (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.WARMUP_ITERS, solver.BASE_LR, solver.WEIGHT_DECAY)
    numbers = plain_train
    assert wanted == (
        numbers.BATCH, numbers.MAX_ITER, numbers.WARMUP_ITERS, numbers.BASE_LR, numbers.WEIGHT_DECAY
    )  # fmt: skip
    model, plain = MFuserTrainer.build_model(cfg), plain_train.build_network()
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert model.inference == plain.inference and tuple(model.crop_size) == plain.crop_size
    assert model.criterion.num_points == plain.criterion.num_points
