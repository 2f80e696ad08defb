#!/usr/bin/env python3
"""Prepare GTAV: python datasets/prepare_gta5.py ROOT, with ROOT = $DETECTRON2_DATASETS/gta5.

Expects the publisher's images/ and labels/ (flat, or in train/, val/ and test/), and split.mat for the official split.
Writes labels_train_ids/ and splits/{train,val,test,all}.txt; the publisher's files stay as they are.
"""

import argparse
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.data.convert import (  # noqa: E402
    Checked,
    Expected,
    Job,
    conclude,
    match_halves,
    prepare_all,
    read_palette_ids,
    require_any,
    translate,
)
from mfuser_d2.data.labels import GTA5_IDS  # noqa: E402
from mfuser_d2.data.layouts import LABEL_FOLDER, SPLIT_FOLDER  # noqa: E402
from mfuser_d2.data.prepare import Report, build_parser, run_program, write_atomically  # noqa: E402

BAD_FRAMES = ("15188", "17705")  # the publisher's image and label sizes disagree
EXPECTED = Expected(num_pairs=24966 - len(BAD_FRAMES), size=(1052, 1914))
NUM_IDS = 35
SPLIT_KEYS = {"train": "trainIds", "val": "valIds", "test": "testIds"}


def find_split(root: Path, stems: dict[str, str]) -> dict[str, list[str]]:
    """The official split as lists of paths below images/; empty where its source is missing.

    Args:
        root: of the data set.
        stems: frame number, as in the file name, to path below images/.
    Raises:
        RuntimeError: scipy is missing and split.mat has to be read.
        ValueError: split.mat is damaged.
    """
    in_folders = {split: sorted(p for p in stems.values() if p.startswith(f"{split}/")) for split in SPLIT_KEYS}
    if any(in_folders.values()):
        return in_folders
    file = root / "split.mat"
    if not file.is_file():
        return {}
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise RuntimeError("reading split.mat needs scipy: pip install scipy") from error
    try:
        numbers = loadmat(str(file))
    except (MatReadError, ValueError, TypeError, NotImplementedError, OSError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read ({error}); download it again from the publisher's page") from error
    missing = [key for key in SPLIT_KEYS.values() if key not in numbers]
    if missing:
        raise ValueError(f"{file} has no {missing}; download it again from the publisher's page")
    wanted = {split: [f"{int(n):05d}" for n in np.ravel(numbers[key])] for split, key in SPLIT_KEYS.items()}
    return {split: [stems[stem] for stem in frames if stem in stems] for split, frames in wanted.items()}


def write_lists(root: Path, report: Report, good: list[Checked], is_blank_dropped: bool) -> dict[str, int]:
    """Write splits/*.txt of the good frames; returns how many each has."""
    images = root / "images"
    kept = [done.job.image for done in good if not (is_blank_dropped and done.is_blank)]
    stems = {image.stem: image.relative_to(images).as_posix() for image in kept}
    lists = find_split(root, stems)
    if not lists:
        report.note(
            "gta5: no split.mat in the folder and no train/, val/, test/ below images/: only gta5_sem_seg_all is "
            "ready. split.mat is part of read_mapping.zip on the publisher's page; put it into ROOT and run this again"
        )
    lists["all"] = sorted(stems.values())
    for split, names in lists.items():
        write_atomically(root / SPLIT_FOLDER / f"{split}.txt", ("\n".join(names) + "\n").encode())
    counts = {split: len(names) for split, names in lists.items()}
    report.note("gta5: frames in each list: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    return counts


def prepare(root: Path, report: Report, *, is_blank_dropped: bool = False) -> None:
    """Convert the labels, write the lists, check everything."""
    images, labels = root / "images", root / "labels"
    jobs = []
    for image in sorted(images.rglob("*.png")):
        inside = image.relative_to(images)
        if image.stem in BAD_FRAMES:
            report.note(f"gta5: {image.name} is left out, its image and label sizes disagree")
        else:
            jobs.append(Job(image, labels / inside, root / LABEL_FOLDER / inside))
    sources = [path for path in labels.rglob("*.png") if path.stem not in BAD_FRAMES]
    jobs = match_halves(report, jobs, sources, f"{images}/NNNNN.png and {labels}/NNNNN.png")
    require_any(bool(jobs), report, root)
    make = partial(translate, read=read_palette_ids, mapping=GTA5_IDS, num_ids=NUM_IDS)
    results = prepare_all(report, jobs, "gta5", make, root)
    counts = write_lists(root, report, [done for done in results if not done.problem], is_blank_dropped)
    conclude(report, root, "gta5", results, EXPECTED, splits=counts, is_blank_dropped=is_blank_dropped)


def parse_args() -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--drop-blank", action="store_true", help="leave frames without any label out of the lists")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    work = partial(prepare, is_blank_dropped=args.drop_blank)
    return run_program("gta5", args.root, work, jobs=args.jobs, is_strict=args.strict)


if __name__ == "__main__":
    sys.exit(main())
