"""What a run does before anything is built: loggers, a record of the config and the machine, seeds."""

from __future__ import annotations

import argparse
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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors in what the user gave (a key, a file, a data set) into one line on the terminal and exit code 1.

    The traceback goes into log.txt, once `set_up_run` has opened it. For what happens before training; errors during it
    keep their traceback.
    """
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        logging.getLogger(_RECORD).debug("Where the error came from:", exc_info=True)
        # str() of a KeyError is the message in quotes, that of an OSError holds more than its first argument.
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) and error.args else error}")


def set_up_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Prepare one process of a run.

    OUTPUT_DIR gets config.yaml and log.txt. Unlike Detectron2's `default_setup`, the machine's description and the full
    config go into log.txt only, so that the terminal begins with what the run does.

    Args:
        args: of the command line; `eval_only` switches cuDNN's search for fast kernels off, which only pays in
            training.
    """
    rank = comm.get_rank()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    for name in ("detectron2", "fvcore", "mfuser_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    record = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=_RECORD, configure_stdout=False)
    record.info("Process %d of %d, arguments %s\n%s", rank, comm.get_world_size(), vars(args), collect_env_info())
    record.info("Config:\n%s", cfg.dump())
    if comm.is_main_process():
        write_text(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump())
        logger.info("Config and machine are recorded in %s/{config.yaml,log.txt}", cfg.OUTPUT_DIR)
    seed_all_rng(cfg.SEED + rank if cfg.SEED >= 0 else None)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not getattr(args, "eval_only", False)
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
