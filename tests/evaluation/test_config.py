"""Config keys of the evaluation."""

import inspect

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg  # noqa: E402

from mfuser_d2.evaluation import add_evaluation_config, build_evaluator  # noqa: E402


def test_defaults_are_those_of_the_evaluator() -> None:
    cfg = get_cfg()
    add_evaluation_config(cfg)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(build_evaluator).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    node = cfg.TEST.MFUSER
    assert defaults == {
        "absent_class": node.ABSENT_CLASS,
        "save_predictions": node.SAVE_PREDICTIONS,
        "save_per_image": node.SAVE_PER_IMAGE,
        "save_rle": node.SAVE_RLE,
        "has_confusion_picture": node.CONFUSION_PICTURE,
    }


def test_keys_of_others_under_the_same_node_stay() -> None:
    cfg = get_cfg()
    cfg.TEST.MFUSER = type(cfg)({"OTHER": 3})
    add_evaluation_config(cfg)
    assert cfg.TEST.MFUSER.OTHER == 3 and cfg.TEST.MFUSER.ABSENT_CLASS == "skip"
