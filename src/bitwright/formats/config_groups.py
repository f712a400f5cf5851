"""What the quantization_config of compressed-tensors says of one module: its config group, and the schemes in it."""

from typing import Any

from torch import nn

from bitwright.errors import FormatError
from bitwright.numerics.scheme import GROUPS, TENSOR, TOKEN, Scheme, Zero

ORDER = "actorder"
BY_GROUP = ("group", "dynamic", True)  # what ORDER says of columns whose groups are in weight_g_idx


def group_of(config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
    """The config group of one module of class `kind`, with the library's defaults filled in.

    As in the library, a target that is the module's name has priority over regular expressions, those over class names.

    FormatError if no group matches the module, or `ignore` does.
    """
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from compressed_tensors.utils.match import is_match, match_targets

    module = kind.__new__(kind)  # not initialized: the library's matching looks only at its class
    groups = {target: (key, group) for key, group in config["config_groups"].items() for target in _targets(group)}
    found = match_targets(name, module, groups)
    if not found:
        remedy = "get a good copy of the checkpoint"
        raise FormatError("it is quantized in the file, and no config group covers it", where=name, remedy=remedy)
    if is_match(name, module, config.get("ignore") or []):
        message = "it is quantized in the file, and its quantization_config says that it is not (ignore)"
        raise FormatError(message, where=name, remedy="get a good copy of the checkpoint")
    key, group = groups[found[0]]
    ordered, group = _without_order(group)
    try:
        parsed = preset_name_to_scheme(key, group) if isinstance(group, list) else QuantizationScheme(**group)
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise FormatError(f"its config group cannot be read: {error}", where=name) from error
    said: dict[str, Any] = parsed.model_dump(mode="python")
    if said["weights"] is None or said["output_activations"] is not None:
        what = (
            "outputs are rounded, which"
            if said["weights"]
            else "weights are in float by its config group, and packed in the file:"
        )
        raise FormatError(f"its {what} is not computed here", where=name)
    said["weights"].pop(ORDER, None)  # "weight" and "static" tell how scales were found, not how columns lie
    said["weights"] |= {ORDER: BY_GROUP[0]} if ordered else {}
    return said


def _without_order(group: dict[str, Any] | list[str]) -> tuple[bool, dict[str, Any] | list[str]]:
    """Whether a config group has its columns in groups by a weight_g_idx, and the config group without saying so: the library
    no longer reads that."""
    weights = None if isinstance(group, list) else group.get("weights")
    if not weights or weights.get(ORDER) not in BY_GROUP:
        return False, group
    assert isinstance(group, dict)
    return True, {**group, "weights": {key: value for key, value in weights.items() if key != ORDER}}


def inferred_container(group: dict[str, Any], kind: type[nn.Module]) -> str:
    """The compression format that the library infers for a module of class `kind`."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme

    return str(infer_module_format(kind, QuantizationScheme(**group)).value)


def _targets(group: dict[str, Any] | list[str]) -> list[str]:
    """The targets of a config group. A preset (such as "W4A16") maps directly to its list of targets."""
    return group if isinstance(group, list) else list(group.get("targets") or [])


def refuse_transforms(config: dict[str, Any], name: str) -> None:
    """FormatError for checkpoints with sparse compression or with transforms (rotations), which are not implemented here."""
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        message = f"weights that are sparse as well ({sparsity}) are not read here"
        raise FormatError(
            message, where=name, remedy="decompress it with compressed-tensors 0.14, or take the original"
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        message = "rotations (transform_config) are not computed here, and its weights mean nothing without"
        raise FormatError(message, where=name, remedy="use it with vLLM, or quantize the original")


def scheme_of(arguments: dict[str, Any], where: str) -> Scheme:
    """The Scheme of weights for the library's QuantizationArgs; undoes `arguments`. FormatError if there is none."""
    bits, kind, strategy = arguments["num_bits"], arguments["type"], arguments["strategy"]
    length = arguments.get("group_size") or 0
    zero: Zero = "sym" if arguments["symmetric"] else "asym"
    microscaled = "uint8" in str(arguments.get("scale_dtype"))
    if kind == "int" and strategy in ("group", "channel", "tensor"):
        return Scheme(f"int{bits}", length if strategy == "group" else strategy, zero, "f32")
    if kind == "float" and bits == 8 and zero == "sym":
        if strategy in ("channel", "tensor"):
            return Scheme("fp8", strategy, "sym", "f32")
        if strategy == "group":
            return Scheme("fp8", length, "sym", "e8m0" if microscaled else "f32")
        if strategy == "block" and arguments["block_structure"][1] in GROUPS:
            return Scheme("fp8", arguments["block_structure"][1], "sym", "f32")
    if kind == "float" and bits == 4 and (strategy, length) == ("group", 32):
        return Scheme("fp4", 32, "sym", "e8m0")
    if kind == "float" and bits == 4 and (strategy, length) == ("tensor_group", 16):
        return Scheme("fp4", 16, "sym", "e4m3")
    raise FormatError(f"its weights are rounded in a way that is not computed here: {arguments}", where=where)


def scheme_of_inputs(arguments: dict[str, Any], where: str) -> Scheme:
    """The Scheme of activations for the library's QuantizationArgs. FormatError if it is not implemented here."""
    bits, kind, strategy, dynamic = (arguments[key] for key in ("num_bits", "type", "strategy", "dynamic"))
    grid = f"int{bits}" if kind == "int" else {8: "fp8", 4: "fp4"}.get(bits, "")
    length = arguments.get("group_size")
    zero: Zero = "sym" if arguments["symmetric"] else "asym"
    microscaled = "uint8" in str(arguments.get("scale_dtype"))
    if grid and strategy == TENSOR and grid != "fp4":
        return Scheme(grid, TENSOR, zero, "f32")
    if grid and strategy == TOKEN and dynamic and grid != "fp4":
        return Scheme(grid, TOKEN, zero, "f32")
    if grid and strategy == "group" and dynamic and length in GROUPS and (microscaled or grid != "fp4"):
        return Scheme(grid, length, zero, "e8m0" if microscaled else "f32")
    if (grid, strategy, length, zero) == ("fp4", "tensor_group", 16, "sym") and dynamic:
        return Scheme("fp4", 16, "sym", "e4m3")
    message = f"its inputs are rounded in a way that is not computed here: {arguments}"
    remedy = "inputs by token, by tensor, in groups (FP8, MXFP8, MXFP4) or as NVFP4 has them"
    raise FormatError(message, where=where, remedy=remedy)
