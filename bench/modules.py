"""Published architectures with random weights, quantized each way: how near to float, how large, how fast, beside the peers.

    bench/peers/install.sh modules
    PYTHONPATH=src OMP_NUM_THREADS=1 bench/peers/envs/modules/bin/python -m bench.modules [--only NAME,…] [--size 64] [--again]

Rows: torchvision's families (images of `--size` pixels, or the least that a model allows) and tiny encoders of transformers,
with random weights; and six trained networks (bench/trained.py).
bitwright: dynamic, static (calibrated on the batch), QAT of three steps, weights only (int4-g32, RTN: beside the float module
on the same rounded weights too), and the static module's ONNX file in onnxruntime. Peers: torch.ao dynamic and static (FX),
onnxruntime's own static quantization of the float export.

A row's results are appended to bench/out/modules.jsonl when it is done; rows that are there are not run again, except with
`--again`. A cell is the cosine of the outputs to the float module's (for QAT, to the trained module's), "refused" where
bitwright says what it cannot do, "fails" for any other error. Times are medians, the contenders taking turns.
"""

import argparse
import contextlib
import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor, nn

import bitwright
from bench.architectures import makers
from bench.digits import milliseconds, size
from bench.measure import OUT, table
from bitwright.errors import BitwrightError
from bitwright.nn.batches import cloned, outputs, run, tensors
from bitwright.numerics.codec import decode

Row = dict[str, Any]  # way -> {"cosine": …, "ms": …, "bytes": …} or {"error": …}
Session = Any
FILE = OUT / "modules.jsonl"
SILENT = 0.9  # a lower cosine that nothing complained of counts as silently wrong, unless rounding explains it
WEIGHTS, EXPLAINED = "int4-g32", 0.999  # least cosine to the float module with the same weights rounded
MOST_BELOW_PEER = 0.005
PAIRS = (("dynamic", "torch.ao dynamic"), ("static", "torch.ao static"))


# ------------------------------------------------------------------------------------------------------------ contenders


def static(net: nn.Module, batch: Any) -> nn.Module:
    """Calibrated on the batch itself."""
    return bitwright.convert(bitwright.calibrate(bitwright.prepare(net, batch), [batch]))


def trained(net: nn.Module, batch: Any) -> tuple[nn.Module, nn.Module]:
    """Three steps of quantization-aware training: the trained module, and its integer form."""
    student = bitwright.prepare_qat(copy.deepcopy(net).train(), batch)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        result = student(**batch) if isinstance(batch, dict) else student(batch)
        sum(t.float().square().mean() for t in tensors(result) if t.is_floating_point()).backward()  # type: ignore[union-attr]
        optimizer.step()
    student.eval()
    return student, bitwright.convert(student)


def torch_ao(net: nn.Module, batch: Any, way: str) -> nn.Module:
    """By torch.ao, with its defaults for x86."""
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx

    torch.backends.quantized.engine = "x86"
    net = copy.deepcopy(net)
    if way == "dynamic":
        return ao.quantize_dynamic(net, dtype=torch.qint8)
    example = tuple(batch.values()) if isinstance(batch, dict) else (batch,)
    prepared = quantize_fx.prepare_fx(net, ao.get_default_qconfig_mapping("x86"), example)
    run(prepared, batch)
    return quantize_fx.convert_fx(prepared)


class Onnx:
    """A file in onnxruntime, on one thread. fused: convolutions that it runs in integers, as one operation each."""

    def __init__(self, file: Path, batch: Any) -> None:
        import onnx
        import onnxruntime

        options, optimized = onnxruntime.SessionOptions(), file.with_suffix(".optimized.onnx")
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3  # not that such a file is for this processor alone
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.bytes = file.stat().st_size
        nodes = onnx.load(str(optimized), load_external_data=False).graph.node
        self.fused = sum(node.op_type == "QLinearConv" for node in nodes)
        self.feeds = feeds(self.session, batch)

    def __call__(self) -> list[Tensor]:
        """The outputs."""
        return [torch.from_numpy(y) for y in self.session.run(None, self.feeds)]


def feeds(session: Session, batch: Any) -> dict[str, Any]:
    """A batch as onnxruntime takes it."""
    given = list(batch.values()) if isinstance(batch, dict) else [batch]
    return {each.name: x.numpy() for each, x in zip(session.get_inputs(), given, strict=True)}


class Batches:
    """The one batch, for onnxruntime's calibration."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = [given]

    def get_next(self) -> dict[str, Any] | None:
        """The batch, then None."""
        return self.given.pop() if self.given else None


def by_onnxruntime(net: nn.Module, batch: Any, folder: Path) -> Path:
    """The float module's export, quantized by onnxruntime's own static quantization: uint8 inputs, weights by channel."""
    import onnxruntime
    from onnxruntime import quantization

    float_file, ready, made = folder / "float.onnx", folder / "ready.onnx", folder / "theirs.onnx"
    given = cloned(batch)
    args, named = ((), given) if isinstance(given, dict) else ((given,), None)
    torch.onnx.export(net, args, str(float_file), kwargs=named, dynamo=False, opset_version=17)
    with contextlib.chdir(folder):  # where it may leave a file
        quantization.shape_inference.quant_pre_process(str(float_file), str(ready))
    session = onnxruntime.InferenceSession(str(ready), providers=["CPUExecutionProvider"])
    quantization.quantize_static(str(ready), str(made), Batches(feeds(session, batch)), per_channel=True)
    return made


# ------------------------------------------------------------------------------------------------------------- one row


def cosine(expected: list[Tensor], found: list[Tensor]) -> float:
    """Of all floating-point outputs together."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(expected, found, strict=True) if a.is_floating_point()]
    a, b = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    return float((a / a.norm()) @ (b / b.norm()))  # outputs of random weights may be as small as 1e-10


class Measured:
    """One architecture, all ways. result: the row; runs: what is timed at the end."""

    def __init__(self, net: nn.Module, batch: Any, folder: Path) -> None:
        self.net, self.batch, self.folder = net, batch, folder
        self.expected = outputs(net, batch)
        self.result: Row = {"float": {"cosine": 1.0, "bytes": size(net)}}
        self.runs: dict[str, Callable[[], object]] = {"float": lambda: run(net, batch)}

    def way(self, name: str, measure: Callable[[], Row]) -> None:
        """Measure one way, or record why it failed."""
        try:
            self.result[name] = measure()
        except BitwrightError as error:
            self.result[name] = {"error": f"refused: {error}"}
        except Exception as error:  # noqa: BLE001  what fails is a row of the table
            self.result[name] = {"error": f"{type(error).__name__}: {error}"}
        if "error" in self.result[name]:
            print(f"  {name}: {self.result[name]['error']}"[:400].replace("\n", " "), flush=True)

    def module(self, name: str, make: Callable[[nn.Module, Any], nn.Module]) -> None:
        """A way that makes a module."""

        def measure() -> Row:
            made = make(self.net, self.batch)
            found = {"cosine": cosine(self.expected, outputs(made, self.batch)), "bytes": size(made)}
            self.runs[name] = lambda: run(made, self.batch)  # timed only if it runs
            return found

        self.way(name, measure)

    def file(self, name: str, make: Callable[[], Path]) -> None:
        """A way that makes an ONNX file."""

        def measure() -> Row:
            made = Onnx(make(), self.batch)
            found = {"cosine": cosine(self.expected, made()), "bytes": made.bytes, "fused": made.fused}
            print(f"  {name}: {made.fused} convolutions fused", flush=True)
            self.runs[name] = made
            return found

        self.way(name, measure)

    def weights(self) -> Row:
        """Weights alone, rounded: beside the float module, and beside one whose Linear layers have the same weights."""
        made = bitwright.quantize_weights(self.net, [self.batch], scheme=WEIGHTS, method="rtn")
        twin, found = copy.deepcopy(self.net), outputs(made, self.batch)
        for layer in (module for module in twin.modules() if type(module) is nn.Linear):
            layer.weight.data = decode(bitwright.quantize_tensor(layer.weight.data, WEIGHTS, method="rtn"))
        explained = cosine(outputs(twin, self.batch), found)
        self.runs["weights"] = lambda: run(made, self.batch)
        return {"cosine": cosine(self.expected, found), "explained": explained, "bytes": size(made)}

    def qat(self) -> Row:
        """Integers beside what was trained."""
        student, integer = trained(self.net, self.batch)
        return {"cosine": cosine(outputs(student, self.batch), outputs(integer, self.batch)), "bytes": size(integer)}

    def all(self) -> Row:
        """Every way, and the times."""
        self.module("dynamic", lambda net, batch: bitwright.quantize_dynamic(net, example_inputs=batch))
        self.module("static", static)
        self.way("QAT", self.qat)
        self.way("weights", self.weights)
        self.file("ONNX", self.exported)
        self.module("torch.ao dynamic", lambda net, batch: torch_ao(net, batch, "dynamic"))
        self.module("torch.ao static", lambda net, batch: torch_ao(net, batch, "static"))
        self.file("onnxruntime", lambda: by_onnxruntime(self.net, self.batch, self.folder))
        for name, ms in milliseconds(self.runs, 5, 1).items():
            self.result[name]["ms"] = ms
        return self.result

    def exported(self) -> Path:
        """The static module's file."""
        return bitwright.export_onnx(static(self.net, self.batch), self.batch, self.folder / "ours.onnx")


# --------------------------------------------------------------------------------------------------------------- tables


def cell(found: Row) -> str:
    """A cosine, or how it failed."""
    if "error" in found:
        return "refused" if found["error"].startswith("refused") else "fails"
    return f"{found['cosine']:.4f}"


def works(found: Row) -> bool:
    """Whether it ran, and is what it should be."""
    return found.get("cosine", 0) >= SILENT or found.get("explained", 0) >= EXPLAINED


def time_of(found: Row) -> str:
    """Milliseconds, "" if there are none."""
    return f"{found['ms']:.1f}" if "ms" in found else ""


def report(rows: dict[str, Row]) -> str:
    """Both tables, and what they come to."""
    ways = list(next(iter(rows.values())))
    ours = [way for way in ways if way not in ("float", "onnxruntime") and not way.startswith("torch.ao")]
    timed = [way for way in ways if way not in ("QAT",)]
    nearness = [[name, *(cell(row[way]) for way in ways[1:])] for name, row in rows.items()]
    speed = [
        [name, *(time_of(row[way]) for way in timed), f"{row['float']['bytes'] / row['static'].get('bytes', 1e-9):.2f} ×"]
        for name, row in rows.items()
    ]  # fmt: skip
    lines = [table(["cosine", *ways[1:]], nearness), "", table(["ms", *timed, "static smaller"], speed), ""]
    for way in ways[1:]:
        good = [name for name, row in rows.items() if works(row[way])]
        wrong = [name for name, row in rows.items() if "cosine" in row[way] and name not in good]
        said = f"; silently wrong: {', '.join(wrong) or 'none'}" if way in ours else ""
        lines.append(f"{way}: {len(good)} of {len(rows)} work{said}")
    for mine, theirs in PAIRS:
        below = [
            f"{name} ({row[mine].get('cosine', 0):.4f}, {row[theirs]['cosine']:.4f})"
            for name, row in rows.items()
            if row[theirs].get("cosine", 0) - row[mine].get("cosine", 0) > MOST_BELOW_PEER
        ]
        lines.append(f"{mine} below {theirs} by more than {MOST_BELOW_PEER}: {', '.join(below) or 'none'}")
    return "\n".join(lines)


def done() -> dict[str, Row]:
    """The rows in the file; of two of one name, the last."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return {each["name"]: each["row"] for each in map(json.loads, lines)}


def main() -> None:
    """Measure what is not measured yet, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    OUT.mkdir(parents=True, exist_ok=True)
    known = makers(options.size)
    names = options.only.split(",") if options.only else list(known)
    for name in names:
        if name in done() and not options.again:
            continue
        print(name, flush=True)
        torch.manual_seed(0)
        net, batch = known[name]()
        with tempfile.TemporaryDirectory() as folder:
            row = Measured(net, batch, Path(folder)).all()
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "row": row}) + "\n")
    rows = {name: row for name, row in done().items() if name in names}
    print(report({name: rows[name] for name in names}))


if __name__ == "__main__":
    main()
