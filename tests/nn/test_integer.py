"""Integer layers: exact sums, the zero point's correction, and modules quantized as they stand."""

from typing import Any

import pytest
import torch
from torch import nn

import bitwright
from bitwright.errors import NumericsError, RecipeError, SchemeError
from bitwright.nn.attention import IntegerAttention
from bitwright.nn.dynamic import quantized
from bitwright.nn.integer import MOST_INPUTS, IntegerWeight, convolution, depthwise, integer_weight, product
from bitwright.nn.layers import DynamicProduct, matrix, window_of
from bitwright.nn.recurrent import IntegerRecurrent
from bitwright.numerics.codec import decode
from bitwright.numerics.scheme import Scheme
from small_modules import Products, random_int8, relative


@pytest.mark.parametrize(("T", "N", "K"), [(1, 1, 1), (1, 3, 7), (5, 2, 1), (17, 33, 65), (64, 16, 300)])
def test_a_product_is_exact(T: int, N: int, K: int) -> None:
    x, w = random_int8(T, K), random_int8(N, K)
    assert torch.equal(product(x, w), (x.long() @ w.long().T).int())


def test_the_largest_sums_do_not_saturate() -> None:
    """Instructions that add pairs in 16 bits would."""
    for value in (-128, 127):
        x, w = torch.full((20, 300), value, dtype=torch.int8), torch.full((5, 300), -128, dtype=torch.int8)
        assert torch.equal(product(x, w), torch.full((20, 5), value * -128 * 300, dtype=torch.int32))


CONVOLUTIONS = [
    nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, (3, 1), groups=8),
    nn.Conv2d(8, 16, 3, groups=2, dilation=2), nn.Conv2d(8, 16, (2, 3), padding="same"), nn.Conv2d(8, 4, 1),
    nn.Conv2d(8, 24, 3, groups=8), nn.Conv1d(8, 16, 5, padding=2, stride=3), nn.Conv1d(8, 8, 4, padding="same", groups=8),
]  # fmt: skip


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_a_convolution_is_exact(conv: nn.Conv1d | nn.Conv2d) -> None:
    flat = isinstance(conv, nn.Conv1d)
    x = random_int8(2, 8, *((11,) if flat else (9, 11)))
    w = random_int8(*conv.weight.shape)
    window = window_of(conv)
    assert window is not None
    padded = window.padded(x[:, :, None] if flat else x, 0)
    thin = window.groups == 8 == conv.out_channels
    found = (
        depthwise(padded, matrix(w), window)
        if thin
        else convolution(padded, matrix(w), window, lambda rows, weights, _: product(rows, weights))
    ).permute(0, 3, 1, 2)
    exact = nn.Conv1d if flat else nn.Conv2d
    oracle = exact(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias=False,
        dtype=torch.float64,
    )
    oracle.weight.data = w.double()
    with torch.no_grad():
        assert torch.equal((found[:, :, 0] if flat else found).double(), oracle(x.double()))


@pytest.mark.parametrize(
    "scheme",
    ["int8-channel", "int2-channel", "int5-tensor", "int4-channel-asym", "int7-g32-asym", "int4-g32", "ternary-channel",
     "binary-channel", "fp4-channel", "iq4nl-channel", "iq1-channel", "iq2-g16", "iq3xxs-g32", "iq3s-channel",
     "mxfp4", "nvfp4", "q6_k", "int4-g64-dq"],
)  # fmt: skip
def test_integers_times_scales_are_the_decoded_weights(scheme: str) -> None:
    q = quantized(torch.randn(6, 256), Scheme.parse(scheme), "w")
    weight = integer_weight(q, where="w")
    assert weight.values.dtype == torch.int8
    g = 256 // weight.scale.shape[1]
    torch.testing.assert_close(weight.values * weight.scale.repeat_interleave(g, 1), decode(q), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["int8-channel-asym", "nf4-channel", "fp8-channel", "q4_k"])
def test_weights_that_are_no_integers(scheme: str) -> None:
    w = torch.linspace(-0.1, 1, 2 * 256).view(2, 256)
    with pytest.raises(SchemeError, match=r"^fc: weights"):
        integer_weight(quantized(w, Scheme.parse(scheme), "fc"), where="fc")


def test_more_inputs_than_an_int32_sum_holds() -> None:
    with pytest.raises(SchemeError, match="overflow"):
        integer_weight(quantized(torch.ones(1, MOST_INPUTS + 1), Scheme.parse("int8-channel"), "fc"), where="fc")


@pytest.mark.parametrize("activations", ["int8-token", "int8-token-asym", "int4-token-asym"])
@pytest.mark.parametrize("scheme", ["int8-channel", "int4-channel-asym", "int4-g32", "ternary-tensor"])
@torch.no_grad()
def test_a_dynamic_layer_against_float64(scheme: str, activations: str) -> None:
    """The oracle rounds weights and inputs by the codec, and multiplies them in float64."""
    layer, x = nn.Linear(96, 10), torch.randn(3, 7, 96) + 0.5
    q = quantized(layer.weight, Scheme.parse(scheme), "fc")
    integer = DynamicProduct.of(layer, q, activations=Scheme.parse(activations), where="fc")
    rounded = bitwright.numerics.codec.rounded(x, Scheme.parse(activations)).double()
    expected = rounded @ decode(q).double().T + layer.bias.double()
    torch.testing.assert_close(integer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", ["int8-token", "int8-token-asym"])
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@torch.no_grad()
def test_a_dynamic_convolution(conv: nn.Conv1d | nn.Conv2d, activations: str) -> None:
    x = torch.randn(2, 8, *((11,) if isinstance(conv, nn.Conv1d) else (9, 11))) + 0.5
    integer = bitwright.quantize_dynamic(conv.eval(), activations=activations)
    assert relative(conv(x), integer(x)) < 0.02
    assert relative(conv(x[0]), integer(x[0])) < 0.02  # without the axis of the batch


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}], ids=str
)
@torch.no_grad()
def test_recurrent_layers(kind: type[nn.LSTM | nn.GRU], options: dict[str, Any], products: set[torch.dtype]) -> None:
    torch.manual_seed(0)
    source = kind(12, 20, **options).eval()
    integer = bitwright.quantize_dynamic(source)
    x = torch.randn(5, 5, 12)
    expected, found = source(x), integer(x)
    again = integer(x[:, :, :], found[1])[0]
    for a, b in ((expected[0], found[0]), (source(x, expected[1])[0], again), (source(x[0])[0], integer(x[0])[0])):
        assert relative(a, b) < 0.02
    states = zip(*((s if isinstance(s, tuple) else (s,)) for s in (expected[1], found[1])), strict=True)
    assert all(relative(a, b) < 0.02 for a, b in states)
    with Products() as seen:
        integer(x)
    assert set(seen.types) == products


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention])
@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_what_few_bits_of_their_inputs_do_to_recurrent_layers_and_attention_is_rounding(kind: Any, bits: int) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(kind(12, 4 if kind is nn.MultiheadAttention else 20)).eval()
    x = torch.randn(5, 5, 12)
    batch: Any = x
    if kind is nn.MultiheadAttention:
        source, batch = source[0], (x, x, x, torch.zeros(5, 5).masked_fill(torch.rand(5, 5) > 0.6, -torch.inf))
    bitwright.quantize_dynamic(source, activations=f"int{bits}-token", example_inputs=batch)
    bitwright.convert(bitwright.calibrate(bitwright.prepare(source, batch, activations=f"int{bits}-tensor"), [batch]))


def test_recurrent_layers_without_an_integer_form() -> None:
    with pytest.raises(SchemeError, match=r"^lm: a projected LSTM"):
        IntegerRecurrent(nn.LSTM(4, 4, proj_size=2), lambda *_: None, where="lm")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_packed_sequences(kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
    """Of three lengths, in no order: the same outputs and states as each sequence alone."""
    torch.manual_seed(0)
    integer = bitwright.quantize_dynamic(kind(6, 8, num_layers=2, bidirectional=True).eval())
    x, lengths = torch.randn(5, 3, 6), [3, 5, 2]
    y, last = integer(nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    padded, _ = nn.utils.rnn.pad_packed_sequence(y)
    for i, n in enumerate(lengths):
        alone, end = integer(x[:n, i : i + 1])
        torch.testing.assert_close(padded[:n, i], alone[:, 0])
        for a, b in zip(
            last if isinstance(last, tuple) else [last], end if isinstance(end, tuple) else [end], strict=True
        ):
            torch.testing.assert_close(a[:, i], b[:, 0])


@pytest.mark.parametrize("options", [{"batch_first": True}, {"kdim": 24, "vdim": 20, "bias": False}], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "heads"])
@torch.no_grad()
def test_attention(options: dict[str, Any], mask: str) -> None:
    torch.manual_seed(0)
    source = nn.MultiheadAttention(32, 4, **options).eval()
    integer = bitwright.quantize_dynamic(source)
    batch_first = source.batch_first
    q, k, v = (torch.randn(2, 6, n) for n in (32, source.kdim, source.vdim))
    q, k, v = (t if batch_first else t.transpose(0, 1) for t in (q, k, v))
    masks = {
        "none": {},
        "causal": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1)},
        "padding": {"key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])},
        "heads": {"attn_mask": torch.randn(8, 6, 6)},
    }
    expected, found = source(q, k, v, **masks[mask]), integer(q, k, v, **masks[mask])
    assert relative(expected[0], found[0]) < 0.03 and relative(expected[1], found[1]) < 0.03
    assert integer(q, k, v, need_weights=False)[1] is None
    single = [t[0] if batch_first else t[:, 0] for t in (q, k, v)]
    assert relative(source(*single)[0], integer(*single)[0]) < 0.03


def test_attention_without_an_integer_form() -> None:
    with pytest.raises(SchemeError, match=r"^att: attention to added keys"):
        IntegerAttention(nn.MultiheadAttention(8, 2, add_zero_attn=True), lambda *_: None, where="att")  # type: ignore[arg-type, return-value]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_a_transformer_does_not_reach_past_its_integer_layers() -> None:
    torch.manual_seed(0)
    source = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    integer = bitwright.quantize_dynamic(source)
    x, padding = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    for options in ({}, {"src_key_padding_mask": padding}, {"mask": torch.ones(6, 6, dtype=torch.bool).triu(1)}):
        expected, found = source(x, **options), integer(x, **options)
        assert relative(expected[:, :4], found[:, :4]) < 0.03


@torch.no_grad()
def test_an_embedding_is_its_decoded_rows() -> None:
    source = nn.Embedding(10, 64)
    for scheme in ("int8-channel", "int4-g32"):
        integer = bitwright.quantize_dynamic(source.eval(), scheme)
        index = torch.tensor([[1, 9], [0, 1]])
        expected = decode(quantized(source.weight, Scheme.parse(scheme), ""))[index]
        torch.testing.assert_close(integer(index), expected)


def test_the_source_stays_as_it_is_unless_asked() -> None:
    source = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    before = {name: t.clone() for name, t in source.state_dict().items()}
    integer = bitwright.quantize_dynamic(source)
    assert all(torch.equal(t, before[name]) for name, t in source.state_dict().items()) and len(before) == 4
    state = integer.state_dict()
    assert {name: t.dtype for name, t in state.items() if name.endswith("codes")} == dict.fromkeys(
        ("0.codes", "1.codes"), torch.int8
    )
    assert not any(name.endswith("weight") for name in state)
    assert bitwright.quantize_dynamic(source, inplace=True) is source
    assert isinstance(source[0], DynamicProduct)


@torch.no_grad()
def test_a_state_dict_can_be_loaded_again() -> None:
    first, second = (bitwright.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)).eval()) for _ in range(2))
    x = torch.randn(3, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@torch.no_grad()
def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    layer = nn.Linear(8, 4).eval()
    integer = bitwright.quantize_dynamic(layer)
    x = torch.stack([torch.zeros(8), torch.full((8,), float("nan")), torch.ones(8)])
    y = integer(x)
    assert torch.equal(y[0], layer.bias) and y[1].isnan().all() and y[2].isfinite().all()


def test_what_dynamic_quantization_refuses() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    with pytest.raises(RecipeError, match=r"^module: in train mode, where eval is needed\n.*eval\(\)"):
        bitwright.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))
    net[1].train()
    with pytest.raises(RecipeError, match=r"^1: in train mode"):
        bitwright.quantize_dynamic(net)
    net.eval()
    with pytest.raises(RecipeError, match=r"^ReLU: nothing to quantize"):
        bitwright.quantize_dynamic(nn.ReLU().eval())
    with pytest.raises(RecipeError, match="nothing to quantize"):
        bitwright.quantize_dynamic(net, keep={"0": "float"})
    with pytest.raises(RecipeError, match="nothing to quantize"):
        bitwright.quantize_dynamic(bitwright.quantize_dynamic(net))
    with pytest.raises(RecipeError, match=r"^fc9: the pattern matches no submodule"):
        bitwright.quantize_dynamic(net, keep={"fc9": "float"})
    with pytest.raises(RecipeError, match="cannot keep as 'fp8'"):
        bitwright.quantize_dynamic(net, keep={"0": "fp8"})
    for activations in ("int8-tensor", "fp8-token", "int8-token-f16"):
        with pytest.raises(SchemeError):
            bitwright.quantize_dynamic(net, activations=activations)
    with pytest.raises(SchemeError, match=r"^0: a Conv2d has no integer form with groups"):
        bitwright.quantize_dynamic(nn.Sequential(nn.Conv2d(64, 8, 1)).eval(), "int4-g32")
    with pytest.raises(RecipeError, match=r"^0: an embedding with max_norm"):
        bitwright.quantize_dynamic(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)).eval())
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^0: the weights are not finite"):
        bitwright.quantize_dynamic(net)


def test_many_rows_and_none_and_rows_behind_trained_layers() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4).eval()
    integer, x = bitwright.quantize_dynamic(layer, activations="int8-token-asym"), torch.randn(600, 8)
    whole = integer(x)
    assert torch.equal(whole[500:], integer(x[500:])) and integer(x[:0]).shape == (0, 4)
    assert torch.equal(integer(x.requires_grad_()), whole) and not integer(x).requires_grad


def test_an_input_of_another_width() -> None:
    integer = bitwright.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval())
    with pytest.raises(SchemeError, match=r"^0: an input of shape \(3, 9\), where axis -1 should be 8"):
        integer(torch.randn(3, 9))
    integer = bitwright.quantize_dynamic(nn.Conv2d(8, 8, 1).eval())
    with pytest.raises(SchemeError, match=r"axis -3 should be 8"):
        integer(torch.randn(2, 4, 5, 5))


@torch.no_grad()
def test_layers_kept_in_float_and_in_bfloat16() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 4)).eval()
    integer = bitwright.quantize_dynamic(net, keep={"1": "bf16", "2": "bf16"})
    assert integer.state_dict()["1.inner.weight"].dtype == torch.bfloat16
    y, (h, _) = integer(torch.randn(3, 8))
    assert y.dtype == h.dtype == torch.float32
    kinds = {layer.name: layer.kind for layer in bitwright.layers(integer)}
    assert kinds == {"0": "integer", "1": "bf16", "2": "bf16"}


def test_sums_of_grouped_weights() -> None:
    from bitwright.nn.layers import row_sums

    values, scale = random_int8(3, 8), torch.rand(3, 2)
    expected = (values.double() * scale.repeat_interleave(4, 1)).sum(1).float()
    torch.testing.assert_close(row_sums(IntegerWeight(values, scale)), expected)
