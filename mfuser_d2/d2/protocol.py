"""Under which conditions a run evaluates."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from mfuser_d2.data.mapper import test_size
from mfuser_d2.evaluation import describe_protocol


def source_datasets(cfg: CfgNode) -> list[str]:
    """The test sets that are another split of a training set ("streets_sem_seg_val" of "streets_sem_seg_train")."""
    trained = {name.rsplit("_", 1)[0] for name in cfg.DATASETS.TRAIN}
    return [name for name in cfg.DATASETS.TEST if name.rsplit("_", 1)[0] in trained]


def protocol_of(cfg: CfgNode, *, weights: str | None = None) -> dict[str, Any]:
    """Everything the numbers of an evaluation depend on, for the foot of the table."""
    inference = cfg.MODEL.MFUSER.INFERENCE
    mappings = {name: MetadataCatalog.get(name).get("label_mapping") for name in cfg.DATASETS.TEST}
    return describe_protocol(
        weights=weights or cfg.MODEL.WEIGHTS,
        absent_class=cfg.TEST.MFUSER.ABSENT_CLASS,
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        inference_mode=inference.MODE,
        crop_size=inference.CROP_SIZE,
        stride=inference.STRIDE,
        test_sizes={name: test_size(cfg, name) for name in cfg.DATASETS.TEST},
        mappings={name: mapping for name, mapping in mappings.items() if mapping},
        train_datasets=cfg.DATASETS.TRAIN,
        precision=cfg.MODEL.MFUSER.PRECISION,
        test_time_augmentation={"scales": list(inference.SCALES), "flip": inference.FLIP},
    )
