#!/usr/bin/env python3
"""Check BDD100K 10k: python datasets/prepare_bdd100k.py ROOT, with ROOT = $DETECTRON2_DATASETS/bdd100k.

Expects images/10k/{train,val}/*.jpg and labels/sem_seg/masks/{train,val}/*.png, or the older release's
seg/images/{train,val}/*.jpg and seg/labels/{train,val}/*_train_id.png. Both hold trainIds already, so nothing is
converted: the files are checked. labels/sem_seg/colormaps holds colours and is of no use.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.data.convert import Expected, Job, conclude, match_halves, prepare_all, require_any  # noqa: E402
from mfuser_d2.data.prepare import Report, build_parser, run_program  # noqa: E402

SIZE = (720, 1280)
EXPECTED = {
    "train": Expected(num_pairs=7000, size=SIZE),
    "val": Expected(num_pairs=1000, size=SIZE, has_all=False),
}


def find_jobs(root: Path, split: str) -> tuple[list[Job], list[Path], str]:
    """Pairs of one split, all its label files, and the tree that was looked for."""
    images, labels, ending = root / "images/10k" / split, root / "labels/sem_seg/masks" / split, ".png"
    if not images.is_dir() and (root / "seg/images" / split).is_dir():
        images, labels, ending = root / "seg/images" / split, root / "seg/labels" / split, "_train_id.png"
    jobs = []
    for image in sorted(images.glob("*.jpg")):
        label = labels / f"{image.stem}{ending}"
        jobs.append(Job(image, label, label))
    colors = root / "labels/sem_seg/colormaps"
    hint = f" ({colors} holds colours; get the masks from the same archive)" if colors.is_dir() else ""
    return jobs, list(labels.glob(f"*{ending}")), f"{images}/*.jpg and {labels}/*{ending}{hint}"


def prepare(root: Path, report: Report) -> None:
    """Check both splits."""
    is_any = False
    for split, expected in EXPECTED.items():
        jobs, sources, tree = find_jobs(root, split)
        if jobs and not sources:
            raise ValueError(f"found images but no labels; expected {tree}")
        jobs = match_halves(report, jobs, sources, tree)
        if jobs:
            is_any = True
            results = prepare_all(report, jobs, f"bdd100k_{split}", None, root)
            conclude(report, root, f"bdd100k_{split}", results, expected)
    require_any(is_any, report, root)


def main() -> int:
    args = build_parser(__doc__).parse_args()
    return run_program("bdd100k", args.root, prepare, jobs=args.jobs, is_strict=args.strict)


if __name__ == "__main__":
    sys.exit(main())
