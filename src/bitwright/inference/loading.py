"""load: a checkpoint as a normal transformers model that computes on its quantized weights.

The model is built without memory, then filled a module at a time: a matrix that is quantized in the file becomes a
`QLinear` on packed codes, an embedding a `Lookup` in the file's own bytes; nothing is kept decoded. A float checkpoint can
be rounded on the way in (`scheme`), so that the peak is the quantized size plus one block.
"""

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from bitwright.errors import CheckpointError, FormatError, KernelError, RecipeError
from bitwright.files.hub import local
from bitwright.inference.dense import Dense
from bitwright.inference.key_values import round_keys_and_values
from bitwright.inference.lookup import Lookup, Table
from bitwright.inference.qlinear import BITS, QLinear
from bitwright.methods import METHODS, check_serves
from bitwright.models.config import read_config
from bitwright.models.families import KEPT_LINEARS
from bitwright.models.gguf_source import GgufWeightSource
from bitwright.models.layers import is_linear, matrix_of
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource, names_in, open_weights
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme
from bitwright.system.device import DeviceMap, device_in
from bitwright.system.memory import return_memory


def load(
    model: str | Path,
    *,
    scheme: str | None = None,
    method: str = "search",
    activations: int = 16,
    dtype: torch.dtype = torch.float32,
    device_map: DeviceMap = None,
) -> PreTrainedModel:
    """A checkpoint directory, GGUF file or name on the hub, float or quantized by anyone whose format is read here, ready to
    generate.

    scheme       a float checkpoint's matrices are rounded to it, block by block, with a method that needs no data; rows that do
                 not fill its groups, or blocks of 256, end in a short one (in a GGUF file another type takes its place)
    activations  bits that inputs of quantized matrices are rounded to: 16 (finer than bfloat16) or 8 (faster prefill)
    dtype        of all that is not quantized, and of what passes between modules
    device_map   as of transformers, the whole model on one device: "cpu" (as without it), "cuda", "cuda:1", "auto" (a GPU where
                 there is one) or {"": device}; packed matrices go there a matrix at a time

    Warns of scales for keys and values that the config does not ask for. Raises CheckpointError, FormatError, SchemeError or
    RecipeError, naming the tensor.
    """
    if activations not in BITS:
        raise KernelError(f"inputs cannot be rounded to {activations} bits", remedy="8 or 16")
    if scheme is not None and method not in ("rtn", "search", "hqq"):
        raise RecipeError(
            f"{method!r} needs a text to calibrate on", remedy="rtn, search or hqq; or `bitwright quantize`"
        )
    device = device_in(device_map)
    wanted = None if scheme is None else Scheme.parse(scheme)
    if wanted is not None:
        check_serves(method, wanted)
    filling = _Filling(local(Path(model)), wanted, method, activations, dtype, device)
    for note in filling.weight_source.notes:
        warnings.warn(f"{model}: {note}", stacklevel=2)
    return filling.run()


class _Filling:
    """One model on its way into memory."""

    def __init__(
        self,
        path: Path,
        scheme: Scheme | None,
        method: str,
        activations: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.path, self.scheme, self.method, self.activations = path, scheme, method, activations
        self.skeleton, self.device = Skeleton(read_config(path), dtype, device), device
        self.weight_source: WeightSource | GgufWeightSource = open_weights(path, self.skeleton)
        self.names = names_in(self.weight_source, self.skeleton)
        self.ties = self.skeleton.ties()
        self.tables: dict[str, Tensor] = {}  # float embeddings, which a tied head shares
        if scheme is not None and not self.weight_source.is_float:
            raise RecipeError("it is quantized already", where=str(path), remedy="load it without a scheme")

    def run(self) -> PreTrainedModel:
        """Module by module, so that a matrix is decoded only while it is being packed."""
        model, inside = self.skeleton.model, self.skeleton.block_prefix + "."
        for name, module in list(model.named_modules()):
            plain = type(module) is nn.Embedding and module is model.get_input_embeddings()
            if isinstance(module, nn.Embedding) and (plain or name in self.skeleton.layer_embeddings):
                self._lookup(name, module)
            elif is_linear(module) and not self._stays(name):
                self._linear(name, module, rounded=name.startswith(inside))
                return_memory()  # what packing took lies between what stays
        self._fill_rest()
        model.tie_weights = _are_tied
        round_keys_and_values(self.skeleton, self.weight_source)
        if isinstance(self.weight_source, WeightSource) and self.scheme is None:
            if self.weight_source.config is not None:
                model.config.quantization_config = self.weight_source.config
        else:
            model.save_pretrained = partial(_refuse_to_save, self.path)
        if (self.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.path)
        return model.eval()

    def _stays(self, name: str) -> bool:
        """Whether a linear module is left as it is: float ones outside the text model, and those whose weight may be read."""
        source = self.names.get(f"{name}.weight", "")
        made = any(f"{name}.weight" in conversion.makes for conversion in self.skeleton.conversions)
        apart = self.skeleton.tower_of(name) or any(re.search(pattern, name) for pattern in KEPT_LINEARS)
        return made or bool(apart and not self.weight_source.is_packed(source))

    def _fill_rest(self) -> None:
        """Parameters that are no matrices of linear modules, and persistent buffers, as the file has them."""
        model, read = self.skeleton.model, self.weight_source.read
        for conversion in self.skeleton.conversions:
            self.skeleton.load({name: read(name) for name in conversion.sources})
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                value = nn.Parameter(read(self._source(name)).to(self.device, self.skeleton.dtype), requires_grad=False)
                for twin, whole in list(model.named_parameters(remove_duplicate=False)):
                    if whole is parameter:
                        _replace(model, twin, value)
        for name, buffer in list(model.named_buffers()):
            if name in self.names:
                state = read(self.names[name]).to(self.device)
                _replace(model, name, state.to(self.skeleton.dtype) if buffer.is_floating_point() else state)

    def _linear(self, name: str, module: nn.Module, *, rounded: bool) -> None:
        """Put in the place of a module one that computes on what the file has, or on what that is rounded to."""
        source, bias = self._source(f"{name}.weight"), None
        shape = tuple(matrix_of(module, self.skeleton.model.get_parameter(f"{name}.weight")).shape)
        if isinstance(dict(module.named_parameters(recurse=False)).get("bias"), nn.Parameter):
            bias = self.weight_source.read(self._source(f"{name}.bias")).to(self.skeleton.dtype)
        q, inputs = self._quantized(source, module, rounded=rounded), self.weight_source.input_quantization(source)
        if q is None:
            weight = self._float(source, module)
            self._check(source, tuple(weight.shape), shape)
            stored = self._stored(name, source) if self.weight_source.is_packed(source) else None
            dense = Dense(weight, bias, input_quantization=inputs, stored=stored)
            return _replace(self.skeleton.model, name, dense.to(self.device))
        self._check(source, tuple(q.codes.shape), shape)
        stored = self._stored(name, source) if self.scheme is None else None
        packed = QLinear(
            q,
            bias,
            input_quantization=inputs,
            activations=self.activations,
            stored=stored,
        )
        return _replace(self.skeleton.model, name, packed.to(self.device))

    def _float(self, source: str, module: nn.Module) -> Tensor:
        """A matrix [N, K] that is computed in float: it is so in the file, or no scheme has its codes."""
        if source in self.tables:
            return self.tables[source]
        weight = self.weight_source.read(source)
        return (weight if self.weight_source.is_packed(source) else matrix_of(module, weight)).contiguous()

    def _stored(self, name: str, source: str) -> Callable[[], dict[str, Tensor]]:
        """What gives the file's tensors of a module; a tied one has none of its own."""
        return partial(self.weight_source.parts, source) if f"{name}.weight" in self.names else dict

    def _check(self, source: str, found: tuple[int, ...], meant: tuple[int, ...]) -> None:
        if found != meant:
            raise CheckpointError(f"{source!r} holds {found}, config.json means {meant}", where=str(self.path))

    def _quantized(self, source: str, module: nn.Module, *, rounded: bool) -> QTensor | None:
        """A weight as codes; None: it stays float."""
        if self.scheme is None or not rounded:
            return self.weight_source.quantized(source)
        return METHODS[self.method](matrix_of(module, self.weight_source.read(source)).float(), None, self.scheme).q

    def _source(self, parameter: str) -> str:
        """The file's name for a parameter: of a tied one, that of the other."""
        return self.names.get(parameter) or self.names[self.ties[parameter]]

    def _lookup(self, name: str, module: nn.Embedding) -> None:
        """Put in the embedding's place one on the file's own bytes."""
        source, width = self._source(f"{name}.weight"), module.embedding_dim
        rows, decode = self.weight_source.rows(source)
        stored = partial(self.weight_source.parts, source) if self.weight_source.is_packed(source) else None
        self._check(name, (len(rows), decode(rows[:1]).shape[1]), (module.num_embeddings, width))
        scale = float(getattr(module, "scalar_embed_scale", 1.0))  # Gemma's
        if rows.is_floating_point():
            rows = self.tables[source] = rows.to(self.device)
        made: nn.Module
        if rows.dtype == self.skeleton.dtype and stored is None:
            made = Table(rows, scale)
        else:
            made = Lookup(rows, decode, self.skeleton.dtype, width=width, scale=scale, stored=stored)
        _replace(self.skeleton.model, name, made)


def _replace(model: nn.Module, name: str, part: nn.Module | Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, part)


def _are_tied(*_: object, **__: object) -> None:
    """Instead of `tie_weights`: they are, in modules that it does not know."""


def _refuse_to_save(path: Path, *_: object, **__: object) -> NoReturn:
    """What is packed in memory alone, or came out of a GGUF file, is no Hugging Face checkpoint."""
    raise FormatError(
        "the model in memory has no Hugging Face checkpoint's form",
        where=str(path),
        remedy="write one with `bitwright quantize`, or copy the file itself",
    )
