"""Training from scratch on weights that are stored in 8 bits, beside float32 and bfloat16.

    python -m bench.storage [--tasks classifier,regression,digits,language] [--steps 400]

regression: the 3-3-2 network of examples/regression_mlp.py, the mean over ten seeds; digits: the convolutional classifier of
bench/digits.py; language: a Llama of 5 M parameters on ../shared/text/wiki.txt, --steps of 16 × 128 tokens; classifier: a task
of eight classes drawn from a random network. Losses are of data that is held out. In 8 bits weights are decoded to bfloat16 (of
the two smallest networks to float32); in "bfloat16" weights themselves are bfloat16; "to nearest" writes updates back without
stochastic rounding. Bytes are those of the weights between steps.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from examples import regression_mlp
from examples.drawn_digits import drawn_digits
from torch import Tensor, nn
from torch.nn import functional

from bench import digits
from bench.measure import ROOT, SHARED, table
from bitwright.train import store_in_8_bits
from bitwright.train.storage import StoredLayer

FLOAT, HALF, STORED, NEAREST = KINDS = ("float32", "bfloat16", "8 bits", "8 bits, to nearest")
Figures = tuple[float, int]  # the held-out loss, bytes of the weights


def held(model: nn.Module) -> int:
    """Bytes of the weights between steps: codes and scales, or matrices in float."""
    layers = [m for m in model.modules() if isinstance(m, StoredLayer)]
    return sum(m.codes.nbytes + m.scale.nbytes for m in layers) or sum(
        p.nbytes for p in model.parameters() if p.ndim > 1
    )


def as_kind(model: nn.Module, kind: str, compute: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model with its weights held as `kind` says; compute: what 8 bits are decoded to."""
    if kind in (FLOAT, HALF):
        return model.to(torch.bfloat16 if kind == HALF else torch.float32)
    return store_in_8_bits(model, dtype=compute, stochastic=kind == STORED)


def float_type(kind: str) -> torch.dtype:
    """Of the inputs."""
    return torch.bfloat16 if kind == HALF else torch.float32


def classifier(kind: str) -> Figures:
    """A network of 75 thousand weights learns the classes that another gives: 400 steps of AdamW on batches of 64."""
    g = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        x = torch.randn(5120, 32, generator=g)
        y = (3 * teacher(x)).argmax(1)
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    model, x = as_kind(plain, kind, torch.float32), x.to(float_type(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(400):
        some = torch.arange(step * 64, step * 64 + 64) % 4096
        optimizer.zero_grad()
        functional.cross_entropy(model(x[some]).float(), y[some]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(functional.cross_entropy(model(x[4096:]).float(), y[4096:])), held(model)


def regression(kind: str, seeds: int = 10) -> Figures:
    """The mean loss of ten networks, each 100 steps of Adam at 0.1 on the whole set."""
    losses = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        sets = [(x.to(float_type(kind)), y.to(float_type(kind))) for x, y in map(regression_mlp.data, (10_000, 1_000))]
        model = as_kind(regression_mlp.network(), kind, torch.float32)
        regression_mlp.train(model, *sets[0])
        with torch.no_grad():
            losses.append(float(functional.mse_loss(model(sets[1][0]).float(), sets[1][1].float())))
    return mean(losses), held(model)


def drawn(kind: str) -> Figures:
    """Three epochs of the digits, as bench/digits.py trains them; the loss on 2,000 images."""
    x, y, x_test, y_test = (*drawn_digits(8_000, seed=0), *drawn_digits(2_000, seed=1))
    torch.manual_seed(0)
    model = as_kind(digits.network(), kind)
    digits.train(model, x.to(float_type(kind)), y, epochs=3, rate=1e-3)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part.to(float_type(kind))).float() for part in x_test.split(250)])
    return float(functional.cross_entropy(logits, y_test)), held(model)


def language(kind: str, steps: int, batch: int = 16, length: int = 128) -> Figures:
    """AdamW at 0.001, rising for 20 steps and falling to a tenth; the loss on the text's last twentieth, 8,192 tokens of it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "src/bitwright/builtin")
    text = (SHARED / "text/wiki.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    seen, unseen = ids[: len(ids) * 19 // 20], ids[-64 * length - 1 :]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = as_kind(LlamaForCausalLM(config), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
    )
    g = torch.Generator().manual_seed(0)

    def loss(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1]).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    for _ in range(steps):
        at = torch.randint(len(seen) - length - 1, (batch,), generator=g)
        optimizer.zero_grad()
        loss(torch.stack([seen[i : i + length + 1] for i in at])).backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        windows = unseen.unfold(0, length + 1, length)
        return float(torch.stack([loss(part) for part in windows.split(16)]).mean()), held(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="classifier,regression,digits,language")
    parser.add_argument("--steps", type=int, default=400, help="of language")
    args = parser.parse_args()
    tasks: dict[str, Callable[[str], Figures]] = {
        "classifier": classifier, "regression": regression, "digits": drawn,
        "language": partial(language, steps=args.steps),
    }  # fmt: skip
    rows = []
    for name in args.tasks.split(","):
        for kind in KINDS:
            loss, size = tasks[name](kind)
            rows.append([name, kind, f"{loss:.4f}", f"{size:,}"])
            print(*rows[-1], flush=True)
    print(table(["task", "weights", "held-out loss", "bytes of weights"], rows))


if __name__ == "__main__":
    main()
