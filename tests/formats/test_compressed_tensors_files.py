"""compressed-tensors files as llm-compressor writes them: made, and run, by the library itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peers import IDS, assert_same_logits

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
BLOCK = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [48, 32]}
KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def group(targets: list[str], weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"targets": targets, "weights": weights, "input_activations": inputs}


def dynamic(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": True, **more}


KINDS: dict[str, dict[str, Any]] = {
    "W4A16, a preset": {"W4A16": ["Linear"]},
    "by regular expression": {"a": group([r"re:.*self_attn\.[qv]_proj"], W4), "b": group([r"re:.*\.(k|o|up|gate)_proj$"], W8)},
    "names, expressions, classes": {
        "a": group(["Linear"], W4), "b": group([r"re:.*down_proj"], W8, dynamic(8, "int", "token")),
        "c": group(["model.layers.1.mlp.down_proj"], {**W4, "symmetric": False}),
    },
    "embeddings too": {"a": group(["Embedding"], W4), "b": group(["Linear"], W8)},
    "FP8_BLOCK": {"a": group(["Linear"], BLOCK, dynamic(8, "float", "group", group_size=32))},
    "FP8_DYNAMIC": {"FP8_DYNAMIC": ["Linear"]},
    "FP8": {"FP8": ["Linear"]},
    "MXFP8": {"MXFP8": ["Linear"]},
    "MXFP4": {"MXFP4": ["Linear"]},
    "NVFP4": {"NVFP4": ["Linear"]},
    "W4A8": {"a": group(["Linear"], W4, dynamic(8, "int", "token", symmetric=False))},
}  # fmt: skip


def parameters(module: nn.Module, scheme: Any, seen: Tensor) -> None:
    """Give one module the scales and zero points that the library's own rule makes of its weights and inputs [T, K]."""
    w, arguments = module.weight.detach(), scheme.weights
    outer = None
    if arguments.strategy == "tensor_group":
        outer = generate_gparam(w.min(), w.max())
        module.weight_global_scale.data.copy_(outer)
    views = {
        "channel": lambda: w, "tensor": lambda: w.reshape(1, -1),
        "group": lambda: w.unflatten(-1, (-1, arguments.group_size)),
        "tensor_group": lambda: w.unflatten(-1, (-1, arguments.group_size)),
        "block": lambda: padded(w, *arguments.block_structure),
    }  # fmt: skip
    view = views[arguments.strategy]()
    scale, zero = calculate_qparams(view.amin(-1), view.amax(-1), arguments, global_scale=outer)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.copy_(generate_gparam(seen.min(), seen.max()))
    if hasattr(module, "input_scale"):
        scale, _ = calculate_qparams(seen.min(), seen.max(), scheme.input_activations)
        module.input_scale.data.copy_(scale)


def padded(w: Tensor, rows: int, columns: int) -> Tensor:
    """[N, K] -> [N / rows, K / columns, rows · columns]."""
    w = nn.functional.pad(w, (0, -w.shape[1] % columns, 0, -w.shape[0] % rows))
    return w.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)


def seen_by(model: PreTrainedModel) -> dict[str, Tensor]:
    """The inputs of every linear module."""
    seen, hooks = dict[str, Tensor](), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]})))
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def run(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits.float()


def made(model: Path, out: Path, groups: dict[str, Any], **more: Any) -> Tensor:
    """Quantize a checkpoint with the library, and save it as llm-compressor does; the logits are what the library gives."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, tie_word_embeddings=False).eval()
    config = QuantizationConfig(config_groups=groups, **{"ignore": ["lm_head"], **more})
    seen = seen_by(theirs)
    apply_quantization_config(theirs, config, show_progress=False)
    for name, module in theirs.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None and scheme.weights is not None:
            parameters(module, scheme, seen.get(name, torch.zeros(1)))
    for module in theirs.modules():
        for scale in ("k_scale", "v_scale"):
            if hasattr(module, scale):
                getattr(module, scale).data.fill_(0.02)
        if hasattr(module, "quantization_status"):
            module.quantization_status = QuantizationStatus.FROZEN
    logits = run(theirs)
    formats = set()
    for module in theirs.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None and scheme.weights is not None:
            compress_module(module)
            formats.add(scheme.format)
    out.mkdir()
    config.format = formats.pop() if len(formats) == 1 else "mixed-precision"
    config.quantization_status = QuantizationStatus.COMPRESSED
    tensors = {name: t.detach().contiguous() for name, t in theirs.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(said | {"quantization_config": config.model_dump(mode="json")}))
    for file in model.glob("token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_library_s(kind: str, llama: Path, tmp_path: Path) -> None:
    groups = json.loads(json.dumps(KINDS[kind]).replace('"W4A16"', '"W4A16_ASYM"'))
    if "W4A16" in kind:  # a preset of groups of 128, which this model has not
        groups = {"group_0": group(["Linear"], {**W4, "symmetric": False})}
    assert_same_logits(tmp_path / "q", made(llama, tmp_path / "q", groups), 5e-3)
