"""GPTQ files of AutoGPTQ and GPTQModel: version 1 and 2, `dynamic`, groups, zero points, quantize_config.json alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright import load
from bitwright.errors import CheckpointError, FormatError
from bitwright.formats.gptq import Gptq
from peers import Stored, assert_same_logits, blocks_only, gptq, stored, transformers_logits, words

V1 = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
V2 = V1 | {"checkpoint_format": "gptq_v2"}


DYNAMIC = {
    r"-:.*\.k_proj": {}, r"+:.*layers\.0\.mlp\.(up|gate)_proj": {"bits": 8, "group_size": 64},
    r".*\.down_proj$": {"bits": 2, "group_size": -1, "sym": True}, r".*": {},
}  # fmt: skip


def by_dynamic(module: str, w: Tensor) -> Stored | None:
    """As those words say."""
    if not module.endswith("_proj") or module.endswith("k_proj"):
        return None
    if module.endswith(("layers.0.mlp.up_proj", "layers.0.mlp.gate_proj")):
        return gptq(w, 8, 64)
    return gptq(w, 2, -1, sym=True) if module.endswith("down_proj") else gptq(w)


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "v1": (V1 | {"checkpoint_format": "gptq"}, blocks_only(gptq)),
    "v2": (V2, blocks_only(lambda w: gptq(w, v=2))),
    "v2, 3 bits": (V2 | {"bits": 3}, blocks_only(lambda w: gptq(w, 3, v=2))),
    "8 bits, a row, sym": (V1 | {"bits": 8, "group_size": -1, "sym": True}, blocks_only(lambda w: gptq(w, 8, -1, sym=True))),
    "dynamic": (V1 | {"dynamic": DYNAMIC}, by_dynamic),
    "no g_idx": (V1, blocks_only(lambda w: gptq(w, g_idx=False))),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_weights_meant(kind: str, llama: Path, tmp_path: Path) -> None:
    theirs, meant = stored(llama, tmp_path, *KINDS[kind])
    assert_same_logits(theirs, transformers_logits(meant))


def test_what_autogptq_wrote_before_config_json_said_it(llama: Path, tmp_path: Path) -> None:
    """quantize_config.json alone, the weights' own name, biases of zero where the model has none."""

    def pack(w: Tensor) -> Stored:
        tensors, w = gptq(w)
        return tensors | {"bias": torch.zeros(len(w)).half()}, w

    theirs, meant = stored(llama, tmp_path, None, blocks_only(pack))
    (theirs / "model.safetensors").rename(theirs / "gptq_model-4bit-32g.safetensors")
    said = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "model_file_base_name": "gptq_model-4bit-32g"}
    (theirs / "quantize_config.json").write_text(json.dumps(said))
    assert_same_logits(theirs, transformers_logits(meant))
    (theirs / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither config\.json nor quantize_config\.json says how"):
        load(theirs)


def test_a_bias_that_the_model_lacks_is_no_zero_to_be_left(llama: Path, tmp_path: Path) -> None:
    theirs, _ = stored(llama, tmp_path, V1, blocks_only(lambda w: (gptq(w)[0] | {"bias": torch.ones(len(w))}, w)))
    with pytest.raises(CheckpointError, match=r"21 tensors, .*\.bias"):
        load(theirs)


def test_zero_points_of_0_borrow_of_their_neighbours_in_version_1() -> None:
    """GPTQModel subtracts 1 of every code in a word at once, and adds it so."""
    zero = torch.tensor([[0, 5, 9, 0, 15, 1, 0, 7]])
    word = words(zero, 4).long() - 0x11111111
    qzeros = ((word + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    tensors = {"qweight": torch.zeros(4, 8).int(), "qzeros": qzeros, "scales": torch.ones(1, 8).half()}
    w = Gptq().decode(V1, "m", tensors)
    assert torch.equal(-w, zero.T.float().expand(8, 32))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"checkpoint_format": "marlin"}, "marlin"), ({"checkpoint_format": "gptq_p"}, "gptq_p"), ({"bits": 5}, "5 bits"),
        ({"bits": None}, "how many bits"),
        ({"group_size": 0}, "groups of 0"), ({"pack_dtype": "int8"}, "int8"), ({"group_size": 64}, "not those of"),
        ({"dynamic": {r"-:.*": {}}}, "says that it is not"), ({"dynamic": {"+:(": {}}}, "no regular expression"),
        ({"desc_act": True}, "lacks the g_idx"), ({"bits": 8}, "not those of"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], word: str) -> None:
    tensors, _ = gptq(torch.randn(16, 128), g_idx=False)
    for read in (Gptq().decode, Gptq().quantized):
        with pytest.raises(FormatError, match=rf"^m: .*{word}"):
            read(V1 | config, "m", tensors)
