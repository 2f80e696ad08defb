#!/usr/bin/env python
"""Segment your own pictures, videos or camera.

python tools/demo.py --config-file configs/gta5/mfuser_eva02.yaml --input street.jpg holiday/ "more/*.png" \\
    --output seen --opts MODEL.WEIGHTS output/gta5_mfuser_eva02/model_final.pth
python tools/demo.py --config-file F --video-input drive.mp4 --output seen --opts MODEL.WEIGHTS W
python tools/demo.py --config-file F --input street.jpg --classes "road,car,tractor" --output seen --opts ...
python tools/demo.py --config-file F --input street.jpg --compare A.pth B.pth --output seen

For every picture the output folder gets NAME_overlay.png and NAME_labels.png (values are the class numbers, shown in
the classes' colours), for every video NAME_overlay.mp4. Without --output a window shows them (Esc ends).
Exit status: 0 all inputs done, 1 some were not (each is named), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

import mfuser_d2  # noqa: E402

try:
    mfuser_d2.require_detectron2()
except RuntimeError as error:
    sys.exit(str(error))

import cv2  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from mfuser_d2.d2 import one_line_errors  # noqa: E402
from mfuser_d2.predictor import Predictor, clean_names  # noqa: E402
from mfuser_d2.visualization import draw_grid, overlay_labels  # noqa: E402
from mfuser_d2.visualization.label_png import save_label_png  # noqa: E402
from mfuser_d2.visualization.labels import classes_present  # noqa: E402
from mfuser_d2.visualization.overlay import add_legend, draw_overlay, lay_legend  # noqa: E402
from mfuser_d2.visualization.photos import read_photo  # noqa: E402
from mfuser_d2.visualization.video import READ_SUFFIXES, VIDEO_SUFFIXES, VideoReader, VideoWriter  # noqa: E402

PICTURE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jp2", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".tga")
)
"""What is taken from folders; files that are named may have any."""
_MAX_PANEL = 1280


@dataclass(frozen=True)
class Model:
    """A predictor and what it is called in file names and headings."""

    name: str
    predictor: Predictor


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="pictures, videos, folders, patterns like 'a/*.jpg'")
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", nargs="?", type=int, const=0, metavar="NUMBER", help="a camera (default: 0)")
    parser.add_argument("--output", metavar="PATH", help="folder, or a file for a single input; left out: a window")
    parser.add_argument("--classes", metavar="A,B,...", help="other class names, or @FILE with one a line")
    parser.add_argument(
        "--compare", nargs="+", metavar="[CONFIG:]WEIGHTS", help="checkpoints side by side, of --config-file or another"
    )
    parser.add_argument("--opacity", type=float, default=0.6, help="of the colours, 0..1 (default: 0.6)")
    parser.add_argument("--no-legend", action="store_true", help="leave the legend out")
    parser.add_argument(
        "--plain", action="store_true", help="flat colours without outlines and names: much faster, for videos"
    )
    parser.add_argument("--no-text", action="store_true", help="do not write names into the regions")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that change the config")
    args = parser.parse_args(words)
    if not 0 <= args.opacity <= 1:
        parser.error(f"--opacity {args.opacity} is outside 0..1")
    if not args.output and not _has_display():
        parser.error("there is no display to open a window on; give --output FOLDER")
    return args


def _has_display() -> bool:
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(words)
    with one_line_errors():
        names = read_classes(args.classes) if args.classes is not None else None
        paths, problems = find_inputs(args)
        output = Output(args.output, single=len(paths) == 1) if args.output else None
        if not paths:
            return report(0, problems, None)
        models = build_models(args, names)
    demo = Demo(models, output, args)
    done = 0
    try:
        for path in tqdm(paths, unit="input", disable=len(paths) < 2):
            try:
                demo.run(path)
                done += 1
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                problems.append(describe_problem(path, error))
                tqdm.write(f"error: {problems[-1]}", file=sys.stderr)
    except (KeyboardInterrupt, WindowClosed):
        problems.append("interrupted")
    return report(done, problems, output)


def describe_problem(path: Path | int, error: Exception) -> str:
    """What is wrong with an input, which it names once."""
    name = f"camera {path}" if isinstance(path, int) else str(path)
    message = str(error) or type(error).__name__
    return message if name in message else f"{name}: {message}"


def report(done: int, problems: list[str], output: Output | None) -> int:
    where = f", results in {output.folder}" if output and done else ""
    print(f"{done} input{'s' * (done != 1)} done{where}")
    for problem in problems:
        print(f"not done: {problem}", file=sys.stderr)
    return 1 if problems else 0


def read_classes(text: str) -> list[str]:
    """Names of --classes, checked before anything slow happens."""
    if not text.startswith("@"):
        return clean_names(text.split(","))
    lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    return clean_names([line for line in lines if line.strip()])


def find_inputs(args: argparse.Namespace) -> tuple[list[Path | int], list[str]]:
    """Files to work on, or the camera, and what could not be found."""
    if args.webcam is not None:
        return [args.webcam], []
    paths: list[Path | int] = []
    problems = []
    for word in [args.video_input] if args.video_input else args.input:
        path = Path(word).expanduser()
        if "://" in word:
            problems.append(f"{word} is an address; download it and give the file")
            continue
        if path.is_dir():
            known = PICTURE_SUFFIXES | READ_SUFFIXES
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in known and not p.name.startswith("."))
        elif not path.exists() and glob.has_magic(word):
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if not Path(p).is_dir())
        else:
            found = [path]
        if not found:
            problems.append(f"{word}: no pictures or videos there")
        paths.extend(p for p in found if p not in paths)
    return paths, problems


def build_models(args: argparse.Namespace, names: list[str] | None) -> list[Model]:
    """The predictors, one or several to compare."""
    models = []
    for text in args.compare or [None]:
        config, weights = args.config_file, None
        if text is not None:
            has_config = ".yaml:" in text
            config, weights = text.split(".yaml:", 1) if has_config else (config, text)
            config += ".yaml" if has_config else ""
        predictor = Predictor(config, weights, opts=args.opts)
        if names is not None:
            describe_classes(predictor.set_classes(names))
        models.append(Model("" if text is None else Path(weights).stem, predictor))
    if len({model.name for model in models}) < len(models):  # a/model_final.pth and b/model_final.pth
        models = [Model(f"{index}_{model.name}", model.predictor) for index, model in enumerate(models, 1)]
    return models


def describe_classes(parents: dict[str, tuple[str, float]]) -> None:
    """Say which words are new and what they lean on; no surprise should be hidden."""
    new = [(name, *parent) for name, parent in parents.items() if parent[0] != name]
    for name, parent, cosine in new[:20]:
        print(f"new class {name!r} was never trained on; it leans on {parent!r} (text similarity {cosine:.2f})")
    if len(new) > 20:
        print(f"... and {len(new) - 20} more new classes")
    if len(parents) == 1:
        print("with a single class every pixel gets it; name what else there is to see, too")


class WindowClosed(Exception):
    """Esc was pressed."""


class Output:
    """Where results go; names never collide.

    Args:
        place: a folder, made if needed, or a file for a single input.
        single: whether there is one input only.
    Raises:
        OSError, ValueError: it cannot be written, or is a file for several inputs.
    """

    def __init__(self, place: str, *, single: bool) -> None:
        path = Path(place).expanduser()
        is_file = path.suffix.lower() in PICTURE_SUFFIXES | set(VIDEO_SUFFIXES) and not path.is_dir()
        if is_file and not single:
            raise ValueError(f"--output {place} is a file, but there are several inputs; give a folder")
        self.file = path if is_file else None
        self.folder = path.parent if is_file else path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(f"--output {place} cannot be written to: {error.strerror}; choose another place") from error
        self._used: set[str] = set()

    def stem(self, path: Path | int) -> str:
        """A name for an input's files that no other input has."""
        stem = f"camera_{path}" if isinstance(path, int) else path.stem
        name, number = stem, 2
        while name.casefold() in self._used:
            name, number = f"{stem}_{number}", number + 1
        self._used.add(name.casefold())
        return name

    def picture(self, stem: str) -> Path:
        return self._own_or(PICTURE_SUFFIXES, f"{stem}_overlay.png")

    def video(self, stem: str) -> Path:
        return self._own_or(frozenset(VIDEO_SUFFIXES), f"{stem}_overlay.mp4")

    def _own_or(self, suffixes: Collection[str], name: str) -> Path:
        if self.file is None:
            return self.folder / name
        if self.file.suffix.lower() not in suffixes:
            raise ValueError(f"--output {self.file} has the wrong kind for this input; give a folder")
        return self.file


class Demo:
    """Runs the models over inputs and writes or shows what they see."""

    def __init__(self, models: list[Model], output: Output | None, args: argparse.Namespace) -> None:
        self.models, self.output, self.args = models, output, args

    def run(self, path: Path | int) -> None:
        """Work on one input, which raises what is wrong with it."""
        if isinstance(path, int) or self.args.video_input or path.suffix.lower() in READ_SUFFIXES:
            self._run_on_video(path)
        else:
            self._run_on_picture(path)

    def _overlays(self, image: np.ndarray, labels: list[np.ndarray], *, keeps_size: bool) -> list[np.ndarray]:
        if self.args.plain:
            return [
                overlay_labels(image, found, model.predictor.colors, opacity=self.args.opacity)
                for model, found in zip(self.models, labels)
            ]
        return [
            draw_overlay(
                image,
                found,
                model.predictor.class_names,
                model.predictor.colors,
                opacity=self.args.opacity,
                has_text=not self.args.no_text,
                keeps_size=keeps_size,
            )
            for model, found in zip(self.models, labels)
        ]

    def _classes(self) -> tuple[list[str], list[tuple[int, int, int]]]:
        return self.models[0].predictor.class_names, self.models[0].predictor.colors

    def _run_on_picture(self, path: Path) -> None:
        start = time.perf_counter()
        image = read_photo(path)
        labels = [model.predictor.labels(image) for model in self.models]
        seconds = time.perf_counter() - start
        drawn = self._overlays(image, labels, keeps_size=False)
        if len(drawn) > 1:
            heads = ["image", *(model.name for model in self.models)]
            picture = draw_grid([[image, *drawn]], heads=heads, panel_width=min(drawn[0].shape[1], _MAX_PANEL))
        else:
            picture = drawn[0]
        if not self.args.no_legend:
            picture = add_legend(picture, labels, *self._classes())
        if self.output is None:
            show(path.name, picture, wait=0)
            return
        stem = self.output.stem(path)
        target = self.output.picture(stem)
        _refuse_overwriting(path, target)
        Image.fromarray(picture).save(target)
        for model, found in zip(self.models, labels):
            suffix = f"_{model.name}" if model.name else ""
            save_label_png(self.output.folder / f"{stem}{suffix}_labels.png", found, model.predictor.colors)
        size = f"{image.shape[1]}x{image.shape[0]}"
        tqdm.write(f"{path} ({size}) in {seconds:.1f} s: {target}")

    def _run_on_video(self, path: Path | int) -> None:
        reader = VideoReader(path)
        try:
            if self.output is None:
                for picture in self._video_pictures(reader):
                    show(reader.name, picture, wait=1)
            else:
                self._write_video(reader, path)
        finally:
            reader.close()
        if reader.count == 0:
            raise ValueError("no frame of the video can be decoded")
        if reader.ended_early:
            raise ValueError(
                f"the video ended after {reader.count} of the {reader.announced} frames that its header announces; "
                "what there was is done"
            )

    def _write_video(self, reader: VideoReader, path: Path | int) -> None:
        target = self.output.video(self.output.stem(path))
        if isinstance(path, Path):
            _refuse_overwriting(path, target)
        try:
            with VideoWriter(target, frame_rate=reader.frame_rate) as writer:
                for picture in self._video_pictures(reader):
                    writer.write(picture)
        finally:
            if reader.count:
                tqdm.write(f"{reader.name}: {reader.count} frames, {reader.frame_rate:g} per second: {target}")

    def _video_pictures(self, reader: VideoReader) -> Iterator[np.ndarray]:
        """Drawn frames as large as the source's; models that are compared stand side by side."""
        used: set[int] = set()  # grows only, so that the legend does not flicker
        for image in tqdm(reader, total=reader.announced or None, unit="frame", desc=Path(reader.name).name):
            labels = [model.predictor.labels(image) for model in self.models]
            drawn = self._overlays(image, labels, keeps_size=True)
            used.update(classes_present(labels, len(self.models[0].predictor.class_names)))
            if not self.args.no_legend:
                drawn[0] = lay_legend(drawn[0], sorted(used), *self._classes())
            if len(drawn) > 1:
                drawn = [_titled(picture, model.name) for picture, model in zip(drawn, self.models)]
            yield np.concatenate(drawn, axis=1)


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
    size = max(0.4, picture.shape[1] / 1200)
    for color, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
        cv2.putText(picture, title, (8, round(34 * size) + 6), cv2.FONT_HERSHEY_SIMPLEX, size, color, thickness)
    return picture


def _refuse_overwriting(source: Path, target: Path) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"the result would overwrite its input {source}; choose another --output")


def show(title: str, picture: np.ndarray, *, wait: int) -> None:
    """Show a picture; `wait` milliseconds for a key, 0 for as long as it takes.

    Raises:
        WindowClosed: Esc.
        RuntimeError: this OpenCV cannot open windows.
    """
    try:
        cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        cv2.imshow(title, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(wait)
    except cv2.error as error:
        raise RuntimeError("this OpenCV cannot open windows (a headless build?); give --output FOLDER") from error
    if key == 27:
        raise WindowClosed


if __name__ == "__main__":
    sys.exit(main())
