"""Preflight: plan a run from config.json and tensor headers alone, before any weight is read.

Decides for every tensor of the source whether it is quantized, kept in float or left out; computes the size of the result to
the byte; estimates peak memory; refuses what the format cannot hold; and notes what engines will not load.
"""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PretrainedConfig

from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import FormatError, RecipeError
from bitwright.files.checkpoint import Checkpoint
from bitwright.files.model_path import is_gguf
from bitwright.formats import READERS, Format, format_named
from bitwright.gguf.metadata import Metadata, metadata
from bitwright.gguf.reader import carried_keys
from bitwright.models.adapter import Adapter
from bitwright.models.adapter_base import check_base
from bitwright.models.config import check_described, described_in, quantization_of, read_config
from bitwright.models.decoded_source import DecodedCheckpoint, FloatCheckpoint, has_no_original
from bitwright.models.families import IN_FLOAT32, positions_of
from bitwright.models.gguf_model import config_for_gguf, fit_to_gguf
from bitwright.models.gguf_source import FloatGgufCheckpoint, check_companions
from bitwright.models.skeleton import Skeleton
from bitwright.plan.peak_memory import peak_memory
from bitwright.plan.planned_tensor import PlannedTensor, already_quantized, decoded_note
from bitwright.plan.recipe import Recipe
from bitwright.plan.run_plan import Plan
from bitwright.plan.tensor_actions import by_threshold, decide
from bitwright.system.device import CPU, best_dtype
from bitwright.transforms.rotation import Rotation

HALF = torch.bfloat16  # of what a directory keeps in float, where the source has it in blocks
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def preflight(
    source: Path,
    recipe: Recipe,
    format_name: str,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    requantize: bool | None = None,
    adapter: Path | None = None,
    device: torch.device = CPU,
) -> Plan:
    """Plan a run: see the module's docstring.

    samples, seqlen: calibration windows, and tokens in one. requantize: whether a source that is rounded to integers may be
    rounded once more; None: no, and whoever asks has no option for it that a refusal could name. adapter: of LoRA; the model
    with it is what is quantized. device: of statistics and rounding.

    Raises CheckpointError for a source that is missing, damaged or quantized already, or an adapter of another one; FormatError
    for what the format cannot hold; RecipeError for a rule that does not fit the model.
    """
    format_ = format_named(format_name)
    original = read_config(source)
    of_float = not is_gguf(source) and quantization_of(source) is None
    text_only = format_.one_file and of_float  # GGUF takes no towers for images or sound
    config = config_for_gguf(original) if text_only else original
    if not requantize:
        _refuse_integers(source, requantize)
    rotation = Rotation.of(recipe.rotation, config) if recipe.rotation else None
    untied = rotation is not None and bool(config.tie_word_embeddings)
    if untied:
        config.tie_word_embeddings = False  # the last norm is folded into the head, not into the embedding
    exact = config.model_type in IN_FLOAT32 or not recipe.needs_calibration
    skeleton = Skeleton(config, torch.float32 if exact else best_dtype(device), device)
    _check_made_for(recipe, skeleton, source)
    checkpoint, left = _open(source, format_, skeleton, original if text_only else None, requantize=requantize)
    tensors, notes = decide(skeleton, checkpoint, recipe, format_, rotation, untied=untied)
    notes += left
    if any(t.stored_as for t in tensors):
        notes.append(decoded_note(tensors))
    added = None if adapter is None else Adapter(adapter)
    if added is not None:
        added.check(skeleton)
        notes += check_base(added, source)
        tensors = [_adapted(t, added) for t in tensors]
    if untied:
        notes.append("a rotation unties the output head from the embedding: both are written")
    notes += _notes_on_towers(source, skeleton)
    limit = positions_of(config.get_text_config()) or seqlen
    keys, said = _file_keys(checkpoint, skeleton, recipe) if format_.one_file else Metadata({}, ())
    notes += [*_calibration_notes(recipe, tensors, samples, seqlen, limit), *said]
    plan = Plan(
        source, skeleton, checkpoint, format_, tuple(tensors), recipe, min(seqlen, limit), samples, tuple(notes), rotation,
        keys, added,
    )  # fmt: skip
    _check_recipe(plan)
    return replace(plan, peak_memory=peak_memory(plan))


def _adapted(t: PlannedTensor, adapter: Adapter) -> PlannedTensor:
    """The tensor's plan, which says so where the adapter changes it."""
    return replace(t, reason=f"adapted by {adapter.folder.name}") if adapter.changes(t.parameter) else t


def _check_made_for(recipe: Recipe, skeleton: Skeleton, source: Path) -> None:
    """RecipeError for a recipe that was planned for a model of other matrices."""
    if recipe.made_for and recipe.made_for != shapes_digest(skeleton):
        remedy = f"bitwright plan {source} RECIPE.toml --bits 4.5; or remove that line to use it all the same"
        raise RecipeError("the recipe was planned for a model of other matrices", where="made_for", remedy=remedy)


def shapes_digest(skeleton: Skeleton) -> str:
    """A hash of the names and shapes of all parameters, the same for all models of one kind and size."""
    shapes = sorted((name, tuple(p.shape)) for name, p in skeleton.model.named_parameters())
    return sha256(repr(shapes).encode()).hexdigest()[:16]


def _check_recipe(plan: Plan) -> None:
    """Raises FormatError or RecipeError for what this format, this model or this recipe cannot do."""
    recipe = plan.recipe
    if recipe.kv_cache is not None:
        _check_kv(plan)
    if recipe.temper is not None and not (plan.format.one_file and plan.skeleton.predicts):
        remedy = "give OUT.gguf, or leave temper out of the recipe"
        raise FormatError(f"{plan.format.name} keeps the last norm as it was", where="temper", remedy=remedy)
    if not any(t.layer or (t.rule and t.rule.mix) for t in plan.tensors):
        remedy = 'add a rule such as match = "*", scheme = "int4-g128"; or keep fewer matrices'
        raise RecipeError("the recipe keeps every matrix: nothing to quantize", where=str(plan.source), remedy=remedy)
    _ = plan.quantization_config, plan.bytes  # raise for schemes that cannot share a checkpoint, or a tensor


def _calibration_notes(
    recipe: Recipe, tensors: list[PlannedTensor], samples: int, seqlen: int, limit: int
) -> Iterator[str]:
    """Notes on sizes that depend on calibration, on too few tokens, and on windows longer than the model's context."""
    if any(t.rule is not None and by_threshold(t.rule) for t in tensors):
        yield "how many channels stay in float depends on calibration: sizes are those of one in each matrix"
    tokens, widest = samples * min(seqlen, limit), max((t.layer.K for t in tensors if t.layer), default=0)
    if recipe.needs_calibration and tokens < widest:
        few = f"{tokens} calibration tokens do not tell {widest} input channels apart"
        yield f"{few}: give more --samples, or expect little of calibration"
    if recipe.needs_calibration and seqlen > limit:
        yield f"calibration windows of {limit} tokens: the model knows no more positions than that"


def _refuse_integers(source: Path, requantize: bool | None) -> None:
    """CheckpointError for a source that is quantized, and has a float original."""
    quantization = quantization_of(source)
    if quantization is not None and not has_no_original(quantization):
        method = quantization.get("quant_method")
        readable = method in {reader.method for reader in READERS}
        raise already_quantized(f"{described_in(source)} says {method}", source, requantize, readable=readable)


def _open(
    source: Path, format_: Format, skeleton: Skeleton, original: PretrainedConfig | None, *, requantize: bool | None
) -> tuple[FloatCheckpoint, list[str]]:
    """The source's tensors, fused experts apart, and what there is to say of those left out.

    original: the checkpoint's own config, where only its text model is wanted. A quantized GGUF file: CheckpointError unless
    `requantize`.
    """
    if not is_gguf(source):
        if quantization_of(source) is not None:
            return DecodedCheckpoint(source, skeleton), []
        checkpoint = Checkpoint(source)
        check_described(checkpoint.tensors, source)
        left = [] if original is None else fit_to_gguf(original, checkpoint)
        skeleton.split_experts(checkpoint)
        return checkpoint, left
    decoded_as = torch.float32 if format_.one_file else HALF
    found = FloatGgufCheckpoint(source, decoded_as)
    if not requantize:
        for name, stored in found.weight_source.stored.items():
            if found.stored_as(name):
                raise already_quantized(f"{stored!r} is {found.stored_as(name).upper()}", source, requantize)
    if not format_.one_file:  # whose tokenizer is written anew
        check_companions(source)
    return found, []


def _notes_on_towers(source: Path, skeleton: Skeleton) -> list[str]:
    """What becomes of the parts for images or sound, and of the files that say how those are prepared."""
    if not skeleton.towers:
        return []
    notes = [f"{', '.join(skeleton.towers)}: kept in float; the text model is quantized, calibrated on text alone"]
    if source.is_dir() and not any((source / name).is_file() for name in PROCESSORS):
        notes.append(f"no {' or '.join(PROCESSORS)} here: the result knows text alone until they are put beside it")
    return notes


def _file_keys(checkpoint: FloatCheckpoint, skeleton: Skeleton, recipe: Recipe) -> Metadata:
    """The keys of the GGUF file to write; errors as of `metadata`."""
    if isinstance(checkpoint, FloatGgufCheckpoint):
        return Metadata(carried_keys(checkpoint.weight_source.file, recipe.file_type), ())
    source = checkpoint.folder
    return metadata(source, skeleton.config, load_tokenizer(source), recipe.file_type)


def _check_kv(plan: Plan) -> None:
    """FormatError or RecipeError where the format or the model has no place for a quantized KV cache."""
    if not plan.format.kv_cache:
        remedy = "use --format compressed-tensors, or leave out --kv-cache"
        raise FormatError(f"{plan.format.name} files have no place for a quantized KV cache", remedy=remedy)
    if not plan.kv_specs(0):
        kind = plan.skeleton.config.model_type
        raise RecipeError(
            f"models of type {kind!r} have no single attention module a block", remedy="leave out --kv-cache"
        )
