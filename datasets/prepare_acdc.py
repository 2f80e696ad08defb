#!/usr/bin/env python3
"""Check ACDC: python datasets/prepare_acdc.py ROOT, with ROOT = $DETECTRON2_DATASETS/acdc.

Expects rgb_anon/{fog,night,rain,snow}/{train,val}/*/*_rgb_anon.png and gt/.../*_gt_labelTrainIds.png. The publisher
gives trainIds, so nothing is converted: the files are checked.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.data.convert import Expected, Job, conclude, match_halves, prepare_all, require_any  # noqa: E402
from mfuser_d2.data.layouts import ACDC_CONDITIONS  # noqa: E402
from mfuser_d2.data.prepare import Report, build_parser, run_program  # noqa: E402

IMAGE_ENDING, LABEL_ENDING = "_rgb_anon.png", "_gt_labelTrainIds.png"
SIZE = (1080, 1920)


def expected_of(condition: str, split: str) -> Expected:
    num_pairs = 400 if split == "train" else 106 if condition == "night" else 100
    return Expected(num_pairs=num_pairs, size=SIZE, has_all=False)


def prepare(root: Path, report: Report) -> None:
    """Check the four conditions."""
    is_any = False
    for condition in ACDC_CONDITIONS:
        for split in ("train", "val"):
            images, labels = root / "rgb_anon" / condition / split, root / "gt" / condition / split
            jobs = []
            for image in sorted(images.glob(f"*/*{IMAGE_ENDING}")):
                label = labels / image.parent.name / (image.name.removesuffix(IMAGE_ENDING) + LABEL_ENDING)
                jobs.append(Job(image, label, label))
            tree = f"{images}/*/*{IMAGE_ENDING} and {labels}/*/*{LABEL_ENDING}"
            what = f"acdc_{condition}_{split}"
            jobs = match_halves(report, jobs, list(labels.glob(f"*/*{LABEL_ENDING}")), tree)
            if jobs:
                is_any = True
                results = prepare_all(report, jobs, what, None, root)
                conclude(report, root, what, results, expected_of(condition, split))
    require_any(is_any, report, root)


def main() -> int:
    args = build_parser(__doc__).parse_args()
    return run_program("acdc", args.root, prepare, jobs=args.jobs, is_strict=args.strict)


if __name__ == "__main__":
    sys.exit(main())
