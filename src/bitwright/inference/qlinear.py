"""QLinear: a linear layer on a packed quantized weight, in place of an nn.Linear (or GPT-2's Conv1D)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import FormatError, KernelError
from bitwright.inference.lookup import moved
from bitwright.kernels.matmul import Packed, decoded, pack, product
from bitwright.numerics.hadamard import hadamard
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, permuted, unpermuted
from bitwright.numerics.scheme import Scheme

PARTS = ("panels", "scale", "point", "minimum", "unit")
BITS = (8, 16)  # to which inputs may be rounded
INT8_TOKEN = Scheme("int8", "token", "sym", "f32")
WRITING = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")  # and what ends in one "_"


class DecodedWeight(Tensor):
    """A copy of a packed weight as floats, to be read alone: what peft would merge into it would be lost without a word."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in WRITING or (name.endswith("_") and not name.endswith("__")):
            remedy = "merge the adapter into the float model, or train without merging"
            raise FormatError("a quantized weight cannot be written to", remedy=remedy)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        reads_data = name == "__get__" and getattr(func.__self__, "__name__", "") == "data"
        return found.as_subclass(cls) if reads_data else found


class QLinear(nn.Linear):
    """y = x Wᵀ + b for x [..., K], W [N, K] quantized, in x's type. Differentiable in x; nothing of it is trained.

    It is a Linear to those who look for such layers: peft puts LoRA beside it. `weight` is decoded whenever it is asked for.

    input_quantization  the checkpoint's own quantization of inputs, applied first; None: none
    activations  bits that inputs are rounded to for the product: 16, finer than bfloat16, or 8, about twice as fast for many
                 tokens
    stored       gives the file's tensors of this weight by suffix, for `state_dict`; None: `state_dict` has the packed ones
    multiplies_in  the type in which gradients are multiplied; with bfloat16, in training, many inputs too
    KernelError for other bits.
    """

    multiplies_in: torch.dtype = torch.float32

    panels: Tensor
    scale: Tensor
    point: Tensor | None
    minimum: Tensor | None
    unit: Tensor
    order: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        q: QTensor,
        bias: Tensor | None = None,
        *,
        input_quantization: InputQuantization | None = None,
        activations: int = 16,
        stored: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # Linear would make a weight
        if activations not in BITS:
            raise KernelError(f"inputs cannot be rounded to {activations} bits", remedy="give --activations 8 or 16")
        packed = pack(q)
        for name in PARTS:
            self.register_buffer(name, getattr(packed, name), persistent=stored is None)
        self.scheme, self.out_features, self.in_features = q.scheme, packed.N, packed.K
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.input_quantization, self.activations, self.stored = (
            input_quantization or InputQuantization(),
            activations,
            stored,
        )
        self.register_buffer("order", q.order, persistent=stored is None)
        spared = q.outliers
        self.register_buffer("outlier_columns", None if spared is None else spared.columns, persistent=stored is None)
        self.register_buffer("outlier_weight", None if spared is None else spared.weight, persistent=stored is None)

    @property
    def packed(self) -> Packed:
        """The weight in the kernels' layout."""
        return Packed(
            self.panels,
            self.scale,
            self.point,
            self.minimum,
            self.unit,
            self.scheme,
            self.out_features,
            self.in_features,
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix [N, K] that inputs are multiplied with, as it is now decoded, float32."""
        w = unpermuted(decoded(self.packed, 0, self.out_features), self.order)
        if self.outlier_columns is not None and self.outlier_weight is not None:
            w[:, self.outlier_columns] = self.outlier_weight.float()
        rotate = self.input_quantization.rotate
        return (hadamard(w, rotate) if rotate else w).as_subclass(DecodedWeight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves of the model move the weight; conversions, as by `.float()`, leave its parts as they are."""
        return super()._apply(lambda t: fn(t) if t is self.bias else moved(t, fn), recurse)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows = x.reshape(-1, *x.shape[-1:])
        rows = hadamard(rows, self.input_quantization.rotate) if self.input_quantization.rotate else rows
        if self.outlier_columns is None or self.outlier_weight is None:
            y = self._product(rows)
        else:
            spared = rows[:, self.outlier_columns]
            y = self._product(rows.index_fill(1, self.outlier_columns, 0))
            y += spared.float() @ self.outlier_weight.float().T
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """x [M, K], quantized as the checkpoint says, times the weight: [M, N] float32."""
        x = permuted(x, self.order)
        if self.input_quantization.scheme is None:
            return product(x, self.packed, bits=self.activations, floats=self.multiplies_in)
        if self.input_quantization.scheme == INT8_TOKEN and not self.input_quantization.threshold:
            return product(x, self.packed, bits=8, by_row=True, floats=self.multiplies_in)
        inputs = self.input_quantization.round(x)
        if x.requires_grad and torch.is_grad_enabled():
            inputs = x + (inputs - x).detach()  # straight through: rounding has no gradient
        return product(inputs, self.packed, floats=self.multiplies_in)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The file's own tensors, so that a model is saved as it was loaded."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored is not None:
            destination |= {f"{prefix}{suffix}": tensor for suffix, tensor in self.stored().items()}

    def extra_repr(self) -> str:
        """Sizes and scheme, for printing."""
        return f"{self.in_features} -> {self.out_features}, {self.scheme}"
