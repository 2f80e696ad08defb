"""Cityscapes: polygons drawn by cityscapesscripts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cityscapesscripts", reason="cityscapesscripts draws the polygons")

# Later polygons lie above earlier ones; "cargroup" counts as car, a licence plate is not drawn, a trailer is ignored.
OBJECTS = [
    {"label": "road", "polygon": [[0, 0], [19, 0], [19, 11], [0, 11]]},
    {"label": "sky", "polygon": [[0, 0], [19, 0], [19, 2], [0, 2]]},
    {"label": "cargroup", "polygon": [[2, 5], [6, 5], [6, 8], [2, 8]]},
    {"label": "license plate", "polygon": [[3, 6], [4, 6], [4, 7], [3, 7]]},
    {"label": "trailer", "polygon": [[10, 5], [12, 5], [12, 9], [10, 9]]},
    {"label": "bus", "polygon": [[15, 4], [17, 4], [17, 6], [15, 6]], "deleted": 1},
]


def _wanted() -> np.ndarray:
    labels = np.zeros((12, 20), np.uint8)
    labels[0:3] = 10
    labels[5:9, 2:7] = 13
    labels[5:10, 10:13] = 255
    return labels


@pytest.fixture
def archive(tmp_path: Path, files) -> Path:
    for split in ("train", "val"):
        stem = f"{split}/ulm/ulm_000000_000019"
        files.image(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
        polygons = tmp_path / f"gtFine/{stem}_gtFine_polygons.json"
        polygons.parent.mkdir(parents=True)
        polygons.write_text(json.dumps({"imgHeight": 12, "imgWidth": 20, "objects": OBJECTS}))
    return tmp_path


def test_polygons_become_train_ids(run, archive: Path, files) -> None:
    code, text = run("cityscapes", archive)
    assert code == 0, text
    for split in ("train", "val"):
        path = archive / f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_labelTrainIds.png"
        np.testing.assert_array_equal(files.read(path), _wanted())


def test_unknown_class_and_broken_file(run, archive: Path) -> None:
    path = archive / "gtFine/val/ulm/ulm_000000_000019_gtFine_polygons.json"
    text = path.read_text()
    path.write_text(text.replace('"road"', '"moon"'))
    code, said = run("cityscapes", archive)
    assert code == 1 and path.name in said and "does not know" in said
    path.write_text(text[:60])
    code, said = run("cityscapes", archive)
    assert code == 1 and path.name in said and "cannot be read" in said


def test_no_gui_is_imported(tmp_path: Path) -> None:
    program = Path(__file__).resolve().parents[2] / "datasets" / "prepare_cityscapes.py"
    code = (
        "import runpy, sys; sys.argv = ['prepare', sys.argv[1]]\n"
        f"try: runpy.run_path({str(program)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import cityscapesscripts.preparation.json2labelImg\n"
        "sys.exit(any('PyQt' in name or 'PySide' in name or name == 'tkinter' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=120).returncode == 0
