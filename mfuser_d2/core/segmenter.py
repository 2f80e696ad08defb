"""The one place where an encoder and a head are joined: images and labels to losses, images to scores."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.backbone import DualEncoderBackbone
from mfuser_d2.core.criterion import Criterion
from mfuser_d2.core.encoders.tower import FrozenModule
from mfuser_d2.core.inference import (
    InferenceSettings,
    Size,
    average_views,
    class_scores,
    rescale_to,
    resize_scores,
    slide,
)
from mfuser_d2.core.ops.cpu_attention import CpuAttention
from mfuser_d2.core.ops.triton_support import has_triton
from mfuser_d2.core.text_query_head import HeadOutput, TextQueryHead

logger = logging.getLogger(__name__)

COMPILE_BACKEND = "inductor"
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Segmenter(nn.Module):
    """MFuser: a backbone that maps normalised images to named features, and a head that maps these to predictions.

    Args:
        backbone: images (N, 3, H, W) to a dict of features.
        sem_seg_head: that dict to a `HeadOutput`.
        criterion: `HeadOutput` and labels to weighted losses.
        pixel_mean, pixel_std: RGB normalisation of the input, 0..255 scale.
        crop_size: smallest (height, width) in pixels that training images are padded to.
        inference: how images are cut up at test time.
        precision: number format of matrix products in `predict`: "float32", "float16" or "bfloat16". Norms, scan states
            and scores stay in float32. In training the caller runs `losses` under `autocast()`; the frozen encoders
            hold their weights in that format.
        use_compile: run the network through `torch.compile`; the first call for each size of batch takes minutes at
            full size. Without a compiler for the device it runs as it is, which is logged.
    Raises:
        KeyError: an unknown precision.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        criterion: Criterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        crop_size: Size,
        inference: InferenceSettings,
        precision: str = "float32",
        use_compile: bool = False,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise KeyError(f"MODEL.MFUSER.PRECISION={precision!r} is unknown; choose from {sorted(PRECISIONS)}")
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.crop_size = tuple(crop_size)
        self.inference = inference
        self.precision = precision
        self.use_compile = use_compile
        self._compiled: Callable[..., HeadOutput] | None = None
        if precision != "float32":
            for module in self.modules():
                if isinstance(module, FrozenModule):
                    module.hold_products_in(PRECISIONS[precision])
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).view(3, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def autocast(self) -> torch.autocast:
        """Matrix products in `precision` on the model's device."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def normalize(self, image: Tensor) -> Tensor:
        """An RGB image (3, H, W), 0..255, uint8 or float, as the backbone wants it."""
        return (image.to(self.device).float() - self.pixel_mean) / self.pixel_std

    def losses(
        self, images: Sequence[Tensor], labels: Sequence[Tensor], rand: Callable[..., Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses of a training batch; their sum is the total.

        Args:
            images: (3, H, W) RGB, 0..255, sizes may differ; padded with the mean colour to the
                largest and to crop_size.
            labels: (H, W) trainIds, padded with the ignore label.
            rand: replaces `torch.rand` for the sampled points, see `Criterion`.
        Raises:
            ValueError: an image and its label differ in size.
        """
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if image.shape[-2:] != label.shape[-2:]:
                raise ValueError(
                    f"image {index} of the batch is {tuple(image.shape[-2:])}, its label {tuple(label.shape[-2:])}; "
                    "both must have one size"
                )
        batch = pad_to_common([self.normalize(image) for image in images], at_least=self.crop_size, value=0.0)
        targets = pad_to_common(
            [label.to(self.device) for label in labels], at_least=self.crop_size, value=self.criterion.ignore_label
        )
        output = self.predict_all(batch)
        return self.criterion(*output, targets, rand=rand)

    def predict_all(self, images: Tensor) -> HeadOutput:
        """Every prediction of the head for normalised images (N, 3, H, W)."""
        return self._network()(images)

    def _run(self, images: Tensor, *, last_only: bool = False) -> HeadOutput:
        return self.sem_seg_head(self._features(images), last_only=last_only)

    def _network(self) -> Callable[..., HeadOutput]:
        """`_run`, or the program compiled from it."""
        if self.use_compile and self._compiled is None:
            obstacle = compiler_obstacle(self.device)
            if obstacle:
                logger.warning("MODEL.MFUSER.COMPILE is not followed: %s", obstacle)
                self.use_compile = False
            else:
                # The few sizes of batch that occur get a program each, instead of a slower one for any size.
                self._compiled = torch.compile(self._run, dynamic=False, backend=COMPILE_BACKEND)
        return self._compiled if self.use_compile else self._run

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # a copy's program would go on running the original

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        # Our own backbone leaves two deconvolutions to the head's projections; a foreign one gives plain maps.
        if isinstance(self.backbone, DualEncoderBackbone):
            return self.backbone(images, is_pending=True)
        return self.backbone(images)

    def window_scores(self, images: Tensor) -> Tensor:
        """Scores (N, K, H, W) of normalised windows (N, 3, H, W) in one pass."""
        network = self._network()
        if self.use_compile and isinstance(self.sem_seg_head, TextQueryHead):
            self.sem_seg_head.class_texts()  # kept from here on, so that the text encoder is not compiled as well
        with nullcontext() if self.use_compile else CpuAttention():
            output = network(images, last_only=True)
        return resize_scores(class_scores(output.class_logits[-1], output.mask_logits[-1]), tuple(images.shape[-2:]))

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], sizes: Sequence[Size] | None = None) -> list[Tensor]:
        """Class scores of whole images.

        Args:
            images: (3, H, W) RGB, 0..255; sizes may differ.
            sizes: height and width of each result in pixels; None keeps the images' own.
        Returns:
            (K, height, width) float32 for each image.
        """
        sizes = [tuple(image.shape[-2:]) for image in images] if sizes is None else sizes
        outputs: list[Tensor] = []
        for start, stop in _runs_of_one_size(images):
            batch = torch.stack([self.normalize(image) for image in images[start:stop]])
            with self.autocast():
                scores = self.scores(batch)
            outputs += rescale_to(scores.float(), sizes[start:stop], final_softmax=self.inference.final_softmax)
        return outputs

    def scores(self, images: Tensor) -> Tensor:
        """Scores (N, K, H, W) of normalised images (N, 3, H, W), averaged over the views that `inference` names."""
        return average_views(images, self._view_scores, scales=self.inference.scales, flip=self.inference.flip)

    def _view_scores(self, images: Tensor) -> Tensor:
        """Scores (N, K, H, W) of one view (N, 3, H, W), by windows or whole."""
        settings = self.inference
        if settings.mode == "whole":
            return self.window_scores(images)
        return slide(
            images,
            self.window_scores,
            crop_size=settings.crop_size,
            stride=settings.stride,
            batch=settings.batch,
        )


def compiler_obstacle(device: torch.device) -> str | None:
    """Why `torch.compile` cannot make programs for a device, or None."""
    if device.type == "cuda":
        return None if has_triton() else "Triton, which compiles for GPUs, is not installed"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return None if any(map(shutil.which, names)) else f"none of {names} is installed; set CXX to a C++ compiler"


def pad_to_common(tensors: Sequence[Tensor], *, at_least: Size, value: float) -> Tensor:
    """Stack tensors (..., H, W) of different sizes, padded at bottom and right to one size of at least `at_least`."""
    height = max(at_least[0], *(tensor.shape[-2] for tensor in tensors))
    width = max(at_least[1], *(tensor.shape[-1] for tensor in tensors))
    return torch.stack([F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors])


def _runs_of_one_size(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Start and stop of the longest runs of neighbouring images with one size."""
    starts = [i for i in range(len(images)) if i == 0 or images[i].shape != images[i - 1].shape]
    return list(zip(starts, [*starts[1:], len(images)]))
