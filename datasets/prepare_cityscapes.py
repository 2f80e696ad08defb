#!/usr/bin/env python3
"""Prepare Cityscapes: python datasets/prepare_cityscapes.py ROOT, with ROOT = $DETECTRON2_DATASETS/cityscapes.

Expects the publisher's leftImg8bit/ and gtFine/ (polygons). Writes *_gtFine_labelTrainIds.png beside the polygons,
where Detectron2 and everyone else look for them; the publisher's files stay as they are. The drawing is done by
cityscapesscripts' own code (pip install cityscapesScripts); its windowed programs are not needed.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mfuser_d2.data.convert import Expected, Job, conclude, match_halves, prepare_all, require_any  # noqa: E402
from mfuser_d2.data.prepare import Report, build_parser, run_program  # noqa: E402
from mfuser_d2.data.reading import check_pixels  # noqa: E402

EXPECTED = {"train": Expected(num_pairs=2975, size=(1024, 2048)), "val": Expected(num_pairs=500, size=(1024, 2048))}
IMAGE_ENDING, POLYGON_ENDING = "_leftImg8bit.png", "_gtFine_polygons.json"


def draw_polygons(job: Job) -> np.ndarray:
    """The trainIds of a polygon file, (H, W) uint8.

    Raises:
        ValueError: the file is truncated or names an unknown class.
    """
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    annotation = Annotation()
    try:
        annotation.fromJsonFile(str(job.source))
        check_pixels(job.source, annotation.imgHeight, annotation.imgWidth, "polygon file")
        if min(annotation.imgHeight, annotation.imgWidth) < 1:
            raise ValueError(f"it says it is {annotation.imgHeight}x{annotation.imgWidth} (H x W)")
        return np.array(createLabelImage(annotation, "trainIds"))
    except SystemExit as error:  # cityscapesscripts leaves the program at an unknown class
        raise ValueError(f"polygon file {job.source} names a class that cityscapesscripts does not know") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise ValueError(f"polygon file {job.source} cannot be read ({error}); unpack gtFine again") from error


def prepare(root: Path, report: Report) -> None:
    """Draw the labels of both splits and check them."""
    try:
        import cityscapesscripts.preparation.json2labelImg  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"cityscapesscripts is missing ({error}): pip install cityscapesScripts") from error
    is_any = False
    for split, expected in EXPECTED.items():
        images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
        jobs = []
        for image in sorted(images.glob(f"*/*{IMAGE_ENDING}")):
            stem = labels / image.parent.name / image.name.removesuffix(IMAGE_ENDING)
            target = stem.with_name(stem.name + "_gtFine_labelTrainIds.png")
            jobs.append(Job(image, stem.with_name(stem.name + POLYGON_ENDING), target))
        tree = f"{images}/CITY/*{IMAGE_ENDING} and {labels}/CITY/*{POLYGON_ENDING}"
        jobs = match_halves(report, jobs, list(labels.glob(f"*/*{POLYGON_ENDING}")), tree)
        if jobs:
            is_any = True
            results = prepare_all(report, jobs, f"cityscapes_{split}", draw_polygons, root)
            conclude(report, root, f"cityscapes_{split}", results, expected)
    require_any(is_any, report, root)


def main() -> int:
    args = build_parser(__doc__).parse_args()
    return run_program("cityscapes", args.root, prepare, jobs=args.jobs, is_strict=args.strict)


if __name__ == "__main__":
    sys.exit(main())
