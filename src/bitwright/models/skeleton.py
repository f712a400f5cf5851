"""`Skeleton`: a transformers model without weights, whose decoder blocks are loaded, run and unloaded one at a time.

All parameters are on the meta device and take no memory; buffers are real. So one block is in memory however deep the model
is. Nothing depends on the architecture: the blocks are the largest ModuleList of the length that the config says, and their
arguments (masks, rotary embeddings) are recorded from the model's own forward (block_calls.py). The few exceptions are in the
tables below.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Checkpoint
from bitwright.models.block_calls import ALONE, FORMS, PROBE, TOO_ODD, Call, Calls, ports
from bitwright.models.experts import one_by_one, split, split_blocks
from bitwright.models.families import model_of, parameters_on_meta
from bitwright.models.file_names import Conversion, in_model
from bitwright.models.kv_cache import KvCache
from bitwright.models.layers import matrix_of
from bitwright.models.model_parts import ModelParts
from bitwright.models.text_model import no_longer_meta
from bitwright.system.device import CPU

# Buffers that models compute, and that may be missing in a checkpoint; older checkpoints hold them.
COMPUTED = (
    "position_ids",
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
)
CACHES = ("past_key_values", "layer_past")  # names of the blocks' argument for the KV cache
TOKENS_PER_BATCH = 4096


class Skeleton(ModelParts):
    """A causal language model, or an encoder without its pooling layer, whose blocks are loaded and unloaded one by one."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device = CPU) -> None:
        """dtype, device: of the computation, whatever the checkpoint's type. CheckpointError for a config without a model."""
        self.dtype, self.device = dtype, device
        model = _without_weights(config, dtype)
        experts = one_by_one(model)
        model.tie_weights()
        super().__init__(model, config, experts)
        if device != CPU:
            self._move_buffers()
        self.conversions: tuple[Conversion, ...] = ()
        self._calls = Calls(len(self.blocks))
        self._recorded: dict[tuple[int, ...], list[Call]] = {}  # by the shape of the token ids
        self._cache: KvCache | None = None

    def _move_buffers(self) -> None:
        """Buffers are real from the start, and made on the CPU; parameters come to the device as they are loaded."""
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.device))

    def source_names(self, shapes: Mapping[str, tuple[int, ...] | None], where: str) -> dict[str, str]:
        """Parameter or persistent buffer -> tensor in a checkpoint. shapes: tensor -> shape; None is not compared.

        Checkpoints of the base model lack the causal model's prefix, or the other way round; both are matched.

        CheckpointError for a missing tensor, or one of another shape than the config's.
        """
        parameters = self.model.state_dict(keep_vars=True)
        stored = in_model(self.model, shapes, parameters)
        for name, first in self.ties().items():  # a file may hold a tied parameter under either of its names
            if first not in stored.names and name in stored.names:
                stored.names[first] = stored.names.pop(name)
        self.conversions = stored.conversions
        made = {name for conversion in stored.conversions for name in conversion.makes}
        self._check_all_there(stored.names.keys() | made, where)
        for name, parameter in parameters.items():
            source = stored.names.get(name)
            shape, meant = shapes[source] if source is not None else None, tuple(parameter.shape)
            if shape is not None and shape != meant:
                message = f"tensor {source!r} has shape {shape}, config.json means {meant}"
                raise CheckpointError(message, where=where, remedy="config.json and weights must belong together")
        return stored.names

    def is_passed_over(self, source: str) -> bool:
        """Whether the model's class ignores a tensor on loading (_keys_to_ignore_on_load_unexpected)."""
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, source) for pattern in patterns)

    def _check_all_there(self, found: Set[str], where: str) -> None:
        """CheckpointError for a parameter missing in the checkpoint, unless transformers allows that too."""
        spared = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        missing = self.model.state_dict(keep_vars=True).keys() - found - self.tied_names()
        lacking = [n for n in missing if not n.endswith(COMPUTED) and not any(p.search(n) for p in spared)]
        if lacking:
            remedy, counted = "config.json and weights must belong together", self._experts_found(min(lacking), found)
            if " 0 experts" in counted:
                remedy += ", or this family's files hold experts in a form that is not known here"
            raise CheckpointError(f"the checkpoint lacks tensor {min(lacking)!r}{counted}", where=where, remedy=remedy)

    def _experts_found(self, lacking: str, found: Set[str]) -> str:
        """Of how many experts of a layer the files hold such a tensor, for one that they lack; "" if it is no expert's."""
        for experts, layout in self.experts.items():
            if lacking.startswith(f"{experts}."):
                leaf = lacking.removeprefix(f"{experts}.").partition(".")[2]
                count = sum(f"{experts}.{e}.{leaf}" in found for e in range(layout.E))
                return f": {leaf} is there for {count} experts of the layer, config.json means {layout.E}"
        return ""

    def split_experts(self, checkpoint: Checkpoint) -> None:
        """Replace fused experts in a checkpoint's table by one entry for each expert and matrix, named as in this model.

        CheckpointError if a tensor's shape does not fit the config.
        """
        fused = {f"{name}.{part}": (name, part) for name, layout in self.experts.items() for part in layout.shapes}
        found = in_model(self.model, list(checkpoint.tensors), fused)
        for parameter, source in found.names.items():
            name, part = fused[parameter]
            split(checkpoint, source, name, part, self.experts[name])
        for conversion in [each for each in found.conversions if each.transposition]:
            (source,), (parameter,) = conversion.sources, conversion.makes
            name, part = fused[parameter]
            layout = self.experts[name]
            turned = conversion.transposes(checkpoint.tensors[source].shape, layout.shapes[part])
            split(checkpoint, source, name, part, layout.turned if turned else layout)
        for name, layout in self.experts.items():
            split_blocks(checkpoint, name, layout)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load parameters and buffers, by name, in the skeleton's dtype. Tensors for conversions come under their names in the
        files."""
        for conversion in self.conversions:
            if all(name in tensors for name in conversion.sources):
                tensors = {**tensors, **conversion.applied(self.model, tensors)}
        types = {name: self.dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        cast = {name: tensor.to(self.device, types[name]) for name, tensor in tensors.items()}
        inside = f"{self.block_prefix}."
        if not all(name.startswith(inside) for name in cast):  # transformers ties from either name to the other
            ties = self.ties().items()
            cast |= {
                n: cast[first] for n, first in ties if first in cast and n not in cast and not n.startswith(inside)
            }
        self.model.load_state_dict(cast, strict=False, assign=True)
        self.model.requires_grad_(False)
        self.model.tie_weights()

    def unload(self, index: int) -> None:
        """Free the weights of block `index`, including those that it shares; buffers stay."""
        for name in self.lent_names(index):
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner).register_parameter(leaf, _empty(self.model.get_parameter(name)))
        for module in self.blocks[index].modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(leaf, _empty(parameter))

    def unload_outside(self) -> None:
        """Free the weights outside the blocks; buffers stay."""
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(f"{self.block_prefix}.") and not parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner).register_parameter(leaf, _empty(parameter))
        self.model.tie_weights()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> the first block's input [B, T, H], or a packed state [B, T, W] (block_calls.py).

        The parameters outside the blocks must be loaded. CheckpointError for a model whose blocks cannot be run one by one.
        """
        if not self._calls.given:
            probe = torch.arange(PROBE[0] * PROBE[1]).view(PROBE) % (self.config.get_text_config().vocab_size - 1)
            self._calls.form, one = self._learnt_form(probe)
            self._calls.learn(one, self._listen(probe + 1, self._calls.form))
        calls = self._listen(ids, self._calls.form)
        self._recorded[tuple(ids.shape)] = calls
        return self._calls.first(calls)

    def _learnt_form(self, ids: Tensor) -> tuple[int, list[Call]]:
        """The form of blocks' results with which the model's forward works, and the recorded calls."""
        reason = ""
        for form in range(len(FORMS)):
            try:
                return form, self._listen(ids, form)
            except TOO_ODD as error:
                reason = reason or str(error).splitlines()[0]
        kind = self.config.model_type
        raise CheckpointError(
            f"the forward of a {kind!r} model cannot be followed block by block: {reason}", remedy=ALONE
        )

    def _listen(self, ids: Tensor, form: int) -> list[Call]:
        """The recorded calls of all blocks for token ids [B, T]."""
        calls: list[Call] = []
        with self._ports(calls, form):
            self.without_head(input_ids=ids.to(self.device), use_cache=False)
        if len(calls) != len(self):
            raise CheckpointError(f"the model calls its {len(self)} blocks {len(calls)} times", remedy=ALONE)
        return calls

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Run block `index` on hidden [B, T, H] with the model's arguments. `embed` must have seen ids [B, T]."""
        return self.run_with(index, hidden, {})

    def run_with(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """As `run`, with other weights for some parameters (by full name), and differentiable in them."""
        call = self._calls.fill(index, self._recorded[tuple(hidden.shape[:2])][index], hidden)
        args, kwargs = call.arguments()
        if self._cache is not None:
            kwargs |= {name: self._cache for name in CACHES if name in kwargs}
        prefix = f"{self.block_prefix}.{index}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        out = (
            torch.func.functional_call(self.blocks[index], own, args, kwargs)
            if own
            else self.blocks[index](*args, **kwargs)
        )
        return self._calls.then(index, hidden, call, out)

    @property
    def hands_on(self) -> bool:
        """Whether blocks pass keys and values on to later ones, so that the blocks before must have run."""
        return any(at is not None for at in self._calls.shared)

    def stream(self, hidden: Tensor) -> Tensor:
        """The hidden state within a packed state."""
        return self._calls.own(hidden)

    @contextmanager
    def caching(self, cache: KvCache | None) -> Iterator[None]:
        """Within this context, blocks use this KV cache, if they use any (`cache.used` tells); None: no cache."""
        self._cache = cache
        try:
            yield
        finally:
            self._cache = None

    @contextmanager
    def quantizing_inputs(self, input_quantizations: Mapping[str, Callable[[Tensor], Tensor] | None]) -> Iterator[None]:
        """Within this context, the inputs of modules are quantized. input_quantizations: name -> function; None: unchanged."""
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
        """The last block's output [B, T, H] -> logits [B, T, V] float32. CheckpointError for an encoder, which has none."""
        return self.head_with(hidden)

    def head_with(self, hidden: Tensor) -> Tensor:
        """As `head`, and differentiable in the hidden state."""
        self.must_predict()
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._ports([], self._calls.form, self._calls.last(hidden)):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()

    @contextmanager
    def _ports(self, record: list[Call], form: int, inject: Tensor | None = None) -> Iterator[None]:
        """Within this context, ports take the place of all blocks."""
        owner, _, attribute = self.block_prefix.rpartition(".")
        port = ports(self.model.get_submodule(owner), attribute, self.blocks, record, form, inject)
        with no_longer_meta(self.model, self.device), port:
            yield


def _without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The config's model with its parameters on the meta device. CheckpointError if transformers has none."""
    with parameters_on_meta():
        try:
            return model_of(config, dtype)
        except (ValueError, KeyError, ImportError) as error:
            reason, where = str(error).splitlines()[0], str(config.name_or_path or config.model_type)
            remedy = "give a language model that predicts the next token, with or without towers for images or sound"
            raise CheckpointError(f"no model for it: {reason}", where=where, remedy=remedy) from error


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter on the meta device."""
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def batches(ids: Tensor, tokens: int) -> list[Tensor]:
    """Split [S, T] into batches of about `tokens` tokens each, at least one window."""
    return list(ids.split(max(1, tokens // ids.shape[1])))


def as_source(skeleton: Skeleton, name: str, matrix: Tensor) -> Tensor:
    """A matrix [N, K] in the orientation of module `name`, and in the skeleton's dtype."""
    return matrix_of(skeleton.model.get_submodule(name), matrix).to(skeleton.dtype)
