"""What n-gram look-ahead gains: tokens a second with and without it, on code to be changed, texts to be summed up, and prose.

    python -m bench.lookahead MODEL [--scheme int4-g64] [--lookahead 8] [--tokens 128]

Greedy, on chat prompts where the model has a template; whether the text is the same with and without look-ahead is said too.
"""

import argparse
import time
from pathlib import Path

import torch

from bench.measure import table
from bitwright.inference.decoder import Decoder
from bitwright.inference.decoding import tokens
from bitwright.inference.generation import Generator, conversation
from bitwright.inference.sampling import Sampling

CODE = """def total(prices, discount):
    result = 0
    for price in prices:
        if price < 0:
            raise ValueError("a price must not be negative")
        result += price * (1 - discount)
    return result
"""
TEXT = """The harbour of the old town was closed for three days after the storm. On the first day the wind tore two boats from
their moorings, on the second the water stood in the lower streets, and on the third the town council met to decide who should
pay for the broken wall. The fishermen said that the council had been warned; the council said that nobody could have known."""
PROMPTS = {
    "code": f"Rename the variable `result` to `amount` in this function and repeat the whole function:\n\n{CODE}",
    "summary": f"Sum up this text, quoting its important sentences:\n\n{TEXT}",
    "prose": "Tell a short story about a clockmaker who moves to a town by the sea.",
}


class Counted:
    """How many tokens a decoder read beyond the one that had to be read."""

    def __init__(self, decoder: Decoder) -> None:
        self.read, self.extra = decoder.read, 0
        decoder.read = self._counted  # type: ignore[method-assign]

    def _counted(self, parts: list) -> list:  # type: ignore[type-arg]
        self.extra += sum(part.wanted - 1 for part in parts)
        return self.read(parts)


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with alike: rounding may turn two that are equally likely."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def written(generator: Generator, ids: list[int], most: int, lookahead: int) -> tuple[list[int], float]:
    """Tokens behind a prompt, and how many a second, the prompt not counted."""
    found, begun = [], 0.0
    stream = tokens(
        generator.decoder, torch.tensor(ids), most=most, stop=generator.stop(), sampling=Sampling(), lookahead=lookahead
    )
    for token in stream:
        begun = begun or time.perf_counter()
        found.append(token)
    return found, (len(found) - 1) / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme")
    parser.add_argument("--lookahead", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    generator = Generator.open(args.model, scheme=args.scheme, context=1024)
    rows, counted = [], Counted(generator.decoder)
    for name, prompt in PROMPTS.items():
        has_template = bool(generator.tokenizer.chat_template)
        messages = [{"role": "user", "content": prompt}]
        ids = conversation(generator.tokenizer, messages) if has_template else generator.tokenizer.encode(prompt)
        written(generator, ids, 4, 0)  # warm up
        plain, slow = written(generator, ids, args.tokens, 0)
        counted.extra, steps = 0, len(plain)
        ahead, fast = written(generator, ids, args.tokens, args.lookahead)
        same = "yes" if plain == ahead else f"up to token {common(plain, ahead)}"
        rows.append([name, str(steps), f"{slow:.1f}", f"{fast:.1f}", f"{fast / slow:.2f}", str(counted.extra), same])
    head = ["", "tokens", "tok/s", f"with {args.lookahead} ahead", "×", "proposed", "same text"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
