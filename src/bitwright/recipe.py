"""What to do with each matrix: pattern -> scheme, method, options. An unknown key or an unmatched pattern is an error.

A recipe is a list of rules; the last rule whose pattern matches a module's name wins, as in .gitignore. In TOML:

    [[rule]]
    match = "*"                    # fnmatch pattern on module names
    scheme = "int4-g128"           # or "keep": leave it in float, on purpose
    method = "gptq"                # optional; the command line's otherwise
    options = { sweeps = 4 }       # optional; keywords of the method
"""

import inspect
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.errors import RecipeError
from bitwright.methods import CALIBRATED, METHODS
from bitwright.scheme import Scheme

KEEP = "keep"


@dataclass(frozen=True)
class Rule:
    """One line of a recipe. scheme None: keep in float."""

    match: str
    scheme: Scheme | None
    method: str = "gptq"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(
                f"unknown method {self.method!r}", where=self.match, remedy=f"one of {', '.join(METHODS)}"
            )
        parameters = inspect.signature(METHODS[self.method]).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        for name in self.options:
            if name not in known:
                remedy = f"its options: {', '.join(known) or 'none'}"
                raise RecipeError(f"method {self.method} has no option {name!r}", where=self.match, remedy=remedy)

    def describe(self) -> dict[str, Any]:
        """Plain data: what a manifest stores and compares."""
        scheme = KEEP if self.scheme is None else str(self.scheme)
        return {"match": self.match, "scheme": scheme, "method": self.method, "options": self.options}


@dataclass(frozen=True)
class Recipe:
    """Rules, later ones first in force."""

    rules: tuple[Rule, ...]

    @classmethod
    def uniform(cls, scheme: str, method: str) -> "Recipe":
        """Every matrix of every block alike."""
        return cls((Rule("*", _scheme(scheme), method),))

    @classmethod
    def load(cls, file: Path, *, scheme: str, method: str) -> "Recipe":
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
        return cls((Rule("*", _scheme(scheme), method), *(_rule(entry, method, str(file)) for entry in entries)))

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


def _rule(entry: object, method: str, where: str) -> Rule:
    """One table of the file. RecipeError for a key that is unknown, missing or of the wrong kind."""
    kinds = {"match": str, "scheme": str, "method": str, "options": dict}
    _known_keys(entry, set(kinds), where)
    assert isinstance(entry, dict)  # as _known_keys has made sure
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            raise RecipeError(f"{key} is {entry[key]!r}, not a {kind.__name__}", where=where)
    if "match" not in entry or "scheme" not in entry:
        raise RecipeError("a rule needs match and scheme", where=where)
    return Rule(entry["match"], _scheme(entry["scheme"]), entry.get("method", method), entry.get("options", {}))


def _scheme(text: str) -> Scheme | None:
    return None if text == KEEP else Scheme.parse(text)


def _known_keys(found: object, known: set[str], where: str) -> None:
    if not isinstance(found, dict):
        raise RecipeError("a rule is a table", where=where)
    for key in found:
        if key not in known:
            raise RecipeError(f"unknown key {key!r}", where=where, remedy=f"known: {', '.join(sorted(known))}")
