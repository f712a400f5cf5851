"""Weight-only quantization of the Linear layers of any module, with any rounding method (GPTQ, HQQ, …)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.calibration.statistics import Gram
from bitwright.errors import CalibrationError, RecipeError, SchemeError, one_of
from bitwright.kernels import matmul
from bitwright.methods import CALIBRATED, METHODS, check_serves
from bitwright.nn.batches import Batch, outputs, require_finite
from bitwright.nn.check import Check, check_outputs, require_check
from bitwright.nn.dropin import Replacement
from bitwright.nn.dynamic import refuse_bare_weights
from bitwright.nn.grams import grams_of
from bitwright.nn.integer import storable
from bitwright.nn.native import Memory, handles
from bitwright.nn.plain import plain
from bitwright.nn.tree import (
    Kept,
    copied,
    layers_of,
    off_the_fast_path,
    quantizable,
    refuse_complex,
    replaced,
    require_mode,
    with_hooks_of,
)
from bitwright.numerics.codec import code_dtype, code_range, decode, per_column
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import Scheme


class PackedLinear(Replacement):
    """Linear with packed low-bit weights. Native kernels multiply by the codes, with inputs rounded to 16 bits; if a gradient
    is needed, or there is no extension, the weight is dequantized for each call.

    words  int32 [N, W], unsigned codes (from the lowest), packed with `bits` each
    scale  float16 or float32 [N, G]
    zero   float16 [N, G], zero points; empty for symmetric schemes
    bias   float32 [N], or None
    """

    words: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, source: nn.Linear, q: QTensor) -> None:
        super().__init__()
        self.describe(source)
        self.scheme, self.shape, self.memory = q.scheme, q.shape, Memory()
        low = code_range(q.scheme)[0]
        stored = torch.float16 if q.scheme.scale == "f16" else torch.float32
        self.register_buffer("words", pack(q.codes.int() - low, q.scheme.levels.bits))
        self.register_buffer("scale", q.scales.scale.to(stored))
        self.register_buffer("zero", torch.zeros(0) if q.scales.zero is None else q.scales.zero.half())
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().float().clone())

    def quantized(self) -> QTensor:
        """The weight as a QTensor."""
        low, bits = code_range(self.scheme)[0], self.scheme.levels.bits
        codes = (unpack(self.words, bits, self.shape[1]).int() + low).to(code_dtype(self.scheme))
        zero = self.zero.float() if self.zero.numel() else None
        return QTensor(codes, Scales(self.scale.float(), zero), self.scheme, self.shape)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the float layer's dtype."""
        return decode(self.quantized()).to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if handles(x, x.dtype) and not (torch.is_grad_enabled() and x.requires_grad):
            packed = self.memory.of(self, lambda: matmul.pack(self.quantized()))
            if matmul.handles(packed, x):
                y = matmul.product(x.reshape(-1, self.shape[1]), packed)
                y = y if self.bias is None else y.add_(self.bias)
                return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])
        bias = None if self.bias is None else self.bias.to(x.dtype)
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
    check: Check = "error",
) -> nn.Module:
    """Replace the Linear layers of a module by `PackedLinear`: weight-only quantization.

    batches  calibration inputs, run through the float module; not needed by "rtn", "search" and "hqq"
    scheme   integers with scales in f16, bf16 or f32 (no two-level scales)
    method   a key of `METHODS`
    check    if the result differs, on the first batch, from the float module with dequantized weights: "error", "warn", "off"

    A weight that is exactly 0 stays 0: a pruned layer stays pruned. Scales beyond float16 are stored in float32.

    Raises RecipeError for an unknown method, training mode or nothing to quantize; CalibrationError if a method needs
    batches and has none; SchemeError for a scheme that cannot be packed.
    """
    if isinstance(batches, str):
        raise RecipeError(f"batches are a text, {batches!r}", remedy=f'scheme="{batches}", if that is meant')
    module = quantizable(module)
    require_mode(module, training=False)
    require_check(check)
    parsed = Scheme.parse(scheme)
    if not parsed.grid.startswith("int") or parsed.scale not in ("f16", "bf16", "f32") or parsed.zero == "min":
        raise SchemeError(
            f"weights of scheme {str(parsed)!r} are not packed here", remedy="such as int4-g128 or int3-g64-asym"
        )
    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}", remedy=one_of(method, METHODS))
    check_serves(method, parsed)
    kept, batches = Kept(module, keep or {}), list(batches)
    source = plain(copied(module), kept) if batches and check != "off" else None
    target = plain(module if inplace else copied(module), kept)
    refuse_bare_weights(target, kept, batches[0] if batches else None)
    layers = layers_of(target, {nn.Linear: None}, kept)
    if not layers:
        remedy = "only Linear layers are packed: bitwright.quantize_dynamic, or prepare, for convolutions and recurrent layers"
        raise RecipeError("no Linear to quantize", where=type(module).__name__, remedy=remedy)
    target = _packed(target, layers, batches, parsed, method)
    target = off_the_fast_path(kept.apply(target)).eval()
    if source is not None:
        _check(source, target, batches[0], check)
    return target


def _packed(
    target: nn.Module, layers: list[tuple[str, nn.Module]], batches: list[Batch], scheme: Scheme, method: str
) -> nn.Module:
    """Quantize and pack these layers; returns the root."""
    for name, layer in layers:
        refuse_complex(layer, name)
    grams = grams_of(target, layers, batches)
    for name, layer in layers:
        if method in CALIBRATED and name not in grams:
            remedy = 'give batches that reach this layer, or method="search", which needs none'
            raise CalibrationError(f"method {method} needs to see inputs", where=name, remedy=remedy)
        assert isinstance(layer, nn.Linear)
        gram = _reaching_all(grams[name]) if name in grams else None
        w = layer.weight.float()
        q = METHODS[method](w, gram, storable(w, scheme)).q
        target = replaced(target, layer, with_hooks_of(PackedLinear(layer, _still_zero(q, w)), layer))
    return target


def _reaching_all(gram: Gram) -> Tensor:
    """The Gram [K, K] as if inputs that were 0 in all rows had been seen once more, at the mean square of the others.

    Methods set the weights of inputs that never come to 0; behind a ReLU a few rows do not show which those are.
    """
    rows, value = gram.tokens, gram.value()
    squares = value.diagonal()
    seen = squares > 0
    if bool(seen.any()):
        squares[~seen] = squares[seen].mean() / (rows + 1)
    return value


def _still_zero(q: QTensor, w: Tensor) -> QTensor:
    """q with the code of 0 wherever w is 0, unless w is 0 everywhere."""
    gone = w == 0
    if not bool(gone.any()) or bool(gone.all()) or q.order is not None:
        return q
    zero = q.scales.zero
    code = 0 if zero is None else per_column(zero, q.scheme, w.shape[1]).expand_as(w)
    return replace(q, codes=torch.where(gone, torch.as_tensor(code).to(q.codes.dtype), q.codes))


def _check(source: nn.Module, target: nn.Module, batch: Batch, check: Check) -> None:
    """Compare the packed module with the float module that has the dequantized weights."""
    expected = require_finite(outputs(source, batch), "the outputs", type(source).__name__)
    for name, layer in named_layers(target):
        source.get_submodule(name).get_parameter("weight").copy_(layer.weight)
    check_outputs(target, batch, expected, outputs(source, batch), check, source)


def named_layers(target: nn.Module) -> list[tuple[str, PackedLinear]]:
    """Names and modules of a module's packed layers."""
    return [(name, layer) for name, layer in target.named_modules() if isinstance(layer, PackedLinear)]
