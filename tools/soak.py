#!/usr/bin/env python
"""Kill a short quickstart training again and again, and compare what it ends with to a training that was left alone.

    python tools/soak.py [--kills 20] [--signal KILL|TERM] [--output output/soak] [--seed 0] [KEY VALUE ...]

The moments are drawn at random from four kinds: while it starts, anywhere in training, while a checkpoint is being
written, and during an evaluation. After each kill everything that the run had announced as saved is looked for and
read; at the end weights, average, optimizer, metrics.json and results are compared bit by bit. The exit code is 0 if
nothing was lost and everything is equal. It draws its own small pictures; a CPU is enough.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from train_net import main as train_main  # noqa: E402

from mfuser_d2.core.checkpoint_file import read_checkpoint  # noqa: E402
from mfuser_d2.d2 import load_config  # noqa: E402
from mfuser_d2.data.prepare import Report  # noqa: E402
from mfuser_d2.data.reading import calm_opencv  # noqa: E402
from mfuser_d2.data.streets.writer import write_streets  # noqa: E402

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml"
SHORT = [
    "SOLVER.MAX_ITER", "48", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.LOG_PERIOD", "4",
    "SOLVER.EMA_DECAY", "0.9", "SOLVER.WARMUP_ITERS", "5", "TEST.EVAL_PERIOD", "16", "DATALOADER.NUM_WORKERS", "1",
    "INPUT.CROP.SIZE", "[64,64]", "MODEL.MFUSER.IMAGE_SIZE", "[64,64]", "MODEL.MFUSER.INFERENCE.CROP_SIZE", "[64,64]",
    "MODEL.MFUSER.INFERENCE.STRIDE", "[64,64]", "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS", "128",
    "DATALOADER.MFUSER.RCS_MIN_PIXELS", "20", "TEST.MFUSER.CONFUSION_PICTURE", "False",
    "DATASETS.TEST", "('streets_sem_seg_val', 'streets_fog_sem_seg_val')",
]  # fmt: skip
MOMENTS = {"starting": 2, "anywhere": 5, "writing": 3, "evaluating": 1}
CLOCKS = {"time", "data_time"}  # what no two runs share
LIMIT = 900  # seconds
_SAVED = re.compile(r"Saved checkpoint \S*?model_(\d+)\.pth")


class Run:
    """One training process group, forked from here so that the libraries are loaded already.

    Args:
        folder: OUTPUT_DIR.
        log: gets what the process writes.
        opts: KEY VALUE pairs.
    """

    def __init__(self, folder: Path, log: Path, opts: list[str]) -> None:
        self.folder, self.log = folder, log
        self.begin = log.stat().st_size if log.exists() else 0
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._train(opts)
        self.code: int | None = None

    def _train(self, opts: list[str]) -> None:
        code = 1
        try:
            os.setsid()
            faulthandler.register(signal.SIGUSR1, all_threads=True)
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            cfg = load_config(str(CONFIG), [*SHORT, *opts, "OUTPUT_DIR", str(self.folder)])
            train_main(cfg, argparse.Namespace(eval_only=False, resume=True))
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            os._exit(code)

    def text(self) -> str:
        """What this process has written so far."""
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as file:
            file.seek(self.begin)
            return file.read().decode(errors="replace")

    def is_over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        """The exit code, after at most LIMIT seconds."""
        end = time.monotonic() + LIMIT
        while not self.is_over():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGUSR1)  # where it hangs goes into its log
                time.sleep(2)
                os.killpg(self.pid, signal.SIGKILL)
                sys.exit(f"error: a training hangs for {LIMIT} s; the end of {self.log} says where")
            time.sleep(0.02)
        return self.code

    def kill(self, number: int) -> int:
        """Send a signal to the whole group, and wait for its end."""
        if not self.is_over():
            os.killpg(self.pid, number)
        return self.wait()

    def is_writing(self) -> bool:
        return any(name.endswith(".tmp") for name in os.listdir(self.folder)) if self.folder.exists() else False

    def is_evaluating(self) -> bool:
        """Whether images are being predicted: Detectron2 says when it begins with a data set and when it is through."""
        text = self.text()
        return text.count("Start inference") > text.count("Total inference time")


def wait_for(run: Run, moment: str, rng: random.Random, seconds: float) -> str:
    """Return at a moment of that kind.

    Args:
        run: just started.
        moment: a key of MOMENTS.
        rng: draws the moment.
        seconds: what a whole training takes.
    Returns:
        The kind that was met: "anywhere" where the wanted one did not come in time, "" where the run ended first.
    """
    if moment == "starting":
        return moment if _sleep(run, rng.uniform(0, 1.5)) else ""
    while "Training from iteration" not in run.text():
        if not _sleep(run, 0.02):
            return ""
    if not _sleep(run, rng.uniform(0, 0.4 * seconds)):
        return ""
    end = time.monotonic() + 0.4 * seconds
    while moment != "anywhere" and time.monotonic() < end and not run.is_over():
        if run.is_writing() if moment == "writing" else run.is_evaluating():
            return moment
        time.sleep(0.0005 if moment == "writing" else 0.02)
    return "" if run.is_over() else "anywhere"


def _sleep(run: Run, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if run.is_over():
            return False
        time.sleep(min(0.02, max(end - time.monotonic(), 0)))
    return not run.is_over()


def announced(text: str) -> int:
    """The newest iteration that a run has said it saved, -1 for none."""
    return max((int(number) for number in _SAVED.findall(text)), default=-1)


def saved(folder: Path) -> int:
    """The iteration that a run would go on from, by the file that `last_checkpoint` names; -1 for none."""
    mark = folder / "last_checkpoint"
    return read_checkpoint(folder / mark.read_text())["iteration"] if mark.exists() else -1


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.json without the clocks."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inference" / "results.json").read_text())["results"]


def differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    """Where two checkpoints are not the same bits; the clocks among the recent numbers do not count."""
    if path.rsplit("/", 1)[-1] in CLOCKS:
        return
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.dtype != right.dtype or not torch.equal(left, right):
            yield path
    elif isinstance(left, dict) and isinstance(right, dict) and list(left) == list(right):
        for key in left:
            yield from differences(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        for index, (a, b) in enumerate(zip(left, right)):
            yield from differences(a, b, f"{path}/{index}")
    elif left != right:
        yield path


def soak(args: argparse.Namespace) -> bool:
    """Whether nothing was lost and everything is equal."""
    calm_opencv()  # a forked child cannot use the threads of its parent
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    sets = args.output / "datasets"
    os.environ["DETECTRON2_DATASETS"] = str(sets)
    write_streets(sets / "streets", report=Report(jobs=1), num_train=4, num_val=1, size=(64, 72))
    whole, killed = args.output / "whole", args.output / "killed"
    start = time.monotonic()
    run = Run(whole, args.output / "whole.log", args.opts)
    if run.wait() != 0:
        sys.exit(f"error: the training that was left alone failed with {run.code}; see {run.log}")
    seconds = time.monotonic() - start
    print(f"A training that is left alone takes {seconds:.1f} s.", flush=True)

    rng = random.Random(args.seed)
    number = getattr(signal, f"SIG{args.signal}")
    losses, kills, ends = 0, 0, []
    known = -1
    while kills < args.kills:
        moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        begin = time.monotonic()
        run = Run(killed, args.output / "killed.log", args.opts)
        moment = wait_for(run, moment, rng, seconds)
        if not moment:
            ends.append(report_end(whole, killed, run))
            shutil.rmtree(killed)  # the next kills hit a new training
            known = -1
            continue
        code = run.kill(number)
        kills += 1
        known = max(known, announced(run.text()))
        try:
            found = saved(killed)
        except (ValueError, OSError) as error:
            found, code = -2, f"{code}: {error}"
        # By SIGTERM it ends as any process before training begins, and by itself where that came too late.
        is_lost = found < known or code not in (-number, 128 + number, 0)
        losses += is_lost
        print(
            f"kill {kills:2d}  {moment:10s} after {time.monotonic() - begin:5.1f} s  exit {code}  announced {known:3d}"
            f"  goes on from {found + 1:3d}  {'LOST' if is_lost else 'ok'}",
            flush=True,
        )
        known = found
    run = Run(killed, args.output / "killed.log", args.opts)
    run.wait()
    ends.append(report_end(whole, killed, run))
    print(f"{kills} kills by SIG{args.signal}; losses found: {losses}; {sum(ends)} of {len(ends)} trainings end equal")
    return not losses and all(ends)


def report_end(whole: Path, killed: Path, run: Run) -> bool:
    """Compare a training that came to its end with the one that was left alone."""
    if run.code != 0:
        sys.exit(f"error: the training failed by itself with {run.code}; see {run.log}")
    checks = {
        "weights, average, optimizer, schedule, recent numbers": list(
            differences(*(read_checkpoint(folder / "model_final.pth") for folder in (whole, killed)))
        ),
        "averaged weights": list(
            differences(*(read_checkpoint(folder / "model_final_ema.pth") for folder in (whole, killed)))
        ),
        "rows of metrics.json": list(differences(rows(whole), rows(killed), "rows")),
        "results": list(differences(results(whole), results(killed))),
        "no files left over": [path.name for path in killed.glob(".*.tmp")],
    }
    said = "; ".join(f"{name}: DIFFER in {len(odd)}: {odd[:5]}" for name, odd in checks.items() if odd)
    print(f"at its end: {said or ', '.join(checks) + ': equal'}", flush=True)
    return not said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("output/soak"), help="a new folder for both trainings")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"error: {args.output} is not empty; give a new folder with --output")
    args.output = args.output.absolute()
    sys.exit(0 if soak(args) else 1)


if __name__ == "__main__":
    main()
