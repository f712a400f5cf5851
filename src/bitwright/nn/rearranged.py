"""Transposed, 3-D and bordered convolutions as plain ones of rearranged inputs: these need no integer form of their own.

Source for transposed convolutions: Dumoulin and Visin 2016, arXiv:1603.07285, section 4.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvTransposeNd

from bitwright.nn.dropin import Replacement

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
PLAIN: dict[type[nn.Module], type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    nn.ConvTranspose1d: nn.Conv1d, nn.ConvTranspose2d: nn.Conv2d, nn.ConvTranspose3d: nn.Conv3d,
}  # fmt: skip


class Spread(nn.Module):
    """Insert zeros between and around the positions of x [B, C, ...]; a plain convolution then gives the transposed one."""

    def __init__(self, source: Transposed) -> None:
        super().__init__()
        self.stride = source.stride
        reach = zip(source.dilation, source.kernel_size, source.padding, strict=True)
        self.border = [d * (k - 1) - p for d, k, p in reach]  # type: ignore[operator]

    def forward(self, x: Tensor, more: list[int]) -> Tensor:
        """more: the output padding of each spatial dimension."""
        n = len(self.stride)
        for axis, step in zip(range(x.ndim - n, x.ndim), self.stride, strict=True):
            if step > 1:
                length = (x.shape[axis] - 1) * step + 1
                x = pad(x.unsqueeze(axis + 1), [0, 0] * (x.ndim - axis - 1) + [0, step - 1])
                x = x.flatten(axis, axis + 1).narrow(axis, 0, length)
        sides = [side for b, extra in zip(self.border, more, strict=True) for side in (b + extra, b)]
        return pad(x, sides[::-1])


class Rearranged(Replacement):
    """A layer that torch has no integer kernel for, as another convolution, `layer`, on its rearranged input."""

    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def bias(self) -> Tensor | None:
        """As the float layer's."""
        return self.layer.bias


class TransposedConvolution(Rearranged):
    """ConvTranspose1d, 2d or 3d: zeros are inserted into its input, then a convolution with the flipped kernel."""

    output_padding: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(self, source: Transposed) -> None:
        super().__init__()
        self.describe(source)
        self.spread, axes = Spread(source), tuple(range(2, source.weight.ndim))
        self.layer = next(plain for kind, plain in PLAIN.items() if isinstance(source, kind))(
            source.in_channels,
            source.out_channels,
            source.kernel_size,  # type: ignore[arg-type]
            dilation=source.dilation,  # type: ignore[arg-type]
            groups=source.groups,
            bias=source.bias is not None,
            device="meta",
        )
        turned = _swapped(source.weight.detach(), source.groups).flip(axes).contiguous()
        self.layer.weight, self.layer.bias = nn.Parameter(turned), source.bias
        self.train(source.training)

    @property
    def weight(self) -> Tensor:
        """The weight in the float layer's layout, [C, N / groups, ...]."""
        w = self.layer.weight
        return _swapped(w, self.groups).flip(tuple(range(2, w.ndim)))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As torch's."""
        more: Any = list(self.output_padding)
        if output_size is not None:
            n = len(self.stride)
            shape = self.stride, self.padding, self.kernel_size, n, self.dilation
            more = _ConvTransposeNd._output_padding(self, input, output_size, *shape)  # type: ignore[arg-type]
        return self.layer(self.spread(input, more))


def _swapped(w: Tensor, groups: int) -> Tensor:
    """Swap input and output channels: [C, N / groups, ...] -> [N, C / groups, ...], and back."""
    return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


class Slices(nn.Module):
    """x [B, C, D, H, W] -> [B·D', C·kd, H, W]: the input slices of each output plane of a Conv3d, as channels."""

    def __init__(self, source: nn.Conv3d) -> None:
        super().__init__()
        self.border = source._reversed_padding_repeated_twice[4:]
        self.depth, self.step, self.dilation = source.kernel_size[0], source.stride[0], source.dilation[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x[None] if x.ndim == 4 else x
        x = pad(x, [0, 0, 0, 0, *self.border])
        seen = x.unfold(2, (self.depth - 1) * self.dilation + 1, self.step)[..., :: self.dilation]
        return seen.permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)


class Planes(nn.Module):
    """Undo `Slices` on the output: y [B·D', N, H', W'] -> [B, N, D', H', W'], without B if the input x has none."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        batch = 1 if x.ndim == 4 else x.shape[0]
        y = y.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
        return y[0] if x.ndim == 4 else y


class SlicedConvolution(Rearranged):
    """Conv3d as a Conv2d on slices of its input."""

    def __init__(self, source: nn.Conv3d) -> None:
        super().__init__()
        self.describe(source)
        self.depth, self.slices, self.planes = source.kernel_size[0], Slices(source), Planes()
        left, _, top, *_ = source._reversed_padding_repeated_twice
        same = source.padding == "same"
        self.layer = nn.Conv2d(
            source.in_channels * self.depth,
            source.out_channels,
            source.kernel_size[1:],  # type: ignore[arg-type]
            stride=source.stride[1:],  # type: ignore[arg-type]
            padding="same" if same else (top, left),
            dilation=source.dilation[1:],  # type: ignore[arg-type]
            groups=source.groups,
            bias=source.bias is not None,
            device="meta",
        )
        self.layer.weight, self.layer.bias = nn.Parameter(source.weight.detach().flatten(1, 2)), source.bias
        self.train(source.training)

    @property
    def weight(self) -> Tensor:
        """As the float layer's."""
        return self.layer.weight.unflatten(1, (-1, self.depth))

    def forward(self, input: Tensor) -> Tensor:
        """As torch's."""
        return self.planes(self.layer(self.slices(input)), input)


class BorderedConvolution(Rearranged):
    """A convolution padded by its own input (reflect, replicate, circular): pads, then a convolution without padding."""

    padding_mode: str

    def __init__(self, source: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.describe(source)
        self.border = list(source._reversed_padding_repeated_twice)
        self.layer = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(source, kind))(
            source.in_channels,
            source.out_channels,
            source.kernel_size,  # type: ignore[arg-type]
            stride=source.stride,  # type: ignore[arg-type]
            dilation=source.dilation,  # type: ignore[arg-type]
            groups=source.groups,
            bias=source.bias is not None,
            device="meta",
        )
        self.layer.weight, self.layer.bias = source.weight, source.bias
        self.train(source.training)

    @property
    def weight(self) -> Tensor:
        """As the float layer's."""
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:
        """As torch's."""
        return self.layer(pad(input, self.border, mode=self.padding_mode))


def as_plain(module: nn.Module) -> nn.Module | None:
    """A transposed, 3-D or bordered convolution as a plain one (Conv3d may remain); None for any other module."""
    if isinstance(module, Transposed):
        return TransposedConvolution(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode != "zeros":
        return BorderedConvolution(module)
    return SlicedConvolution(module) if isinstance(module, nn.Conv3d) else None


LEAVES = (Spread, Slices, Planes)
