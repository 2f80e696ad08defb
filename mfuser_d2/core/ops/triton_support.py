"""Whether and where Triton kernels can run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_obstacle(tensor: Tensor) -> str | None:
    """Why this package's Triton kernels cannot run for a tensor, or None."""
    if tensor.device.type != "cuda" and not is_interpreted():
        return f"the tensor is on {tensor.device}, the kernels need an NVIDIA GPU"
    if tensor.dtype == torch.float64:
        return "the kernels compute in float32 and the tensor is float64"
    return None if has_triton() else "Triton is not installed"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches its kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
