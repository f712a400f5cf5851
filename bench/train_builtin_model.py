"""Train the built-in model: a small Llama on the source text of Python's standard library.

    python bench/train_builtin_model.py OUT [--minutes 45]

The demo and the tests need a real trained checkpoint and no network, so the package carries one. Every K is a multiple of
256, so every number format fits. Matrices learn with Muon, embeddings and norms with AdamW; the learning rate falls
linearly to zero over the given minutes, whatever the machine. Held-out modules (`HELD_OUT` in calibration/stdlib_text.py) are
never seen; their perplexity is printed at the end.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitwright.calibration.stdlib_text import HELD_OUT, module_text, training_text

VOCAB, SEQLEN, BATCH = 2048, 256, 32
EOS = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of ids, each led by the end-of-text token."""
    eos = tokenizer.eos_token_id
    return torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in (eos, *ids)])


def built_in_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-5,
    )


def held_out_perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """exp of the mean loss over non-overlapping windows of `SEQLEN`."""
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)[:200]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return math.exp(sum(model(w[None], labels=w[None]).loss.item() for w in windows) / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=45)
    args = parser.parse_args()
    torch.manual_seed(0)
    texts = training_text()
    tokenizer = train_tokenizer(texts)
    ids = token_stream(tokenizer, texts)
    held_out = token_stream(tokenizer, [module_text(HELD_OUT)])
    print(f"{len(ids):,} tokens of training text, {sum(map(len, texts)) / len(ids):.2f} characters each", flush=True)
    model = LlamaForCausalLM(built_in_config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    windows = torch.randperm(len(ids) - SEQLEN - 1)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        at = windows[(step * BATCH) % (len(windows) - BATCH) :][:BATCH]
        batch = torch.stack([ids[i : i + SEQLEN + 1] for i in at])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.5)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            speed = step * BATCH * SEQLEN / (time.monotonic() - start)
            print(f"step {step}  {done:.0%}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"held-out perplexity {held_out_perplexity(model, held_out):.3f} after {step} steps")


if __name__ == "__main__":
    main()
