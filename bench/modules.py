"""Architectures as they are published, with random weights: which of them each way of quantizing takes, and how near it stays.

    python -m bench.modules [--only NAME,...] [--ways dynamic,static,qat,onnx] [--size 64]

torchvision's families (an environment of its own: `pip install torchvision onnxruntime`; without it these rows are left out)
and tiny encoders of transformers. A cell is the cosine of the outputs to the float module's (for QAT: to the trained
module's, after three steps), "refused" where bitwright said what it cannot do, or "BROKEN" for any other error. A last line
says how many of each way work, and whether any was silently wrong: a cosine below .9 that nothing complained of.
"""

import argparse
import copy
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitwright
from bench.measure import table
from bitwright.errors import BitwrightError
from bitwright.nn.batches import outputs, tensors

IMAGES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16",
)  # fmt: skip
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18", "s3d")
ENCODERS = ("bert", "distilbert", "roberta", "albert", "electra", "mpnet", "deberta-v2", "xlm-roberta", "gpt2", "t5")
SIZES = {"inception_v3": 96, "vit_b_16": 224, "maxvit_t": 224}
WAYS = ("dynamic", "static", "qat", "onnx")
SILENT = 0.9

Made = tuple[nn.Module, Any]  # a module in eval mode, and a batch


def torchvision_model(family: str, name: str, size: int) -> Made:
    """One of torchvision's, and random images or clips."""
    models = importlib.import_module(f"torchvision.models{family}")
    size = SIZES.get(name, size)
    options: dict[str, Any] = (
        {"weights": None, "weights_backbone": None} if family == ".segmentation" else {"weights": None}
    )
    options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    shape = (2, 3, 8, size, size) if family == ".video" else (2, 3, size, size)
    return getattr(models, name)(**options).eval(), torch.randn(shape)


def encoder(name: str) -> Made:
    """A tiny model of transformers, and random tokens."""
    import transformers

    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50,
        "max_position_embeddings": 40,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "distilbert": {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 64,
            "vocab_size": 50,
            "max_position_embeddings": 40,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 40},
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
        "albert": {**small, "embedding_size": 16},
        "electra": {**small, "embedding_size": 16},
    }
    config = transformers.AutoConfig.for_model(name, **own.get(name, small))
    batch = {"input_ids": torch.randint(3, 50, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    if name == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 50, (2, 6))
    return transformers.AutoModel.from_config(config, attn_implementation="eager").eval(), batch


def makers(size: int) -> dict[str, Callable[[], Made]]:
    """Every architecture, by name."""
    found: dict[str, Callable[[], Made]] = {}
    if importlib.util.find_spec("torchvision"):
        for family, names in (("", IMAGES), (".segmentation", SEGMENTATION), (".video", VIDEO)):
            found |= {name: lambda name=name, family=family: torchvision_model(family, name, size) for name in names}
    return found | {name: lambda name=name: encoder(name) for name in ENCODERS}


def cosine(expected: list[Tensor], found: list[Tensor]) -> float:
    """Of all floating-point outputs together."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(expected, found, strict=True) if a.is_floating_point()]
    a, b = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def static(net: nn.Module, batch: Any) -> nn.Module:
    """Calibrated on the batch itself."""
    return bitwright.convert(bitwright.calibrate(bitwright.prepare(net, batch), [batch]))


def trained(net: nn.Module, batch: Any) -> float:
    """Three steps of training, then integers, beside what was trained."""
    student = bitwright.prepare_qat(copy.deepcopy(net).train(), batch)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        result = student(**batch) if isinstance(batch, dict) else student(batch)
        sum(t.float().square().mean() for t in tensors(result) if t.is_floating_point()).backward()  # type: ignore[union-attr]
        optimizer.step()
    student.eval()
    return cosine(outputs(student, batch), outputs(bitwright.convert(student), batch))


def in_onnxruntime(net: nn.Module, batch: Any) -> float:
    """The static module's file beside the static module."""
    import onnxruntime

    integer = static(net, batch)
    with tempfile.TemporaryDirectory() as folder:
        file = bitwright.export_onnx(integer, batch, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = list(batch.values()) if isinstance(batch, dict) else [batch]
    feeds = {each.name: x.numpy() for each, x in zip(session.get_inputs(), given, strict=True)}
    return cosine(outputs(integer, batch), [torch.from_numpy(y) for y in session.run(None, feeds)])


def cell(way: str, net: nn.Module, batch: Any) -> str:
    """How near one way comes, or why it does not."""
    try:
        if way == "qat":
            return f"{trained(net, batch):.4f}"
        if way == "onnx":
            return f"{in_onnxruntime(net, batch):.4f}"
        made = bitwright.quantize_dynamic(net, example_inputs=batch) if way == "dynamic" else static(net, batch)
        return f"{cosine(outputs(net, batch), outputs(made, batch)):.4f}"
    except BitwrightError as error:
        print(f"  {way}: {error}".replace("\n", " "), flush=True)
        return "refused"
    except Exception as error:  # noqa: BLE001  what breaks is a row of the table
        print(f"  {way}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
        return "BROKEN"


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ways, known = options.ways.split(","), makers(options.size)
    names = options.only.split(",") if options.only else list(known)
    rows = []
    for name in names:
        torch.manual_seed(0)
        net, batch = known[name]()
        rows.append([name, *(cell(way, net, batch) for way in ways)])
        print(*rows[-1], flush=True)
    print(table(["", *ways], rows))
    for i, way in enumerate(ways, 1):
        values = [row[i] for row in rows]
        good = [value for value in values if value[0].isdigit() and float(value) >= SILENT]
        wrong = [row[0] for row in rows if row[i] not in ("refused", "BROKEN") and row[i] not in good]
        print(f"{way}: {len(good)} of {len(values)} work; silently wrong: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
