"""Detectron2's trainer for MFuser: loaders, optimizer, checkpoints, and evaluation on several targets."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn

from mfuser_d2.core.ema import WeightAverage
from mfuser_d2.d2.bad_step import BadSteps
from mfuser_d2.d2.checkpoint import MFuserCheckpointer
from mfuser_d2.d2.hooks import AverageWeights, EvaluateRegularly, KeepCheckpoints, ProgressPrinter, TensorBoardFiles
from mfuser_d2.d2.metrics import MetricsFile, RecordNumbers
from mfuser_d2.d2.processes import synchronise_batch_norm, wrap_for_processes
from mfuser_d2.d2.protocol import protocol_of, source_datasets
from mfuser_d2.d2.run import RunError, reason_outside
from mfuser_d2.d2.solver import build_clip, build_lr_scheduler, build_optimizer
from mfuser_d2.d2.stopping import StopSignals
from mfuser_d2.d2.train_step import DataError, NamedBatches, PrecisionTrainer, training_dtype
from mfuser_d2.d2.validation import validate_config
from mfuser_d2.data import build_test_loader, build_train_loader
from mfuser_d2.evaluation import build_evaluator, summarize, target_mean

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
        self._has_own_seed = cfg.SEED < 0
        if self._has_own_seed:
            cfg = _with_seed(cfg, comm.shared_random_seed())
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
            seed=cfg.SEED,
            bad_steps=BadSteps(cfg.OUTPUT_DIR, max_skipped=cfg.SOLVER.MAX_BAD_STEPS),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = MFuserCheckpointer(
            self._trainer.model, cfg.OUTPUT_DIR, save_to_disk=comm.is_main_process(), trainer=weakref.proxy(self)
        )
        self.average = WeightAverage(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.is_resumed = False
        self._first_draw = 0
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the newest whole checkpoint in OUTPUT_DIR, with the data that come next; else load MODEL.WEIGHTS.

        Raises:
            RunError: the processes found different checkpoints.
        """
        self.is_resumed = resume
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed_from:
            self.start_iter = self.iter + 1
        found = comm.all_gather(self.start_iter)
        if len(set(found)) > 1:
            raise RunError(
                f"The processes would go on at different iterations {found}: OUTPUT_DIR={self.cfg.OUTPUT_DIR} has to "
                "be one folder that all machines see"
            )
        if self.start_iter > 0:
            logger.info("Going on at iteration %d, after %d images", self.start_iter, self._first_draw)
            # Rounded up, so that with another batch size some images are left out rather than seen twice.
            batches = math.ceil(self._first_draw / self.cfg.SOLVER.IMS_PER_BATCH)
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, start_iter=batches))

    def train(self) -> Mapping[str, Any] | None:
        """Run from `start_iter` to `max_iter`.

        Raises:
            Stopped: a signal ended the run; it has saved.
            DataError: a batch could not be had; the weights up to there are saved (in a single process).
            RunError, OSError, FloatingPointError: see their messages.
        """
        self.iter = self.start_iter
        logger.info("Training from iteration %d to %d", self.start_iter, self.max_iter)
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter = self.max_iter
            except DataError:
                self._save_before_step()
                raise
            except (RunError, FloatingPointError):
                raise
            except Exception as error:
                reason = reason_outside(error)
                if reason:
                    raise RunError(f"Training ended at iteration {self.iter}: {reason}") from error
                if isinstance(error, OSError):
                    raise
                logger.exception("Training failed at iteration %d:", self.iter)
                raise
            finally:
                self._trainer._data_loader_iter_obj = None  # ends its workers
                self.after_train()
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
        return getattr(self, "_last_eval_results", None)

    def _save_before_step(self) -> None:
        """Save what the steps before the current one have trained; one of several processes cannot do so alone."""
        if comm.get_world_size() == 1 and self.iter > self.start_iter:
            self.iter -= 1
            self.checkpoints.save()
            self.iter += 1

    def state_dict(self) -> dict[str, Any]:
        """Iteration, schedule, optimizer, loss scale, recent numbers, seed, and images used."""
        draws = self._first_draw + (self.iter + 1 - self.start_iter) * self.cfg.SOLVER.IMS_PER_BATCH
        return {**super().state_dict(), "seed": self.cfg.SEED, "draws": draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the seed only where the config leaves it open (SEED -1)."""
        super().load_state_dict(state_dict)
        self._first_draw = state_dict.get("draws", (self.iter + 1) * self.cfg.SOLVER.IMS_PER_BATCH)
        if self.iter < 0 or self._first_draw < 0:
            raise ValueError(f"iteration {self.iter} and {self._first_draw} images cannot be negative")
        if self._has_own_seed and "seed" in state_dict:
            self.cfg = _with_seed(self.cfg, state_dict["seed"])
            self._trainer.seed = self.cfg.SEED

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
        """Timer, learning rate, average, numbers, checkpoints, evaluation: in this order after each step.

        The numbers of an iteration are written before its checkpoint, and evaluation comes after it, so that a run
        killed at any moment goes on without gaps.
        """
        cfg = self.cfg
        built: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if self.average is not None:
            built.append(AverageWeights(self.average, cfg.OUTPUT_DIR))
        this = weakref.proxy(self)
        numbers = RecordNumbers(lambda: this.build_writers() if comm.is_main_process() else (), cfg.SOLVER.LOG_PERIOD)
        self.checkpoints = KeepCheckpoints(
            self.checkpointer,
            period=cfg.SOLVER.CHECKPOINT_PERIOD,
            max_to_keep=cfg.SOLVER.CHECKPOINTS_KEPT,
            stop=StopSignals(),
        )
        evaluation = EvaluateRegularly(
            self._test_now, period=cfg.TEST.EVAL_PERIOD, checkpoints=self.checkpoints, numbers=numbers
        )
        return [
            *built,
            numbers,
            self.checkpoints,
            evaluation,
            hooks.CallbackHook(after_train=lambda _: numbers.close()),
        ]

    def build_writers(self) -> list[EventWriter]:
        """The progress line, metrics.json and TensorBoard files in OUTPUT_DIR."""
        folder = self.cfg.OUTPUT_DIR
        os.makedirs(folder, exist_ok=True)
        return [
            ProgressPrinter(max_iter=self.max_iter, images_per_step=self.cfg.SOLVER.IMS_PER_BATCH),
            MetricsFile(os.path.join(folder, "metrics.json")),
            # What a killed run wrote beyond its last checkpoint is hidden.
            TensorBoardFiles(folder, purge_step=self.start_iter or None),
        ]

    def _test_now(self) -> Mapping[str, Any]:
        weights = self.checkpointer.get_checkpoint_file()  # written just before
        if self.average is not None:
            weights += ", averaged"
        with nullcontext() if self.average is None else self.average.applied():
            self._last_eval_results = self.test(self.cfg, self.model, weights=weights)
        # What is not known (a class without ground truth) is left out: NaN is no JSON.
        return {name: value for name, value in flatten_results_dict(self._last_eval_results).items() if value == value}

    @classmethod
    def require_test_sets(cls, cfg: CfgNode) -> None:
        """Fail now, not after hours of training or of the first targets, where a set of DATASETS.TEST is not there.

        Raises:
            FileNotFoundError: what the set's folder should hold, and how to get there.
        """
        for name in cfg.DATASETS.TEST:
            try:
                DatasetCatalog.get(name)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}\nOr leave {name} out of DATASETS.TEST.") from error

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
        Raises:
            DataError: images could not be read; says why.
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
            loader = NamedBatches(cls.build_test_loader(cfg, name), name)
            try:
                results[name] = inference_on_dataset(model, loader, evaluator)
            finally:
                loader.close()
        if not comm.is_main_process() or not names:
            return OrderedDict()
        sources = source_datasets(cfg)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        table = summarize(results, protocol_of(cfg, weights=weights), folder, sources=sources)
        logger.info("Results (also in %s/results.{txt,md,json,csv}):\n%s", folder, table)
        results["mean"] = target_mean(results, exclude=sources if len(sources) < len(names) else ())
        return results


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg
