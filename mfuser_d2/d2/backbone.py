"""`MFuserBackbone`: the core's dual encoder and pyramid in Detectron2's backbone registry."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from mfuser_d2.core.backbone import DENSE_EMBEDDING, PYRAMID_LEVELS, DualEncoderBackbone
from mfuser_d2.core.encoders.presets import vlm_config
from mfuser_d2.core.factory import build_backbone_parts


def encoder_kwargs(node: CfgNode) -> dict[str, Any]:
    """MODEL.MFUSER.VFM or .VLM as arguments of the encoder's builder."""
    return {"name": node.NAME, "weights": node.WEIGHTS, "kwargs": _to_dict(node.KWARGS)}


def _to_dict(node: CfgNode) -> dict[str, Any]:
    return {key: _to_dict(value) if isinstance(value, CfgNode) else value for key, value in node.items()}


def text_dim(cfg: CfgNode) -> int | None:
    """Width of the class texts that a VFM alone is mapped to; None where no text tower says it."""
    node = cfg.MODEL.MFUSER
    if node.ENCODERS != "vfm" or node.QUERIES != "texts":
        return None
    return vlm_config(node.VLM.NAME, _to_dict(node.VLM.KWARGS))["embed_dim"]


@BACKBONE_REGISTRY.register()
class MFuserBackbone(DualEncoderBackbone, Backbone):
    """Two frozen encoders with adapters and the pyramid over them; see `DualEncoderBackbone` for what comes out."""

    @configurable
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.MFUSER
        adapter_kwargs = {
            "state_dim": node.ADAPTER.STATE_DIM,
            "dropout": node.ADAPTER.DROPOUT,
            "num_heads": node.ADAPTER.NUM_HEADS,
            "num_tokens": node.ADAPTER.NUM_TOKENS,
            "num_points": node.ADAPTER.NUM_POINTS,
        }
        return build_backbone_parts(
            vfm=encoder_kwargs(node.VFM),
            vlm=encoder_kwargs(node.VLM),
            image_size=tuple(node.IMAGE_SIZE),
            patch_size=node.PATCH_SIZE,
            resample=None if node.RESAMPLE == "auto" else node.RESAMPLE,
            adapter=node.ADAPTER.NAME,
            adapter_kwargs=adapter_kwargs,
            project_vfm=node.ADAPTER.PROJECT_VFM,
            encoders=node.ENCODERS,
            joint_features=node.ALIGN_LOSS.FEATURES,
            joint_dim=text_dim(cfg),
            tap_layers=node.TAP_LAYERS,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            use_checkpoint=node.CHECKPOINT,
        )

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride (in pixels, to the nearest integer) of the pyramid's maps and of the dense embedding."""
        patch, dim = self.encoder.patch_size[0], self.pyramid.dim
        strides = (patch / 4, patch / 2, patch, patch * 2)
        shapes = {name: ShapeSpec(channels=dim, stride=round(stride)) for name, stride in zip(PYRAMID_LEVELS, strides)}
        return {**shapes, DENSE_EMBEDDING: ShapeSpec(channels=self.encoder.joint_dim, stride=patch)}
