"""Whether a model keeps packed conversations apart, found by trying; and each conversation by itself for one that does not.

transformers masks packed sequences apart where positions begin anew. Not all models take that mask: those with ALiBi, say, or
with states that go from token to token.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bitwright.train.data import Windows

BEFORE, BEHIND = 16, 8  # tokens of two packed texts
SAME = 1e-4  # difference of logits, as a share of the largest, that is rounding where the same is computed
NEAR = 0.05  # where the same is computed in other shapes

Logits = Callable[[nn.Module, Windows], Tensor]


@torch.no_grad()
def keeps_apart(model: nn.Module, logits: Logits, vocabulary: int) -> bool:
    """Whether a text in a packed window is read as if it stood alone, whatever is before it. logits: [n, V] of windows."""
    drawn = torch.randint(0, vocabulary, (2, BEFORE), generator=torch.Generator().manual_seed(0))
    text = torch.arange(1, 1 + BEHIND)[None] % vocabulary
    places = torch.cat([torch.arange(BEFORE), torch.arange(BEHIND)])[None]
    training = model.training
    model.eval()
    packed = [torch.cat([one[None], text], 1) for one in drawn]
    first, second = (logits(model, Windows(ids, ids, places))[BEFORE:].float() for ids in packed)
    alone = logits(model, Windows(text, text)).float()
    model.train(training)
    same = float((first - second).abs().amax()) <= SAME * float(first.abs().amax())
    return same and float((first - alone).norm()) <= NEAR * float(alone.norm())


def one_by_one(windows: Windows) -> Iterator[Windows]:
    """Each conversation of packed windows that has tokens that count, as a window [1, T] of its own."""
    assert windows.positions is not None
    for ids, labels, positions in zip(windows.ids, windows.labels, windows.positions, strict=True):
        begins = [int(i) for i in (positions == 0).nonzero()]
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            if bool((labels[begin + 1 : end] >= 0).any()):
                yield Windows(ids[None, begin:end], labels[None, begin:end])
