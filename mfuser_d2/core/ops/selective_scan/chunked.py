"""Backend `torch`: the scan in chunks of time with its own backward, in plain PyTorch operators, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mfuser_d2.core.ops.selective_scan.parallel import scan_parallel

CHUNK_ELEMENTS = 1 << 19
"""States worked on at once: two such buffers stay in the outer caches of a CPU."""
MIN_CHUNK, MAX_CHUNK = 16, 256
"""Time steps in a chunk; at least as many as usual states, so that the saved states are no larger than `u`."""


def scan_chunked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, D, L) and last state (B, D, N); arguments as `selective_scan` has checked them.

    Memory beyond inputs and outputs: one chunk of states, and for the backward the states between chunks; the states
    within a chunk are computed a second time there. Decays are multiplied, never divided by, so long ones stay finite.
    While a model is exported, `scan_parallel` takes over.
    """
    if _is_exporting():
        return scan_parallel(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return _ChunkedScan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # older than 2.7: both at once
    return is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


@dataclass
class _Inputs:
    """The scan's inputs with channels last: per-step maps are (K, B, G, N, 1), fixed ones (G, N, D/G)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.u.dtype, torch.float32)
        self.batch, self.channels, self.length = self.u.shape
        self.groups = next((m.shape[1] for m in (self.B, self.C) if m.dim() == 4), 1)
        self.state_shape = (self.batch, self.groups, self.A.shape[1], self.channels // self.groups)
        self.rates = self.fixed(self.A)
        self.binary_rates = self.rates / math.log(2)
        per_step = self.batch * self.channels * self.A.shape[1]
        self.chunk = min(max(CHUNK_ELEMENTS // max(per_step, 1), MIN_CHUNK), MAX_CHUNK)
        self.starts = range(0, self.length, self.chunk)
        steps = min(self.chunk, self.length)
        self.decays = self.rates.new_empty(steps, *self.state_shape)  # one chunk's, written anew for the next
        self.states = self.rates.new_empty(steps + 1, *self.state_shape)
        self.decay_views, self.state_views = self.decays.unbind(0), self.states.unbind(0)

    def fixed(self, matrix: Tensor) -> Tensor:
        """(D, N) as (G, N, D/G)."""
        return matrix.to(self.dtype).view(self.groups, -1, matrix.shape[1]).transpose(1, 2).contiguous()

    def rows(self, x: Tensor, start: int) -> Tensor:
        """Steps of (B, D, L) as (K, B, G, 1, D/G), with neighbouring channels side by side."""
        x = x[:, :, start : start + self.chunk].permute(2, 0, 1).to(self.dtype)
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x.reshape(x.shape[0], self.batch, self.groups, 1, -1)

    def columns(self, matrix: Tensor, start: int) -> Tensor:
        """Steps of (B, G, N, L) as (K, B, G, N, 1), or (D, N) as (G, N, D/G)."""
        if matrix.dim() == 2:
            return self.fixed(matrix)
        return matrix[..., start : start + self.chunk].permute(3, 0, 1, 2).to(self.dtype).unsqueeze(-1)

    def steps(self, start: int) -> tuple[Tensor, Tensor]:
        """Step sizes (K, B, G, 1, D/G) before and after softplus."""
        raw = self.rows(self.delta, start)
        if self.delta_bias is not None:
            raw = raw + self.delta_bias.to(self.dtype).view(self.groups, 1, -1)
        return raw, F.softplus(raw) if self.delta_softplus else raw


def _run_chunk(x: _Inputs, start: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays (K, ...) and states (K + 1, ...) of a chunk, in x's buffers; the first state is the given one."""
    _, steps = x.steps(start)
    length = steps.shape[0]
    decays, states = x.decays[:length], x.states[: length + 1]
    torch.mul(steps, x.binary_rates, out=decays).exp2_()  # (K, B, G, N, D/G); on CPUs exp2 is four times as fast as exp
    x.states[0] = state
    torch.mul(steps * x.rows(x.u, start), x.columns(x.B, start), out=states[1:])
    before = x.state_views[0]
    for decay, after in zip(x.decay_views[:length], x.state_views[1:]):
        after.addcmul_(decay, before)
        before = after
    return decays, states


def _over_states(columns: Tensor, states: Tensor) -> Tensor:
    """Sum over N of columns * states: (K, B, G, 1, D/G)."""
    if columns.dim() == 5:
        return columns.transpose(-1, -2) @ states
    return (columns * states).sum(-2, keepdim=True)


def _over_channels(like: Tensor, states: Tensor, rows: Tensor) -> Tensor:
    """Gradient of a map: (K, B, G, N, 1) for a per-step one, (G, N, D/G) for a fixed one."""
    if like.dim() == 4:
        return states @ rows.transpose(-1, -2)
    return (states * rows).sum((0, 1))


def _store(target: Tensor, start: int, rows: Tensor) -> None:
    """Writes (K, B, G, 1, D/G) into steps of (B, D, L)."""
    target[:, :, start : start + rows.shape[0]] = rows.flatten(2).permute(1, 2, 0)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus):
        x = _Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(u)
        state = u.new_zeros(x.state_shape, dtype=x.dtype)
        between = []
        skip = None if D is None else D.to(x.dtype).view(x.groups, 1, -1)
        with torch.autocast(u.device.type, enabled=False):
            for start in x.starts:
                if keep:
                    between.append(state)
                _, states = _run_chunk(x, start, state)
                state = states[-1].clone()
                rows = _over_states(x.columns(C, start), states[1:])
                _store(y, start, rows if skip is None else rows + skip * x.rows(u, start))
        if keep:
            ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, *between)
            ctx.delta_softplus = delta_softplus
        return y, state.transpose(2, 3).reshape(x.batch, x.channels, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        u, delta, A, B, C, D, delta_bias, *between = ctx.saved_tensors
        x = _Inputs(u, delta, A, B, C, D, delta_bias, ctx.delta_softplus)
        grads = _Gradients(x)
        carry = grad_state.to(x.dtype).reshape(x.batch, x.groups, -1, A.shape[1]).transpose(2, 3)
        with torch.autocast(u.device.type, enabled=False):
            for start, state in zip(reversed(x.starts), reversed(between), strict=True):
                carry = grads.add_chunk(start, state, carry, x.rows(grad_y, start))
        return (*grads.results(), None)


class _Gradients:
    """Gradients of all inputs, gathered chunk by chunk from the end."""

    def __init__(self, x: _Inputs) -> None:
        self.x = x
        self.u, self.delta = torch.empty_like(x.u), torch.empty_like(x.delta)
        self.A = torch.zeros_like(x.rates)
        self.maps = [torch.zeros_like(x.rates) if m.dim() == 2 else torch.empty_like(m) for m in (x.B, x.C)]
        self.D, self.bias = (x.rates.new_zeros(x.groups, x.rates.shape[-1]) for _ in range(2))

    def add_chunk(self, start: int, state: Tensor, carry: Tensor, grad_rows: Tensor) -> Tensor:
        """Adds a chunk's part; takes and returns the gradient of its last and of its first state (B, G, N, D/G)."""
        x = self.x
        raw, steps = x.steps(start)
        inputs, in_map = x.rows(x.u, start), x.columns(x.B, start)
        decays, states = _run_chunk(x, start, state)
        grad_states = grad_rows * x.columns(x.C, start)  # (K, B, G, N, D/G)
        grad_states[-1] += carry
        views = grad_states.unbind(0)
        for t in range(len(views) - 2, -1, -1):
            views[t].addcmul_(x.decay_views[t + 1], views[t + 1])
        carry = x.decay_views[0] * views[0]
        self._add_map(0, x.B, start, _over_channels(x.B, grad_states, steps * inputs))
        self._add_map(1, x.C, start, _over_channels(x.C, states[1:], grad_rows))
        grad_drive = _over_states(in_map, grad_states)
        grad_exponent = grad_states.mul_(states[:-1]).mul_(decays)  # of steps * A
        grad_steps = grad_drive * inputs + torch.mul(grad_exponent, x.rates, out=decays).sum(-2, keepdim=True)
        self.A += grad_exponent.mul_(steps).sum((0, 1))
        if x.delta_softplus:
            grad_steps = grad_steps * torch.sigmoid(raw)
        grad_inputs = grad_drive * steps
        if x.D is not None:
            grad_inputs = grad_inputs + grad_rows * x.D.to(x.dtype).view(x.groups, 1, -1)
            self.D += (grad_rows * inputs).sum((0, 1, 3))
        self.bias += grad_steps.sum((0, 1, 3))
        _store(self.u, start, grad_inputs)
        _store(self.delta, start, grad_steps)
        return carry

    def _add_map(self, index: int, like: Tensor, start: int, part: Tensor) -> None:
        if like.dim() == 2:
            self.maps[index] += part
        else:
            self.maps[index][..., start : start + part.shape[0]] = part.squeeze(-1).permute(1, 2, 3, 0)

    def results(self) -> tuple[Tensor | None, ...]:
        """In the order and the dtypes of the scan's inputs."""
        x = self.x

        def unfix(grad: Tensor, like: Tensor) -> Tensor:
            return grad.transpose(1, 2).reshape(like.shape).to(like.dtype) if like.dim() == 2 else grad

        return (
            self.u,
            self.delta,
            unfix(self.A, x.A),
            unfix(self.maps[0], x.B),
            unfix(self.maps[1], x.C),
            None if x.D is None else self.D.reshape(-1).to(x.D.dtype),
            None if x.delta_bias is None else self.bias.reshape(-1).to(x.delta_bias.dtype),
        )
