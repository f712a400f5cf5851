"""Quantization-aware training: gradients by hand, the integer module that training promised, distillation."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import bitwright
from bitwright.errors import RecipeError, SchemeError
from bitwright.nn.fake import FakeWeight, StraightThrough, fake
from bitwright.nn.layers import StaticProduct
from bitwright.numerics.codec import rounded
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme
from bitwright.train.distill import distillation_loss
from bitwright.train.qat import freeze
from small_modules import Products, images, relative, residual


def test_the_gradients_of_a_rounded_value() -> None:
    """LSQ, eq. 3, by hand: int4 with zero point 2, step 0.5, so that codes −8..7 stand for −5..2.5."""
    x = torch.tensor([[[-6.0, -4.9, 0.2, 2.4, 3.0]]], requires_grad=True)
    scale, zero = torch.tensor([[[0.5]]], requires_grad=True), torch.tensor([[[2.0]]])
    y = StraightThrough.apply(x, scale, zero, Scheme.parse("int4-tensor-asym"), True)
    torch.testing.assert_close(y[0, 0], torch.tensor([-5.0, -5.0, 0.0, 2.5, 2.5]))
    y.sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0, 1, 1, 1, 0]
    each = [-10.0, -10 + 9.8, 0 - 0.4, 5 - 4.8, 5.0]
    assert float(scale.grad) == pytest.approx(sum(each), rel=1e-5)


def test_weights_under_scales_of_their_own_always_get_a_gradient() -> None:
    for scheme in ("ternary-channel", "binary-channel", "int2-channel", "int4-g32-asym", "nf4-g32", "q4_k"):
        w = torch.randn(3, 256, requires_grad=True)
        FakeWeight(w, Scheme.parse(scheme), learned=False)(w).sum().backward()
        assert w.grad is not None and torch.equal(w.grad, torch.ones(3, 256)), scheme


def test_fake_is_what_the_codec_rounds_to() -> None:
    x = torch.randn(4, 64)
    for scheme in ("int8-channel", "int3-g16-asym", "ternary-channel", "fp4-g32"):
        s = Scheme.parse(scheme)
        scales: Scales = bitwright.numerics.codec.fit(x, s)
        assert torch.equal(fake(x, scales, s), rounded(x, s, scales))


def fit(model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 60, rate: float = 0.01) -> list[float]:
    step, losses = torch.optim.Adam(model.parameters(), lr=rate), []
    for _ in range(steps):
        step.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        step.step()
        losses.append(float(loss.detach()))
    return losses


def task() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(500, 6)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3:].sum(1)], dim=1)
    fit(net, x, y, steps=300)
    return net, x, y


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [("int8-channel", "int8-tensor"), ("int4-channel", "int8-tensor-asym"), ("int2-channel", "int8-token"),
     ("ternary-channel", "int8-tensor-asym"), ("binary-channel", "int8-tensor-asym"), ("int4-g32-asym", "int6-tensor")],
)  # fmt: skip
def test_training_beats_rounding_and_converts_to_what_it_saw(
    weights: str, activations: str, learned: bool, products: set[torch.dtype]
) -> None:
    net, x, y = task()
    after = bitwright.prepare(net.eval(), x, weights=weights, activations=activations)
    untrained = bitwright.convert(bitwright.calibrate(after, [x]))
    trained = bitwright.prepare_qat(net.train(), x, weights=weights, activations=activations, learned=learned)
    fit(trained, x, y, steps=150)
    integer = bitwright.convert(trained.eval())
    with torch.no_grad(), Products() as seen:
        found = integer(x)
    assert set(seen.types) == products
    with torch.no_grad():
        promised, loss = trained(x), functional.mse_loss(found, y)
        low, high = promised.aminmax()
        assert (promised - found).abs().max() <= (high - low) / (1 << int(activations[3]))
        assert loss < functional.mse_loss(untrained(x), y)
    kinds = [
        [type(m) for m in module.modules()][1:] for module in (integer, untrained)
    ]  # the first: a class of its own
    assert kinds[0] == kinds[1]


def test_batch_norms_are_folded_and_the_structure_is_that_of_static_quantization() -> None:
    net, x = residual(), images()
    static = bitwright.convert(bitwright.calibrate(bitwright.prepare(net, x), [x]))
    prepared = bitwright.prepare_qat(net.train(), x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    step = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    prepared(x).square().mean().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    step.step()
    integer = bitwright.convert(prepared.eval())
    with torch.no_grad():
        assert relative(prepared(x), integer(x)) < 0.02
    shapes = [{name: t.shape for name, t in module.state_dict().items()} for module in (static, integer)]
    assert shapes[0] == shapes[1]
    assert net.training and sum(isinstance(m, StaticProduct) for m in integer.modules()) == 6


@pytest.mark.parametrize("learned", [False, True])
def test_autocast_and_gradient_checkpointing(learned: bool) -> None:
    net, x, y = task()
    prepared = bitwright.prepare_qat(net, x, learned=learned)
    freeze(prepared)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.mse_loss(prepared(x).float(), y)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in prepared.parameters())
    grads = []
    for run in (prepared, lambda x: checkpoint(prepared, x, use_reentrant=False)):
        prepared.zero_grad()
        functional.mse_loss(run(x), y).backward()
        grads.append([p.grad.clone() for p in prepared.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and grads[0]


def test_ranges_follow_while_training_and_only_then() -> None:
    net, x, _ = task()
    prepared = bitwright.prepare_qat(net, x, learned=False)
    edge = prepared.edges()[-1]
    before = float(edge.scales().scale)
    prepared.eval()(3 * x)
    assert float(edge.scales().scale) == before
    prepared.train()(3 * x)
    assert float(edge.scales().scale) > 1.05 * before
    freeze(prepared)(9 * x)
    assert edge.histogram.batches == 2


def test_an_embedding_is_trained_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 3))
    index = torch.arange(7)
    prepared = bitwright.prepare_qat(net, index, weights="int4-channel")
    prepared(index).sum().backward()
    integer = bitwright.convert(prepared.eval())
    with torch.no_grad():
        assert relative(prepared(index), integer(index)) < 0.01
    assert integer.get_buffer("0.codes").dtype == torch.int8


def test_a_convolution_with_a_repeated_border_is_trained_as_it_is_converted() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(3, 2, 6, 6)
    prepared = bitwright.prepare_qat(net, x)
    prepared(x).sum().backward()
    integer = bitwright.convert(prepared.eval())
    with torch.no_grad():
        assert relative(prepared(x), integer(x)) < 0.01
    kinds = {layer.name: layer.kind for layer in bitwright.layers(integer)}
    assert kinds["0.layer"] == kinds["2"] == "integer"


def test_the_source_is_trained_only_in_place() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).train(), torch.randn(5, 8)
    before = net[0].weight.detach().clone()
    for inplace in (False, True):
        student = bitwright.prepare_qat(net, x, inplace=inplace)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        student(x).square().sum().backward()
        optimizer.step()
        assert torch.equal(net[0].weight, before) is not inplace


def test_what_prepare_qat_refuses() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    with pytest.raises(RecipeError, match="in eval mode, where train is needed"):
        bitwright.prepare_qat(copy.deepcopy(net).eval(), x)
    with pytest.raises(SchemeError, match=r"^0: weights of scheme 'nf4"):
        bitwright.prepare_qat(net, x, weights="nf4-channel")
    with pytest.raises(RecipeError, match="in train mode, where eval is needed"):
        bitwright.convert(bitwright.prepare_qat(net, x))
    with pytest.raises(RecipeError, match="already prepared"):
        bitwright.prepare_qat(bitwright.prepare_qat(net, x), x)
    assert net.training and not list(net[0].parametrizations if hasattr(net[0], "parametrizations") else [])


def test_the_loss_of_distillation_against_float64() -> None:
    student, teacher = torch.randn(5, 4, 7), torch.randn(5, 4, 7)
    p, q = ((t.double() / 3).softmax(-1).view(-1, 7) for t in (teacher, student))
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=3).double(), expected, rtol=1e-5, atol=0)


def test_a_student_learns_from_its_teacher() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x @ torch.randn(8, 4)).argmax(1)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    step = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(100):
        step.zero_grad()
        functional.cross_entropy(teacher(x), y).backward()
        step.step()
    student = bitwright.prepare_qat(teacher, x, weights="int2-channel")
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    batches = list(zip(x.split(64), y.split(64), strict=True))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = bitwright.distill(student, teacher, batches, alpha=0.9, epochs=10, optimizer=optimizer)
    assert len(losses) == 80 and sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert teacher.training and all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    with torch.no_grad():
        agreed = (bitwright.convert(student.eval())(x).argmax(1) == teacher(x).argmax(1)).float().mean()
    assert agreed > 0.85


def test_what_distill_refuses() -> None:
    net, batch = nn.Linear(4, 4), (torch.randn(2, 4), torch.tensor([0, 1]))
    for options in ({"temperature": 0.0}, {"alpha": 1.5}):
        with pytest.raises(RecipeError, match="a temperature above 0"):
            bitwright.distill(net, net, [batch], **options)
    with pytest.raises(RecipeError, match=r"^student: in eval mode"):
        bitwright.distill(copy.deepcopy(net).eval(), net, [batch])
    with pytest.raises(RecipeError, match=r"^loader: no batches"):
        bitwright.distill(net, net, [])
