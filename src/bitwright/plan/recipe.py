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

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.errors import RecipeError
from bitwright.gguf.file_types import FILE_TYPES
from bitwright.methods import ASYMMETRIC, BLOCKWISE
from bitwright.methods.autoround import Options
from bitwright.models.kv_cache import check as check_kv
from bitwright.numerics.scheme import Scheme
from bitwright.plan.recipe_file import Defaults, checked, read_content, rule_of
from bitwright.plan.rule import KEEP, Rule
from bitwright.transforms import Rotate

HEAD, EMBEDDING = "output.weight", "token_embd.weight"  # llama.cpp's names
# Types that llama-quantize rounds to nearest without an importance matrix; the first of them even with one.
QUICK = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# Keys by which a rule says how its matrices and their inputs are treated.
TREATMENT = {"method", "transforms", "activations"}


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
        smooth: bool = False,
    ) -> "Recipe":
        """The file's recipe, with defaults for what its rules leave out; without a file, one rule for every matrix.

        smooth: whether inputs that are rounded are smoothed first (methods/smooth.py), if no rule of the file says how its
        matrices are to be treated: those that share an input must be smoothed together.
        """
        content = {"kv_cache": kv_cache, "pure": pure} | ({} if file is None else read_content(file))
        told = any(isinstance(rule, dict) and TREATMENT & rule.keys() for rule in content.get("rule", []))
        if smooth and activations not in (None, KEEP) and not told:
            method = f"smooth+{method}"
        defaults = Defaults(method, activations, observer, prune)
        return cls._of(content, scheme, defaults, str(file or ""))

    @classmethod
    def of_text(cls, text: str, *, scheme: str, method: str) -> "Recipe":
        """The recipe that a TOML text says, as `of` reads it from a file."""
        return cls._of(checked(tomllib.loads(text), ""), scheme, Defaults(method, None, "mse", None), "")

    @classmethod
    def _of(cls, content: Mapping[str, Any], scheme: str, defaults: Defaults, where: str) -> "Recipe":
        rules = [rule_of({"match": "*", "scheme": scheme}, defaults, "")]
        rules += [rule_of(entry, defaults, where) for entry in content.get("rule", [])]
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
                    f"pattern {rule.match!r} matches nothing",
                    remedy=f"names look like {', '.join(dict.fromkeys(some))}",
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
