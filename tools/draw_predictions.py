#!/usr/bin/env python
"""Draw image, truth and prediction side by side from an output folder whose evaluation saved its predictions.

Usage: python tools/draw_predictions.py output/quickstart_eva02 [--count 2] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from mfuser_d2.data.labels import CLASSES, COLORS, NUM_CLASSES  # noqa: E402
from mfuser_d2.data.layouts import list_pairs  # noqa: E402
from mfuser_d2.data.reading import read_pair  # noqa: E402
from mfuser_d2.evaluation import count_confusion, score_confusion  # noqa: E402
from mfuser_d2.evaluation.label_files import read_label  # noqa: E402
from mfuser_d2.visualization import PanelRow, save_panels  # noqa: E402


def rows_of(dataset: str, folder: Path, count: int) -> list[PanelRow]:
    """Up to `count` images of a data set, evenly spread over those with a saved prediction.

    Raises:
        FileNotFoundError: there is no prediction, or no such data set on disk.
    """
    predictions = {path.stem: path for path in sorted((folder / "predictions").rglob("*.png"))}
    pairs = [pair for pair in list_pairs(dataset) if pair[0].stem in predictions]
    if not pairs:
        raise FileNotFoundError(f"no predictions in {folder}; evaluate with TEST.MFUSER.SAVE_PREDICTIONS True")
    rows = []
    for index in np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int):
        image, truth = read_pair(*pairs[index])
        prediction = read_label(predictions[pairs[index][0].stem])
        scores = score_confusion(count_confusion(prediction, truth, num_classes=NUM_CLASSES), CLASSES)
        caption = f"{dataset}: {pairs[index][0].name}, mIoU of this image {scores['mIoU']:.1f}"
        rows.append(PanelRow(image[..., ::-1], truth, prediction, caption))
    return rows


def draw_output(output: Path, *, count: int = 2, picture: Path | None = None) -> Path:
    """Draw `count` images of each data set below output/inference into one picture and return its path."""
    results = output / "inference" / "results.json"
    order = list(json.loads(results.read_text(encoding="utf-8"))["results"]) if results.is_file() else []
    folders = [path.parent for path in (output / "inference").glob("*/predictions")]
    # The order of the table, where there is one: source first.
    folders.sort(key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))
    if not folders:
        raise FileNotFoundError(
            f"no inference/*/predictions in {output}; evaluate with TEST.MFUSER.SAVE_PREDICTIONS True first"
        )
    picture = picture or output / "predictions.jpg"
    rows = [row for folder in folders for row in rows_of(folder.name, folder, count)]
    save_panels(picture, rows, CLASSES, COLORS)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="OUTPUT_DIR of the run")
    parser.add_argument("--count", type=int, default=2, help="images per data set (default: 2)")
    parser.add_argument("--picture", type=Path, help="where to save (default: predictions.jpg in the output folder)")
    args = parser.parse_args()
    try:
        print(f"Pictures: {draw_output(args.output, count=args.count, picture=args.picture)}")
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"error: {error.args[0] if error.args else error}")


if __name__ == "__main__":
    main()
