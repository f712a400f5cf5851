"""Checkpoints as other tools write them, beside the float models that they stand for: what must be read is known before."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright import load
from bitwright.inference.qlinear import QLinear
from bitwright.models.streamed import StreamedModel

IDS = torch.tensor([[10, 200, 3, 77, 5, 5, 130, 64, 1, 2, 90, 33]])
Stored = tuple[dict[str, Tensor], Tensor]  # a matrix's tensors by suffix, and what they decode to
Pack = Callable[[str, Tensor], Stored | None]  # of a module's name and float matrix; None: it stays float


def words(numbers: Tensor, bits: int) -> Tensor:
    """[R, C] numbers -> [R, C·bits/32] int32 words, lowest bits first: one bit after the other, as the layout is told."""
    stream = (numbers[:, :, None].long() >> torch.arange(bits) & 1).flatten(1).view(len(numbers), -1, 32)
    packed = (stream << torch.arange(32)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def gptq(w: Tensor, bits: int = 4, group: int = 32, v: int = 1, sym: bool = False, g_idx: bool = True) -> Stored:
    """A matrix [N, K] as GPTQModel stores it, and what that stands for."""
    N, K = w.shape
    length = K if group < 0 else group
    groups, top = w.view(N, -1, length), (1 << bits) - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if sym:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    scale = ((high - low) / top).half().float()
    zero = torch.full_like(scale, (top + 1) // 2) if sym else (-low / scale).round().clamp(1, top)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    tensors = {
        "qweight": words(codes.view(N, K), bits).T, "qzeros": words(zero.T - int(v == 1), bits),
        "scales": scale.T.half(), **({"g_idx": (torch.arange(K) // length).int()} if g_idx else {}),
    }  # fmt: skip
    return tensors, ((codes - zero[..., None]) * scale[..., None]).view(N, K)


def awq(w: Tensor, group: int = 32) -> Stored:
    """A matrix [N, K] as AutoAWQ's gemm stores it, and what that stands for."""
    tensors, meant = gptq(w, 4, group, v=2)
    codes, zeros = (unpacked(tensors["qweight"].T).T, unpacked(tensors["qzeros"]))
    order = torch.arange(len(w)).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    return {
        "qweight": words(codes[:, order], 4),
        "qzeros": words(zeros[:, order], 4),
        "scales": tensors["scales"],
    }, meant


def unpacked(packed: Tensor) -> Tensor:
    """Undoes `words` for 4 bits."""
    return (packed[..., None].long() >> 4 * torch.arange(8) & 15).flatten(1)


def stored(model: Path, folder: Path, config: dict[str, Any] | None, pack: Pack) -> tuple[Path, Path]:
    """The model with matrices stored as a tool stores them, and the same decoded, as a float checkpoint."""
    packed, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        done = pack(module, tensor.float()) if name.endswith(".weight") and tensor.ndim == 2 else None
        packed |= {name: tensor} if done is None else {f"{module}.{s}": t.contiguous() for s, t in done[0].items()}
        meant[name] = tensor.float() if done is None else done[1]
    said = json.loads((model / "config.json").read_text()) | {"dtype": "float32"}
    theirs = said | ({} if config is None else {"quantization_config": config})
    for to, tensors, words_ in ((folder / "q", packed, theirs), (folder / "f", meant, said)):
        to.mkdir(parents=True)
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
        (to / "config.json").write_text(json.dumps(words_))
        for file in model.glob("token*"):
            (to / file.name).write_bytes(file.read_bytes())
    return folder / "q", folder / "f"


def blocks_only(pack: Callable[[Tensor], Stored]) -> Pack:
    """The matrices of the blocks alone."""
    return lambda module, w: pack(w) if module.endswith("_proj") else None


def transformers_logits(folder: Path, **options: Any) -> Tensor:
    """By transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()
    with torch.no_grad():
        return model(IDS).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def ours(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Logits by `load`, on packed weights, and by `eval`, block by block on decoded ones."""
    model = load(folder)
    assert any(isinstance(m, QLinear) for m in model.modules())
    with torch.no_grad():
        yield "load", model(IDS).logits
    streamed = StreamedModel(folder)
    yield "eval", streamed.skeleton.head(torch.cat(streamed.hidden(IDS)))


def assert_same_logits(folder: Path, exact: Tensor, within: float = 2e-3) -> None:
    """That both ways give these."""
    for how, logits in ours(folder):
        assert distance(logits, exact) < within, (how, distance(logits, exact))
