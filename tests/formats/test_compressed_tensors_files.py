"""compressed-tensors files as llm-compressor writes them: made, and run, by the library itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitwright import load
from bitwright.errors import BitwrightError, FormatError
from bitwright.formats.compressed_tensors import CompressedTensors
from bitwright.numerics.codec import decode
from bitwright.numerics.packing import pack
from peers import IDS, distance, ours

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
BLOCK = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [48, 32]}
KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def group(targets: list[str], weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"targets": targets, "weights": weights, "input_activations": inputs}


def dynamic(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": True, **more}


KINDS: dict[str, dict[str, Any]] = {
    "zero points": {"a": group(["Linear"], {**W4, "symmetric": False})},
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
    "keys and values": {"a": group(["Linear"], W8)},
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
    """On decoded weights exactly; on packed ones where inputs are rounded, up to the inputs that fall to the other side. Those
    of NVFP4, whose weights the library decodes to bfloat16, do so everywhere."""
    exact = made(llama, tmp_path / "q", KINDS[kind], kv_cache_scheme=KV if kind == "keys and values" else None)
    rounded = kind == "keys and values" or any(type(g) is list or g["input_activations"] for g in KINDS[kind].values())
    found = dict(ours(tmp_path / "q"))
    assert distance(found["eval"], exact) < (0.15 if kind == "NVFP4" else 2e-3)
    assert distance(found["load"], exact) < (0.15 if rounded else 2e-3)


def changed(model: Path, to: Path, **more: Any) -> Path:
    """The same with other words in its quantization_config."""
    shutil.copytree(model, to)
    said = json.loads((to / "config.json").read_text())
    said["quantization_config"] |= more
    (to / "config.json").write_text(json.dumps(said))
    return to


def test_what_files_and_config_say_differently_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    made(llama, tmp_path / "q", {"group_0": group([r"re:.*\.[qv]_proj"], W4), "group_1": group([r"re:.*mlp.*"], W8)})
    groups = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["config_groups"]
    first = groups["group_0"]
    ordered = first | {"weights": first["weights"] | {"actorder": "group"}}
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "ignored": ({"ignore": [r"re:.*v_proj"]}, r"v_proj: .*says that it is not"),
        "uncovered": ({"config_groups": {"a": first}}, r"mlp\.\w+: .*no config group covers it"),
        "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        "rotated": ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        "order": ({"config_groups": groups | {"group_0": ordered}}, "actorder"),
        "outputs": ({"config_groups": groups | {"group_0": first | {"output_activations": W8}}}, "outputs are rounded"),
        "container": ({"config_groups": groups | {"group_0": first | {"format": "marlin-24"}}}, "marlin-24"),
        "zero points": ({"config_groups": groups | {"group_0": first | {"weights": first["weights"] | {"symmetric": False}}}},
                        "promises tensor"),
        "keys": ({"kv_cache_scheme": "static"}, "keys and values"),
    }  # fmt: skip
    for name, (more, word) in wrong.items():
        with pytest.raises(BitwrightError, match=word):
            load(changed(tmp_path / "q", tmp_path / name, **more))


@pytest.mark.parametrize(
    "preset", ["NVFP4", "MXFP4", "MXFP8", "FP8_DYNAMIC", "FP8_BLOCK"],
)  # fmt: skip
def test_inputs_are_rounded_as_the_library_rounds_them(preset: str) -> None:
    """Halves, zeros and groups of very different sizes among them."""
    arguments = preset_name_to_scheme(preset, ["Linear"]).input_activations
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 256, generator=g) * 10.0 ** torch.randint(-3, 3, (6, 256), generator=g)
    x = torch.where(torch.rand(6, 256, generator=g) < 0.3, (x * 4).round() / 4, x)
    x[0, :128], x[1] = 0, torch.tensor([1.75, 1.75 + 2**-20, 1.7499999, 2, 6, 7, 448, 0.25]).repeat(32)
    outer = torch.tensor([37.0])
    scale, zero = compute_dynamic_scales_and_zp(
        x[None], arguments, nn.Linear(1, 1), outer if preset == "NVFP4" else None
    )
    theirs = fake_quantize(x[None], scale, zero, arguments, outer if preset == "NVFP4" else None)
    config = {"format": "x", "config_groups": {preset: ["Linear"]}}
    found = CompressedTensors().input_quantization(config, "m", {"input_global_scale": outer}.get)
    assert found is not None and torch.allclose(found(x)[None], theirs, rtol=1e-6, atol=0)
    assert float((theirs[0] - x).norm() / x.norm()) > 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("said", ["group", "dynamic", True])
def test_columns_in_groups_by_activation(symmetric: bool, said: str | bool) -> None:
    """As llm-compressor wrote them until its library gave them up: w = (code - zero[g]) · scale[g], g the group of a column."""
    torch.manual_seed(0)
    N, K, bits = 24, 128, 4
    codes, groups, scale = torch.randint(0, 16, (N, K)), torch.randperm(K) // 32, torch.rand(N, 4) + 0.1
    zero = torch.full((N, 4), 8) if symmetric else torch.randint(0, 16, (N, 4))
    tensors = {
        "weight_packed": pack(codes.short(), bits), "weight_scale": scale, "weight_shape": torch.tensor([N, K]),
        "weight_g_idx": groups.int(),
    }  # fmt: skip
    tensors |= {} if symmetric else {"weight_zero_point": pack(zero.T.short(), bits).T.contiguous()}
    config = {
        "format": "pack-quantized",
        "config_groups": {"a": group(["Linear"], {**W4, "symmetric": symmetric, "actorder": said})},
    }
    meant, reader = (codes - zero[:, groups]) * scale[:, groups], CompressedTensors()
    assert torch.allclose(reader.decode(config, "m", tensors), meant)
    assert torch.allclose(decode(reader.quantized(config, "m", tensors)), meant)
    with pytest.raises(FormatError, match="not in groups of 32"):
        reader.decode(config, "m", tensors | {"weight_g_idx": torch.zeros(K, dtype=torch.int32)})


@pytest.mark.parametrize("said", ["weight", "static", None, False])
def test_an_order_that_is_not_in_the_file(said: str | bool | None) -> None:
    """llm-compressor's GPTQ orders columns while it rounds ("static"), and stores them as they come."""
    tensors = {
        "weight_packed": pack(torch.arange(16).repeat(8, 2).short(), 4), "weight_scale": torch.ones(8, 1),
        "weight_shape": torch.tensor([8, 32]),
    }  # fmt: skip
    config = {"format": "pack-quantized", "config_groups": {"a": group(["Linear"], {**W4, "actorder": said})}}
    meant, reader = (torch.arange(16).repeat(8, 2) - 8).float(), CompressedTensors()
    assert torch.equal(reader.decode(config, "m", tensors), meant)
    assert torch.equal(decode(reader.quantized(config, "m", tensors)), meant)


def test_groups_of_columns_that_nothing_asks_for() -> None:
    """-1 for each column is what llm-compressor made beforehand, and left; others would change the weights."""
    tensors = {
        "weight_packed": pack(torch.full((8, 32), 9, dtype=torch.int16), 4), "weight_scale": torch.ones(8, 1),
        "weight_shape": torch.tensor([8, 32]), "weight_g_idx": torch.full((32,), -1, dtype=torch.int32),
    }  # fmt: skip
    config = {"format": "pack-quantized", "config_groups": {"a": group(["Linear"], W4)}}
    assert bool((CompressedTensors().decode(config, "m", tensors) == 1).all())
    with pytest.raises(BitwrightError, match="weight_g_idx"):
        CompressedTensors().decode(config, "m", tensors | {"weight_g_idx": torch.zeros(32, dtype=torch.int32)})
