#!/usr/bin/env python
"""Draw what the network sees: images and labels as they are on disk, and the crops that augmentation makes of them.

python tools/visualize_data.py --dataset streets_sem_seg_train --output data.jpg
python tools/visualize_data.py --dataset streets_sem_seg_val streets_fog_sem_seg_val --no-crops --count 2
python tools/visualize_data.py --config-file configs/gta5/mfuser_eva02.yaml [KEY VALUE ...]

With --config-file the crops come from the training loader of that config (sources by weight, rare classes, seed), and
padding is drawn as the network does it: the pixel mean, no label. Without, Detectron2 is not needed.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mfuser_d2.data.labels import CLASSES, COLORS, IGNORE_LABEL, NUM_CLASSES  # noqa: E402
from mfuser_d2.data.layouts import list_pairs  # noqa: E402
from mfuser_d2.data.plain import TrainItems, train_loader  # noqa: E402
from mfuser_d2.data.reading import read_pair  # noqa: E402
from mfuser_d2.visualization import draw_grid, draw_legend, overlay_labels, paint_labels  # noqa: E402

PIXEL_MEAN = (123, 117, 104)
"""RGB; what a padded pixel is once the network has put it to zero after normalisation."""

MARGIN = 10

Row = tuple[str, list[np.ndarray], np.ndarray]
"""Caption, panels, and how many pixels of each class, and last of none, the row shows."""


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="registered names")
    parser.add_argument("--config-file", help="draw the items of this config's training loader instead")
    parser.add_argument("--output", type=Path, default=Path("data.jpg"), help="default: data.jpg")
    parser.add_argument("--count", type=int, default=4, help="images of each data set, or of the loader (default: 4)")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="crop size; default: half the image")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentation, without a config (default: 0)")
    parser.add_argument("--no-crops", action="store_true", help="draw only what is on disk")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")
    args = parser.parse_args(arguments)
    if bool(args.dataset) == bool(args.config_file):
        parser.error("give either --dataset NAME... or --config-file FILE")
    if args.opts and not args.config_file:
        parser.error(f"{args.opts} changes a config, but there is no --config-file")
    if args.count < 1:
        parser.error(f"--count {args.count} must be at least 1")
    return args


def pad(array: np.ndarray, size: tuple[int, int], value: Sequence[int] | int) -> np.ndarray:
    """The array in the upper left of a larger one."""
    padded = np.empty((*size, *array.shape[2:]), array.dtype)
    padded[:] = value
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def letterbox(panel: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The panel on white, as high and wide for its size as `like` is: panels of a row share one aspect."""
    aspect = like.shape[1] / like.shape[0]
    height, width = panel.shape[:2]
    full = (max(height, round(width / aspect)), max(width, round(height * aspect)))
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    boxed = np.full((*full, 3), 255, np.uint8)
    boxed[top : top + height, left : left + width] = panel
    return boxed


def panels_of(image: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    return [image, overlay_labels(image, labels, COLORS), paint_labels(labels, COLORS)]


def count(*maps: np.ndarray) -> np.ndarray:
    """Pixels of each class and, last, ignored ones over some label maps, (20,)."""
    counts = np.bincount(np.concatenate([labels.ravel() for labels in maps]), minlength=256)
    return np.append(counts[:NUM_CLASSES], counts[IGNORE_LABEL])


def describe(labels: np.ndarray) -> str:
    ignored = float((labels == IGNORE_LABEL).mean())
    return f"{labels.shape[0]}x{labels.shape[1]}, {ignored:.0%} ignored"


def row_of(item: dict, crop_size: tuple[int, int]) -> Row:
    """A loader's item beside the files it comes from."""
    image, labels = read_pair(item["file_name"], item["sem_seg_file_name"])
    crop, target = item["image"].permute(1, 2, 0).numpy(), item["sem_seg"].numpy().astype(np.uint8)
    crop, target = pad(crop, crop_size, PIXEL_MEAN), pad(target, crop_size, IGNORE_LABEL)
    caption = f"{item['file_name']}: {describe(labels)}; crop {describe(target)}"
    crops = [letterbox(panel, image) for panel in (crop, paint_labels(target, COLORS))]
    panels = [np.ascontiguousarray(image[..., ::-1]), paint_labels(labels, COLORS), *crops]
    return caption, panels, count(labels, target)


def rows_from_config(args: argparse.Namespace) -> Iterator[Row]:
    """Items of the config's own training loader."""
    import mfuser_d2

    mfuser_d2.require_detectron2()
    from mfuser_d2.d2 import load_config
    from mfuser_d2.data import build_train_loader

    cfg = load_config(args.config_file, args.opts)
    batches = build_train_loader(cfg)
    for item in itertools.islice(itertools.chain.from_iterable(batches), args.count):
        yield row_of(item, tuple(cfg.INPUT.CROP.SIZE))


def rows_from_names(args: argparse.Namespace) -> Iterator[Row]:
    """Augmented crops of each data set, or what is on disk evenly spread."""
    for name in args.dataset:
        if args.no_crops:
            pairs = list_pairs(name)
            for index in np.linspace(0, len(pairs) - 1, min(args.count, len(pairs))).round().astype(int):
                image, labels = read_pair(*pairs[index])
                panels = panels_of(np.ascontiguousarray(image[..., ::-1]), labels)
                caption = f"{name}: {pairs[index][0].name}, {describe(labels)}"
                yield caption, panels, count(labels)
            continue
        first = read_pair(*list_pairs(name)[0])[1]
        crop_size = tuple(args.crop or (max(first.shape[0] // 2, 1),) * 2)
        items = TrainItems(name=name, crop_size=crop_size, seed=args.seed)
        batches = train_loader(items, batch_size=1)
        for item in itertools.islice(itertools.chain.from_iterable(batches), args.count):
            yield row_of(item, crop_size)


def draw_rows(rows: Sequence[Row]) -> np.ndarray:
    """One picture with a legend of the classes that it shows, (H, W, 3) uint8 RGB."""
    captions, panels, counts = zip(*rows)
    heads = ["image", "labels", "crop", "crop labels"] if len(panels[0]) == 4 else ["image", "overlay", "labels"]
    grid = draw_grid(panels, heads=heads, captions=captions)
    shown = np.flatnonzero(np.sum(counts, axis=0))
    names, colors = (*CLASSES, "ignored"), (*COLORS, (0, 0, 0))
    legend = draw_legend([names[k] for k in shown], [colors[k] for k in shown], width=grid.shape[1] - 2 * MARGIN)
    legend = np.pad(legend, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)
    return np.concatenate([grid, legend])


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    try:
        rows = list(rows_from_config(args) if args.config_file else rows_from_names(args))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_rows(rows)).save(args.output)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"visualize_data: {message}", file=sys.stderr)
        return 1
    print(f"drew {len(rows)} images into {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
