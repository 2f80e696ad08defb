#!/usr/bin/env python
"""Show what the encoders see: principal components before and after adaptation, and how much patches are like words.

    python tools/visualize_features.py --config-file F --input a.jpg b.jpg --output seen --opts MODEL.WEIGHTS W
    python tools/visualize_features.py --config-file F --input a.jpg --words "road,tractor" --output seen --opts ...

features.png has a row per image and a column per encoder and state; a column's colours are the first three principal
components of all its images together, so equal colours mean equal features. words_before.png and words_after.png have a
column per word; one colour means one cosine everywhere in the picture. Words may be any that the text encoder reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

import mfuser_d2  # noqa: E402

try:
    mfuser_d2.require_detectron2()
except RuntimeError as error:
    sys.exit(str(error))

from mfuser_d2.core.backbone import DENSE_EMBEDDING  # noqa: E402
from mfuser_d2.core.ops.grid import map_to_tokens  # noqa: E402
from mfuser_d2.core.probe import (  # noqa: E402
    PatchTokens,
    adapted_tokens,
    encoder_parts,
    frozen_similarity_inputs,
    frozen_tokens,
)
from mfuser_d2.d2 import one_line_errors  # noqa: E402
from mfuser_d2.predictor import Predictor, clean_names  # noqa: E402
from mfuser_d2.visualization import (  # noqa: E402
    common_range,
    draw_color_bar,
    draw_grid,
    fit_principal_axes,
    paint_components,
    paint_heat,
    text_similarity,
)
from mfuser_d2.visualization.photos import read_photo  # noqa: E402

_MAX_WORDS = 40  # columns of a picture that can still be opened
_ENCODERS = {"vfm": "VFM", "vlm": "VLM"}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--input", required=True, nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--words", metavar="A,B,...", help="heat maps of these words (default: the config's classes)")
    parser.add_argument("--short-side", type=int, help="pixels that pictures are scaled to (default: the window's)")
    parser.add_argument("--panel-width", type=int, default=384, help="pixels of each panel (default: 384)")
    parser.add_argument("--patches", action="store_true", help="show the patches as squares instead of smoothly")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that change the config")
    args = parser.parse_args(words)
    if args.panel_width < 16 or (args.short_side is not None and args.short_side < 16):
        parser.error("--panel-width and --short-side have to be at least 16 pixels")
    return args


def main(words: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(words)
    with one_line_errors():
        names = clean_names(args.words.split(",")) if args.words else None
        if names is not None and len(names) > _MAX_WORDS:
            raise ValueError(f"--words has {len(names)} words, at most {_MAX_WORDS} fit into a picture")
        args.output.mkdir(parents=True, exist_ok=True)
        images, problems = read_all(args.input)
        if images:
            predictor = Predictor(args.config_file, opts=args.opts, classes=names)
            images = {name: scaled(image, predictor, args.short_side) for name, image in images.items()}
            for path in draw_all(predictor, images, args):
                print(path)
    for problem in problems:
        print(f"not done: {problem}", file=sys.stderr)
    return 1 if problems else 0


def read_all(paths: list[Path]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Pictures by file name, and what could not be read."""
    images, problems = {}, []
    for path in paths:
        try:
            images[path.name if path.name not in images else str(path)] = read_photo(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return images, problems


def scaled(image: np.ndarray, predictor: Predictor, short_side: int | None) -> np.ndarray:
    """A picture whose short side is as wanted, both sides whole numbers of patches; seen in one pass, so not too long.

    A side is at most four times the short one: what is longer is cut off at the end.
    """
    settings = predictor.model.inference
    short_side = short_side or min(settings.crop_size)
    patches = [tower.patch_size for tower, _ in encoder_parts(predictor.model.backbone.encoder).values()]
    steps = [int(np.lcm.reduce(edges)) for edges in zip(*patches)]
    factor = short_side / min(image.shape[:2])
    size = [max(2, round(edge * factor / step)) * step for edge, step in zip(image.shape[:2], steps)]
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    longest = [max(4 * short_side // step, 2) * step for step in steps]
    return cv2.resize(image, (size[1], size[0]), interpolation=method)[: longest[0], : longest[1]]


def draw_all(predictor: Predictor, images: dict[str, np.ndarray], args: argparse.Namespace) -> list[Path]:
    """Draw and save every view; returns the files."""
    model = predictor.model
    tensors = [model.normalize(torch.from_numpy(image).permute(2, 0, 1))[None] for image in images.values()]
    files = {"features.png": draw_features(model, images, tensors, args)}
    for state, similarity in (("before", similarity_before), ("after", similarity_after)):
        try:
            maps = [similarity(model, tensor) for tensor in tensors]
        except ValueError as error:
            print(f"no words_{state}.png: {error}")
            continue
        files[f"words_{state}.png"] = draw_words(maps, images, predictor.class_names, args)
    paths = []
    for name, picture in files.items():
        paths.append(args.output / name)
        Image.fromarray(picture).save(paths[-1])
    return paths


def draw_features(
    model: torch.nn.Module, images: dict[str, np.ndarray], tensors: list[Tensor], args: argparse.Namespace
) -> np.ndarray:
    """Components of each encoder before and after adaptation, one row per image."""
    encoder = model.backbone.encoder
    before = [frozen_tokens(encoder, tensor) for tensor in tensors]
    after = [adapted_tokens(encoder, tensor) for tensor in tensors]
    heads, columns = ["image"], [list(images.values())]
    for name in before[0]:
        for state, found in (("before", before), ("after", after)):
            parts: list[PatchTokens] = [tokens[name] for tokens in found]
            axes = fit_principal_axes([part.tokens for part in parts])
            heads.append(f"{_ENCODERS[name]} {state} ({100 * axes.explained.sum():.0f}% of variance)")
            columns.append(
                [
                    paint_components(
                        part.tokens, part.grid, axes, size=image.shape[:2], is_smooth=not args.patches
                    )
                    for part, image in zip(parts, images.values())
                ]
            )
    return draw_grid(list(zip(*columns)), heads=heads, captions=list(images), panel_width=args.panel_width)


@torch.no_grad()
def similarity_before(model: torch.nn.Module, image: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """Cosines (K, h*w) of words and patches in the published vision-language model."""
    patches, texts = frozen_similarity_inputs(model.backbone.encoder, model.sem_seg_head.text_encoder, image)
    return text_similarity(patches.tokens, texts), patches.grid


@torch.no_grad()
def similarity_after(model: torch.nn.Module, image: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """Cosines (K, h*w) of refined words and fused patches: what the alignment loss works on."""
    features = model.backbone(image)
    dense = features[DENSE_EMBEDDING]
    texts = model.sem_seg_head.refined_texts(features)
    return text_similarity(map_to_tokens(dense)[0], texts[0]), tuple(dense.shape[-2:])


def draw_words(
    maps: list[tuple[np.ndarray, tuple[int, int]]],
    images: dict[str, np.ndarray],
    names: list[str],
    args: argparse.Namespace,
) -> np.ndarray:
    """Heat maps, one row per image and one column per word, with a scale below."""
    value_range = common_range([values for values, _ in maps])
    rows = [
        [image, *(paint_heat(word, grid, value_range=value_range, image=image) for word in values)]
        for (values, grid), image in zip(maps, images.values())
    ]
    picture = draw_grid(rows, heads=["image", *names], captions=list(images), panel_width=args.panel_width)
    bar = draw_color_bar(value_range, width=picture.shape[1], label="cosine of word and patch")
    return np.concatenate([picture, bar])


if __name__ == "__main__":
    sys.exit(main())
