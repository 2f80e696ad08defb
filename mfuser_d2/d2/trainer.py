"""Detectron2's trainer for MFuser: loaders, optimizer, checkpoints, and evaluation on several targets."""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mfuser_d2.core.ema import WeightAverage
from mfuser_d2.d2.checkpoint import MFuserCheckpointer
from mfuser_d2.d2.hooks import AverageWeights, LastCheckpoints, ProgressPrinter
from mfuser_d2.d2.solver import build_clip, build_lr_scheduler, build_optimizer
from mfuser_d2.d2.train_step import PrecisionTrainer, training_dtype
from mfuser_d2.d2.validation import validate_config
from mfuser_d2.data import build_test_loader, build_train_loader
from mfuser_d2.data.mapper import test_size
from mfuser_d2.evaluation import build_evaluator, describe_protocol, summarize, target_mean

logger = logging.getLogger(__name__)


class MFuserTrainer(DefaultTrainer):
    """Trains by a config and evaluates on all of DATASETS.TEST.

    Args:
        cfg: a full config; it is validated before anything is built.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer's own constructor, which builds another training step and checkpointer.
        TrainerBase.__init__(self)
        validate_config(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if comm.get_world_size() > 1:
            model = synchronise_batch_norm(model)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = PrecisionTrainer(
            model=wrap_for_processes(model),
            data_loader=self.build_train_loader(cfg),
            optimizer=optimizer,
            dtype=training_dtype(cfg),
            clip=build_clip(cfg),
            seed=cfg.SEED if cfg.SEED >= 0 else None,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = MFuserCheckpointer(self._trainer.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.average = WeightAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in OUTPUT_DIR, with the data that come next; else load MODEL.WEIGHTS."""
        super().resume_or_load(resume)
        if self.start_iter > 0:
            logger.info("Going on at iteration %d", self.start_iter)
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, start_iter=self.start_iter))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on its device, with its parameter counts logged."""
        model = build_model(cfg)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        logger.info("The model trains %.2f M parameters; %.2f M are frozen", trained / 1e6, frozen / 1e6)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, *, start_iter: int = 0) -> Iterable[list[dict[str, Any]]]:
        """Endless batches for the iterations from `start_iter` on."""
        return build_train_loader(cfg, start_iter=start_iter)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of one target; it writes to OUTPUT_DIR/inference/`dataset_name`."""
        node = cfg.TEST.MFUSER
        return build_evaluator(
            dataset_name,
            cfg.OUTPUT_DIR,
            absent_class=node.ABSENT_CLASS,
            save_predictions=node.SAVE_PREDICTIONS,
            save_per_image=node.SAVE_PER_IMAGE,
            save_rle=node.SAVE_RLE,
            has_confusion_picture=node.CONFUSION_PICTURE,
        )

    def build_hooks(self) -> list[HookBase]:
        """Timer, learning rate, checkpoints, evaluation, writers: in this order after each step."""
        cfg = self.cfg
        built: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if self.average is not None:
            built.append(AverageWeights(self.average, cfg.OUTPUT_DIR))
        if comm.is_main_process():
            kept = cfg.SOLVER.CHECKPOINTS_KEPT
            built.append(LastCheckpoints(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=kept))
        # After the checkpoint, so that a failing evaluation loses nothing.
        built.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._test_now))
        if comm.is_main_process():
            built.append(hooks.PeriodicWriter(self.build_writers(), period=cfg.SOLVER.LOG_PERIOD))
        return built

    def build_writers(self) -> list[EventWriter]:
        """The progress line, metrics.json and TensorBoard files in OUTPUT_DIR."""
        folder = self.cfg.OUTPUT_DIR
        os.makedirs(folder, exist_ok=True)
        return [
            ProgressPrinter(max_iter=self.max_iter, images_per_step=self.cfg.SOLVER.IMS_PER_BATCH),
            JSONWriter(os.path.join(folder, "metrics.json")),
            TensorboardXWriter(folder),
        ]

    def _test_now(self) -> Mapping[str, Any]:
        done = min(self.iter + 1, self.max_iter)
        weights = f"{self.cfg.OUTPUT_DIR} after {done} iterations"
        if self.average is not None:
            weights += ", averaged"
        with nullcontext() if self.average is None else self.average.applied():
            self._last_eval_results = self.test(self.cfg, self.model, weights=weights)
        # What is not known (a class without ground truth) is left out: NaN is no JSON.
        return {name: value for name, value in flatten_results_dict(self._last_eval_results).items() if value == value}

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Sequence[DatasetEvaluator] | None = None,
        *,
        weights: str | None = None,
    ) -> OrderedDict[str, Any]:
        """Evaluate on every data set of DATASETS.TEST, each into its own folder, and write the table over all.

        Args:
            evaluators: one per data set instead of those of `build_evaluator`.
            weights: what the table says was evaluated; None = MODEL.WEIGHTS.
        Returns:
            Data set -> {"sem_seg": {metric: percent}}, and under "mean" the average over the unseen targets (over all
            data sets where none is unseen). Empty on all but the main process.
        """
        names = list(cfg.DATASETS.TEST)
        if evaluators is not None and len(evaluators) != len(names):
            raise ValueError(f"{len(evaluators)} evaluators for {len(names)} data sets in DATASETS.TEST; give one each")
        results: OrderedDict[str, Any] = OrderedDict()
        for index, name in enumerate(names):
            evaluator = evaluators[index] if evaluators is not None else cls.build_evaluator(cfg, name)
            results[name] = inference_on_dataset(model, cls.build_test_loader(cfg, name), evaluator)
        if not comm.is_main_process() or not names:
            return OrderedDict()
        sources = source_datasets(cfg)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        table = summarize(results, protocol_of(cfg, weights=weights), folder, sources=sources)
        logger.info("Results (also in %s/results.{txt,md,json,csv}):\n%s", folder, table)
        results["mean"] = target_mean(results, exclude=sources if len(sources) < len(names) else ())
        return results


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
    )


def wrap_for_processes(model: nn.Module) -> nn.Module:
    """The model itself in a single process, else wrapped so that gradients are averaged over all processes."""
    if comm.get_world_size() == 1:
        return model
    devices = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Batch norms that take their statistics over all processes, as the release's SyncBN; names stay the same."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in list(model.named_modules()):  # torch's own needs a GPU
        if isinstance(module, nn.BatchNorm2d):
            synchronised = NaiveSyncBatchNorm(module.num_features, eps=module.eps, momentum=module.momentum)
            synchronised.load_state_dict(module.state_dict())
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, synchronised)
    return model
