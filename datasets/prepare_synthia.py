#!/usr/bin/env python3
"""Prepare SYNTHIA-RAND-CITYSCAPES: python datasets/prepare_synthia.py ROOT, with ROOT = $DETECTRON2_DATASETS/synthia.

Expects the publisher's RGB/ and GT/LABELS/ (uint16, three channels). Writes labels_train_ids/ and
splits/{train,val,all}.txt; the publisher's files stay as they are. The publisher has no split: 70 % of the frames are
drawn for training (6,580 of 9,400), or --lists names a folder with a train.txt and a val.txt of frame names.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.data.convert import (  # noqa: E402
    Expected,
    Job,
    conclude,
    match_halves,
    prepare_all,
    read_synthia_ids,
    require_any,
    translate,
)
from mfuser_d2.data.labels import SYNTHIA_ABSENT, SYNTHIA_IDS  # noqa: E402
from mfuser_d2.data.layouts import LABEL_FOLDER, SPLIT_FOLDER  # noqa: E402
from mfuser_d2.data.prepare import Report, build_parser, run_program, write_atomically  # noqa: E402

EXPECTED = Expected(num_pairs=9400, absent=SYNTHIA_ABSENT, size=(760, 1280))
NUM_IDS = 23
TRAIN_PART = 0.7
SPLIT_SEED = 0


def split_frames(found: list[str], names: list[str], lists: Path | None) -> dict[str, list[str]]:
    """Good frames of each split.

    Args:
        found: all frames, good and bad: a bad one must not change where the others go.
        names: the good ones.
        lists: folder of the lists; None draws.
    Raises:
        ValueError: a list is missing or names an unknown frame.
    """
    if lists is None:
        order = np.random.default_rng(SPLIT_SEED).permutation(len(found))
        train = {found[i] for i in order[: round(TRAIN_PART * len(found))]}
        return {"train": [n for n in names if n in train], "val": [n for n in names if n not in train]}
    splits: dict[str, list[str]] = {}
    for split in ("train", "val"):
        file = lists / f"{split}.txt"
        if not file.is_file():
            raise ValueError(f"--lists {lists} has no {file.name}; it needs train.txt and val.txt, one frame a line")
        splits[split] = [f"{Path(line.split()[0]).stem}.png" for line in file.read_text().splitlines() if line.strip()]
        unknown = sorted(set(splits[split]) - set(names))
        if unknown:
            raise ValueError(f"{file} names {len(unknown)} frames that are missing or bad, such as {unknown[0]}")
    return splits


def prepare(root: Path, report: Report, *, lists: Path | None = None) -> None:
    """Convert the labels, write the lists, check everything."""
    images, labels = root / "RGB", root / "GT" / "LABELS"
    jobs = [Job(p, labels / p.name, root / LABEL_FOLDER / p.name) for p in sorted(images.glob("*.png"))]
    expected = f"{images}/NNNNNNN.png and {labels}/NNNNNNN.png (ROOT is the publisher's RAND_CITYSCAPES folder)"
    jobs = match_halves(report, jobs, list(labels.glob("*.png")), expected)
    require_any(bool(jobs), report, root)
    make = partial(translate, read=read_synthia_ids, mapping=SYNTHIA_IDS, num_ids=NUM_IDS)
    results = prepare_all(report, jobs, "synthia", make, root)
    names = [done.job.image.name for done in results if not done.problem]
    splits = {**split_frames([done.job.image.name for done in results], names, lists), "all": names}
    for split, frames in splits.items():
        write_atomically(root / SPLIT_FOLDER / f"{split}.txt", ("\n".join(frames) + "\n").encode())
    origin = str(lists) if lists else f"drawn with seed {SPLIT_SEED}"
    counts = {split: len(frames) for split, frames in splits.items()}
    conclude(report, root, "synthia", results, EXPECTED, splits=counts, split_origin=origin)


def main() -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--lists", type=Path, help="folder with train.txt and val.txt (default: a drawn split)")
    args = parser.parse_args()
    return run_program("synthia", args.root, partial(prepare, lists=args.lists), jobs=args.jobs, is_strict=args.strict)


if __name__ == "__main__":
    sys.exit(main())
