"""LoRA adapters as GGUF files beside a model's: llama.cpp's logprobs must be those of peft's model.

    python -m bench.lora_gguf [--kinds llama,qwen2] [--model DIR --adapter DIR] [--oracle PYTHON]

For small random models of these architectures with a random adapter on all linear layers, or for one model and adapter: the
greatest difference of llama.cpp's logprobs from peft's, that without the adapter (llama.cpp keeps keys and values in 16
bits), and how far the adapter moved them. Needs `bench/peers/install.sh xllamacpp`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.gguf_families import PROMPT, checkpoint
from bench.gguf_pretokenizers import ORACLE, answers
from bitwright.cli.demo import MODEL
from bitwright.errors import BitwrightError
from bitwright.pipeline.conversion import convert

KINDS = "llama,qwen2,qwen3,phi3,gemma3_text,olmo2,gpt2,gpt_neox,starcoder2,cohere,stablelm,granite,falcon,exaone4,glm4"


def random_adapter(base: Path, folder: Path) -> Path:
    """An adapter on all linear layers of a model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@torch.no_grad()
def expected(base: Path, adapter: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """peft's logprobs behind a prompt, and those without the adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = model(ids).logits[0, -1].log_softmax(-1)
    return PeftModel.from_pretrained(model, adapter).eval()(ids).logits[0, -1].log_softmax(-1), plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    args = parser.parse_args()
    ids = torch.randint(2, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        place, pairs = Path(folder), dict[str, tuple[Path, Path]]()
        if args.model:
            pairs[args.model.name] = args.model, args.adapter
        for kind in [] if args.model else args.kinds.split(","):
            base = checkpoint(kind, place / kind, MODEL)
            pairs[kind] = base, random_adapter(base, place / f"{kind}-adapter")
        jobs: list[dict[str, Any]] = []
        written: list[str] = []
        for name, (base, adapter) in pairs.items():
            whole, lora = place / f"{name}.gguf", place / f"{name}-lora.gguf"
            try:
                convert(base, whole)
                convert(adapter, lora, base=base)
            except BitwrightError as error:
                print(f"{name}: {error}")
                continue
            written.append(name)
            jobs += [{"file": str(whole), "prompts": ids.tolist(), **more} for more in ({}, {"lora": str(lora)})]
        found = answers(jobs, args.oracle)
        for name, without, beside in zip(written, found[::2], found[1::2], strict=True):
            if error := without.get("error") or beside.get("error"):
                print(f"{name}: llama.cpp does not load it: {error}")
                continue
            meant, plain = expected(*pairs[name], ids)
            base, adapted = (logprobs(answer, len(meant)) for answer in (without, beside))
            off, moved, noise = (greatest(*two) for two in ((adapted, meant), (plain, meant), (base, plain)))
            print(
                f"{name}: {off:.1e}, without the adapter {noise:.1e}; the adapter moved them by {moved:.1e}", flush=True
            )


def logprobs(answer: dict[str, Any], V: int) -> Tensor:
    """llama.cpp's, [V]."""
    return torch.tensor([answer["logprobs"][0].get(str(i), float("nan")) for i in range(V)])


def greatest(a: Tensor, b: Tensor) -> float:
    """The greatest difference."""
    return float((a - b).abs().nan_to_num().max())


if __name__ == "__main__":
    main()
