"""Feature views from the command line."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml")


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location(
        "visualize_features_tool", ROOT / "tools" / "visualize_features.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def pictures(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = []
    for name, size in (("a.png", (50, 90)), ("b.png", (70, 40))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
        paths.append(str(folder / name))
    return paths


def test_views_of_several_pictures_and_a_bad_one(tool, tmp_path, capsys):
    words = ["--input", *pictures(tmp_path), str(tmp_path / "missing.png"), "--words", "road,tractor"]
    options = ["--output", str(tmp_path / "out"), "--short-side", "48", "--panel-width", "60"]
    assert tool.main(["--config-file", CONFIG, *words, *options, "--opts", "MODEL.DEVICE", "cpu"]) == 1
    assert "missing.png" in capsys.readouterr().err
    widths = {name: Image.open(tmp_path / "out" / f"{name}.png").width for name in ("features", "words_before")}
    assert widths == {"features": 5 * 70 + 10, "words_before": 3 * 70 + 10}  # panels, each with its gap
    before, after = (np.array(Image.open(tmp_path / "out" / f"words_{state}.png")) for state in ("before", "after"))
    assert before.shape == after.shape and not np.array_equal(before, after)


def test_without_vlm_there_is_no_before(tool, tmp_path, capsys):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.MFUSER.ENCODERS", "vfm", "MODEL.MFUSER.ADAPTER.NAME", "none"]
    words = ["--input", pictures(tmp_path)[0], "--words", "road", "--short-side", "48", "--output", str(tmp_path / "o")]
    assert tool.main(["--config-file", CONFIG, *words, "--opts", *opts]) == 0
    assert "no words_before.png" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"features.png", "words_after.png"}


@pytest.mark.parametrize("words, reason", [("road,,car", "empty name"), (",".join(map(str, range(41))), "at most 40")])
def test_bad_words_are_refused(tool, tmp_path, words, reason):
    with pytest.raises(SystemExit, match=reason):
        tool.main(["--config-file", CONFIG, "--input", "a.png", "--words", words, "--output", str(tmp_path)])
