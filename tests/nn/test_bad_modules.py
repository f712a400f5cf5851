"""What users give by mistake: named, with a remedy, and never silent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.errors import CalibrationError, NumericsError, RecipeError, SchemeError
from bitwright.nn import integer as arithmetic
from bitwright.nn.integer import product, product_on_gpu
from small_modules import converted, relative

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(4))


def net() -> nn.Sequential:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


class Lacks(nn.Module):
    """As torch does for half precision where a device has no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise NotImplementedError("\"lacks_kernel\" not implemented for 'Half'")
        return x


def test_half_precision_that_the_device_lacks() -> None:
    half = nn.Sequential(nn.Linear(16, 16), Lacks(), nn.Linear(16, 4)).eval().half()
    for way in (
        lambda: bitwright.prepare(half, X.half()),
        lambda: bitwright.quantize_dynamic(half, example_inputs=X.half()),
    ):
        with pytest.raises(
            RecipeError, match=r"^1: \"lacks_kernel\" not implemented for 'Half'\s+remedy: module.float()"
        ):
            way()


@pytest.mark.parametrize(
    "way",
    [
        lambda x: bitwright.calibrate(bitwright.prepare(net(), X), [x]),
        lambda x: bitwright.prepare(net(), x),
        lambda x: bitwright.quantize_dynamic(net(), example_inputs=x),
        lambda x: bitwright.quantize_weights(net(), [x], scheme="int8-g16"),
        lambda x: bitwright.quantize_weights(net(), [x], scheme="int8-g16", method="rtn"),
        lambda x: bitwright.sensitivity(net(), [x]),
        lambda x: bitwright.prune(net(), [x], method="wanda"),
    ],
    ids=["calibrate", "prepare", "dynamic", "gptq", "rtn", "sensitivity", "prune"],
)
def test_nan_in_the_batches(way: Callable[[Tensor], object]) -> None:
    x = X.clone()
    x[3, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"^\w+: .* are not finite"):
        way(x)


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare, self.usual = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.rare(x) if float(x.sum()) > 1e9 else self.usual(x)


def test_a_layer_that_the_example_does_not_reach() -> None:
    with pytest.raises(CalibrationError, match=r'^rare.input: no activations were seen[^"]*keep={"rare": "float"}'):
        converted(Chooses().eval(), X)
    with pytest.raises(CalibrationError, match=r"^rare: method gptq needs to see inputs"):
        bitwright.quantize_weights(Chooses().eval(), [X], scheme="int8-g16")


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(16, 4), nn.Buffer(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x) + self.calls


def test_a_state_that_is_changed_in_place() -> None:
    with pytest.raises(
        RecipeError, match=r"^Counts: its graph computes something else: what it does depends on .* state"
    ):
        bitwright.prepare(Counts().eval(), X)


def test_a_device_without_products_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [bitwright.quantize_dynamic(net()), converted(net(), X)]
    monkeypatch.setattr(arithmetic, "DEVICES", ("cuda",))
    for integer in made:
        with pytest.raises(SchemeError, match=r"^0: there are no products of int8 on device 'cpu'\s+remedy: .to"):
            integer(X)


@pytest.mark.parametrize("shape", [(5, 13, 11), (17, 8, 16), (40, 3, 1)])
def test_products_padded_for_a_gpu(shape: tuple[int, int, int]) -> None:
    T, N, K = shape
    x, w = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((T, K), (N, K)))
    assert torch.equal(product_on_gpu(x, w), product(x, w))


WAYS: dict[str, Any] = {
    "dynamic": lambda m, x: bitwright.quantize_dynamic(m, example_inputs=(x,)),
    "static": lambda m, x: bitwright.convert(bitwright.calibrate(bitwright.prepare(m, (x,)), [x])),
    "weights": lambda m, x: bitwright.quantize_weights(m, [x], scheme="int8-g16"),
    "sensitivity": lambda m, x: bitwright.sensitivity(m, [x]),
    "prune": lambda m, x: bitwright.prune(m, [x], method="magnitude", sparsity=0.5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: torch.jit.script(net()), "TorchScript"),
        (lambda: torch.jit.trace(net(), torch.randn(2, 16)), "TorchScript"),
        (lambda: nn.Sequential(nn.LazyLinear(16), nn.LazyLinear(4)).eval(), "no weights yet"),
        (lambda: nn.Sequential(nn.Linear(16, 16, device="meta")).eval(), "device meta"),
    ],
)
def test_modules_without_layers_or_values(made: Any, says: str, way: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        WAYS[way](made(), torch.randn(8, 16))
    assert caught.value.remedy


@pytest.mark.parametrize("way", ["dynamic", "static", "weights"])
def test_what_torch_compile_wraps_is_quantized(way: str) -> None:
    two, x = net(), torch.randn(32, 16)
    found = WAYS[way](torch.compile(two, backend="eager"), x)
    assert not any(isinstance(child, nn.Linear) for child in found.modules())
    assert relative(two(x), found(x)) < 0.05


def test_hooks_are_kept_where_they_see_floats_and_refused_where_they_would_see_integers() -> None:
    two, x = net(), torch.randn(32, 16)
    two[0].register_forward_hook(lambda _, args, out: 2 * out)
    two[2].register_forward_pre_hook(lambda _, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    for way in ("dynamic", "weights"):
        assert relative(two(x), WAYS[way](two, x)(x)) < 0.05
    with pytest.raises(RecipeError, match="forward hooks") as caught:
        bitwright.prepare(two, (x,))
    assert caught.value.where == "0"
    kept = {"0": "float", "2": "float"}
    two.append(nn.Linear(4, 4).eval())
    prepared = bitwright.calibrate(bitwright.prepare(two, (x,), keep=kept), [x])
    assert relative(two(x), bitwright.convert(prepared)(x)) < 0.05


class Autocast(nn.Module):
    """torch.fx drops the context, so that a graph of the whole would compute in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(100 * x) - 100 * self.a(x)
        return self.b(torch.relu(y.float()))


def test_what_is_in_no_graph_is_quantized_layer_by_layer() -> None:
    torch.manual_seed(0)
    auto, x = Autocast().eval(), torch.randn(32, 64)
    prepared = bitwright.calibrate(bitwright.prepare(auto, (x,)), [x])
    assert relative(auto(x), prepared(x)) < 1e-6
    with pytest.raises(RecipeError, match="its graph computes something else"):
        bitwright.prepare(auto, (x,), inplace=True)


def test_an_embedding_with_max_norm_is_refused_before_training() -> None:
    words = nn.Sequential(nn.Embedding(50, 16, max_norm=1.0), nn.Linear(16, 4))
    with pytest.raises(RecipeError, match="max_norm"):
        bitwright.prepare_qat(words.train(), (torch.randint(0, 50, (4, 6)),))


def test_an_example_of_no_rows() -> None:
    assert bitwright.quantize_dynamic(net(), example_inputs=(torch.randn(0, 16),))(torch.randn(0, 16)).shape == (0, 4)
    found = bitwright.convert(bitwright.prepare(net(), (torch.randn(0, 16),), activations="int8-token"))
    assert found(torch.randn(0, 16)).shape == (0, 4) and relative(net()(X), found(X)) < 0.05


def test_what_is_kept_in_bfloat16_has_the_module_s_attributes() -> None:
    torch.manual_seed(0)
    block, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(4, 6, 16)
    found = bitwright.quantize_dynamic(block, keep={"self_attn": "bf16", "linear1": "bf16"})
    assert (
        found.self_attn.batch_first and found.linear1.in_features == 16 and found.linear1.weight.dtype == torch.float32
    )
    assert relative(block(x), found(x)) < 0.05
    plan = bitwright.plan_module(block, [x], target=4000, candidates=("int8-channel", "bf16"))
    assert plan.bytes <= 4000
    with pytest.raises(AttributeError):
        _ = found.linear1.nothing


def test_batches_that_are_no_pairs_are_named_when_distilling() -> None:
    student = bitwright.prepare_qat(net().train(), (X,))
    for batch, says in ((X, "a Tensor"), ((X,), "1 parts")):
        with pytest.raises(RecipeError, match=says):
            bitwright.distill(student, net(), [batch])


class Named(nn.Module):
    """Takes one dict, or list, of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one = net()

    def forward(self, given: Any) -> Tensor:
        return self.one(given["x"] if isinstance(given, dict) else given[0])


def test_a_batch_that_the_forward_does_not_take() -> None:
    """One argument that is a dict or a list is told from named arguments and several ones."""
    ways: tuple[Callable[[Any], Any], ...] = (
        lambda batch: bitwright.prepare(Named().eval(), batch),
        lambda batch: bitwright.quantize_dynamic(Named().eval(), example_inputs=batch),
        lambda batch: bitwright.quantize_weights(Named().eval(), [batch], scheme="int4-g16"),
        lambda batch: bitwright.sensitivity(Named().eval(), [batch]),
    )
    for way in ways:
        for batch in ({"x": X}, [X, X]):
            with pytest.raises(RecipeError, match=r"^Named: its forward does not take such a batch") as caught:
                way(batch)
            assert "({...},)" in caught.value.remedy
            way((batch,))


def test_what_is_no_scheme_is_named() -> None:
    for given in ({nn.Linear}, (X,)):
        with pytest.raises(RecipeError, match=r"not by a (set|tuple)"):
            bitwright.quantize_dynamic(net(), given)  # type: ignore[arg-type]


class Spectrum(nn.Module):
    """A complex layer between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.out = nn.Linear(9, 9, dtype=torch.complex64), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.turned(torch.fft.rfft(x)).abs())


def test_complex_weights_are_refused_and_may_be_kept() -> None:
    """Their imaginary parts were dropped, 0.8 off."""
    model = Spectrum().eval()
    ways: tuple[Callable[[dict[str, str]], nn.Module], ...] = (
        lambda keep: bitwright.quantize_dynamic(model, keep=keep),
        lambda keep: converted(model, X, keep=keep),
        lambda keep: bitwright.quantize_weights(model, scheme="int8-channel", method="rtn", keep=keep),
        lambda keep: bitwright.prune(model, sparsity=0.1, method="magnitude", keep=keep),
    )
    for way in ways:
        with pytest.raises(RecipeError, match=r"^turned: complex weights"):
            way({})
        assert relative(model(X), way({"turned": "float"})(X)) < 0.2
    for way in ways[:3]:
        with pytest.raises(RecipeError, match=r"^turned: complex weights"):
            way({"turned": "bf16"})


def test_what_is_quantized_already_is_named() -> None:
    for once in (bitwright.quantize_dynamic(net()), converted(net(), X)):
        for again in (bitwright.quantize_dynamic, lambda made: bitwright.prepare(made, X)):
            with pytest.raises(RecipeError, match="already quantized"):
                again(once)


def test_what_is_no_module_and_what_is_no_tensor_is_named() -> None:
    ways: tuple[Callable[[Any, Any], Any], ...] = (
        bitwright.prepare,
        lambda given, x: bitwright.quantize_dynamic(given, example_inputs=x),
        lambda given, x: bitwright.quantize_weights(given, [x], scheme="int8-channel"),
    )
    for way in ways:
        for given in (net().state_dict(), "model.pt"):
            with pytest.raises(RecipeError, match="is no module"):
                way(given, X)
        for batch in (X.numpy(), "x"):
            with pytest.raises(RecipeError, match="a batch without a tensor"):
                way(net(), batch)


def test_batches_with_labels_are_named_when_calibrating() -> None:
    with pytest.raises(RecipeError, match="its forward does not take such a batch: too many positional arguments"):
        bitwright.calibrate(bitwright.prepare(net(), X), [(X, torch.ones(32))])


@pytest.mark.parametrize(
    ("module", "message"),
    [({"weight": torch.ones(2)}, "is no module"), (nn.Sequential(nn.LazyLinear(3)), "no weights yet")],
)
def test_what_has_no_layers_to_list_is_named(module: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        bitwright.layers(module)
