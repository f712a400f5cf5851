"""LoRA of peft's beside the quantized weights of a loaded model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitwright import load, prepare_for_training, quantize
from bitwright.errors import FormatError, RecipeError
from bitwright.inference import dense
from bitwright.inference.dense import Dense
from bitwright.inference.qlinear import QLinear
from bitwright.methods.rtn import rtn
from bitwright.models.adapter import Adapter
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource
from bitwright.numerics.codec import decode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.scheme import Scheme
from bitwright.train.lora import Lora, unlike_linear
from bitwright.train.settings import Training

peft = pytest.importorskip("peft")
IDS = torch.tensor([[10, 200, 3, 77, 5, 5, 130, 64, 9, 8]])


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """With adapters that are not zero at the start."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the loss of the next token, for all that is trained."""
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_learn_what_they_learn_beside_the_decoded_model(
    options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(llama, out, scheme="nf4-g64-dq", method="rtn", format="bitsandbytes", calib="none")
    source, dense = WeightSource(out), AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    weights = {f"{m}.weight": source.read(f"{m}.weight") for m in source.modules}
    dense.load_state_dict(weights, strict=False)
    meant = gradients(adapted(dense, **options))
    model = adapted(prepare_for_training(load(out)), **options)
    found = gradients(model)
    assert len(found) == 3 * 7 * (3 if options else 2)
    assert found.keys() == meant.keys()
    for name, gradient in found.items():
        assert float((gradient - meant[name]).norm()) < 2e-3 * float(meant[name].norm()), name


def test_what_is_trained_is_saved_as_peft_does_and_cannot_be_merged_unseen(llama: Path, tmp_path: Path) -> None:
    model = adapted(prepare_for_training(load(llama, scheme="int4-g64", dtype=torch.bfloat16)))
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {torch.float32}
    gradients(model)
    model.save_pretrained(tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    there = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").state_dict()
    own = {name: p for name, p in model.state_dict().items() if "lora_" in name}
    assert own and all(torch.equal(p.float(), there[name].float()) for name, p in own.items())
    with pytest.raises(FormatError, match="cannot be written"):
        model.merge_and_unload()


@pytest.mark.parametrize("inputs", [None, "int8-token", "int8-tensor", "rotated"])
def test_the_gradient_is_the_decoded_weight_s(inputs: str | None) -> None:
    q = rtn(torch.randn(80, 128), None, Scheme.parse("int4-g64-asym")).q
    how = None if inputs is None else InputQuantization(rotate=64) if inputs == "rotated" else Scheme.parse(inputs)
    layer = QLinear(q, input_quantization=InputQuantization(how) if isinstance(how, Scheme) else how)
    x, dy = torch.randn(3, 128, requires_grad=True), torch.randn(3, 80)
    layer(x).backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dy @ layer.weight.as_subclass(Tensor), rtol=1e-4, atol=1e-4)
    if inputs is None:
        torch.testing.assert_close(layer.weight.as_subclass(Tensor), decode(q), rtol=1e-3, atol=1e-4)


def test_few_inputs_have_a_gradient_beside_a_float_weight_too() -> None:
    layer, x = Dense(torch.randn(8, 16)), torch.randn(1, 16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0, keepdim=True))


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_multiply_in_another_type(kept: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever type a weight is kept in, and no copy of a weight is kept for the way back."""
    monkeypatch.setattr(dense, "WEIGHTS_AT_ONCE", 1000)
    w, dy, saved = torch.randn(48, 128).to(kept), torch.randn(200, 48), list[Tensor]()

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    q = rtn(w.float(), None, Scheme.parse("int4-g64")).q
    for layer, meant in ((Dense(w), w.float()), (QLinear(q), decode(q))):
        x = torch.randn(200, 128, requires_grad=True)
        layer.multiplies_in = torch.bfloat16
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(x)
        y.backward(dy)
        assert x.grad is not None and y.dtype == x.grad.dtype == torch.float32
        for found, wanted in ((y.detach().float(), x.detach() @ meant.T), (x.grad, dy @ meant)):
            assert float((found - wanted).norm() / wanted.norm()) < 0.005
    head = Dense(w)
    head.multiplies_in = head.gives = torch.bfloat16
    assert head(torch.randn(3, 128)).dtype == torch.bfloat16
    assert sum(t.numel() for t in saved if t.data_ptr() != w.data_ptr()) < w.numel()


@pytest.mark.parametrize("source", ["float", "packed"])
def test_the_embedding_can_be_trained_too(source: str, llama: Path, tmp_path: Path) -> None:
    """Whole, beside an adapter, or by virtual tokens; a whole one loads beside a model not prepared, too."""
    path, scheme = llama, {"scheme": "nf4-g64-dq"}
    if source == "packed":
        path, scheme = tmp_path / "model.gguf", {}
        quantize(llama, path, scheme="q8_0", method="rtn", calib="none")
    ways = {
        "whole": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "beside": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
        "virtual": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    for way, config in ways.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(prepare_for_training(load(path, **scheme)), config)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
        assert way == "virtual" or any("embed" in name for name in moved), (way, moved)
        model.save_pretrained(tmp_path / way)
        fresh = load(path, **scheme) if way == "whole" else prepare_for_training(load(path, **scheme))
        fresh = peft.PeftModel.from_pretrained(fresh, tmp_path / way).eval()
        with torch.no_grad():
            found, meant = fresh(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
        assert float((found - meant).float().norm()) < 1e-2 * float(meant.float().norm()), way


def test_tokens_can_be_added(llama: Path) -> None:
    model = load(llama, scheme="int4-g64", dtype=torch.bfloat16)
    before = model(IDS).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    after = model(torch.cat([IDS, torch.tensor([[299]])], 1)).logits
    assert after.shape[-1] == 300
    torch.testing.assert_close(after[:, : IDS.shape[1], : before.shape[-1]], before, rtol=0.05, atol=0.05)


# Routers and states that no Linear holds, a Linear that returns two tensors, norms that keep their input's type.
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "jamba", "gemma3n_text", "recurrent_gemma"])
def test_models_whose_weights_are_not_all_in_layers_are_trained_in_16_bits(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    base = prepare_for_training(load(tmp_path, scheme="int4-g32", dtype=torch.bfloat16))
    norms = [m for n, m in base.get_decoder().named_modules() if n.endswith("norm")]
    seen: list[Any] = []
    norms[-1].register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", exclude_modules=unlike_linear(base) or None, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config).train()
    assert gradients(model)
    assert set(seen) == {torch.float32}
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter, skeleton = Adapter(tmp_path / "adapter"), Skeleton(read_config(tmp_path), torch.float32)
    adapter.check(skeleton)
    assert any(".experts.3.down_proj" in name for name in adapter.deltas) is ("gemma" not in kind)


def test_adapters_of_experts_are_loaded_again(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    model = adapted(prepare_for_training(load(tmp_path, dtype=torch.float32))).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(
        prepare_for_training(load(tmp_path, dtype=torch.float32)), tmp_path / "adapter"
    )
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    # transformers' own model has the experts of a layer in one parameter: peft converts the adapter
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    beside = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    torch.testing.assert_close(beside(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)


def test_modules_that_share_their_weights_get_no_adapter(tmp_path: Path) -> None:
    """A merged model could not hold what is added to one of them; Zamba 2's shared blocks are such modules."""
    from peft.tuners.lora import LoraLayer

    tiny_model("zamba2").save_pretrained(tmp_path / "model")
    path, how = tmp_path / "model", Training(rank=2, scheme="float")
    trained = Lora(path, how, None, torch.float32, b"{}")
    adapted = {n for n, m in trained.adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert "model.layers.1.shared_transformer.self_attn.q_proj" in trained.shared
    assert adapted and not adapted & set(trained.shared)
    assert "share their weights" in trained.notes[0]
    trained.save(tmp_path / "adapter")
    Adapter(tmp_path / "adapter").check(Skeleton(read_config(path), torch.float32))
    with pytest.raises(RecipeError, match="shares its weight") as caught:
        Lora(path, replace(how, targets=("q_proj",)), None, torch.float32, b"{}")
    assert "--targets" in caught.value.remedy
