"""Parameter groups and learning-rate schedules as plain functions, shared by every trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

# Which trained parameters get no weight decay, by parts of their names. A name part matches where it contains the text:
# "norm" covers layer and RMS norms (`norm`, `norm1`, `post_norm`), but neither the group norms of convolutions (`gn`),
# nor the pyramid's batch norm, nor layer norms inside a sequence of projections (`text_proj.0`): those are decayed, as
# in the release.
NO_DECAY_RULES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "norms": ("norm",),
    "norms_embeddings": ("norm", "query_embed", "level_embed"),
}


def parameter_groups(
    model: nn.Module, *, base_lr: float, weight_decay: float, no_decay: str = "norms_embeddings"
) -> list[dict[str, Any]]:
    """The trained parameters of a model as at most two groups, decayed and not, for a torch optimizer.

    Args:
        model: only parameters with `requires_grad` are taken, each once.
        base_lr: learning rate of every group.
        weight_decay: decoupled decay per step and unit of learning rate.
        no_decay: a key of `NO_DECAY_RULES`.
    Returns:
        Groups with "params", "lr", "weight_decay" and "param_names" (for reading only).
    Raises:
        KeyError: the rule is unknown.
        ValueError: nothing is trained.
    """
    if no_decay not in NO_DECAY_RULES:
        raise KeyError(f"SOLVER.NO_DECAY={no_decay!r} is unknown; choose from {sorted(NO_DECAY_RULES)}")
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if is_undecayed(name, no_decay) else weight_decay
        group = groups.setdefault(decay, {"params": [], "lr": base_lr, "weight_decay": decay, "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
    if not groups:
        raise ValueError("The model has no parameter with requires_grad: there is nothing to train.")
    return [groups[decay] for decay in sorted(groups, reverse=True)]


def is_undecayed(name: str, no_decay: str) -> bool:
    """Whether a rule exempts the parameter of this dotted name from weight decay."""
    return any(text in part for part in name.split(".") for text in NO_DECAY_RULES[no_decay])


def poly_lr(
    iteration: float,
    *,
    base_lr: float,
    max_iter: int,
    end_lr: float = 1e-6,
    power: float = 0.9,
    warmup_iters: int = 1500,
    warmup_factor: float = 1e-6,
) -> float:
    """Learning rate of the release: poly decay to `end_lr`, multiplied by a linear warm-up while that lasts.

    The warm-up multiplies the value that is already decaying, so `base_lr` itself is never reached.

    Args:
        iteration: from 0.
        base_lr, end_lr: learning rates at the start of the poly decay and at `max_iter`.
        power: exponent of the decay; 1 is linear.
        warmup_iters: length of the warm-up; 0 = none.
        warmup_factor: what the warm-up multiplies with at iteration 0.
    """
    decayed = (base_lr - end_lr) * (1 - iteration / max_iter) ** power + end_lr
    return decayed * _warmup(iteration, warmup_iters, warmup_factor)


def linear_lr(
    iteration: float,
    *,
    base_lr: float,
    max_iter: int,
    end_lr: float = 0.0,
    warmup_iters: int = 1500,
    warmup_factor: float = 1e-6,
) -> float:
    """Learning rate of the paper: linear warm-up to `base_lr`, then a straight line to `end_lr` at `max_iter`.

    Differs from the release in that `base_lr` is reached, at the end of the warm-up. Arguments as in `poly_lr`.
    """
    if iteration < warmup_iters:
        return base_lr * _warmup(iteration, warmup_iters, warmup_factor)
    left = (max_iter - iteration) / max(max_iter - warmup_iters, 1)
    return end_lr + (base_lr - end_lr) * left


def _warmup(iteration: float, warmup_iters: int, warmup_factor: float) -> float:
    if iteration >= warmup_iters:
        return 1.0
    return 1 - (1 - iteration / warmup_iters) * (1 - warmup_factor)
