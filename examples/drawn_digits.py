"""Images of digits, drawn: a small font, turned, stretched, moved, and covered with noise."""

import math

import torch
from torch import Tensor
from torch.nn import functional

FONT = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111", "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip


def glyphs() -> Tensor:
    """The ten digits [10, 1, 7, 5] of zeros and ones."""
    rows = [[[float(bit) for bit in row] for row in digit.split()] for digit in FONT]
    return torch.tensor(rows)[:, None]


def drawn_digits(count: int, *, seed: int, noise: float = 0.35) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 28, 28] and their labels [count]."""
    generator = torch.Generator().manual_seed(seed)

    def spread(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    labels = torch.randint(10, (count,), generator=generator)
    angle, stretch, size = spread(-0.4, 0.4), spread(0.8, 1.25), spread(0.9, 1.5)
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    moves = torch.stack([spread(-0.3, 0.3), spread(-0.3, 0.3)], dim=1)
    turn = torch.stack([torch.stack([cos * 1.4 * stretch, -sin], 1), torch.stack([sin, cos / stretch], 1)], dim=1)
    grid = functional.affine_grid(torch.cat([turn, moves[:, :, None]], dim=2), [count, 1, 28, 28], align_corners=False)
    images = functional.grid_sample(glyphs()[labels], grid, align_corners=False)
    images = images + noise * torch.randn(images.shape, generator=generator)
    return images.clamp(-1, 2) / math.sqrt(2), labels
