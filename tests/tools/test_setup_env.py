"""The set-up step: what it pins, when it skips work, why it says Detectron2 is absent, and its scripts."""

import ast
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "tools").glob("*.sh"), ROOT / ".ci" / "run"])


@pytest.fixture
def setup_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with its stamp and log in a temporary folder and every command forbidden."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PREFIX", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(module, "LOG", tmp_path / "log")

    def forbidden(title: str, *_: object, **__: object) -> None:
        raise AssertionError(f"this step ran: {title}")

    monkeypatch.setattr(module, "run_step", forbidden)
    return module


@pytest.fixture
def packaging_data(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The variables of setup.py, with setuptools.setup replaced by a recorder (under "setup")."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    recorded = {}
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: recorded.update(kwargs))
    variables = runpy.run_path(str(ROOT / "setup.py"))
    return {**variables, "setup": recorded}


def test_missing_packages_get_the_tested_version_and_fitting_ones_stay(setup_env: ModuleType) -> None:
    pins = setup_env.constraints(
        ["numpy>=1.26,<3", "timm>=1.0.20,<1.1", "open_clip_torch>=3.0,<4"],
        ["# a comment", "numpy==2.4.6", "timm==1.0.31", "open_clip_torch==3.3.0"],
        {"numpy": "2.1.0", "timm": None, "open-clip-torch": "2.7.0"},
    )
    assert pins == ["numpy==2.1.0", "timm==1.0.31", "open_clip_torch==3.3.0"]


def test_pins_for_other_python_versions_are_left_out(setup_env: ModuleType) -> None:
    lines = ['numpy==2.2.6; python_version < "3.0"', 'numpy==2.4.6; python_version >= "3.0"']
    assert setup_env.constraints(["numpy"], lines, {}) == ["numpy==2.4.6"]


def test_every_tested_version_lies_in_the_range_of_setup_py(setup_env: ModuleType, packaging_data: dict) -> None:
    from packaging.requirements import Requirement

    extras = packaging_data["EXTRAS_REQUIRE"]
    ranges = {r.name.lower(): r.specifier for r in map(Requirement, packaging_data["INSTALL_REQUIRES"] + extras["dev"])}
    lines = [line for line in setup_env.TESTED.read_text(encoding="utf-8").splitlines() if line.split("#")[0].strip()]
    tested = [Requirement(line) for line in lines]
    assert set(ranges) <= {requirement.name.lower() for requirement in tested}
    for requirement in tested:
        version = str(requirement.specifier).removeprefix("==")
        assert ranges.get(requirement.name.lower(), requirement.specifier).contains(version), requirement


def test_detectron2_and_torch_are_declared_the_same_everywhere(setup_env: ModuleType, packaging_data: dict) -> None:
    import mfuser_d2

    source = f"git+{setup_env.DETECTRON2_REPOSITORY}@{setup_env.DETECTRON2_COMMIT}"
    assert packaging_data["DETECTRON2"] == f"detectron2 @ {source}"
    assert source in mfuser_d2.DETECTRON2_COMMAND
    torch_lines = [f"{name}{specifier}" for name, specifier in setup_env.TORCH_RANGES.items()]
    assert packaging_data["INSTALL_REQUIRES"][:2] == torch_lines


# What a distribution is called where its import has another name, and what comes with Detectron2 or with torch.
DISTRIBUTIONS = {"cv2": "opencv-python", "PIL": "pillow", "open_clip": "open_clip_torch", "sklearn": "scikit-learn"}
BROUGHT_ALONG = {
    "detectron2": {"detectron2", "fvcore", "iopath", "pycocotools", "yaml", "packaging", "setuptools"},
    "torch": {"triton"},
    "mamba_ssm": {"selective_scan_cuda"},
    "causal_conv1d": {"causal_conv1d_cuda"},
}


def imported_distributions() -> dict[str, set[str]]:
    """Distribution -> the files of this repository that import it, wherever in the file."""
    own = {"mfuser_d2"} | {path.stem for path in (ROOT / "tools").iterdir()}
    found: dict[str, set[str]] = {}
    for path in [
        path for folder in ("mfuser_d2", "tools", "tests", "datasets") for path in (ROOT / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} - own - set(sys.stdlib_module_names):
                found.setdefault(DISTRIBUTIONS.get(name, name), set()).add(str(path.relative_to(ROOT)))
    return found


def test_setup_py_declares_every_import(packaging_data: dict) -> None:
    from packaging.requirements import Requirement

    lines = packaging_data["INSTALL_REQUIRES"] + [
        r for extra in packaging_data["EXTRAS_REQUIRE"].values() for r in extra
    ]
    declared = {Requirement(line).name.lower() for line in lines}
    declared |= {name for source, names in BROUGHT_ALONG.items() if source in declared for name in names}
    missing = {
        name: sorted(files)[:3] for name, files in imported_distributions().items() if name.lower() not in declared
    }
    assert not missing


def test_setup_py_lists_every_package_folder(packaging_data: dict) -> None:
    folders = {path.parent for path in (ROOT / "mfuser_d2").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == set(packaging_data["setup"]["packages"]), "a folder of the package lacks its __init__.py"


def test_a_ready_environment_needs_no_step(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: object())
    stamp = {"key": setup_env.setup_key(), "no_detectron2": "", "build_failed": False}
    setup_env.STAMP.write_text(json.dumps(stamp))
    assert setup_env.set_up(retry=False) == ""


def test_a_failed_build_is_remembered_until_a_retry(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_env, "detectron2_obstacle", lambda: "asked again")
    stamp = {"no_detectron2": "its build failed", "build_failed": True}
    assert setup_env.bring_detectron2(stamp, retry=False)["no_detectron2"] == "its build failed"
    assert setup_env.bring_detectron2(stamp, retry=True)["no_detectron2"] == "asked again"


def test_a_failing_build_becomes_a_reason(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise setup_env.SetupError("the compiler said no")

    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_env, "detectron2_obstacle", lambda: "")
    monkeypatch.setattr(setup_env, "install_detectron2", fail)
    stamp = setup_env.bring_detectron2({}, retry=False)
    assert stamp["build_failed"] and "its build failed" in stamp["no_detectron2"]


@pytest.mark.parametrize(
    ("present", "reason"), [((), "git is not installed"), (("git",), "no C++ compiler"), (("git", "c++"), "no way to")]
)
def test_obstacles_are_named(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...], reason: str
) -> None:
    for name in present:
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(setup_env.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert setup_env.detectron2_obstacle().startswith(reason)


def test_torch_out_of_range_is_refused_with_a_way_out(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "installed_version", {"torch": "1.13.1", "torchvision": "0.14.1"}.get)
    with pytest.raises(setup_env.SetupError, match=r"torch 1.13.1.*torch==2.11.0"):
        setup_env.install_torch()


def test_a_failing_step_shows_the_end_of_its_output(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("setup_env_fresh", ROOT / "tools" / "setup_env.py")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(fresh, "LOG", setup_env.LOG)
    with pytest.raises(fresh.SetupError, match="no such wheel"):
        fresh.run_step("a step", [sys.executable, "-c", "import sys; sys.exit('no such wheel')"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_an_old_python_is_named_with_a_way_out(tmp_path: Path) -> None:
    for name in ("python3", "python"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "dirname", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name))
    clone = tmp_path / "a clone"
    shutil.copytree(ROOT / "tools", clone / "tools")
    done = subprocess.run(
        ["bash", str(clone / "tools" / "setup_env.sh")],
        env={"PATH": str(tmp_path), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "No Python >= 3.10 found (python3 is Python 3.8.1)" in done.stderr
    assert "PYTHON=" in done.stderr
