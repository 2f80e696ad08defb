#!/usr/bin/env python
"""Write a trained model as ONNX and as a torch.export program, and check both against the model itself.

    python tools/export_model.py --config-file configs/gta5/mfuser_eva02.yaml --output exported \\
        --opts MODEL.WEIGHTS output/gta5_mfuser_eva02/model_final.pth

Both take one window, RGB (1, 3, H, W) float32 0..255, and give scores (1, K, H, W); the class texts are folded in, the
text encoder is not needed any more. model.json says window, stride and classes. Exit status 1 if an exported file and
the model differ by more than 1e-3 of the largest score.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import mfuser_d2  # noqa: E402

try:
    mfuser_d2.require_detectron2()
except RuntimeError as error:
    sys.exit(str(error))

from mfuser_d2.core.export import (  # noqa: E402
    INPUT,
    WindowModel,
    export_onnx,
    export_program,
    relative_difference,
)
from mfuser_d2.d2 import one_line_errors  # noqa: E402
from mfuser_d2.predictor import Predictor  # noqa: E402

TOLERANCE = 1e-3
_SEEDS = (0, 1)  # the window it was exported with, and another: a value that was baked in would show


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--formats", nargs="+", choices=["onnx", "program"], default=["onnx", "program"])
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="window in pixels (default: INFERENCE.CROP_SIZE)"
    )
    parser.add_argument("--classes", metavar="A,B,...", help="other class names, see tools/demo.py")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that change the config")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(words)
    with one_line_errors():
        args.output.mkdir(parents=True, exist_ok=True)
        opts = [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.MFUSER.PRECISION", "float32"]
        predictor = Predictor(args.config_file, opts=opts)
        if args.classes is not None:
            predictor.set_classes(args.classes.split(","))
        model = WindowModel(predictor.model, size=tuple(args.size or predictor.model.inference.crop_size))
        windows = [model.example(seed) for seed in _SEEDS]
        with torch.no_grad():
            wanted = [model(window) for window in windows]
    describe(args.output / "model.json", predictor, model)
    start = time.perf_counter()
    with one_line_errors():
        program = export_program(model, args.output / "model.pt2")
    results = []
    if "program" in args.formats:
        results.append(check("torch.export", args.output / "model.pt2", run_program, windows, wanted, start))
    if "onnx" in args.formats:
        start = time.perf_counter()
        try:
            export_onnx(program, windows[0], args.output / "model.onnx")
            results.append(check("ONNX", args.output / "model.onnx", load_onnx, windows, wanted, start))
        except (RuntimeError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            results.append(False)
    if "program" not in args.formats:
        (args.output / "model.pt2").unlink()
    return 0 if all(results) else 1


def describe(path: Path, predictor: Predictor, model: WindowModel) -> None:
    """Write what a user of the files has to know besides."""
    settings = predictor.model.inference
    about = {
        "input": {"name": INPUT, "shape": [1, 3, *model.size], "dtype": "float32", "content": "RGB, 0..255"},
        "output": {"name": "scores", "shape": [1, len(predictor.class_names), *model.size]},
        "stride": list(settings.stride),
        "combine": "average the scores of overlapping windows, then argmax over the classes",
        "classes": predictor.class_names,
        "colors": [list(color) for color in predictor.colors],
    }
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def run_program(path: Path) -> Callable[[Tensor], Tensor]:
    """The saved program as a function."""
    return torch.export.load(str(path)).module()


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The ONNX file as a function, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda window: torch.from_numpy(session.run(None, {INPUT: window.numpy()})[0])


def check(
    name: str,
    path: Path,
    load: Callable[[Path], Callable[[Tensor], Tensor]],
    windows: list[Tensor],
    wanted: list[Tensor],
    start: float,
) -> bool:
    """Read a file back, run it, and say how far it is from the model."""
    written = time.perf_counter() - start
    run = load(path)
    start = time.perf_counter()
    with torch.no_grad():
        got = [run(window) for window in windows]
    seconds = (time.perf_counter() - start) / len(windows)
    difference = max(relative_difference(a, b) for a, b in zip(got, wanted))
    same = min(float((a.argmax(1) == b.argmax(1)).float().mean()) for a, b in zip(got, wanted))
    is_good = difference <= TOLERANCE
    size = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")) / 1e6
    print(
        f"{name}: {path} ({size:.1f} MB, written in {written:.0f} s), {seconds:.2f} s a window, largest difference "
        f"{difference:.1e} of the largest score, {100 * same:.3f}% of the labels alike: {'good' if is_good else 'BAD'}"
    )
    return is_good


if __name__ == "__main__":
    sys.exit(main())
