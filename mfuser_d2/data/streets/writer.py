"""Writes the streets data set to disk."""

from functools import partial
from pathlib import Path

from mfuser_d2.data.prepare import Report, encode_png, read_record, write_atomically, write_record
from mfuser_d2.data.streets import DEFAULT_SIZE, SPLITS, VERSION, draw_street

_PIECE = tuple[str, int]


def _paths(root: Path, piece: _PIECE) -> tuple[Path, Path]:
    split, index = piece
    return root / "images" / split / f"{index:05d}.png", root / "labels" / split / f"{index:05d}.png"


def _write_one(piece: _PIECE, *, root: Path, seed: int, size: tuple[int, int]) -> None:
    image_path, label_path = _paths(root, piece)
    if image_path.is_file() and label_path.is_file():
        return
    image, labels = draw_street(split=piece[0], index=piece[1], seed=seed, size=size)
    write_atomically(label_path, encode_png(labels))
    write_atomically(image_path, encode_png(image))


def write_streets(
    root: Path,
    *,
    report: Report,
    num_train: int = 300,
    num_val: int = 40,
    size: tuple[int, int] = DEFAULT_SIZE,
    seed: int = 0,
) -> None:
    """Draw all splits below root as images/<split>/NNNNN.png and labels/<split>/NNNNN.png.

    Files of an earlier run with the same settings are kept, those of other settings replaced; the settings are kept in
    prepared_streets.json.

    Args:
        root: the data set's folder.
        report: progress.
        num_train, num_val: pictures of the training split and of each other split.
        size: (height, width), pixels.
        seed: another seed is another town.
    Raises:
        ValueError: no pictures asked for, or size below 64 pixels.
        OSError: a file cannot be written.
    """
    if num_train < 1 or num_val < 1:
        raise ValueError(f"num_train={num_train} and num_val={num_val} must both be at least 1")
    if min(size) < 64:
        raise ValueError(f"size={size} is too small for a street; both sides must be at least 64 pixels")
    settings = {"version": VERSION, "size": list(size), "seed": seed}
    counts = {name: num_train if split.is_train else num_val for name, split in SPLITS.items()}
    is_same_town = read_record(root, "streets").get("settings") == settings
    pieces = [(name, index) for name, count in counts.items() for index in range(count)]
    wanted = {path for piece in pieces for path in _paths(root, piece)}
    for path in (p for name in SPLITS for kind in ("images", "labels") for p in (root / kind / name).glob("*.png")):
        if not is_same_town or path not in wanted:
            path.unlink()
    write_record(root, "streets", {"settings": settings, "counts": counts})
    missing = [piece for piece in pieces if not all(path.is_file() for path in _paths(root, piece))]
    for _ in report.map(partial(_write_one, root=root, seed=seed, size=size), missing, "drawing streets"):
        pass
    report.note(f"streets: drew {len(missing)} of {len(pieces)} pictures of {size[0]}x{size[1]}")
