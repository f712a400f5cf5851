"""Checkpoint directories as a source of weights: float tensors, or quantized ones in any format of formats/, dequantized."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Checkpoint
from bitwright.files.model_path import is_gguf
from bitwright.formats import READERS, CheckpointReader
from bitwright.models.config import check_described, quantization_of
from bitwright.models.gguf_source import GgufWeightSource
from bitwright.models.kv_cache import KvRounding, kv_cache_scheme, read_rounding
from bitwright.models.skeleton import Skeleton
from bitwright.models.unread import check_all_read, notes_on_scales
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor

T = TypeVar("T")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class WeightSource:
    """A directory's tensors under the names of the float model: `model.layers.0.mlp.up_proj.weight`, even if it is packed."""

    def __init__(self, folder: Path) -> None:
        """Reads headers and config.json only. CheckpointError for a quantization that no format here reads."""
        self.checkpoint = Checkpoint(folder)
        self.folder = folder
        self.config = quantization_of(folder)
        self.format = _format_of(folder, self.config)
        self.modules = _quantized_modules(self.checkpoint, self.format) if self.format else {}
        self.notes: tuple[str, ...] = ()  # on tensors that are not used; filled by `meet`
        self._kinds: dict[str, type[nn.Module]] = {}  # module in the files -> its class; filled by `meet`
        self._called: dict[str, str] = {}  # module in the files -> its name in the model, which configs use

    @classmethod
    def for_model(cls, folder: Path, skeleton: Skeleton) -> Self:
        """A WeightSource in which fused experts are split into one tensor for each expert and matrix."""
        weight_source = cls(folder)
        skeleton.split_experts(weight_source.checkpoint)
        if weight_source.format is not None:
            weight_source.modules = _quantized_modules(weight_source.checkpoint, weight_source.format)
        return weight_source

    @property
    def plain(self) -> list[str]:
        """Names of the tensors that are not part of a quantized weight."""
        parts = {name for suffixes in self.modules.values() for name in suffixes.values()}
        return [name for name in self.checkpoint.tensors if name not in parts]

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Tensor of the float model -> shape; None for a quantized weight, whose shape is known only after decoding."""
        plain = {name: self.checkpoint.tensors[name].shape for name in self.plain}
        return {**plain, **{f"{module}.weight": None for module in self.modules}}

    def meet(self, skeleton: Skeleton) -> dict[str, str]:
        """Match the files with a model: see `names_in`. Also records the modules' classes, which configs refer to."""
        check_described(self.plain, self.folder)
        names = skeleton.source_names(self.shapes, str(self.folder))
        zeros = [name for name in self.plain if self._is_bias_of_zeros(name)]
        check_all_read(self.shapes, [*names.values(), *zeros], skeleton, str(self.folder))
        asked = kv_cache_scheme(self.config or {}) is not None
        self.notes = notes_on_scales(self.shapes, skeleton, rounded=asked)
        parameters, plain = skeleton.model.state_dict(keep_vars=True), set(self.plain)
        for parameter, source in names.items():
            if source in plain and parameters[parameter].is_floating_point():
                self._check_type(source)
            module, called = source.rpartition(".")[0], parameter.rpartition(".")[0]
            self._called[module], self._kinds[module] = called, type(skeleton.model.get_submodule(called))
        return names

    def _is_bias_of_zeros(self, name: str) -> bool:
        """Whether a tensor is the zero bias that AutoGPTQ and its successors write for a layer without a bias."""
        module, _, leaf = name.rpartition(".")
        return leaf == "bias" and module in self.modules and not self.checkpoint.read(name).any()

    def _check_type(self, source: str) -> None:
        """CheckpointError for a tensor of a non-float type that is not part of a quantized weight: its scales are missing."""
        dtype = self.checkpoint.tensors[source].dtype
        if dtype not in FLOATS and not (self.config is None and dtype.is_floating_point):
            message = (
                f"tensor {source!r} is {str(dtype).removeprefix('torch.')} without the scales of a quantized weight"
            )
            raise CheckpointError(message, where=str(self.folder), remedy="get a good copy of the checkpoint")

    @property
    def is_float(self) -> bool:
        """Whether the checkpoint has no quantization_config."""
        return self.config is None

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes, scales and zero points included."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    def input_quantization(self, name: str) -> InputQuantization | None:
        """How the engine quantizes the inputs of the module with this weight; None: they stay in float."""
        module = name.removesuffix(".weight")
        if module not in self.modules or self.format is None or self.config is None:
            return None
        tensors, config = self.modules[module], self._config_of(module)

        def read(suffix: str) -> Tensor | None:
            return self.checkpoint.read(tensors[suffix]) if suffix in tensors else None

        return self.format.input_quantization(config, self._name(module), read)

    def is_packed(self, name: str) -> bool:
        """Whether a weight is quantized: `read` then gives [N, K], also for a Conv1D, whose own weight is [K, N]."""
        return name.removesuffix(".weight") in self.modules

    def describe(self, name: str) -> tuple[str, int]:
        """The storage of a tensor of the float model: its dtype or quant_method, and the bytes of all its parts."""
        module = name.removesuffix(".weight")
        parts = list(self.modules[module].values()) if module in self.modules else [name]
        dtype = str(self.checkpoint.tensors[parts[0]].dtype).removeprefix("torch.")
        kind = self.config["quant_method"] if module in self.modules and self.config else dtype
        return kind, sum(self.checkpoint.tensors[part].nbytes for part in parts)

    def scalar(self, name: str) -> Tensor | None:
        """A tensor that is no weight, such as a scale of the KV cache; None if there is none of this name."""
        return self.checkpoint.read(name) if name in self.checkpoint.tensors else None

    def fingerprint(self) -> list[list[str | int]]:
        """Identifies the weight files, to detect that they have changed."""
        return self.checkpoint.fingerprint()

    def read(self, name: str) -> Tensor:
        """A tensor in float; a quantized weight is dequantized to [N, K] by its format's reader."""
        if not self.is_packed(name) or self.format is None or self.config is None:
            return self.checkpoint.read(name)
        format, module = self.format, _module(name)
        config = self._config_of(module)
        return self._parsed(module, lambda: format.decode(config, self._name(module), self.parts(name)))

    def rows(self, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """An embedding for lookups: the tensor to keep in memory, and a function that gives its rows in float."""
        return self.read(name), lambda rows: rows

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of a quantized weight: suffix of its module's name -> tensor."""
        return {suffix: self.checkpoint.read(tensor) for suffix, tensor in self.modules[_module(name)].items()}

    def quantized(self, name: str) -> QTensor | None:
        """A weight as a QTensor; None if it is float, or no Scheme describes it.

        CheckpointError or FormatError for damaged or unknown tensors.
        """
        if not self.is_packed(name) or self.format is None or self.config is None:
            return None
        format, module = self.format, _module(name)
        config = self._config_of(module)
        return self._parsed(module, lambda: format.quantized(config, self._name(module), self.parts(name)))

    def _name(self, module: str) -> str:
        """The name in the model of a module in the files."""
        return self._called.get(module, module)

    def _config_of(self, module: str) -> dict[str, Any]:
        """The quantization_config of one module."""
        assert self.format is not None and self.config is not None
        return self.format.module_config(self.config, self._name(module), self._kinds.get(module, nn.Linear))

    def _parsed(self, module: str, parse: Callable[[], T]) -> T:
        """The result of `parse`; CheckpointError if it fails because a module's tensors do not fit the config."""
        try:
            return parse()
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"module {module!r} does not hold what its quantization_config promises: {error}",
                where=str(self.folder),
                remedy="get a good copy of the checkpoint, config.json too",
            ) from error


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def open_weights(path: Path, skeleton: Skeleton | None = None) -> WeightSource | GgufWeightSource:
    """Open a checkpoint directory or GGUF file. skeleton: if given, fused experts are split as it has them.

    Raises as `WeightSource` and `GgufWeightSource`.
    """
    if is_gguf(path):
        return GgufWeightSource(path)
    return WeightSource(path) if skeleton is None else WeightSource.for_model(path, skeleton)


def names_in(source: WeightSource | GgufWeightSource, skeleton: Skeleton) -> dict[str, str]:
    """Match a source with a model: parameter or persistent buffer -> the tensor of the source that it is read from.

    CheckpointError for a tensor that is missing, of another shape or type than the model's, or that the model does not read
    (`GgufWeightSource` refuses the latter when it is opened).
    """
    return (
        source.meet(skeleton)
        if isinstance(source, WeightSource)
        else skeleton.source_names(source.shapes, str(source.folder))
    )


def kv_rounding(source: WeightSource | GgufWeightSource, skeleton: Skeleton, attention: str) -> KvRounding | None:
    """The KV cache quantization of one attention module in a checkpoint; None: the cache stays in float.

    Raises as `read_rounding`.
    """
    if source.config is None:
        return None
    stem = skeleton.model.base_model_prefix + "."
    places = (attention, attention.removeprefix(stem), stem + attention)

    def read(scale: str) -> Tensor | None:
        within = (scale, f"{scale[0]}_proj.{scale}")  # the latter as ModelOpt has it
        found = (source.scalar(f"{place}.{name}") for place in places for name in within)
        return next((tensor for tensor in found if tensor is not None), None)

    return read_rounding(source.config, read, attention)


def _format_of(folder: Path, config: dict[str, Any] | None) -> CheckpointReader | None:
    if config is None:
        return None
    method = config.get("quant_method")
    for candidate in READERS:
        if candidate.method == method:
            return candidate
    known = ", ".join(f.method for f in READERS)
    raise CheckpointError(
        f"quantized with {method!r}, which is not read here",
        where=str(folder),
        remedy=f"take the float original; known: {known}",
    )


def _quantized_modules(checkpoint: Checkpoint, reader: CheckpointReader) -> dict[str, dict[str, str]]:
    """Quantized module -> {suffix: tensor name}, for the tensors that the format reads."""
    parts = defaultdict[str, dict[str, str]](dict)
    for name in checkpoint.tensors:
        module, suffix = _parted(name)
        if suffix in reader.parts:
            parts[module][suffix] = name
    types = {module: {s: checkpoint.tensors[n].dtype for s, n in own.items()} for module, own in parts.items()}
    return {module: parts[module] for module in sorted(parts) if reader.holds(types[module])}


def _parted(name: str) -> tuple[str, str]:
    """Split a tensor's name into module and suffix. bitsandbytes has suffixes such as weight.absmax."""
    module, below, rest = name.rpartition(".weight.")
    if below:
        return module, f"weight.{rest}"
    module, _, suffix = name.rpartition(".")
    return module, suffix
