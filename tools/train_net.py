#!/usr/bin/env python
"""Train and evaluate MFuser by a config, the Detectron2 way.

python tools/train_net.py --config-file configs/gta5/mfuser_eva02.yaml --num-gpus 1
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mfuser_d2  # noqa: E402

try:
    mfuser_d2.require_detectron2()
except RuntimeError as error:
    sys.exit(str(error))

from detectron2.config import CfgNode  # noqa: E402
from detectron2.engine import default_argument_parser  # noqa: E402

from mfuser_d2.d2 import (  # noqa: E402
    MFuserCheckpointer,
    MFuserTrainer,
    load_config,
    one_line_errors,
    set_up_run,
    validate_config,
)
from mfuser_d2.d2.processes import run_processes  # noqa: E402
from mfuser_d2.d2.run import TRAINING_ERRORS  # noqa: E402


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Train, or evaluate with --eval-only, in one of the processes."""
    set_up_run(cfg, args)
    if args.eval_only:
        with one_line_errors():
            MFuserTrainer.require_test_sets(cfg)
            model = MFuserTrainer.build_model(cfg)
            checkpointer = MFuserCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        MFuserTrainer.test(cfg, model, weights=checkpointer.resumed_from or None)
        return
    with one_line_errors():
        MFuserTrainer.require_test_sets(cfg)
        trainer = MFuserTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    with one_line_errors(TRAINING_ERRORS):
        trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    with one_line_errors():  # before any process is started
        config = load_config(arguments.config_file, arguments.opts)
        validate_config(config)
    run_processes(main, arguments, (config, arguments))
