"""tools/visualize_data.py and the data benchmark."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mfuser_d2.data.prepare import Report
from mfuser_d2.data.streets.writer import write_streets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_streets(folder / "streets", report=Report(jobs=1), num_train=3, num_val=2, size=(64, 128))
    return folder


@pytest.fixture
def visualize(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("visualize_data")


def test_rows_of_all_data_sets(visualize, tmp_path: Path, root: Path) -> None:
    output = tmp_path / "new/picture.png"
    names = ["streets_sem_seg_val", "streets_fog_sem_seg_val"]
    assert visualize.main(["--dataset", *names, "--no-crops", "--count", "1", "--output", str(output)]) == 0
    picture = np.array(Image.open(output))
    first = cv2.imread(str(root / "streets/images/val/00000.png"))[..., ::-1]
    panel = cv2.resize(first, (384, 192)).astype(int)
    differences = [
        np.abs(picture[top : top + 192, 10:394].astype(int) - panel).mean() for top in range(20, picture.shape[0] - 192)
    ]
    assert min(differences) < 12, "the picture shows the first image of the first data set"


def test_crops_follow_the_seed(visualize, tmp_path: Path) -> None:
    pictures = []
    for index, seed in enumerate(("1", "1", "2")):
        output = tmp_path / f"{index}.png"
        options = ["--count", "2", "--crop", "32", "32", "--seed", seed, "--output", str(output)]
        assert visualize.main(["--dataset", "streets_sem_seg_train", *options]) == 0
        pictures.append(output.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_config_draws_the_training_loader(visualize, tmp_path: Path) -> None:
    pytest.importorskip("detectron2", reason="configs are Detectron2's")
    output = tmp_path / "picture.png"
    config = ROOT / "configs/quickstart/mfuser_tiny_eva02.yaml"
    options = ["INPUT.CROP.SIZE", "(32,32)", "DATALOADER.NUM_WORKERS", "0", "DATALOADER.MFUSER.RCS_MIN_PIXELS", "10"]
    assert visualize.main(["--config-file", str(config), "--count", "2", "--output", str(output), *options]) == 0
    assert np.array(Image.open(output)).std() > 20


def test_legend_names_what_is_shown_and_what_is_ignored(visualize, monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    monkeypatch.setattr(visualize, "draw_legend", lambda names, colors, width: named.append((names, colors))
                        or np.zeros((20, width, 3), np.uint8))  # fmt: skip
    image, labels = np.zeros((8, 12, 3), np.uint8), np.full((8, 12), 10, np.uint8)
    labels[2:] = 255
    visualize.draw_rows([("caption", visualize.panels_of(image, labels), visualize.count(labels))])
    assert named == [(["sky", "ignored"], [(70, 130, 180), (0, 0, 0)])]


def test_padding_is_shown(visualize) -> None:
    padded = visualize.pad(np.zeros((2, 3, 3), np.uint8), (4, 5), (1, 2, 3))
    assert padded.shape == (4, 5, 3) and (padded[3, 4] == (1, 2, 3)).all() and not padded[:2, :3].any()


def test_missing_data_set_is_one_line(visualize, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualize.main(["--dataset", "gta5_sem_seg_val"]) == 1
    message = capsys.readouterr().err
    assert "prepare_gta5.py" in message and len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["--dataset", "a", "--config-file", "b"], ["--dataset", "a", "--count", "0"]],
)
def test_contradictory_arguments(visualize, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        visualize.main(arguments)
    assert stopped.value.code == 2


def test_benchmark_prints_a_line_a_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "benchmarks", raising=False)
    data = importlib.import_module("benchmarks.data")
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    options = "--size 72 96 --images 2 --crop 32 48 --workers 0 1 --seconds 0.2".split()
    assert data.run(parser.parse_args(options)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cases = [row for row in rows if row["benchmark"] == "data"]
    assert [row["workers"] for row in cases] == [0, 1]
    assert all(row["images_per_second"] > 0 and row["native"] == [72, 96] and row["crop"] == [32, 48] for row in cases)
    assert {row["part"] for row in rows if row["benchmark"] == "data_part"} >= {"read_image", "resize_image", "color"}
