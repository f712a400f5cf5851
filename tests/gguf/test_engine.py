"""Inputs rounded as llama.cpp rounds them, beside loops that do it number by number."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from typer.testing import CliRunner

from bitwright.api import evaluate, quantize
from bitwright.calibration.windows import load_tokenizer, windows
from bitwright.cli.app import app
from bitwright.errors import InputError
from bitwright.gguf.block_types import Types
from bitwright.gguf.input_rounding import inputs_of
from bitwright.models.config import read_config
from bitwright.models.families import model_of
from bitwright.models.source import open_weights
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.conversion import convert
from conftest import make_checkpoint


def by_hand(row: list[float], size: int) -> list[float]:
    """A row of inputs through quantize_row_q8_0 (32) or quantize_row_q8_K (256), one number at a time, in float32."""
    found = []
    for at in range(0, len(row), size):
        block = [np.float32(v) for v in row[at : at + size]]
        scale = max(abs(v) for v in block) / np.float32(127)
        stored = np.float32(np.float16(scale)) if size == 32 else scale
        found += [float(np.rint(v / scale) * stored) if scale else 0.0 for v in block]
    return found


def inputs() -> Tensor:
    """Blocks of all sizes: one of zeros, some whose f16 scale is not a normal number."""
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 6)[:, None]
    x[2, 32:64] = 0
    x[3, 256:] = 0
    return x


@pytest.mark.parametrize(("kind", "size"), [(Types.Q4_0, 32), (Types.Q5_1, 32), (Types.Q6_K, 256), (Types.IQ4_XS, 256)])
def test_number_by_number(kind: Types, size: int) -> None:
    x, rounding = inputs(), inputs_of(kind)
    assert rounding is not None
    before = x.clone()
    found = rounding(x.view(2, 3, 512))
    expected = torch.tensor([by_hand(row, size) for row in x.tolist()])
    assert torch.equal(found.view(6, 512), expected)
    assert torch.equal(x, before)
    assert not torch.equal(found.view(6, 512), x)


def test_every_type_has_an_answer() -> None:
    """By llama.cpp's table: 256 inputs under a float32 for the k-quants, IQ (but IQ4_NL) and TQ types; 32 under an f16 else."""
    small = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"]
    large = [f"Q{bits}_K" for bits in range(2, 7)] + [
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
    ]
    found = {name: inputs_of(Types[name]) for name in [*small, *large, "IQ4_XS", "TQ1_0", "TQ2_0"]}
    for name, rounding in found.items():
        assert rounding is not None
        assert (rounding.size, rounding.dtype) == ((32, torch.float16) if name in small else (256, torch.float32))
    assert not any(inputs_of(Types[name]) for name in ("F32", "F16", "BF16"))


class ByHand(nn.Module):
    """A linear layer whose inputs are rounded by the loop above."""

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__()
        self.weight, self.size = weight, size

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, K]."""
        rows = [by_hand(row, self.size) for row in x.flatten(0, 1).tolist()]
        return nn.functional.linear(torch.tensor(rows).view(x.shape), self.weight)


@pytest.mark.parametrize(("scheme", "tied"), [("q4_k_s", True), ("q5_0", False)])
def test_eval_computes_as_the_engine(scheme: str, tied: bool, tmp_path: Path, text: str) -> None:
    """Every matrix, the head among them; types that meet blocks of 256 and of 32 inputs; keys and values as f16."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    source = make_checkpoint(tmp_path / "source", **sizes, initializer_range=0.1)
    file = tmp_path / "a.gguf"
    quantize(source, file, scheme=scheme, method="rtn", calib="none")
    ids = windows(load_tokenizer(source), text, seqlen=16, vocabulary=257)[:2]
    weight_source, model = open_weights(file), model_of(read_config(source)).eval()
    model.load_state_dict({name: weight_source.read(name).float() for name in weight_source.shapes}, strict=False)
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            stored = f"{name}.weight" if f"{name}.weight" in weight_source.shapes else "model.embed_tokens.weight"
            size = 256 if weight_source.describe(stored)[0].endswith("_k") else 32
            setattr(model.get_submodule(parent), leaf, ByHand(module.weight.detach(), size))
    cache = DynamicCache()
    plain_update = cache.update
    cache.update = lambda k, v, *more: plain_update(  # type: ignore[method-assign]
        *(torch.from_numpy(t.numpy().astype(np.float16).astype(np.float32)) for t in (k, v)), *more
    )
    with torch.no_grad():
        log_p = model(ids, past_key_values=cache, use_cache=True).logits[:, :-1].log_softmax(-1)
    expected = math.exp(-float(log_p.gather(-1, ids[:, 1:, None]).mean()))
    found, plain = (
        evaluate(file, text=text, seqlen=16, tokens=32, engine=engine).perplexity for engine in ("llama.cpp", None)
    )
    assert abs(found / expected - 1) < 1e-6 < 1e-4 < abs(plain / expected - 1)


def test_engines_that_do_not_run_a_file_are_refused(llama: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"llama\.cpp does not run directories"):
        evaluate(llama, text=text, engine="llama.cpp")
    done = CliRunner().invoke(app, ["eval", str(llama), "--text", text, "--engine", "vllm", "--json"])
    assert done.exit_code == 2
    assert "unknown engine 'vllm'" in done.stdout


def test_float_matrices_meet_float_inputs(llama: Path, tmp_path: Path, text: str) -> None:
    """Only keys and values differ."""
    convert(llama, tmp_path / "a.gguf", None)
    plain, rounded = (StreamedModel(tmp_path / "a.gguf", engine=engine) for engine in (None, "llama.cpp"))
    ids = windows(load_tokenizer(llama), text, seqlen=16, vocabulary=257)[:2]
    a, b = (torch.cat(streamed.hidden(ids)) for streamed in (plain, rounded))
    assert 0 < float((a - b).abs().max()) < 1e-3 * float(a.abs().max())
