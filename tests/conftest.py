"""Shared fixtures: the folder of reference numbers and a fixed seed."""

import os
from pathlib import Path

# Before torch is imported: waiting threads sleep instead of spinning, which matters where several workers share cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once why tests that need Detectron2 were skipped; run_tests.sh hands the reason over in the environment."""
    reports = terminalreporter.stats.get("skipped", [])
    count = sum("detectron2" in str(report.longrepr).lower() for report in reports)
    if count:
        reason = os.environ.get("MFUSER_D2_NO_DETECTRON2") or "it is not installed"
        terminalreporter.write_line(
            f"Detectron2 is absent ({reason}): {count} test files or tests that need it were skipped. "
            "To bring it: bash tools/setup_env.sh"
        )
