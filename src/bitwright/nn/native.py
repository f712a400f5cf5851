"""Pack integer layers for the native extension, one call for each layer; nn/integer.py gives the same bits in torch."""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bitwright.kernels import native
from bitwright.nn.integer import Window

PANEL, BLOCK = 16, 4  # outputs in a panel; panels in a block
FASTER = native is not None and native.names() != ["scalar"]  # torch's own products are faster than scalar kernels
POINT = Window((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))  # the window of a linear layer


def handles(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the native extension can be used for x: it is built, x is a plain CPU tensor of this dtype, and not traced."""
    plain = type(x) is Tensor and x.dtype == dtype and x.is_cpu
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return native is not None and FASTER and plain and not traced


class Memory:
    """Cache of a module's packed form, which is rebuilt if the buffers change. It is not copied or saved with the module."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []
        self.versions: list[int] = []
        self.made: Any = None

    def of(self, module: nn.Module, make: Callable[[], Any]) -> Any:
        """The result of `make`, cached for as long as the module's buffers do not change."""
        now = [*module._buffers.values(), *(other.codes for other in vars(module).get("lender", ()))]
        versions = [b._version for b in now if b is not None and not b.is_inference()]
        if versions != self.versions or len(now) != len(self.seen) or not all(map(is_, now, self.seen)):
            self.seen, self.versions, self.made = now, versions, make()
        return self.made

    def __reduce__(self) -> Any:  # copies and pickles begin empty
        return Memory, ()


def packed(
    values: Tensor, scale: Tensor, constant: Tensor, sums: Tensor, *, window: Window | None, channels: int
) -> Any:
    """Pack a layer: values int8 [N, K], scale [N, G], constant [N], sums [N] or [0]. channels: of the input."""
    assert native is not None
    N, G = scale.shape
    seen = window or POINT
    groups = seen.groups
    alone = 1 < groups == channels == N
    kh, kw = seen.kernel
    if window is None:
        taps, step = (1, G), -(-values.shape[1] // G)
    elif groups == 1 and seen.dilation[1] == 1:
        taps, step = (kh, 1), 0  # a row of the window is contiguous in channels-last memory
    else:
        taps, step = (kh, kw), seen.dilation[1] * channels
    T = taps[0] * taps[1]
    if window is None:
        values = pad(values, (0, G * step - values.shape[1]))
    length = values.shape[1] // T
    stretches = values.view(1 if alone else groups, -1, T, length)
    start = -128 * values.view(N, G, -1).sum(2, dtype=torch.int32)
    return native.IntegerLayer(
        w=_channels(values) if alone else _panels(stretches),
        start=_numbers(start, groups, alone=alone),
        scale=_numbers(scale, groups, alone=alone),
        constant=_numbers(constant[:, None], groups, alone=alone),
        sums=_numbers((sums if len(sums) else torch.zeros(N))[:, None], groups, alone=alone),
        N=N,
        groups=groups,
        C=channels // groups,
        groups_of_k=G,
        taps=taps,
        tap_step=step,
        steps=-(-length // 4),
        kernel=seen.kernel,
        stride=seen.stride,
        dilation=seen.dilation,
        padding=seen.padding,
    )


def _panels(values: Tensor) -> Tensor:
    """Reorder weights [groups, n, T, length]: for each group and each block of four panels [T, length / 4, panels, 16, 4]."""
    groups, n, T, length = values.shape
    padded = pad(values, (0, -length % 4, 0, 0, 0, -n % PANEL)).view(groups, -1, PANEL, T, -(-length // 4), 4)
    blocks = [block.permute(0, 3, 4, 1, 2, 5).reshape(groups, -1) for block in padded.split(BLOCK, 1)]
    return torch.cat(blocks, 1).flatten()


def _numbers(x: Tensor, groups: int, *, alone: bool) -> Tensor:
    """Reorder one number for each output, [N, G]: for each group and each block of four panels [G, panels, 16]."""
    each = x.reshape(1 if alone else groups, -1, x.shape[1])
    padded = pad(each, (0, 0, 0, -each.shape[1] % PANEL)).unflatten(1, (-1, PANEL))
    blocks = [block.permute(0, 3, 1, 2).reshape(len(each), -1) for block in padded.split(BLOCK, 1)]
    return torch.cat(blocks, 1).flatten()


def _channels(values: Tensor) -> Tensor:
    """Reorder depthwise weights: [N, T] -> [N / 16, T, 16]."""
    return pad(values, (0, 0, 0, -len(values) % PANEL)).view(-1, PANEL, values.shape[1]).transpose(1, 2).flatten()


def empty_output(x: Tensor, window: Window | None, N: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized output with N channels, channels last, for an input x [T, K], [B, C, L] or [B, C, H, W]."""
    if window is None:
        return torch.empty(len(x), N, dtype=dtype)
    left, right, top, bottom = window.padding
    B, W = len(x), window.count(x.shape[-1] + left + right, 1)
    if x.ndim == 3:
        return torch.empty_strided((B, N, W), (W * N, 1, N), dtype=dtype)
    H = window.count(x.shape[2] + top + bottom, 0)
    return torch.empty_strided((B, N, H, W), (H * W * N, 1, W * N, N), dtype=dtype)


def dense(x: Tensor) -> Tensor:
    """x, or a copy, that is contiguous, or contiguous in channels-last order."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """x [B, C, ...], or a copy, in channels-last memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
