"""One device for the whole model: parsed or refused, and everything that is computed is computed there."""

from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright import api
from bitwright.errors import InputError
from bitwright.inference import loading
from bitwright.methods import METHODS
from bitwright.numerics.codec import decode
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline import quantize as pipeline
from bitwright.plan import preflight
from bitwright.system.device import CPU, device_in, device_of
from pretended_device import DEVICE, Pretended


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu") == device_in(None) == device_in("cpu") == device_in({"": "cpu"}) == device_in(CPU) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_in("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert device_of("cuda") == device_in("auto") == device_in(0) == device_in({"": "cuda"}) == first
    assert device_of("cuda:1") == device_in({"": 1}) == device_in(second) == second


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "gpu", "cuda:x", "mps", ""])
def test_a_device_that_is_not_there_has_a_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as refused:
        device_of(name)
    assert "cpu" in refused.value.remedy.lower()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="number 3"):
        device_of("cuda:3")


@pytest.mark.parametrize("several", ["balanced", "sequential", {"model.layers": "cpu", "lm_head": "cuda"}, {}])
def test_a_map_to_several_devices_is_refused(several: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"several devices|map of the model") as refused:
        device_in(several)
    assert "one device" in refused.value.remedy


@pytest.mark.parametrize("method", ["rtn", "search", "gptq"])
def test_methods_give_the_same_codes_on_another_device(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(4, 32, generator=generator), torch.randn(64, 32, generator=generator)
    gram, scheme = x.T @ x / 64, Scheme.parse("int4-g16")
    meant = METHODS[method](w, gram, scheme).q
    with Pretended():
        there = METHODS[method](w.to(DEVICE), gram.to(DEVICE), scheme).q
        assert there.codes.device == DEVICE
        found = there.to(CPU)
    assert torch.equal(decode(found), decode(meant))


def test_a_run_an_evaluation_and_a_loaded_model_on_another_device(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is mixed with the CPU's tensors, and every number is as there."""
    for module in (pipeline, api):
        monkeypatch.setattr(module, "device_of", lambda name: DEVICE if name == "cuda" else CPU)
    monkeypatch.setattr(loading, "device_in", lambda name: DEVICE if name == "cuda" else CPU)
    monkeypatch.setattr(preflight, "best_dtype", lambda device: torch.float32)
    sizes = {
        "scheme": "int4-g32",
        "method": "rtn",
        "activations": "int8-tensor",
        "calib": text,
        "samples": 4,
        "seqlen": 32,
    }
    here, there = tmp_path / "here", tmp_path / "there"
    meant = bitwright.quantize(llama, here, **sizes)
    with Pretended():
        found = bitwright.quantize(llama, there, **sizes, device="cuda")
    for a, b in zip(meant.ledger, found.ledger, strict=True):
        assert (a.name, a.method) == (b.name, b.method)
        assert a.loss is None or a.loss == pytest.approx(b.loss, rel=1e-4)
    judged = {"reference": llama, "text": text, "seqlen": 32, "tokens": 128}
    with Pretended():
        cost = bitwright.evaluate(there, **judged, device="cuda")
    assert cost.kl_mean == pytest.approx(bitwright.evaluate(here, **judged).kl_mean, rel=1e-3)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        meant_logits = bitwright.load(here)(ids).logits
        with Pretended():
            model = bitwright.load(there, device_map="cuda")
            logits = model(ids.to(DEVICE), use_cache=False).logits
            assert logits.device == DEVICE and all(p.device == DEVICE for p in model.parameters())
            logits = logits.to(CPU)
    assert float((logits - meant_logits).norm()) < 1e-2 * float(meant_logits.norm())  # inputs are rounded to 8 bits
