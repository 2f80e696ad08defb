"""What all preparation programs share: one run at a time, whole files or none, all cores, a verdict at the end.

A program is a function (root, report) -> None handed to `run_program`. It maps work over processes with `Report.map`,
writes with `write_atomically` and notes what is wrong with `Report.problem`; the exit code follows.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from mfuser_d2.data.reading import calm_opencv

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_PROBLEMS, EXIT_LOCKED, EXIT_INTERRUPTED = 0, 1, 3, 130
"""2 is argparse's."""

LOCK_NAME = ".prepare.lock"
_PART = ".part"
_SHOWN = 20

Item = TypeVar("Item")
Result = TypeVar("Result")


class LockedError(RuntimeError):
    """Another preparation works on the same folder."""


class Report:
    """Progress and findings of one run.

    Args:
        jobs: processes; 0 means one for each core.
        is_strict: an incomplete data set is a problem.
    """

    def __init__(self, *, jobs: int = 0, is_strict: bool = False) -> None:
        self.jobs = jobs or len(os.sched_getaffinity(0))
        self.is_strict = is_strict
        self.problems: list[str] = []

    def note(self, message: str) -> None:
        logger.info(message)

    def problem(self, message: str) -> None:
        """Note something that makes the data set unfit; the run goes on, its exit code will not be zero."""
        self.problems.append(message)
        if len(self.problems) <= _SHOWN:
            logger.error(message)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], what: str) -> Iterator[Result]:
        """Results of `function` in order, with a progress bar. An OSError or ValueError of one item is raised here."""
        with tqdm(total=len(items), desc=what, unit="file", disable=None, leave=False) as bar:
            if self.jobs == 1 or len(items) < 2:
                for item in items:
                    yield function(item)
                    bar.update()
                return
            method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
            context = multiprocessing.get_context(method)
            calm_opencv()
            pool = ProcessPoolExecutor(self.jobs, mp_context=context, initializer=_start_worker)
            try:
                chunk = max(1, min(16, len(items) // (8 * self.jobs)))
                for result in pool.map(function, items, chunksize=chunk):
                    yield result
                    bar.update()
            except BrokenProcessPool as error:
                raise RuntimeError(f"a worker died while {what}; out of memory? Try again with --jobs 1") from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all preparation programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the data set below $DETECTRON2_DATASETS")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: all cores)")
    parser.add_argument("--strict", action="store_true", help="fail when the data set is not complete")
    return parser


def run_program(
    name: str, root: Path, work: Callable[[Path, Report], None], *, jobs: int = 0, is_strict: bool = False
) -> int:
    """Run one preparation and say how it went.

    Args:
        name: the data set, for messages.
        root: its folder; created when missing.
        work: does everything; exceptions of the kinds ValueError, OSError and RuntimeError become messages.
        jobs: processes; 0 means all cores.
        is_strict: an incomplete data set is a problem.
    Returns:
        the exit code: 0 good, 1 something is wrong, 3 another run holds the folder, 130 interrupted.
    """
    _log_to_stderr()
    report = Report(jobs=jobs, is_strict=is_strict)
    try:
        with locked(root):
            remove_parts(root)
            work(root, report)
    except LockedError as error:
        logger.error("%s", error)
        return EXIT_LOCKED
    except KeyboardInterrupt:
        logger.error("%s: interrupted; what is done is kept, the same command goes on from here", name)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        logger.error("%s: %s", name, error)
        return EXIT_PROBLEMS
    if report.problems:
        more = len(report.problems) - _SHOWN
        logger.error("%s: %d problems%s", name, len(report.problems), f" ({more} not shown)" if more > 0 else "")
        return EXIT_PROBLEMS
    logger.info("%s: ready in %s", name, root)
    return EXIT_OK


def _log_to_stderr() -> None:
    package = logging.getLogger("mfuser_d2")
    package.setLevel(logging.INFO)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the folder for this process.

    Raises:
        LockedError: another run holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / LOCK_NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise LockedError(f"another preparation is running in {root}; wait for it to end") from None
        try:
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:
            pass  # the previous holder removed it between our open and our lock
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def remove_parts(root: Path) -> None:
    """Delete what a killed run left half-written."""
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(_PART):
                (Path(folder) / name).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent.

    Raises:
        OSError: for instance a full disk; names the file, and nothing of it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        with open(part, "wb") as stream:
            stream.write(content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write it ({error.strerror}); free some space or check the rights",
                      str(path)) from error  # fmt: skip
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def encode_png(array: np.ndarray, level: int = 3) -> bytes:
    """PNG bytes of (H, W) or (H, W, 3) RGB uint8."""
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    is_done, buffer = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, level])
    if not is_done:
        raise ValueError(f"cannot encode an array of {array.shape} {array.dtype} as PNG")
    return buffer.tobytes()


def write_record(root: Path, name: str, record: dict[str, Any]) -> None:
    """Write what was prepared, as prepared_<name>.json."""
    text = json.dumps(record, indent=2, sort_keys=True)
    write_atomically(root / f"prepared_{name}.json", (text + "\n").encode())


def read_record(root: Path, name: str) -> dict[str, Any]:
    """What an earlier run wrote, or {}."""
    try:
        return json.loads((root / f"prepared_{name}.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def is_current(target: Path, sources: Iterable[Path]) -> bool:
    """Whether a target exists and is no older than its sources."""
    try:
        made = target.stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return all(made >= source.stat().st_mtime_ns for source in sources)
