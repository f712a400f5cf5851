"""Channel scales (AWQ, SmoothQuant): chosen from statistics, folded into a block's norms and matrices before rounding.

Scales are chosen for one fold (see folds.py) after the other, in the order of the forward, from the statistics of the input
that its readers share; weights and statistics are then scaled together, so that no forward has to be run again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.calibration.input_statistics import Inputs, pooled
from bitwright.errors import RecipeError
from bitwright.methods.scaling import Candidates, Reader, Scaling
from bitwright.methods.smooth import reach_of
from bitwright.models.layers import matrix_of
from bitwright.numerics.scheme import Scheme
from bitwright.system import distributed
from bitwright.transforms import NAMES, Awq, Smooth, Transform
from bitwright.transforms.folds import Fold, applied


@dataclass(frozen=True)
class Target:
    """What a matrix will be rounded to, as far as channel scales depend on it.

    scheme       of the weights
    activations  of the inputs, if they are rounded
    searched     whether the method is better than round to nearest, with searched scales
    transforms   the rule's transforms before rounding
    """

    scheme: Scheme
    activations: Scheme | None
    searched: bool
    transforms: tuple[Transform, ...]


@dataclass(frozen=True)
class Transformed:
    """A block after its transforms: changed parameters by name; by matrix, what was done to it, as the ledger says it."""

    weights: dict[str, Tensor]
    done: dict[str, str]


def fold_scales(
    targets: Mapping[str, Target],
    weights: Mapping[str, Tensor],
    inputs: list[Inputs],
    folds: Sequence[Fold],
    modules: Mapping[str, nn.Module],
) -> Transformed:
    """Choose and fold channel scales as the readers' rules say.

    targets  of the matrices to be rounded, by module name
    weights  all parameters of the block, by name
    inputs   statistics of the block's inputs; scaled ones replace them in the list, since memory does not hold both
    modules  from `readers_of`
    RecipeError if matrices that share an input have different scaling transforms.
    """
    now, done = dict(weights), dict[str, list[str]]()
    for fold in folds:
        at = [
            i for i, one in enumerate(inputs) if set(one.names) & set(fold.readers)
        ]  # several: each expert has its own
        for transform in _scalings(fold, targets) if at else ():
            readers = [_reader(name, targets, now, modules) for name in fold.readers]
            found = _best(CANDIDATES[type(transform)](transform, readers, pooled([inputs[i] for i in at]), fold))
            changed, s = applied(fold, found.s, now, modules)
            now |= changed
            for i in at:
                inputs[i] = inputs[i].divided(s)
            for name in fold.readers:
                done.setdefault(name, []).append(f"{NAMES[type(transform)]} {found.exponent:g}")
    changed = {name: tensor for name, tensor in now.items() if tensor is not weights[name]}
    return Transformed(changed, {name: ", ".join(words) for name, words in done.items()})


def _best(candidates: Candidates) -> Scaling:
    """`Candidates.best` by all processes that work together: each tries its share of the candidates."""
    scalings, count = candidates.scalings, distributed.count()
    tried = distributed.everyone([candidates.loss(one.s) for one in scalings[distributed.rank() :: count]])
    losses = [tried[i % count][i // count] for i in range(len(scalings))]
    return scalings[losses.index(min(losses))]


def _scalings(fold: Fold, targets: Mapping[str, Target]) -> tuple[Transform, ...]:
    """The scaling transforms of a fold's readers; RecipeError if they differ."""
    asked = {
        name: tuple(t for t in targets[name].transforms if type(t) in CANDIDATES)
        for name in fold.readers
        if name in targets
    }
    if len(set(asked.values())) > 1:
        remedy = 'give them the same transforms, such as transforms = ["awq"]'
        message = f"matrices that share an input are to be scaled differently: {', '.join(asked)}"
        raise RecipeError(message, where=fold.producer, remedy=remedy)
    return next(iter(asked.values()), ())


def _reader(
    name: str, targets: Mapping[str, Target], weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> Reader:
    """The matrix `name` with what it will be rounded to."""
    w = matrix_of(modules[name], weights[f"{name}.weight"]).float()
    target = targets.get(name)
    return Reader(w, None) if target is None else Reader(w, target.scheme, target.activations, target.searched)


def _awq(transform: Transform, readers: list[Reader], inputs: Inputs, fold: Fold) -> Candidates:
    assert isinstance(transform, Awq) and inputs.gram is not None and inputs.mean is not None
    return transform.candidates(readers, inputs.gram, fold.tied(inputs.mean, "mean"))


def _smooth(transform: Transform, readers: list[Reader], inputs: Inputs, fold: Fold) -> Candidates:
    assert isinstance(transform, Smooth) and inputs.sample is not None
    assert inputs.low is not None and inputs.high is not None
    reach, peak = fold.tied(reach_of(readers), "amax"), fold.tied(inputs.peak, "amax")
    return transform.candidates(readers, inputs.sample, torch.stack([inputs.low, inputs.high]), reach, peak)


CANDIDATES: dict[type[Transform], Callable[[Transform, list[Reader], Inputs, Fold], Candidates]] = {
    Awq: _awq,
    Smooth: _smooth,
}
