"""What a file format must say of itself: what it can hold, the bytes of one weight, and how to read them back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Spec
from bitwright.numerics.codec import code_dtype, decode, encode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import Outliers, QTensor, Scales, rows
from bitwright.numerics.scheme import CHANNEL, GROUPS, Scheme

Read = Callable[[str], Tensor | None]
WEIGHTS_AT_ONCE = 1 << 22  # looked at together when codes are taken out of a file
FLOAT_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Layer:
    """One quantized matrix as a format sees it.

    name         of its module; N outputs, K inputs; transposed: the module is a Conv1D
    activations  what its inputs are rounded to; None: they are not
    outliers     how many input channels stay in float
    rotate       block of the Hadamard rotation that the engine must apply to its inputs; 0: none
    container    the format's own name for how it is stored, where its scheme does not say all
    fallback     why it is not stored as asked; "": it is
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


class Reader(Protocol):
    """A way in which quantized weights are stored, by whomever."""

    name: str
    method: str  # quant_method in config.json

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """What the engine does to the inputs of one quantized module; None: nothing. read: a tensor of it by suffix.

        FormatError for something that is not computed here.
        """

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """Read one module's tensors back to a float matrix [N, K], independently of the writer."""

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor | None:
        """Read one module's tensors as codes under scales; `decode` of them is what `decode` gives. None: no scheme here has
        such codes, so it is computed in float.

        FormatError for a layout that codes cannot be told from.
        """


class CheckpointReader(Reader, Protocol):
    """A reader of directories with a quantization_config: which tensors are a module's, what is said of it."""

    parts: frozenset[str]  # suffixes of the module's name that it reads; any other tensor has no reader

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """Whether a module with tensors of these suffixes and types is a quantized one."""

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """What a quantization_config says of one module of a class: a config of it alone, which `decode` takes too.

        FormatError if it says nothing of it, or that it is kept in float.
        """


class Format(Reader, Protocol):
    """A way to store QTensors in safetensors files beside a config.json."""

    kv_cache: bool  # whether config.json can say what keys and values are kept in

    embeddings: bool  # whether the embedding and the output head are quantized too
    one_file: bool  # whether OUT is a file of llama.cpp's, with its names and types, rather than a directory

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """The layer as this format stores it in a model of that dtype: its scheme's scales, its container.

        FormatError, with the reason, if the format cannot hold the layer.
        """

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that hold one layer: suffix of the module's name -> type and shape."""

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """The tensors of `layout`, filled. inputs: the scales of a static `layer.activations`."""

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """How many weights of one module do not read back, by a reader that is not the writer, as q means them."""

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """The quantization_config of config.json; `kept` are the linear modules left in float.

        FormatError if one file cannot hold these layers together.
        """


def differing(found: Tensor, q: QTensor) -> int:
    """How many weights of w [N, K], as a reader gives them, are not what q decodes to in their type."""
    meant = decode(q).to(found.dtype)
    return 0 if torch.equal(found, meant) else int((found != meant).sum())


def recovered(w: Tensor, scheme: Scheme, scales: Scales, name: str, outliers: Outliers | None = None) -> QTensor:
    """The codes that decode to exactly w [N, K] under these scales. FormatError if there are none."""
    whole = QTensor(torch.empty(w.shape, dtype=code_dtype(scheme)), scales, scheme, tuple(w.shape), outliers)
    step = max(1, WEIGHTS_AT_ONCE // w.shape[1])
    for start in range(0, len(w), step):
        here, part = w[start : start + step], rows(whole, start, min(start + step, len(w)))
        part.codes.copy_(encode(here, part.scales, scheme).codes)
        if not torch.equal(decode(part).to(w.dtype), here):
            remedy = "get a good copy of the file"
            raise FormatError("its weights are not codes under its scales", where=name, remedy=remedy)
    return whole


def refuse_decomposed(layer: Layer, format_name: str) -> None:
    """FormatError for a layer that computes on more than codes and scales, in a format that has no place for it."""
    if layer.outliers or layer.rotate:
        what = "input channels kept in float" if layer.outliers else "a rotation of the inputs at run time"
        raise FormatError(f"{format_name} has no place for {what}", where=layer.name, remedy="use --format bitwright")


def refuse_rounded_inputs(layer: Layer, format_name: str) -> None:
    """FormatError for a layer whose inputs are to be rounded, in a format that cannot say so."""
    if layer.activations is not None:
        remedy = "use compressed-tensors, or leave out --activations"
        raise FormatError(f"{format_name} files cannot say that inputs are rounded", where=layer.name, remedy=remedy)


def refuse_short_groups(layer: Layer) -> None:
    """FormatError for a matrix whose K inputs are no whole groups, with a scheme that fits it."""
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
