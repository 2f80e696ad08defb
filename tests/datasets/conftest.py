"""Runs preparation programs as a user does, in this process."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from PIL import Image

PROGRAMS = Path(__file__).resolve().parents[2] / "datasets"

Run = Callable[..., tuple[int, str]]


def load_program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", PROGRAMS / f"prepare_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Run:
    """run("gta5", root, "--strict"): the exit code of prepare_gta5.py and what it said."""

    def start(name: str, root: Path, *options: str) -> tuple[int, str]:
        caplog.clear()
        caplog.set_level(logging.INFO, "mfuser_d2")
        monkeypatch.setattr(sys, "argv", [f"prepare_{name}.py", str(root), "--jobs", "1", *options])
        code = load_program(name).main()
        return code, caplog.text

    return start


class Files:
    """Writes files in the publishers' encodings and reads them back."""

    @staticmethod
    def image(path: Path, size: tuple[int, int] = (12, 20)) -> None:
        """A picture of height x width, as its suffix says."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        assert cv2.imwrite(str(path), pixels)

    @staticmethod
    def palette(path: Path, ids: np.ndarray) -> None:
        """A palette PNG with these indices, as GTAV and Mapillary publish them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(ids.astype(np.uint8)).convert("P")
        picture.putdata(ids.ravel().tolist())
        picture.putpalette(np.random.default_rng(1).integers(0, 255, 768, np.uint8).tobytes())
        picture.save(path)

    @staticmethod
    def ids(path: Path, ids: np.ndarray) -> None:
        """A PNG with these values as they are, one channel or three, 8 or 16 bits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), ids)

    @staticmethod
    def read(path: Path) -> np.ndarray:
        return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)

    @staticmethod
    def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
        """Content and time of every file below root."""
        found = [path for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def files() -> type[Files]:
    return Files


@pytest.fixture
def every_id() -> np.ndarray:
    """(12, 20) uint8 that holds 0 to 239 once each."""
    return np.arange(240, dtype=np.uint8).reshape(12, 20)
