"""Rows of floats as 8-bit values with one scale each: symmetric, rounded to nearest.

Shapes: a row is the last dim, [..., D] with scales [...].
"""

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest value of each 8-bit dtype, which a row's largest magnitude becomes."""


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [..., D] of `dtype`, float32 scales [...]) with values * scales near x.

    `dtype` is int8 or float8_e4m3fn. A row of zeros has scale 1. A row that holds NaN or an
    infinity comes back as NaN: its scale is not finite, so that nothing hides it.
    """
    largest = LARGEST[dtype]
    rows = x.float()
    peak = rows.abs().amax(-1)
    scales = torch.where(peak == 0, 1.0, peak / largest)
    # A peak below largest * 2**-149 would round its scale to zero, and divide by it.
    scales.clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = (rows / scales.unsqueeze(-1)).clamp_(-largest, largest)
    if dtype is torch.int8:
        scaled.round_()
    broken = ~torch.isfinite(peak)
    scales = scales.masked_fill_(broken, float("nan"))
    return scaled.masked_fill_(broken.unsqueeze(-1), 0.0).to(dtype), scales


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values * scales, multiplied in float32 and rounded once to `dtype`."""
    return (values.float() * scales.unsqueeze(-1)).to(dtype)
