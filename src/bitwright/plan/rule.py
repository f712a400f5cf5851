"""One rule of a recipe: a pattern of names, and what becomes of the matrices that it matches. A rule that exists is sound."""

import inspect
from dataclasses import asdict, dataclass, field
from typing import Any

from bitwright.calibration.ranges import RANGES
from bitwright.errors import RecipeError, one_of
from bitwright.methods import CALIBRATED, METHODS, check_serves
from bitwright.numerics.scheme import TENSOR, TOKEN, Scheme
from bitwright.sparsity.pruning import Pruning
from bitwright.transforms import NAMES, Awq, Outlier, Rotate, Smooth, Transform

KEEP = "keep"
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
