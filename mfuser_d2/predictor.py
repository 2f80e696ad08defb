"""A trained model as one call: an image in, labels and scores out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import Tensor

from mfuser_d2.core.encoders.builders import vocabulary_of
from mfuser_d2.core.encoders.class_queries import fill_templates
from mfuser_d2.core.encoders.class_tokens import tokenize_classes
from mfuser_d2.core.encoders.tower import VisionTower
from mfuser_d2.core.strips import slide_labels
from mfuser_d2.d2 import MFuserCheckpointer, load_config, validate_config
from mfuser_d2.d2.head import class_names
from mfuser_d2.visualization.class_colors import CITYSCAPES_COLORS, Color, colors_of
from mfuser_d2.visualization.photos import read_photo, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SCORES = 1 << 30
"""Numbers that an image's scores may have before `Predictor.__call__` refuses: 4 GiB of float32."""

_USUAL_CLASSES = 19


class Prediction(NamedTuple):
    """What the network says of an image.

    Attributes:
        labels: (H, W) index of the best class, uint8, or uint16 with more than 255 classes.
        scores: (K, H, W) float32, larger is surer; their scale is the network's own.
    """

    labels: np.ndarray
    scores: np.ndarray


class Predictor:
    """Segments images with a config's model and a checkpoint.

    Unlike Detectron2's `DefaultPredictor` it takes RGB in any usual form, loads strictly (a wrong checkpoint is an
    error), keeps the image's own size, and can be given other class names.

    Args:
        config: a YAML file, or a config node.
        weights: checkpoint; None takes the config's MODEL.WEIGHTS. With "" the trained part is random.
        opts: KEY VALUE pairs that change the config.
        classes: other class names, see `set_classes`.
    Raises:
        FileNotFoundError, KeyError, ValueError: what is wrong with the config, the weights or the names.
    """

    def __init__(
        self,
        config: str | Path | CfgNode,
        weights: str | Path | None = None,
        *,
        opts: Sequence[str] = (),
        classes: Sequence[str] | None = None,
    ) -> None:
        if isinstance(config, CfgNode):
            cfg = config.clone()
            cfg.defrost()
            cfg.merge_from_list(list(opts))
            cfg.freeze()
        else:
            cfg = load_config(str(config), opts)
        validate_config(cfg)
        self.cfg = cfg
        self.model = build_model(cfg).eval()
        MFuserCheckpointer(self.model).load(cfg.MODEL.WEIGHTS if weights is None else str(weights), [])
        self.class_names = class_names(cfg)
        self.colors = colors_of(self.class_names, self._known_colors())
        if classes is not None:
            self.set_classes(classes)

    def _known_colors(self) -> dict[str, Color]:
        metadata = MetadataCatalog.get([*self.cfg.DATASETS.TRAIN, *self.cfg.DATASETS.TEST][0])
        own = zip(metadata.stuff_classes, metadata.get("stuff_colors", []))
        return {**CITYSCAPES_COLORS, **{name: tuple(color) for name, color in own}}

    def set_classes(self, names: Sequence[str]) -> dict[str, tuple[str, float]]:
        """Segment into other classes from now on, without training.

        Trained names keep their meaning and colour. A new word is found through the text encoder, and borrows what the
        network learned per class from the trained class nearest to it; how well that works is the words' luck.

        Returns:
            for each name the trained class it leans on, and the cosine between their texts.
        Raises:
            ValueError: an empty or repeated name, one the text encoder has no room for, or a model without texts.
        """
        names = clean_names(names)
        node = self.cfg.MODEL.MFUSER
        if node.QUERIES != "texts":
            raise ValueError(
                f"MODEL.MFUSER.QUERIES={node.QUERIES!r}: the model knows no words, so its classes cannot be replaced"
            )
        sentences = fill_templates(node.PROMPT_TEMPLATES, names) if node.PROMPT_TEMPLATES else names
        tokens = tokenize_classes(
            sentences, vocabulary=vocabulary_of(node.VLM.NAME), tokenizer_file=node.VLM.TOKENIZER
        )
        lookup = self.model.sem_seg_head.set_classes(tokens)
        trained = class_names(self.cfg)
        self.class_names, self.colors = names, colors_of(names, self._known_colors())
        return {
            name: (trained[parent], cosine)
            for name, parent, cosine in zip(names, lookup.parents.tolist(), lookup.similarity.tolist())
        }

    def __call__(self, image: np.ndarray | Image | str | Path) -> Prediction:
        """Labels and scores of an image.

        Args:
            image: RGB: an array (H, W, 3) uint8, or what else `photos.to_rgb` takes; or a file.
        Raises:
            FileNotFoundError, ValueError: no readable image, or one whose scores would take more than 4 GiB; `labels`
                has no such limit.
        """
        array = _as_array(image)
        height, width = array.shape[:2]
        self._check_memory(height, width)
        padded = self._padded(array)
        scores = self.model.predict([padded])[0][:, :height, :width].cpu()
        return Prediction(_narrow(scores.argmax(dim=0), len(scores)), scores.numpy())

    def labels(self, image: np.ndarray | Image | str | Path) -> np.ndarray:
        """Labels alone, (H, W); the memory for scores grows with the image's shorter side only.

        That holds for sliding windows; where the config asks for MODE "whole" or several views, it is as `__call__`.
        """
        settings = self.model.inference
        if settings.mode != "slide" or tuple(settings.scales) != (1.0,) or settings.flip:
            return self(image).labels
        array = _as_array(image)
        height, width = array.shape[:2]
        labels = slide_labels(
            self._padded(array),
            self._window_scores,
            crop_size=settings.crop_size,
            stride=settings.stride,
            # Many classes would make the scores of a batch large.
            batch=max(1, settings.batch * _USUAL_CLASSES // max(len(self.class_names), _USUAL_CLASSES)),
        )
        return _narrow(labels[:height, :width], len(self.class_names))

    @torch.no_grad()
    def _window_scores(self, windows: Tensor) -> Tensor:
        with self.model.autocast():
            return self.model.window_scores(self.model.normalize(windows)).float()

    def _padded(self, array: np.ndarray) -> Tensor:
        """(3, H, W) uint8, an image smaller than two patches continued at its edges: the network needs that many."""
        image = torch.from_numpy(array).permute(2, 0, 1)
        patches = [tower.patch_size for tower in self.model.modules() if isinstance(tower, VisionTower)]
        missing = [max(0, 2 * max(edges) - have) for edges, have in zip(zip(*patches), array.shape[:2])]
        if not any(missing):
            return image
        return F.pad(image[None].float(), (0, missing[1], 0, missing[0]), mode="replicate")[0].to(torch.uint8)

    def _check_memory(self, height: int, width: int) -> None:
        numbers = len(self.class_names) * height * width
        if numbers > MAX_SCORES:
            raise ValueError(
                f"{len(self.class_names)} classes at {height}x{width} pixels are {4 * numbers / 2**30:.1f} GiB of "
                "scores; use Predictor.labels with MODEL.MFUSER.INFERENCE.MODE slide, SCALES [1.0] and FLIP False, or "
                "cut the image up"
            )


def clean_names(names: Sequence[str]) -> list[str]:
    """Class names without spare blanks.

    Raises:
        ValueError: there is none, one is empty, or two are the same but for capitals.
    """
    cleaned = [" ".join(name.split()) for name in names]
    if not cleaned:
        raise ValueError("the class list is empty; give at least one class name")
    seen: dict[str, int] = {}
    for index, name in enumerate(cleaned):
        if not name:
            raise ValueError(f"class {index + 1} of {len(cleaned)} has an empty name; every class needs a word")
        if name.casefold() in seen:
            raise ValueError(f"class name {name!r} occurs twice, as number {seen[name.casefold()] + 1} and {index + 1}")
        seen[name.casefold()] = index
    return cleaned


def _as_array(image: Any) -> np.ndarray:
    return read_photo(image) if isinstance(image, (str, Path)) else to_rgb(image)


def _narrow(labels: Tensor, num_classes: int) -> np.ndarray:
    return labels.numpy().astype(np.uint8 if num_classes <= 255 else np.uint16)
