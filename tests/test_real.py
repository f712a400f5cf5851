"""A real language model, quantized for real: 30 blocks, massive activations, an attention sink. See smollm2.py."""

import os
from pathlib import Path

import pytest

from bitwright.api import evaluate, quantize

FOLDER = Path(__file__).parents[1] / "build/smollm2"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if not (FOLDER / "model.safetensors").exists():
        assert not os.environ.get("BITWRIGHT_REQUIRE_SMOLLM2"), "python tests/smollm2.py build/smollm2 has not been run"
        pytest.skip("python tests/smollm2.py build/smollm2 makes the model")
    return FOLDER


def test_the_default_beats_a_search_of_scales(smollm2: Path, tmp_path: Path) -> None:
    """Few windows: GPTQ's feedback and GPTAQ's correction must still help, in each block and in the end."""
    kl = {}
    for method in (None, "search"):
        out = tmp_path / str(method)
        done = quantize(smollm2, out, scheme="int3-g64-asym", method=method, calib="stdlib", samples=6, seqlen=512)
        assert not done.fallbacks
        for e in done.ledger:
            if method is None and e.block_error is not None and e.block_error_search is not None:
                assert e.block_error < e.block_error_search
        cost = evaluate(out, reference=smollm2, text="stdlib-heldout", seqlen=512, tokens=1024)
        kl[method] = cost.kl_mean or 0.0
    print(kl)
    assert kl[None] < 0.6 * kl["search"]
