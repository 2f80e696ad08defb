"""Small numerical steps the network is made of, each with a plain PyTorch path."""

from mfuser_d2.core.ops.fused import depthwise_conv_silu, gated_rms_norm
from mfuser_d2.core.ops.selective_scan import selective_scan

__all__ = ["depthwise_conv_silu", "gated_rms_norm", "selective_scan"]
