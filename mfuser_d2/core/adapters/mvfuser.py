"""MVFuser: a Mamba bottleneck over the tokens of both encoders (Eq. 4-6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mfuser_d2.core.adapters.co_adapter import JointAdapter, TokenLayout
from mfuser_d2.core.ops import depthwise_conv_silu, gated_rms_norm, selective_scan

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4
"""Range of the scan's initial step sizes, log-uniform, as in Mamba."""


class MVFuserBlock(nn.Module):
    """The bottleneck itself: in-projection, split, conv + SiLU on both halves, scan on one, gate by the other.

    Differs from the paper, as the release does: the step bias enters twice (in `dt_proj` and again inside the scan),
    the gate passes SiLU twice, the scan runs in one direction only and the result is scaled by a learned scalar.

    Args:
        dim: C, width of the tokens; the scan works on C / 2 channels.
        state_dim: states per channel.
        dropout: on the output, in training.
    """

    def __init__(self, *, dim: int, state_dim: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"MVFuser splits its width in two; {dim} is odd")
        inner = dim // 2
        self.state_dim = state_dim
        self.step_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(inner, inner, 3, groups=inner, bias=False)
        self.conv1d_z = nn.Conv1d(inner, inner, 3, groups=inner, bias=False)
        self.x_proj = nn.Linear(inner, self.step_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(self.step_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state_dim + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self._init_steps()

    def _init_steps(self) -> None:
        nn.init.uniform_(self.dt_proj.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        low, high = math.log(STEP_MIN), math.log(STEP_MAX)
        steps = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp().clamp(min=STEP_FLOOR)
        with torch.no_grad():
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step again

    def forward(self, tokens: Tensor) -> Tensor:
        """Corrections (N, T, C) for tokens (N, T, C)."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (N, T, C/2) each
        x = depthwise_conv_silu(x, self.conv1d_x.weight)
        z = depthwise_conv_silu(z, self.conv1d_z.weight)
        step, b, c = self.x_proj(x).split([self.step_rank, self.state_dim, self.state_dim], dim=-1)
        y = selective_scan(
            x.transpose(1, 2),
            self.dt_proj(step).transpose(1, 2),
            -torch.exp(_at_least_float32(self.A_log)),
            b.transpose(1, 2),
            c.transpose(1, 2),
            D=_at_least_float32(self.D),
            delta_bias=_at_least_float32(self.dt_proj.bias),
            delta_softplus=True,
        )  # (N, C/2, T)
        y = self.norm(y.transpose(1, 2), z)
        return self.dropout(self.out_proj(y)) * self.scale


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GatedRMSNorm(nn.Module):
    """`rms(y) * weight * silu(gate)` over the last axis (Eq. 6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(y, gate, self.weight)


class MVFuser(JointAdapter):
    """The paper's adapter: one Mamba bottleneck over `[v; l]`.

    Args:
        vfm_dim, vlm_dim, project_vfm: see `CoAdapter`.
        state_dim: states per channel of the scan.
        dropout: on the correction, in training.
    """

    def __init__(
        self, *, vfm_dim: int, vlm_dim: int, project_vfm: bool = False, state_dim: int = 16, dropout: float = 0.1
    ) -> None:
        super().__init__(vfm_dim=vfm_dim, vlm_dim=vlm_dim, project_vfm=project_vfm)
        self.block = MVFuserBlock(dim=vlm_dim, state_dim=state_dim, dropout=dropout)

    def fuse_joint(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        return self.block(tokens)
