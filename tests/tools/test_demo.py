"""The demo as a user runs it: every kind of input, refusals by name, exit status."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from mfuser_d2.d2 import MFuserCheckpointer  # noqa: E402
from mfuser_d2.predictor import Predictor  # noqa: E402
from mfuser_d2.visualization.video import VideoReader, VideoWriter  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml")
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.MFUSER.INFERENCE.CROP_SIZE", "[64,64]"),
    *("MODEL.MFUSER.INFERENCE.STRIDE", "[64,64]"),
]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    specification = importlib.util.spec_from_file_location("demo_tool", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["demo_tool"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(3)
    model = Predictor(CONFIG, "", opts=SMALL).model
    for name in ("first", "second"):
        MFuserCheckpointer(model, save_dir=str(folder)).save(name)
    return [folder / "first.pth", folder / "second.pth"]


@pytest.fixture(scope="module")
def predictor(checkpoints) -> Predictor:
    return Predictor(CONFIG, checkpoints[0], opts=SMALL)


@pytest.fixture
def run(demo, predictor, monkeypatch):
    """Run the command line with one model for all tests; building takes longer than they do."""
    trained = predictor.class_names
    monkeypatch.setattr(demo, "Predictor", lambda config, weights=None, opts=(): predictor)
    yield lambda *words: demo.main(["--config-file", CONFIG, *map(str, words)])
    predictor.set_classes(trained)


def picture(path: Path, size=(40, 60), mode="RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def video(path: Path, count=3) -> Path:
    with VideoWriter(path, frame_rate=10) as writer:
        for index in range(count):
            writer.write(np.full((64, 96, 3), 60 * index, np.uint8))
    return path


def test_good_inputs_are_done_and_bad_ones_named(run, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, mode in (("a.png", "RGB"), ("b.jpg", "CMYK"), ("c.png", "L"), ("d.png", "P"), ("e.png", "RGBA")):
        picture(folder / name, mode=mode)
    picture(folder / "pixel.png", size=(1, 1))
    (folder / "text.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("not looked at")
    status = run("--input", folder, tmp_path / "missing.png", tmp_path / "*.gif", "http://x/y.jpg", "--output", out)
    errors = capsys.readouterr().err
    assert status == 1
    for culprit in ("text.jpg is no picture", "missing.png does not exist", "*.gif: no pictures", "x/y.jpg is an addr"):
        assert f"{culprit}" in errors
    assert "notes.txt" not in errors
    for stem in ("a", "b", "c", "d", "e", "pixel"):
        size = (1, 1) if stem == "pixel" else (60, 40)
        assert Image.open(out / f"{stem}_labels.png").size == size
        assert (out / f"{stem}_overlay.png").is_file()
    assert not list(out.glob("text*"))


def test_labels_are_the_predictors(run, predictor, tmp_path):
    assert run("--input", picture(tmp_path / "a.png"), "--output", tmp_path / "out", "--no-legend") == 0
    labels = np.array(Image.open(tmp_path / "out" / "a_labels.png"))
    assert np.array_equal(labels, predictor.labels(tmp_path / "a.png"))


def test_same_names_do_not_collide(run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "a.png")
    assert run("--input", tmp_path / "*" / "a.png", "--output", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").glob("*labels.png")} == {"a_labels.png", "a_2_labels.png"}


def test_output_may_be_a_file(run, tmp_path, capsys):
    source = picture(tmp_path / "a.png")
    assert run("--input", source, "--output", tmp_path / "seen.jpg") == 0
    assert Image.open(tmp_path / "seen.jpg").format == "JPEG"
    assert run("--input", source, "--output", source) == 1
    assert "overwrite its input" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="several inputs"):
        run("--input", source, picture(tmp_path / "b.png"), "--output", tmp_path / "seen.png")


def test_unwritable_output_is_refused_before_the_model_is_built(demo, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "build_models", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(SystemExit, match="cannot be written to"):
        run("--input", picture(tmp_path / "a.png"), "--output", tmp_path / "file" / "out")


@pytest.mark.parametrize("extra", [[], ["--plain"], ["--no-legend", "--no-text"]])
def test_video_keeps_size_rate_and_length(run, tmp_path, extra):
    assert run("--video-input", video(tmp_path / "a.mp4"), "--output", tmp_path / "out", *extra) == 0
    reader = VideoReader(tmp_path / "out" / "a_overlay.mp4")
    assert reader.frame_rate == pytest.approx(10)
    assert [frame.shape for frame in reader] == [(64, 96, 3)] * 3


def test_video_that_ends_early_keeps_what_there_was(run, demo, tmp_path, monkeypatch, capsys):
    class Promising(VideoReader):
        def __init__(self, source):
            super().__init__(source)
            self.announced = 100

    monkeypatch.setattr(demo, "VideoReader", Promising)
    assert run("--input", video(tmp_path / "a.mp4"), picture(tmp_path / "b.png"), "--output", tmp_path / "out") == 1
    assert "ended after 3 of the 100 frames" in capsys.readouterr().err
    assert len(list(VideoReader(tmp_path / "out" / "a_overlay.mp4"))) == 3
    assert (tmp_path / "out" / "b_labels.png").is_file()


def test_other_classes(run, tmp_path, capsys):
    source = picture(tmp_path / "a.png")
    assert run("--input", source, "--classes", "road, car,tractor", "--output", tmp_path / "out") == 0
    assert "'tractor' was never trained on" in capsys.readouterr().out
    assert np.array(Image.open(tmp_path / "out" / "a_labels.png")).max() <= 2


def test_300_classes_from_a_file(run, tmp_path):
    names = [a + b for a in "abcdefghijklmno" for b in "abcdefghijklmnopqrst"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    source = picture(tmp_path / "a.png")
    assert run("--input", source, "--classes", f"@{tmp_path / 'names.txt'}", "--output", tmp_path / "out") == 0
    assert np.array(Image.open(tmp_path / "out" / "a_labels.png")).dtype == np.uint16


@pytest.mark.parametrize("names, reason", [("road,,car", "empty name"), ("road,Road", "twice"), ("@nofile", "nofile")])
def test_bad_class_lists_are_refused(run, tmp_path, names, reason):
    with pytest.raises(SystemExit, match=reason):
        run("--input", picture(tmp_path / "a.png"), "--classes", names, "--output", tmp_path / "out")


def test_compare_stands_side_by_side(demo, checkpoints, tmp_path):
    source, out = picture(tmp_path / "a.png", size=(64, 96)), tmp_path / "out"
    models = ["--compare", f"{CONFIG}:{checkpoints[0]}", str(checkpoints[1])]
    words = ["--config-file", CONFIG, "--input", str(source), str(video(tmp_path / "v.mp4", count=1))]
    assert demo.main([*words, *models, "--output", str(out), "--opts", *SMALL]) == 0
    assert {p.name for p in out.glob("*_labels.png")} == {"a_first_labels.png", "a_second_labels.png"}
    assert [frame.shape for frame in VideoReader(out / "v_overlay.mp4")] == [(64, 192, 3)]


def test_wrong_arguments(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for words, reason in (
        (["--input", "a.png"], "no display"),
        (["--input", "a.png", "--webcam", "--output", "x"], "not allowed with"),
        (["--input", "a.png", "--output", "x", "--opacity", "2"], "outside 0..1"),
        (["--output", "x"], "required"),
    ):
        with pytest.raises(SystemExit) as stop:
            demo.main(["--config-file", CONFIG, *words])
        assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_a_wrong_config_is_one_line(demo, tmp_path):
    source = picture(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="error: .*nope.yaml does not exist"):
        demo.main(["--config-file", "nope.yaml", "--input", str(source), "--output", str(tmp_path / "out")])
