"""Fixed positional encodings of a grid of tokens."""

import math

import torch
from torch import Tensor


def sine_position_encoding(
    size: tuple[int, int],
    dim: int,
    *,
    temperature: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sine and cosine of the row and column of each cell, rows in the first half of the channels.

    Positions count from 1 and are scaled so that the last row (column) lies at 2 pi; even channels are sines,
    odd ones cosines of the same frequency.

    Args:
        size: (height, width) of the grid.
        dim: number of channels, a multiple of 4.
        temperature: ratio of the lowest to the highest frequency.
        device, dtype: of the result; the arithmetic is done in float32, or in float64 where that is asked for.
    Returns:
        (h*w, dim), row-major.
    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} is not a multiple of 4 (sine and cosine for rows and for columns)")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    half = dim // 2
    exponents = 2 * torch.arange(half // 2, device=device, dtype=work) / half
    frequencies = temperature**exponents  # (half / 2,)

    def encode(length: int) -> Tensor:
        # The 1e-6 is part of the released networks' encoding, not a guard against a division by zero.
        position = torch.arange(1, length + 1, device=device, dtype=work) / (length + 1e-6) * (2 * math.pi)
        angle = position[:, None] / frequencies
        return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)  # (length, half)

    height, width = size
    rows = encode(height)[:, None].expand(height, width, half)
    columns = encode(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), dim=2).flatten(0, 1).to(dtype)
