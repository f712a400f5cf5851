"""Recipes: what to do with each matrix, as rules from a name pattern to scheme, transforms, method and options.

The last rule whose pattern matches a module's name wins, as in .gitignore. An unknown key, and a pattern that matches nothing,
are errors. In TOML:

    [[rule]]
    match = "*"                    # fnmatch pattern on module names; for GGUF on llama.cpp's tensor names too
    scheme = "int4-g128"           # or "keep": leave it in float, on purpose
    method = "gptq"                # optional, as all below; the command line's otherwise
    options = { sweeps = 4 }       # keywords of the method
    transforms = ["awq"]           # before rounding; with options: [{ name = "outlier", fraction = 0.01 }]
    activations = "int8-token"     # the layer's inputs are rounded too: as they come, or (int8-tensor) to a fixed range
    observer = "mse"               # how that fixed range is chosen
    prune = "wanda:0.5"            # first set weights to zero, for good: METHOD:SHARE or METHOD:N:M; or "none"

`scheme` may be one of llama.cpp's mixes, such as q4_k_m. Above the rules may stand
kv_cache = "fp8-tensor"  (what the KV cache is quantized to),
pure = true              (GGUF: a mix such as q2_k stands for its block type in all tensors), and
temper = 0.05            (GGUF: an output temperature for up to 5 % more KL: see transforms/output_temperature.py).
"""

import inspect
import re
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
from bitwright.sparsity.pruning import Pruning
from bitwright.transforms import NAMES, TRANSFORMS, Awq, Outlier, Rotate, Smooth, Transform, split_method

KEEP = "keep"
HEAD, EMBEDDING = "output.weight", "token_embd.weight"  # llama.cpp's names
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
# Types that llama-quantize rounds to nearest without an importance matrix; the first of them even with one.
QUICK = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
SUPPLIED = ("drift", "residual", "pruned")  # keywords of methods that the pipeline fills in


@dataclass(frozen=True)
class Rule:
    """One rule of a recipe. scheme None: keep in float, in the type that `mix` names if it names one.

    RecipeError for parts that do not fit together.
    """

    match: str
    scheme: Scheme | None
    method: str = "gptq"
    options: dict[str, Any] = field(default_factory=dict)
    activations: Scheme | None = None
    transforms: tuple[Transform, ...] = ()
    observer: str = "mse"
    mix: str = ""  # llama.cpp's mix, if the scheme's text names one; `scheme` is then that of most tensors
    exact: bool = False  # `mix` is a block type (or float type), for every tensor that matches
    regex: bool = False  # `match` is a regular expression, found anywhere in llama.cpp's name of a tensor
    prune: Pruning | None = None

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
            raise RecipeError(message, remedy="give --scheme int8-channel, or --activations for this one")
        if self.activations is not None and self.activations.group not in (TOKEN, TENSOR):
            message = f"activations are rounded token by token or as a whole tensor, not as {self.activations}"
            raise RecipeError(message, remedy="give int8-token, fp8-token or int8-tensor")
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
        elif self.prune is not None:
            raise RecipeError("matrices that stay in float are not pruned", remedy="give a scheme, or leave out prune")

    def _check_transforms(self) -> None:
        kinds = [type(transform) for transform in self.transforms]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise RecipeError(f"{NAMES[kind]} twice on one matrix", remedy="name each transform once")
        if Rotate in kinds[1:] or Outlier in kinds[:-1]:
            order = "rotate comes before all other transforms, outlier behind them"
            raise RecipeError(order, remedy='transforms = ["rotate", "awq", "outlier"]')
        if Smooth in kinds and self.activations is None and self.scheme is not None:
            message = "smooth makes inputs easier to round, and this rule does not round them"
            raise RecipeError(message, remedy="give --activations int8-token; for weights alone use awq")
        if self.prune is not None and Outlier in kinds:
            message = "outlier channels stay in float, and cannot be pruned"
            raise RecipeError(message, remedy="leave out outlier, or prune")

    def transform(self, kind: type[Transform]) -> Transform | None:
        """The rule's transform of that kind, if it has one."""
        return next((t for t in self.transforms if isinstance(t, kind)), None)

    @property
    def static(self) -> bool:
        """Whether inputs are rounded to a static range, fixed by calibration."""
        return self.activations is not None and self.activations.group == TENSOR

    @property
    def scales_channels(self) -> bool:
        """Whether it has a transform that folds channel scales into a norm or another matrix."""
        return any(isinstance(t, Awq | Smooth) for t in self.transforms)

    @property
    def needs_details(self) -> bool:
        """Whether it needs more of an input than its Gram: ranges, a sample, a histogram."""
        return self.static or any(not isinstance(t, Rotate) for t in self.transforms)

    @property
    def needs_calibration(self) -> bool:
        """Whether it uses statistics of the inputs."""
        weighted = self.method == "search" and self.options.get("objective", "weighted") == "weighted"
        pruned = self.prune is not None and self.prune.needs_calibration
        return self.needs_details or self.method in CALIBRATED or weighted or pruned

    @property
    def name(self) -> str:
        """The method with its transforms and what is pruned: "awq+wanda:0.5+gptq"."""
        pruned = [] if self.prune is None else [str(self.prune)]
        return "+".join([*(NAMES[type(t)] for t in self.transforms), *pruned, self.method])

    def describe(self) -> dict[str, Any]:
        """The rule as plain data, for manifests."""
        return {
            "match": self.match,
            "scheme": str(self.scheme or self.mix.lower() or KEEP),
            "method": self.method,
            "options": self.options,
            "activations": None if self.activations is None else str(self.activations),
            "transforms": [{"name": NAMES[type(t)], **asdict(t)} for t in self.transforms],
            "observer": self.observer,
            "mix": self.mix,
            **({"exact": True, "regex": self.regex} if self.exact else {}),
            "prune": None if self.prune is None else str(self.prune),
        }


@dataclass(frozen=True)
class Recipe:
    """Rules, of which the last that matches a module wins, and options of the whole model."""

    rules: tuple[Rule, ...]
    kv_cache: Scheme | None = None
    kv_observer: str = "minmax"  # no clipping: a clipped key changes which token is attended to
    pure: bool = False  # mixes stand for their block type in all tensors
    temper: float | None = None  # budget of KL for an output temperature, a share; None: no output temperature
    made_for: str = ""  # hash of the names and shapes that a plan was made for; "": for any model

    def __post_init__(self) -> None:
        if self.temper is not None and not 0 <= self.temper <= 1:
            raise RecipeError(f"temper {self.temper} is not between 0 and 1", remedy="temper = 0.05")
        if self.temper is not None and not self.needs_original:
            remedy = "use --method gptaq, or leave temper out of the recipe"
            raise RecipeError("temper compares with what the float model predicts", where="temper", remedy=remedy)
        if self.kv_cache is not None:
            check_kv(self.kv_cache)
        rotations = {rule.transform(Rotate) for rule in self.active}
        if len(rotations) > 1:
            message = "a rotation is of the whole model, and some rules have another one, or none"
            raise RecipeError(message, remedy='give every rule the same: transforms = ["rotate"]')

    @property
    def active(self) -> list[Rule]:
        """The rules that quantize."""
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
        """One rule for every matrix."""
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
        prune: str | None = None,
    ) -> "Recipe":
        """The file's recipe, with defaults for what its rules leave out; without a file, one rule for every matrix."""
        content = {"kv_cache": kv_cache, "pure": pure} | ({} if file is None else _content(file))
        defaults = _Defaults(method, activations, observer, prune)
        return cls._of(content, scheme, defaults, str(file or ""))

    @classmethod
    def of_text(cls, text: str, *, scheme: str, method: str) -> "Recipe":
        """The recipe that a TOML text says, as `of` reads it from a file."""
        return cls._of(_checked(tomllib.loads(text), ""), scheme, _Defaults(method, None, "mse", None), "")

    @classmethod
    def _of(cls, content: Mapping[str, Any], scheme: str, defaults: "_Defaults", where: str) -> "Recipe":
        rules = [_rule({"match": "*", "scheme": scheme}, defaults, "")]
        rules += [_rule(entry, defaults, where) for entry in content.get("rule", [])]
        kv = content.get("kv_cache")
        return cls(
            tuple(rules),
            None if kv in (None, KEEP) else Scheme.parse(str(kv)),
            pure=bool(content.get("pure", False)),
            temper=content.get("temper"),
            made_for=content.get("made_for", ""),
        )

    def without_text(self, *, weighted: bool = False) -> "Recipe":
        """The same recipe where there is no calibration text: scales are searched by importance if `weighted`, else by plain
        squared error.

        A quick search of two steps for types that llama-quantize rounds to nearest: it gains all but 3 % of what eight gain.
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
        """The rule of each module. modules: name -> what its file or llama.cpp calls it, or ""; a pattern may mean either.

        Where llama.cpp has no output.weight, that name means the embedding, which is the head too.
        RecipeError if a rule's pattern matches no module at all.
        """
        tied = HEAD not in modules.values()
        called = {name: _names(name, other, tied=tied) for name, other in modules.items()}
        for rule in self.rules:
            if not any(_means(rule, names) for names in called.values()):
                named = [other for other in modules.values() if other]
                some = named[:4] if rule.exact else [*list(modules)[:3], *named[:1]]
                raise RecipeError(
                    f"pattern {rule.match!r} matches nothing", remedy=f"names look like {', '.join(some)}"
                )
        last_first = list(reversed(self.rules))
        return {name: next(r for r in last_first if _means(r, names)) for name, names in called.items()}

    @property
    def needs_calibration(self) -> bool:
        """Whether any rule uses statistics of the inputs, or the KV cache needs its ranges."""
        return self.kv_cache is not None or any(rule.needs_calibration for rule in self.active)

    @property
    def needs_details(self) -> bool:
        """Whether any rule needs more of an input than its Gram."""
        return any(rule.needs_details for rule in self.active)

    @property
    def needs_folds(self) -> bool:
        """Whether any rule scales channels."""
        return any(rule.scales_channels for rule in self.active)

    @property
    def needs_original(self) -> bool:
        """Whether any rule's method compares with the float model's activations."""
        return any(rule.method in ASYMMETRIC for rule in self.active)

    @property
    def file_type(self) -> int | None:
        """llama.cpp's file type number, if all rules that quantize name one mix that has a number."""
        mixes = {rule.mix for rule in self.rules if not rule.exact and (rule.scheme is not None or rule.mix)}
        return FILE_TYPES.get(mixes.pop()) if len(mixes) == 1 else None

    @property
    def rotation(self) -> Rotate | None:
        """The whole model's rotation, if there is one."""
        found = [rule.transform(Rotate) for rule in self.active]
        return next((t for t in found if isinstance(t, Rotate)), None)

    @property
    def windows_at_once(self) -> int | None:
        """Calibration windows in one step of a method that tunes whole blocks (AutoRound); None without one.

        RecipeError if rules have different options for it.
        """
        rules = [rule for rule in self.active if rule.method in BLOCKWISE]
        if any(rule.options != rules[0].options for rule in rules):
            raise RecipeError(
                "rules tune blocks with different options", remedy="give all autoround rules the same options"
            )
        return Options.of(rules[0].options).windows if rules else None


def _names(module: str, other: str, *, tied: bool) -> tuple[str, ...]:
    """What a pattern may call a module: its name, llama.cpp's name of its weight with and without the ending."""
    names = [module, *((other, other.removesuffix(".weight")) if other else ())]
    return (*names, HEAD, HEAD.removesuffix(".weight")) if tied and other == EMBEDDING else tuple(names)


def _means(rule: Rule, names: tuple[str, ...]) -> bool:
    """Whether a rule's pattern matches a module of these names; a regular expression is one of llama.cpp's name alone."""
    if rule.regex:
        return len(names) > 1 and re.search(rule.match, names[1]) is not None
    return any(fnmatchcase(name, rule.match) for name in names)


@dataclass(frozen=True)
class _Defaults:
    """The command line's choices, for keys that a rule leaves out."""

    method: str
    activations: str | None
    observer: str
    prune: str | None


def _content(file: Path) -> dict[str, Any]:
    """A recipe file as plain data. RecipeError if it is not one."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError("no such recipe", where=str(file), remedy="give a TOML file of [[rule]] tables") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        remedy = "mend it, or leave out --recipe"
        raise RecipeError(f"not a TOML file: {error}", where=str(file), remedy=remedy) from error
    return _checked(content, str(file))


def _checked(content: dict[str, Any], where: str) -> dict[str, Any]:
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


def _rule(entry: object, defaults: _Defaults, where: str) -> Rule:
    """One table of the file. RecipeError for a key that is unknown, missing or of the wrong kind."""
    kinds = {
        "match": str,
        "scheme": str,
        "method": str,
        "options": dict,
        "activations": str,
        "transforms": list,
        "observer": str,
        "prune": str,
    }
    _known_keys(entry, set(kinds), where)
    assert isinstance(entry, dict)  # see _known_keys
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            remedy = f"such as {EXAMPLES[key]}"
            raise RecipeError(f"{key} is {entry[key]!r}, not a {kind.__name__}", where=where, remedy=remedy)
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
