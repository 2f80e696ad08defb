"""What `selective_scan` accepts: every refusal names the argument, its shape or type and the wanted one."""

from __future__ import annotations

import torch
from torch import Tensor


def check_inputs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **optional: Tensor | None) -> None:
    """Raises ValueError for wrong shapes, integer or complex inputs, empty dimensions and mixed devices.

    Args:
        u, delta, A, B, C: see `selective_scan`.
        optional: `D`, `z` and `delta_bias`, each a tensor or None.
    """
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, **optional}
    for name, tensor in named.items():
        if tensor is not None:
            _check_kind(name, tensor, u)
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u is {_shape(u)}; wanted (batch, channels, length) with at least one of each")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A is {_shape(A)}; wanted (channels, states) = ({channels}, N) as u is {_shape(u)}")
    for name, wanted in {"delta": u.shape, "z": u.shape, "D": (channels,), "delta_bias": (channels,)}.items():
        tensor = named.get(name)
        if tensor is not None and tuple(tensor.shape) != tuple(wanted):
            raise ValueError(f"{name} is {_shape(tensor)}; wanted {tuple(wanted)} as u is {_shape(u)}")
    for name in ("B", "C"):
        _check_map(name, named[name], batch, channels, A.shape[1], length)
    if B.dim() == C.dim() == 4 and B.shape[1] != C.shape[1]:
        raise ValueError(f"C is {_shape(C)}; wanted as many groups as B, which is {_shape(B)}")


def _check_kind(name: str, tensor: Tensor, u: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; wanted a tensor")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {_shape(tensor)}; wanted float16, bfloat16, float32 or float64 "
            "(complex and integer scans are not supported)"
        )
    if tensor.device != u.device:
        raise ValueError(f"{name} of shape {_shape(tensor)} is on {tensor.device}; wanted {u.device}, where u is")
    if (tensor.dtype == torch.float64) != (u.dtype == torch.float64) and name != "A":
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {_shape(tensor)}; wanted float64 for all or for none (u is {u.dtype})"
        )


def _check_map(name: str, matrix: Tensor, batch: int, channels: int, states: int, length: int) -> None:
    shape = tuple(matrix.shape)
    fits = shape in ((channels, states), (batch, states, length)) or (
        len(shape) == 4
        and (shape[0], *shape[2:]) == (batch, states, length)
        and shape[1] > 0
        and channels % shape[1] == 0
    )
    if not fits:
        raise ValueError(
            f"{name} is {shape}; wanted (batch, states, length) = {(batch, states, length)}, (batch, groups, states, "
            f"length) with groups dividing {channels}, or (channels, states) = {(channels, states)}"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
