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
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from mfuser_d2.data.reading import calm_opencv

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_PROBLEMS, EXIT_LOCKED, EXIT_INTERRUPTED = 0, 1, 3, 130
"""2 is argparse's."""

LOCK_NAME = ".prepare.lock"
_PART = re.compile(r"\..+\.\d+\.part")  # as `write_atomically` names them; nobody else's unfinished download
_SHOWN = 20
_PARENT_CHECK = 0.2  # seconds

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
        self.num_before = 0
        """How many problems concern earlier parts of the data set; see `num_new`."""

    @property
    def num_new(self) -> int:
        """How many problems the part of the data set at hand has."""
        return len(self.problems) - self.num_before

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
            pool = ProcessPoolExecutor(
                self.jobs, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
            )
            try:
                chunk = max(1, min(16, len(items) // (8 * self.jobs)))
                for result in pool.map(function, items, chunksize=chunk):
                    yield result
                    bar.update()
            except BrokenProcessPool as error:
                raise RuntimeError(f"a worker died while {what}; out of memory? Try again with --jobs 1") from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool ends its workers with it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed: it would wait for ever, and hold the folder's lock."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK)
    os._exit(1)


def _number_of_jobs(text: str) -> int:
    jobs = int(text)
    if jobs < 0:
        raise argparse.ArgumentTypeError(f"{jobs} processes cannot work; 0 takes one for each core")
    return jobs


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all preparation programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the data set below $DETECTRON2_DATASETS")
    parser.add_argument("--jobs", type=_number_of_jobs, default=0, help="processes (default: all cores)")
    parser.add_argument("--strict", action="store_true", help="fail when the data set is not complete")
    return parser


def run_program(
    name: str,
    root: Path,
    work: Callable[[Path, Report], None],
    *,
    jobs: int = 0,
    is_strict: bool = False,
    is_created: bool = False,
) -> int:
    """Run one preparation and say how it went.

    Args:
        name: the data set, for messages.
        root: its folder.
        work: does everything; exceptions of the kinds ValueError, OSError and RuntimeError become messages.
        jobs: processes; 0 means all cores.
        is_strict: an incomplete data set is a problem.
        is_created: a missing folder is created, where nothing of a publisher's has to lie in it.
    Returns:
        the exit code: 0 good, 1 something is wrong, 3 another run holds the folder, 130 interrupted (by Ctrl-C, SIGTERM
        or SIGHUP).
    """
    _log_to_stderr()
    report = Report(jobs=jobs, is_strict=is_strict)
    try:
        if is_created:
            root.mkdir(parents=True, exist_ok=True)
        if not root.is_dir():
            raise ValueError(f"{root} is no folder; give the one that holds the publisher's files")
        with _interruptible(), locked(root):
            remove_parts(root)
            try:
                work(root, report)
            except BaseException:
                remove_parts(root)  # of workers that were ended, too
                raise
            _list_problems(root / f"problems_{name}.txt", report.problems)
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
        logger.error("%s: %d problems, listed in %s", name, len(report.problems), root / f"problems_{name}.txt")
        return EXIT_PROBLEMS
    logger.info("%s: ready in %s", name, root)
    return EXIT_OK


def _list_problems(path: Path, problems: Sequence[str]) -> None:
    """Keep all problems, of which only the first are shown, or remove the list of an earlier run."""
    if problems:
        write_atomically(path, ("\n".join(problems) + "\n").encode())
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let what a scheduler or a closed terminal sends end the work as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]  # nohup ignores one
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


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
            if _PART.fullmatch(name):
                (Path(folder) / name).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent.

    Raises:
        OSError: for instance a full disk; names the file, and nothing of it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
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
    """Whether a target exists and was made after its sources came to lie where they are.

    Unpacking gives files their age in the archive; the time of their last change of state tells when that was.
    """
    try:
        made = target.stat().st_mtime_ns
    except FileNotFoundError:
        return False
    states = [source.stat() for source in sources]
    return all(made >= max(state.st_mtime_ns, state.st_ctime_ns) for state in states)
