"""Preflight's estimate of memory beside what a process really takes."""

import os
import subprocess
import sys

import pytest

from bitwright.formats import Layer
from bitwright.numerics.scheme import Scheme
from bitwright.plan import peak_memory

N, K, SCHEME, AT_ONCE = 1 << 16, 64, "int6-g16-signed-f16", 1 << 20
# A process of its own: the memory that other tests have freed would be taken again.
MEASURED = f"""
import sys
import torch
from bitwright.methods import gptq
from bitwright.numerics.scheme import Scheme
from bitwright.system.memory import STATUS, forget_peak, peak_since, return_memory

sys.modules["bitwright.methods.gptq"].AT_ONCE = {AT_ONCE}
torch.set_num_threads(1)
scheme, gram = Scheme.parse({SCHEME!r}), torch.eye({K})
w = torch.randn({N}, {K}, generator=torch.Generator().manual_seed(0)).bfloat16()
gptq(w[:8].float(), gram, scheme)  # what is set up at first use
return_memory()
forget_peak()
line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
before = int(line.split()[1]) * 1024
if peak_since() > 1.05 * before:
    print("a process cannot reset its peak")
else:
    gptq(w.float(), gram, scheme)
    print(peak_since() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the largest resident set is counted anew on Linux only")
def test_rounding_a_tall_matrix_takes_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding has many parts of `AT_ONCE` weights: counting 30 bytes for each weight would say three times as much."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", MEASURED], env=environment, check=True, capture_output=True, text=True
    )
    if not child.stdout.strip().isdigit():
        pytest.skip(child.stdout)
    monkeypatch.setattr(peak_memory, "AT_ONCE", AT_ONCE)
    said = peak_memory._rounding_bytes(Layer("embedding", N, K, Scheme.parse(SCHEME)), gram=True)
    assert said == pytest.approx(int(child.stdout), rel=0.3)
