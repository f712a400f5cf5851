"""Train a LoRA adapter with transformers and peft alone, for comparison with `bitwright finetune` on the same windows.

    python bench/peers/peft_lora.py MODEL --windows WINDOWS.safetensors [--weights bfloat16 | nf4] [--steps 12] [--batch 8]
        [--rank 16]

WINDOWS.safetensors holds int64 tensors "seen" [steps · batch, seqlen], in the order of training, and "held_out" [n, seqlen],
and float64 "rates" [steps], the learning rates.
A step is one batch, as Trainer runs it: loss of the whole batch, torch's AdamW, gradients clipped at 1, no gradient
checkpointing. nf4: bitsandbytes' with double quantization, products in bfloat16, through peft's
prepare_model_for_kbit_training, which does turn checkpointing on. Other settings are peft's, target_modules="all-linear".

Runs in the environment that bitwright[train] is installed in. Prints one line of JSON, in the words of `finetune --json`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from peer import reporting


def adapted(path: Path, weights: str, rank: int) -> Any:
    """The model with a new adapter."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if weights == "nf4":
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=how, device_map="cpu")
        model = prepare_model_for_kbit_training(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """All steps; losses, and tokens a second of steps alone."""
    import torch
    from safetensors.torch import load_file

    windows, model = load_file(args.windows), adapted(args.model, args.weights, args.rank)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)

    @torch.no_grad()
    def judged() -> float:
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in windows["held_out"]]
        return sum(losses) / len(losses)

    model.train()  # for judging too: nothing is dropped, and in eval mode bitsandbytes packs weights so that no gradient passes
    before, spent, losses = judged(), 0.0, []
    for ids, rate in zip(windows["seen"].split(args.batch)[: args.steps], windows["rates"].tolist(), strict=True):
        begun, optimizer.param_groups[0]["lr"] = time.monotonic(), rate
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss))
        spent += time.monotonic() - begun
    speed = len(losses) * args.batch * windows["seen"].shape[1] / spent
    return {"loss_before": before, "loss_after": judged(), "losses": losses, "tokens_per_second": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--weights", choices=("bfloat16", "nf4"), default="bfloat16")
    for name, value in (("steps", 12), ("batch", 8), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with reporting() as found:
        found |= train(args)


if __name__ == "__main__":
    main()
