"""A model in memory whose matrices may be put in any of several schemes, each quantized once; and its KL on a text.

So what an allocation costs is measured in one forward, without a file. Matrices are rounded on the float model's Grams, as
plans score them, but whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.windows import Drawn
from bitwright.files.checkpoint import write_shard
from bitwright.models.layers import matrix_of
from bitwright.models.streamed import LOGITS_AT_ONCE
from bitwright.numerics.codec import decode
from bitwright.pipeline.calibration_pass import first_hidden_states, observe_block, read_block, read_lent
from bitwright.pipeline.quantize_embeddings import observe_ends
from bitwright.pipeline.quantize_matrix import quantize_matrix
from bitwright.pipeline.scores import Layers, layers_of
from bitwright.plan.run_plan import Plan
from bitwright.plan.units import Unit

Decoded = Mapping[tuple[str, str], Tensor]  # (module, scheme) -> its weight after rounding, as the model holds it


def decoded(plan: Plan, units: Sequence[Unit], tokens: Tensor, folder: Path) -> Decoded:
    """Every matrix in every scheme that its unit may have, from files in `folder`, made if they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    depth = len(plan.skeleton) + plan.format.embeddings
    files = [folder / f"decoded-{index:05d}.safetensors" for index in range(depth)]
    if not all(file.is_file() for file in files):
        for file, shard in zip(files, _shards(plan, layers_of(units), tokens), strict=True):
            write_shard(file, shard)
    mapped = {key: tensor for file in files for key, tensor in load_file(file).items()}
    return {(module, scheme): tensor for key, tensor in mapped.items() for module, scheme in [key.split()]}


@torch.no_grad()
def _shards(plan: Plan, layers: Layers, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
    """The decoded matrices, block by block; then those outside the blocks."""
    skeleton = plan.skeleton
    states = first_hidden_states(plan, Drawn(tokens, tokens[:0]), None)
    for index in range(len(skeleton)):
        weights = read_block(plan, index)
        skeleton.load(weights | read_lent(plan, index))
        members = {t.layer.name: t for t in plan.shard(index) if t.layer is not None}
        seen = observe_block(plan, index, members, states.given, everything=False).inputs
        known = {name: inputs for inputs in seen for name in inputs.names if name in members}
        yield _rounded(plan, layers, {name: weights[members[name].parameter] for name in known}, known)
        states.given = [skeleton.run(index, batch) for batch in states.given]
        skeleton.unload(index)
    if plan.format.embeddings:
        weights = read_block(plan, len(skeleton))
        known = observe_ends(plan, weights, states, tokens)
        ends = {t.layer.name: weights[t.parameter] for t in plan.shard(len(skeleton)) if t.layer is not None}
        yield _rounded(plan, layers, ends, known)


def _rounded(
    plan: Plan, layers: Layers, weights: Mapping[str, Tensor], known: Mapping[str, Inputs]
) -> dict[str, Tensor]:
    found = {}
    for name, weight in weights.items():
        module = plan.skeleton.model.get_submodule(name)
        for scheme, t in layers[name].items():
            inputs = known.get(name, Inputs())
            q = quantize_matrix(plan.skeleton.dtype, t, matrix_of(module, weight), inputs).outcome.q
            found[f"{name} {scheme}"] = matrix_of(module, decode(q))
    return found


class Rounded:
    """A model in float32 that takes its matrices from `decoded`."""

    def __init__(self, folder: Path, of: Decoded) -> None:
        self.model, self.of = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), of
        self.float = {name: self.model.get_submodule(name).weight.data for name, _ in of}

    def put(self, schemes: Mapping[str, str]) -> None:
        """Give each module named its scheme, and all others their float weights."""
        for name, weight in self.float.items():
            given = self.of[name, schemes[name]] if name in schemes else weight
            self.model.get_submodule(name).weight.data = given

    @torch.no_grad()
    def log_p(self, ids: Tensor) -> Tensor:
        """Log-probabilities of the next token at all positions but the last of windows [W, T]: [W, T − 1, V]."""
        logits: Tensor = self.model(ids, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1)


class Text:
    """Windows of tokens [W, T] with the float model's predictions of them, and the KL of a rounded model."""

    def __init__(self, model: Rounded, ids: Tensor) -> None:
        model.put({})
        self.model, self.ids = model, ids
        self.at_once = max(1, LOGITS_AT_ONCE // (ids.shape[1] * model.model.config.vocab_size))
        self.expected = [model.log_p(window[None])[0] for window in ids]

    @torch.no_grad()
    def kl(self, schemes: Mapping[str, str], windows: Sequence[int] | None = None) -> list[float]:
        """KL(float ‖ rounded) of each window, or of each that is named, nats a token."""
        self.model.put(schemes)
        found: list[float] = []
        for some in torch.tensor(range(len(self.ids)) if windows is None else windows).split(self.at_once):
            log_q = self.model.log_p(self.ids[some])
            for at, log in zip(some.tolist(), log_q, strict=True):
                kl = torch.nn.functional.kl_div(log, self.expected[at], reduction="none", log_target=True).sum(-1)
                found.append(float(kl.double().mean()))
        return found
