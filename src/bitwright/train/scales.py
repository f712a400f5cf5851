"""The scales and norms of a quantized model as what a run trains; its codes stay, and its result is a checkpoint like it.

Each scale times a factor that begins at 1 (EfficientQAT, Chen et al. 2024, arXiv:2407.11062, section 3.3, trains the scales
alone end to end, too): one parameter a group, and for norms their weights. The result holds the factors' products with the
scales, rounded to what the file's format can hold, in a copy of the source's directory.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitwright.errors import FormatError, RecipeError, VerificationError
from bitwright.files.checkpoint import Checkpoint, same_bytes, write_shard
from bitwright.formats import FORMATS, Format, Layer
from bitwright.inference.loading import load
from bitwright.inference.qlinear import QLinear
from bitwright.models.config import read_config
from bitwright.models.layers import is_norm
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource, names_in, open_weights
from bitwright.numerics.codec import decode
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.train.adapters import prepare_for_training
from bitwright.train.scaled_linear import ScaledLinear

STATE = "scales.safetensors"
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}  # encodings of scales that can be trained
OF_THE_CODES = ("README.md", "ledger.jsonl")  # of the source: they tell of losses under the scales that were


@dataclass(frozen=True)
class _Place:
    """Where a matrix is stored: its name in the files, how the format has it, and in a model of which type."""

    source: str
    layer: Layer
    dtype: torch.dtype


class ScalesAndNorms:
    """A quantized directory's scales and norms. See `Trained` in trained.py."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """RecipeError or FormatError for a model, or matrices of it, whose scales cannot be trained and written back."""
        config = read_config(path)
        source = open_weights(path)
        if source.is_float or not isinstance(source, WeightSource):
            what = "its matrices are in float" if source.is_float else "a GGUF file"
            remedy = f"quantize it first: bitwright quantize {path} Q --scheme int3-g64 --format bitwright"
            message = f"{what}, and scales are trained of a quantized directory"
            raise RecipeError(message, where=str(path), remedy=remedy)
        self.path, self.source, skeleton = path, source, Skeleton(config, torch.float32)
        self.names = names_in(source, skeleton)
        self.format = _writer(source, path)
        self.loaded = prepare_for_training(load(path, dtype=dtype))
        self.places: dict[str, _Place] = {}
        self.layers: dict[str, ScaledLinear] = {}
        for name, module in list(self.loaded.named_modules()):
            if isinstance(module, QLinear):
                transposed = isinstance(skeleton.model.get_submodule(name), Conv1D)
                self._replace(name, module, transposed=transposed)
        self.norms = {
            f"{name}.{leaf}": parameter.requires_grad_(True)
            for name, module in self.loaded.named_modules()
            if is_norm(module)
            for leaf, parameter in module.named_parameters(recurse=False)
        }
        self.loaded.train()

    def _replace(self, name: str, module: QLinear, *, transposed: bool) -> None:
        """Put a ScaledLinear in a matrix's place."""
        source = self.names[f"{name}.weight"]
        q = self.source.quantized(source)
        if q is None or module.input_quantization.scheme or module.input_quantization.rotate:
            message = "its inputs are rounded or rotated by the engine" if q is not None else "no scheme has its codes"
            raise RecipeError(f"{message}: its scales are not trained", where=source, remedy="train an adapter instead")
        if q.scheme.scale not in FLOATS or q.outliers is not None or q.order is not None:
            message = f"a matrix in {q.scheme}, whose scales are not floats or not all there is beside the codes"
            remedy = "a scheme with float scales, such as int3-g64, and columns in their own order; or train an adapter"
            raise RecipeError(message, where=source, remedy=remedy)
        self.places[name], q = self._placed(name, source, q, transposed=transposed)
        self.layers[name] = ScaledLinear(q, module.bias)
        self.loaded.set_submodule(name, self.layers[name])

    def _placed(self, name: str, source: str, q: QTensor, *, transposed: bool) -> tuple[_Place, QTensor]:
        """How the format stores a matrix, and the matrix in that scheme: encoding it gives the file's own tensors.

        Readers give scales in float32, and zero points where all are 0. FormatError if it would be written otherwise.
        """
        parts = self.source.parts(source)
        for same, dtype in itertools.product(_schemes(q), FLOATS.values()):
            try:
                layer = self.format.adapt(Layer(name, len(q.codes), q.codes.shape[1], same.scheme, transposed), dtype)
            except FormatError:
                continue
            if layer.scheme.with_scale(q.scheme.scale) == same.scheme and layer.scheme.scale in FLOATS:
                stored = replace(same, scheme=layer.scheme)
                again = self.format.encode(stored, layer, dtype)
                if all(key in parts and same_bytes(tensor, parts[key]) for key, tensor in again.items()):
                    return _Place(source, layer, dtype), stored
        message = f"no {self.format.name} file with scales in float is written so here: they could not be written back"
        remedy = f"convert it first: bitwright convert {self.path} Q --format bitwright"
        raise FormatError(message, where=source, remedy=remedy)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.loaded

    @property
    def notes(self) -> tuple[str, ...]:
        """None."""
        return ()

    def _trained(self) -> dict[str, nn.Parameter]:
        return self.norms | {f"{name}.factor": layer.factor for name, layer in self.layers.items()}

    def save(self, folder: Path) -> None:
        """Write factors and norms."""
        folder.mkdir(parents=True)
        write_shard(folder / STATE, {name: p.detach() for name, p in self._trained().items()})

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""
        stored = Checkpoint(folder, only=folder / STATE)
        for name, parameter in self._trained().items():
            parameter.copy_(stored.read(name))

    @torch.no_grad()
    def settle(self) -> None:
        """Scales, as products with factors, and norms are rounded to the types of the files."""
        for layer in self.layers.values():
            layer.q = layer.scaled()
            layer.factor.fill_(1.0)
        for name, weight in self.norms.items():
            weight.copy_(weight.to(self.source.checkpoint.tensors[self.names[name]].dtype))

    def finish(self, folder: Path) -> None:
        """Write a copy of the source's directory with these scales and norms. VerificationError if it reads otherwise."""
        changed = self._changed()
        files = {info.file for info in self.source.checkpoint.tensors.values()}
        folder.mkdir(parents=True)
        for file in sorted(self.path.iterdir()):
            if file in files:
                own = Checkpoint(self.path, only=file)
                write_shard(folder / file.name, {n: changed[n] if n in changed else own.read(n) for n in own.tensors})
            elif file.is_file() and file.name not in OF_THE_CODES:
                shutil.copyfile(file, folder / file.name)
        self._verify(folder)

    def _changed(self) -> dict[str, Tensor]:
        """All tensors that differ from the source's, by their names in the files."""
        found = {
            self.names[name]: weight.detach().to(self.source.checkpoint.tensors[self.names[name]].dtype)
            for name, weight in self.norms.items()
        }
        for name, layer in self.layers.items():
            place = self.places[name]
            stored = self.source.modules[place.source.removesuffix(".weight")]
            for suffix, tensor in self.format.encode(layer.q, place.layer, place.dtype).items():
                found[stored[suffix]] = tensor
        return found

    def _verify(self, folder: Path) -> None:
        written = WeightSource(folder)
        names_in(written, Skeleton(read_config(folder), torch.float32))
        for name, layer in self.layers.items():
            q = written.quantized(self.places[name].source)
            if q is None or not torch.equal(decode(q), decode(layer.q)):
                remedy = "run the command again; if it happens twice, look for a failing disk"
                raise VerificationError(
                    "the scales on the disk are not those that were meant", where=name, remedy=remedy
                )


def _schemes(q: QTensor) -> Iterator[QTensor]:
    """The matrix, and where all zero points are 0 the same one without them."""
    yield q
    if q.scheme.zero == "asym" and q.scales.zero is not None and not q.scales.zero.any():
        yield replace(q, scheme=replace(q.scheme, zero="sym"), scales=Scales(q.scales.scale))


def _writer(source: WeightSource, path: Path) -> Format:
    """The writer of a directory's format. FormatError for one that is only read."""
    known = source.format
    if known is None or known.name not in FORMATS:
        name = None if known is None else known.name
        remedy = f"convert it first: bitwright convert {path} Q --format bitwright"
        raise FormatError(f"{name} is a format that is only read here", where=str(path), remedy=remedy)
    return FORMATS[known.name]
