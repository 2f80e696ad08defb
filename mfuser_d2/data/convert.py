"""From a publisher's label files to trainId PNGs, and the check at the end of every preparation.

The publisher's files are read, never changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mfuser_d2.data.labels import CLASSES, IGNORE_LABEL, NUM_CLASSES, to_train_ids
from mfuser_d2.data.prepare import Report, encode_png, is_current, read_record, write_atomically, write_record
from mfuser_d2.data.reading import UNREADABLE, check_pixels, read_ids, read_labels, read_size

VERSION = 1
"""Raised whenever the same source would give another target; older targets are then made again."""

USUAL_PERCENT: dict[str, tuple[float, float]] = {
    "road": (8, 65), "building": (2, 55), "vegetation": (1, 50), "sky": (0.5, 55), "car": (0.3, 30),
    **dict.fromkeys(("pole", "traffic light", "traffic sign", "rider", "train", "motorcycle", "bicycle"), (0, 8)),
}  # fmt: skip
"""From and to which percentage of the labelled pixels a class covers in street scenes; wide, as it is to show exchanged
ids, not an unusual selection."""

ReadIds = Callable[[Path], np.ndarray]


@dataclass(frozen=True)
class Job:
    """One pair: the image, the publisher's labels, and where the trainIds go (the labels themselves if they are it)."""

    image: Path
    source: Path
    target: Path


@dataclass(frozen=True)
class Checked:
    """What came of one pair: pixels of each class (19,) and ignored, its size, or what is wrong with it."""

    job: Job
    counts: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    problem: str = ""

    @property
    def is_blank(self) -> bool:
        return self.counts is not None and not self.counts[:NUM_CLASSES].any()


@dataclass(frozen=True)
class Expected:
    """What the complete data set looks like.

    Args:
        num_pairs: of the complete set.
        absent: classes that never occur.
        size: (height, width) of the images, or None where it varies.
        has_all: every class but the absent ones is known to occur; else a missing one is only noted.
    """

    num_pairs: int
    absent: Sequence[str] = field(default_factory=tuple)
    size: tuple[int, int] | None = None
    has_all: bool = True


def read_palette_ids(path: Path) -> np.ndarray:
    """Indices of a palette PNG (or the values of a grey one), (H, W) uint8. OpenCV would give colours.

    Raises:
        ValueError: truncated, or a colour picture.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L"):
                raise ValueError(
                    f"label file {path} has mode {picture.mode}, wanted palette indices (P) or ids (L): these are "
                    "colours; unpack the publisher's label archive again"
                )
            check_pixels(path, picture.height, picture.width, "label file")
            return np.array(picture)
    except UNREADABLE as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"label file {path} cannot be read ({error}); unpack it again") from error


def read_synthia_ids(path: Path) -> np.ndarray:
    """The last channel (OpenCV's order) of a uint16 PNG with three, (H, W) uint16."""
    channels = read_ids(path)
    if channels.ndim != 3 or channels.dtype != np.uint16:
        raise ValueError(
            f"label file {path} is {channels.shape} {channels.dtype}, wanted three channels of uint16; use GT/LABELS, "
            "not GT/COLOR"
        )
    return np.ascontiguousarray(channels[..., -1])


def translate(job: Job, *, read: ReadIds, mapping: Mapping[int, int], num_ids: int) -> np.ndarray:
    """The trainIds of a publisher's label file, (H, W) uint8.

    Raises:
        ValueError: an id that the publisher does not define.
    """
    ids = read(job.source)
    unknown = [int(v) for v in np.unique(ids) if v >= num_ids]
    if unknown:
        raise ValueError(f"label file {job.source} holds unknown ids {unknown[:8]}, wanted 0 to {num_ids - 1}")
    return to_train_ids(ids, mapping)


Translate = Callable[[Job], np.ndarray]


def prepare_pair(job: Job, *, make: Translate | None, is_forced: bool = False) -> Checked:
    """Make the target where it is missing, damaged or older than its source, and check the pair.

    A bad pair is a `Checked` with a problem, and of bad labels no target stays; only what stops everything (a full
    disk) is raised.
    """
    try:
        size = read_size(job.image)
    except (ValueError, FileNotFoundError) as error:
        return Checked(job, problem=str(error))
    try:
        labels = None
        if make is None or (not is_forced and is_current(job.target, [job.source])):
            labels = _read_made(job, is_kept=make is None)
        if labels is None:
            labels = make(job)
            _check_size(job, size, labels)
            write_atomically(job.target, encode_png(labels))
            labels = read_labels(job.target)
        _check_size(job, size, labels)
    except (ValueError, FileNotFoundError) as error:
        if make is not None:
            job.target.unlink(missing_ok=True)  # of a source that was good once
        return Checked(job, problem=str(error))
    counts = np.bincount(labels.ravel(), minlength=256)
    return Checked(job, np.append(counts[:NUM_CLASSES], counts[IGNORE_LABEL]), size)


def _read_made(job: Job, *, is_kept: bool) -> np.ndarray | None:
    """What lies at the target; None where it is damaged and may be made again."""
    try:
        return read_labels(job.target)
    except ValueError:
        if is_kept:
            raise
        return None


def _check_size(job: Job, size: tuple[int, int], labels: np.ndarray) -> None:
    if labels.shape != size:
        raise ValueError(_size_problem(job.image, size, job.source, labels.shape))


def _size_problem(image: Path, size: tuple[int, int], labels: Path, label_size: tuple[int, ...]) -> str:
    return f"image {image} is {size[0]}x{size[1]} (H x W) but its labels {labels} are {label_size[0]}x{label_size[1]}"


def prepare_all(report: Report, jobs: Sequence[Job], what: str, make: Translate | None, root: Path) -> list[Checked]:
    """`prepare_pair` for all jobs over all cores; problems go to the report.

    Args:
        report: progress and problems.
        jobs: pairs whose both halves exist, see `match_halves`.
        what: the data set and split; also the name of the record under `root`.
        make: from a job to trainIds, picklable; None where the publisher's files hold trainIds already.
        root: of the data set.
    """
    is_forced = read_record(root, what).get("version", VERSION) != VERSION
    results = []
    for done in report.map(partial(prepare_pair, make=make, is_forced=is_forced), jobs, f"preparing {what}"):
        results.append(done)
        if done.problem:
            report.problem(done.problem)
    return results


def match_halves(report: Report, jobs: Sequence[Job], sources: Sequence[Path], expected: str) -> list[Job]:
    """The jobs whose both halves exist; each missing half becomes a problem, an empty split a note.

    Hidden files (archivers on macOS leave a `._NAME` beside each NAME) are no halves.

    Args:
        report: gets the problems.
        jobs: one for each image found.
        sources: all label files found; those of no job lack their image.
        expected: the folder tree, for the message when there is nothing at all.
    """
    report.num_before = len(report.problems)
    jobs = [job for job in jobs if not job.image.name.startswith(".")]
    sources = [source for source in sources if not source.name.startswith(".")]
    if not jobs and not sources:
        report.note(f"nothing there: {expected}")
    for job in jobs:
        if not job.source.is_file():
            report.problem(f"image {job.image} has no labels {job.source}; unpack the label archive again")
    for source in sorted(set(sources) - {job.source for job in jobs}):
        report.problem(f"label file {source} has no image; unpack the image archive again")
    return [job for job in jobs if job.source.is_file()]


def require_any(is_any: bool, report: Report, root: Path) -> None:
    """Raise ValueError when not one pair was found and no problem says why."""
    if not is_any and not report.problems:
        held = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
        raise ValueError(f"no pairs of images and labels in {root}, which holds {held[:12] or 'nothing'}; see above "
                         "for what is expected, and datasets/README.md for where to get it")  # fmt: skip


def conclude(
    report: Report, root: Path, what: str, results: Sequence[Checked], expected: Expected, **facts: object
) -> None:
    """Check the whole against what is expected, print class frequencies and keep a record beside the data.

    A smaller set than the publisher's is noted, not refused (`--strict` refuses it); classes that cannot occur, and in
    a complete set classes that are missing or cover an unusual part (`USUAL_PERCENT`), are problems.
    """
    good = [result for result in results if not result.problem]
    total = np.sum([result.counts for result in good], axis=0) if good else np.zeros(NUM_CLASSES + 1, np.int64)
    labelled = max(int(total[:NUM_CLASSES].sum()), 1)
    is_complete = len(good) >= expected.num_pairs
    if not is_complete:
        message = f"{what}: {len(good)} good pairs, the complete set has {expected.num_pairs}"
        report.problem(message) if report.is_strict else report.note(message)
    if good and not total[:NUM_CLASSES].any():
        report.problem(f"{what}: every pixel is ignored; these are not the publisher's ids")
    for index, name in enumerate(CLASSES):
        if name in expected.absent and total[index]:
            report.problem(f"{what}: {total[index]} pixels of {name}, which this data set does not have")
        if is_complete and name not in expected.absent and not total[index]:
            message = f"{what}: not one pixel of {name} in the complete set"
            report.problem(message) if expected.has_all else report.note(message)
    sizes = {result.size for result in good}
    if expected.size is not None and sizes - {expected.size}:
        height, width = expected.size
        report.note(f"{what}: sizes other than {height}x{width} (H x W): {sorted(sizes - {expected.size})[:5]}")
    frequencies = {name: round(100 * int(count) / labelled, 4) for name, count in zip(CLASSES, total, strict=False)}
    for name, (low, high) in USUAL_PERCENT.items():
        if is_complete and total[CLASSES.index(name)] and not low <= frequencies[name] <= high:
            report.problem(
                f"{what}: {frequencies[name]} % of the labelled pixels are {name}, expected {low} to {high} %; are "
                "these the publisher's own label files?"
            )
    report.note(
        f"{what}: {len(good)} pairs; % of labelled pixels: " + ", ".join(f"{k} {v}" for k, v in frequencies.items())
    )
    blank = [result.job.image.name for result in good if result.is_blank]
    if blank:
        report.note(f"{what}: {len(blank)} frames are ignored everywhere, such as {', '.join(blank[:5])}")
    ignored = round(100 * int(total[NUM_CLASSES]) / max(int(total.sum()), 1), 4)
    record = {
        "version": VERSION,
        "pairs": len(good),
        "problems": report.num_new,
        "class_percent": frequencies,
        "ignored_percent": ignored,
        "blank": blank,
        **facts,
    }
    write_record(root, what, record)
    report.num_before = len(report.problems)


def halve_image(source: Path, target: Path) -> None:
    """Write a bicubic copy of half the size as JPEG, unless it is there already."""
    if is_current(target, [source]):
        return
    with Image.open(source) as picture:
        check_pixels(source, picture.height, picture.width)
        half = picture.convert("RGB").resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC)
    pixels = cv2.cvtColor(np.array(half), cv2.COLOR_RGB2BGR)
    is_done, content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 97])
    if not is_done:
        raise ValueError(f"cannot encode the half-size copy of {source}")
    write_atomically(target, content.tobytes())
