"""Modules as people write them: each computes what the float module does, or is refused by name."""

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import bitwright
from bitwright.errors import CalibrationError, RecipeError, VerificationError
from bitwright.nn.batches import outputs
from bitwright.nn.layers import StaticProduct
from small_modules import converted, relative

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(3))


def ways(net: nn.Module, x: Any) -> dict[str, nn.Module]:
    """The module quantized dynamically, statically, and after training that did not change it."""
    trained = bitwright.prepare_qat(copy.deepcopy(net).train(), x)
    return {
        "dynamic": bitwright.quantize_dynamic(net),
        "static": bitwright.convert(bitwright.calibrate(bitwright.prepare(net, x), [x])),
        "trained": bitwright.convert(trained.eval()),
    }


@torch.no_grad()
def test_quiet_and_loud_signals_and_small_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False)).eval()
    for x in (X * 1e-6, (X * 30000).square()):
        for activations in ("int8-tensor", "int8-tensor-asym"):
            assert relative(net(x), converted(net, x, activations=activations)(x)) < 0.03
    for parameter in net.parameters():
        parameter.mul_(1e-5)
    for integer in ways(net, X).values():
        assert relative(net(X), integer(X)) < 0.03
    assert relative(net(X), bitwright.quantize_weights(net, [X], scheme="int8-g16")(X)) < 0.01


class InPlace(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o, self.relu = (
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.ReLU(inplace=True),
        )
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.a(x), self.b(x))


def _read_later(net: InPlace, y: Tensor, z: Tensor) -> Tensor:
    return net.o(net.b(net.relu(y)) + y)


def _method(net: InPlace, y: Tensor, z: Tensor) -> Tensor:
    y.add_(z)
    return net.o(y)


def _function(net: InPlace, y: Tensor, z: Tensor) -> Tensor:
    functional.relu(y, inplace=True)
    torch.sigmoid_(z)
    return net.o(torch.cat([y, z], 1)[:, 8:24])


def _statement(net: InPlace, y: Tensor, z: Tensor) -> Tensor:
    other = y
    other *= z
    return net.o(y)


def _items(net: InPlace, y: Tensor, z: Tensor) -> Tensor:
    y[:, :4] = 0
    z[:, 2:] += 1
    return net.o(y) + net.o(z)


def _view(net: InPlace, y: Tensor, z: Tensor) -> Tensor:
    y.view(-1, 4, 4).mul_(z.view(-1, 4, 4))  # cannot be made functional: the module is taken apart
    return net.o(y)


@pytest.mark.parametrize("compute", [_read_later, _method, _function, _statement, _items, _view])
@torch.no_grad()
def test_operations_in_place(compute: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    net = InPlace(compute).eval()
    assert relative(net(X), converted(net, X)(X)) < 0.03


@pytest.mark.parametrize("kind", [nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU])
def test_activations_in_place_can_be_trained(kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Conv1d(1, 4, 3), kind(inplace=True), nn.Conv1d(4, 2, 3), nn.Dropout(0.1, inplace=True))  # type: ignore[call-arg]
    x = X[:, None]
    prepared = bitwright.prepare_qat(net.train(), x)
    prepared(x).square().sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    integer = bitwright.convert(prepared.eval())
    with torch.no_grad():
        assert relative(prepared(x), integer(x)) < 0.01


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = self.fc(input=x)
        return self.out(y if mask is None else y * mask) * scale


@torch.no_grad()
def test_arguments_that_the_example_lacks_are_refused_and_those_it_has_are_not() -> None:
    torch.manual_seed(0)
    net, mask = Optional().eval(), (X > 0).float()
    integer = converted(net, X)
    assert relative(net(X, None), integer(X, None)) < 0.03
    with pytest.raises(RecipeError, match=r"^mask: the argument 'mask' was None in example_inputs"):
        integer(X, mask)
    with pytest.raises(RecipeError, match=r"^scale: the argument 'scale' was 1.0"):
        integer(X, scale=2.0)
    for example in ((X, mask), {"x": X, "mask": mask}):
        prepared = bitwright.calibrate(bitwright.prepare(net, example), [example])
        assert relative(net(X, mask), bitwright.convert(prepared)(X, mask=mask)) < 0.03
    assert relative(net(X, mask), pickle.loads(pickle.dumps(bitwright.convert(prepared)))(X, mask)) < 0.03


class TwoNames(nn.Module):
    """One layer under several names, called several times, in a module that cannot be traced, or can."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.a, self.plain = nn.Linear(16, 16), plain
        self.b, self.list = self.a, nn.ModuleList([self.a])

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain and float(x.sum()) > 1e9:
            x = -x
        for layer in (self.a, self.b, self.list[0], self.a, self.b):
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("plain", [True, False])
@torch.no_grad()
def test_one_layer_under_two_names_is_one(plain: bool) -> None:
    torch.manual_seed(0)
    net = TwoNames(plain=plain).eval()
    made = {**ways(net, X), "weights": bitwright.quantize_weights(net, [X], scheme="int8-g16")}
    for way, integer in made.items():
        assert relative(net(X), integer(X)) < 0.1, way
        assert not any(type(module) is nn.Linear for module in integer.modules()), way
        codes = [t.data_ptr() for name, t in integer.state_dict().items() if name.endswith(("codes", "words"))]
        assert len(set(codes)) == 1, way
        if way != "static" and way != "trained":
            assert integer.a is integer.b is integer.list[0]


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ (self.w / 2).t()


class Token(nn.Module):
    """Holds matrices that are no weights, and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions, self.fc = nn.Parameter(X[:1]), nn.Parameter(X[:1] / 9), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.token.expand(2, -1), x]) + self.positions
        return self.fc(y if float(y.sum()) < 1e9 else -y)


@torch.no_grad()
def test_a_weight_that_no_layer_holds_is_refused_and_a_table_is_not() -> None:
    message = r"^w: a product with a weight that no layer of torch.nn holds"
    for way in (
        bitwright.quantize_dynamic,
        lambda net: bitwright.prepare(net, X),
        lambda net: bitwright.prepare_qat(net.train(), X),
        lambda net: bitwright.quantize_weights(net, [X], scheme="int8-g16"),
    ):
        with pytest.raises(RecipeError, match=message):
            way(Bare().eval())
    net = Token().eval()
    integer = converted(net, X)
    assert relative(net(X), integer(X)) < 0.03
    assert {layer.name for layer in bitwright.layers(integer) if layer.kind == "float"} == {"token", "positions"}


class Asks(nn.Module):
    """Cannot be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.fc, self.w = inner, nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.inner(x))
        return (y if float(y.sum()) < 1e9 else -y) @ self.w.t()


@torch.no_grad()
def test_weights_that_no_layer_holds_in_what_cannot_be_traced() -> None:
    """Without an example, the module that holds one is traced by itself; what stays unknown is warned of."""
    with pytest.raises(RecipeError, match=r"^inner\.w: a product"):
        bitwright.quantize_dynamic(Asks(Bare()).eval())
    net = Asks(nn.Linear(16, 8)).eval()
    with pytest.warns(UserWarning, match=r"^w: no layer holds these, they stay float"):
        bitwright.quantize_dynamic(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bitwright.quantize_dynamic(net, keep={"w": "float"})
    with pytest.raises(RecipeError, match=r"^w: a product"):
        bitwright.quantize_dynamic(net, example_inputs=X)


class Same(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(functional.pad(x, (1, 1)), self.weight, self.bias, self.stride)


class Reads(nn.Module):
    """Multiplies by a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x), self.inner.weight * 1.5, self.inner.bias)


@torch.no_grad()
def test_weights_that_are_not_where_they_seem() -> None:
    """Parametrized, computed by hooks, in subclasses, read by others: integers in all cases, and the source as it was."""
    torch.manual_seed(0)
    x = X[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones are deprecated
        made = [
            wrap(nn.Conv1d(4, 4, 3))
            for wrap in (
                parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm,
                lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
            )
        ]  # fmt: skip
    for second in (*made, Same(4, 4, 3)):
        net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), second)
        net(x)
        expected = net.eval()(x)
        integer = converted(net, x)
        assert relative(expected, integer(x)) < 0.03
        assert torch.equal(net(x), expected)
        assert not any(isinstance(module, nn.Conv1d) for module in integer.modules())
    for integer in ways(Reads().eval(), X).values():
        assert not any(t.is_floating_point() and t.numel() > 16 for t in integer.state_dict().values())


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_state_dicts_and_pickles_hold_everything(learned: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).train()
    first, second = (bitwright.prepare_qat(net, x, learned=learned) for x in (X, X / 5))
    first(3 * X)
    second.load_state_dict(load(save(first.state_dict())))
    first.eval(), second.eval()
    integer = bitwright.convert(first)
    for other in (bitwright.convert(second), pickle.loads(pickle.dumps(integer)), copy.deepcopy(integer)):
        assert torch.equal(integer(X), other(X))
    assert torch.equal(first(X), pickle.loads(pickle.dumps(first))(X))
    static, fresh = bitwright.calibrate(bitwright.prepare(net.eval(), X), [X]), bitwright.prepare(net, X)
    fresh.load_state_dict(static.state_dict())
    assert torch.equal(bitwright.convert(static)(X), bitwright.convert(fresh)(X))


@torch.no_grad()
def test_convert_proves_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    prepared = bitwright.calibrate(bitwright.prepare(net, X), [X])
    rounded = StaticProduct.__init__

    def wrong(self: StaticProduct, *args: Any, **options: Any) -> None:
        rounded(self, *args, **options)
        if options["where"] == "2":
            self.constant += 30

    monkeypatch.setattr(StaticProduct, "__init__", wrong)
    with pytest.raises(
        VerificationError, match=r"^2: the converted module does not compute what the float module does"
    ):
        bitwright.convert(prepared)
    with pytest.warns(UserWarning, match="^2: the converted module"):
        bitwright.convert(prepared, check="warn")
    bitwright.convert(prepared, check="off")
    with pytest.raises(RecipeError, match="unknown check 'no'"):
        bitwright.convert(prepared, check="no")  # type: ignore[arg-type]


class ReadsAttributes(nn.Module):
    """As models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.lstm, self.fc = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, index: Tensor) -> Tensor:
        if float(index.sum()) > 1e9:
            index = -index
        self.lstm.flatten_parameters()
        x = self.embed(index).to(self.fc.weight.dtype)
        x = self.conv(x.mT).mT
        shape = (
            self.conv.stride,
            self.embed.embedding_dim,
            self.lstm.hidden_size,
            self.lstm.num_layers,
            self.fc.in_features,
        )
        assert shape == ((1,), 16, 16, 1, 16) and self.fc.bias.shape == (4,)
        return self.fc(input=self.lstm(x)[0]) + (x @ self.embed.weight.t()).mean()


@torch.no_grad()
def test_integer_layers_are_drop_in() -> None:
    torch.manual_seed(0)
    net, index = ReadsAttributes().eval(), torch.arange(9).view(3, 3)
    for integer in ways(net, index).values():
        assert relative(net(index), integer(index)) < 0.05
        for name in ("conv", "fc", "embed"):
            layer = integer.get_submodule(name)
            assert relative(net.get_submodule(name).weight, layer.weight) < 0.01
    with pytest.raises(RecipeError, match="cannot be set"):
        integer.embed.weight = nn.Parameter(torch.zeros(9, 16))
    half = copy.deepcopy(net).bfloat16()
    for integer in (
        bitwright.quantize_dynamic(half),
        bitwright.quantize_dynamic(net).bfloat16(),
        converted(half, index),
    ):
        assert integer(index).dtype == torch.bfloat16
        assert relative(net(index), integer(index).float()) < 0.05


class Outputs(dict[str, Tensor]):
    """As transformers' outputs: also by number, and by attribute."""

    def __getitem__(self, key: Any) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(hidden=self.fc(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = Inner(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(logits=self.fc(self.inner(x)[0]))


@torch.no_grad()
def test_outputs_of_a_class_of_their_own_stay_what_they_are() -> None:
    torch.manual_seed(0)
    net = Outer().eval()
    for integer in ways(net, X).values():
        found = integer(X)
        assert type(found) is Outputs and relative(net(X).logits, found.logits) < 0.05


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_the_fast_path_of_transformers_is_off() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = X.view(2, 16, 16)
    made = {**ways(net, x), "weights": bitwright.quantize_weights(net, [x], scheme="int8-g16")}
    assert all(relative(net(x), integer(x)) < 0.03 for integer in made.values())
    assert len(bitwright.sensitivity(net, [x])) == 6


@torch.no_grad()
def test_a_convolutional_net_is_exported_with_a_free_batch() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=8),
                        nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()  # fmt: skip
    integer = converted(net, X.view(2, 1, 16, 16))
    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(integer, (X.view(2, 1, 16, 16),), dynamic_shapes=sizes).module()
    x = X[:24].reshape(6, 1, 8, 8).repeat(1, 1, 2, 2)
    assert torch.equal(exported(x), integer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(6, 4, 4, stride=2, groups=2, dilation=2), (2, 6, 9)),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 5)),
        (nn.ConvTranspose3d(4, 4, 3, stride=2, bias=False), (2, 4, 3, 3, 3)),
        (nn.Conv3d(4, 6, 3, stride=(2, 1, 1), padding=1, groups=2), (2, 4, 5, 6, 6)),
        (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
        (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(2, 1), padding_mode="reflect"), (2, 4, 9, 8)),
        (nn.Conv3d(4, 6, 3, padding=(1, 2, 1), padding_mode="replicate"), (2, 4, 5, 6, 6)),
    ],
    ids=str,
)
@torch.no_grad()
def test_transposed_three_dimensional_and_bordered_convolutions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    net, x = nn.Sequential(layer).eval(), torch.randn(shape)
    assert relative(layer.weight, bitwright.quantize_dynamic(layer.eval()).weight) < 0.01  # type: ignore[arg-type]
    for integer in ways(net, x).values():
        assert relative(net(x), integer(x)) < 0.03
        assert not any(t.is_floating_point() and t.numel() > 16 for t in integer.state_dict().values())


@pytest.mark.parametrize("options", [{"mode": "sum", "padding_idx": 2}, {"mode": "mean"}, {"mode": "max"}], ids=str)
@torch.no_grad()
def test_bags_of_embeddings(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, index = nn.EmbeddingBag(10, 8, **options).eval(), torch.tensor([[1, 2, 3], [9, 9, 0]])
    integer = bitwright.quantize_dynamic(net)
    assert relative(net(index), integer(index)) < 0.01
    offsets = torch.tensor([0, 4, 4])
    assert relative(net(index.flatten(), offsets), integer(index.flatten(), offsets)) < 0.01


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs"])
@torch.no_grad()
def test_pruned_weights_stay_zero(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(112, 8)).eval()
    x = X[:, None]
    sparse = bitwright.prune(net, [x], method=method, sparsity=0.5)
    gone = sparse[3].weight == 0
    assert gone.float().mean() == pytest.approx(0.5, abs=0.01) and not bool((net[3].weight == 0).any())
    assert relative(net(x), sparse(x)) < 0.8
    prepared = bitwright.prepare_qat(copy.deepcopy(sparse).train(), x)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    with torch.enable_grad():
        prepared(x).square().mean().backward()
    optimizer.step()
    made = [bitwright.convert(prepared.eval()), bitwright.quantize_weights(sparse, [x], scheme="int4-g16-asym")]
    for integer in (*made, bitwright.quantize_dynamic(sparse)):
        assert not bool(integer.get_submodule("3").weight[gone].any())
    pairs = bitwright.prune(net, [x], method="magnitude", sparsity="2:4", keep={"0": "float"})
    assert bool(((pairs[3].weight.view(-1, 4) == 0).sum(1) == 2).all()) and not bool((pairs[0].weight == 0).any())


def test_what_prune_refuses() -> None:
    net = nn.Sequential(nn.Linear(8, 4)).eval()
    with pytest.raises(RecipeError, match="unknown method 'random'"):
        bitwright.prune(net, method="random")
    with pytest.raises(RecipeError, match="sparsity '2of4' is no share and no pattern"):
        bitwright.prune(net, sparsity="2of4")
    with pytest.raises(CalibrationError, match=r"^0: method wanda needs to see inputs"):
        bitwright.prune(net, method="wanda")


class Heads(nn.Module):
    """Drops by a function, and has a head that only training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.aux = nn.Sequential(nn.Linear(16, 16), Drops()), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x)
        return (self.fc(y), self.aux(y)) if self.training else self.fc(y)


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, training=self.training)


def test_what_training_mode_does_training_keeps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 16), Heads()
    )
    net.train()[3].eval()  # frozen
    prepared = bitwright.prepare_qat(net, X)
    main, aux = prepared(X)
    again, _ = prepared(X)
    assert not torch.equal(main, again) and aux.shape == (32, 4)
    assert prepared.body.get_submodule("1").training and not prepared.body.get_submodule("3").training
    integer = bitwright.convert(prepared.eval())
    with torch.no_grad():
        assert relative(prepared(X), integer(X)) < 0.02


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sizes = nn.Linear(8, 8), (2, [3, 4])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class AsksItsChild(nn.Module):
    """It cannot be traced, and reads a number that its traced child holds."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Sized()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * (self.child.sizes[0] if float(x.mean()) < 100 else 1)


def test_a_traced_module_keeps_what_its_parent_reads() -> None:
    x, net = torch.randn(16, 8), AsksItsChild().eval()
    prepared = bitwright.calibrate(bitwright.prepare(net, x), [x])
    integer = bitwright.convert(copy.deepcopy(prepared))
    assert relative(net(x), pickle.loads(pickle.dumps(integer))(x)) < 0.02
    student = bitwright.prepare_qat(copy.deepcopy(net).train(), x)
    assert relative(net(x), bitwright.convert(student.eval())(x)) < 0.02


@torch.fx.wrap
def rolled(x: Tensor, weight: Tensor, shifts: list[int]) -> Tensor:
    """A function that torch.fx does not look into, and that changes the list it is given."""
    shifts[0] = 0 if x.shape[0] < 2 else shifts[0]
    return functional.linear(x.roll(shifts[0], 0), weight)


class Rolls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shifts = nn.Linear(8, 8), nn.Linear(8, 8), [3]

    def forward(self, x: Tensor) -> Tensor:
        return rolled(self.a(x), self.b.weight, shifts=self.shifts.copy())


def test_a_wrapped_function_may_change_its_lists() -> None:
    """As the attention of torchvision's Swin for videos."""
    x, net = torch.randn(16, 8), Rolls().eval()
    assert relative(net(x), converted(net, x)(x)) < 0.02


class Drawing(nn.Module):
    """Draws random numbers that no argument gives rise to: a trace would keep those that it saw."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(64, 64), nn.Linear(64, 8), how

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.how == "torch":
            return self.b(x + 0.1 * torch.rand(64))
        if self.how == "like":
            return self.b(x + 0.1 * torch.rand_like(x))
        draw = random.random() if self.how == "python" else float(np.random.rand())
        return self.b(x * (1 + 0.1 * draw))


@pytest.mark.parametrize("how", ["torch", "python", "numpy", "like"])
def test_random_numbers_stay_random(how: str) -> None:
    net, x = Drawing(how).eval(), torch.randn(32, 64)
    made = ways(net, x)
    assert len(made) >= 3
    for way, module in made.items():
        first, second = module(x), module(x)
        assert not torch.equal(first, second), way
        assert torch.nn.functional.cosine_similarity(first.flatten(), net(x).flatten(), 0) > 0.98, way


@pytest.mark.parametrize("how", ["torch", "python", "numpy"])
def test_comparisons_draw_alike_and_leave_the_generators_alone(how: str) -> None:
    net, x = Drawing(how).eval(), torch.randn(8, 64)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    undisturbed = net(x)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    (first,), (second,) = outputs(net, x), outputs(net, x)
    assert torch.equal(first, second)
    assert torch.equal(net(x), undisturbed)
