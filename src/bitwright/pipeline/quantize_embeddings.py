"""Quantize the embedding and the output head, for formats that hold them quantized (GGUF).

An untied embedding is rounded before all blocks where a method compares with the float model: the blocks then correct its
errors too. It is rounded once more, to the same codes, for the last shard. A tied one must wait: the head's inputs are
known only behind the last block.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.calibration.embedding_statistics import TOKENS, observe_embedding, observe_head, summed_up
from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.windows import Drawn
from bitwright.methods import ASYMMETRIC, BLOCKWISE, CALIBRATED
from bitwright.models.skeleton import TOKENS_PER_BATCH, batches
from bitwright.numerics.codec import decode
from bitwright.pipeline.calibration_pass import HiddenStates, own_share, read_block
from bitwright.pipeline.quantize_together import Origin, Rounded, quantize_together
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.run_plan import Plan
from bitwright.transforms.output_temperature import with_output_temperature


def begin_with_quantized_embedding(plan: Plan, states: HiddenStates, tokens: Drawn) -> None:
    """Begin the calibration pass with the quantized embedding, where it is not tied to the head.

    Only for methods that compare with the float model: others lose by it (measured), since they cannot correct its errors.
    """
    skeleton = plan.skeleton
    name = skeleton.embedding_name
    t = next((t for t in _ends(plan) if _name(t) == name), None)
    if t is None or not skeleton.predicts or not plan.calibrates_embeddings or states.original is None:
        return
    if name == skeleton.head_name:
        return
    weights = read_block(plan, len(skeleton))
    base = {parameter: weights[parameter] for parameter in skeleton.outer_names(base_only=True) if parameter in weights}
    inputs = _looked_up(plan, base, tokens.seen)
    skeleton.load(base | {t.parameter: decode(_rounded(plan, t, weights, inputs).q)})
    own = own_share(tokens)
    for stream, ids in ((states.given, own.seen), (states.held, own.held_out)):
        stream[:] = [skeleton.embed(part) for part in batches(ids, TOKENS_PER_BATCH) if len(part)]
    skeleton.unload_outside()


def quantize_embedding_and_head(
    plan: Plan, weights: dict[str, Tensor], states: HiddenStates | None, tokens: Drawn | None
) -> list[Rounded]:
    """Quantize the embedding and the output head, where the format holds them quantized; with an output temperature, the last
    norm in `weights` is replaced.

    Without hidden states (one-shot, or no calibration) nothing is known of the head's inputs, and its scales are searched; so
    are those of an encoder's embedding, behind which a norm comes before the first block.
    """
    known: dict[str, Inputs] = {}
    if plan.calibrates_embeddings and tokens is not None and plan.skeleton.predicts:
        known = observe_ends(plan, weights, states, tokens.seen)
    done = [_rounded(plan, t, weights, known.get(_name(t), Inputs())) for t in _ends(plan)]
    budget = plan.recipe.temper
    if budget is not None and states is not None and states.original is not None and tokens is not None:
        decoded = {r.planned.parameter: decode(r.q) for r in done}
        weights |= with_output_temperature(
            plan.skeleton, weights, decoded, (states.given, states.original), own_share(tokens).seen, budget
        )
    return done


def _ends(plan: Plan) -> list[PlannedTensor]:
    """The embedding and the head, where they are quantized."""
    return [t for t in plan.shard(len(plan.skeleton)) if t.layer is not None]


def _name(t: PlannedTensor) -> str:
    """The module's name."""
    assert t.layer is not None
    return t.layer.name


def observe_ends(
    plan: Plan, weights: dict[str, Tensor], states: HiddenStates | None, tokens: Tensor
) -> dict[str, Inputs]:
    """Statistics for the embedding and the head, by module name: see calibration/embedding_statistics.py."""
    skeleton = plan.skeleton
    embedding, head = skeleton.embedding_name, skeleton.head_name
    found = {}
    if states is not None:
        skeleton.load(weights)
        found[head] = observe_head(skeleton, states.given)
        skeleton.unload_outside()
    looked_up = _looked_up(plan, weights, tokens)
    found[embedding] = summed_up(found[head], looked_up) if head == embedding and head in found else looked_up
    return found


def _looked_up(plan: Plan, weights: dict[str, Tensor], tokens: Tensor) -> Inputs:
    """The embedding's statistics, from the float model's first block."""
    skeleton = plan.skeleton
    skeleton.load(weights)
    some = tokens[: -(-TOKENS // tokens.shape[1])]
    hidden = [skeleton.embed(part) for part in batches(some, TOKENS_PER_BATCH)]
    skeleton.unload_outside()
    skeleton.load(read_block(plan, 0))
    inputs = observe_embedding(skeleton, hidden)
    skeleton.unload(0)
    return inputs


def _rounded(plan: Plan, t: PlannedTensor, weights: dict[str, Tensor], inputs: Inputs) -> Rounded:
    """Quantize by the rule's method if the statistics suffice for it, else by GPTQ or a search of scales."""
    assert t.rule is not None
    method = t.rule.method
    if method in CALIBRATED or method in ASYMMETRIC or method in BLOCKWISE:
        method = "search" if inputs.gram is None else "gptq"
    options = t.rule.options if method == t.rule.method else {}
    rule = replace(t.rule, method=method, options=options, transforms=())
    with torch.no_grad():
        return quantize_together(plan, [replace(t, rule=rule)], weights, inputs, Origin("sequential"))[0]
