#!/usr/bin/env python
"""Time, memory and error of the parts, one JSON line a case; the first line describes the machine.

    python tools/benchmark.py scan --paper
    python tools/benchmark.py adapter --plot adapter.png

`python tools/benchmark.py NAME --help` lists a benchmark's options. tools/BENCHMARKS.md holds measured tables.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

BENCHMARKS = {
    "scan": "selective scan: every backend against the reference over sequence lengths",
    "adapter": "adapters between the encoders: MVFuser against attention over token counts",
    "inference": "the whole network on a crop and on an image: time, memory, operations by part",
    "train": "a training step: time, memory, operations by part",
    "data": "training loader: images a second, and where the time goes",
}
"""Name to summary; benchmarks/<name>.py has `add_arguments(parser)` and `run(arguments) -> exit status`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    given = sys.argv[1:] if arguments is None else list(arguments)
    modules = {}
    for name, summary in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in given[:1]:  # only this one's imports are paid for
            modules[name] = importlib.import_module(f"benchmarks.{name}")
            modules[name].add_arguments(command)
    parsed = parser.parse_args(given)
    return modules[parsed.name].run(parsed)


if __name__ == "__main__":
    sys.exit(main())
