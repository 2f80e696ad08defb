"""One run at a time, whole files or none, and exit codes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mfuser_d2.data import prepare
from mfuser_d2.data.prepare import (
    EXIT_INTERRUPTED,
    EXIT_LOCKED,
    EXIT_OK,
    EXIT_PROBLEMS,
    LockedError,
    Report,
    locked,
    run_program,
    write_atomically,
)


def double(value: int) -> int:
    return 2 * value


def fail_at_three(value: int) -> int:
    if value == 3:
        raise ValueError("three is wrong")
    return value


@pytest.mark.parametrize("jobs", [1, 2])
def test_map_keeps_the_order(jobs: int) -> None:
    assert list(Report(jobs=jobs).map(double, list(range(20)), "doubling")) == list(range(0, 40, 2))


@pytest.mark.parametrize("jobs", [1, 2])
def test_map_raises_what_a_worker_raises(jobs: int) -> None:
    with pytest.raises(ValueError, match="three is wrong"):
        list(Report(jobs=jobs).map(fail_at_three, list(range(20)), "failing"))


def test_exit_codes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def interrupt(root: Path, report: Report) -> None:
        raise KeyboardInterrupt

    def fail(root: Path, report: Report) -> None:
        raise ValueError("the reason")

    assert run_program("x", tmp_path, lambda root, report: None) == EXIT_OK
    assert run_program("x", tmp_path, lambda root, report: report.problem("bad.png")) == EXIT_PROBLEMS
    assert run_program("x", tmp_path, fail) == EXIT_PROBLEMS
    assert run_program("x", tmp_path, interrupt) == EXIT_INTERRUPTED
    assert "bad.png" in caplog.text and "the reason" in caplog.text
    assert not (tmp_path / prepare.LOCK_NAME).exists()


def test_two_runs_at_once(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert run_program("x", tmp_path, lambda root, report: None) == EXIT_LOCKED
        with pytest.raises(LockedError, match="another preparation is running"), locked(tmp_path):
            pass
    assert run_program("x", tmp_path, lambda root, report: None) == EXIT_OK


def test_lock_of_a_killed_run_does_not_block(tmp_path: Path) -> None:
    (tmp_path / prepare.LOCK_NAME).touch()
    assert run_program("x", tmp_path, lambda root, report: None) == EXIT_OK


def test_written_file_is_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a/b.bin", b"content")
    assert (tmp_path / "a/b.bin").read_bytes() == b"content"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_full_disk_leaves_nothing_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare.os, "replace", full)
    code = run_program("x", tmp_path, lambda root, report: write_atomically(root / "label.png", b"content"))
    assert code == EXIT_PROBLEMS
    assert "label.png" in caplog.text and "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open
    monkeypatch.setattr("builtins.open", lambda path, mode: real_open("/dev/full", mode))
    with pytest.raises(OSError, match="No space left.*label.png|label.png.*No space left"):
        write_atomically(tmp_path / "label.png", bytes(100_000))


def test_unfinished_files_of_others_stay(tmp_path: Path) -> None:
    download = tmp_path / ".archive.zip.part"
    download.write_bytes(b"half")
    run_program("x", tmp_path, lambda root, report: None)
    assert download.exists()


def test_missing_folder_is_named_and_not_created(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "typo"
    assert run_program("x", root, lambda root, report: None) == EXIT_PROBLEMS
    assert f"{root} is no folder" in caplog.text and not root.exists()


def test_all_problems_are_listed_until_they_are_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{index}.png is bad" for index in range(30)]
    assert run_program("x", tmp_path, lambda root, report: [report.problem(name) for name in names]) == EXIT_PROBLEMS
    assert (tmp_path / "problems_x.txt").read_text().splitlines() == names
    assert "30 problems, listed in" in caplog.text
    assert run_program("x", tmp_path, lambda root, report: None) == EXIT_OK
    assert not (tmp_path / "problems_x.txt").exists()


def test_half_written_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    part = tmp_path / "labels" / ".a.png.1234.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    run_program("x", tmp_path, lambda root, report: None)
    assert not part.exists()


def start_drawing(root: Path) -> tuple[list[str], subprocess.Popen]:
    """A command with two workers, and a run of it that has written its first picture."""
    program = Path(__file__).resolve().parents[2] / "datasets" / "prepare_streets.py"
    command = [sys.executable, str(program), str(root), "--jobs", "2", "--num-train", "60", "--num-val", "1",
               "--size", "64", "96"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_listen_to_signals)
    deadline = time.monotonic() + 120
    while not list(root.glob("images/train/*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return command, process


def _listen_to_signals() -> None:
    """Undo what a background job of a shell, or nohup, passes on to its children."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_workers_end_with_a_killed_run_and_let_go_of_the_folder(tmp_path: Path) -> None:
    command, process = start_drawing(tmp_path)
    process.kill()
    process.communicate(timeout=30)  # ends when the last worker has closed its end of the pipe
    assert process.returncode == -signal.SIGKILL
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == EXIT_OK
    assert len(list(tmp_path.glob("images/train/*.png"))) == 60
    assert not list(tmp_path.rglob(".*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_stops_cleanly_and_the_next_run_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    command, process = start_drawing(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, said
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/train/*.png")}
    assert 0 < len(done) < 60
    assert not list(tmp_path.rglob(".*.part")) and not (tmp_path / prepare.LOCK_NAME).exists()
    for path in done:
        assert np.fromfile(path, np.uint8)[-8:-4].tobytes() == b"IEND"
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == EXIT_OK
    assert len(list(tmp_path.glob("images/train/*.png"))) == 60
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in done.items())
