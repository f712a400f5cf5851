"""`ModelParts`: what the parts of a transformers model are called: blocks, embedding, output head, towers, ties."""

from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitwright.errors import CheckpointError
from bitwright.models.experts import Fused
from bitwright.models.families import is_encoder
from bitwright.models.layers import is_linear
from bitwright.models.text_model import find_blocks, towers_of

PER_LAYER = "embed_tokens_per_layer"  # how transformers names an embedding with a part for each layer


class ModelParts:
    """The parts of a causal language model, or of an encoder, by name.

    blocks, block_prefix  the blocks, and the name of their ModuleList
    towers                names of the modules for images or sound
    experts               layers of experts: name -> layout of the fused parameters that they were split from
    predicts              whether there is an output head: an encoder has none
    """

    def __init__(self, model: PreTrainedModel, config: PretrainedConfig, experts: Mapping[str, Fused]) -> None:
        """CheckpointError for a model without blocks."""
        self.model, self.config, self.experts = model, config, experts
        self.predicts = not is_encoder(config)
        self.block_prefix, self.blocks = find_blocks(model, config)
        self.towers = towers_of(model, self.block_prefix)

    def __len__(self) -> int:
        return len(self.blocks)

    def outer_names(self, *, base_only: bool = False) -> list[str]:
        """Names of the parameters and persistent buffers outside the blocks and the vision or audio towers; tied ones once.

        base_only: without those of the output head, which `embed` does not need.
        """
        inside, tied = (f"{self.block_prefix}.", *(f"{tower}." for tower in self.towers)), self.tied_names()
        start = f"{self.model.base_model_prefix}." if base_only and self.without_head is not self.model else ""
        names = self.model.state_dict(keep_vars=True)
        needed = {first for name, first in self.ties().items() if name.startswith(start)}
        wanted = [n for n in names if (n.startswith(start) or n in needed) and n not in tied]
        return [n for n in wanted if not n.startswith(inside)]

    @property
    def without_head(self) -> nn.Module:
        """The model without its output head."""
        prefix = self.model.base_model_prefix
        found = dict(self.model.named_children()).get(prefix, self.model)
        return found if self.predicts and f"{self.block_prefix}.".startswith(f"{prefix}.") else self.model

    def tower_of(self, name: str) -> str | None:
        """The vision or audio tower that a parameter or module belongs to; None if it is the text model's."""
        return next((tower for tower in self.towers if f"{name}.".startswith(f"{tower}.")), None)

    def state_names(self, index: int) -> list[str]:
        """Names of the parameters and persistent buffers of block `index`."""
        return [f"{self.block_prefix}.{index}.{name}" for name in self.blocks[index].state_dict(keep_vars=True)]

    def lent_names(self, index: int) -> list[str]:
        """Parameters that block `index` shares with an earlier block (Zamba 2), by their name in that block."""
        own, prefix = f"{self.block_prefix}.{index}.", f"{self.block_prefix}."
        ties = self.ties().items()
        return [
            first
            for name, first in ties
            if name.startswith(own) and first.startswith(prefix) and first[: len(own)] != own
        ]

    def linear_names(self) -> list[str]:
        """Names of all Linear and Conv1D modules of the model, subclasses, output head and routers included."""
        return [name for name, module in self.model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]

    def tied_names(self) -> set[str]:
        """Second names of tied parameters."""
        return set(self.ties())

    def ties(self) -> dict[str, str]:
        """Tied parameters: second name -> first name."""
        first = {id(p): name for name, p in reversed(list(self.model.named_parameters()))}
        everywhere = self.model.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in everywhere if first[id(p)] != name}

    def embedding_and_head(self) -> dict[str, nn.Module]:
        """The embedding, those for each layer (Gemma) and, unless it is tied or there is none, the head: name -> module."""
        names = [self.embedding_name, *self.layer_embeddings, *([self.head_name] if self.predicts else [])]
        return {name: self.model.get_submodule(name) for name in names}

    @property
    def layer_embeddings(self) -> list[str]:
        """Names of token embeddings whose rows have a part for each layer."""
        return [name for name, _ in self.model.named_modules() if name.endswith(PER_LAYER)]

    @property
    def embedding_name(self) -> str:
        """Name of the token embedding."""
        return self._name_of(self.model.get_input_embeddings())

    @property
    def output_name(self) -> str:
        """Name of the output head. CheckpointError for an encoder, which has none."""
        self.must_predict()
        return self._name_of(self.head_module)

    @property
    def head_module(self) -> nn.Module:
        """The output head, of the model or the text model inside it. CheckpointError if there is none."""
        inner = [m for n, m in self.model.named_modules() if self.block_prefix.startswith(f"{n}." if n else "")]
        heads = [m.get_output_embeddings() for m in inner if isinstance(m, PreTrainedModel)]
        found = next((head for head in heads if head is not None), None)
        if found is None:
            message = f"models of type {self.config.model_type!r} do not say which module is their output head"
            raise CheckpointError(message, remedy="a model that has one (get_output_embeddings)")
        return found

    @property
    def head_name(self) -> str:
        """Name of the module that holds the output head's weight: itself, or the embedding that it is tied to."""
        name = self.output_name
        return name if f"{name}.weight" not in self.tied_names() else self.embedding_name

    def must_predict(self) -> None:
        """CheckpointError for an encoder."""
        if not self.predicts:
            kind = self.config.model_type
            message = f"models of type {kind!r} predict no next token: there is nothing to judge it by"
            raise CheckpointError(message, remedy="inspect it, or compare its hidden states")

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.model.named_modules() if other is module)

    def linears(self, index: int) -> dict[str, nn.Module]:
        """The linear layers of block `index`: name -> Linear, or GPT-2's Conv1D, whose weight is [K, N]."""
        prefix = f"{self.block_prefix}.{index}."
        named = self.blocks[index].named_modules()
        return {prefix + name: module for name, module in named if is_linear(module)}

    def routers(self) -> set[str]:
        """Names of the modules that route tokens to experts, or compute the weight of a shared expert."""
        found = set[str]()
        for experts, layout in self.experts.items():
            owner = experts.rpartition(".")[0]
            for name, module in self.model.get_submodule(owner).named_modules(prefix=owner):
                weight = dict(module.named_parameters(recurse=False)).get("weight")
                steers = weight is not None and weight.ndim == 2 and len(weight) in (1, layout.E)
                found |= {name} if steers and not name.startswith(f"{experts}.") else set()
        return found

    def attention_name(self, index: int) -> str | None:
        """Name of block `index`'s attention module, found by its `layer_idx`; None if there is none, or several."""
        named = self.blocks[index].named_modules()
        found = [name for name, module in named if name and hasattr(module, "layer_idx")]
        return f"{self.block_prefix}.{index}.{found[0]}" if len(found) == 1 else None
