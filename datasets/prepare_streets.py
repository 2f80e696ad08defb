#!/usr/bin/env python3
"""Draw the streets data set: python datasets/prepare_streets.py ROOT, with ROOT = $DETECTRON2_DATASETS/streets.

A second run with the same settings changes nothing; other settings draw everything anew.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.data.prepare import run_program  # noqa: E402
from mfuser_d2.data.streets import DEFAULT_SIZE  # noqa: E402
from mfuser_d2.data.streets.writer import write_streets  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the data set, for example $DETECTRON2_DATASETS/streets")
    parser.add_argument("--num-train", type=int, default=300, help="training pictures (default: 300)")
    parser.add_argument("--num-val", type=int, default=40, help="pictures of each validation split (default: 40)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=DEFAULT_SIZE, help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another town (default: 0)")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: all cores)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    return run_program(
        "streets",
        args.root,
        lambda root, report: write_streets(
            root, report=report, num_train=args.num_train, num_val=args.num_val, size=tuple(args.size), seed=args.seed
        ),
        jobs=args.jobs,
        is_created=True,
    )


if __name__ == "__main__":
    sys.exit(main())
