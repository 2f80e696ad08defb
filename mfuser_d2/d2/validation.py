"""Contradictions in a config are refused before anything is built or read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from mfuser_d2.core.adapters import ADAPTERS
from mfuser_d2.core.dual_encoder import JOINT_FEATURES
from mfuser_d2.core.factory import check_queries
from mfuser_d2.core.mt_enhancer import ENHANCERS
from mfuser_d2.core.optim import NO_DECAY_RULES
from mfuser_d2.core.segmenter import PRECISIONS
from mfuser_d2.core.single_encoder import check_single
from mfuser_d2.d2.solver import CLIP_TYPES, LR_SCHEDULES


def validate_config(cfg: CfgNode) -> None:
    """Return if the keys of a config fit each other and the data sets.

    What only the encoders know (taps beyond their depth, their names, their files) is refused by them while the model
    is built, before training as well.

    Raises:
        KeyError: a name is unknown; the message lists what there is.
        ValueError: values contradict each other; the message names the keys, their values and the way out.
    """
    for check in _CHECKS:
        check(cfg)


def _check_names(cfg: CfgNode) -> None:
    mfuser, solver = cfg.MODEL.MFUSER, cfg.SOLVER
    _one_of("MODEL.MFUSER.ADAPTER.NAME", mfuser.ADAPTER.NAME, ADAPTERS)
    _one_of("MODEL.MFUSER.ENCODERS", mfuser.ENCODERS, ("both", "vfm", "vlm"))
    _one_of("MODEL.MFUSER.MT_ENHANCER.KIND", mfuser.MT_ENHANCER.KIND, ENHANCERS)
    _one_of("MODEL.MFUSER.ALIGN_LOSS.FEATURES", mfuser.ALIGN_LOSS.FEATURES, JOINT_FEATURES)
    _one_of("MODEL.MFUSER.RESAMPLE", mfuser.RESAMPLE, ("auto", "bicubic", "bilinear"))
    _one_of("MODEL.MFUSER.ALIGN_LOSS.KIND", mfuser.ALIGN_LOSS.KIND, ("softmax", "sigmoid"))
    _one_of("MODEL.MFUSER.INFERENCE.MODE", mfuser.INFERENCE.MODE, ("slide", "whole"))
    _one_of("MODEL.MFUSER.PRECISION", mfuser.PRECISION, PRECISIONS)
    _one_of("SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, LR_SCHEDULES)
    _one_of("SOLVER.NO_DECAY", solver.NO_DECAY, NO_DECAY_RULES)
    _one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", solver.CLIP_GRADIENTS.CLIP_TYPE, CLIP_TYPES)
    _one_of("INPUT.FORMAT", cfg.INPUT.FORMAT, ("RGB",))


def _check_sizes(cfg: CfgNode) -> None:
    mfuser = cfg.MODEL.MFUSER
    inference = mfuser.INFERENCE
    sizes = {
        "MODEL.MFUSER.IMAGE_SIZE": mfuser.IMAGE_SIZE,
        "MODEL.MFUSER.INFERENCE.CROP_SIZE": inference.CROP_SIZE,
        "MODEL.MFUSER.INFERENCE.STRIDE": inference.STRIDE,
    }
    for key, size in sizes.items():
        if len(size) != 2 or any(not isinstance(edge, int) or edge < 1 for edge in size):
            raise ValueError(f"{key}={list(size)} has to be [height, width] in pixels, two positive whole numbers")
    if mfuser.PATCH_SIZE < 0:
        raise ValueError(f"MODEL.MFUSER.PATCH_SIZE={mfuser.PATCH_SIZE} is negative; 0 takes each encoder's own")
    # The pyramid halves the patch grid once, so a crop needs two patches each way.
    smallest = 2 * max(mfuser.PATCH_SIZE, 1)
    for key in ("MODEL.MFUSER.IMAGE_SIZE", "MODEL.MFUSER.INFERENCE.CROP_SIZE"):
        if min(sizes[key]) < smallest:
            raise ValueError(
                f"{key}={list(sizes[key])} is smaller than two patches of MODEL.MFUSER.PATCH_SIZE={mfuser.PATCH_SIZE} "
                f"pixels; make it at least {smallest} each way"
            )
    trained = list(cfg.INPUT.CROP.SIZE)
    if any(have < want for have, want in zip(trained, inference.CROP_SIZE)):
        raise ValueError(
            f"INPUT.CROP.SIZE={trained} is smaller than MODEL.MFUSER.INFERENCE.CROP_SIZE={list(inference.CROP_SIZE)}, "
            "to which training images are padded: the network would train on padding; make both the same"
        )
    for step, crop in zip(inference.STRIDE, inference.CROP_SIZE):
        if step > crop:
            raise ValueError(
                f"MODEL.MFUSER.INFERENCE.STRIDE={list(inference.STRIDE)} is larger than CROP_SIZE="
                f"{list(inference.CROP_SIZE)}: pixels between windows would get no prediction; make it at most that"
            )


def _check_network(cfg: CfgNode) -> None:
    mfuser, head = cfg.MODEL.MFUSER, cfg.MODEL.SEM_SEG_HEAD
    taps = list(mfuser.TAP_LAYERS)
    if len(taps) != 4 or taps != sorted(set(taps)) or taps[0] < 0:
        raise ValueError(f"MODEL.MFUSER.TAP_LAYERS={taps} has to be four ascending block indices, counted from 0")
    _divides("MODEL.SEM_SEG_HEAD.HIDDEN_DIM", head.HIDDEN_DIM, "MODEL.SEM_SEG_HEAD.NUM_HEADS", head.NUM_HEADS)
    enhancer = mfuser.MT_ENHANCER
    _divides("MODEL.MFUSER.MT_ENHANCER.WIDTH", enhancer.WIDTH, "MODEL.MFUSER.MT_ENHANCER.NUM_HEADS", enhancer.NUM_HEADS)
    at_least_one = {
        "MODEL.MFUSER.INFERENCE.BATCH": mfuser.INFERENCE.BATCH,
        "MODEL.MFUSER.ADAPTER.STATE_DIM": mfuser.ADAPTER.STATE_DIM,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": head.NUM_CLASSES,
        "MODEL.SEM_SEG_HEAD.ENC_LAYERS": head.ENC_LAYERS,
        "MODEL.SEM_SEG_HEAD.DEC_LAYERS": head.DEC_LAYERS,
        "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS": head.TRAIN_NUM_POINTS,
        "MODEL.SEM_SEG_HEAD.OVERSAMPLE_RATIO": head.OVERSAMPLE_RATIO,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{key}={value} has to be at least 1")
    if mfuser.PROMPT_LENGTH < 0:
        raise ValueError(f"MODEL.MFUSER.PROMPT_LENGTH={mfuser.PROMPT_LENGTH} is negative; 0 uses the bare class names")
    if not 0 <= head.IMPORTANCE_SAMPLE_RATIO <= 1:
        raise ValueError(f"MODEL.SEM_SEG_HEAD.IMPORTANCE_SAMPLE_RATIO={head.IMPORTANCE_SAMPLE_RATIO} is outside 0..1")
    for key, value in (("ADAPTER", mfuser.ADAPTER.DROPOUT), ("MT_ENHANCER", mfuser.MT_ENHANCER.DROPOUT)):
        if not 0 <= value < 1:
            raise ValueError(f"MODEL.MFUSER.{key}.DROPOUT={value} is outside 0..1 (1 excluded)")
    if mfuser.ALIGN_LOSS.TEMPERATURE < 0:
        raise ValueError(f"MODEL.MFUSER.ALIGN_LOSS.TEMPERATURE={mfuser.ALIGN_LOSS.TEMPERATURE} is negative")
    if min(cfg.MODEL.PIXEL_STD) <= 0 or len(cfg.MODEL.PIXEL_STD) != 3 or len(cfg.MODEL.PIXEL_MEAN) != 3:
        raise ValueError("MODEL.PIXEL_MEAN and PIXEL_STD have to be three numbers each (R, G, B), PIXEL_STD positive")


def _check_variant(cfg: CfgNode) -> None:
    """Variants that make no sense together; the network refuses them with the same words where it has no config."""
    mfuser = cfg.MODEL.MFUSER
    if mfuser.ENCODERS != "both":
        check_single(mfuser.ENCODERS, mfuser.ADAPTER.NAME, mfuser.ALIGN_LOSS.FEATURES)
    check_queries(
        queries=mfuser.QUERIES,
        vlm_name=mfuser.VLM.NAME,
        prompt_length=mfuser.PROMPT_LENGTH,
        prompt_templates=mfuser.PROMPT_TEMPLATES,
        temperature=mfuser.ALIGN_LOSS.TEMPERATURE,
    )
    for key in ("NUM_HEADS", "NUM_TOKENS", "NUM_POINTS"):
        if mfuser.ADAPTER[key] < 1:
            raise ValueError(f"MODEL.MFUSER.ADAPTER.{key}={mfuser.ADAPTER[key]} has to be at least 1")
    scales = list(mfuser.INFERENCE.SCALES)
    if not scales or min(scales) <= 0:
        raise ValueError(
            f"MODEL.MFUSER.INFERENCE.SCALES={scales} has to be one or more positive factors; [1.0] sees every image at "
            "its own size only"
        )


def _check_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    processes = comm.get_world_size()
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH={solver.IMS_PER_BATCH} images cannot be split evenly over {processes} processes; "
            "make it a multiple of --num-gpus times --num-machines"
        )
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD", "CHECKPOINTS_KEPT", "LOG_PERIOD"):
        if solver[key] < 1:
            raise ValueError(f"SOLVER.{key}={solver[key]} has to be at least 1")
    if solver.MAX_BAD_STEPS < 0:
        raise ValueError(f"SOLVER.MAX_BAD_STEPS={solver.MAX_BAD_STEPS} is negative; 0 lets the first one end the run")
    if solver.BASE_LR <= 0 or not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR={solver.BASE_LR} has to be positive and BASE_LR_END={solver.BASE_LR_END} within 0..BASE_LR"
        )
    if cfg.SEED >= 2**32:
        raise ValueError(f"SEED={cfg.SEED} has to be below 2**32; -1 draws one")
    if not 0 <= solver.EMA_DECAY < 1:
        raise ValueError(f"SOLVER.EMA_DECAY={solver.EMA_DECAY} is outside 0..1 (1 excluded); 0 switches it off")
    if solver.WARMUP_ITERS < 0 or solver.WARMUP_ITERS > solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.WARMUP_ITERS={solver.WARMUP_ITERS} is not within 0..MAX_ITER={solver.MAX_ITER}: the training "
            "would end during its warm-up"
        )


def _check_data_sets(cfg: CfgNode) -> None:
    if not cfg.DATASETS.TRAIN and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TRAIN and DATASETS.TEST are both empty; name at least one data set")
    head = cfg.MODEL.SEM_SEG_HEAD
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            _one_of(f"DATASETS.{key}", name, DatasetCatalog.list())
            metadata = MetadataCatalog.get(name)
            classes = metadata.get("stuff_classes")
            if classes is None:
                raise ValueError(f"DATASETS.{key}: {name} has no stuff_classes in its metadata: no semantic labels")
            if len(classes) != head.NUM_CLASSES:
                raise ValueError(
                    f"MODEL.SEM_SEG_HEAD.NUM_CLASSES={head.NUM_CLASSES}, but {name} in DATASETS.{key} has "
                    f"{len(classes)} classes; set it to that or choose data sets of {head.NUM_CLASSES} classes"
                )
            ignored = metadata.get("ignore_label", 255)
            if ignored != head.IGNORE_VALUE:
                raise ValueError(
                    f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE={head.IGNORE_VALUE}, but {name} in DATASETS.{key} ignores "
                    f"{ignored}; set it to that"
                )


_CHECKS: tuple[Callable[[CfgNode], None], ...] = (
    _check_names,
    _check_sizes,
    _check_network,
    _check_variant,
    _check_solver,
    _check_data_sets,
)


def _one_of(key: str, value: str, known: Collection[str]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=8, cutoff=0.6) if isinstance(value, str) else []
    choices = f"did you mean {', '.join(near)}?" if near and len(known) > 12 else f"choose from {sorted(known)}"
    raise KeyError(f"{key}={value!r} is unknown; {choices}")


def _divides(key: str, value: int, by_key: str, by: int) -> None:
    if by < 1 or value % by:
        raise ValueError(f"{key}={value} has to be a multiple of {by_key}={by}")
