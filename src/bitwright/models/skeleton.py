"""The only file that knows how transformers lays out a model: skeletons without weights, blocks, layer names.

A `Skeleton` is the model with all parameters on the meta device (no memory) and all buffers real. One block at a time is
given weights, run and emptied again, so memory holds one block however deep the model is. Nothing here depends on the
architecture: the blocks are the largest ModuleList as long as the config says; what each block is called with (masks,
rotary embeddings, per layer where they differ) is recorded from the model's own forward; modules that read the same
input are found by watching which tensor they are given. What cannot be found is in the tables below.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Checkpoint
from bitwright.gguf.reader import is_gguf
from bitwright.models.experts import one_by_one, split, split_blocks
from bitwright.models.families import ENCODERS, model_of, parameters_on_meta
from bitwright.models.file_names import in_model
from bitwright.models.gguf_source import read_config as read_gguf_config
from bitwright.models.kv_cache import KvCache

# Buffers that older checkpoints carry and models now compute for themselves: left out, on record.
COMPUTED = (
    "position_ids",
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
)
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # what older tools wrote, and which
CACHES = ("past_key_values", "layer_past")  # what blocks call the cache of their keys and values
TOKENS_PER_BATCH = 4096


def read_config(folder: Path) -> PretrainedConfig:
    """The model's config. CheckpointError if it is missing, damaged, of no known architecture, or quantized already."""
    if is_gguf(folder):
        return read_gguf_config(folder)
    file = folder / "config.json"
    if not folder.is_dir():
        remedy = "give a local directory; a hub name needs its files downloaded first (no network is used)"
        raise CheckpointError("no such directory", where=str(folder), remedy=remedy)
    if not file.is_file():
        raise CheckpointError(
            "no config.json", where=str(folder), remedy="give the directory of a Hugging Face checkpoint"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        raw.pop("quantization_config", None)
        kind = raw.pop("model_type")
        return AutoConfig.for_model(kind, **raw)
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error}", where=str(file)) from error
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"unusable config.json: {error}", where=str(file)) from error


class _Port(nn.Module):
    """Stands in for a block: records what it is called with, or hands out a hidden state of our own."""

    def __init__(self, block: nn.Module, record: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.record = record
        self.inject: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.record.append(((hidden, *args), kwargs))
        return hidden if self.inject is None else self.inject


class Skeleton:
    """A causal language model, or an encoder without its pooling layer, whose blocks take turns in memory."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """dtype: what the forward computes in, whatever the checkpoint stores."""
        self.config, self.dtype = config, dtype
        with parameters_on_meta():
            try:
                self.model = model_of(config, dtype)
            except (ValueError, KeyError, ImportError) as error:
                reason = str(error).splitlines()[0]
                raise CheckpointError(
                    f"no causal language model of type {config.model_type!r}: {reason}",
                    where=str(config.name_or_path or config.model_type),
                    remedy="only decoder-only models of transformers are supported",
                ) from error
        self.experts = one_by_one(self.model)
        self.model.tie_weights()
        self.predicts = config.model_type not in ENCODERS
        self.block_prefix, self.blocks = _find_blocks(self.model, config)
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._cache: KvCache | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def outer_names(self, *, base_only: bool = False) -> list[str]:
        """Names of the parameters and persistent buffers outside the blocks; tied ones once.

        base_only: only those of the model without its output head, which embedding needs.
        """
        inside, tied = f"{self.block_prefix}.", self.tied_names()
        start = f"{self.model.base_model_prefix}." if base_only and self.predicts else ""
        names = self.model.state_dict(keep_vars=True)
        return [n for n in names if n.startswith(start) and not n.startswith(inside) and n not in tied]

    def state_names(self, index: int) -> list[str]:
        """Names of the parameters and persistent buffers of block `index`."""
        return [f"{self.block_prefix}.{index}.{name}" for name in self.blocks[index].state_dict(keep_vars=True)]

    def linear_names(self) -> list[str]:
        """Every Linear or Conv1D of the model by full name, the output head included."""
        return [name for name, module in self.model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]

    def tied_names(self) -> set[str]:
        """Parameters that are another parameter under a second name."""
        first = {id(p): name for name, p in reversed(list(self.model.named_parameters()))}
        everywhere = self.model.named_parameters(remove_duplicate=False)
        return {name for name, p in everywhere if first[id(p)] != name}

    def embedding_and_head(self) -> dict[str, nn.Module]:
        """The embedding and, unless it is the same matrix or there is none, the output head, by full name."""
        names = (self.embedding_name, self.head_name) if self.predicts else (self.embedding_name,)
        return {name: self.model.get_submodule(name) for name in names}

    @property
    def embedding_name(self) -> str:
        """The module that tokens are looked up in."""
        return self._name_of(self.model.get_input_embeddings())

    @property
    def output_name(self) -> str:
        """The module that makes logits. CheckpointError for an encoder, which has none."""
        self._must_predict()
        return self._name_of(self.model.get_output_embeddings())

    @property
    def head_name(self) -> str:
        """The module whose weight the output head multiplies with: itself, or the embedding that it is tied to."""
        name = self.output_name
        return name if f"{name}.weight" not in self.tied_names() else self.embedding_name

    def _must_predict(self) -> None:
        if not self.predicts:
            kind = self.config.model_type
            message = f"models of type {kind!r} predict no next token: there is nothing to judge it by"
            raise CheckpointError(message, remedy="inspect it, or compare its hidden states")

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.model.named_modules() if other is module)

    def linears(self, index: int) -> dict[str, nn.Module]:
        """The matrices of block `index` by full name: Linear, and GPT-2's Conv1D, whose weight is [K, N]."""
        prefix = f"{self.block_prefix}.{index}."
        named = self.blocks[index].named_modules()
        return {prefix + name: module for name, module in named if isinstance(module, (nn.Linear, Conv1D))}

    def source_names(self, shapes: Mapping[str, tuple[int, ...] | None], where: str) -> dict[str, str]:
        """Parameter or persistent buffer name -> tensor name in a checkpoint that holds tensors of these shapes.

        A shape of None is not compared. Checkpoints of the bare model lack the causal model's prefix, and the other
        way round. CheckpointError names what is missing or has another shape than config.json means.
        """
        tied, parameters = self.tied_names(), self.model.state_dict(keep_vars=True)
        remedy = "config.json and weights must belong together"
        files = in_model(self.model, shapes, parameters)
        found: dict[str, str] = {}
        for name, parameter in parameters.items():
            source = files.get(name)
            if source is None:
                if name not in tied and not name.endswith(COMPUTED):
                    raise CheckpointError(f"the checkpoint lacks tensor {name!r}", where=where, remedy=remedy)
                continue
            shape, meant = shapes[source], tuple(parameter.shape)
            if shape is not None and shape != meant:
                message = f"tensor {source!r} has shape {shape}, config.json means {meant}"
                raise CheckpointError(message, where=where, remedy=remedy)
            found[name] = source
        return found

    def split_experts(self, checkpoint: Checkpoint) -> None:
        """Let tensors in which the files fuse experts be found as one for each expert and matrix, named as here.

        CheckpointError if one has another shape than config.json means.
        """
        fused = {f"{name}.{part}": (name, part) for name, layout in self.experts.items() for part in layout.shapes}
        for parameter, source in in_model(self.model, list(checkpoint.tensors), fused).items():
            name, part = fused[parameter]
            split(checkpoint, source, name, part, self.experts[name])
        for name, layout in self.experts.items():
            split_blocks(checkpoint, name, layout)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Give the named parameters and buffers these values, in the skeleton's dtype."""
        cast = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        self.model.load_state_dict(cast, strict=False, assign=True)
        self.model.requires_grad_(False)
        self.model.tie_weights()

    def unload(self, index: int) -> None:
        """Free the weights of block `index`; buffers stay."""
        for module in self.blocks[index].modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(leaf, _empty(parameter))

    def unload_outside(self) -> None:
        """Free the weights outside the blocks; buffers, which are small, stay."""
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(f"{self.block_prefix}.") and not parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner).register_parameter(leaf, _empty(parameter))
        self.model.tie_weights()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> what the first block is given [B, T, H]. The outer parameters must be loaded."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        with self._ports(calls, None):
            base(input_ids=ids, use_cache=False)
        hidden = calls[0][0][0]
        self._calls[len(ids)] = [(args[1:], kwargs) for args, kwargs in calls]
        return hidden

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Block `index` on hidden [B, T, H], called as the model would; `embed` has seen a batch of this size."""
        args, kwargs = self._call(len(hidden), index)
        out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def run_with(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """As `run`, with other weights for some parameters (full names), and differentiable in them."""
        args, kwargs = self._call(len(hidden), index)
        prefix = f"{self.block_prefix}.{index}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        out = torch.func.functional_call(self.blocks[index], own, (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _call(self, windows: int, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `index` is called with beside a hidden state of so many windows."""
        args, kwargs = self._calls[windows][index]
        if self._cache is None:
            return args, kwargs
        return args, kwargs | {name: self._cache for name in CACHES if name in kwargs}

    @contextmanager
    def caching(self, cache: KvCache | None) -> Iterator[None]:
        """For a while, blocks hand their keys and values to this cache, if they know any (`cache.used`); None: to none."""
        self._cache = cache
        try:
            yield
        finally:
            self._cache = None

    def attention_name(self, index: int) -> str | None:
        """The full name of block `index`'s attention module, which has keys and values; None if there is none, or two."""
        named = self.blocks[index].named_modules()
        found = [name for name, module in named if name and hasattr(module, "layer_idx")]
        return f"{self.block_prefix}.{index}.{found[0]}" if len(found) == 1 else None

    @contextmanager
    def quantizing_inputs(self, input_quantizations: Mapping[str, Callable[[Tensor], Tensor] | None]) -> Iterator[None]:
        """For a while, modules of these full names see their inputs as an engine hands them on; None: as they are."""
        hooks = []
        for name, input_quantization in input_quantizations.items():
            if input_quantization is not None:
                module = self.model.get_submodule(name)
                hooks.append(
                    module.register_forward_pre_hook(lambda _, args, i=input_quantization: (i(args[0]), *args[1:]))
                )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """What the last block gave [B, T, H] -> logits [B, T, V], float32. CheckpointError for an encoder, which has none."""
        self._must_predict()
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._ports([], hidden):
            return self.model(input_ids=ids, use_cache=False).logits.float()

    @contextmanager
    def _ports(self, record: list[tuple[tuple[Any, ...], dict[str, Any]]], inject: Tensor | None) -> Iterator[None]:
        """Put ports in the place of all blocks for a while."""
        parent = self.model.get_submodule(self.block_prefix.rpartition(".")[0])
        attribute = self.block_prefix.rpartition(".")[2]
        ports = [_Port(block, record) for block in self.blocks]
        for port in ports:
            port.inject = inject
        setattr(parent, attribute, nn.ModuleList(ports))
        try:
            yield
        finally:
            setattr(parent, attribute, self.blocks)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter without memory."""
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def _find_blocks(model: nn.Module, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """The ModuleList of decoder blocks: the largest of those as long as the config's number of layers."""
    depth = config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise CheckpointError(
            f"{type(model).__name__} has no ModuleList of {depth} blocks",
            remedy="only decoder-only models are supported",
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def is_norm(module: nn.Module) -> bool:
    """Whether a module has one weight vector of its own."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.ndim == 1


def batches(ids: Tensor, tokens: int) -> list[Tensor]:
    """Split [S, T] into batches of about so many tokens."""
    return list(ids.split(max(1, tokens // ids.shape[1])))


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as [N, K]: Conv1D stores its transpose."""
    return weight.T if isinstance(module, Conv1D) else weight


def as_source(skeleton: Skeleton, name: str, matrix: Tensor) -> Tensor:
    """A matrix [N, K] the way round that module `name` wants it, in the type that the skeleton computes in."""
    return matrix_of(skeleton.model.get_submodule(name), matrix).to(skeleton.dtype)


def best_dtype() -> torch.dtype:
    """What calibration computes in: bfloat16 where the processor multiplies it natively, else float32.

    Where ATEN_CPU_CAPABILITY holds torch to older instructions, float32 too: as the processor that it imitates.
    """
    held_back = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if torch.cuda.is_available() or (fast and not held_back) else torch.float32


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint's config.json, or what AutoGPTQ and AutoAWQ wrote beside it; None: neither."""
    raw = _json(folder / "config.json")
    for key in ("quantization_config", "compression_config"):  # the latter as compressed-tensors once had it
        for place in (raw, raw.get("text_config")):
            if isinstance(place, dict) and isinstance(place.get(key), dict):
                return dict(place[key])
    for file, method in BESIDE.items():
        found = _json(folder / file)
        if found:
            return {"quant_method": method, **found}
    return None


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; {} where there is no file. CheckpointError for one that is damaged."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"unusable {file.name}: {error}", where=str(file)) from error
    return raw if isinstance(raw, dict) else {}
