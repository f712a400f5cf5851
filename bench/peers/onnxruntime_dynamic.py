"""onnxruntime's quantize_dynamic on a sentence encoder: cosine to the float embeddings, bytes, sentences a second.

python bench/peers/onnxruntime_dynamic.py MODEL OUT      (bench.encoder runs it; OUT holds its inputs)
"""

import sys
import time
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from safetensors.torch import load_file
from transformers import AutoModel

model, out = Path(sys.argv[1]), Path(sys.argv[2])
judged, expected = load_file(out / "encoder.safetensors"), load_file(out / "expected.safetensors")["expected"]
count = 1 + max(int(name.split(".")[0]) for name in judged)
names = ["input_ids", "attention_mask", "token_type_ids"]
parts = [{name: judged[f"{i}.{name}"] for name in names} for i in range(count)]


class Hidden(torch.nn.Module):
    """The encoder's hidden states alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.inner(input_ids, attention_mask, token_type_ids)[0]


axes = {name: {0: "batch", 1: "tokens"} for name in [*names, "hidden"]}
with torch.no_grad():
    torch.onnx.export(
        Hidden(),
        tuple(parts[0].values()),
        str(out / "float.onnx"),
        input_names=names,
        output_names=["hidden"],
        dynamic_axes=axes,
        dynamo=False,
        opset_version=17,
    )
quantize_dynamic(out / "float.onnx", out / "dynamic.onnx")
for name in ("float", "dynamic"):
    file = out / f"{name}.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = []
    session.run(None, {k: v.numpy() for k, v in parts[0].items()})
    begun = time.perf_counter()
    for part in parts:
        hidden = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in part.items()})[0])
        mask = part["attention_mask"][..., None]
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    seconds = time.perf_counter() - begun
    cosine = float((torch.cat(found) * expected).sum(1).mean())
    print(f"| onnxruntime {name} | {cosine:.5f} | {file.stat().st_size:,} | {len(expected) / seconds:.0f} |")
