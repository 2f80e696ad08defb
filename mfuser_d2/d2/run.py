"""What a run does before anything is built: loggers, a record of the config and the machine, seeds."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from mfuser_d2.core.checkpoint_file import write_text

logger = logging.getLogger(__name__)

_RECORD = "mfuser_d2.record"  # a logger that writes to log.txt only


class RunError(RuntimeError):
    """Something outside the program ended a run; the message says what, what is kept, and what to do."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

_USER_ERRORS = (OSError, KeyError, ValueError)
TRAINING_ERRORS = (OSError, FloatingPointError, RunError)
"""What ends a training and is no fault in the program."""


@contextmanager
def one_line_errors(kinds: tuple[type[BaseException], ...] = (*_USER_ERRORS, RunError)) -> Iterator[None]:
    """Turn errors in what the user gave (a key, a file, a data set) into one line on the terminal and exit code 1.

    The traceback goes into log.txt, once `set_up_run` has opened it.

    Args:
        kinds: the errors meant: for what happens before training those of bad input; `TRAINING_ERRORS` during it, where
            a ValueError would be a fault in the program and keeps its traceback.
    """
    try:
        yield
    except kinds as error:
        logging.getLogger(_RECORD).debug("Where the error came from:", exc_info=True)
        # str() of a KeyError is the message in quotes, that of an OSError holds more than its first argument.
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) and error.args else error}")


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def reason_outside(error: Exception) -> str:
    """What outside the program may have caused an error, "" where nothing is known."""
    text = str(error).lower()
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error}. Free space or change OUTPUT_DIR, and start again with --resume."
    if not isinstance(error, RuntimeError):
        return ""
    if "dataloader worker" in text:  # raised wherever the program was when the worker ended
        return (
            f"{first_line(error)} Memory may have been short: lower DATALOADER.NUM_WORKERS, and start again with "
            "--resume."
        )
    words = ("peer", "connection", "socket", "timed out", "nccl", "gloo")
    if comm.get_world_size() > 1 and any(word in text for word in words):
        return (
            f"another process of this run was gone ({first_line(error)}); what it said itself, or the scheduler, tells "
            "why. Start again with --resume."
        )
    return ""


@one_line_errors((OSError,))
def set_up_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Prepare one process of a run.

    OUTPUT_DIR gets config.yaml and log.txt. Unlike Detectron2's `default_setup`, the machine's description and the full
    config go into log.txt only, so that the terminal begins with what the run does.

    Args:
        args: of the command line; `eval_only` switches cuDNN's search for fast kernels off, which only pays in
            training.
    Raises:
        SystemExit: OUTPUT_DIR cannot be written to; says why.
    """
    rank = comm.get_rank()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    for name in ("detectron2", "fvcore", "mfuser_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    record = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=_RECORD, configure_stdout=False)
    _spare_terminal("detectron2", "fvcore", "mfuser_d2", _RECORD)
    record.info("Process %d of %d, arguments %s\n%s", rank, comm.get_world_size(), vars(args), collect_env_info())
    record.info("Config:\n%s", cfg.dump())
    if comm.is_main_process():
        write_text(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump())
        logger.info("Config and machine are recorded in %s/{config.yaml,log.txt}", cfg.OUTPUT_DIR)
    seed_all_rng(cfg.SEED + rank if cfg.SEED >= 0 else None)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not getattr(args, "eval_only", False)
    if cfg.SOLVER.DETERMINISTIC:
        repeat_exactly()
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)


def _spare_terminal(*names: str) -> None:
    """Keep log.txt's handlers from printing a traceback for every line that a full disk does not take."""
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is not sys.stdout:
                handler.handleError = lambda record: None


def repeat_exactly() -> None:
    """Let torch choose kernels that give the same bits again; it warns, naming the kernel, where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
