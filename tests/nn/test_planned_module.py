"""Schemes by layer, and plans of them: exact bytes, the best of all allocations, packed codes in state dicts, and bad input."""

import itertools

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import bitwright
from bitwright.errors import CalibrationError, CheckpointError, RecipeError, SchemeError
from small_modules import images, residual

FORMS = ("int4-channel", "int8-channel", "float")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 4)).eval()
    with torch.no_grad():
        net[2].weight[:, 0] *= 100  # a channel so large that it leaves few codes to the others
    return net


def data_bytes(module: nn.Module) -> int:
    """Bytes of the tensors in the file of a module."""
    file = save({name: t.contiguous() for name, t in module.state_dict().items()})
    return len(file) - 8 - int.from_bytes(file[:8], "little")


def made(net: nn.Module, x: Tensor, keep: dict[str, str], schemes: dict[str, str]) -> nn.Module:
    prepared = bitwright.prepare(net, x, keep=keep, schemes=schemes, observer="minmax")
    return bitwright.convert(bitwright.calibrate(prepared, [x]))


@torch.no_grad()
def test_no_allocation_of_as_many_bytes_has_a_smaller_error() -> None:
    net, x = mlp(), torch.randn(64, 32)
    y, names = net(x), ("0", "2", "4")
    errors = {}
    for name, form in itertools.product(names, FORMS[:2]):
        others = {other: "float" for other in names if other != name}
        lost = bitwright.quantize_dynamic(net, form, keep=others)(x) - y
        errors[name, form] = float(lost.square().sum() / y.square().sum())
    every = []
    for forms in itertools.product(FORMS, repeat=3):
        given = dict(zip(names, forms, strict=True))
        schemes = {name: form for name, form in given.items() if form != "float"}
        size = data_bytes(made(net, x, {n: f for n, f in given.items() if f == "float"}, schemes))
        every.append((size, sum(errors.get(item, 0.0) for item in given.items())))
    for target in (3000, 4500):
        plan = bitwright.plan_module(net, [x], target=target, candidates=FORMS)
        assert plan.bytes == data_bytes(made(net, x, plan.keep, plan.schemes)) <= target
        assert plan.error == pytest.approx(min(error for size, error in every if size <= target), rel=1e-4)
        assert plan.bounds[0][0] == min(every)[0] and plan.bounds[1][0] == max(every)[0]
        assert f"{plan.bytes:,} bytes in all" in str(plan) and len(plan.layers) == 3
    assert dict((*plan.schemes.items(), *plan.keep.items()))["2"] != "int4-channel"


@torch.no_grad()
def test_a_plan_of_convolutions_norms_and_float_islands_is_carried_out() -> None:
    net, x = residual(), images()
    plan = bitwright.plan_module(net, [x], target=3600, activations="int8-token", keep={"fc2": "float"})
    assert plan.keep["fc2"] == "float" and "int4-channel" in plan.schemes.values()
    prepared = bitwright.prepare(net, x, activations="int8-token", keep=plan.keep, schemes=plan.schemes)
    integer = bitwright.convert(bitwright.calibrate(prepared, [x]))
    assert plan.bytes == data_bytes(integer) <= 3600
    stored = {each.name: each.what for each in bitwright.layers(integer) if each.kind == "integer"}
    assert all(scheme in stored[name] for name, scheme in plan.schemes.items())
    y = net(x)
    measured = float((integer(x) - y).square().sum() / y.square().sum())
    assert plan.error / 10 < measured < 10 * plan.error


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(50, 16), nn.ConvTranspose1d(16, 8, 4, stride=2)
        self.lstm, self.out = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.out(self.lstm(x)[0])


def test_every_kind_of_layer_can_be_planned_under_its_own_name() -> None:
    torch.manual_seed(0)
    net, ids = Words().eval(), torch.randint(0, 50, (2, 6))
    plan = bitwright.plan_module(net, [ids], target="7.5KB")
    assert {layer.name for layer in plan.layers} == {"embed", "up", "lstm", "out"}
    assert len({layer.scheme for layer in plan.layers}) > 1
    assert plan.bytes == data_bytes(made(net, ids, plan.keep, plan.schemes)) <= 7500


@torch.no_grad()
def test_codes_of_few_bits_are_packed_in_state_dicts() -> None:
    net, x = mlp(), torch.randn(5, 32)
    for scheme, bits in (("int4-channel", 4), ("int3-channel-asym", 4), ("ternary-channel", 2), ("binary-channel", 2)):
        integer = bitwright.quantize_dynamic(net, scheme)
        twin = bitwright.quantize_dynamic(mlp(), scheme)
        stored = load(save(integer.state_dict()))
        assert stored["0.codes"].dtype == torch.int32 and stored["0.codes"].shape == (24, bits)
        for buffer in twin.buffers():
            buffer.zero_()
        twin.load_state_dict(stored)
        assert torch.equal(twin(x), integer(x))
        raw = {name: t.clone() for name, t in integer.state_dict(keep_vars=True).items()}  # as they are in memory
        assert raw["0.codes"].dtype == torch.int8
        twin.load_state_dict(raw)
        assert torch.equal(twin(x), integer(x))
    with pytest.raises(CheckpointError, match=r"^0.codes: packed codes of shape \[24, 4\], not \[24, 2\]"):
        twin.load_state_dict(bitwright.quantize_dynamic(net, "int4-channel").state_dict())


def test_what_is_refused() -> None:
    net, x = mlp(), torch.randn(5, 32)
    for target in (10, 10**6):
        with pytest.raises(RecipeError, match=r"^Sequential: .* reach from [\d,]+ to [\d,]+ bytes, not [\d,]+"):
            bitwright.plan_module(net, [x], target=target)
    with pytest.raises(RecipeError, match=r"^target: 'much' is not a size"):
        bitwright.plan_module(net, [x], target="much")
    with pytest.raises(CalibrationError, match="no batches"):
        bitwright.plan_module(net, [], target=3000)
    with pytest.raises(RecipeError, match="named twice"):
        bitwright.plan_module(net, [x], target=3000, candidates=["float", "float"])
    with pytest.raises(SchemeError, match="int5000"):
        bitwright.plan_module(net, [x], target=3000, candidates=["int5000-channel"])
    conv, image = nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(SchemeError, match="no integer form with groups of 32"):
        bitwright.plan_module(conv, [image], target=300, candidates=["int4-g32"])
    nowhere = {"nowhere": "int4-channel"}
    for refused in (
        lambda: bitwright.prepare(net, x, schemes=nowhere),
        lambda: bitwright.prepare_qat(mlp().train(), x, schemes=nowhere),
        lambda: bitwright.quantize_dynamic(net, schemes=nowhere),
    ):
        with pytest.raises(RecipeError, match=r"^nowhere: the pattern of schemes matches no submodule"):
            refused()
