"""Training on weights in 8 bits: it learns as in float, stalls without stochastic rounding, is saved exactly."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright import quantize_dynamic
from bitwright.errors import RecipeError
from bitwright.train.storage import StoredLayer, decode_from_8_bits, store_in_8_bits


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))


def task() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 8, generator=g)
    return x, (x @ torch.randn(8, 4, generator=g)).argmax(1)


def trained(module: nn.Module, steps: int = 60, lr: float = 1e-3, **options: Any) -> float:
    x, y = task()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return float(functional.cross_entropy(module(x), y))


def test_it_learns_as_in_float_and_stalls_when_rounded_to_nearest() -> None:
    start = float(functional.cross_entropy(net()(task()[0]), task()[1]).detach())
    plain = trained(net(), lr=5e-4)
    stored = trained(store_in_8_bits(net(), dtype=torch.float32), lr=5e-4)
    stalled = trained(store_in_8_bits(net(), dtype=torch.float32, stochastic=False), lr=5e-4)
    assert plain < 0.8 * start
    assert abs(stored - plain) < 0.1 * (start - plain)
    assert start - stalled < 0.7 * (start - plain)  # biases alone are trained


def test_gradients_are_those_of_the_decoded_layers_of_every_kind() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(16, 12), nn.Conv1d(5, 6, 3), nn.Flatten(), nn.Linear(60, 3))
    stored = store_in_8_bits(copy.deepcopy(model), dtype=torch.float32)
    plain = decode_from_8_bits(copy.deepcopy(stored))
    ids = torch.randint(16, (4, 5))
    stored(ids).square().sum().backward()
    plain(ids).square().sum().backward()
    meant = [p.grad for p in plain.parameters()]
    found = {name: p.grad for name, p in stored.named_parameters()}
    assert len(found) == len(meant) == 5
    for name, p in plain.named_parameters():
        stem, _, leaf = name.rpartition(".")
        where = name if leaf == "weight" else f"{stem}.body.{leaf}"
        torch.testing.assert_close(found[where], p.grad, rtol=1e-6, atol=1e-6)


def test_between_steps_only_codes_have_memory_and_nothing_decoded_is_kept_for_the_way_back() -> None:
    model = store_in_8_bits(net(), dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, StoredLayer)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model(task()[0][:2]).sum()
    assert max(kept, default=0) < 64 * 8  # no weight among what is saved
    assert all(layer.weight.untyped_storage().nbytes() == 4 for layer in layers)
    loss.backward()
    assert all(layer.waiting for layer in layers)
    model(task()[0][:2])
    assert not any(layer.waiting for layer in layers)


def test_a_run_that_is_saved_and_loaded_goes_on_to_the_same_weights() -> None:
    whole = store_in_8_bits(net(), dtype=torch.float32)
    trained(whole, 3, lr=1e-2)
    state = copy.deepcopy(whole.state_dict())
    assert {t.dtype for name, t in state.items() if name.endswith("codes")} == {torch.int8}
    assert not any(name.endswith("weight") for name in state)
    other = store_in_8_bits(net(), dtype=torch.float32)
    other.load_state_dict(state)
    for model in (whole, other):
        trained(model, 2, lr=1e-2)
    again = other.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in whole.state_dict().items())


def test_it_becomes_an_integer_module() -> None:
    model = store_in_8_bits(net(), dtype=torch.float32)
    trained(model, 20)
    x = task()[0]
    with torch.no_grad():
        meant = model(x)
        found = quantize_dynamic(decode_from_8_bits(model).eval())(x)
    assert float((found - meant).norm()) < 0.03 * float(meant.norm())


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(RecipeError, match="no Linear"):
        store_in_8_bits(nn.LayerNorm(4))
    tied = nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Linear(4, 8, bias=False)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(RecipeError, match="b shares its weight with a"):
        store_in_8_bits(tied)


class Block(nn.Module):
    """Layers of every kind, read as a transformer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.mixed, self.out = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mixed(self.block(self.words(ids))).mean(1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_module_is_trained_as_it_is_whatever_it_computes_in(dtype: torch.dtype | None, given: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, ids, y = Block().to(given), torch.randint(0, 50, (32, 6)), torch.randint(0, 4, (32,))
    stored = store_in_8_bits(copy.deepcopy(plain), dtype=dtype)
    for module in (plain, stored):
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = functional.cross_entropy(module(ids).float(), y)
            loss.backward()
            optimizer.step()
        assert module(ids).dtype == given and float(loss.detach()) < 0.3
    stored.eval()  # where torch's fast path for transformers would read the weights
    with torch.no_grad():
        fast = stored(ids)
    torch.testing.assert_close(fast, stored(ids).detach(), rtol=0.02, atol=0.02)


def test_what_is_frozen_stays_frozen() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    stored = copy.deepcopy(store_in_8_bits(model))
    before = stored[0].codes.clone()
    trained(stored)
    assert torch.equal(stored[0].codes, before) and not decode_from_8_bits(stored)[0].weight.requires_grad
    thawed = store_in_8_bits(net())
    thawed[0].weight.requires_grad_(False).requires_grad_(True)
    before = thawed[0].codes.clone()
    trained(thawed, lr=1e-2)
    assert not torch.equal(thawed[0].codes, before)


def test_nobody_computes_with_a_weight_that_is_not_there() -> None:
    stored = store_in_8_bits(net())
    assert bool(functional.linear(torch.randn(2, 8), stored[0].weight.float()).isnan().all())
    assert stored[0].in_features == 8 and stored[0].bias.shape == (64,)
    with pytest.raises(AttributeError):
        _ = stored[0].nothing


def test_it_may_be_judged_copied_and_saved_between_the_backward_pass_and_the_step() -> None:
    x, y = task()
    found = []
    for looking in (False, True):
        module = store_in_8_bits(net(), dtype=torch.float32)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            for part, meant in zip(x.chunk(2), y.chunk(2), strict=True):
                functional.cross_entropy(module(part), meant).backward()
            if looking:
                with torch.no_grad():
                    module(x)
                copy.deepcopy(module), module.state_dict()
            optimizer.step()
        found.append(module.state_dict())
    for name, tensor in found[0].items():
        assert name.endswith("updates") or torch.equal(tensor, found[1][name])


def test_scales_stay_exact_in_a_module_of_16_bits_and_a_pickled_one_is_trained_on() -> None:
    module = store_in_8_bits(net(), dtype=torch.float32)
    before = {name: b.clone() for name, b in module.named_buffers()}
    module.bfloat16()
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())
    module = store_in_8_bits(net(), dtype=torch.float32)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert trained(torch.load(file, weights_only=False), 5) == trained(module, 5)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_cast_between_the_backward_pass_and_the_next_use_rounds_no_waiting_weight(stepped: bool) -> None:
    torch.manual_seed(0)
    net, x = store_in_8_bits(nn.Linear(48, 32), dtype=torch.float32), torch.randn(8, 48)
    other = copy.deepcopy(net)
    for cast, one in ((True, net), (False, other)):
        optimizer = torch.optim.SGD([one.get_parameter("weight")], lr=0.1)
        one(x).square().sum().backward()
        if stepped:
            optimizer.step()
        if cast:
            one.to(torch.bfloat16).to(torch.float32)
        assert one.weight.dtype == one.weight.grad.dtype == torch.float32
        if not stepped:
            optimizer.step()
        one(x)
    assert torch.equal(net.get_buffer("codes"), other.get_buffer("codes"))
    assert torch.equal(net.get_buffer("scale"), other.get_buffer("scale"))
