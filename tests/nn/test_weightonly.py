"""quantize_weights: packed codes in the state dict, any method, products in float."""

import pytest
import torch
from torch import nn

import bitwright
from bitwright.errors import CalibrationError, RecipeError, SchemeError
from bitwright.methods import rtn
from bitwright.nn.weightonly import PackedLinear
from bitwright.numerics.codec import decode
from bitwright.numerics.scheme import Scheme
from small_modules import relative


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g64-asym", "int8-channel", "int2-g16-f32", "int5-tensor"])
@torch.no_grad()
def test_a_packed_layer_is_its_decoded_weight(scheme: str, products: set[torch.dtype]) -> None:
    net, x = nn.Sequential(nn.Linear(100, 12)).eval(), torch.randn(5, 100)
    packed = bitwright.quantize_weights(net, scheme=scheme, method="rtn")
    q = rtn(net[0].weight, None, Scheme.parse(scheme)).q
    again = packed[0].quantized()
    assert torch.equal(again.codes, q.codes) and torch.equal(decode(again), decode(q))
    expected, exact = nn.functional.linear(x, decode(q), net[0].bias), bool(products)
    assert relative(expected, packed(x)) < (1e-6 if exact else 1e-3)
    with torch.enable_grad():
        found = packed(x.requires_grad_())
    assert found.requires_grad and relative(expected, found.detach()) < 1e-6
    bits = Scheme.parse(scheme).levels.bits
    assert packed.state_dict()["0.words"].numel() == 12 * -(-100 * bits // 32)
    assert isinstance(net[0], nn.Linear)


@torch.no_grad()
def test_what_the_batches_show_helps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(500, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(500, 64)  # correlated
    lost = {
        method: relative(net(x), bitwright.quantize_weights(net, x.split(100), scheme="int3-g32", method=method)(x))
        for method in ("rtn", "search", "gptq")
    }
    assert lost["gptq"] < 0.7 * lost["rtn"] and lost["search"] < lost["rtn"]
    kept = bitwright.quantize_weights(net, x.split(100), scheme="int3-g32", keep={"2": "float"})
    assert [type(module) for module in kept][::2] == [PackedLinear, nn.Linear]


@pytest.mark.parametrize("method", ["gptq", "gptaq", "autoround", "obq"])
@torch.no_grad()
def test_inputs_that_few_rows_do_not_show_keep_their_weights(method: str) -> None:
    """Behind a ReLU one row leaves half of the inputs at 0: their weights are rounded, not dropped."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.randn(64, 32)
    packed = bitwright.quantize_weights(net, [torch.randn(1, 32)], scheme="int8-channel", method=method)
    assert relative(net(x), packed(x)) < 0.1


def test_what_quantize_weights_refuses() -> None:
    net = nn.Sequential(nn.Linear(64, 4)).eval()
    with pytest.raises(CalibrationError, match=r"^0: method gptq needs to see inputs"):
        bitwright.quantize_weights(net)
    with pytest.raises(RecipeError, match="no Linear to quantize"):
        bitwright.quantize_weights(nn.ReLU().eval(), method="rtn")
    with pytest.raises(RecipeError, match="unknown method 'magic'"):
        bitwright.quantize_weights(net, method="magic")
    with pytest.raises(RecipeError, match="in train mode"):
        bitwright.quantize_weights(nn.Linear(4, 4), method="rtn")
    with pytest.raises(RecipeError, match="batches are a text, 'int8-channel'"):
        bitwright.quantize_weights(net, "int8-channel")
    with pytest.raises(RecipeError, match="weights have no tokens"):
        bitwright.quantize_weights(net, scheme="int8-token", method="rtn")
    for scheme in ("nf4-g64", "q4_k", "int4-g32-e8m0", "q4_1"):
        with pytest.raises(SchemeError, match="are not packed here"):
            bitwright.quantize_weights(net, scheme=scheme, method="rtn")
