"""Config keys of the evaluation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_evaluation_config(cfg: "CfgNode") -> None:
    """Add `TEST.MFUSER.*`, the keys of the evaluation, to a Detectron2 config."""
    from detectron2.config import CfgNode as CN

    if "MFUSER" not in cfg.TEST:
        cfg.TEST.MFUSER = CN()
    node = cfg.TEST.MFUSER
    # What a class without ground truth in a target means for the mean: "skip" leaves it out (Detectron2's convention),
    # "zero" counts it as IoU 0 where it is predicted somewhere (mmseg's convention).
    node.ABSENT_CLASS = "skip"
    # Write each prediction as a palette PNG of trainIds under OUTPUT_DIR/inference/<data set>/predictions.
    node.SAVE_PREDICTIONS = False
    # Write the counts of each image to OUTPUT_DIR/inference/<data set>/images.jsonl, for the best and worst images of
    # tools/report.py. About 300 bytes per image.
    node.SAVE_PER_IMAGE = False
    # Write every mask, run-length encoded, to OUTPUT_DIR/inference/<data set>/sem_seg_predictions.json as Detectron2's
    # own evaluator does. Large: about 20 kB per image.
    node.SAVE_RLE = False
    # Draw the confusion matrix of each target to OUTPUT_DIR/inference/<data set>/confusion.png.
    node.CONFUSION_PICTURE = True
