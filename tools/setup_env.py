"""Install torch, mfuser_d2, its requirements and Detectron2 into the environment of the running interpreter.

Called by setup_env.sh, which chooses the environment. Needs nothing but the standard library to start. Each step looks
first at what is there, so a second run ends after reading one stamp file. Progress goes to stderr; stdout carries one
line, the reason why Detectron2 is absent, and is empty where Detectron2 is present.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREFIX = Path(sys.prefix)
STAMP = PREFIX / "mfuser_d2_setup.json"
LOG = PREFIX / "mfuser_d2_setup.log"
TESTED = ROOT / "tools" / "tested_versions.txt"
KERNEL_FOLDER = ROOT / "mfuser_d2" / "core" / "ops" / "selective_scan"

DETECTRON2_REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
TORCH_RANGES = {"torch": ">=2.6,<2.14", "torchvision": ">=0.21,<0.29"}
BUILD_TOOLS = ["setuptools>=64,<81", "wheel", "ninja", "packaging"]
EXTRA = "dev"
# What the tools import of Detectron2; its compiled part is only needed where one of these needs it.
DETECTRON2_PROBE = "import detectron2.modeling, detectron2.engine, detectron2.evaluation, detectron2.checkpoint"


class SetupError(Exception):
    """A step failed; the message says which and what to do."""


def say(text: str) -> None:
    print(f"[set-up] {text}", file=sys.stderr, flush=True)


def run_step(title: str, command: list[str], env: dict[str, str] | None = None) -> None:
    """Run one command into the log; SetupError with the end of its output where it fails."""
    say(f"{title} ...")
    start = time.time()
    with LOG.open("ab") as log:
        log.write(f"\n=== {title}: {command}\n".encode())
        log.flush()
        offset = log.tell()
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT
        ).returncode
    if code:
        with LOG.open("rb") as log:
            log.seek(offset)
            tail = log.read().decode(errors="replace").strip().splitlines()[-12:]
        indented = "\n".join(f"    {line}" for line in tail)
        raise SetupError(f"{title} failed (exit status {code}); the end of {LOG}:\n{indented}")
    say(f"{title}: done in {time.time() - start:.0f} s")


def pip_install(title: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *arguments]
    run_step(title, command, env)
    importlib.invalidate_caches()


def python_error(code: str) -> str:
    """Run `code` in a fresh interpreter; "" where it succeeds, else the last line of what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=PREFIX
    )
    if done.returncode == 0:
        return ""
    return (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def setup_key() -> str:
    """Changes when the set-up, the clone's place, the interpreter or the installed torch changes."""
    digest = hashlib.sha256(f"{ROOT}|{sys.version}|{installed_version('torch')}".encode())
    kernel = [*KERNEL_FOLDER.glob("*.cpp"), *KERNEL_FOLDER.glob("*.h"), *KERNEL_FOLDER.glob("build.py")]
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", TESTED, Path(__file__).resolve(), *sorted(kernel)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def in_range(version: str | None, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)


def constraints(requirements: list[str], tested_lines: list[str], installed: dict[str, str | None]) -> list[str]:
    """Pins for pip: what is installed within its range stays, everything else gets the version that was tested.

    Args:
        requirements: requirement strings with ranges, markers already applied.
        tested_lines: the lines of tested_versions.txt.
        installed: canonical name -> installed version, or None where the package is absent.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    ranges = {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, requirements)}
    pins = []
    for line in tested_lines:
        line = line.split("#")[0].strip()
        if not line:
            continue
        tested = Requirement(line)
        name = canonicalize_name(tested.name)
        if tested.marker is not None and not tested.marker.evaluate():
            continue
        present = installed.get(name)
        if in_range(present, ranges.get(name, "")):
            pins.append(f"{tested.name}=={present}")
        else:
            pins.append(f"{tested.name}{tested.specifier}")
    return pins


def package_requirements() -> list[str]:
    """What the installed mfuser_d2 requires, with the development extra, without torch and torchvision."""
    from packaging.requirements import Requirement

    wanted = []
    for line in importlib.metadata.requires("mfuser_d2") or []:
        requirement = Requirement(line)
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if extra and not requirement.marker.evaluate({"extra": EXTRA}):
            continue
        if not extra and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if requirement.name not in TORCH_RANGES:
            wanted.append(f"{requirement.name}{requirement.specifier}")
    return wanted


def write_constraints(requirements: list[str]) -> Path:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = TESTED.read_text(encoding="utf-8").splitlines()
    names = [canonicalize_name(Requirement(line).name) for line in lines if line.split("#")[0].strip()]
    ranges = requirements + [f"{name}{specifier}" for name, specifier in TORCH_RANGES.items()]
    path = PREFIX / "mfuser_d2_constraints.txt"
    pins = constraints(ranges, lines, {name: installed_version(name) for name in names})
    path.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return path


def install_build_tools() -> None:
    if importlib.util.find_spec("pip") is None:
        run_step("pip", [sys.executable, "-m", "ensurepip", "--upgrade"])
    try:
        have = all(installed_version(name) for name in ("wheel", "ninja", "packaging"))
        have = have and in_range(installed_version("setuptools"), ">=64,<81")
    except ImportError:
        have = False
    if not have:
        pip_install("build tools", "-c", str(TESTED), *BUILD_TOOLS)


def install_torch() -> None:
    versions = {name: installed_version(name) for name in TORCH_RANGES}
    wrong = [f"{n} {v}" for n, v in versions.items() if v is not None and not in_range(v, TORCH_RANGES[n])]
    if wrong:
        raise SetupError(
            f"{' and '.join(wrong)} in {PREFIX}: outside the tested range ({TORCH_RANGES}). Deactivate this "
            "environment so that .venv is used, or install torch==2.11.0 torchvision==0.26.0 into it."
        )
    if versions["torch"] is None:
        pip_install("torch and torchvision (the largest download, minutes)", "-c", str(TESTED), *TORCH_RANGES)
    elif versions["torchvision"] is None:
        pip_install("torchvision", f"torch=={versions['torch']}", "torchvision")
    error = python_error("import torch, torchvision")
    if error:
        raise SetupError(
            f"torch {installed_version('torch')} and torchvision {installed_version('torchvision')} do not import: "
            f"{error}. Install a matching pair: {sys.executable} -m pip install torch==2.11.0 torchvision==0.26.0"
        )


def install_package() -> None:
    """mfuser_d2 itself (editable, with its optional C++ kernel), then what it requires."""
    jobs = {**os.environ, "MAX_JOBS": str(compile_jobs())}
    options = ["-v", "--no-build-isolation", "--no-deps"]  # -v: why the kernel was not built goes into the log
    pip_install("mfuser_d2 and its C++ scan kernel", *options, "-e", str(ROOT), env=jobs)
    if not list(KERNEL_FOLDER.glob("_cpu*.so")):
        say(f"the C++ scan kernel was not built (why: {LOG}); the slower PyTorch scan is used, with the same results")
    requirements = package_requirements()
    if not python_error("import cv2; assert (4, 5) <= tuple(map(int, cv2.__version__.split('.')[:2])) < (5, 0)"):
        # Any build of OpenCV will do; two of them in one environment overwrite each other.
        requirements = [line for line in requirements if not line.startswith("opencv")]
    pins = str(write_constraints(requirements))
    pip_install("requirements of mfuser_d2", "-c", pins, *requirements)
    error = python_error("import cv2")
    if "libGL" in error or "libgthread" in error or "libglib" in error:
        say(f"OpenCV lacks a system library ({error}); taking its build without windows instead")
        run_step("opencv-python out", [sys.executable, "-m", "pip", "uninstall", "-y", "opencv-python"])
        pip_install("opencv-python-headless", "-c", pins, "opencv-python-headless")


def compile_jobs() -> int:
    """Parallel compiler processes: one per core, but at least 2 GiB of memory each."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 4 << 30
    return max(1, min(os.cpu_count() or 1, memory >> 31))


def detectron2_obstacle() -> str:
    """Why Detectron2 cannot even be tried here, or "": no git, no compiler, no route to its repository."""
    if shutil.which("git") is None:
        return "git is not installed"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None and shutil.which("g++") is None:
        return f"no C++ compiler ({compiler})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "no Python headers (Python.h; on Debian and Ubuntu: python3-dev)"
    try:
        subprocess.run(
            ["git", "ls-remote", DETECTRON2_REPOSITORY, "HEAD"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=True,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError):
        return f"no way to its repository {DETECTRON2_REPOSITORY}"
    return ""


def install_detectron2() -> None:
    """Build the pinned Detectron2 against the installed torch; SetupError where the build fails."""
    source = f"detectron2 @ git+{DETECTRON2_REPOSITORY}@{DETECTRON2_COMMIT}"
    pins = str(write_constraints(package_requirements()))
    # pip would reuse a wheel that it once built from this commit, against whatever torch was there then.
    arguments = ["--no-build-isolation", "--no-cache-dir", "-c", pins, source]
    if installed_version("detectron2"):  # there, but it does not import: most often built against another torch
        arguments = ["--force-reinstall", "--no-deps", *arguments]
    env = {**os.environ, "MAX_JOBS": str(compile_jobs()), "GIT_TERMINAL_PROMPT": "0"}
    try:
        pip_install("Detectron2, built against this torch (minutes)", *arguments, env=env)
    except SetupError as error:
        if shutil.which("nvidia-smi") is None:
            raise
        # A CUDA toolkit that does not match torch ends the build; nothing here needs Detectron2's CUDA operators.
        say(f"{error}\n[set-up] trying again without Detectron2's CUDA operators")
        env.update(CUDA_VISIBLE_DEVICES="", FORCE_CUDA="0")
        pip_install("Detectron2 without CUDA operators", *arguments, env=env)


def bring_detectron2(stamp: dict, retry: bool) -> dict:
    """The stamp's two fields on Detectron2: why it is absent ("" where present) and whether its build failed."""
    present = {"no_detectron2": "", "build_failed": False}
    if importlib.util.find_spec("detectron2") is not None and not python_error(DETECTRON2_PROBE):
        return present
    if stamp.get("build_failed") and not retry:
        return {"no_detectron2": stamp["no_detectron2"], "build_failed": True}
    obstacle = detectron2_obstacle()
    if obstacle:
        return {"no_detectron2": obstacle, "build_failed": False}
    try:
        install_detectron2()
    except SetupError as error:
        say(str(error))
        return {"no_detectron2": f"its build failed, see {LOG}", "build_failed": True}
    error = python_error(DETECTRON2_PROBE)
    return {"no_detectron2": f"it does not import: {error}", "build_failed": True} if error else present


def set_up(retry: bool) -> str:
    """Do what is left to do; the reason why Detectron2 is absent, or ""."""
    stamp = read_stamp()
    is_ready = stamp.get("key") == setup_key() and importlib.util.find_spec("mfuser_d2") is not None
    if is_ready and not stamp["no_detectron2"] and importlib.util.find_spec("detectron2") is not None:
        return ""
    if not is_ready:
        install_build_tools()
        install_torch()
        install_package()
        stamp = {}
    stamp = {**bring_detectron2(stamp, retry), "key": setup_key()}
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")
    return stamp["no_detectron2"]


@contextlib.contextmanager
def one_at_a_time():
    """Hold a lock file of the environment, so that two scripts started together do not install at once."""
    import fcntl

    with (PREFIX / "mfuser_d2_setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this environment is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--retry", action="store_true", help="build Detectron2 again where its build failed before")
    options = parser.parse_args()
    if sys.prefix == sys.base_prefix and not (PREFIX / "conda-meta").is_dir():
        print("Run `bash tools/setup_env.sh`: it chooses the virtual environment.", file=sys.stderr)
        return 1
    try:
        with one_at_a_time():
            print(set_up(options.retry))
    except SetupError as error:
        print(f"{error}\nMend this and run the same command again; what is done stays done.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
