"""Files of bitsandbytes, DeepSeek's FP8, auto-round and AutoAWQ, beside what their own tools make of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitwright import load
from bitwright.errors import BitwrightError, FormatError
from bitwright.formats.auto_round import AutoRound
from bitwright.formats.bitsandbytes import BitsAndBytes
from bitwright.formats.fp8 import Fp8
from bitwright.formats.modelopt import Modelopt
from bitwright.inference.qlinear import QLinear
from bitwright.numerics.codec import decode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.scheme import Scheme
from peers import (
    IDS,
    Stored,
    assert_same_logits,
    awq,
    blocks_only,
    distance,
    gptq,
    ours,
    stored,
    transformers_logits,
)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles some of its functions at first use, which takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


# ------------------------------------------------------------------------------------------------------- bitsandbytes

INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}


def int8(w: Tensor) -> Stored:
    """As bitsandbytes' own functions make it."""
    bnb = pytest.importorskip("bitsandbytes")
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(w.half())
    order = torch.zeros((), dtype=torch.uint8)
    return {"weight": codes, "SCB": scale, "weight_format": order}, bnb.functional.int8_vectorwise_dequant(codes, scale)


def four_bits(kind: str, storage: torch.dtype, nested: bool, block: int = 64) -> Callable[[Tensor], Stored]:
    """The same for NF4 and FP4."""
    bnb = pytest.importorskip("bitsandbytes")

    def pack(w: Tensor) -> Stored:
        packed, state = bnb.functional.quantize_4bit(
            w.contiguous(), blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        said = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        state.shape = torch.Size((1, w.numel()))  # where a row ends within a block, its AVX-512 kernel is wrong
        return {"weight": packed, **said}, bnb.functional.dequantize_4bit(packed, state).view(w.shape)

    return pack


@pytest.mark.parametrize(
    ("kind", "storage", "nested"),
    [("nf4", torch.uint8, True), ("nf4", torch.bfloat16, False), ("nf4", torch.float32, True), ("fp4", torch.float16, True)],
)  # fmt: skip
def test_four_bits_of_bitsandbytes(kind: str, storage: torch.dtype, nested: bool, llama: Path, tmp_path: Path) -> None:
    said = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    config = FOUR | said | {"bnb_4bit_quant_storage": str(storage).removeprefix("torch.")}
    theirs, meant = stored(llama, tmp_path, config, blocks_only(four_bits(kind, storage, nested)))
    model = load(theirs)
    if kind == "nf4":
        assert_same_logits(theirs, transformers_logits(meant))
        assert distance(model(IDS).logits, transformers_logits(theirs)) < 1e-2  # which computes in bfloat16
    else:  # whose smallest number no grid here has: computed in float
        assert not any(isinstance(m, QLinear) for m in model.modules())
        assert distance(model(IDS).logits, transformers_logits(meant)) < 1e-3
    model.save_pretrained(tmp_path / "again")
    once, again = load_file(theirs / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert once.keys() == again.keys()
    assert all(torch.equal(*(t[n].flatten().view(torch.uint8) for t in (once, again))) for n in once if "_proj." in n)


def test_integers_of_bitsandbytes(llama: Path, tmp_path: Path) -> None:
    """As bitsandbytes itself multiplies them in transformers, in 16 bits."""
    theirs, meant = stored(llama, tmp_path, INT8, blocks_only(int8))
    exact = transformers_logits(theirs)
    for _, logits in ours(theirs):
        assert distance(logits, exact) < 2e-2
    assert distance(transformers_logits(meant), exact) < 3e-2


def test_inputs_are_rounded_as_bitsandbytes_rounds_them() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 3
    codes, scale, columns = bnb.functional.int8_vectorwise_quant(x.clone().half(), threshold=6.0)
    theirs = codes.float() * scale[:, None] / 127
    theirs[:, columns] = x[:, columns]
    assert len(columns) > 3
    assert distance(InputQuantization(Scheme.parse("int8-token"), threshold=6.0)(x), theirs) < 2e-3


def test_blocks_of_bitsandbytes_of_any_length() -> None:
    for N, K, block in ((4, 1024, 512), (8, 96, 64), (4, 64, 128)):
        tensors, meant = four_bits("nf4", torch.uint8, True, block)(torch.randn(N, K))
        assert torch.allclose(BitsAndBytes().decode({}, "m", tensors), meant, atol=1e-6)
        q = BitsAndBytes().quantized({}, "m", tensors)
        assert (q is None) == (K % block > 0 or block > K)
        assert q is None or torch.allclose(decode(q), meant, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "order for one kind of GPU"),
        ({"SCB": torch.ones(3)}, "3 scales"), ({"weight.absmax": torch.ones(2)}, "are not those of"),
    ],
)  # fmt: skip
def test_integers_that_are_not_whole_are_refused(change: dict[str, Tensor], word: str) -> None:
    tensors, _ = int8(torch.randn(8, 16))
    for read in (BitsAndBytes().decode, BitsAndBytes().quantized):
        with pytest.raises(FormatError, match=rf"^m: .*{word}"):
            read(INT8, "m", tensors | change)


# ---------------------------------------------------------------------------------------------------------------- FP8

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 64]}


def fp8(w: Tensor, rows: int, columns: int, suffix: str = "weight_scale_inv") -> Stored:
    """A matrix in FP8, one scale for so many rows and columns."""
    scale, meant, codes = torch.empty(-(-w.shape[0] // rows), -(-w.shape[1] // columns)), w.clone(), w.clone()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = w[here].abs().max() / 448
            codes[here] = (w[here] / scale[i, j]).to(torch.float8_e4m3fn).float()
            meant[here] = codes[here] * scale[i, j]
    scale = scale.view(()) if scale.numel() == 1 else scale
    return {"weight": codes.to(torch.float8_e4m3fn), suffix: scale}, meant


def test_fp8_in_blocks(llama: Path, tmp_path: Path) -> None:
    """The weights are those that transformers decodes; inputs are rounded in groups too, which it does on GPUs alone."""
    theirs, meant = stored(llama, tmp_path, BLOCKS, blocks_only(lambda w: fp8(w, 32, 64)))
    exact = transformers_logits(meant)
    assert distance(exact, transformers_logits(theirs, dtype=torch.bfloat16)) < 2e-2
    for _, logits in ours(theirs):
        assert 1e-3 < distance(logits, exact) < 0.1
    found = Fp8().input_quantization(BLOCKS, "m", {}.get)
    assert found is not None and found.scheme == Scheme("fp8", 64, "sym", "f32")


@pytest.mark.parametrize(
    ("config", "rows", "columns", "suffix"),
    [
        ({"weight_block_size": [48, 32]}, 48, 32, "weight_scale_inv"),
        ({"weight_block_size": [128, 128]}, 128, 128, "weight_scale_inv"),
        ({}, 100, 200, "weight_scale"), ({}, 1, 200, "weight_scale"),
        ({"weight_block_size": None}, 100, 200, "weight_scale_inv"),
    ],
)  # fmt: skip
def test_fp8_s_scales(config: dict[str, Any], rows: int, columns: int, suffix: str) -> None:
    """Blocks that do not fill the matrix, rows, one for all."""
    tensors, meant = fp8(torch.randn(100, 200), rows, columns, suffix)
    assert torch.equal(Fp8().decode(config, "m", tensors), meant)
    q = Fp8().quantized(config, "m", tensors)
    assert q is not None and torch.equal(decode(q), meant)
    with pytest.raises(FormatError, match=r"^m: .*is not one number"):
        Fp8().decode(config, "m", tensors | {suffix: torch.ones(7, 3)})


def test_fp8_with_inputs_of_a_fixed_range() -> None:
    config = {"activation_scheme": "static"}
    found = Fp8().input_quantization(config, "m", {"input_scale": torch.tensor(0.5)}.get)
    assert found is not None and found(torch.tensor([[1.07, 3.0]])).tolist() == [[1.125, 3.0]]
    with pytest.raises(FormatError, match="a range that the file lacks"):
        Fp8().input_quantization(config, "m", {}.get)
    for wrong in ({"weight_block_size": 128}, {"activation_scheme": "later"}):
        with pytest.raises(FormatError, match="is not read here"):
            Fp8().module_config(wrong, "m")


# ----------------------------------------------------------------------------------------------------------- ModelOpt


def nvfp4(w: Tensor) -> Stored:
    """A matrix as ModelOpt stores it: e2m1 codes, an e4m3 scale for 16 of them, one number for all."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    outer = w.abs().max() / (6 * 448)
    local = (w.unflatten(1, (-1, 16)).abs().amax(-1) / 6 / outer).to(torch.float8_e4m3fn)
    scale = (local.float() * outer).repeat_interleave(16, 1)
    codes = ((w / scale).abs()[..., None] - levels).abs().argmin(-1)
    meant = torch.where(w < 0, -levels[codes], levels[codes]) * scale
    codes = (codes + 8 * (w < 0)).to(torch.uint8)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return {"weight": packed, "weight_scale": local, "weight_scale_2": outer, "input_scale": torch.tensor(0.01)}, meant


def test_modelopt_s_files(llama: Path, tmp_path: Path) -> None:
    """FP8 and NVFP4: decoded exactly, and run with inputs rounded; scales of keys and values are noted."""
    kinds: dict[str, Callable[[Tensor], Stored]] = {
        "FP8": lambda w: (
            {**(made := fp8(w, *w.shape, "weight_scale"))[0], "input_scale": torch.tensor(0.02)},
            made[1],
        ),
        "FP8_PER_CHANNEL_PER_TOKEN": lambda w: fp8(w, 1, w.shape[1], "weight_scale"),
        "NVFP4": nvfp4,
    }
    for kind, pack in kinds.items():
        config = {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["lm_head"]}
        theirs, meant = stored(llama, tmp_path / kind, config, blocks_only(pack))
        exact = transformers_logits(meant)
        for _, logits in ours(theirs):
            assert 1e-4 < distance(logits, exact) < (0.3 if kind == "NVFP4" else 0.1), kind
        tensors, w = pack(torch.randn(32, 64))
        q = Modelopt().quantized(config, "m", tensors)
        assert torch.equal(Modelopt().decode(config, "m", tensors), w) and q is not None and torch.equal(decode(q), w)
        with pytest.raises(FormatError, match="scale"):
            Modelopt().decode(config, "m", tensors | {"weight_scale": torch.ones(7, 3)})
    with pytest.raises(FormatError, match="'W4A8_AWQ' is not read"):
        Modelopt().module_config({"quantization": {"quant_algo": "W4A8_AWQ"}}, "m")


# ---------------------------------------------------------------------------------------------------- auto-round, AWQ

ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int", "act_bits": 16}
EXTRA = {
    "model.layers.0.self_attn.q_proj": {"bits": 8, "group_size": -1}, r".*\.q_proj": {"bits": 16},
    r"layers\.1\.mlp": {"bits": 2},
}  # fmt: skip


def by_extra(module: str, w: Tensor) -> Stored | None:
    """As those words say, zero points as they are."""
    if not module.endswith("_proj") or (module.endswith("q_proj") and "layers.0" not in module):
        return None
    if module.endswith("q_proj"):
        return gptq(w, 8, -1, v=2, g_idx=False)
    return gptq(w, 2 if "layers.1.mlp" in module else 4, v=2, g_idx=False)


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "auto_round:auto_gptq": (ROUND | {"packing_format": "auto_round:auto_gptq"}, blocks_only(lambda w: gptq(w, g_idx=False))),
    "auto_round, extra_config": (ROUND | {"packing_format": "auto_round", "extra_config": EXTRA}, by_extra),
    "auto_round:auto_awq": (ROUND | {"packing_format": "auto_round:auto_awq"}, blocks_only(awq)),
    "AWQ, modules_to_not_convert": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["v_proj", "layers.2"]},
        lambda name, w: None if "v_proj" in name or "layers.2." in name else blocks_only(awq)(name, w),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_weights_meant(kind: str, llama: Path, tmp_path: Path) -> None:
    theirs, meant = stored(llama, tmp_path, *KINDS[kind])
    assert_same_logits(theirs, transformers_logits(meant))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"packing_format": "auto_round:fp8_static"}, "fp8_static"), ({"act_bits": 8}, "act_bits 8"),
        ({"data_type": "mx_fp"}, "mx_fp"), ({"rotation_config": {"kind": "hadamard"}}, "rotation_config"),
        ({"extra_config": {"m": {"bits": 16}}}, "says that it is not"), ({"bits": 5}, "5 bits"),
    ],
)  # fmt: skip
def test_what_auto_round_does_beyond_integers_is_refused_by_name(more: dict[str, Any], word: str) -> None:
    tensors, _ = gptq(torch.randn(16, 128), g_idx=False)
    with pytest.raises(FormatError, match=rf"^m: .*{word}"):
        AutoRound().decode(ROUND | more, "m", tensors)


def test_a_method_that_is_not_read_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    theirs, _ = stored(llama, tmp_path, {"quant_method": "hqq"}, lambda module, w: None)
    with pytest.raises(BitwrightError, match=r"'hqq', which is not read here"):
        load(theirs)
    said = json.loads((theirs / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "hqq"
