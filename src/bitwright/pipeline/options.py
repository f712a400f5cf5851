"""What `bitwright quantize` can be asked for."""

from dataclasses import dataclass
from pathlib import Path

from bitwright.plan.recipe import Recipe
from bitwright.plan.tensor_types import NO_TYPES, TensorTypes


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The options of a run, beside its model and its result, with the defaults of the command line (docs/options.md).

    scheme, method, format   None: what the other two, and OUT's name, call for
    pure, types              of GGUF: one block type everywhere; block types of single tensors
    activations, observer    how inputs of layers are rounded, and how a fixed range for that is found
    kv_cache                 the scheme of keys and values
    prune                    which weights become zero first, such as "wanda:0.5"
    recipe                   a TOML file of rules for single layers
    size, bits               bytes such as "100MB", or bits a weight, that the result may take: the schemes are then chosen
    calib                    the text, or texts with shares; samples: windows of it; seqlen: tokens in one
    store                    a directory of statistics of the float model
    requantize               whether a source that is quantized already is taken; None: no, and there is no option to ask for it
    adapter                  of LoRA, added to the weights before they are rounded
    device                   where statistics are taken and weights rounded
    resume                   whether blocks of an interrupted run are kept
    distributed              whether all processes of torch.distributed do it together (system/distributed.py)
    """

    scheme: str | None = None
    method: str | None = None
    format: str | None = None
    pure: bool = False
    types: TensorTypes = NO_TYPES
    activations: str | None = None
    observer: str = "mse"
    kv_cache: str | None = None
    prune: str | None = None
    recipe: Path | None = None
    size: str | None = None
    bits: float | None = None
    calib: str = "general"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    store: Path | None = None
    requantize: bool | None = False
    adapter: Path | None = None
    device: str = "cpu"
    resume: bool = True
    distributed: bool = False

    @property
    def for_target(self) -> bool:
        """Whether schemes are chosen for a size, or bits."""
        return self.size is not None or self.bits is not None

    def rules(self, scheme: str, method: str) -> Recipe:
        """The recipe of a run that has no target; scheme, method: those that were chosen where the options leave them out."""
        return Recipe.of(
            self.recipe,
            scheme=scheme,
            method=method,
            activations=self.activations,
            observer=self.observer,
            kv_cache=self.kv_cache,
            pure=self.pure,
            prune=self.prune,
            smooth=self.method is None,
        )
