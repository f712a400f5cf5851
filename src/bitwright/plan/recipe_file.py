"""Recipes as TOML: a file's tables become rules, and every key that is unknown, missing or of the wrong kind is an error."""

import inspect
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bitwright.errors import RecipeError, SchemeError, one_of
from bitwright.formats.ggml import TYPES
from bitwright.gguf.file_types import FLOAT_TYPES, MIXES
from bitwright.numerics.scheme import Scheme
from bitwright.plan.rule import KEEP, Rule
from bitwright.sparsity.pruning import Pruning
from bitwright.transforms import TRANSFORMS, Transform, split_method

UNPRUNED = "none"
EXAMPLES = {  # of a rule's keys, for errors
    "match": 'match = "*"',
    "scheme": 'scheme = "int4-g128"',
    "method": 'method = "gptq"',
    "options": "options = { sweeps = 4 }",
    "activations": 'activations = "int8-token"',
    "transforms": 'transforms = ["awq"]',
    "observer": 'observer = "mse"',
    "prune": 'prune = "wanda:0.5"',
}
KINDS = {"options": dict, "transforms": list}  # all other values are texts


@dataclass(frozen=True)
class Defaults:
    """The command line's choices, for keys that a rule leaves out."""

    method: str
    activations: str | None
    observer: str
    prune: str | None


def read_content(file: Path) -> dict[str, Any]:
    """A recipe file as plain data. RecipeError if it is not one."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError("no such recipe", where=str(file), remedy="give a TOML file of [[rule]] tables") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        remedy = "mend it, or leave out --recipe"
        raise RecipeError(f"not a TOML file: {error}", where=str(file), remedy=remedy) from error
    return checked(content, str(file))


def checked(content: dict[str, Any], where: str) -> dict[str, Any]:
    """A recipe's content. RecipeError for a key that is unknown or of the wrong kind."""
    _known_keys(content, {"rule", "kv_cache", "pure", "temper", "made_for"}, where)
    if not isinstance(content.get("temper", 0.0), float):
        raise RecipeError(f"temper is {content['temper']!r}, not a fraction", where=where, remedy="temper = 0.05")
    if not isinstance(content.get("made_for", ""), str):
        remedy = "leave the line out, and the recipe is for any model"
        raise RecipeError(f"made_for is {content['made_for']!r}, not a text", where=where, remedy=remedy)
    if not isinstance(content.get("rule", []), list):
        raise RecipeError("rule is not a list of tables", where=where, remedy="write [[rule]] above each rule")
    return content


def rule_of(entry: object, defaults: Defaults, where: str) -> Rule:
    """One table of the file. RecipeError for a key that is unknown, missing or of the wrong kind."""
    _known_keys(entry, set(EXAMPLES), where)
    assert isinstance(entry, dict)  # see _known_keys
    for key, example in EXAMPLES.items():
        kind = KINDS.get(key, str)
        if key in entry and not isinstance(entry[key], kind):
            message = f"{key} is {entry[key]!r}, not a {kind.__name__}"
            raise RecipeError(message, where=where, remedy=f"such as {example}")
    if "match" not in entry or "scheme" not in entry:
        remedy = f"such as {EXAMPLES['match']} and {EXAMPLES['scheme']}"
        raise RecipeError("a rule needs match and scheme", where=where, remedy=remedy)
    before, method = split_method(entry.get("method", defaults.method))
    transforms = [transform_of(item, where) for item in [*before, *entry.get("transforms", [])]]
    activations = entry.get("activations", defaults.activations)
    name = entry["scheme"]
    mix = name.upper() if name.upper() in (*MIXES, *FLOAT_TYPES) else ""
    pruned = entry.get("prune", None if name == KEEP or mix in FLOAT_TYPES else defaults.prune)
    scheme = None if name == KEEP or mix in FLOAT_TYPES else _scheme_of(mix) if mix else _parsed(name)
    return Rule(
        entry["match"],
        scheme,
        method,
        entry.get("options", {}),
        None if activations in (None, KEEP) else Scheme.parse(activations),
        tuple(transforms),
        entry.get("observer", defaults.observer),
        mix,
        prune=None if pruned in (None, UNPRUNED) else Pruning.parse(pruned),
    )


def _scheme_of(mix: str) -> Scheme:
    """The scheme of the block type of a mix's name, or of the type that most of its tensors get."""
    return TYPES[mix if mix in TYPES else MIXES[mix]].scheme


def _parsed(name: str) -> Scheme:
    """The scheme that a text names. SchemeError suggests the nearest mix, if there is one."""
    try:
        return Scheme.parse(name)
    except SchemeError as error:
        near = get_close_matches(name.upper(), MIXES, 1, cutoff=0.7)
        error.remedy = f"did you mean {near[0].lower()}, for an OUT.gguf?" if near else error.remedy
        raise


def transform_of(item: object, where: str) -> Transform:
    """A transform by name, or as a table of its name and options."""
    options = {"name": item} if isinstance(item, str) else dict(item) if isinstance(item, dict) else {}
    name = options.pop("name", None)
    if name not in TRANSFORMS:
        raise RecipeError(f"unknown transform {name!r}", where=where, remedy=one_of(str(name), TRANSFORMS))
    kind: Callable[..., Transform] = TRANSFORMS[name]
    known = list(_parameters(kind))
    for option in options:
        if option not in known:
            raise RecipeError(
                f"{name} has no option {option!r}", where=where, remedy=f"its options: {', '.join(known)}"
            )
    try:
        return kind(**options)
    except TypeError as error:
        remedy = f"its options: {', '.join(known)}, as numbers or words"
        raise RecipeError(f"{name}: {error}", where=where, remedy=remedy) from error


def _parameters(kind: Callable[..., Transform]) -> Iterator[str]:
    return iter(inspect.signature(kind).parameters)


def _known_keys(found: object, known: set[str], where: str) -> None:
    if not isinstance(found, dict):
        raise RecipeError("a rule is a table", where=where, remedy="write [[rule]] above each rule")
    for key in found:
        if key not in known:
            raise RecipeError(f"unknown key {key!r}", where=where, remedy=one_of(key, sorted(known)))
