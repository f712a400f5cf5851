"""Checkpoints and configs as other versions of the tools spell them: the same numbers, or a refusal that names what differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright import load
from bitwright.errors import BitwrightError, CheckpointError, FormatError
from bitwright.formats.awq import Awq
from bitwright.formats.compressed_tensors import CompressedTensors
from bitwright.formats.fp8 import FBGEMM, Fp8
from bitwright.formats.gptq import Gptq
from bitwright.formats.modelopt import Modelopt
from bitwright.models.config import quantization_of
from bitwright.models.kv_cache import read_rounding
from bitwright.numerics.packing import pack
from peers import Stored, assert_same_logits, awq, blocks_only, distance, gptq, ours, stored, transformers_logits

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def by_row(w: Tensor) -> Stored:
    """A matrix in FP8 under a scale for each row."""
    scale = w.abs().amax(1, keepdim=True) / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def whole(w: Tensor, suffix: str = "weight_scale", **more: Tensor) -> Stored:
    """A matrix in FP8 under one scale."""
    scale = w.abs().max() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, suffix: scale, **more}, codes.float() * scale


def without_method(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quant_method"}


# -------------------------------------------------------------------------------------------- what files beside config.json say


def test_a_layout_that_one_of_two_files_says_counts(llama: Path, tmp_path: Path) -> None:
    theirs, meant = stored(llama, tmp_path, GPTQ, blocks_only(lambda w: gptq(w, v=2)))
    beside = theirs / "quantize_config.json"
    beside.write_text(json.dumps(GPTQ | {"checkpoint_format": "gptq_v2"}))
    assert_same_logits(theirs, transformers_logits(meant))
    beside.write_text(json.dumps(GPTQ | {"group_size": 64}))
    with pytest.raises(CheckpointError, match=r"config\.json says group_size 32, quantize_config\.json 64"):
        load(theirs)


def test_two_layouts_in_one_config_are_refused() -> None:
    tensors, _ = gptq(torch.randn(16, 64))
    for said in ({"checkpoint_format": "gptq", "format": "gptq_v2"}, {"is_marlin_format": True}):
        with pytest.raises(FormatError, match=r"^m: GPTQ's layout '(gptq and gptq_v2|marlin)' is not read"):
            Gptq().decode(GPTQ | said, "m", tensors)
    assert torch.equal(*(Gptq().decode(GPTQ | {"checkpoint_format": name}, "m", tensors) for name in ("gptq", "GPTQ")))
    with pytest.raises(FormatError, match="AWQ's version 'gemv'"):
        Awq().decode({"bits": 4, "group_size": 32, "checkpoint_format": "gemv"}, "m", awq(torch.randn(64, 64))[0])


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"load_in_8bit": True}, "bitsandbytes"), (without_method(GPTQ), "gptq"), ({"w_bit": 4, "zero_point": True}, "awq"),
        ({"config_groups": {}}, "compressed-tensors"), ({"quant_method": "modelopt_fp4"}, "modelopt"), ({"bits": 3}, None),
    ],
)  # fmt: skip
def test_a_method_that_other_keys_tell(config: dict[str, Any], method: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = quantization_of(tmp_path)
    assert found is not None and found["quant_method"] == method


# ---------------------------------------------------------------------------------------------------------------------- FP8


def test_fbgemm_s_rows(llama: Path, tmp_path: Path) -> None:
    """Llama 3.1 405B's kind; ranges of inputs end at an upper bound."""
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    theirs, meant = stored(llama, tmp_path, config, blocks_only(by_row))
    for _, logits in ours(theirs):
        assert 1e-3 < distance(logits, transformers_logits(meant)) < 0.1
    found = Fp8(FBGEMM).input_quantization({"activation_scale_ub": 448.0}, "m", {}.get)
    assert found is not None and found(torch.tensor([[1000.0, 1.1]])).tolist() == [[448.0, 1.125]]
    for bound in (None, "1200", 0):
        with pytest.raises(FormatError, match="not a number above 0"):
            Fp8(FBGEMM).input_quantization({"activation_scale_ub": bound}, "m", {}.get)
        assert (
            Fp8().input_quantization({"activation_scale_ub": bound}, "m", {}.get) is not None
        )  # which has no such key
    for layers in ([], {"m": "FP8"}, None):
        with pytest.raises(FormatError, match="None is not read here"):
            Modelopt().module_config({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}, "m")


@pytest.mark.parametrize("suffix", ["qscale_weight", "scale", "weight_scale_inv"])
def test_fp8_s_scales_by_other_names(suffix: str) -> None:
    tensors, meant = whole(torch.randn(8, 64), suffix)
    assert Fp8().holds({name: t.dtype for name, t in tensors.items()})
    assert torch.equal(Fp8().decode(FP8, "m", tensors), meant)


def test_fp8_s_exponents_in_bytes() -> None:
    """Scales of `ue8m0` may lie in uint8, and round those of the inputs to powers of two."""
    config = FP8 | {"scale_fmt": "ue8m0", "weight_block_size": [32, 32]}
    codes, exponents = torch.randn(64, 64).to(torch.float8_e4m3fn), torch.randint(-9, 2, (2, 2))
    meant = codes.float() * torch.exp2(exponents.float()).repeat_interleave(32, 0).repeat_interleave(32, 1)
    tensors = {"weight": codes, "weight_scale_inv": (exponents + 127).to(torch.uint8)}
    assert torch.equal(Fp8().decode(config, "m", tensors), meant)
    inputs = Fp8().input_quantization(config, "m", tensors.get)
    x = torch.randn(5, 64).view(5, 2, 32)
    scale = torch.exp2((x.abs().amax(-1, keepdim=True) / 448).log2().ceil())  # DeepSeek's kernel
    assert inputs is not None
    assert torch.equal(inputs(x.view(5, 64)).view_as(x), (x / scale).to(torch.float8_e4m3fn).float() * scale)
    with pytest.raises(FormatError, match="scale_fmt 'e5m3' is not read"):
        Fp8().decode(config | {"scale_fmt": "e5m3"}, "m", tensors)


def test_fp8_in_blocks_of_which_nothing_is_said() -> None:
    """They are those of transformers' default; scales of rows are told apart by their shape."""
    scale = torch.rand(2, 3)
    tensors = {"weight": torch.randn(200, 300).to(torch.float8_e4m3fn), "weight_scale_inv": scale}
    each = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(Fp8().decode(FP8, "m", tensors), tensors["weight"].float() * each)
    found = Fp8().input_quantization(FP8, "m", tensors.get)
    assert found is not None and found.scheme is not None and found.scheme.group == 128
    rows, meant = by_row(torch.randn(200, 300))
    assert torch.equal(Fp8().decode(FP8, "m", rows), meant)
    found = Fp8().input_quantization(FP8, "m", rows.get)
    assert found is not None and found.scheme is not None and found.scheme.group == "token"


def test_inputs_are_rounded_also_where_weights_are_computed_in_float(llama: Path, tmp_path: Path) -> None:
    """e5m2 is on no grid here: `load` and `eval` give the same all the same."""
    theirs, meant = stored(
        llama, tmp_path, FP8, blocks_only(lambda w: ({"weight": w.to(torch.float8_e5m2), "weight_scale": torch.ones(())}, w))
    )  # fmt: skip
    with torch.no_grad():
        model = load(theirs)
        assert model.model.layers[0].mlp.up_proj.input_quantization is not None
        assert 1e-3 < distance(model(torch.arange(12)[None]).logits, load(meant)(torch.arange(12)[None]).logits) < 0.2


# ----------------------------------------------------------------------------------------------------------------- ModelOpt


def nvfp4(w: Tensor) -> Stored:
    """Codes of any kind under scales of 1, and a fixed range of inputs."""
    codes = torch.randint(0, 255, (w.shape[0], w.shape[1] // 2), dtype=torch.uint8)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([levels, -levels]) / 20
    local = torch.ones(w.shape[0], w.shape[1] // 16).to(torch.float8_e4m3fn)
    meant = levels[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(1)
    return {
        "weight": codes,
        "weight_scale": local,
        "weight_scale_2": torch.tensor(0.05),
        "input_scale": torch.tensor(0.01),
    }, meant


def test_modelopt_s_own_file(llama: Path, tmp_path: Path) -> None:
    """hf_quant_config.json alone says it, module by module; keys and values too, whose scales lie in k_proj and v_proj."""

    def pack_(name: str, w: Tensor) -> Stored | None:
        if not name.endswith("_proj"):
            return None
        return nvfp4(w) if "mlp" in name else whole(w, input_scale=torch.tensor(0.02))

    theirs, meant = stored(llama, tmp_path, None, pack_)
    layers = {
        name.removesuffix(".weight"): {"quant_algo": "W4A16_NVFP4" if "mlp" in name else "FP8"}
        for name in load_file(llama / "model.safetensors")
        if name.endswith("_proj.weight")
    }
    said = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "kv_cache_quant_algo": None}
    beside = theirs / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    found = dict(ours(theirs))
    for logits in found.values():
        assert 1e-3 < distance(logits, transformers_logits(meant)) < 0.1
    scales = {f"model.layers.{i}.self_attn.{k}_proj.{k}_scale": torch.tensor(0.2) for i in range(3) for k in "kv"}
    save_file(load_file(theirs / "model.safetensors") | scales, theirs / "model.safetensors", metadata={"format": "pt"})
    beside.write_text(json.dumps({"quantization": said | {"kv_cache_quant_algo": "FP8"}}))
    assert all(not torch.equal(logits, found[how]) for how, logits in ours(theirs))
    beside.write_text(json.dumps({"quantization": said | {"kv_cache_quant_algo": "NVFP4"}}))
    with pytest.raises(CheckpointError, match="not computed here: NVFP4"):
        load(theirs)


def test_scales_of_keys_and_values_that_modelopt_does_not_write_are_1() -> None:
    config = {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
    found = read_rounding(config, {}.get, "m")
    assert found is not None and found[0](torch.tensor([[1.07]])).tolist() == [[1.125]]
    with pytest.raises(CheckpointError, match="scales of its keys and values are missing"):
        read_rounding(config | {"quant_method": "compressed-tensors"}, {}.get, "m")


def test_modelopt_s_inputs_that_are_multiplied_first_are_refused() -> None:
    tensors, _ = nvfp4(torch.randn(8, 64))
    with pytest.raises(FormatError, match=r"^m: .*multiplied by a pre_quant_scale"):
        Modelopt().decode({"quant_algo": "NVFP4"}, "m", tensors | {"pre_quant_scale": torch.ones(64)})


# --------------------------------------------------------------------------------------------------------------- other types


def test_zero_points_that_are_not_packed() -> None:
    """As compressed-tensors wrote them until 2025."""
    N, K, G = 16, 64, 2
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    config = {"format": "pack-quantized", "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    codes, zero = torch.randint(-8, 8, (N, K)), torch.randint(-8, 8, (N, G)).to(torch.int8)
    scale = torch.rand(N, G)
    tensors = {
        "weight_packed": pack(codes.short() + 8, 4), "weight_scale": scale, "weight_shape": torch.tensor([N, K]),
        "weight_zero_point": zero,
    }  # fmt: skip
    meant = ((codes.view(N, G, 32) - zero[..., None]) * scale[..., None]).view(N, K)
    assert torch.allclose(CompressedTensors().decode(config, "m", tensors), meant)
    assert CompressedTensors().quantized(config, "m", tensors) is not None


def as_type(dtype: torch.dtype) -> Callable[[Tensor], Stored]:
    return lambda w: ({"weight": w.to(dtype)}, w.to(dtype).float())


def test_a_type_that_is_not_read_is_named(llama: Path, tmp_path: Path) -> None:
    theirs, _ = stored(llama, tmp_path, None, blocks_only(as_type(torch.float8_e4m3fnuz)))
    with pytest.raises(BitwrightError, match="is of type F8_E4M3FNUZ, which is not read here"):
        load(theirs)
