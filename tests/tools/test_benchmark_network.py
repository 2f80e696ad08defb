"""`benchmark.py inference` and `train` on the quickstart's network: every case has its line, and the numbers add up."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("detectron2", reason="the network is built from a Detectron2 config")

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml")
COMMON = ["--config-file", TINY, "--device", "cpu", "--repeats", "1", "--threads", "1"]
COMMON += ["--precision", "bfloat16"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def rows_of(benchmark: ModuleType, capsys: pytest.CaptureFixture, *arguments: str) -> list[dict]:
    assert benchmark.main(list(arguments)) == 0
    machine, *rows = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert machine["benchmark"] == "machine"
    return rows


def test_inference_counts_windows_and_encodes_texts_once(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib", reason="the chart is drawn with it")
    chart = tmp_path / "parts.png"
    crop, image = rows_of(
        benchmark, capsys, "inference", *COMMON, "--image-size", "128", "320", "--plot", str(chart)
    )  # fmt: skip
    assert (crop["case"], crop["windows"]) == ("crop", 1)
    assert (image["case"], image["windows"], image["passes"]) == ("image", 3, 1)
    assert crop["text_encodings"] == image["text_encodings"] == 0
    assert image["flops"] == 3 * crop["flops"] > 1e9
    assert {"VFM", "VLM, image", "adapters", "pyramid", "pixel decoder", "transformer decoder"} <= {
        *image["part_seconds"]
    }
    assert sum(image["part_seconds"].values()) == pytest.approx(image["seconds"])
    assert sum(image["part_shares"].values()) == pytest.approx(1, abs=0.01)
    assert image["efficiency"] == pytest.approx(
        image["flops"] / image["seconds"] / image["matrix_flops_per_second"], rel=1e-3
    )
    assert chart.stat().st_size > 1000


def test_checkpointing_keeps_less_for_the_backward(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    plain, recomputed = rows_of(benchmark, capsys, "train", *COMMON, "--batch", "1", "--checkpoint", "off", "on")
    assert plain["case"] == "batch 1" and recomputed["case"] == "batch 1, checkpoint"
    assert recomputed["saved_bytes"] < plain["saved_bytes"]
    assert plain["flops"] == recomputed["flops"]
    assert {"backward", "losses", "optimizer", "adapters"} <= {*plain["part_seconds"]}
    assert plain["hours_for_20000_steps"] == pytest.approx(plain["seconds"] / 0.18, rel=1e-3)


def test_frozen_weights_leave_nothing_behind(benchmark: ModuleType) -> None:
    """A frozen linear map needs its weight for the gradient of its input, and its input for nothing."""
    from benchmarks.train import saved_bytes

    counts: list[int] = []
    frozen = torch.nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    with saved_bytes(frozen, counts.append):
        frozen(x * 1.0)
    assert sum(counts) == 0
    frozen.requires_grad_(True)
    with saved_bytes(frozen, counts.append):
        frozen(x * 1.0)
    assert sum(counts) == 4 * 8 * 4
