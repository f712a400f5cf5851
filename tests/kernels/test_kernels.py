"""The native extension against its torch twins: every instruction set that this CPU has, bit for bit."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright import kernels
from bitwright.kernels import rounding
from bitwright.kernels.rounding import RoundingVariables
from bitwright.methods.autoround import move, variables_of
from bitwright.methods.coordinate_descent import coordinate_descent
from bitwright.methods.gptq import gptq
from bitwright.methods.rtn import rtn
from bitwright.methods.search import best_scales
from bitwright.numerics import lattice
from bitwright.numerics.codec import decode, encode, fit, pairwise_sum
from bitwright.numerics.loss import energy, loss
from bitwright.numerics.scheme import Scheme
from conftest import ISAS
from twins import SCHEMES, in_torch, same, weights

native = kernels.native
needs_native = pytest.mark.skipif(native is None, reason="the extension was not built")


def correlated(K: int) -> Tensor:
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(3 * K, K, generator=generator) @ (torch.eye(K) + 0.1 * torch.randn(K, K, generator=generator))
    return x.T @ x / len(x)


@pytest.mark.skipif(os.environ.get(kernels.VARIABLE) == kernels.TORCH, reason="turned off")
def test_the_extension_is_built_where_there_is_a_compiler() -> None:
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no compiler")
    assert native is not None and "scalar" in ISAS
    assert kernels.current() in ISAS


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(37, 512), (16, 300)])
def test_scale_search_gives_the_same_bits(isa: str, text: str, N: int, K: int) -> None:
    scheme, w = Scheme.parse(text), weights(N, K)
    importance = torch.rand(K, generator=torch.Generator().manual_seed(1))
    importance[7] = 0
    assert rounding.handles(scheme, w)
    found = best_scales(w, scheme, importance)
    expected = in_torch(lambda: best_scales(w, scheme, importance))
    for name in ("scale", "zero", "outer", "outer_zero"):
        x, y = getattr(found, name), getattr(expected, name)
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y), name


@pytest.mark.parametrize("grid", lattice.TABLES)
def test_the_nearest_entries_are_the_same(isa: str, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without importance; a length that fills no whole runs; zeros, and weights far outside the codebook."""
    generator = torch.Generator().manual_seed(0)
    x, u = 1.5 * torch.randn(40, 300, generator=generator), torch.rand(300, generator=generator)
    x[3, :64], x[5], u[9] = 0, 100 * x[5], 0
    found = [lattice.nearest(x, grid, weight) for weight in (None, u)]
    monkeypatch.setattr(lattice, "native", None)
    expected = [lattice.nearest(x, grid, weight) for weight in (None, u)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(37, 512), (16, 300)])
def test_gptq_gives_the_same_bits(isa: str, text: str, N: int, K: int) -> None:
    scheme, w, gram = Scheme.parse(text), weights(N, K), correlated(K)
    found = gptq(w, gram, scheme, sweeps=0).q
    assert same(found, in_torch(lambda: gptq(w, gram, scheme, sweeps=0).q))


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(37, 512), (16, 300)])
def test_descent_loses_what_its_twin_loses(isa: str, text: str, N: int, K: int) -> None:
    scheme, w, gram = Scheme.parse(text), weights(N, K), correlated(K)
    start = rtn(w, gram, scheme).q
    found = coordinate_descent(w, gram, start, sweeps=2, ridge=0.01)
    expected = in_torch(lambda: coordinate_descent(w, gram, start, sweeps=2, ridge=0.01))
    assert (found.codes != expected.codes).float().mean() < 1e-3  # a tie may fall otherwise
    losses = [loss(w, decode(q), gram) for q in (found, expected, start)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < losses[2]


@needs_native
@pytest.mark.parametrize("text", ["int4-g128", "nf4-g64", "int3-g32-min", "int4-g16-asym"])
def test_descent_is_the_same_under_every_instruction_set(text: str) -> None:
    assert native is not None
    scheme, w, gram = Scheme.parse(text), weights(37, 512), correlated(512)
    before, found = native.current(), []
    for name in ISAS:
        native.choose(name)
        found.append(coordinate_descent(w, gram, rtn(w, gram, scheme).q, sweeps=2))
    native.choose(before)
    assert all(same(found[0], other) for other in found)


INTEGERS = [text for text in SCHEMES if Scheme.parse(text).levels.levels is None]


def stepped(text: str, N: int, K: int, dtype: torch.dtype) -> RoundingVariables:
    """AutoRound's variables after six steps against gradients made up."""
    w, generator = weights(N, K), torch.Generator().manual_seed(2)
    k = variables_of(w, rtn(w, None, Scheme.parse(text)).q, dtype)
    for _ in range(6):
        gradient = 1e-3 * torch.randn(N, K, generator=generator)
        gradient[:, 7] = 0
        move(k, gradient.to(dtype), rate=0.1, scale_rate=0.01)
    return k


@pytest.mark.parametrize("text", INTEGERS)
@pytest.mark.parametrize(("N", "K"), [(37, 512), (16, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuning_gives_the_same_bits(isa: str, text: str, N: int, K: int, dtype: torch.dtype) -> None:
    found, expected = stepped(text, N, K, dtype), in_torch(lambda: stepped(text, N, K, dtype))
    for name in ("base", "offset", "square", "scale", "stretch", "stretch_square", "decoded"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.offset.abs() == 0.5).any() and (found.offset == 0)[:, 7].all()
    assert (found.scale != found.start).any() == found.movable


def in_native(scheme: Scheme, w: Tensor) -> list[Tensor]:
    """All that the extension computes of a matrix, without torch's own products: those add up by the thread."""
    scales = best_scales(w, scheme, torch.ones(w.shape[1]))
    groups = torch.arange(w.shape[1]) // scheme.group_length(w.shape[1])
    scale, zero = (None if x is None else x.T.contiguous() for x in (scales.scale, scales.zero))
    assert scale is not None
    propagation = torch.eye(w.shape[1]) + 0.1 * correlated(w.shape[1]).triu(1)
    rounded_columns = rounding.round_columns(
        w.T.contiguous(), w.T.contiguous(), propagation, scheme, groups, scale, zero
    )
    k = stepped(str(scheme), *w.shape, torch.float32)
    return [scale, *rounded_columns, k.offset, k.scale, k.decoded]


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    scheme, w = Scheme.parse("int4-g128-asym"), weights(700, 256)
    before, found = torch.get_num_threads(), []
    for count in (before, threads):
        torch.set_num_threads(count)
        found.append(in_native(scheme, w))
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@needs_native
def test_callers_in_several_threads_do_not_meet() -> None:
    scheme, w = Scheme.parse("int4-g32"), weights(300, 512)
    expected, found = best_scales(w, scheme, None).scale, []

    def work() -> None:
        found.extend(best_scales(w, scheme, None).scale for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 80
    assert all(torch.equal(scale, expected) for scale in found)


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_can_round() -> None:
    code = """
import os, torch
from bitwright.methods.search import best_scales
from bitwright.numerics.scheme import Scheme
torch.set_num_threads(2)
w = torch.randn(300, 512)
expected = best_scales(w, Scheme.parse("int4-g32"), None).scale
child = os.fork()
if child == 0:
    from bitwright.kernels import rounding
    shrinks = [(s, s) for s in torch.linspace(1.0, 0.65, 8).tolist()]
    found = rounding.search(w, torch.ones(512), Scheme.parse("int4-g32"), shrinks)[0]
    os._exit(0 if torch.equal(found, expected) else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@needs_native
def test_shapes_are_checked() -> None:
    scheme = Scheme.parse("int4-g32")
    good = {
        "target": torch.zeros(32, 8),
        "original": torch.zeros(32, 8),
        "propagation": torch.zeros(32, 32),
        "scheme": scheme,
        "groups": torch.zeros(32, dtype=torch.int64),
        "scale": torch.ones(1, 8),
        "zero": None,
    }
    rounding.round_columns(**good)
    bad = [
        {"original": torch.zeros(31, 8)},
        {"original": torch.zeros(32, 9)},
        {"propagation": torch.zeros(31, 32)},
        {"groups": torch.zeros(31, dtype=torch.int64)},
        {"groups": torch.ones(32, dtype=torch.int64)},
        {"groups": -torch.ones(32, dtype=torch.int64)},
        {"scale": torch.ones(1, 7)},
        {"zero": torch.ones(1, 8)},
        {"scheme": Scheme.parse("int4-g32-asym")},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=r"must be|zero goes|group beyond"):
            rounding.round_columns(**(good | change))
    with pytest.raises(TypeError):
        rounding.round_columns(**(good | {"target": torch.zeros(32, 8, dtype=torch.float64)}))
    with pytest.raises(ValueError, match="weight must have K entries"):
        rounding.search(torch.zeros(2, 64), torch.ones(63), scheme, [(1.0, 1.0)])


@needs_native
def test_shapes_of_tuning_are_checked() -> None:
    w, text = torch.randn(8, 64), "int4-g32-asym"
    good = variables_of(w, rtn(w, None, Scheme.parse(text)).q, torch.float32)
    rates = {"rate": 0.1, "scale_rate": 0.1, "fresh": 0.1}
    rounding.tune(good, torch.zeros(8, 64), **rates)
    wrong = torch.zeros(8, 63)
    for name in ("base", "offset", "square", "start", "scale", "stretch", "stretch_square", "zero", "decoded"):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            rounding.tune(replace(good, **{name: wrong}), None, **rates)
    with pytest.raises(ValueError, match="gradient must be"):
        rounding.tune(good, wrong, **rates)
    for bad in ({"zero": None}, {"scheme": Scheme.parse("int4-g32")}):
        with pytest.raises(ValueError, match="zero goes"):
            rounding.tune(replace(good, **bad), None, **rates)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        rounding.tune(replace(good, decoded=torch.zeros(8, 64, dtype=torch.float64)), None, **rates)
    with pytest.raises(ValueError, match="codes integers"):
        rounding.tune(replace(good, scheme=Scheme.parse("nf4-g32")), None, **rates)


def test_what_the_extension_does_not_know_stays_in_torch() -> None:
    w = torch.zeros(2, 64)
    assert not rounding.handles(Scheme.parse("fp8-channel"), w)
    assert not rounding.handles(Scheme.parse("int8-tensor"), w)
    assert not rounding.handles(Scheme.parse("int4-g32"), w.to("meta"))


@pytest.mark.parametrize(("value", "status"), [("scalar", 0), ("torch", 0), ("mmx", 2)])
def test_the_environment_forces_one(value: str, status: int) -> None:
    if native is None and value == "scalar":
        pytest.skip("the extension was not built")
    code = "from bitwright import kernels; print(kernels.current())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, kernels.VARIABLE: value},
        capture_output=True,
        text=True,
        check=False,
    )
    if status == 0:
        assert done.stdout.strip() == value
    else:
        assert "mmx" in done.stderr
        assert "KernelError" in done.stderr


@pytest.mark.parametrize("n", [1, 2, 3, 16, 100, 256, 300])
def test_folding_sums_the_last_axis(n: int) -> None:
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert torch.allclose(pairwise_sum(x), x.sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(37, 512), (16, 300)])
def test_codes_and_losses_are_those_of_the_twins(isa: str, text: str, N: int, K: int) -> None:
    scheme, w, importance = Scheme.parse(text), weights(N, K), torch.rand(K, generator=torch.Generator().manual_seed(1))
    scales = fit(w, scheme)
    q = rounding.encode(w, scales, scheme)
    assert same(q, encode(w, scales, scheme))
    w[5] = 0  # whose squares vanish in float32
    for known in (None, importance):
        for found, expected in zip(
            rounding.error_energy(w, q, known), (energy(w - decode(q), known), energy(w, known)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30)
