"""A short soak: two kills, and what it says about a training that differs."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location("soak", ROOT / "tools" / "soak.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def test_two_kills_lose_nothing_and_end_bit_equal(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "soak.py"), "--kills", "2", "--output", str(tmp_path / "soak"),
         "SOLVER.MAX_ITER", "12", "TEST.EVAL_PERIOD", "6", "SOLVER.CHECKPOINT_PERIOD", "2"],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "2 kills by SIGKILL; losses found: 0" in done.stdout
    assert done.stdout.count("kill ") == 2 and "at its end: weights, average" in done.stdout


def test_one_bit_is_a_difference_and_a_clock_is_none(soak: ModuleType):
    left = {"model": {"w": torch.ones(3)}, "history": {"time": [1.0], "loss": [2.0]}, "iteration": 3}
    right = {"model": {"w": torch.ones(3)}, "history": {"time": [9.0], "loss": [2.0]}, "iteration": 3}
    assert not list(soak.differences(left, right))
    right["model"]["w"][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    right["history"]["loss"] = [2.5]
    assert list(soak.differences(left, right)) == ["/model/w", "/history/loss/0"]
    assert list(soak.differences(left, {"model": 1})) == [""]


def test_announced_and_saved_iterations(soak: ModuleType, tmp_path: Path):
    text = "Saved checkpoint /x/model_0000004.pth (1 MB)\nSaved checkpoint /x/model_0000009.pth (1 MB)"
    assert soak.announced(text) == 9 and soak.announced("") == -1
    assert soak.saved(tmp_path) == -1
    torch.save({"model": {"w": torch.ones(1)}, "iteration": 9}, tmp_path / "model_0000009.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    assert soak.saved(tmp_path) == 9
    (tmp_path / "model_0000009.pth").write_bytes(b"half")
    with pytest.raises(ValueError, match="model_0000009"):
        soak.saved(tmp_path)


def test_moment_that_is_named_was_met(soak: ModuleType):
    """The second evaluation of a process as well, after the first has written its table with a mIoU in every row."""
    one = "Start inference on 1 batches\nTotal inference time: 1\nTotal inference pure compute time: 1\n"
    table = "mIoU 1\nmIoU (16 classes) 2\nmIoU (13 classes) 3\n"

    class Fake(soak.Run):
        def __init__(self, text: str) -> None:
            self.said = "Training from iteration 0 to 9\n" + text

        def text(self) -> str:
            return self.said

        def is_over(self) -> bool:
            return False

        def is_writing(self) -> bool:
            return False

    rng = random.Random(0)
    assert soak.wait_for(Fake(one + table + "Start inference on 1 batches"), "evaluating", rng, 0.1) == "evaluating"
    assert soak.wait_for(Fake(one + table), "evaluating", rng, 0.1) == "anywhere"
    assert soak.wait_for(Fake(one + table), "writing", rng, 0.1) == "anywhere"
