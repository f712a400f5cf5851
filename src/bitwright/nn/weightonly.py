"""Weights in a few bits, products in float: any rounding method on the Linears of any module."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.calibration.statistics import Gram
from bitwright.errors import CalibrationError, RecipeError, SchemeError, one_of
from bitwright.kernels import matmul
from bitwright.methods import CALIBRATED, METHODS, check_serves
from bitwright.nn.dynamic import Kept, nothing_to_quantize, replaced, require_mode
from bitwright.nn.native import Memory, handles
from bitwright.nn.prepare import Batch, run
from bitwright.numerics.codec import code_dtype, code_range, decode
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import Scheme


class PackedLinear(nn.Module):
    """Linear on packed codes: native products, with inputs rounded to 16 bits; where a gradient is wanted, or there is no
    extension, the weight is decoded as it is used.

    words  int32 [N, W]: codes, counted from the lowest, packed at `bits` each;  scale float16 or float32 [N, G]
    zero   float16 [N, G]: zero points, with a scheme that has them, else [0];  bias float32 [N] or [0]
    """

    words: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor

    def __init__(self, q: QTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme, self.shape, self.memory = q.scheme, q.shape, Memory()
        low = code_range(q.scheme)[0]
        stored = torch.float16 if q.scheme.scale == "f16" else torch.float32
        self.register_buffer("words", pack(q.codes.int() - low, q.scheme.levels.bits))
        self.register_buffer("scale", q.scales.scale.to(stored))
        self.register_buffer("zero", torch.zeros(0) if q.scales.zero is None else q.scales.zero.half())
        self.register_buffer("bias", torch.zeros(0) if bias is None else bias.detach().float().clone())

    def quantized(self) -> QTensor:
        """The weight's codes and scales."""
        low, bits = code_range(self.scheme)[0], self.scheme.levels.bits
        codes = (unpack(self.words, bits, self.shape[1]).int() + low).to(code_dtype(self.scheme))
        zero = self.zero.float() if self.zero.numel() else None
        return QTensor(codes, Scales(self.scale.float(), zero), self.scheme, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        if handles(x, x.dtype) and not (torch.is_grad_enabled() and x.requires_grad):
            packed = self.memory.of(self, lambda: matmul.pack(self.quantized()))
            if matmul.handles(packed, x):
                y = matmul.product(x.reshape(-1, self.shape[1]), packed)
                y = y.add_(self.bias) if self.bias.numel() else y
                return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])
        bias = self.bias.to(x.dtype) if self.bias.numel() else None
        return functional.linear(x, decode(self.quantized()).to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.shape[1]} → {self.shape[0]}, {self.scheme}"


@torch.no_grad()
def quantize_weights(
    module: nn.Module,
    batches: Iterable[Batch] = (),
    *,
    scheme: str = "int4-g128",
    method: str = "gptq",
    keep: Mapping[str, str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """A module whose Linears keep their weights in a few bits, rounded with the help of what the batches show.

    batches  inputs, as `calibrate`'s, all seen by the float module; not needed by "rtn", "search" and "hqq"
    scheme   one-level: integers with scales in f16, bf16 or f32
    method   a key of `METHODS`

    Raises RecipeError for an unknown method, training mode or nothing to quantize; CalibrationError where a method
    needs batches and has none; SchemeError for a scheme that cannot be packed.
    """
    require_mode(module, training=False)
    parsed = Scheme.parse(scheme)
    if not parsed.grid.startswith("int") or parsed.scale not in ("f16", "bf16", "f32") or parsed.zero == "min":
        raise SchemeError(
            f"weights of scheme {str(parsed)!r} are not packed here", remedy="such as int4-g128 or int3-g64-asym"
        )
    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}", remedy=one_of(method, METHODS))
    check_serves(method, parsed)
    kept = Kept(module, keep or {})
    names = [n for n, child in module.named_modules() if type(child) is nn.Linear and not kept.covers(n)]
    if not names:
        raise nothing_to_quantize(module)
    grams = _grams(module, names, batches)
    target = module if inplace else copy.deepcopy(module)
    for name in names:
        if method in CALIBRATED and name not in grams:
            remedy = "give batches that reach this layer"
            raise CalibrationError(f"method {method} needs to see inputs", where=name, remedy=remedy)
        layer = target.get_submodule(name)
        gram = grams[name].value() if name in grams else None
        q = METHODS[method](layer.get_parameter("weight").float(), gram, parsed).q
        target = replaced(target, name, PackedLinear(q, layer.bias if isinstance(layer.bias, Tensor) else None))
    return kept.apply(target).eval()


def _grams(module: nn.Module, names: list[str], batches: Iterable[Batch]) -> dict[str, Gram]:
    """XᵀX of the inputs of each layer."""
    grams: dict[str, Gram] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            grams.setdefault(name, Gram(inputs[0].shape[-1])).update(inputs[0])

        return see

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for batch in batches:
            run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return grams
