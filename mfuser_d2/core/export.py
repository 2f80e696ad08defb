"""The network as one graph: a window of fixed size in, class scores out, class texts folded in."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mfuser_d2.core.encoders.tower import VisionTower
from mfuser_d2.core.inference import Size
from mfuser_d2.core.ops.selective_scan import scan_backend
from mfuser_d2.core.segmenter import Segmenter

ONNX_OPSET = 17
INPUT, OUTPUT = "image", "scores"
_MAX_PROTOBUF = 1_900_000_000  # bytes; the format ends at 2 GiB


class FoldedTexts(nn.Module):
    """Class texts that are computed already, in the text encoder's place.

    Args:
        texts: (K, E).
    """

    def __init__(self, texts: Tensor) -> None:
        super().__init__()
        self.register_buffer("texts", texts)

    @property
    def num_classes(self) -> int:
        return self.texts.shape[0]

    @property
    def joint_dim(self) -> int:
        return self.texts.shape[1]

    def forward(self) -> Tensor:
        """(K, E)."""
        return self.texts


class WindowModel(nn.Module):
    """What is exported: normalisation, backbone and head in one.

    Args:
        segmenter: in eval mode and float32; it is changed: its text encoder makes way for the texts it gives, and its
            position tables for those of this size.
        size: height and width of the window in pixels.
    Raises:
        ValueError: a segmenter of another precision.
    """

    def __init__(self, segmenter: Segmenter, *, size: Size) -> None:
        super().__init__()
        if segmenter.precision != "float32":
            raise ValueError(
                f"MODEL.MFUSER.PRECISION={segmenter.precision!r} would fix the graph to it; export in 'float32'"
            )
        head = segmenter.eval().requires_grad_(False).sem_seg_head
        with torch.no_grad():
            head.text_encoder = FoldedTexts(head.text_encoder().clone())
            head.class_texts()  # fills the head's cache, which must not happen while the graph is recorded
        for tower in segmenter.modules():
            if isinstance(tower, VisionTower):
                tower.fix_image_size(tuple(size))
        self.segmenter = segmenter
        self.size = tuple(size)

    def forward(self, image: Tensor) -> Tensor:
        """RGB (1, 3, height, width) float32, 0..255, to scores (1, K, height, width); argmax over K gives labels."""
        mean, std = self.segmenter.pixel_mean, self.segmenter.pixel_std
        return self.segmenter.window_scores((image - mean) / std)

    def example(self, seed: int = 0) -> Tensor:
        """A window of soft random colours, (1, 3, height, width), 0..255; the same for a seed."""
        coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 255
        image = nn.functional.interpolate(coarse, size=self.size, mode="bilinear", align_corners=False)
        return image.to(self.segmenter.device)


@torch.no_grad()
def export_program(model: WindowModel, path: str | Path) -> torch.export.ExportedProgram:
    """Write a `torch.export` program (.pt2); `torch.export.load(path).module()` runs it without this package."""
    with scan_backend("parallel"):
        program = torch.export.export(model, (model.example(),), strict=False)
    torch.export.save(program, str(path))
    return program


class _Traced(nn.Module):
    """An exported graph for the ONNX exporter, which sets modes that such graphs refuse to have."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        self.training = False

    def train(self, mode: bool = True) -> _Traced:
        return self

    def forward(self, image: Tensor) -> Tensor:
        return self.graph(image)


@torch.no_grad()
def export_onnx(program: torch.export.ExportedProgram, image: Tensor, path: str | Path) -> None:
    """Write an ONNX file with input "image" and output "scores"; weights of over 2 GB lie beside it (`*.data`).

    Args:
        program: of `export_program`. All sizes are numbers in it, so that no shape arithmetic gets into the file.
        image: a window.
    Raises:
        RuntimeError: the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise RuntimeError("writing ONNX needs the package onnx: pip install onnx onnxruntime") from error
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        # This exporter, unlike the newer one, needs no further package; it says that the other is newer.
        warnings.simplefilter("ignore")
        draft = Path(folder) / path.name
        torch.onnx.export(
            _Traced(program.module()),
            (image,),
            str(draft),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=ONNX_OPSET,
            dynamo=False,
        )
        # Over 2 GB the exporter scatters the weights over hundreds of files; here they are gathered in one.
        model = onnx.load(str(draft))
    is_large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _MAX_PROTOBUF
    if is_large:
        (path.parent / f"{path.name}.data").unlink(missing_ok=True)  # it would be appended to
    onnx.save_model(model, str(path), save_as_external_data=is_large, location=f"{path.name}.data")
    onnx.checker.check_model(str(path))


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
