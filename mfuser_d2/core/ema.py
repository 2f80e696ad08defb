"""Moving average of the trained weights; plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mfuser_d2.core.checkpoint import trainable_keys
from mfuser_d2.core.checkpoint_file import check_kinds


class WeightAverage:
    """An exponential moving average of what is trained, batch statistics included.

    After step n the average moves by 1 - min(decay, n / (n + 9)) towards the weights: it begins at them, and a long
    memory does not hold on to the first, untrained ones.

    Args:
        model: its frozen parts are left out.
        decay: what stays of the average in a step, 0..1 (1 excluded); 0.999 looks back over about 1000 steps.
    Raises:
        ValueError: the decay is outside that range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA_DECAY={decay} is outside 0..1 (1 excluded)")
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self._keys = trainable_keys(model)
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in; to be called after every optimizer step."""
        live = self._live()
        step = 1 - min(self.decay, self.num_updates / (self.num_updates + 9))
        self.num_updates += 1
        if not self._average:
            self._average = {key: value.clone() for key, value in live.items()}
        for key, value in live.items():
            if value.is_floating_point():
                self._average[key].lerp_(value, step)
            else:  # counters
                self._average[key].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside the block and its own weights again after it."""
        own = {key: value.clone() for key, value in self._live().items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps to go on."""
        return {"num_updates": self.num_updates, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; the decay may have changed.

        Raises:
            ValueError: the average belongs to another model.
        """
        odd = sorted(set(state["average"]) ^ set(self._keys)) if state["average"] else []
        if odd:
            raise ValueError(f"the checkpoint's average does not fit this model: {len(odd)} keys differ, e.g. {odd[0]}")
        live = self._live()
        for key, value in state["average"].items():
            check_kinds(live[key], value, key)
        self.num_updates = state["num_updates"]
        self._average = {key: value.to(live[key].device, copy=True) for key, value in state["average"].items()}

    def _live(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {key: state[key] for key in self._keys}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        live = self._live()
        for key, value in values.items():
            live[key].copy_(value)
        self.model.train(self.model.training)  # modules drop what they computed from the other weights
