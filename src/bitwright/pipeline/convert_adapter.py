"""LoRA adapters as GGUF files, which llama.cpp loads beside a model (--lora), and GGUF files of them as peft's directories.

For a tensor NAME of the model the file has NAME.lora_a [r, K] and NAME.lora_b [N, r]; rows of the latter lie in the order of
NAME's own (gguf/tensor_names.py). The file has one α, and what is added is α / r · B A with each tensor's own rank r, or B A
if α is 0. Source: llama.cpp's src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, FormatError, InputError
from bitwright.files.checkpoint import disk_errors, sync_folder, write_file, write_shard
from bitwright.files.hub import local
from bitwright.formats.gguf_writer import FLOAT_TYPES, GgufWriter, place
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.tensor_names import TRANSPOSED, Names, expert_of
from bitwright.models.adapter import CONFIG, STEM, WEIGHTS, Adapter
from bitwright.models.adapter_base import recorded_base
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.numerics.qtensor import permuted, unpermuted
from bitwright.pipeline.work_in_progress import unfinished_file

KIND, LORA, ALPHA = "general.type", "adapter.type", "adapter.lora.alpha"
ACTIVATED = "adapter.alora.invocation_tokens"  # of adapters that begin to count in the middle of a text
HALVES = (".lora_a", ".lora_b")


def is_gguf_adapter(path: Path) -> bool:
    """Whether a GGUF file holds an adapter. CheckpointError for a damaged file."""
    return GgufFile(path).keys.get(KIND) == "adapter"


def adapter_to_gguf(folder: Path, out: Path, base: Path | None) -> dict[str, Any]:
    """Write an adapter in peft's form as a GGUF file; gives {out, bytes, tensors, notes}.

    base: the model that it is for, of which the config alone is read; None: where the adapter says that it lies.
    CheckpointError for an adapter that is damaged or of another model; FormatError for what llama.cpp cannot add.
    """
    adapter = Adapter(folder)
    skeleton = Skeleton(read_config(local(base or _named(adapter))), torch.float32)
    adapter.check(skeleton)
    names = Names(skeleton.config)
    alpha, tensors = _tensors(adapter, names)
    keys = {
        "general.architecture": names.row.name, KIND: "adapter", "general.name": folder.resolve().name,
        LORA: "lora", ALPHA: alpha,
    }  # fmt: skip
    described = [(name, FLOAT_TYPES[t.dtype], t.to("meta")) for name, t in tensors.items()]
    unfinished = unfinished_file(out)
    with GgufWriter(unfinished, keys, described) as file:
        for name, tensor in tensors.items():
            file.put_floats(name, tensor)
        file.flush()
    with disk_errors(out):
        unfinished.rename(out)
    return {"out": str(out), "bytes": out.stat().st_size, "tensors": len(tensors), "notes": []}


def _named(adapter: Adapter) -> Path:
    """The base that the adapter names, by what `finetune` recorded or in its config. InputError if it names none."""
    recorded = recorded_base(adapter.folder) or {}
    known = (str(recorded.get("base", "")), str(adapter.config.get("base_model_name_or_path") or ""))
    named = next((name for name in known if name and Path(name).exists()), known[1])
    if not named:
        remedy = "--base MODEL: the directory, GGUF file or hub name of the model that it was trained beside"
        raise InputError("the adapter does not say which model it is for", where=str(adapter.folder), remedy=remedy)
    return Path(named)


def _tensors(adapter: Adapter, names: Names) -> tuple[float, dict[str, Tensor]]:
    """The file's α and tensors, in its order. What one α cannot say of a module is multiplied into its B."""
    whole = next(iter(adapter.replaced), "") or next((m for m in adapter.deltas if not names.has(f"{m}.weight")), "")
    if whole or not adapter.deltas:
        remedy = f"merge it into the model: bitwright merge MODEL {adapter.folder} OUT.gguf --scheme q4_k_m"
        raise FormatError("llama.cpp has no place for parameters that were trained whole", where=whole, remedy=remedy)
    first = next(iter(adapter.deltas.values()))
    alpha, found = first.scaling * len(first.A) or float(len(first.A)), dict[str, Tensor]()
    for module, delta in adapter.deltas.items():
        parameter = f"{module}.weight"
        what = "DoRA's magnitudes" if delta.magnitude is not None else _no_place(names, parameter)
        if what:
            remedy = f"merge it into the model: bitwright merge MODEL {adapter.folder} OUT.gguf --scheme q4_k_m"
            raise FormatError(f"llama.cpp has no place for {what}", where=module, remedy=remedy)
        factor = delta.scaling * len(delta.A) / alpha
        B = delta.B if abs(factor - 1) < 1e-12 else delta.B.float() * factor
        name, columns = names.of(parameter), names.columns(parameter, delta.A.shape[1])
        found[f"{name}{HALVES[0]}"] = permuted(delta.A, columns).contiguous()
        found[f"{name}{HALVES[1]}"] = permuted(B, names.rows(parameter, len(B)), 0).contiguous()
    return alpha, dict(sorted(found.items(), key=lambda item: place(item[0])))


def _no_place(names: Names, parameter: str) -> str:
    """What there is of an adapter of this parameter that llama.cpp has no place for; "": nothing."""
    if expert_of(parameter) is not None:
        return "an adapter of single experts"
    if len(names.tensors_of(parameter)) > 1:
        return f"an adapter of a matrix that is cut into {' and '.join(names.tensors_of(parameter))}"
    if names.row.kind == "falcon_h1":
        return "an adapter of a model whose multipliers are folded into its matrices"
    return ""


def adapter_from_gguf(file: Path, out: Path, base: Path | None) -> dict[str, Any]:
    """Write a GGUF file of a LoRA adapter as a directory in peft's form; gives {out, bytes, tensors, notes}.

    base: the model that it is for, which must be given. CheckpointError for a file that is damaged, or of another model.
    """
    if base is None:
        remedy = f"bitwright convert {file} {out} --base MODEL"
        raise InputError("the file does not say which model it is for", where=str(file), remedy=remedy)
    skeleton = Skeleton(read_config(local(base)), torch.float32)
    names, read = Names(skeleton.config), GgufFile(file)
    _check_kind(read, names)
    modules = {names.of(f"{m}.weight"): m for m in skeleton.linear_names() if names.has(f"{m}.weight")}
    tensors = dict[str, Tensor]()
    for name, half in _split(read):
        if name not in modules:
            message = f"tensor {name + half!r} belongs to no linear layer of {base}"
            raise CheckpointError(message, where=str(file), remedy="give the model that it was trained beside")
        part, parameter = read.read(name + half), f"{modules[name]}.weight"
        if half == HALVES[0]:
            part = unpermuted(part, names.columns(parameter, part.shape[1]))
        else:
            part = unpermuted(part, names.rows(parameter, len(part)), 0)
        stem = f"{STEM}{modules[name]}.lora_{half[-1].upper()}.weight"
        tensors[stem] = part.contiguous()
    config = _config(tensors, float(read.keys.get(ALPHA, 0.0)), skeleton, names, base)
    with disk_errors(out), tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.resolve().parent) as folder:
        made = Path(folder) / "adapter"
        made.mkdir()
        write_shard(made / WEIGHTS, tensors)
        write_file(made / CONFIG, json.dumps(config, indent=1).encode())
        sync_folder(made)
        Adapter(made).check(skeleton)  # both halves of each pair, of ranks and shapes that fit
        made.rename(out)
    return {"out": str(out), "bytes": (out / WEIGHTS).stat().st_size, "tensors": len(tensors), "notes": []}


def _check_kind(file: GgufFile, names: Names) -> None:
    """CheckpointError for an adapter of another kind than LoRA, or of another architecture."""
    kind, made_for = file.keys.get(LORA), file.keys.get("general.architecture")
    if kind != "lora" or ACTIVATED in file.keys:
        what = "activated LoRA" if kind == "lora" else f"the kind {kind!r}"
        raise CheckpointError(f"an adapter of {what}", where=str(file.path), remedy="give a file of plain LoRA")
    if made_for != names.row.name:
        message = f"the adapter is for the architecture {made_for}, the base is {names.row.name}"
        raise CheckpointError(message, where=str(file.path), remedy="--base with the model that it was trained beside")


def _split(file: GgufFile) -> list[tuple[str, str]]:
    """The tensors as (name in the model, half). CheckpointError for other tensors."""
    found = [(name[:-7], name[-7:]) for name in file.tensors]
    odd = next((name + half for name, half in found if half not in HALVES), None)
    if odd is not None or not found:
        message = f"tensor {odd!r} is no half of a LoRA pair" if odd else "no tensors"
        raise CheckpointError(message, where=str(file.path), remedy="get a good copy")
    return found


def _config(
    tensors: Mapping[str, Tensor], alpha: float, skeleton: Skeleton, names: Names, base: Path
) -> dict[str, Any]:
    """peft's adapter_config.json for tensors in peft's form; alpha 0: B A is added as it is."""
    ending = ".lora_A.weight"
    ranks = {
        name.removeprefix(STEM).removesuffix(ending): len(A) for name, A in tensors.items() if name.endswith(ending)
    }
    most = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    others = {module: rank for module, rank in ranks.items() if rank != most}
    named = str(base.resolve() if base.exists() else base)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if names.row.causal else None, "base_model_name_or_path": named,
        "r": most, "lora_alpha": alpha or most, "rank_pattern": others, "alpha_pattern": {} if alpha else others,
        "target_modules": _targets(set(ranks), skeleton), "bias": "none", "inference_mode": True,
        "fan_in_fan_out": any(f"{module}.weight".endswith(TRANSPOSED) for module in ranks) and names.row.kind == "gpt2",
    }  # fmt: skip


def _targets(modules: set[str], skeleton: Skeleton) -> list[str]:
    """peft's target_modules: last parts of names where they mean exactly these modules, else whole names."""
    leaves = {module.rpartition(".")[2] for module in modules}
    meant = {module for module in skeleton.linear_names() if module.rpartition(".")[2] in leaves}
    return sorted(leaves if meant == modules else modules)
