"""Checkpoints that others make: AWQ's and bitsandbytes' layouts, written here number by number, read and run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright import load
from bitwright.errors import BitwrightError, FormatError
from bitwright.formats.awq import Awq
from bitwright.formats.bitsandbytes import STATE, BitsAndBytes
from bitwright.inference.qlinear import QLinear
from bitwright.methods.rtn import rtn
from bitwright.models.streamed import StreamedModel
from bitwright.numerics.codec import decode
from bitwright.numerics.scheme import GRIDS, Scheme

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def awq_words(numbers: Tensor) -> Tensor:
    """[R, N] numbers of 4 bits -> [R, N/8] words: one loop for each place, as the layout is told."""
    R, N = numbers.shape
    words = torch.zeros(R, N // 8, dtype=torch.int64)
    for row in range(R):
        for n in range(N):
            place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}[n % 8]
            words[row, n // 8] |= int(numbers[row, n]) << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def awq(w: Tensor, group: int = 32) -> dict[str, Tensor]:
    """A matrix as AutoAWQ stores it."""
    q = rtn(w, None, Scheme.parse(f"int4-g{group}-asym")).q
    assert q.scales.zero is not None
    return {
        "qweight": awq_words(q.codes.T.int() + 8), "qzeros": awq_words(q.scales.zero.T.int() + 8),
        "scales": q.scales.scale.T.half().contiguous(),
    }  # fmt: skip


def nf4(w: Tensor, block: int = 64, nested: bool = False) -> dict[str, Tensor]:
    """A matrix as bitsandbytes stores it."""
    levels = torch.tensor(GRIDS["nf4"].levels)
    flat = w.float().reshape(-1, block)
    absmax = flat.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(w.shape)}
    tensors = {"weight.absmax": absmax}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), absmax.mean()
        over = (absmax - offset).reshape(-1, 8).abs().amax(1)
        index = ((absmax - offset) / over.repeat_interleave(8))[:, None].sub(table).abs().argmin(1)
        absmax = table[index] * over.repeat_interleave(8) + offset
        state |= {"nested_blocksize": 8, "nested_offset": float(offset), "nested_dtype": "float32"}
        tensors = {
            "weight.absmax": index.to(torch.uint8),
            "weight.nested_absmax": over,
            "weight.nested_quant_map": table,
        }
    codes = (flat / absmax[:, None])[..., None].sub(levels).abs().argmin(-1).view(-1).to(torch.uint8)
    packed = (codes[::2] << 4 | codes[1::2])[:, None].contiguous()
    said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {"weight": packed, "weight.quant_map": levels, STATE: said, **tensors}


def spoiled(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The same with some of the state said otherwise."""
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    return {**tensors, STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def rewritten(model: Path, folder: Path, config: dict[str, Any], pack: Any) -> Path:
    """The model with the matrices of its blocks stored otherwise."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix("weight")
            tensors |= {stem + suffix: part.contiguous() for suffix, part in pack(tensor.float()).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": config}))
    for file in model.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("config", "pack"),
    [(AWQ, awq), (BNB, nf4), (BNB, lambda w: nf4(w, nested=True))],
    ids=["awq", "nf4", "nf4, double quantization"],
)
def test_a_checkpoint_of_theirs_runs(config: dict[str, Any], pack: Any, llama: Path, tmp_path: Path) -> None:
    theirs = rewritten(llama, tmp_path / "q", config, pack)
    ids = torch.tensor([[10, 200, 3, 77, 5, 5, 130, 64]])
    streamed = StreamedModel(theirs)
    exact = streamed.skeleton.head(torch.cat(streamed.hidden(ids)))
    model = load(theirs)
    with torch.no_grad():
        found = model(ids).logits
    assert float((found - exact).norm() / exact.norm()) < 5e-3
    assert sum(isinstance(m, QLinear) for m in model.modules()) == 3 * 7


@pytest.mark.parametrize("group", [32, 128])
def test_awq_s_numbers_come_back(group: int) -> None:
    w = torch.randn(16, 128)
    q = rtn(w, None, Scheme.parse(f"int4-g{group}-asym")).q
    config = AWQ | {"group_size": group if group < 128 else -1}
    assert torch.equal(Awq().decode(config, "m", awq(w, group)), decode(q))
    assert torch.equal(decode(Awq().quantized(config, "m", awq(w, group))), decode(q))


@pytest.mark.parametrize(
    "change",
    [{"version": "gemv"}, {"bits": 3}, {"group_size": 64}, {"group_size": 0}, {"group_size": "x"}, {"bits": None}],
)
def test_awq_s_other_layouts_are_refused(change: dict[str, Any]) -> None:
    for read in (Awq().decode, Awq().quantized):
        with pytest.raises(FormatError, match=r"^m: "):
            read(AWQ | change, "m", awq(torch.randn(16, 128)))


def test_what_bitsandbytes_holds_otherwise_is_refused() -> None:
    good = nf4(torch.randn(8, 128))
    without = {name: tensor for name, tensor in good.items() if name != STATE}
    garbage = good | {STATE: torch.tensor([1, 2, 3], dtype=torch.uint8)}
    short = good | {"weight": good["weight"][:-1]}
    bad = [
        without, garbage, short, spoiled(good, shape=[8, 129]), spoiled(good, shape=[8]), spoiled(good, shape="x"),
        spoiled(good, blocksize=0), spoiled(good, blocksize=32), spoiled(good, shape=[-8, -128]),
    ]  # fmt: skip
    for tensors in bad:
        for read in (BitsAndBytes().decode, BitsAndBytes().quantized):
            with pytest.raises(BitwrightError):
                read(BNB, "m", tensors)
    wrapped = nf4(torch.randn(8, 96))
    assert BitsAndBytes().decode(BNB, "m", wrapped).shape == (8, 96)
    assert BitsAndBytes().quantized(BNB, "m", wrapped) is None  # blocks run on into the next row: computed in float
    with pytest.raises(FormatError, match="not NF4"):
        BitsAndBytes().quantized(BNB, "m", good | {"weight.quant_map": torch.linspace(-1, 1, 16)})
