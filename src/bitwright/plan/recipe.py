"""What to do with each matrix: pattern -> scheme, transforms, method, options. An unknown key or pattern is an error.

A recipe is a list of rules; the last rule whose pattern matches a module's name wins, as in .gitignore. In TOML:

    [[rule]]
    match = "*"                    # fnmatch pattern on module names; for GGUF on llama.cpp's tensor names too
    scheme = "int4-g128"           # or "keep": leave it in float, on purpose
    method = "gptq"                # optional, as all below; the command line's otherwise
    options = { sweeps = 4 }       # keywords of the method
    transforms = ["awq"]           # before rounding; with options: [{ name = "outlier", fraction = 0.01 }]
    activations = "int8-token"     # the layer's inputs are rounded too: as they come, or (int8-tensor) to a fixed range
    observer = "mse"               # how that fixed range is chosen

Above the rules may stand kv_cache = "fp8-tensor": what keys and values are kept in; and for GGUF pure = true: the name
of a mix of llama.cpp's, such as q2_k, stands for its block type everywhere. `scheme` may be such a mix: q4_k_m. Also
temper = 0.05: a factor on the last norm makes the calibration text likelier, for up to 5 % more KL (see output_temperature.py).
"""

import inspect
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.calibration.ranges import RANGES
from bitwright.errors import RecipeError, SchemeError, one_of
from bitwright.formats.ggml import TYPES
from bitwright.gguf.file_types import FILE_TYPES, FLOAT_TYPES, MIXES
from bitwright.methods import ASYMMETRIC, BLOCKWISE, CALIBRATED, METHODS, check_serves
from bitwright.methods.autoround import Options
from bitwright.models.kv_cache import check as check_kv
from bitwright.numerics.scheme import TENSOR, TOKEN, Scheme
from bitwright.transforms import NAMES, TRANSFORMS, Awq, Outlier, Rotate, Smooth, Transform, split_method

KEEP = "keep"
# What llama-quantize rounds to nearest where there is no importance; the first of them even where there is.
QUICK = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
SUPPLIED = ("drift", "residual", "pruned")  # keywords of methods that the pipeline fills in


@dataclass(frozen=True)
class Rule:
    """One line of a recipe. scheme None: keep in float, in the type that `mix` names if it names one."""

    match: str
    scheme: Scheme | None
    method: str = "gptq"
    options: dict[str, Any] = field(default_factory=dict)
    activations: Scheme | None = None
    transforms: tuple[Transform, ...] = ()
    observer: str = "mse"
    mix: str = ""  # of llama.cpp, where the scheme's text names one; `scheme` is what most tensors get

    def __post_init__(self) -> None:
        try:
            self._check_schemes()
            self._check_method()
            self._check_transforms()
        except RecipeError as error:
            error.where = error.where or self.match
            raise

    def _check_schemes(self) -> None:
        if self.scheme is not None and self.scheme.group == TOKEN:
            message = f"{self.scheme} is for activations: weights have no tokens"
            raise RecipeError(message, remedy="such as int8-channel")
        if self.activations is not None and self.activations.group not in (TOKEN, TENSOR):
            message = f"activations are rounded token by token or as a whole tensor, not as {self.activations}"
            raise RecipeError(message, remedy="such as int8-token, fp8-token or int8-tensor")
        if self.observer not in RANGES:
            raise RecipeError(f"unknown observer {self.observer!r}", remedy=one_of(self.observer, RANGES))

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"unknown method {self.method!r}", remedy=one_of(self.method, METHODS))
        parameters = inspect.signature(METHODS[self.method]).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in SUPPLIED]
        for name in self.options:
            if name not in known:
                remedy = f"its options: {', '.join(known) or 'none'}"
                raise RecipeError(f"method {self.method} has no option {name!r}", remedy=remedy)
        if self.scheme is not None:
            check_serves(self.method, self.scheme)

    def _check_transforms(self) -> None:
        kinds = [type(transform) for transform in self.transforms]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise RecipeError(f"{NAMES[kind]} twice on one matrix", remedy="name each transform once")
        if Rotate in kinds[1:] or Outlier in kinds[:-1]:
            order = "rotate comes before all other transforms, outlier behind them"
            raise RecipeError(order, remedy="such as rotate, awq, outlier")
        if Smooth in kinds and self.activations is None and self.scheme is not None:
            message = "smooth makes inputs easier to round, and this rule does not round them"
            raise RecipeError(message, remedy="give activations, such as int8-token; for weights alone, awq")

    def transform(self, kind: type[Transform]) -> Transform | None:
        """Its transform of that kind, if it has one."""
        return next((t for t in self.transforms if isinstance(t, kind)), None)

    @property
    def static(self) -> bool:
        """Whether inputs are rounded to a range that calibration fixes."""
        return self.activations is not None and self.activations.group == TENSOR

    @property
    def scales_channels(self) -> bool:
        """Whether it has a transform that needs a place to fold scales into."""
        return any(isinstance(t, Awq | Smooth) for t in self.transforms)

    @property
    def needs_details(self) -> bool:
        """Whether it asks for more of an input than its Gram: ranges, a sample, a histogram."""
        return self.static or any(not isinstance(t, Rotate) for t in self.transforms)

    @property
    def needs_calibration(self) -> bool:
        """Whether it cannot do without statistics of the inputs (or is better with them)."""
        weighted = self.method == "search" and self.options.get("objective", "weighted") == "weighted"
        return self.needs_details or self.method in CALIBRATED or weighted

    @property
    def name(self) -> str:
        """The method with what goes before it: "awq+gptq"."""
        return "+".join([*(NAMES[type(t)] for t in self.transforms), self.method])

    def describe(self) -> dict[str, Any]:
        """Plain data: what a manifest stores and compares."""
        return {
            "match": self.match, "scheme": str(self.scheme or self.mix.lower() or KEEP), "method": self.method,
            "options": self.options, "activations": None if self.activations is None else str(self.activations),
            "transforms": [{"name": NAMES[type(t)], **asdict(t)} for t in self.transforms], "observer": self.observer,
            "mix": self.mix,
        }  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Rules, later ones first in force."""

    rules: tuple[Rule, ...]
    kv_cache: Scheme | None = None
    kv_observer: str = "minmax"  # a key cut off is an attention lost
    pure: bool = False  # names of mixes stand for their one block type
    temper: float | None = None  # share of KL that likelihood of the calibration text may cost; None: nothing is done

    def __post_init__(self) -> None:
        if self.temper is not None and not 0 <= self.temper <= 1:
            raise RecipeError(f"temper {self.temper} is not between 0 and 1", remedy="such as 0.05")
        if self.temper is not None and not self.needs_original:
            remedy = "method gptaq or autoround"
            raise RecipeError("temper compares with what the float model predicts", where="temper", remedy=remedy)
        if self.kv_cache is not None:
            check_kv(self.kv_cache)
        rotations = {rule.transform(Rotate) for rule in self.active}
        if len(rotations) > 1:
            message = "a rotation takes in the whole model, and some rules have another one, or none"
            raise RecipeError(message, remedy="give every rule the same rotate")

    @property
    def active(self) -> list[Rule]:
        """Those that quantize."""
        return [rule for rule in self.rules if rule.scheme is not None]

    @classmethod
    def uniform(
        cls,
        scheme: str,
        method: str,
        activations: str | None = None,
        observer: str = "mse",
        kv_cache: str | None = None,
    ) -> "Recipe":
        """Every matrix of every block alike."""
        return cls.of(None, scheme=scheme, method=method, activations=activations, observer=observer, kv_cache=kv_cache)

    @classmethod
    def of(
        cls,
        file: Path | None,
        *,
        scheme: str,
        method: str,
        activations: str | None = None,
        observer: str = "mse",
        kv_cache: str | None = None,
        pure: bool = False,
    ) -> "Recipe":
        """A file's recipe on top of a default, if there is one, else the same for every matrix."""
        defaults = _Defaults(method, activations, observer)
        content = {} if file is None else _content(file)
        rules = [_rule({"match": "*", "scheme": scheme}, defaults, "")]
        rules += [_rule(entry, defaults, str(file)) for entry in content.get("rule", [])]
        kv = content.get("kv_cache", kv_cache)
        cache = None if kv in (None, KEEP) else Scheme.parse(str(kv))
        return cls(tuple(rules), cache, pure=bool(content.get("pure", pure)), temper=content.get("temper"))

    def without_text(self, *, weighted: bool = False) -> "Recipe":
        """The same where there is no calibration text: scales are searched by the plain squared error, if not by importance.

        In two steps for types that llama-quantize rounds to nearest then: they find all but 3 % of what eight find.
        """
        plain, quick = ({}, QUICK[:1]) if weighted else ({"objective": "mse"}, QUICK)
        rules = [
            replace(rule, options=plain | ({"steps": 2} if rule.mix in quick else {}) | rule.options)
            if rule.method == "search"
            else rule
            for rule in self.rules
        ]
        return replace(self, rules=tuple(rules))

    def assign(self, modules: Mapping[str, str]) -> dict[str, Rule]:
        """The rule in force for each module. modules: name -> the name of its weight in llama.cpp, or nothing; a pattern may
        mean either. RecipeError if a rule's pattern matches no module at all."""
        for rule in self.rules:
            if not any(_means(rule.match, name, other) for name, other in modules.items()):
                some = ", ".join([*list(modules)[:3], *(other for other in list(modules.values())[:1] if other)])
                raise RecipeError(f"pattern {rule.match!r} matches nothing", remedy=f"names look like {some}")
        last_first = list(reversed(self.rules))
        return {name: next(r for r in last_first if _means(r.match, name, other)) for name, other in modules.items()}

    @property
    def needs_calibration(self) -> bool:
        """Whether any rule needs statistics of the inputs, or the cache needs its ranges."""
        return self.kv_cache is not None or any(rule.needs_calibration for rule in self.active)

    @property
    def needs_details(self) -> bool:
        """Whether any rule asks for more of an input than its Gram."""
        return any(rule.needs_details for rule in self.active)

    @property
    def needs_folds(self) -> bool:
        """Whether any rule scales channels."""
        return any(rule.scales_channels for rule in self.active)

    @property
    def needs_original(self) -> bool:
        """Whether any rule's method looks at the float model's activations beside the quantized one's."""
        return any(rule.method in ASYMMETRIC for rule in self.active)

    @property
    def file_type(self) -> int | None:
        """llama.cpp's number of the mix, if all that is quantized is of one that has a number."""
        mixes = {rule.mix for rule in self.rules if rule.scheme is not None or rule.mix}
        return FILE_TYPES.get(mixes.pop()) if len(mixes) == 1 else None

    @property
    def rotation(self) -> Rotate | None:
        """The rotation of the whole model, if there is one."""
        found = [rule.transform(Rotate) for rule in self.active]
        return next((t for t in found if isinstance(t, Rotate)), None)

    @property
    def windows_at_once(self) -> int | None:
        """Calibration windows in one step of a method that tunes whole blocks; None if there is no such method.

        RecipeError if rules would tune the same block in different ways.
        """
        rules = [rule for rule in self.active if rule.method in BLOCKWISE]
        if any(rule.options != rules[0].options for rule in rules):
            raise RecipeError("rules tune blocks with different options", remedy="give all of them the same options")
        return Options.of(rules[0].options).windows if rules else None


def _means(pattern: str, module: str, other: str) -> bool:
    """Whether a pattern matches a module's name, or its weight's in llama.cpp with or without the ending."""
    return any(fnmatchcase(name, pattern) for name in (module, other, other.removesuffix(".weight")) if name)


@dataclass(frozen=True)
class _Defaults:
    """What a rule that does not say otherwise takes."""

    method: str
    activations: str | None
    observer: str


def _content(file: Path) -> dict[str, Any]:
    """A recipe file as plain data. RecipeError if it is not one."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError("no such recipe", where=str(file), remedy="give a TOML file of rules") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"not a TOML file: {error}", where=str(file)) from error
    _known_keys(content, {"rule", "kv_cache", "pure", "temper"}, str(file))
    if not isinstance(content.get("temper", 0.0), float):
        raise RecipeError(f"temper is {content['temper']!r}, not a fraction", where=str(file), remedy="such as 0.05")
    if not isinstance(content.get("rule", []), list):
        raise RecipeError("rule is not a list of tables", where=str(file), remedy="write [[rule]] above each rule")
    return content


def _rule(entry: object, defaults: _Defaults, where: str) -> Rule:
    """One table of the file. RecipeError for a key that is unknown, missing or of the wrong kind."""
    kinds = {
        "match": str, "scheme": str, "method": str, "options": dict, "activations": str, "transforms": list,
        "observer": str,
    }  # fmt: skip
    _known_keys(entry, set(kinds), where)
    assert isinstance(entry, dict)  # as _known_keys has made sure
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            raise RecipeError(f"{key} is {entry[key]!r}, not a {kind.__name__}", where=where)
    if "match" not in entry or "scheme" not in entry:
        raise RecipeError("a rule needs match and scheme", where=where)
    before, method = split_method(entry.get("method", defaults.method))
    transforms = [_transform(item, where) for item in [*before, *entry.get("transforms", [])]]
    activations = entry.get("activations", defaults.activations)
    name = entry["scheme"]
    mix = name.upper() if name.upper() in (*MIXES, *FLOAT_TYPES) else ""
    scheme = None if name == KEEP or mix in FLOAT_TYPES else TYPES[MIXES[mix]].scheme if mix else _parsed(name)
    return Rule(
        entry["match"],
        scheme,
        method,
        entry.get("options", {}),
        None if activations in (None, KEEP) else Scheme.parse(activations),
        tuple(transforms),
        entry.get("observer", defaults.observer),
        mix,
    )


def _parsed(name: str) -> Scheme:
    """The scheme that a text names. SchemeError with the mix that may have been meant."""
    try:
        return Scheme.parse(name)
    except SchemeError as error:
        near = get_close_matches(name.upper(), MIXES, 1, cutoff=0.7)
        error.remedy = f"did you mean {near[0].lower()}, for an OUT.gguf?" if near else error.remedy
        raise


def _transform(item: object, where: str) -> Transform:
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
        raise RecipeError(f"{name}: {error}", where=where) from error


def _parameters(kind: Callable[..., Transform]) -> Iterator[str]:
    return iter(inspect.signature(kind).parameters)


def _known_keys(found: object, known: set[str], where: str) -> None:
    if not isinstance(found, dict):
        raise RecipeError("a rule is a table", where=where)
    for key in found:
        if key not in known:
            raise RecipeError(f"unknown key {key!r}", where=where, remedy=one_of(key, sorted(known)))
