"""What to do with each matrix: pattern -> scheme, method, options. An unknown key or an unmatched pattern is an error.

A recipe is a list of rules; the last rule whose pattern matches a module's name wins, as in .gitignore. In TOML:

    [[rule]]
    match = "*"                    # fnmatch pattern on module names
    scheme = "int4-g128"           # or "keep": leave it in float, on purpose
    method = "gptq"                # optional; the command line's otherwise
    options = { sweeps = 4 }       # optional; keywords of the method
    activations = "int8-token"     # optional; the layer's inputs are rounded too, as they come
"""

import inspect
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.errors import RecipeError
from bitwright.methods import ASYMMETRIC, BLOCKWISE, CALIBRATED, METHODS
from bitwright.methods.autoround import Options
from bitwright.scheme import TOKEN, Scheme

KEEP = "keep"
SUPPLIED = ("cross",)  # keywords of methods that the pipeline fills in


@dataclass(frozen=True)
class Rule:
    """One line of a recipe. scheme None: keep in float."""

    match: str
    scheme: Scheme | None
    method: str = "gptq"
    options: dict[str, Any] = field(default_factory=dict)
    activations: Scheme | None = None

    def __post_init__(self) -> None:
        if self.scheme is not None and self.scheme.group == TOKEN:
            message = f"{self.scheme} is for activations: weights have no tokens"
            raise RecipeError(message, where=self.match, remedy="such as int8-channel")
        if self.activations is not None and self.activations.group != TOKEN:
            message = f"activations are rounded token by token, as they come, not as {self.activations}"
            raise RecipeError(message, where=self.match, remedy="such as int8-token or fp8-token")
        if self.method not in METHODS:
            raise RecipeError(
                f"unknown method {self.method!r}", where=self.match, remedy=f"one of {', '.join(METHODS)}"
            )
        parameters = inspect.signature(METHODS[self.method]).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in SUPPLIED]
        for name in self.options:
            if name not in known:
                remedy = f"its options: {', '.join(known) or 'none'}"
                raise RecipeError(f"method {self.method} has no option {name!r}", where=self.match, remedy=remedy)

    def describe(self) -> dict[str, Any]:
        """Plain data: what a manifest stores and compares."""
        scheme = KEEP if self.scheme is None else str(self.scheme)
        activations = None if self.activations is None else str(self.activations)
        return {
            "match": self.match, "scheme": scheme, "method": self.method, "options": self.options,
            "activations": activations,
        }  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Rules, later ones first in force."""

    rules: tuple[Rule, ...]

    @classmethod
    def uniform(cls, scheme: str, method: str, activations: str | None = None) -> "Recipe":
        """Every matrix of every block alike."""
        return cls((_default(scheme, method, activations),))

    @classmethod
    def of(cls, file: Path | None, *, scheme: str, method: str, activations: str | None = None) -> "Recipe":
        """A file's recipe if there is one, else the same for every matrix."""
        if file is None:
            return cls.uniform(scheme, method, activations)
        return cls.load(file, scheme=scheme, method=method, activations=activations)

    @classmethod
    def load(cls, file: Path, *, scheme: str, method: str, activations: str | None = None) -> "Recipe":
        """A TOML file, on top of a default for what it does not mention. RecipeError names the wrong key."""
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecipeError("no such recipe", where=str(file), remedy="give a TOML file of rules") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"not a TOML file: {error}", where=str(file)) from error
        _known_keys(content, {"rule"}, str(file))
        entries = content.get("rule", [])
        if not isinstance(entries, list):
            raise RecipeError("rule is not a list of tables", where=str(file), remedy="write [[rule]] above each rule")
        rules = [_rule(entry, method, activations, str(file)) for entry in entries]
        return cls((_default(scheme, method, activations), *rules))

    def assign(self, modules: list[str]) -> dict[str, Rule]:
        """The rule in force for each module. RecipeError if a rule's pattern matches no module at all."""
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.match) for name in modules):
                some = ", ".join(modules[:3])
                raise RecipeError(f"pattern {rule.match!r} matches nothing", remedy=f"names look like {some}")
        return {name: next(r for r in reversed(self.rules) if fnmatchcase(name, r.match)) for name in modules}

    @property
    def needs_calibration(self) -> bool:
        """Whether any rule's method cannot do without the Gram of the inputs (or is better with it)."""
        return any(rule.scheme is not None and rule.method in (*CALIBRATED, "search") for rule in self.rules)

    @property
    def needs_original(self) -> bool:
        """Whether any rule's method looks at the float model's activations beside the quantized one's."""
        return any(rule.scheme is not None and rule.method in ASYMMETRIC for rule in self.rules)

    @property
    def windows_at_once(self) -> int | None:
        """Calibration windows in one step of a method that tunes whole blocks; None if there is no such method.

        RecipeError if rules would tune the same block in different ways.
        """
        rules = [rule for rule in self.rules if rule.scheme is not None and rule.method in BLOCKWISE]
        if any(rule.options != rules[0].options for rule in rules):
            raise RecipeError("rules tune blocks with different options", remedy="give all of them the same options")
        return Options.of(rules[0].options).windows if rules else None


def _default(scheme: str, method: str, activations: str | None) -> Rule:
    """The rule for what no other mentions."""
    return Rule("*", _scheme(scheme), method, activations=_activations(activations))


def _rule(entry: object, method: str, activations: str | None, where: str) -> Rule:
    """One table of the file. RecipeError for a key that is unknown, missing or of the wrong kind."""
    kinds = {"match": str, "scheme": str, "method": str, "options": dict, "activations": str}
    _known_keys(entry, set(kinds), where)
    assert isinstance(entry, dict)  # as _known_keys has made sure
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            raise RecipeError(f"{key} is {entry[key]!r}, not a {kind.__name__}", where=where)
    if "match" not in entry or "scheme" not in entry:
        raise RecipeError("a rule needs match and scheme", where=where)
    return Rule(
        entry["match"], _scheme(entry["scheme"]), entry.get("method", method), entry.get("options", {}),
        _activations(entry.get("activations", activations)),
    )  # fmt: skip


def _scheme(text: str) -> Scheme | None:
    return None if text == KEEP else Scheme.parse(text)


def _activations(text: str | None) -> Scheme | None:
    return None if text in (None, KEEP) else Scheme.parse(str(text))


def _known_keys(found: object, known: set[str], where: str) -> None:
    if not isinstance(found, dict):
        raise RecipeError("a rule is a table", where=where)
    for key in found:
        if key not in known:
            raise RecipeError(f"unknown key {key!r}", where=where, remedy=f"known: {', '.join(sorted(known))}")
