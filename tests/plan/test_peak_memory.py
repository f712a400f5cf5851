"""Preflight's estimate of memory beside what the process really takes."""

import sys

import pytest
import torch

from bitwright.formats import Layer
from bitwright.methods import gptq
from bitwright.numerics.scheme import Scheme
from bitwright.plan import preflight
from bitwright.system.memory import STATUS, forget_peak, peak_since, return_memory


def resident() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the largest resident set is counted anew on Linux only")
def test_rounding_a_tall_matrix_takes_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding has many parts of `AT_ONCE` weights: counting 30 bytes for each weight would say three times as much."""
    monkeypatch.setattr(sys.modules["bitwright.methods.gptq"], "AT_ONCE", 1 << 20)
    monkeypatch.setattr(preflight, "AT_ONCE", 1 << 20)
    N, K, scheme = 1 << 16, 64, Scheme.parse("int6-g16-signed-f16")
    w, gram = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.eye(K)
    gptq(w[:8].float(), gram, scheme)  # what is set up at first use
    return_memory()
    forget_peak()
    before = resident()
    if peak_since() > 1.05 * before:
        pytest.skip("this system does not let a process reset its peak")
    gptq(w.float(), gram, scheme)
    said = preflight._rounding_bytes(Layer("embedding", N, K, scheme), gram=True)
    assert said == pytest.approx(peak_since() - before, rel=0.3)
