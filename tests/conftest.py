"""Shared fixtures: the folder of reference numbers and a fixed seed."""

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference-dir",
        type=Path,
        default=Path(__file__).resolve().parents[2] / "shared" / "reference",
        help="folder with the recorded numbers of the authors' release (default: ../shared/reference)",
    )


@pytest.fixture(scope="session")
def reference_dir(request: pytest.FixtureRequest) -> Path:
    """Folder of the recorded reference numbers; skips the test where there is none."""
    folder = request.config.getoption("--reference-dir")
    if not (folder / "mod_index.json").is_file():
        pytest.skip(f"no reference numbers in {folder}; pass --reference-dir")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
