"""Train a small mixture of experts on the source text of Python's standard library, to judge quantized experts on.

    python -m bench.train_mixture OUT [--minutes 40]

4.5 M parameters, 8 experts of which 2 see a token, held to an even load by transformers' auxiliary loss; the built-in model's
tokens and held-out modules. All by AdamW, as Muon knows no stacks of matrices. Its weights lie in bench/mixture.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from bench.train_builtin_model import SEQLEN, VOCAB, held_out_perplexity, token_stream, train_tokenizer
from bitwright.calibration.stdlib_text import HELD_OUT, module_text, training_text

BATCH, RATE = 8, 2e-3


def config() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    texts = training_text()
    tokenizer = train_tokenizer(texts)
    ids = token_stream(tokenizer, texts)
    model = MixtralForCausalLM(config())
    print(f"{len(ids):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    windows = torch.randperm(len(ids) - SEQLEN - 1)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        at = windows[(step * BATCH) % (len(windows) - BATCH) :][:BATCH]
        batch = torch.stack([ids[i : i + SEQLEN] for i in at])
        loss = model(batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.5)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            speed = step * BATCH * SEQLEN / (time.monotonic() - start)
            print(f"step {step}  {done:.0%}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    held_out = token_stream(tokenizer, [module_text(HELD_OUT)])
    print(f"held-out perplexity {held_out_perplexity(model, held_out):.3f} after {step} steps")


if __name__ == "__main__":
    main()
