"""Outputs that are known from an earlier pass change no byte of a result, and spare products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitwright
from conftest import make_checkpoint

NUMBERS = " ".join(str(n) for n in range(3000))


def quantized(model: Path, out: Path, text: Path, kept: int, **options: Any) -> tuple[bytes, int]:
    """The weights of the model by GPTAQ, and how many products attention took for them; kept: bytes that may be kept."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for user in ("pipeline.sequential", "calibration.observe"):
            patch.setattr(f"bitwright.{user}.KEPT_BYTES", kept)
        patch.setattr("bitwright.pipeline.calibration_pass.TOKENS_PER_BATCH", 64)
        attention = nn.functional.scaled_dot_product_attention
        patch.setattr(
            nn.functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), attention(*a, **k))[1]
        )
        how = {"scheme": "int4-g32", "method": "gptaq", "samples": 12, "seqlen": 32} | options
        bitwright.quantize(model, out, format="bitwright", calib=str(text), **how)
    return b"".join(file.read_bytes() for file in sorted(out.glob("*.safetensors"))), len(calls)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi"])
def test_known_outputs_change_no_byte(family: str, tmp_path: Path) -> None:
    model, text = make_checkpoint(tmp_path / "model", family, torch.float32), tmp_path / "text.txt"
    text.write_text(NUMBERS)
    anew, all_calls = quantized(model, tmp_path / "anew", text, 0)
    known, calls = quantized(model, tmp_path / "known", text, 1 << 20)
    some, some_calls = quantized(model, tmp_path / "some", text, 12 * 32 * 64)  # a few batches
    assert known == anew == some
    assert calls < all_calls and calls <= some_calls <= all_calls
