"""What a plan chooses schemes for: matrices, or groups of them that an engine wants alike; and the schemes each may have.

An engine that fuses matrices into one product (vLLM: query, key and value; gate and up; the experts of a layer) needs one
scheme for all of them. A GGUF file has the experts of a layer in one tensor for each of their matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitwright.errors import FormatError, RecipeError, SchemeError, one_of
from bitwright.files.checkpoint import spec_bytes
from bitwright.formats import Layer, format_named
from bitwright.formats.ggml import TYPES
from bitwright.methods import check_serves
from bitwright.models.file_names import EXPERT
from bitwright.numerics.scheme import Scheme
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import KEEP, Rule
from bitwright.plan.run_plan import Plan

# Schemes that are tried where none are named. In GGUF, types with blocks of 32 where rows do not fill blocks of 256.
CANDIDATES = {
    "gguf": ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
    "compressed-tensors": ("int4-g128", "int4-g64", "int4-g32", "int8-channel"),
    "bitwright": ("int2-g64", "int3-g128", "int3-g64", "int4-g128", "int4-g64", "int4-g32", "int6-g64", "int8-channel"),
    "gptq": ("int4-g128", KEEP),
}
SMALL_BLOCKS = ("iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")
ONE_SCHEME = ("gptq",)  # formats that hold one scheme, beside matrices in float
WIDEST = {"gguf": "q8_0"}  # of the base plan; elsewhere int8-channel: both fit every matrix
# What vLLM fuses, by the last part of the modules' names (`packed_modules_mapping` of its models).
FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
)  # fmt: skip
ENGINE_FUSES = ("compressed-tensors", "gptq")  # formats that vLLM reads


@dataclass(frozen=True)
class Choice:
    """One scheme that a unit may have. layers: how the format stores each member; None: in float, as it is."""

    scheme: str
    layers: tuple[Layer | None, ...]
    bytes: int


@dataclass(frozen=True)
class Unit:
    """Matrices that get one scheme. patterns: of a recipe's rules that match them all."""

    patterns: tuple[str, ...]
    members: tuple[PlannedTensor, ...]
    choices: tuple[Choice, ...]


def base_plan(
    model: Path,
    format_name: str,
    *,
    method: str,
    keep: Sequence[str],
    samples: int,
    seqlen: int,
    requantize: bool | None = None,
) -> Plan:
    """The plan of a run that quantizes all that a plan may choose for, in the widest scheme. requantize: as of `preflight`.

    FormatError for a format that has no choice of schemes; RecipeError for a pattern of `keep` that matches nothing.
    """
    if format_named(format_name).name not in CANDIDATES:
        raise FormatError(f"{format_name} has one scheme: nothing to plan", remedy=f"--format {', '.join(CANDIDATES)}")
    scheme = WIDEST.get(format_name, "int8-channel")
    rule = Recipe.of(None, scheme=scheme, method=method, pure=True).rules[0]
    kept = [Rule(pattern, None, method) for pattern in keep]
    recipe = Recipe((rule, *kept), pure=True)
    return preflight(model, recipe, format_name, samples=samples, seqlen=seqlen, requantize=requantize)


def units_of(plan: Plan, schemes: Sequence[str] | None) -> list[Unit]:
    """All units of a base plan, with the choices that fit every member.

    schemes  candidates by name, or "keep"; None: those of `CANDIDATES`
    FormatError for a unit that none of them fits, or schemes that the format cannot hold at all; SchemeError and RecipeError
    for names that do not exist or that the method does not serve.
    """
    if schemes is not None:
        _check(plan, schemes)
    groups: dict[str, list[PlannedTensor]] = {}
    for t in plan.tensors:
        if t.layer is not None:
            groups.setdefault(_group(t.layer.name, plan.format.name), []).append(t)
    for scheme in schemes or ():
        found = [_choice(plan, members, scheme) for members in groups.values()]
        if not any(isinstance(one, Choice) for one in found):
            message = f"{scheme} fits none of the {len(groups)} matrices or groups of them: {found[0]}"
            raise FormatError(message, where=plan.format.name, remedy="leave it out of --schemes")
    return [_unit(plan, members, schemes) for members in groups.values()]


def _group(name: str, format_name: str) -> str:
    """The key of a matrix's unit."""
    if EXPERT.search(name):  # vLLM: all matrices of a layer's experts alike
        stem = EXPERT.sub(".experts.*.", name)
        return stem.rpartition(".")[0] if format_name in ENGINE_FUSES else stem
    owner, _, leaf = name.rpartition(".")
    fused = next((group for group in FUSED if leaf in group), ()) if format_name in ENGINE_FUSES else ()
    return f"{owner}.{'+'.join(fused)}" if fused else name


def _unit(plan: Plan, members: list[PlannedTensor], schemes: Sequence[str] | None) -> Unit:
    patterns = dict.fromkeys(EXPERT.sub(".experts.*.", t.layer.name) for t in members if t.layer is not None)
    first = members[0].layer
    assert first is not None
    small = plan.format.one_file and first.K % TYPES["Q4_K"].size != 0
    tried = schemes or (SMALL_BLOCKS if small else CANDIDATES[plan.format.name])
    found = [_choice(plan, members, scheme) for scheme in tried]
    choices = [one for one in found if isinstance(one, Choice)]
    if not choices:
        wide = WIDEST.get(plan.format.name, "int4-g64")
        message = f"none of {', '.join(tried)} fits a matrix of shape {first.N, first.K}: {found[0]}"
        raise FormatError(
            message, where=first.name, remedy=f"bitwright plan … --schemes with one that does, such as {wide}"
        )
    return Unit(tuple(patterns), tuple(members), tuple(choices))


def fits(plan: Plan, members: Sequence[PlannedTensor], scheme: str, activations: Scheme) -> bool:
    """Whether the format holds all members in this scheme with their inputs rounded."""
    if scheme == KEEP:
        return False
    try:
        for t in members:
            _stored(plan, t, scheme, activations)
    except FormatError:
        return False
    return True


def _choice(plan: Plan, members: list[PlannedTensor], scheme: str) -> Choice | str:
    """The members in this scheme; or why it does not fit one of them, or the method does not serve it."""
    if scheme == KEEP:
        return Choice(KEEP, (None,) * len(members), sum(spec_bytes({t.source: (t.dtype, t.shape)}) for t in members))
    try:
        layers = tuple(_stored(plan, t, scheme) for t in members)
        for t, layer in zip(members, layers, strict=True):
            check_serves(t.rule.method if t.rule else "rtn", layer.scheme)
    except (FormatError, SchemeError, RecipeError) as error:
        return error.message
    fallback = next((layer.fallback for layer in layers if layer.fallback), "")
    if fallback:  # another block type, which is a candidate of its own
        return fallback
    stored = (replace(t, layer=layer) for t, layer in zip(members, layers, strict=True))
    return Choice(scheme, layers, sum(spec_bytes(plan.specs([t])) for t in stored))


def _stored(plan: Plan, t: PlannedTensor, scheme: str, activations: Scheme | None = None) -> Layer:
    assert t.layer is not None
    kind = TYPES.get(scheme.upper()) if plan.format.one_file else None
    of = Scheme.parse(scheme) if kind is None else kind.scheme
    layer = replace(t.layer, scheme=of, container=kind.name if kind else "", activations=activations)
    return plan.format.adapt(layer, t.dtype)


def _check(plan: Plan, schemes: Sequence[str]) -> None:
    """Errors of `units_of` for the names themselves."""
    if not all(schemes):
        remedy = f"such as {','.join(CANDIDATES[plan.format.name])}"
        raise RecipeError("a scheme without a name", where="--schemes", remedy=remedy)
    if len(set(schemes)) < len(schemes):
        raise RecipeError("a scheme is named twice", where=",".join(schemes), remedy="name each scheme once")
    method = next(rule.method for rule in plan.recipe.active)
    for scheme in schemes:
        if scheme == KEEP:
            continue
        if plan.format.one_file and scheme.upper() not in TYPES:
            remedy = one_of(scheme, [name.lower() for name in TYPES])
            raise FormatError(f"{scheme} is none of GGUF's block types", where="--schemes", remedy=remedy)
        parsed = TYPES[scheme.upper()].scheme if plan.format.one_file else Scheme.parse(scheme)
        check_serves(method, parsed, where=scheme)
    rounded = [scheme for scheme in schemes if scheme != KEEP]
    if not rounded:
        remedy = f"add a scheme: --schemes {CANDIDATES[plan.format.name][0]},{KEEP}"
        raise RecipeError(f"{KEEP} alone rounds nothing", where="--schemes", remedy=remedy)
    if plan.format.name in ONE_SCHEME and len(rounded) != 1:
        remedy = f"--schemes {(rounded or ['int4-g128'])[0]},keep; or --format compressed-tensors"
        message = f"a {plan.format.name} file holds one scheme, beside matrices in float"
        raise FormatError(message, where=",".join(schemes), remedy=remedy)
