"""`MFuserHead`: the core's text-query head in Detectron2's registry."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from mfuser_d2.core.backbone import DENSE_EMBEDDING, PYRAMID_LEVELS
from mfuser_d2.core.factory import build_head_parts
from mfuser_d2.core.text_query_head import TextQueryHead
from mfuser_d2.d2.backbone import encoder_kwargs


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classes, from the metadata of the first training data set, in trainId order.

    Raises:
        ValueError: DATASETS.TRAIN and .TEST are empty, or MODEL.SEM_SEG_HEAD.NUM_CLASSES is another number.
    """
    datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not datasets:
        raise ValueError("DATASETS.TRAIN and DATASETS.TEST are empty; name a data set, its classes become the queries")
    names = list(MetadataCatalog.get(datasets[0]).stuff_classes)
    if len(names) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES={cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}, but {datasets[0]} has {len(names)} "
            "classes; set it to that"
        )
    return names


@SEM_SEG_HEADS_REGISTRY.register()
class MFuserHead(TextQueryHead):
    """Class texts, refined by the image, query a mask decoder; see `TextQueryHead`."""

    @configurable
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node, head = cfg.MODEL.MFUSER, cfg.MODEL.SEM_SEG_HEAD
        return build_head_parts(
            vlm=encoder_kwargs(node.VLM),
            class_names=class_names(cfg),
            in_dims=[input_shape[level].channels for level in PYRAMID_LEVELS],
            tokenizer=node.VLM.TOKENIZER,
            prompt_length=node.PROMPT_LENGTH,
            prompt_templates=node.PROMPT_TEMPLATES,
            queries=node.QUERIES,
            joint_dim=input_shape[DENSE_EMBEDDING].channels if DENSE_EMBEDDING in input_shape else None,
            refiner=node.MT_ENHANCER.KIND,
            refiner_kwargs={
                "width": node.MT_ENHANCER.WIDTH,
                "num_heads": node.MT_ENHANCER.NUM_HEADS,
                "num_layers": node.MT_ENHANCER.NUM_LAYERS,
                "dropout": node.MT_ENHANCER.DROPOUT,
            },
            temperature=node.ALIGN_LOSS.TEMPERATURE,
            hidden_dim=head.HIDDEN_DIM,
            mask_dim=head.MASK_DIM,
            num_heads=head.NUM_HEADS,
            encoder_layers=head.ENC_LAYERS,
            decoder_layers=head.DEC_LAYERS,
            encoder_ffn_dim=head.ENC_FFN_DIM,
            decoder_ffn_dim=head.DEC_FFN_DIM,
        )
