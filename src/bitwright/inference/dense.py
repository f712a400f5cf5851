"""Dense: a linear layer whose float weight stays in the file's type, whatever type it computes in."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.kernels import native
from bitwright.kernels.by_rows import product, times
from bitwright.numerics.input_quantization import InputQuantization

FEW = 16  # most inputs for which the extension is used: it reads every weight from memory once
WEIGHTS_AT_ONCE = 1 << 18  # weights converted at a time where torch multiplies: as many as a cache holds


def handles(x: Tensor, w: Tensor) -> bool:
    """Whether the extension multiplies these: few float32 inputs on a CPU, weights in float32, float16 or bfloat16."""
    known = w.dtype in (torch.float32, torch.float16, torch.bfloat16)
    differentiated = x.requires_grad and torch.is_grad_enabled()
    few = len(x) <= FEW and x.device.type == "cpu" and x.dtype == torch.float32
    return native is not None and known and few and not differentiated


def through(rounding: InputQuantization, x: Tensor) -> Tensor:
    """x, rounded; its gradient goes straight through, as rounding has none."""
    inputs = rounding(x)
    return x + (inputs - x).detach() if x.requires_grad and torch.is_grad_enabled() else inputs


class Dense(nn.Linear):
    """y = x Wᵀ + b for x [..., K], W [N, K] in its own float type. A Linear to those who look for such layers.

    multiplies_in, gives: the types of torch's products, and of y; None: the inputs'.
    """

    multiplies_in: torch.dtype | None = None
    gives: torch.dtype | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        input_quantization: InputQuantization | None = None,
        stored: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        """input_quantization: the checkpoint's own of inputs, applied first; None: none. stored: gives the file's tensors of
        this weight by suffix, for `state_dict`; None: the weight is its own."""
        nn.Module.__init__(self)  # Linear would make a weight
        self.input_quantization, self.stored = input_quantization, stored
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows, dtype = x.reshape(-1, self.in_features), self.multiplies_in or x.dtype
        rows = rows if self.input_quantization is None else through(self.input_quantization, rows)
        if handles(rows, self.weight):
            assert native is not None
            y = torch.empty(len(rows), self.out_features)
            native.product_of_floats(self.weight.detach(), rows.contiguous(), y, torch.get_num_threads())
        elif self.weight.dtype == dtype:
            y = functional.linear(rows.to(dtype), self.weight)
        elif rows.requires_grad and torch.is_grad_enabled():
            y = product(rows, self._rows, dtype)
        else:
            y = times(rows.to(dtype), self._rows(dtype))
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(self.gives or x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight's rows in another type, some at a time."""
        return (part.to(dtype) for part in self.weight.split(max(1, WEIGHTS_AT_ONCE // self.in_features)))

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The file's own tensors, so that a model is saved as it was loaded."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored is not None:
            del destination[f"{prefix}weight"]
            destination |= {f"{prefix}{suffix}": tensor for suffix, tensor in self.stored().items()}
