"""Where the files of each data set lie once it is prepared, and what to say when they do not.

No Detectron2 here: `list_pairs` serves plain loops as well. Nothing is read before it is called.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

Pair = tuple[Path, Path]
"""An image and its trainId labels."""

ROOT_VARIABLE = "DETECTRON2_DATASETS"
ACDC_CONDITIONS = ("fog", "night", "rain", "snow")
LABEL_FOLDER = "labels_train_ids"
SPLIT_FOLDER = "splits"


def data_root() -> Path:
    """The folder above all data sets, as it is set now: $DETECTRON2_DATASETS or ./datasets."""
    return Path(os.path.expanduser(os.environ.get(ROOT_VARIABLE, "datasets")))


@dataclass(frozen=True)
class Layout:
    """One registered name.

    Args:
        name: what DATASETS.TRAIN and DATASETS.TEST call it.
        folder: below the data root.
        tree: the files it needs, for the error message.
        program: the preparation program under datasets/.
        find: from the data set's folder to its pairs, sorted; empty if nothing is there.
        extra: further metadata, such as the label mapping behind the numbers.
    """

    name: str
    folder: str
    tree: str
    program: str
    find: Callable[[Path], list[Pair]]
    extra: dict[str, object] = field(default_factory=dict)


def _glob(images: Path, labels: Path, suffixes: Iterable[str], rename: Callable[[str], str]) -> list[Pair]:
    """Pairs of files at the same place below two folders."""
    found = [p for suffix in suffixes for p in images.rglob(f"*{suffix}") if not p.name.startswith(".")]
    return [(p, labels / p.parent.relative_to(images) / rename(p.name)) for p in sorted(found)]


def _as_png(name: str) -> str:
    return str(Path(name).with_suffix(".png"))


def _listed(images: str, split: str) -> Callable[[Path], list[Pair]]:
    """Pairs named in splits/<split>.txt, one path below the image folder a line."""

    def find(root: Path) -> list[Pair]:
        listing = root / SPLIT_FOLDER / f"{split}.txt"
        if not listing.is_file():
            return []
        names = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(root / images / name, root / LABEL_FOLDER / name) for name in names]

    return find


def _streets(split: str) -> Callable[[Path], list[Pair]]:
    return lambda root: _glob(root / "images" / split, root / "labels" / split, (".png",), _as_png)


def _cityscapes(split: str) -> Callable[[Path], list[Pair]]:
    def find(root: Path) -> list[Pair]:
        images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
        ending = "_leftImg8bit.png"
        return _glob(images, labels, (ending,), lambda n: n.removesuffix(ending) + "_gtFine_labelTrainIds.png")

    return find


def _bdd100k(split: str) -> Callable[[Path], list[Pair]]:
    def find(root: Path) -> list[Pair]:
        pairs = _glob(root / "images/10k" / split, root / "labels/sem_seg/masks" / split, (".jpg",), _as_png)
        older = _glob(root / "seg/images" / split, root / "seg/labels" / split, (".jpg",),
                      lambda n: f"{Path(n).stem}_train_id.png")  # fmt: skip
        return pairs or older

    return find


def _mapillary(split: str, labels: str, images: str = "images") -> Callable[[Path], list[Pair]]:
    return lambda root: _glob(root / split / images, root / split / labels, (".jpg", ".png"), _as_png)


def _acdc(condition: str, split: str) -> Callable[[Path], list[Pair]]:
    def find(root: Path) -> list[Pair]:
        images, labels = root / "rgb_anon" / condition / split, root / "gt" / condition / split
        return _glob(images, labels, ("_rgb_anon.png",), lambda n: n.replace("_rgb_anon", "_gt_labelTrainIds"))

    return find


def _all_layouts() -> Iterable[Layout]:
    for split in ("train", "val", "test", "all"):
        tree = f"images/NNNNN.png, {LABEL_FOLDER}/NNNNN.png, {SPLIT_FOLDER}/{split}.txt"
        yield Layout(f"gta5_sem_seg_{split}", "gta5", tree, "prepare_gta5.py", _listed("images", split))
    for split in ("train", "val", "all"):
        tree = f"RGB/NNNNNNN.png, {LABEL_FOLDER}/NNNNNNN.png, {SPLIT_FOLDER}/{split}.txt"
        yield Layout(f"synthia_sem_seg_{split}", "synthia", tree, "prepare_synthia.py", _listed("RGB", split))
    for split in ("train", "val"):
        yield Layout(
            f"cityscapes_fine_sem_seg_{split}",
            "cityscapes",
            f"leftImg8bit/{split}/CITY/*_leftImg8bit.png, gtFine/{split}/CITY/*_gtFine_labelTrainIds.png",
            "prepare_cityscapes.py",
            _cityscapes(split),
        )
        yield Layout(
            f"bdd100k_sem_seg_{split}",
            "bdd100k",
            f"images/10k/{split}/*.jpg, labels/sem_seg/masks/{split}/*.png "
            f"(older release: seg/images/{split}/*.jpg, seg/labels/{split}/*_train_id.png)",
            "prepare_bdd100k.py",
            _bdd100k(split),
        )
        folder = {"train": "training", "val": "validation"}[split]
        for mapping, infix in (("openseg", ""), ("robustnet", "_robustnet")):
            for half in ("", "_half"):
                labels, images = f"{LABEL_FOLDER}_{mapping}{half}", f"images{half}"
                yield Layout(
                    f"mapillary19{infix}{half}_sem_seg_{split}",
                    "mapillary",
                    f"{folder}/{images}/*, {folder}/{labels}/*.png",
                    f"prepare_mapillary.py --mapping {mapping}" + (" --half" if half else ""),
                    _mapillary(folder, labels, images),
                    {"label_mapping": mapping, "is_half_resolution": bool(half)},
                )
        for condition in ACDC_CONDITIONS:
            yield Layout(
                f"acdc_{condition}_sem_seg_{split}",
                "acdc",
                f"rgb_anon/{condition}/{split}/*/*_rgb_anon.png, gt/{condition}/{split}/*/*_gt_labelTrainIds.png",
                "prepare_acdc.py",
                _acdc(condition, split),
            )
        yield _street_layout(f"streets_sem_seg_{split}", split)
    for split in ("night", "fog", "sketch"):
        yield _street_layout(f"streets_{split}_sem_seg_val", split)


def _street_layout(name: str, split: str) -> Layout:
    return Layout(name, "streets", f"images/{split}/*.png, labels/{split}/*.png", "prepare_streets.py", _streets(split))


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _all_layouts()}


def list_pairs(name: str, root: str | Path | None = None) -> list[Pair]:
    """The image and label files behind a data set name.

    Args:
        name: a key of LAYOUTS.
        root: the folder above all data sets; None means $DETECTRON2_DATASETS as it is set now.
    Returns:
        (image, labels) paths in a fixed order; at least one.
    Raises:
        KeyError: unknown name.
        FileNotFoundError: the data set or half of a pair is missing; the message gives the tree it expects, what is
            there and the command that prepares it.
    """
    if name not in LAYOUTS:
        raise KeyError(f"data set {name!r} is unknown; choose from {sorted(LAYOUTS)}")
    layout = LAYOUTS[name]
    folder = (Path(root) if root is not None else data_root()) / layout.folder
    pairs = layout.find(folder)
    if not pairs:
        raise FileNotFoundError(_describe_missing(layout, folder, "no image was found there"))
    for column, kind in ((0, "image"), (1, "label file")):
        missing = [pair[column] for pair in pairs if not pair[column].is_file()]
        if missing:
            what = f"{len(missing)} of {len(pairs)} {kind}s are missing, the first is {missing[0]}"
            raise FileNotFoundError(_describe_missing(layout, folder, what))
    return pairs


def _describe_missing(layout: Layout, folder: Path, problem: str) -> str:
    if folder.is_dir():
        entries = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
        found = f"{folder} holds {', '.join(entries[:12]) or 'nothing'}" + (", ..." if len(entries) > 12 else "")
    else:
        found = f"{folder} does not exist ({ROOT_VARIABLE}={os.environ.get(ROOT_VARIABLE, '(unset: ./datasets)')})"
    program, *options = layout.program.split()
    command = " ".join(["python", f"datasets/{program}", str(folder), *options])
    return (
        f"data set {layout.name}: {problem}. Expected below {folder}: {layout.tree}. Found: {found}. "
        f"Prepare it with `{command}` (datasets/README.md says where to get it), or set {ROOT_VARIABLE}."
    )
