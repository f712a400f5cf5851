"""`finetune --scales-only`: a quantized model's scales and norms learn from a teacher; the result is what was judged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitwright import quantize
from bitwright.errors import BitwrightError, RecipeError
from bitwright.methods.rtn import rtn
from bitwright.models.source import open_weights
from bitwright.numerics.codec import decode, per_column
from bitwright.numerics.scheme import Scheme
from bitwright.train.finetune import finetune
from bitwright.train.scaled_linear import ScaledLinear
from bitwright.train.settings import Training

HOW = Training(scales_only=True, steps=6, batch=2, seqlen=32, lr=2e-2, save_every=99)


@pytest.mark.parametrize(
    "scheme", ["int3-g32", "int4-g64-asym", "int4-g32-min", "int8-channel", "int4-tensor", "nf4-g64"]
)
def test_the_gradient_is_that_of_the_decoded_weight(scheme: str) -> None:
    q = rtn(torch.randn(48, 128), None, Scheme.parse(scheme)).q
    layer, x = ScaledLinear(q, torch.randn(48)), torch.randn(2, 3, 128, requires_grad=True)
    with torch.no_grad():
        layer.factor.mul_(torch.rand_like(layer.factor) + 0.5)
    factor = layer.factor.detach().clone().requires_grad_(True)
    plain = x.detach().clone().requires_grad_(True)
    y = plain @ (decode(q) * per_column(factor, q.scheme, 128)).T + layer.bias
    dy = torch.randn_like(y)
    y.backward(dy)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.factor.grad, factor.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, plain.grad)
    layer.factor.grad = None
    (x @ layer.weight.T).backward(dy)  # as Mamba reads it
    torch.testing.assert_close(layer.factor.grad, factor.grad, rtol=1e-4, atol=1e-4)
    scaled = decode(q) * per_column(factor.detach(), q.scheme, 128)
    torch.testing.assert_close(decode(layer.scaled()), scaled, rtol=1e-3, atol=5e-3)  # a minimum and scales cancel


FORMATS = {"compressed-tensors": "int4-g32-asym", "gptq": "int3-g32", "bitwright": "int2-g32"}


@pytest.mark.parametrize("name", FORMATS)
def test_the_result_is_a_checkpoint_of_what_was_judged(name: str, llama: Path, text: str, tmp_path: Path) -> None:
    quantized, out = tmp_path / "q", tmp_path / "out"
    quantize(llama, quantized, scheme=FORMATS[name], method="rtn", format=name, calib="none")
    report = finetune(quantized, out, data=text, how=replace(HOW, teacher=llama))
    assert report.loss_after < 0.9 * report.loss_before or "int4" in FORMATS[name]  # there it is next to nothing
    before, after = open_weights(quantized), open_weights(out)
    codes = [s.quantized("model.layers.1.mlp.up_proj.weight") for s in (before, after)]
    assert torch.equal(codes[0].codes, codes[1].codes) and not torch.equal(codes[0].scales.scale, codes[1].scales.scale)
    assert not torch.equal(*(s.read("model.norm.weight") for s in (before, after)))
    again = finetune(out, tmp_path / "again", data=text, how=replace(HOW, teacher=llama, steps=1, batch=12, lr=1e-9))
    assert again.loss_before == pytest.approx(report.loss_after, rel=1e-3)
    assert not (out / "ledger.jsonl").exists() and (out / "tokenizer.json").is_file()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(llama: Path, text: str, tmp_path: Path) -> None:
    quantized, how = tmp_path / "q", replace(HOW, steps=4, save_every=2)
    quantize(llama, quantized, scheme="int2-g32", method="rtn", format="bitwright", calib="none")
    finetune(quantized, tmp_path / "whole", data=text, how=how)

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(quantized, tmp_path / "cut", data=text, how=how, progress=stop)
    steps: list[int] = []
    finetune(quantized, tmp_path / "cut", data=text, how=how, progress=lambda _, done, total: steps.append(done))
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert steps == [3, 4] and whole == cut != (quantized / "model.safetensors").read_bytes()


def test_what_has_no_scales_to_train_is_refused(llama: Path, text: str, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "q", scheme="nf4-g64-dq", method="rtn", format="bitsandbytes", calib="none")
    quantize(llama, tmp_path / "q.gguf", scheme="q4_0", method="rtn", calib="none")
    for source, said in ((llama, "in float"), (tmp_path / "q", "scales in float"), (tmp_path / "q.gguf", "GGUF")):
        with pytest.raises(BitwrightError, match=said) as caught:
            finetune(source, tmp_path / "out", data=text, how=HOW)
        assert caught.value.remedy and not list(tmp_path.glob("out*"))
    with pytest.raises(RecipeError, match="dora is of one"):
        replace(HOW, dora=True)
