"""`selective_scan`: one meaning, several backends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from mfuser_d2.core.ops.selective_scan.checks import check_inputs
from mfuser_d2.core.ops.selective_scan.chunked import scan_chunked
from mfuser_d2.core.ops.selective_scan.cpu import cpu_obstacle, scan_cpu
from mfuser_d2.core.ops.selective_scan.mamba import mamba_obstacle, scan_mamba
from mfuser_d2.core.ops.selective_scan.parallel import scan_parallel
from mfuser_d2.core.ops.selective_scan.reference import scan_reference
from mfuser_d2.core.ops.selective_scan.triton_backend import scan_obstacle, scan_triton

logger = logging.getLogger(__name__)

ScanFunction = Callable[..., tuple[Tensor, Tensor]]
Reason = Callable[..., str | None]


def _always(*_: Tensor) -> None:
    return None


BACKENDS: dict[str, tuple[ScanFunction, Reason]] = {
    "mamba_ssm": (scan_mamba, mamba_obstacle),
    "triton": (scan_triton, scan_obstacle),
    "cpu": (scan_cpu, cpu_obstacle),
    "torch": (scan_chunked, _always),
    "parallel": (scan_parallel, _always),
    "reference": (scan_reference, _always),
}
"""Fastest first: the scan, and a function of (u, A, B, C) that says why it cannot run, or None."""

_forced: list[str] = []
_announced: set[tuple[str, str]] = set()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan: `h[t] = exp(delta A) h[t-1] + delta B u`, `y[t] = (C h[t] + D u) * silu(z)`.

    Any strides do; (N, T, C) tokens transposed to (N, C, T) are read where they lie. The state is float32, or float64
    for float64 inputs.

    Args:
        u, delta: inputs and step sizes (batch, channels, length).
        A: rates (channels, states), real.
        B, C: maps into and out of the state, (batch, states, length), (batch, groups, states, length) or, constant in
            time, (channels, states).
        D: skip (channels,). z: gate like `u`. delta_bias: (channels,), added to `delta`.
        delta_softplus: pass the step sizes through softplus.
        return_last_state: also return the last state (batch, channels, states).
        backend: "auto" for the fastest present, logged once, or a name in `BACKENDS`.
    Returns:
        (batch, channels, length) in u's dtype, or a tuple of that and the last state.
    Raises:
        ValueError: a wrong shape, dtype or device; the message names the argument.
        KeyError: an unknown backend.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    check_inputs(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias)
    B, C = (m.unsqueeze(1) if m.dim() == 3 else m for m in (B, C))
    scan = _choose(backend, u, A, B, C)
    y, state = scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    if z is not None:
        y = (y.to(state.dtype) * F.silu(z.to(state.dtype))).to(u.dtype)
    return (y, state) if return_last_state else y


@contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Makes `backend="auto"` mean `name` inside the block: "parallel" exports a model as few plain operators."""
    if name not in BACKENDS:
        raise KeyError(_unknown(name))
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def available_backends(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> dict[str, str | None]:
    """For every backend why it cannot run for these inputs, or None where it can; fastest first."""
    B, C = (m.unsqueeze(1) if m.dim() == 3 else m for m in (B, C))
    return {name: reason(u, A, B, C) for name, (_, reason) in BACKENDS.items()}


def _unknown(name: str) -> str:
    return f"scan backend {name!r} is unknown; choose from {['auto', *BACKENDS]}"


def _choose(backend: str, u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> ScanFunction:
    if backend == "auto" and _forced:
        backend = _forced[-1]
    if backend != "auto":
        if backend not in BACKENDS:
            raise KeyError(_unknown(backend))
        scan, reason = BACKENDS[backend]
        obstacle = reason(u, A, B, C)
        if obstacle:
            raise RuntimeError(
                f"scan backend {backend!r} cannot run here: {obstacle}; backend='auto' picks one that can"
            )
        return scan
    for name, (scan, reason) in BACKENDS.items():  # noqa: B007
        if reason(u, A, B, C) is None:
            break
    _announce(name, u)
    return scan


def _announce(name: str, u: Tensor) -> None:
    if torch.compiler.is_compiling() or (name, u.device.type) in _announced:
        return
    _announced.add((name, u.device.type))
    logger.info("selective_scan on %s uses backend %r", u.device.type, name)
