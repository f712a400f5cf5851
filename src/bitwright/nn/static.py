"""Operations on int8 activations between static layers: quantize, dequantize, sum, pooling, lookup tables."""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn

from bitwright.kernels import native
from bitwright.nn.dropin import Replacement
from bitwright.nn.integer import Window, images, like, taps
from bitwright.nn.native import Memory, channels_last, dense, empty_output, handles

# An affine is a float32 tensor [scale, zero point, lowest code, highest code] of an int8 tensor: x = scale · (code − zero).


def to_codes(y: Tensor, affine: Tensor) -> Tensor:
    """Round and clamp y, which is already divided by the scale, with the zero point added, to int8. Changes y in place."""
    low, high = affine[2:]
    return y.round_().clamp_(low, high).to(torch.int8)


class Quantize(Replacement):
    """Quantize: float -> int8."""

    affine: Tensor

    def __init__(self, affine: Tensor, *, where: str) -> None:
        super().__init__()
        self.where, self.memory, self.dtype = where, Memory(), torch.float32
        self.register_buffer("affine", affine)

    def forward(self, x: Tensor) -> Tensor:
        if native is not None and handles(x, torch.float32):
            x = dense(x)
            y = torch.empty_like(x, dtype=torch.int8)
            native.enter_codes(x, y, *self.memory.of(self, self.affine.tolist), torch.get_num_threads())
            return y
        return to_codes(x.float() / self.affine[0] + self.affine[1], self.affine)


class Dequantize(Replacement):
    """Dequantize: int8 -> float."""

    affine: Tensor

    def __init__(self, affine: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("affine", affine)

    def forward(self, x: Tensor) -> Tensor:
        return ((x.float() - self.affine[1]) * self.affine[0]).to(self.dtype)


class StaticAdd(Replacement):
    """Sum of two int8 tensors, requantized to the output's scale.

    left, right: the inputs' affines; exit: the output's. y = a · s_a / s + b · s_b / s + constant.
    """

    left: Tensor
    right: Tensor
    exit: Tensor
    factors: Tensor

    def __init__(self, left: Tensor, right: Tensor, exit: Tensor) -> None:
        super().__init__()
        self.memory, self.dtype = Memory(), torch.float32
        constant = exit[1] - (left[0] * left[1] + right[0] * right[1]) / exit[0]
        for name, value in (("left", left), ("right", right), ("exit", exit)):
            self.register_buffer(name, value)
        self.register_buffer("factors", torch.stack([left[0] / exit[0], right[0] / exit[0], constant]))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if (
            native is not None
            and handles(a, torch.int8)
            and handles(b, torch.int8)
            and (a.shape, a.stride()) == (b.shape, b.stride())
        ):
            y = torch.empty_like(a)
            factors, bounds = self.memory.of(self, lambda: (self.factors.tolist(), self.exit[2:].tolist()))
            native.add_codes(a, b, y, factors, *bounds, torch.get_num_threads())
            return y
        y = (a * self.factors[0]).add_(self.factors[2]).add_(b * self.factors[1])
        return to_codes(y, self.exit)


class StaticMean(Replacement):
    """Average pooling of int8, requantized to the output's scale."""

    entry: Tensor
    exit: Tensor

    def __init__(self, pool: Callable[[Tensor], Tensor], entry: Tensor, exit: Tensor) -> None:
        super().__init__()
        self.pool, self.dtype = pool, torch.float32
        self.register_buffer("entry", entry)
        self.register_buffer("exit", exit)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.pool(x.float() - self.entry[1])  # without zero point, so that the padding's zeros are right
        return to_codes(mean * (self.entry[0] / self.exit[0]) + self.exit[1], self.exit)


class StaticMax(nn.Module):
    """Max pooling of int8, as maxima over kernel positions: torch's own supports int8 only up to 127 pixels."""

    def __init__(self, source: nn.MaxPool1d | nn.MaxPool2d) -> None:
        super().__init__()
        self.flat = isinstance(source, nn.MaxPool1d)

        def pair(size: int | tuple[int, ...], height: int) -> tuple[int, int]:
            width = size if isinstance(size, int) else size[-1]
            return (height, width) if self.flat else (size if isinstance(size, int) else size[0], width)

        top, left = pair(source.padding, 0)
        kernel, stride, dilation = pair(source.kernel_size, 1), pair(source.stride, 1), pair(source.dilation, 1)
        self.window = Window(kernel, stride, (left, left, top, top), dilation)

    def forward(self, x: Tensor) -> Tensor:
        """x int8 [B, C, H, W] or [B, C, L], or without B."""
        if native is not None and handles(x, torch.int8) and x.ndim == (3 if self.flat else 4):
            x, window = channels_last(x), self.window
            y = empty_output(x, window, x.shape[1], x.dtype)
            shape = window.kernel, window.stride, window.dilation, window.padding
            native.largest_codes(x, y, *shape, torch.get_num_threads())
            return y
        seen = self.window.patches(self.window.padded(images(x, flat=self.flat), -128))
        return like(reduce(torch.maximum, taps(seen)), x, flat=self.flat)


class Table(Replacement):
    """A unary function of int8 as a lookup table, int8 [256], for codes −128 … 127."""

    table: Tensor
    entry: Tensor
    exit: Tensor

    def __init__(self, f: Callable[[Tensor], Tensor], entry: Tensor, exit: Tensor, *, label: str) -> None:
        super().__init__()
        x = (torch.arange(-128.0, 128.0) - entry[1]) * entry[0]
        self.label, self.dtype = label, torch.float32
        self.register_buffer("table", to_codes(f(x) / exit[0] + exit[1], exit))
        self.register_buffer("entry", entry)
        self.register_buffer("exit", exit)

    def forward(self, x: Tensor) -> Tensor:
        if native is not None and handles(x, torch.int8):
            x = dense(x)
            y = torch.empty_like(x)
            native.look_up_codes(x, self.table, y, torch.get_num_threads())
            return y
        return self.table[x.int() + 128]

    def extra_repr(self) -> str:
        return self.label
