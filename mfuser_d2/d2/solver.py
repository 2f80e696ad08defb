"""AdamW and the learning-rate schedules of release and paper, from a Detectron2 config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from mfuser_d2.core.optim import linear_lr, parameter_groups, poly_lr


class IterationSchedule(ParamScheduler):
    """A learning rate given per iteration, as the factor that Detectron2's `LRMultiplier` wants.

    Args:
        learning_rate: iteration -> learning rate.
        base_lr: what the factor 1 stands for.
        max_iter: iterations in all.
    """

    def __init__(self, *, learning_rate: Callable[[float], float], base_lr: float, max_iter: int) -> None:
        self.learning_rate = learning_rate
        self.base_lr = base_lr
        self.max_iter = max_iter

    def __call__(self, where: float) -> float:
        """The factor at `where` = iteration / max_iter in 0..1."""
        iteration = round(where * self.max_iter, 6)  # the division's rounding must not blur whole iterations
        return self.learning_rate(min(iteration, self.max_iter)) / self.base_lr


def _poly(cfg: CfgNode) -> Callable[[float], float]:
    return partial(poly_lr, power=cfg.SOLVER.POLY_POWER, **_common(cfg))


def _linear(cfg: CfgNode) -> Callable[[float], float]:
    return partial(linear_lr, **_common(cfg))


def _common(cfg: CfgNode) -> dict[str, float]:
    solver = cfg.SOLVER
    return {
        "base_lr": solver.BASE_LR,
        "end_lr": solver.BASE_LR_END,
        "max_iter": solver.MAX_ITER,
        "warmup_iters": solver.WARMUP_ITERS,
        "warmup_factor": solver.WARMUP_FACTOR,
    }


LR_SCHEDULES: dict[str, Callable[[CfgNode], Callable[[float], float]]] = {
    "WarmupPolyLR": _poly,
    "WarmupLinearLR": _linear,
}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with the decay groups of SOLVER.NO_DECAY."""
    solver = cfg.SOLVER
    groups = parameter_groups(model, base_lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, no_decay=solver.NO_DECAY)
    for group in groups:
        del group["param_names"]
    # Fused: one kernel for all parameters, which on a GPU also spares hundreds of launches a step.
    return torch.optim.AdamW(
        groups, lr=solver.BASE_LR, betas=tuple(solver.BETAS), weight_decay=solver.WEIGHT_DECAY, fused=True
    )


Clip = Callable[[Sequence[nn.Parameter]], None]
"""Bounds the gradients of parameters that all have one, in place."""


def _clip_full_model(parameters: Sequence[nn.Parameter], *, value: float, norm_type: float) -> None:
    nn.utils.clip_grad_norm_(parameters, value, norm_type)


def _clip_norms(parameters: Sequence[nn.Parameter], *, value: float, norm_type: float) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, value, norm_type)


def _clip_values(parameters: Sequence[nn.Parameter], *, value: float, norm_type: float) -> None:
    nn.utils.clip_grad_value_(parameters, value)


CLIP_TYPES: dict[str, Callable[..., None]] = {
    "full_model": _clip_full_model,
    "norm": _clip_norms,
    "value": _clip_values,
}


def build_clip(cfg: CfgNode) -> Clip | None:
    """What SOLVER.CLIP_GRADIENTS asks for, None where it is off.

    Not Detectron2's own, which wraps the optimizer and fails on parameters that got no gradient.

    Raises:
        KeyError: CLIP_TYPE is unknown.
    """
    node = cfg.SOLVER.CLIP_GRADIENTS
    if node.CLIP_TYPE not in CLIP_TYPES:
        raise KeyError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE={node.CLIP_TYPE!r} is unknown; choose from {sorted(CLIP_TYPES)}"
        )
    if not node.ENABLED:
        return None
    return partial(CLIP_TYPES[node.CLIP_TYPE], value=float(node.CLIP_VALUE), norm_type=float(node.NORM_TYPE))


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """The schedule of SOLVER.LR_SCHEDULER_NAME; one step per iteration.

    Raises:
        KeyError: the name is unknown.
    """
    name = cfg.SOLVER.LR_SCHEDULER_NAME
    if name not in LR_SCHEDULES:
        raise KeyError(f"SOLVER.LR_SCHEDULER_NAME={name!r} is unknown; choose from {sorted(LR_SCHEDULES)}")
    schedule = IterationSchedule(
        learning_rate=LR_SCHEDULES[name](cfg), base_lr=cfg.SOLVER.BASE_LR, max_iter=cfg.SOLVER.MAX_ITER
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=cfg.SOLVER.MAX_ITER)
