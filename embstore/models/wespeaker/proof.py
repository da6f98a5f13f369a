"""What a short cut has to prove itself on: made-up recordings, against the plain module in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LENGTHS = (211, 150, 33)
"""Frames. Three, as one alone shows no length that was taken for a constant; short ones too, as some layers look at
100 frames at a time."""
SAME = 0.99999
CLOSE = 0.9999
"""Cosine that the same numbers, and that numbers of a lower precision, must reach."""


def examples(bins: int, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """Features, each [1, frames, bins], the same every time."""
    import torch

    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, frames, bins, generator=random).to(device) for frames in LENGTHS]


def lowest_cosine(rows: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The lowest cosine of vectors, each [1, dim], to what they should be; NaN if one is not finite."""
    import torch

    return float(torch.cosine_similarity(torch.cat(list(rows)), torch.cat(list(expected))).min())
