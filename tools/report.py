#!/usr/bin/env python
"""Write one self-contained HTML page over one or several evaluations; it opens from disk and loads nothing.

    python tools/report.py output/quickstart
    python tools/report.py output/clip output/eva02 --names CLIP EVA02-CLIP --output report.html

Each RUN is an OUTPUT_DIR that was evaluated (it holds inference/results.json). Images appear where the evaluation ran
with TEST.MFUSER.SAVE_PER_IMAGE True TEST.MFUSER.SAVE_PREDICTIONS True. Needs no Detectron2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.evaluation.report import write_report  # noqa: E402


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an evaluated OUTPUT_DIR, or a results.json")
    parser.add_argument("--output", type=Path, help="the page (default: report.html beside the first results.json)")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what the page calls the runs (default: folders)")
    parser.add_argument("--images", type=int, default=4, help="best and worst images per target; 0 leaves them out")
    parser.add_argument("--image-width", type=int, default=800, help="pixels that images are shrunk to (default: 800)")
    parsed = parser.parse_args(arguments)
    if parsed.images < 0 or parsed.image_width < 16:
        parser.error("--images must be 0 or more and --image-width at least 16")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    parsed = parse_arguments(arguments)
    try:
        page = write_report(
            parsed.runs,
            parsed.output,
            names=parsed.names,
            num_images=parsed.images,
            max_width=parsed.image_width,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
