"""What ends a run from outside: signals, data that vanish, a full disk, short memory, numbers that go wrong."""

import argparse
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402

from mfuser_d2.core.checkpoint_file import read_checkpoint  # noqa: E402
from mfuser_d2.d2.bad_step import repeat_step  # noqa: E402
from mfuser_d2.d2.run import RunError, repeat_exactly, set_up_run  # noqa: E402
from mfuser_d2.d2.stopping import Stopped  # noqa: E402
from mfuser_d2.d2.train_step import DataError  # noqa: E402
from mfuser_d2.data.prepare import Report  # noqa: E402
from mfuser_d2.data.streets.writer import write_streets  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def trainer(toy_cfg, toy_trainer_class):
    """Makes a trainer of the toy run, without evaluation unless a period is given."""

    def make(*, resume: bool = True, evaluates: bool = False, **solver):
        if not evaluates:
            toy_cfg.DATASETS.TEST = ()
        for key, value in solver.items():
            toy_cfg.SOLVER[key] = value
        made = toy_trainer_class(toy_cfg)
        made.resume_or_load(resume=resume)
        return made

    return make


def during_step(trainer, number: int, action) -> None:
    """Do something in the middle of a step: after the forward pass."""

    def hook(module, inputs, output) -> None:
        if trainer.iter == number:
            action()

    trainer.model.register_forward_hook(hook)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_ends_after_the_step_saves_and_says_where(trainer, toy_cfg, number: int, caplog):
    whole = trainer(MAX_ITER=9, CHECKPOINT_PERIOD=100)
    whole.train()
    toy_cfg.OUTPUT_DIR += "_stopped"
    before = signal.getsignal(number)
    run = trainer()
    during_step(run, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as stopped:
        run.train()
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    path = Path(toy_cfg.OUTPUT_DIR) / "model_0000004.pth"
    assert f"Ended by {number.name} after iteration 4; {path} has everything. Start again with --resume" in caplog.text
    again = trainer()
    assert again.start_iter == 5
    again.train()
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.model.state_dict().items())


def test_signal_in_an_evaluation_ends_at_once_and_the_evaluation_is_made_up_for(trainer, toy_cfg, capfd):
    toy_cfg.TEST.EVAL_PERIOD = 5
    run = trainer(evaluates=True, CHECKPOINT_PERIOD=100)
    test = type(run).test

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return test(*args, **kwargs)

    run.test = interrupted
    begin = time.monotonic()
    with pytest.raises(Stopped):
        run.train()
    assert time.monotonic() - begin < 5
    assert "SIGTERM: ending; the checkpoint before this evaluation holds everything" in capfd.readouterr().err
    again = trainer(evaluates=True)
    assert again.start_iter == 5
    again.train()
    lines = [json.loads(line) for line in (Path(toy_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "mean/mIoU" in line] == [4, 8]


def test_second_signal_after_a_while_ends_without_saving(trainer, toy_cfg, monkeypatch: pytest.MonkeyPatch):
    run = trainer()
    clock = iter([10.0, 11.0, 13.5])  # one, its echo from a parent process, and another one

    def thrice() -> None:
        monkeypatch.setattr("mfuser_d2.d2.stopping.time.monotonic", lambda: next(clock))
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)

    during_step(run, 1, thrice)
    with pytest.raises(Stopped):
        run.train()
    assert not list(Path(toy_cfg.OUTPUT_DIR).glob("*.pth")) and next(clock, None) is None


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    write_streets(root / "streets", report=Report(jobs=1), num_train=3, num_val=1, size=(64, 72))
    return root


PROGRAM = [
    sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume", "--config-file",
    str(ROOT / "configs" / "quickstart" / "mfuser_tiny_clip.yaml"),
    "SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000", "SOLVER.LOG_PERIOD", "1",
    "SOLVER.IMS_PER_BATCH", "1", "INPUT.CROP.SIZE", "[64,64]", "MODEL.MFUSER.IMAGE_SIZE", "[64,64]",
    "MODEL.MFUSER.INFERENCE.CROP_SIZE", "[64,64]", "MODEL.MFUSER.INFERENCE.STRIDE", "[64,64]",
    "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS", "64", "DATALOADER.MFUSER.RCS_MIN_PIXELS", "20", "DATASETS.TEST", "()",
    "DATALOADER.NUM_WORKERS", "1",
]  # fmt: skip


def running(output: Path, data_root: Path) -> subprocess.Popen:
    """The program, in a process group of its own, after its first steps."""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data_root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*PROGRAM, "OUTPUT_DIR", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (output / "metrics.json").exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end, "it takes too long to begin"
        time.sleep(0.05)
    return process


def test_ctrl_c_reaches_the_worker_as_well_and_the_run_still_saves(data_root: Path, tmp_path: Path):
    process = running(tmp_path, data_root)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)  # a shell's and a scheduler's
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 130, text[-3000:]
    assert "has everything" in text and "Traceback" not in text
    rows = (tmp_path / "metrics.json").read_text().splitlines()
    saved = tmp_path / (tmp_path / "last_checkpoint").read_text()
    assert read_checkpoint(saved)["iteration"] == json.loads(rows[-1])["iteration"] == len(rows) - 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the worker by /proc")
def test_killed_worker_ends_the_run_with_its_reason_after_saving(data_root: Path, tmp_path: Path):
    process = running(tmp_path, data_root)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" not in text, text[-3000:]
    # Which of torch's two sentences comes depends on whether its signal handler or its poll sees the death first.
    assert "is killed by signal: Killed" in text or "exited unexpectedly" in text, text[-3000:]
    assert "lower DATALOADER.NUM_WORKERS" in text


def test_data_set_that_vanishes_is_named_and_nothing_trained_is_lost(trainer, toy_cfg):
    run = trainer(CHECKPOINT_PERIOD=100)
    batches = run._trainer.data_loader

    class Vanishing:
        def __iter__(self):
            for step, items in enumerate(batches):
                if step == 5:
                    raise FileNotFoundError("Caught it in a worker.\nTraceback\nimage /sets/a.png cannot be opened")
                yield items

    run._trainer.data_loader = Vanishing()
    with pytest.raises(DataError, match="iteration 5 could not be read: image /sets/a.png .* bring the data set back"):
        run.train()
    assert trainer().start_iter == 5


def test_worker_killed_in_the_last_evaluation_says_where_everything_is(trainer, toy_cfg):
    run = trainer(evaluates=True, MAX_ITER=4)
    reason = "DataLoader worker (pid 7) is killed by signal: Killed."

    class Killed(list):
        def __iter__(self):
            raise RuntimeError(reason)

    type(run).build_test_loader = classmethod(lambda cls, cfg, name: Killed())
    with pytest.raises(RunError, match="of toy_sem_seg_val could not be read: .*Killed.*lower DATALOADER.*model_final"):
        run.train()


@pytest.mark.parametrize("period", [0, 2])
def test_image_lost_before_an_evaluation_says_where_everything_is(trainer, toy_cfg, period: int):
    """In an evaluation between steps nothing may be saved again: it would be as of the step before."""
    toy_cfg.TEST.EVAL_PERIOD = period
    run = trainer(evaluates=True, MAX_ITER=4)

    class Lost(list):
        def __iter__(self):
            raise ValueError("image /sets/a.png is truncated")

    type(run).build_test_loader = classmethod(lambda cls, cfg, name: Lost())
    last = "model_0000001.pth" if period else "model_final.pth"
    with pytest.raises(RunError, match=f"a.png is truncated.*Everything trained is in .*{last}"):
        run.train()
    assert (Path(toy_cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == last


def test_full_disk_under_the_metrics_says_what_to_do(trainer, toy_cfg, monkeypatch: pytest.MonkeyPatch):
    run = trainer(MAX_ITER=8, CHECKPOINT_PERIOD=3)

    def full(self) -> None:
        if run.iter > 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("mfuser_d2.d2.metrics.MetricsFile.write", full)
    with pytest.raises(RunError, match="iteration 5: .*No space left on device.*Free space or change OUTPUT_DIR"):
        run.train()
    assert trainer().start_iter == 3


def test_training_outlives_its_tensorboard_files(trainer, toy_cfg, monkeypatch: pytest.MonkeyPatch, caplog):
    def full(self) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("detectron2.utils.events.TensorboardXWriter.write", full)
    monkeypatch.setattr("detectron2.utils.events.TensorboardXWriter.close", full)
    trainer(MAX_ITER=8).train()
    assert caplog.text.count("No more TensorBoard files are written") == 1
    assert (Path(toy_cfg.OUTPUT_DIR) / "model_final.pth").exists()


def test_full_disk_from_the_beginning_is_said_in_one_line_and_log_lines_are_lost_quietly(
    toy_cfg, monkeypatch: pytest.MonkeyPatch, capfd
):
    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "mfuser_d2", "mfuser_d2.record")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    args = argparse.Namespace(eval_only=False)
    try:
        set_up_run(toy_cfg, args)
        handler = loggers[-1].handlers[-1]
        monkeypatch.setattr(handler, "flush", full)
        loggers[-1].info("lost")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match="error: .*config.yaml could not be written.*Free space or change OUTPUT"):
            set_up_run(toy_cfg, args)
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
    assert "Traceback" not in capfd.readouterr().err


def test_lost_data_set_ends_the_program_at_once(data_root: Path, tmp_path: Path):
    """Its workers outlive a SIGTERM by a minute, for which other processes of the run would wait."""
    root = tmp_path / "datasets"
    shutil.copytree(data_root, root)
    process = running(tmp_path / "run", root)
    shutil.rmtree(root / "streets" / "images")
    begin = time.monotonic()
    text, _ = process.communicate(timeout=150)
    assert process.returncode == 1 and "Traceback" not in text, text[-3000:]
    assert re.search("error: The images of iteration .* cannot be opened", text)
    assert time.monotonic() - begin < 30
    assert (tmp_path / "run" / "last_checkpoint").exists()


def test_workers_of_an_evaluation_that_fails_are_ended(trainer, toy_cfg):
    run = trainer(evaluates=True, MAX_ITER=2)
    ended = []

    class Batches(list):
        def __iter__(self):
            return self

        def __next__(self):
            return [{"image": "no picture"}]

        def _shutdown_workers(self) -> None:
            ended.append(1)

    type(run).build_test_loader = classmethod(lambda cls, cfg, name: Batches([0] * 9))
    with pytest.raises((TypeError, AttributeError)):
        run.train()
    assert ended


def test_output_folder_that_is_removed_is_made_again(trainer, toy_cfg, caplog):
    run = trainer(MAX_ITER=8, CHECKPOINT_PERIOD=3)
    during_step(run, 4, lambda: shutil.rmtree(toy_cfg.OUTPUT_DIR))
    run.train()
    names = {path.name for path in Path(toy_cfg.OUTPUT_DIR).iterdir()}
    assert {"model_0000005.pth", "model_final.pth", "metrics.json", "last_checkpoint"} <= names
    assert caplog.text.count("Somebody removed ") == 1 and "model_0000002.pth" in caplog.text


def test_full_disk_ends_the_run_and_keeps_the_checkpoint_before(trainer, toy_cfg):
    """The limit on the size of files stands in for a full disk: writing fails in the middle of the file."""
    run = trainer(MAX_ITER=8, CHECKPOINT_PERIOD=3)
    folder = Path(toy_cfg.OUTPUT_DIR)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    during_step(run, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1])))
    try:
        with pytest.raises(OSError, match="model_0000005.pth could not be written.*Free space or change OUTPUT_DIR"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in folder.glob("*.pth")] == ["model_0000002.pth"] and not list(folder.glob(".*.tmp"))
    assert trainer().start_iter == 3


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory"), "allocate"])
def test_short_memory_in_evaluation_says_what_to_lower_and_loses_nothing(trainer, toy_cfg, error):
    run = trainer(evaluates=True, CHECKPOINT_PERIOD=100)

    def starved(*args, **kwargs) -> None:
        if isinstance(error, Exception):
            raise error
        torch.empty(2**60, dtype=torch.uint8)

    run.test = starved
    with pytest.raises(RunError, match="memory was short .* Lower MODEL.MFUSER.INFERENCE.* is in .*model_final.pth"):
        run.train()
    again = trainer(evaluates=True)
    again.train()
    assert "mean/mIoU" in (Path(toy_cfg.OUTPUT_DIR) / "metrics.json").read_text()


def spoil(run, numbers: set[int]) -> None:
    """Make the bias infinite in the forward pass of some steps; batch statistics stay as they are."""

    def hook(module, inputs, output):
        return output * float("inf") if run.iter in numbers and module.training else output

    run.model.norm.register_forward_hook(hook)


def test_bad_step_is_recorded_with_its_first_module_and_can_be_repeated(trainer, toy_cfg, toy_trainer_class):
    run = trainer(MAX_ITER=8)
    run.model.norm.register_forward_hook(
        lambda module, inputs, output: output / (run.iter != 3) if run.iter == 3 else output
    )
    with pytest.raises(
        FloatingPointError, match=r"iteration 3: loss_cls=nan.*first in the output of norm .BatchNorm2d"
    ):
        run.train()
    path = Path(toy_cfg.OUTPUT_DIR) / "bad_step_0000003_0.pth"
    model = toy_trainer_class.build_model(toy_cfg)
    losses, first = repeat_step(path, model)
    assert set(losses) == {"loss_cls", "loss_cls_0"} and all(value == value for value in losses.values()) and not first
    state = run.model.state_dict()
    assert all(
        torch.equal(value, state[key]) for key, value in read_checkpoint(path)["model"].items() if "running" not in key
    )
    model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    losses, first = repeat_step(path, model)
    assert not any(value == value for value in losses.values()) and first == "the output of norm (BatchNorm2d)"
    images = read_checkpoint(path)["bad_step"]["batch"]
    assert [item["file_name"] for item in images] == ["image_0.png", "image_1.png"] and images[0][
        "image"
    ].dtype == torch.uint8


def test_bad_steps_are_left_out_up_to_the_number_asked_for(trainer, toy_cfg, caplog):
    run = trainer(MAX_ITER=8, CHECKPOINT_PERIOD=4, MAX_BAD_STEPS=2)
    weights = {}
    spoil(run, {2, 5})
    step = run.run_step

    def watched() -> None:
        weights[run.iter] = {key: value.clone() for key, value in run.model.state_dict().items()}
        step()

    run.run_step = watched
    run.train()
    for number in (2, 5):
        assert all(torch.equal(value, weights[number + 1][key]) for key, value in weights[number].items())
    assert not torch.equal(weights[3]["head.weight"], weights[4]["head.weight"])
    assert "(1 of SOLVER.MAX_BAD_STEPS=2)" in caplog.text and "(2 of SOLVER.MAX_BAD_STEPS=2)" in caplog.text
    assert all(value.isfinite().all() for value in run.model.state_dict().values())

    more = trainer(MAX_ITER=12)  # the count is the run's, not the process's
    spoil(more, {9})
    with pytest.raises(FloatingPointError, match="stopped at iteration 9"):
        more.train()


def test_deterministic_mode_asks_torch_for_it():
    was = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        repeat_exactly()
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(was)
        torch.backends.cudnn.benchmark = benchmark


def test_deterministic_run_repeats_bit_for_bit(trainer, toy_cfg):
    states = []
    was = torch.are_deterministic_algorithms_enabled()
    try:
        repeat_exactly()
        for name in ("a", "b"):
            toy_cfg.OUTPUT_DIR = str(Path(toy_cfg.OUTPUT_DIR).with_name(name))
            torch.rand(len(states) + 1)  # what happened in the process before does not matter
            run = trainer(MAX_ITER=6)
            run.train()
            states.append(run.model.state_dict())
    finally:
        torch.use_deterministic_algorithms(was)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class Waiting:
    """A loader that lets some batches be waited for."""

    def __init__(self, loader, is_slow) -> None:
        self.loader, self.is_slow = loader, is_slow

    def __iter__(self):
        for number, items in enumerate(self.loader):
            if self.is_slow(number):
                time.sleep(0.03)
            yield items


def loader_warnings(trainer, caplog, is_slow) -> list[int]:
    """The iterations at which the loader was called slow in a run of 100 with a progress line for every one."""
    run = trainer(MAX_ITER=100, LOG_PERIOD=1, CHECKPOINT_PERIOD=1000)
    run._trainer.data_loader = Waiting(run._trainer.data_loader, is_slow)
    said = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for data" in record.getMessage():
                assert "raise DATALOADER.NUM_WORKERS" in record.getMessage()
                said.append(run.iter)

    handler = Note()
    logging.getLogger("mfuser_d2.d2.hooks").addHandler(handler)
    try:
        run.train()
    finally:
        logging.getLogger("mfuser_d2.d2.hooks").removeHandler(handler)
    return said


def test_slow_loader_is_warned_of_once(trainer, caplog):
    assert len(loader_warnings(trainer, caplog, lambda number: True)) == 1


def test_loader_that_is_slow_in_every_fourth_batch_is_slow(trainer, caplog):
    """So it is where four workers are too slow: they bring four batches at once; most steps wait for none."""
    assert len(loader_warnings(trainer, caplog, lambda number: number % 4 == 0)) == 1


def test_workers_that_have_to_start_are_no_slow_loader(trainer, caplog):
    assert not loader_warnings(trainer, caplog, lambda number: number < 15)


def test_loader_that_becomes_slow_again_is_warned_of_again(trainer, caplog):
    assert len(loader_warnings(trainer, caplog, lambda number: not 35 <= number < 65)) == 2
