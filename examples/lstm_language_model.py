"""A language model of letters, an LSTM, quantized dynamically. Run: python examples/lstm_language_model.py

Prints losses on held-out text, some int8 codes, bytes on disk and the time of one pass. The text is Python's own library's.
"""

import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import bitwright
from bitwright.calibration.stdlib_text import CALIBRATION, stdlib


class LanguageModel(nn.Module):
    """Embedding, LSTM, Linear: logits [B, T, 128] of the next ASCII character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.lstm = nn.LSTM(64, 256, batch_first=True)
        self.head = nn.Linear(256, 128)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(index))[0])


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy of each next character."""
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def report(name: str, model: nn.Module, windows: Tensor) -> None:
    """One line: the loss, what the file weighs, and how long all windows take."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
        loss(model, windows)  # the first call is slower than those that follow
        start = time.perf_counter()
        found = loss(model, windows)
        seconds = time.perf_counter() - start
        print(f"{name:14} loss {found:.4f}   {file.stat().st_size:9,} bytes   {seconds * 1e3:7.1f} ms")


def main() -> None:
    torch.manual_seed(0)
    sources = [(stdlib() / f"{name}.py").read_text() for name in CALIBRATION]
    text = "".join(sources)[:400_000].encode("ascii", "replace")
    windows = torch.tensor(list(text)).long()[: len(text) // 65 * 65].view(-1, 65)
    train, test = windows[:-200], windows[-200:]
    model = LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model, train[torch.randint(len(train), (64,))]).backward()
        optimizer.step()
    report("float", model.eval(), test)
    integer = bitwright.quantize_dynamic(model)
    report("dynamic int8", integer, test)
    print(bitwright.layers(integer))
    print("codes of the head:", *integer.state_dict()["head.codes"][97:101, :16].tolist(), sep="\n  ")
    print("what each layer costs at 4 bits:", bitwright.sensitivity(model, [test[:, :-1]], weights="int4-channel"))


if __name__ == "__main__":
    main()
