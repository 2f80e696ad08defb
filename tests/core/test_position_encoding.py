import math

import pytest
import torch

from mfuser_d2.core.position_encoding import sine_position_encoding


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (7, 2)])
def test_matches_the_formula_cell_by_cell(size):
    height, width = size
    encoding = sine_position_encoding(size, 8, temperature=100.0, dtype=torch.float64)
    assert encoding.shape == (height * width, 8)
    for y in range(height):
        for x in range(width):
            for first, position in ((0, (y + 1) / (height + 1e-6)), (4, (x + 1) / (width + 1e-6))):
                for channel in range(4):
                    angle = 2 * math.pi * position / 100.0 ** (2 * (channel // 2) / 4)
                    wanted = math.cos(angle) if channel % 2 else math.sin(angle)
                    assert encoding[y * width + x, first + channel].item() == pytest.approx(wanted, abs=1e-12)


def test_half_precision_is_rounded_only_at_the_end():
    exact = sine_position_encoding((9, 11), 16)
    torch.testing.assert_close(sine_position_encoding((9, 11), 16, dtype=torch.bfloat16), exact.bfloat16())


def test_refuses_a_width_that_is_no_multiple_of_four():
    with pytest.raises(ValueError, match="dim=6"):
        sine_position_encoding((2, 2), 6)
