"""The interface of a checkpoint format: which schemes it can hold, the tensors of one layer, and how they are read back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Spec
from bitwright.numerics.codec import code_dtype, decode, encode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import Outliers, QTensor, Scales, head_by_head, rows
from bitwright.numerics.scheme import CHANNEL, GROUPS, Scheme

Read = Callable[[str], Tensor | None]
WEIGHTS_AT_ONCE = 1 << 22  # weights whose codes are recovered in one step; bounds the memory
FLOAT_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Layer:
    """How one linear layer's weight [N, K] is to be stored.

    name         the module's name
    N, K         outputs, inputs
    scheme       of the weight
    transposed   whether the module is a Conv1D, whose weight is [K, N]
    activations  scheme of the layer's inputs; None: they stay in float
    outliers     number of input channels whose weights stay in float
    rotate       block size of the Hadamard rotation that the engine applies to the inputs; 0: none
    container    the format's own name for the storage, where the scheme alone does not determine it (GGUF: the block type)
    fallback     why the layer is not stored as requested; "" if it is
    pruned       how many of its weights are zero because they were pruned
    heads        (groups, heads in each) of its inputs, where a file has them in another order (`head_by_head`)
    """

    name: str
    N: int
    K: int
    scheme: Scheme
    transposed: bool = False
    activations: Scheme | None = None
    outliers: int = 0
    rotate: int = 0
    container: str = ""
    fallback: str = ""
    pruned: int = 0
    heads: tuple[int, int] = (1, 1)

    @property
    def order(self) -> Tensor | None:
        """The input [K] that each column in the file belongs to; None: column k belongs to input k."""
        return head_by_head(self.heads, self.K)


class Reader(Protocol):
    """Reads the quantized weights of one format, whichever tool wrote them."""

    name: str
    method: str  # quant_method in config.json

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """How the engine quantizes the inputs of one quantized module; None: they stay in float.

        read: gives a tensor of the module by the suffix of its name, None if it has no such tensor.

        FormatError for an input quantization that is not implemented here.
        """

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """Dequantize one module's tensors (by suffix) to a float matrix [N, K], by code independent of the writer."""

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor | None:
        """One module's tensors as a QTensor, which decodes to exactly what `decode` gives. None if no Scheme describes them:
        the layer is then computed in float.

        FormatError for a layout from which codes cannot be recovered.
        """


class CheckpointReader(Reader, Protocol):
    """A reader of checkpoint directories whose config.json has a quantization_config."""

    parts: frozenset[str]  # suffixes of all tensors that a quantized module can have in this format

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """Whether a module is quantized. dtypes: suffix of each of its tensors -> type."""

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """The quantization_config reduced to one module of class `kind`; `decode` and `quantized` accept the result too.

        FormatError if the config does not cover the module, or says that it is kept in float.
        """


class Format(Reader, Protocol):
    """A format that is written: safetensors files beside a config.json, or one GGUF file."""

    kv_cache: bool  # whether config.json can specify a quantized KV cache

    embeddings: bool  # whether the embedding and the output head are quantized too
    one_file: bool  # whether OUT is one GGUF file, with llama.cpp's tensor names, rather than a directory

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """The layer as this format stores it in a model of this dtype: with the scale type and the container of the format.

        FormatError, with the reason, if the format cannot hold the layer.
        """

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that hold one layer: suffix of the module's name -> type and shape."""

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """The tensors of `layout`, filled. inputs: the scales of a static `layer.activations`."""

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """Verify one written module: the number of weights that an independent reader decodes otherwise than q; 0 is right."""

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """The quantization_config of config.json. kept: names of the linear modules that stay in float.

        FormatError if the format cannot hold these layers in one checkpoint.
        """


def differing(found: Tensor, q: QTensor) -> int:
    """The number of weights in which `found` [N, K], dequantized by a reader, differs from q decoded to the same type."""
    meant = decode(q).to(found.dtype)
    return 0 if torch.equal(found, meant) else int((found != meant).sum())


def recovered(w: Tensor, scheme: Scheme, scales: Scales, name: str, outliers: Outliers | None = None) -> QTensor:
    """Recover the codes from dequantized weights: the QTensor that decodes to exactly w [N, K] under these scales.

    FormatError if there is none.
    """
    whole = QTensor(torch.empty(w.shape, dtype=code_dtype(scheme)), scales, scheme, tuple(w.shape), outliers)
    step = max(1, WEIGHTS_AT_ONCE // w.shape[1])
    for start in range(0, len(w), step):
        here, part = w[start : start + step], rows(whole, start, min(start + step, len(w)))
        part.codes.copy_(encode(here, part.scales, scheme, free=True).codes)
        if not torch.equal(decode(part).to(w.dtype), here):
            remedy = "get a good copy of the file"
            raise FormatError("its weights are not codes under its scales", where=name, remedy=remedy)
    return whole


def refuse_decomposed(layer: Layer, format_name: str) -> None:
    """FormatError for a layer with outlier channels or a run-time rotation, in a format that can store neither."""
    if layer.outliers or layer.rotate:
        what = "input channels kept in float" if layer.outliers else "a rotation of the inputs at run time"
        raise FormatError(f"{format_name} has no place for {what}", where=layer.name, remedy="use --format bitwright")


def refuse_rounded_inputs(layer: Layer, format_name: str) -> None:
    """FormatError for a layer with quantized activations, in a weight-only format."""
    if layer.activations is not None:
        remedy = "use compressed-tensors, or leave out --activations"
        raise FormatError(f"{format_name} files cannot say that inputs are rounded", where=layer.name, remedy=remedy)


def refuse_short_groups(layer: Layer) -> None:
    """FormatError for a layer whose K is not a multiple of the group size; the remedy names a scheme that fits."""
    scheme = layer.scheme
    if not isinstance(scheme.group, int) or layer.K % scheme.group == 0:
        return
    fitting = next((g for g in reversed(GROUPS) if g < scheme.group and layer.K % g == 0), CHANNEL)
    remedy = f"--scheme {replace(scheme, group=fitting)}"
    if scheme.scale not in FLOAT_NAMES.values():  # MXFP4 and the like have one group
        remedy = "another scheme, such as --scheme int4-g32"
    message = f"K = {layer.K} is not a multiple of the group of {scheme.group}"
    remedy = f'{remedy}, or a recipe that keeps this matrix (scheme = "keep")'
    raise FormatError(message, where=layer.name, remedy=remedy)
