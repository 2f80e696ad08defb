"""`MFuser`: the core's segmenter behind Detectron2's model interface."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import build_sem_seg_head
from torch import Tensor

from mfuser_d2.core.criterion import Criterion
from mfuser_d2.core.inference import InferenceSettings
from mfuser_d2.core.segmenter import Segmenter


@META_ARCH_REGISTRY.register()
class MFuser(Segmenter):
    """Dicts of images in; weighted losses (training) or per-class scores (evaluation) out."""

    @configurable
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node, head = cfg.MODEL.MFUSER, cfg.MODEL.SEM_SEG_HEAD
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "criterion": Criterion(
                num_classes=head.NUM_CLASSES,
                class_weight=head.CLASS_WEIGHT,
                mask_weight=head.MASK_WEIGHT,
                dice_weight=head.DICE_WEIGHT,
                alignment_weight=node.ALIGN_LOSS.WEIGHT,
                no_object_weight=head.NO_OBJECT_WEIGHT,
                num_points=head.TRAIN_NUM_POINTS,
                oversample_ratio=head.OVERSAMPLE_RATIO,
                importance_ratio=head.IMPORTANCE_SAMPLE_RATIO,
                alignment=node.ALIGN_LOSS.KIND,
                ignore_label=head.IGNORE_VALUE,
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "crop_size": tuple(node.INFERENCE.CROP_SIZE),
            "inference": InferenceSettings(
                mode=node.INFERENCE.MODE,
                crop_size=tuple(node.INFERENCE.CROP_SIZE),
                stride=tuple(node.INFERENCE.STRIDE),
                batch=node.INFERENCE.BATCH,
                final_softmax=node.INFERENCE.FINAL_SOFTMAX,
                scales=tuple(node.INFERENCE.SCALES),
                flip=node.INFERENCE.FLIP,
            ),
            "precision": node.PRECISION,
            "use_compile": node.COMPILE,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Detectron2's model call.

        Args:
            batched_inputs: dicts with "image" (3, H, W) RGB 0..255; for training "sem_seg" (H, W); for evaluation
                optionally "height" and "width" of the wanted result.
        Returns:
            weighted losses in training; in evaluation [{"sem_seg": (K, height, width)}].
        Raises:
            ValueError: a training image without "sem_seg".
        """
        images = [item["image"] for item in batched_inputs]
        if self.training:
            missing = [item.get("file_name", "an image") for item in batched_inputs if "sem_seg" not in item]
            if missing:
                raise ValueError(
                    f"{missing} came without sem_seg labels; train on a data set that has sem_seg_file_name"
                )
            return self.losses(images, [item["sem_seg"] for item in batched_inputs])
        sizes = [
            (int(item.get("height", image.shape[-2])), int(item.get("width", image.shape[-1])))
            for item, image in zip(batched_inputs, images)
        ]
        return [{"sem_seg": scores} for scores in self.predict(images, sizes)]
