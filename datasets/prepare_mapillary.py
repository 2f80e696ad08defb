#!/usr/bin/env python3
"""Prepare Mapillary Vistas: python datasets/prepare_mapillary.py ROOT, with ROOT = $DETECTRON2_DATASETS/mapillary.

Expects {training,validation}/images/*.jpg and {training,validation}/v1.2/labels/*.png (older archives:
{training,validation}/labels). Two mappings to the 19 classes circulate and give different numbers; choose with
--mapping and state it with every result. Writes {training,validation}/labels_train_ids_<mapping>/; with --half also
images_half/ and labels_train_ids_<mapping>_half/ at half the size. The publisher's files stay as they are.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.data.convert import (  # noqa: E402
    Expected,
    Job,
    conclude,
    halve_image,
    match_halves,
    prepare_all,
    read_palette_ids,
    require_any,
    translate,
)
from mfuser_d2.data.labels import MAPILLARY_IDS, MAPILLARY_NUM_IDS  # noqa: E402
from mfuser_d2.data.layouts import LABEL_FOLDER  # noqa: E402
from mfuser_d2.data.prepare import Report, build_parser, run_program  # noqa: E402
from mfuser_d2.data.reading import read_labels  # noqa: E402

EXPECTED = {"training": Expected(num_pairs=18000), "validation": Expected(num_pairs=2000)}


def halve_labels(job: Job) -> np.ndarray:
    """TrainIds at half the size, nearest neighbour; by Pillow as in public code, for OpenCV takes other pixels."""
    labels = read_labels(job.source)
    size = (labels.shape[1] // 2, labels.shape[0] // 2)
    return np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def _halve(pair: tuple[Path, Path]) -> str:
    """Write a half-size image; returns what went wrong."""
    try:
        halve_image(*pair)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def prepare_half(root: Path, report: Report, split: str, mapping: str, jobs: list[Job]) -> None:
    """Half-size copies of images and trainIds."""
    folder = root / split
    pairs = [(job.image, folder / "images_half" / f"{job.image.stem}.jpg") for job in jobs]
    for problem in report.map(_halve, pairs, f"halving {split}"):
        if problem:
            report.problem(problem)
    labels = folder / f"{LABEL_FOLDER}_{mapping}_half"
    halves = [Job(half, job.target, labels / job.target.name) for job, (_, half) in zip(jobs, pairs, strict=True)]
    what = f"mapillary_{split}_{mapping}_half"
    results = prepare_all(report, halves, what, halve_labels, root)
    conclude(report, root, what, results, EXPECTED[split], label_mapping=mapping, is_half_resolution=True)


def prepare(root: Path, report: Report, *, mapping: str, is_half: bool, splits: list[str]) -> None:
    """Convert and check the chosen splits."""
    is_any = False
    for split in splits:
        folder = root / split
        labels = folder / "v1.2" / "labels"
        labels = labels if labels.is_dir() else folder / "labels"
        targets = folder / f"{LABEL_FOLDER}_{mapping}"
        images = sorted((folder / "images").glob("*.jpg"))
        jobs = [Job(p, labels / f"{p.stem}.png", targets / f"{p.stem}.png") for p in images]
        tree = f"{folder}/images/*.jpg and {folder}/v1.2/labels/*.png (or {folder}/labels/*.png)"
        jobs = match_halves(report, jobs, list(labels.glob("*.png")), tree)
        if not jobs:
            continue
        is_any = True
        make = partial(translate, read=read_palette_ids, mapping=MAPILLARY_IDS[mapping], num_ids=MAPILLARY_NUM_IDS)
        what, found_in = f"mapillary_{split}_{mapping}", labels.relative_to(folder).as_posix()
        results = prepare_all(report, jobs, what, make, root)
        conclude(report, root, what, results, EXPECTED[split], label_mapping=mapping, label_folder=found_in)
        if is_half:
            prepare_half(root, report, split, mapping, [done.job for done in results if not done.problem])
    require_any(is_any, report, root)


def main() -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--mapping", choices=sorted(MAPILLARY_IDS), default="openseg", help="default: openseg")
    parser.add_argument("--half", action="store_true", help="also write copies of half the size")
    parser.add_argument("--splits", nargs="+", choices=sorted(EXPECTED), default=sorted(EXPECTED), help="default: both")
    args = parser.parse_args()
    work = partial(prepare, mapping=args.mapping, is_half=args.half, splits=args.splits)
    return run_program("mapillary", args.root, work, jobs=args.jobs, is_strict=args.strict)


if __name__ == "__main__":
    sys.exit(main())
