"""Decide for every tensor of a checkpoint: quantize (with which scheme and method), keep in float, or drop."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitwright.errors import CheckpointError, FormatError, RecipeError
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats import Format, Layer
from bitwright.formats.format import FLOAT_NAMES
from bitwright.formats.ggml import TYPES
from bitwright.formats.native import is_sparse
from bitwright.gguf.config_keys import not_kept
from bitwright.gguf.file_types import MIXES, Place, part_of, type_in
from bitwright.gguf.layer_values import of_layer
from bitwright.gguf.tensor_names import Names, is_unused
from bitwright.methods.obq import LARGEST_K
from bitwright.models.decoded_source import FloatCheckpoint
from bitwright.models.families import KEPT_LINEARS
from bitwright.models.file_names import Conversion
from bitwright.models.skeleton import Skeleton
from bitwright.models.unread import check_all_read, why_left
from bitwright.numerics.scheme import PRESETS, Scheme
from bitwright.plan.planned_tensor import (
    KEPT,
    LEFT_OUT,
    QUANTIZED,
    SMALLEST,
    TAKEN_AS,
    PlannedTensor,
    half_precision,
    in_float,
    taken_notes,
)
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import Rule
from bitwright.transforms import Outlier
from bitwright.transforms.rotation import EMBEDDING, HEAD, Rotation

CONVERTED = "transformers makes other tensors of it as it loads it"
FEW_INPUTS = 32  # a matrix of fewer is kept: no group of scales fits, and it is small
ODD_GRIDS = ("int2", "int3", "int5", "int6", "int7", "ternary")  # in compressed-tensors: vLLM knows 4 and 8 bits


def decide(
    skeleton: Skeleton,
    checkpoint: FloatCheckpoint,
    recipe: Recipe,
    format_: Format,
    rotation: Rotation | None,
    *,
    untied: bool,
) -> tuple[list[PlannedTensor], list[str]]:
    """An action for every tensor of the source, and notes. CheckpointError for a tensor that the model does not have."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    if untied:
        shapes[HEAD] = shapes.get(EMBEDDING) or shapes[EMBEDDING.removeprefix("model.")]
    names = skeleton.source_names(shapes, str(checkpoint.folder))
    check_all_read(shapes, names.values(), skeleton, str(checkpoint.folder))
    parameters = {source: parameter for parameter, source in names.items()}
    blocks = {p: i for i in range(len(skeleton)) for p in skeleton.state_names(i)}
    modules = {n: m for i in range(len(skeleton)) for n, m in skeleton.linears(i).items()}
    odd = [p for p in blocks if p in names and p.removesuffix(".weight") not in modules]
    odd = [p.removesuffix(".weight") for p in odd if len(checkpoint.tensors[names[p]].shape) > 1]
    chooser = _Chooser(skeleton, recipe, format_, rotation, modules, odd, names)
    converted = {source: one for one in skeleton.conversions for source in one.sources}
    planned = []
    for source, info in checkpoint.tensors.items():
        dtype = TAKEN_AS.get(info.dtype, info.dtype)
        t = PlannedTensor(source, parameters.get(source, source), None, dtype, info.shape, KEPT)
        if source in converted:
            planned.append(_converted(t, converted[source], blocks))
        elif source in parameters:
            planned.append(chooser.decide(replace(t, block=blocks.get(t.parameter))))
        else:
            planned.append(_unread(t, skeleton, format_))
    if untied:
        of = checkpoint.tensors[names[EMBEDDING]]
        dtype = TAKEN_AS.get(of.dtype, of.dtype)
        planned.append(chooser.decide(PlannedTensor(HEAD, HEAD, None, dtype, of.shape, KEPT, made_of=names[EMBEDDING])))
    if not isinstance(checkpoint, Checkpoint):
        planned = [replace(t, stored_as=checkpoint.stored_as(t.made_of or t.source)) for t in planned]
    notes = [
        *taken_notes(info.dtype for info in checkpoint.tensors.values()),
        *_engine_notes(planned, format_, skeleton),
    ]
    fused = any(info.take is not None for info in checkpoint.tensors.values())
    return planned, notes + _expert_notes(planned, format_, skeleton, fused=fused)


def _converted(t: PlannedTensor, conversion: Conversion, blocks: Mapping[str, int]) -> PlannedTensor:
    """A tensor that transformers makes others of: its format holds float ones alone. CheckpointError for experts."""
    made = conversion.makes[0]
    if ".experts." in made:
        message = f"transformers makes {made} of it, and this family's experts are not known here"
        raise CheckpointError(message, where=t.source, remedy="quantize a model without experts")
    return replace(t, block=blocks.get(made), reason=CONVERTED)


def _unread(t: PlannedTensor, skeleton: Skeleton, format_: Format) -> PlannedTensor:
    """A tensor that the model does not read; of an encoder, what is behind its last hidden state may be kept."""
    if not is_unused(t.source) or skeleton.predicts:
        return replace(t, action=LEFT_OUT, reason=why_left(t.source, t.shape, skeleton) or "")
    if format_.one_file:
        return replace(t, action=LEFT_OUT, reason="llama.cpp does without the pooling layer and heads")
    return replace(t, reason="the pooling layer or a head")


class _Chooser:
    """Chooses the action for each tensor of a model."""

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        format_: Format,
        rotation: Rotation | None,
        modules: dict[str, nn.Module],
        odd: list[str],
        files: Mapping[str, str],
    ) -> None:
        ends = skeleton.embedding_and_head() if format_.embeddings else {}
        self.skeleton, self.recipe, self.format, self.rotation, self.files = skeleton, recipe, format_, rotation, files
        self.modules = modules | ends
        self.lent = {name for index in range(len(skeleton)) for name in skeleton.lent_names(index)}
        self.routers = skeleton.routers()
        self.names = Names(skeleton.config) if format_.one_file else None
        self.rules = recipe.assign({name: self._other(name) for name in (*self.modules, *odd)})

    def _other(self, module: str) -> str:
        """What else a module may be called: in a GGUF file llama.cpp's name of its weight, else the source's own name of it."""
        if self.names is None:
            return self.files.get(f"{module}.weight", "").removesuffix(".weight")
        if not self.names.has(f"{module}.weight"):
            return ""
        return self.names.of(f"{module}.weight")

    def decide(self, t: PlannedTensor) -> PlannedTensor:
        """Quantize the blocks' matrices as the rules say; keep vectors, and what is outside the blocks.

        Formats that can (GGUF) have the embedding and the head quantized too; GGUF's vectors are float32.
        """
        name = t.parameter.removesuffix(".weight")
        if self.names is not None:
            wide = self.names.is_float32(t.parameter, len(t.shape))
            t = replace(t, dtype=torch.float32) if wide else t
        if t.block is None and name not in self.modules:
            tower = self.skeleton.tower_of(t.parameter)
            return replace(t, reason=f"{tower}: not the text model" if tower else "outside the blocks")
        if len(t.shape) < 2:
            return replace(t, reason="a vector")
        if any(f"{name}.".startswith(f"{router}.") for router in self.routers):
            return replace(t, reason="a router of experts")
        rule = self.rules[name]
        if rule.scheme is None:
            return in_float(t, rule, one_file=self.names is not None)
        if (rule.match == "*" or rule.exact) and (why := self._kept_by_default(t, name)):
            return replace(t, reason=why, rule=rule)
        if name not in self.modules:
            remedy = f'a recipe rule with match = "{name}" and scheme = "keep"'
            message = f"a parameter of shape {t.shape} that is not a Linear cannot be quantized"
            raise RecipeError(message, where=name, remedy=remedy)
        if t.dtype not in FLOAT_NAMES:
            remedy = "give a checkpoint in float32, float16 or bfloat16"
            raise CheckpointError(f"the weight's type is {t.dtype}", where=name, remedy=remedy)
        K = t.shape[0] if isinstance(self.modules[name], Conv1D) else t.shape[1]
        if self.names is not None and K % SMALLEST:
            return half_precision(replace(t, rule=rule), K)
        rule = rule if t.block is not None else replace(rule, prune=None)  # an embedding's rows are looked up whole
        layer = self._layer(t, name, rule)
        if rule.method == "obq" and layer.K > LARGEST_K:
            remedy = f"use --method gptq, or K up to {LARGEST_K}"
            raise RecipeError(f"obq on K = {layer.K} would take days", where=name, remedy=remedy)
        return replace(t, action=QUANTIZED, layer=layer, rule=rule)

    def _kept_by_default(self, t: PlannedTensor, name: str) -> str:
        """Why a tensor stays in float though no rule of the recipe says so by name; "": it does not."""
        if t.parameter in self.lent:
            return "shared by several blocks"
        if (
            name in self.modules
            and t.block is not None
            and t.shape[not isinstance(self.modules[name], Conv1D)] < FEW_INPUTS
        ):
            return f"a matrix of fewer than {FEW_INPUTS} inputs"
        if name in self.modules:
            return next((why for pattern, why in KEPT_LINEARS.items() if re.search(pattern, name)), "")
        if ".experts." in f"{t.parameter}.":
            return ""
        owner, _, leaf = t.parameter.rpartition(".")
        return f"{leaf} of a {type(self.skeleton.model.get_submodule(owner)).__name__}"

    def _layer(self, t: PlannedTensor, name: str, rule: Rule) -> Layer:
        """The matrix as the format will store it."""
        assert rule.scheme is not None
        transposed = isinstance(self.modules[name], Conv1D)
        N, K = (t.shape[1], t.shape[0]) if transposed else t.shape
        layer = Layer(name, N, K, rule.scheme, transposed, _inputs_as_stored(rule, t.dtype), _outliers(rule, K))
        if self.names is not None:
            layer = replace(layer, heads=self.names.heads(t.parameter))
        if self.rotation is not None:
            layer = replace(layer, rotate=self.rotation.online_block(name, K))
        exact = self.recipe.pure or rule.exact
        if rule.mix and self.names is not None and not (exact and rule.mix not in TYPES):
            place = self._place(self.names.of(t.parameter), t.block, rule, K)
            kind = TYPES[rule.mix if exact else type_in(rule.mix, place)]
            layer = replace(layer, scheme=kind.scheme, container=kind.name)
        elif rule.mix and rule.mix.lower() not in PRESETS:
            remedy = (
                "use --format gguf" if self.names is None else "leave out --pure, or name a block type such as q4_k"
            )
            raise FormatError(f"{rule.mix.lower()} is a mix of llama.cpp's block types", where=name, remedy=remedy)
        return _pruned(self.format.adapt(layer, t.dtype), rule, self.format)

    def _place(self, name: str, block: int | None, rule: Rule, K: int) -> Place:
        """What the choice of a block type in a mix depends on; name: llama.cpp's."""
        config = self.skeleton.config
        part = part_of(name, block)
        heads = getattr(config, "num_attention_heads", None) or 1  # a state space has none
        heads //= of_layer(config, "num_key_value_heads", block or 0) or heads
        fits = K % TYPES[MIXES[rule.mix]].size == 0
        tied = bool(config.tie_word_embeddings)
        weighted, experts = self.recipe.needs_calibration, self.names.experts if self.names is not None else 0
        return Place(part, block or 0, len(self.skeleton), heads, tied, weighted, fits, experts, "_exps" in name)


def _mask_notes(layers: list[Layer]) -> list[str]:
    """What is said of pruned layers whose mask would take as much as their zeros."""
    dense = [layer for layer in layers if layer.pruned and not is_sparse(layer)]
    if not dense:
        return []
    share = dense[0].pruned / (dense[0].N * dense[0].K)
    why = f"a mask of one bit a weight saves nothing at {dense[0].scheme.levels.bits} bits with {share:.0%} zeros"
    return [f"{len(dense)} pruned matrices are no smaller in the file, such as {dense[0].name}: {why}"]


def _pruned(layer: Layer, rule: Rule, format_: Format) -> Layer:
    """The layer with the number of its pruned weights. FormatError if no code of what stores it stands for zero."""
    if rule.prune is None:
        return layer
    if not layer.scheme.holds_zero:
        stored = f"{layer.container.lower()} blocks have" if layer.container else f"{layer.scheme} has"
        blocks = "q8_0 or q6_k; q4_0, q5_0 or q3_k with --pure, since mixes have other types beside them"
        others = blocks if format_.one_file else "int4-g64, int4-g64-asym, nf4-g64 or fp4-g32"
        message = f"pruned weights are exactly zero, and {stored} no code for that"
        raise FormatError(message, where=layer.name, remedy=f"--scheme {others}, or leave out --prune")
    try:
        return replace(layer, pruned=rule.prune.removed(layer.N, layer.K))
    except RecipeError as error:
        error.where = error.where or layer.name
        raise


def _inputs_as_stored(rule: Rule, dtype: torch.dtype) -> Scheme | None:
    """The rule's scheme for inputs; a static scale is stored in the model's own float type."""
    if rule.activations is None or not rule.static:
        return rule.activations
    return rule.activations.with_scale(FLOAT_NAMES[dtype])


def by_threshold(rule: Rule) -> bool:
    """Whether the number of outlier channels is known only after calibration."""
    separate = rule.transform(Outlier)
    return isinstance(separate, Outlier) and separate.fraction is None


def _outliers(rule: Rule, K: int) -> int:
    """How many input channels stay in float; 1 where that is known only after calibration."""
    separate = rule.transform(Outlier)
    return (separate.expected(K) or 1) if isinstance(separate, Outlier) else 0


def _engine_notes(planned: list[PlannedTensor], format_: Format, skeleton: Skeleton) -> list[str]:
    """What the usual engines will say to these files, or do with them."""
    layers = [t.layer for t in planned if t.layer]
    notes = _format_notes(layers, format_)
    if format_.name != "bitwright" and any(layer.pruned for layer in layers):
        notes.append(f"{format_.name} stores zeros like other codes: pruned weights make no smaller file")
    floats = [f"{t.source}: {t.fallback}" for t in planned if t.fallback]
    notes += [f"{len(floats)} matrices stay in float, such as {floats[0]}"] if floats else []
    kept = [t.source for t in planned if t.block is not None and t.rule is not None and t.layer is None]
    if format_.name == "gptq" and kept:
        engines = "GPTQModel and vLLM know that by `dynamic`, transformers by itself does not"
        notes.append(f"{len(kept)} matrices are kept in float, such as {kept[0]}: {engines}")
    return [*notes, *not_kept(skeleton.config)] if format_.one_file else notes


def _expert_notes(planned: list[PlannedTensor], format_: Format, skeleton: Skeleton, *, fused: bool) -> list[str]:
    """Where transformers cannot load what is written of experts. fused: the source holds those of a layer in one tensor."""
    inside = tuple(f"{name}." for name in skeleton.experts)
    experts = [t.layer for t in planned if t.layer is not None and t.layer.name.startswith(inside)]
    if not experts or format_.name != "compressed-tensors":
        return []
    packed = all(one.scheme.zero == "sym" and (one.activations is None or one.scheme.grid == "fp8") for one in experts)
    if packed and not fused:
        return []
    why = (
        "looks for the experts of these models in one tensor" if fused else "takes experts in packed symmetric integers"
    )
    return [f"experts are written one by one: transformers {why}, and does not load them; bitwright.load does"]


def not_served(format_name: str, schemes: Iterable[Scheme]) -> list[str]:
    """The grids of a format that vLLM does not serve, or has no fast kernels for."""
    return sorted({scheme.grid for scheme in schemes if not _served(format_name, scheme)})


def _served(format_name: str, scheme: Scheme) -> bool:
    if format_name == "gptq":
        return scheme.zero == "sym"
    return format_name == "compressed-tensors" and scheme.grid not in ODD_GRIDS


def _format_notes(layers: list[Layer], format_: Format) -> list[str]:
    fallbacks = [f"{layer.name}: {layer.fallback}" for layer in layers if layer.fallback]
    if fallbacks:
        return [
            f"{len(fallbacks)} of {len(layers)} matrices get another block type than asked for, such as {fallbacks[0]}"
        ]
    if format_.name == "bitwright":
        return ["bitwright's own format: no engine reads it yet", *_mask_notes(layers)]
    odd = not_served(format_.name, (layer.scheme for layer in layers))
    if format_.name == "compressed-tensors" and odd:
        return [f"{', '.join(odd)}: transformers loads it; vLLM serves packed integers of 4 and 8 bits"]
    if format_.name == "gptq" and odd:
        said = "version 2 of the format, which GPTQModel loads, and transformers through it"
        return [f"asymmetric GPTQ: {said}; vLLM's fast kernels want symmetric, older tools know version 1 alone"]
    return []
