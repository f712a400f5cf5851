"""The loss and its gradient beside torch's."""

import pytest
import torch
from torch.nn import functional

from bitwright.train import cross_entropy as module
from bitwright.train.cross_entropy import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokens at a time, one of them far from likely, some that do not count."""
    monkeypatch.setattr(module, "AT_ONCE", 4 * 50)
    g = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(11, 50, generator=g)).to(dtype)
    wanted = torch.randint(50, (11,), generator=g)
    wanted[2], wanted[10] = -100, -100
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = cross_entropy(ours, wanted, -100, over=3)
    meant = 1 / 3 * functional.cross_entropy(theirs.float(), wanted, reduction="sum", ignore_index=-100)
    (found / 7).backward()
    (meant / 7).backward()
    torch.testing.assert_close(found, meant)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not bool(ours.grad[[2, 10]].any())


def test_by_finite_differences() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float().requires_grad_()
    wanted = torch.tensor([0, 6, -1, 3, 3])
    cross_entropy(x, wanted, -1).backward()
    assert x.grad is not None
    for i, j in ((0, 0), (1, 2), (2, 2), (4, 3)):
        step = torch.zeros(5, 7)
        step[i, j] = 1e-2
        difference = cross_entropy(x.detach() + step, wanted, -1) - cross_entropy(x.detach() - step, wanted, -1)
        assert float(x.grad[i, j]) == pytest.approx(float(difference) / 2e-2, abs=2e-3)


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    with torch.no_grad():
        assert not cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), -1).requires_grad
